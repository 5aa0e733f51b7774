//! Virtqueues, device side, over cached pointers (virtio 1.3, sections 2.7 and 2.8).
//!
//! [`TxRing`] is what the guest sends on, [`RxRing`] what it receives on; they are different types
//! over one private virtqueue ([`Ring`]), so that misuse does not compile. Each owns an `Arc` of the guest
//! memory its pointers point into. What is theirs (bursts, frames, gathering buffers) knows a virtqueue
//! only by the verbs of `virtqueue::Virtqueue`; `split` and `packed` are its two formats. Which one was
//! chosen at negotiation is asked once for a burst or a frame, and the code behind is compiled for each.
//!
//! A guest may write anything at any time. So each index, descriptor and header is read once into
//! private memory and checked there, work per call is bounded, and what is wrong costs the guest its
//! own chain ([`ChainFault`]) or its own ring ([`RingFault`]).

mod chain;
mod config;
mod header;
mod packed;
mod rx;
mod split;
#[cfg(any(test, fuzzing))]
pub mod testing;
#[cfg(test)]
mod tests;
mod tx;
mod virtqueue;

use std::sync::Arc;

use crate::guest::{GuestMemory, GuestSink};
use virtqueue::{Queue, Virtqueue, either};

pub use config::{RingAddresses, RingConfig};
pub use header::{Gso, NetHeader};
pub use rx::{PushError, RxRing, Supply};
pub use tx::{Frame, PlainFrame, TxRing};

/// A guest's virtqueue, device side: what both directions have in common. `S` is what is theirs.
#[derive(Debug)]
pub struct Ring<S> {
    queue: Queue,
    side: S,
}

impl<S> Ring<S> {
    /// Makes what was retired visible with one release store. Returns whether the guest wants to be
    /// signalled for it (virtio 1.3, 2.7.7 and 2.8.14); never when nothing was retired.
    #[inline]
    pub fn publish(&mut self) -> bool {
        either!(&mut self.queue, queue => queue.publish())
    }

    /// Whether `publish` has something to show.
    #[inline]
    pub fn is_staged(&self) -> bool {
        either!(&self.queue, queue => queue.is_staged())
    }

    /// Asks the guest for a kick on the next buffer it makes available, then looks again: `true` if there is one
    /// already (do not sleep), or if the ring is broken (its next use says how).
    pub fn enable_kicks(&mut self) -> bool {
        either!(&mut self.queue, queue => queue.enable_kicks())
    }

    /// Tells the guest that we poll.
    pub fn disable_kicks(&mut self) {
        either!(&mut self.queue, queue => queue.ask_for_kicks(false));
    }

    /// The used position, of what is published: the answer to GET_VRING_BASE when nothing is in flight.
    /// Of a packed ring with the wrap counter in bit 15.
    pub fn position(&self) -> u16 {
        either!(&self.queue, queue => queue.position())
    }

    /// The memory its pointers point into.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        either!(&self.queue, queue => queue.memory())
    }

    /// The guest has more memory now: a table that keeps every region of the old one.
    ///
    /// # Panics
    /// If it does not.
    pub fn switch_memory(&mut self, newer: Arc<GuestMemory>) {
        either!(&mut self.queue, queue => queue.view_mut().switch(newer));
    }
}

/// Bytes of a cache line.
const LINE: usize = 64;

/// The most packets a burst has.
pub const BURST: usize = 32;

/// The most chains a TX ring hands out before they are completed: of a VF that is slow to say what it has sent,
/// as many as its queue holds.
pub const IN_FLIGHT: usize = 1024;

/// Bytes that can be read once, front to back: a frame in guest memory, a received mbuf, a slice.
pub trait Gather {
    /// Bytes left.
    fn remaining(&self) -> usize;
    /// Copies the next `into.len()` bytes; the caller has checked `remaining`.
    fn copy_next(&mut self, into: &mut [u8]);
    /// Copies the next `into.room()` bytes into guest memory; the caller has checked `remaining`.
    /// A source that is slices of our own memory overrides this, to copy each byte once, not twice.
    fn store_next(&mut self, into: &mut GuestSink<'_>) {
        let mut bounce = [0; 256];
        while into.room() > 0 {
            let piece = &mut bounce[..into.room().min(256)];
            self.copy_next(piece);
            into.write(piece);
        }
    }
}

/// Bytes of our own, as a [`Gather`].
impl Gather for &[u8] {
    fn remaining(&self) -> usize {
        self.len()
    }

    fn copy_next(&mut self, into: &mut [u8]) {
        let (head, tail) = self.split_at(into.len());
        into.copy_from_slice(head);
        *self = tail;
    }

    fn store_next(&mut self, into: &mut GuestSink<'_>) {
        let (head, tail) = self.split_at(into.room());
        into.write(head);
        *self = tail;
    }
}

/// A chain that is malformed: it is consumed with length 0 and counted; the ring goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainFault {
    /// The head or a `next` index is not below the table's size.
    #[error("descriptor index out of the table")]
    Index,
    /// More descriptors than the table has: a loop.
    #[error("descriptor chain loops")]
    Loop,
    /// An address range that is not inside guest memory, or zero length where that is illegal.
    #[error("descriptor outside guest memory")]
    Address,
    /// A device-writable buffer in a TX chain or a readable one in an RX chain.
    #[error("descriptor has the wrong direction")]
    Direction,
    /// INDIRECT without having been negotiated, nested, combined with NEXT, or of a wrong length.
    #[error("bad indirect table")]
    Indirect,
    /// Shorter than the virtio-net header (and, for TX, an Ethernet header).
    #[error("chain shorter than its headers")]
    Short,
    /// Longer than any frame we accept, or in more pieces than a burst can hold.
    #[error("chain too long")]
    Long,
}

/// The ring itself lies: it is stopped (quarantined) with this reason; the port's other rings go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingFault {
    /// avail.idx is more than the ring's size ahead of what we consumed (virtio 1.3, 2.7.6).
    #[error("avail index jumps by more than the queue size")]
    AvailIndex,
    /// A packed ring's chain that does not end within the slots the guest can have filled, or within any
    /// sensible number: where the next one begins is unknown.
    #[error("descriptor chain does not end")]
    Endless,
    /// Too many malformed chains in a row.
    #[error("nothing but malformed descriptor chains")]
    Malformed,
    /// The memory behind it was taken away.
    #[error("guest memory was truncated")]
    MemoryGone,
    /// Signalling it blocks, or another ring of its lane: a call or err fd was made blocking and nobody reads it.
    #[error("call or err eventfd blocks")]
    CallBlocks,
}
