//! A ring's eventfds: the kick we may sleep on, the call we signal.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use rustix::io::Errno;

/// Since when a core has been in a notification, for the watchdog: the front end may have made the eventfd
/// blocking again behind our back.
#[derive(Debug)]
pub struct NotifyMark {
    epoch: Instant,
    /// Nanoseconds after `epoch` plus one; 0: in none.
    since: AtomicU64,
}

impl Default for NotifyMark {
    fn default() -> Self {
        Self { epoch: Instant::now(), since: AtomicU64::new(0) }
    }
}

impl NotifyMark {
    /// How long the core has been in its present notification, in nanoseconds.
    pub fn nanoseconds(&self) -> Option<u64> {
        let since = self.since.load(Relaxed).checked_sub(1)?;
        Some((self.epoch.elapsed().as_nanos() as u64).saturating_sub(since))
    }

    fn enter(&self, now: Instant) {
        self.since.store(now.saturating_duration_since(self.epoch).as_nanos() as u64 + 1, Relaxed);
    }

    fn leave(&self) {
        self.since.store(0, Relaxed);
    }
}

/// The signal could not be delivered within the watchdog's limit: the eventfd blocks.
#[derive(Debug, PartialEq, Eq)]
pub struct Blocked;

/// Kick and call of one ring. Both are eventfds, checked and made non-blocking when they came.
#[derive(Clone, Debug, Default)]
pub struct Doorbell {
    /// The guest signals new buffers here.
    pub kick: Option<Arc<OwnedFd>>,
    /// We signal used buffers here.
    pub call: Option<Arc<OwnedFd>>,
}

impl Doorbell {
    /// Signals the guest. Returns whether there was anything to signal.
    pub fn call(&self, now: Instant, mark: &NotifyMark) -> Result<bool, Blocked> {
        let Some(call) = &self.call else {
            return Ok(false);
        };
        mark.enter(now);
        let written = rustix::io::write(call, &1u64.to_ne_bytes());
        mark.leave();
        match written {
            // A full counter (EAGAIN) is a signal that was not yet taken.
            Ok(_) | Err(Errno::AGAIN) => Ok(true),
            Err(Errno::INTR) => Err(Blocked),
            Err(_) => Ok(false),
        }
    }

    /// The kick, to sleep on; never read (see `Sleeper`).
    pub fn kick_fd(&self) -> Option<BorrowedFd<'_>> {
        self.kick.as_ref().map(|kick| kick.as_fd())
    }
}
