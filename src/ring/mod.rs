//! Virtqueues, device side, over cached pointers (virtio 1.3, section 2.7; packed rings follow).
//!
//! [`TxRing`] is what the guest sends on, [`RxRing`] what it receives on; they are different types
//! over one private split ring, so that misuse does not compile. Each owns an `Arc` of the guest
//! memory its pointers point into. What they share beyond the split ring's layout (bursts, frames,
//! gathering buffers) knows a ring only by the few verbs of `split`, so that a packed ring can take its
//! place, chosen at negotiation.
//!
//! A guest may write anything at any time. So each index, descriptor and header is read once into
//! private memory and checked there, work per call is bounded, and what is wrong costs the guest its
//! own chain ([`ChainFault`]) or its own ring ([`RingFault`]).

mod chain;
mod header;
mod rx;
mod split;
#[cfg(any(test, fuzzing))]
pub mod testing;
#[cfg(test)]
mod tests;
mod tx;

use crate::guest::GuestSink;

pub use header::{Gso, NetHeader};
pub use rx::{PushError, RxRing};
pub use split::{RingAddresses, RingConfig};
pub use tx::{Frame, TxRing};

/// The most chains a ring hands out before they are completed, and the most packets a burst has.
pub const BURST: usize = 32;

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
