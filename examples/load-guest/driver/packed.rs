//! The packed virtqueue (virtio 1.3, 2.8).

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::fence;

use arrayvec::ArrayVec;

use super::{
    Addresses, Area, BURST, Buffers, DESCRIPTOR, Driver, INDIRECT, Memory, NEXT, Plan, Used, need_event, tables,
};

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

// A descriptor: address, length, buffer id, flags.
const LEN: usize = 8;
const ID: usize = 12;
const FLAGS: usize = 14;

// An event suppression structure: offset and wrap counter, then flags.
const EVENT: usize = 0;
const EVENT_FLAGS: usize = 2;
const EVENTS_OFF: u16 = 1;
const EVENTS_BY_INDEX: u16 = 2;

/// A place in the ring, with the wrap counter of those who come by.
#[derive(Clone, Copy, Debug)]
struct Position {
    index: u16,
    wrap: bool,
}

impl Position {
    const START: Self = Self { index: 0, wrap: true };

    /// Chains never wrap: their length divides the ring's.
    #[inline]
    fn advance(&mut self, entries: u16, size: u16) {
        self.index += entries;
        if self.index == size {
            *self = Self { index: 0, wrap: !self.wrap };
        }
    }
}

#[derive(Debug)]
pub struct Packed {
    plan: Plan,
    table: Vec<(u64, u32)>,
    ring: Area,
    tables: Area,
    /// Ours, which tells the device that we poll; and the device's.
    driver_event: Area,
    device_event: Area,
    next: Position,
    used: Position,
    /// The first head of what was offered and not yet published: its flags are stored last.
    held: Option<(Position, u16)>,
    /// Entries offered since the last `publish`.
    added: u16,
    /// IN_ORDER: chains known to be used and not handed out yet; bytes written to the last of them.
    ahead: u16,
    written: u32,
}

impl Packed {
    #[inline]
    fn at(&self, position: Position) -> usize {
        usize::from(position.index) * DESCRIPTOR
    }

    /// Writes all of a descriptor but its flags.
    #[inline]
    fn describe(&self, position: Position, (addr, len): (u64, u32), id: u16) {
        let at = self.at(position);
        self.ring.store_u64(at, addr, Relaxed);
        self.ring.store_u32(at + LEN, len, Relaxed);
        self.ring.store_u16(at + ID, id, Relaxed);
    }
}

impl Driver for Packed {
    /// Both positions at 0, both wrap counters 1.
    const BASE: u32 = 0x8000_8000;

    fn new(memory: &Arc<Memory>, plan: Plan, buffers: &Buffers) -> Self {
        let packed = Self {
            plan,
            table: buffers.table().to_vec(),
            ring: memory.area(usize::from(plan.size) * DESCRIPTOR),
            tables: tables(memory, &plan, buffers, false),
            driver_event: memory.area(4),
            device_event: memory.area(4),
            next: Position::START,
            used: Position::START,
            held: None,
            added: 0,
            ahead: 0,
            written: 0,
        };
        packed.driver_event.store_u16(EVENT_FLAGS, EVENTS_OFF, Relaxed);
        packed
    }

    fn addresses(&self) -> Addresses {
        Addresses {
            descriptors: self.ring.user(0),
            driver: self.driver_event.user(0),
            device: self.device_event.user(0),
        }
    }

    #[inline]
    fn reclaim(&mut self, used: &mut ArrayVec<Used, BURST>) {
        let Plan { size, pieces, in_order, .. } = self.plan;
        let (slots, entries) = (self.plan.slots(), self.plan.entries());
        while !used.is_full() {
            let next = self.used.index >> entries.trailing_zeros();
            let mut slot = next;
            if self.ahead == 0 {
                let at = self.at(self.used);
                let flags = self.ring.load_u16(at + FLAGS, Acquire);
                if (flags & AVAIL != 0) != self.used.wrap || (flags & USED != 0) != self.used.wrap {
                    return;
                }
                slot = self.ring.load_u16(at + ID, Relaxed);
                assert!(slot < slots, "the device used buffer {slot}");
                self.written = self.ring.load_u32(at + LEN, Relaxed);
                // With IN_ORDER one descriptor may stand for all buffers up to this one.
                self.ahead = if in_order { slot.wrapping_sub(next) & (slots - 1) } else { 0 };
            } else {
                self.ahead -= 1;
            }
            let written = match self.ahead {
                0 => self.written,
                _ => {
                    slot = next;
                    let first = usize::from(next) * usize::from(pieces);
                    self.table[first..first + usize::from(pieces)].iter().map(|(_, len)| len).sum()
                }
            };
            used.push(Used { slot, written });
            self.used.advance(entries, size);
        }
    }

    #[inline]
    fn offer(&mut self, slot: u16) {
        let Plan { size, pieces, indirect, .. } = self.plan;
        let (head, entries) = (self.next, self.plan.entries());
        debug_assert!(!self.plan.in_order || slot == head.index / entries);
        let wrap = if head.wrap { AVAIL } else { USED };
        let first = usize::from(slot) * usize::from(pieces);
        let flags = if indirect {
            let table = self.tables.gpa(first * DESCRIPTOR);
            self.describe(head, (table, u32::from(pieces) * DESCRIPTOR as u32), slot);
            wrap | INDIRECT
        } else {
            let flags = |piece: u16| {
                let more = if piece + 1 < pieces { NEXT } else { 0 };
                wrap | self.plan.write_flag() | more
            };
            for piece in (0..pieces).rev() {
                let place = Position { index: head.index + piece, ..head };
                self.describe(place, self.table[first + usize::from(piece)], slot);
                if piece > 0 {
                    self.ring.store_u16(self.at(place) + FLAGS, flags(piece), Relaxed);
                }
            }
            flags(0)
        };
        // The device stops at the first head that is not there yet, so it takes no line from us halfway.
        match self.held {
            None => self.held = Some((head, flags)),
            Some(_) => self.ring.store_u16(self.at(head) + FLAGS, flags, Release),
        }
        self.next.advance(entries, size);
        self.added += entries;
    }

    #[inline]
    fn publish(&mut self) -> bool {
        let Some((head, flags)) = self.held.take() else { return false };
        self.ring.store_u16(self.at(head) + FLAGS, flags, Release);
        let added = std::mem::take(&mut self.added);
        fence(SeqCst);
        match self.device_event.load_u16(EVENT_FLAGS, Relaxed) {
            EVENTS_OFF => false,
            EVENTS_BY_INDEX if self.plan.event_idx => {
                let event = self.device_event.load_u16(EVENT, Relaxed);
                let (event, wrap) = (event & 0x7fff, event & 0x8000 != 0);
                let event = if wrap == self.next.wrap { event } else { event.wrapping_sub(self.plan.size) };
                need_event(event, self.next.index, self.next.index.wrapping_sub(added))
            }
            _ => true,
        }
    }
}
