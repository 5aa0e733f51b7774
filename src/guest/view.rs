//! One ring's look at its guest's memory.

use std::sync::Arc;

use super::memory::Span;
use super::{Gpa, GuestMemory, HostRange, sigbus};

/// A guest's memory as one ring sees it: the shared table, and the region that was hit last, which
/// answers nearly every look-up (a guest's buffers come from few regions).
#[derive(Debug)]
pub(crate) struct View {
    last: Span,
    memory: Arc<GuestMemory>,
    deaths_seen: usize,
}

impl View {
    pub(crate) fn new(memory: Arc<GuestMemory>) -> Self {
        Self {
            last: Span::NONE,
            memory,
            // One behind, so that the first question looks at the regions.
            deaths_seen: sigbus::deaths().wrapping_sub(1),
        }
    }

    pub(crate) fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Looks at a newer table, which keeps every region of the old one: what was found there stays where it is.
    pub(crate) fn switch(&mut self, newer: Arc<GuestMemory>) {
        assert!(!self.memory.loses_regions_in(&newer), "a ring's memory goes only when the ring is out");
        self.deaths_seen = sigbus::deaths().wrapping_sub(1);
        self.memory = newer;
    }

    /// As [`GuestMemory::translate`].
    #[inline]
    pub(crate) fn translate(&mut self, gpa: Gpa, len: u64) -> Option<HostRange> {
        if let Some(range) = self.last.clip(gpa, len) {
            return Some(range);
        }
        self.last = self.memory.span(gpa)?;
        self.last.clip(gpa, len)
    }

    /// The piece at `gpa`, if all of `len` lies in one region.
    #[inline(always)]
    pub(crate) fn whole(&mut self, gpa: Gpa, len: u64) -> Option<HostRange> {
        match self.last.whole(gpa, len) {
            None => self.whole_elsewhere(gpa, len),
            found => found,
        }
    }

    #[cold]
    fn whole_elsewhere(&mut self, gpa: Gpa, len: u64) -> Option<HostRange> {
        self.last = self.memory.span(gpa)?;
        self.last.whole(gpa, len)
    }

    /// As [`GuestMemory::is_dead`], for one load as long as no region of any guest dies.
    #[inline]
    pub(crate) fn is_dead(&mut self) -> bool {
        let deaths = sigbus::deaths();
        if deaths == self.deaths_seen {
            return false;
        }
        // Ours or another guest's. If ours, the answer stays "dead": do not take note.
        let dead = self.memory.is_dead();
        if !dead {
            self.deaths_seen = deaths;
        }
        dead
    }
}
