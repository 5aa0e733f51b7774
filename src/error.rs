//! What can go wrong in the control plane. A guest's lies are not errors: they are
//! [`crate::ring::ChainFault`] and [`crate::ring::RingFault`], counted on the core.

use std::io;

/// Result of a control-plane operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A control-plane failure: names what failed, the value, and what to do about it.
/// Answered to the client once and logged once.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A request asks for something that can never be right; nothing was changed.
    #[error("{0}")]
    Invalid(String),
    /// The daemon's configuration does not allow what was asked.
    #[error("{0}")]
    NotAllowed(String),
    /// No such port.
    #[error("{0}")]
    NotFound(String),
    /// Another port holds the VF, socket or identity asked for.
    #[error("{0}")]
    Conflict(String),
    /// The VF is not there (yet), or not bound to a driver that DPDK can use.
    #[error("{0}")]
    VfAbsent(String),
    /// A resource has run out: ethdev slots, hugepages, container count.
    #[error("{0}")]
    Exhausted(String),
    /// A DPDK call failed.
    #[error("DPDK's {call} failed for {subject}: {} (errno {errno}); {hint}", io::Error::from_raw_os_error(*errno))]
    Dpdk {
        /// The C function.
        call: &'static str,
        /// The device, pool or queue it was about.
        subject: String,
        /// Positive errno.
        errno: i32,
        /// What the operator can do.
        hint: &'static str,
    },
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, with the path or value.
        what: String,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },
    /// The front end's memory regions cannot be used.
    #[error("guest memory: {0}")]
    Memory(String),
    /// The front end broke the vhost-user protocol; its connection is closed.
    #[error("vhost-user: {0}")]
    Protocol(String),
}

impl Error {
    /// Wraps an I/O error with what was being tried.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// Stable name of the error class, for JSON-RPC clients and exit codes. Never renamed.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "invalid",
            Self::NotAllowed(_) => "not_allowed",
            Self::NotFound(_) => "not_found",
            Self::Conflict(_) => "conflict",
            Self::VfAbsent(_) => "vf_absent",
            Self::Exhausted(_) => "exhausted",
            Self::Dpdk { .. } => "dpdk",
            Self::Io { .. } => "io",
            Self::Memory(_) => "memory",
            Self::Protocol(_) => "protocol",
        }
    }
}
