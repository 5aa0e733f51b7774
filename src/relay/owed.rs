//! Chains whose frames the VF took from where they lie, and may still be reading.

use std::collections::VecDeque;
use std::time::Instant;

use crate::ring::IN_FLIGHT;

/// What a ring owes its guest: chains to complete, oldest first, when the VF is done with them.
#[derive(Debug)]
pub(super) struct Owed {
    entries: VecDeque<Entry>,
    chains: usize,
}

/// Chains that are due when the VF queue has returned so many lent frames.
#[derive(Debug)]
struct Entry {
    returned: u32,
    chains: usize,
    lent: Option<Lent>,
}

impl Owed {
    pub(super) fn new() -> Self {
        // Each entry has a chain in flight at least, so this never grows on a core.
        Self { entries: VecDeque::with_capacity(IN_FLIGHT), chains: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Chains in it.
    pub(super) fn chains(&self) -> usize {
        self.chains
    }

    /// Adds chains that are due when the queue has returned `returned` frames, and not before earlier ones; with the
    /// lent ones among them, if there are any.
    pub(super) fn push(&mut self, chains: usize, returned: u32, lent: Option<Lent>) {
        if chains == 0 {
            return;
        }
        self.chains += chains;
        match self.entries.back_mut() {
            Some(last) if last.returned == returned => last.chains += chains,
            _ => self.entries.push_back(Entry { returned, chains, lent }),
        }
    }

    /// Takes out what is due now that the queue has returned `returned` frames; returns how many chains. `back` is
    /// shown the lent frames among them.
    pub(super) fn due(&mut self, returned: u32, mut back: impl FnMut(Lent)) -> usize {
        let before = self.chains;
        // Counts wrap; they are never half of their range apart.
        while let Some(first) = self.entries.front()
            && returned.wrapping_sub(first.returned).cast_signed() >= 0
        {
            self.chains -= first.chains;
            first.lent.map(&mut back);
            self.entries.pop_front();
        }
        before - self.chains
    }

    /// Takes out all; returns how many lent frames were among them.
    pub(super) fn clear(&mut self) -> u64 {
        self.chains = 0;
        self.entries.drain(..).filter_map(|entry| entry.lent).map(|lent| u64::from(lent.frames)).sum()
    }
}

/// Frames that the VF took from where they lie, all at one time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lent {
    pub(super) frames: u32,
    pub(super) since: Instant,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_are_due_in_order_when_their_frames_are_back() {
        let mut owed = Owed::new();
        let lent = |frames| Some(Lent { frames, since: Instant::now() });
        owed.push(3, u32::MAX, lent(3));
        owed.push(2, u32::MAX, None);
        owed.push(0, 7, None);
        owed.push(4, 2, lent(3));
        let due = |owed: &mut Owed, returned| {
            let mut back = 0;
            (owed.due(returned, |lent| back += lent.frames), back)
        };
        assert_eq!((owed.chains(), due(&mut owed, u32::MAX - 1)), (9, (0, 0)));
        assert_eq!((due(&mut owed, u32::MAX), owed.chains()), ((5, 3), 4));
        assert_eq!(due(&mut owed, 1), (0, 0));
        assert_eq!((due(&mut owed, 2), owed.is_empty()), ((4, 3), true));
        owed.push(6, 3, lent(1));
        owed.push(6, 5, lent(2));
        assert_eq!((owed.clear(), owed.chains(), owed.is_empty()), (3, 0, true));
    }
}
