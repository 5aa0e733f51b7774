//! What split and packed virtqueues have in common: how they are configured, and the few verbs by which
//! bursts know them.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::chain::Stop;
use super::packed::PackedRing;
use super::split::SplitRing;
use super::{RingConfig, RingFault};
use crate::error::{Error, Result};
use crate::guest::{GuestMemory, HostRange, UserAddr, View};

/// So many malformed chains without a good one between them stop a ring.
const MALFORMED_RUN: u32 = 1024;

/// What a ring has to know of a chain to give it back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Token {
    /// Split: index of its first descriptor. Packed: buffer id, from its last.
    pub(super) id: u16,
    /// Entries of the ring it takes: 1 in an available ring, in a packed ring one for each descriptor.
    pub(super) slots: u16,
}

/// A virtqueue, device side. Chains are taken out in order and retired in order; what is taken out and
/// not retired is *in flight*. Distances are in slots.
pub(super) trait Virtqueue {
    /// Before a burst: whether the ring is sound, and with `again` or if nothing was known to wait,
    /// what waits.
    fn look(&mut self, again: bool) -> Result<(), RingFault>;

    /// Whether a chain waits `ahead` slots behind the next one.
    fn is_ready(&self, ahead: u16) -> bool;

    /// Reads that chain, which is ready: each of its descriptors once, its pieces in order to `take`, until
    /// `take` stops. `WRITABLE`: for the device to write, else to read.
    fn read<const WRITABLE: bool>(
        &mut self,
        ahead: u16,
        budget: &mut usize,
        take: impl FnMut(HostRange) -> Result<(), Stop>,
    ) -> (Token, Result<(), Stop>);

    /// Takes out the next chains, at most `max`, as long as they are ready, usual (one descriptor, its buffer in one piece),
    /// and `take` wants them. Returns how many. Of others nothing that was read
    /// counts.
    fn take_simple<const WRITABLE: bool>(&mut self, max: usize, take: impl FnMut(Token, HostRange) -> bool) -> usize;

    /// Takes the next chains out, of so many slots; all were ready.
    fn advance(&mut self, slots: u16);

    /// Retires the oldest chain in flight, with `len` bytes written. Visible after `publish`.
    fn stage(&mut self, chain: Token, len: u32) {
        self.stage_each(std::iter::once((chain, len)));
    }

    /// Retires the oldest chains in flight, each with so many bytes written.
    fn stage_each(&mut self, chains: impl Iterator<Item = (Token, u32)>);

    /// Retires the oldest chains in flight, with nothing written.
    fn stage_empty(&mut self, chains: impl ExactSizeIterator<Item = Token>);

    /// Puts the chains in flight that were taken out last back, of so many slots together.
    fn put_back(&mut self, slots: u16);

    /// See [`super::Ring::publish`].
    fn publish(&mut self) -> bool;

    /// Whether there is something to publish.
    fn is_staged(&self) -> bool;

    /// Tells the guest whether to kick.
    fn ask_for_kicks(&mut self, wanted: bool);

    /// See [`super::Ring::enable_kicks`].
    fn enable_kicks(&mut self) -> bool {
        self.ask_for_kicks(true);
        // The mirror image of `publish`: first say what we want, then look.
        fence(Ordering::SeqCst);
        // A fault is something to wake up for, too.
        self.look(true).is_err() || self.is_ready(0)
    }

    /// See [`super::Ring::position`].
    fn position(&self) -> u16;

    /// How far it is to be believed.
    fn trust(&mut self) -> &mut Trust;

    /// Its size, in slots.
    fn size(&self) -> u16;

    /// The memory its pointers point into.
    fn memory(&self) -> &Arc<GuestMemory>;

    /// Its look at that.
    fn view_mut(&mut self) -> &mut View;
}

/// A virtqueue of the format that was negotiated. What is called for a burst or a packet takes it apart
/// once; the rest is here.
#[derive(Debug)]
// There is one a ring; a box would be one more pointer to follow on a packet's way.
#[allow(clippy::large_enum_variant)]
pub(super) enum Queue {
    Split(SplitRing),
    Packed(PackedRing),
}

/// Does the same with either.
macro_rules! either {
    ($queue:expr, $ring:ident => $act:expr) => {
        match $queue {
            $crate::ring::virtqueue::Queue::Split($ring) => $act,
            $crate::ring::virtqueue::Queue::Packed($ring) => $act,
        }
    };
}
pub(super) use either;

impl Queue {
    pub(super) fn new(memory: Arc<GuestMemory>, config: &RingConfig) -> Result<Self> {
        Ok(match config.packed {
            false => Self::Split(SplitRing::new(memory, config)?),
            true => Self::Packed(PackedRing::new(memory, config)?),
        })
    }
}

/// How far a ring is to be believed.
#[derive(Debug, Default)]
pub(super) struct Trust {
    malformed: u32,
    fault: Option<RingFault>,
}

impl Trust {
    /// The fault that stopped the ring, if one did.
    #[inline]
    pub(super) fn check(&self) -> Result<(), RingFault> {
        self.fault.map_or(Ok(()), Err)
    }

    /// The ring yields nothing more. The first fault stands.
    #[cold]
    pub(super) fn stop(&mut self, fault: RingFault) -> RingFault {
        *self.fault.get_or_insert(fault)
    }

    /// Notes whether a chain was malformed; too many in a row stop the ring.
    #[inline]
    pub(super) fn judge(&mut self, malformed: bool) {
        if !malformed {
            self.malformed = 0;
            return;
        }
        self.malformed += 1;
        if self.malformed >= MALFORMED_RUN {
            self.stop(RingFault::Malformed);
        }
    }
}

/// The mapped memory of one of a ring's areas.
pub(super) fn area(memory: &GuestMemory, name: &str, at: UserAddr, len: usize, align: usize) -> Result<HostRange> {
    let Some(range) = memory.translate_user(at, len as u64) else {
        return Err(Error::Memory(format!("{name} at {at:?} with {len:#x} bytes is not inside one region")));
    };
    if !range.as_ptr().addr().is_multiple_of(align) {
        return Err(Error::Protocol(format!("{name} at {at:?} is not aligned to {align} bytes")));
    }
    Ok(range)
}

/// Whether the other side wants to hear of a move from `old` to `new` when it asked for `event` (2.7.10).
#[inline]
pub(super) fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// 2.7.10 in words: the entry at index `event` is among those from `old` to before `new`.
        #[test]
        fn an_event_is_wanted_if_its_entry_is_among_the_new(old: u16, count in 0..=32768_u16, ahead in 0..40000_u16) {
            for event in [old.wrapping_add(ahead), old.wrapping_add(count), old.wrapping_sub(1)] {
                let among = (0..count).any(|i| old.wrapping_add(i) == event);
                prop_assert_eq!(need_event(event, old.wrapping_add(count), old), among);
            }
        }
    }
}
