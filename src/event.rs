//! An eventfd of our own, by which one thread wakes another.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

use crate::error::{Error, Result};

/// Readable from a signal until it is taken.
#[derive(Debug)]
pub struct Event(OwnedFd);

impl Event {
    /// Not signalled. `whose` is for the error.
    pub fn new(whose: &str) -> Result<Self> {
        eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .map(Self)
            .map_err(|errno| Error::io(format!("cannot create the eventfd of {whose}"))(errno.into()))
    }

    /// Wakes whoever waits for it, or is about to. Never waits.
    pub fn signal(&self) {
        // Fails only when the counter is at its maximum: it is signalled already.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    /// Takes back what was signalled so far, if anything.
    pub fn take(&self) {
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
