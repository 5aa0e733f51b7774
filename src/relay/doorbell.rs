//! A ring's eventfds: the kick we may sleep on, the call and the err we signal.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use rustix::io::Errno;

/// Which notification a core is in, for the watchdog: the front end may have made the eventfd blocking again
/// behind our back. A count and not a time: a core reads the clock once a round, and a late notification of a
/// long round is not an old one.
#[derive(Debug, Default)]
pub struct NotifyMark {
    /// Notifications begun and ended: odd while in one.
    steps: AtomicU64,
}

impl NotifyMark {
    /// The number of the notification the core is in.
    pub fn current(&self) -> Option<u64> {
        let steps = self.steps.load(Relaxed);
        (steps % 2 == 1).then_some(steps)
    }

    /// Goes in, or out. Only the core does that: no locked instruction.
    fn step(&self) {
        self.steps.store(self.steps.load(Relaxed).wrapping_add(1), Relaxed);
    }
}

/// The signal could not be delivered within the watchdog's limit: the eventfd blocks.
#[derive(Debug, PartialEq, Eq)]
pub struct Blocked;

/// Kick, call and err of one ring. All are eventfds, checked and made non-blocking when they came.
#[derive(Clone, Debug, Default)]
pub struct Doorbell {
    /// The guest signals new buffers here.
    pub kick: Option<Arc<OwnedFd>>,
    /// We signal used buffers here.
    pub call: Option<Arc<OwnedFd>>,
    /// We signal here that the ring stands still.
    pub err: Option<Arc<OwnedFd>>,
}

impl Doorbell {
    /// Signals the guest. Returns whether there was anything to signal.
    pub fn call(&self, mark: &NotifyMark) -> Result<bool, Blocked> {
        signal(&self.call, mark)
    }

    /// Signals the front end that the ring stands still. Returns whether there was anything to signal.
    pub fn err(&self, mark: &NotifyMark) -> Result<bool, Blocked> {
        signal(&self.err, mark)
    }

    /// The kick, to sleep on; never read (see `Sleeper`).
    pub fn kick_fd(&self) -> Option<BorrowedFd<'_>> {
        self.kick.as_ref().map(|kick| kick.as_fd())
    }

    /// Whether these are the very same fds.
    pub fn is(&self, other: &Self) -> bool {
        let fds = |bell: &Self| [&bell.kick, &bell.call, &bell.err].map(|fd| fd.as_ref().map(Arc::as_ptr));
        fds(self) == fds(other)
    }
}

fn signal(fd: &Option<Arc<OwnedFd>>, mark: &NotifyMark) -> Result<bool, Blocked> {
    let Some(fd) = fd else {
        return Ok(false);
    };
    mark.step();
    let written = rustix::io::write(fd, &1u64.to_ne_bytes());
    mark.step();
    match written {
        // A full counter (EAGAIN) is a signal that was not yet taken.
        Ok(_) | Err(Errno::AGAIN) => Ok(true),
        Err(Errno::INTR) => Err(Blocked),
        Err(_) => Ok(false),
    }
}
