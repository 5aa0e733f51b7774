//! Which queues of a VF are out.

use std::fmt::Display;
use std::sync::Arc;

use crate::error::{Error, Result};

/// Held by a queue as long as it lives: its VF is not stopped or closed under it, but by whoever has all of them
/// (a restart).
#[derive(Debug)]
pub(super) struct Lease {
    _of: Arc<()>,
}

/// Held by a VF, for the queues it has handed out.
#[derive(Debug, Default)]
pub(super) struct Leases(Arc<()>);

impl Leases {
    /// One more queue is out.
    pub(super) fn lease(&self) -> Lease {
        Lease { _of: Arc::clone(&self.0) }
    }

    /// An error while a queue is out. If none is, what their owners did to the VF has happened before.
    pub(super) fn require_none(&mut self, vf: impl Display) -> Result<()> {
        match Arc::get_mut(&mut self.0) {
            Some(()) => Ok(()),
            None => Err(Error::Conflict(format!(
                "{vf} cannot be stopped: {} of its queues are in use; this is a defect, restart the daemon",
                Arc::strong_count(&self.0) - 1
            ))),
        }
    }
}
