//! A driver's side of a virtqueue that is made for speed: every buffer has a fixed place, a **slot**, and is
//! offered again as soon as it is back. So the back end is what is measured, not the guest.

pub mod buffers;
pub mod memory;
mod packed;
mod split;

use std::sync::Arc;

use arrayvec::ArrayVec;

pub use buffers::Buffers;
pub use memory::{Area, Memory};
pub use packed::Packed;
pub use split::Split;

/// The most slots taken back at once.
pub const BURST: usize = 32;
/// Length of the virtio-net header (with VERSION_1).
pub const HEADER: usize = 12;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Bytes of a descriptor, in a ring or in an indirect table.
const DESCRIPTOR: usize = 16;

/// What was negotiated for a ring.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Entries of the ring; a power of two.
    pub size: u16,
    /// Descriptors of a slot; a power of two.
    pub pieces: u16,
    /// They are in a table of their own.
    pub indirect: bool,
    pub in_order: bool,
    pub event_idx: bool,
    /// Descriptors are written anew each time, as drivers for strangers' buffers do. (Packed: in any case.)
    pub rewrite: bool,
    /// The device writes the buffers.
    pub receive: bool,
}

impl Plan {
    /// Slots are numbered `0..slots()`.
    pub fn slots(&self) -> u16 {
        if self.indirect { self.size } else { self.size / self.pieces }
    }

    /// Ring entries that a slot takes.
    fn entries(&self) -> u16 {
        if self.indirect { 1 } else { self.pieces }
    }

    fn write_flag(&self) -> u16 {
        if self.receive { WRITE } else { 0 }
    }
}

/// Where a ring is, in our own addresses.
#[derive(Clone, Copy, Debug)]
pub struct Addresses {
    pub descriptors: u64,
    /// Available ring, or the driver's event suppression structure.
    pub driver: u64,
    /// Used ring, or the device's.
    pub device: u64,
}

/// A slot that the device is done with.
#[derive(Clone, Copy, Debug)]
pub struct Used {
    pub slot: u16,
    /// Bytes the device has written. Where it reported several buffers at once, as IN_ORDER allows: all of it
    /// (virtio 1.3, 2.7.9, 2.8.9).
    pub written: u32,
}

/// One format of ring. A device that breaks the protocol ends the program.
pub trait Driver: Send {
    /// A ring with nothing in it.
    fn new(memory: &Arc<Memory>, plan: Plan, buffers: &Buffers) -> Self;

    fn addresses(&self) -> Addresses;

    /// What SET_VRING_BASE says of an unused ring.
    const BASE: u32;

    /// Takes back what was used, oldest first, as many as fit.
    fn reclaim(&mut self, used: &mut ArrayVec<Used, BURST>);

    /// Offers a slot that is not with the device. With IN_ORDER: the one after the last, around.
    fn offer(&mut self, slot: u16);

    /// Makes all that was offered visible; whether the device wants a kick for it.
    fn publish(&mut self) -> bool;
}

/// The indirect tables of all slots, in one area; empty without.
fn tables(memory: &Arc<Memory>, plan: &Plan, buffers: &Buffers, chained: bool) -> Area {
    let len = if plan.indirect { plan.slots() * plan.pieces } else { 0 };
    let area = memory.area(usize::from(len) * DESCRIPTOR);
    for entry in 0..len {
        let (slot, piece) = (entry / plan.pieces, entry % plan.pieces);
        let more = chained && piece + 1 < plan.pieces;
        let flags = plan.write_flag() | if more { NEXT } else { 0 };
        let next = if more { piece + 1 } else { 0 };
        let (addr, len) = buffers.piece(slot, piece);
        let at = usize::from(entry) * DESCRIPTOR;
        area.write(at, &addr.to_le_bytes());
        area.write(at + 8, &len.to_le_bytes());
        // The last two fields of a split ring's descriptor; a packed ring's table has id and flags there.
        let [first, second] = if chained { [flags, next] } else { [0, flags] };
        area.write(at + 12, &first.to_le_bytes());
        area.write(at + 14, &second.to_le_bytes());
    }
    area
}

/// Whether a side that asked for `event` wants to hear of a move from `old` to `new` (virtio 1.3, 2.7.10).
fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
