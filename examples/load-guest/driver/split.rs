//! The split virtqueue (virtio 1.3, 2.7).

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::fence;

use arrayvec::ArrayVec;

use super::{
    Addresses, Area, BURST, Buffers, DESCRIPTOR, Driver, INDIRECT, Memory, NEXT, Plan, Used, need_event, tables,
};

// In the available and the used ring: flags, index, then the entries.
const FLAGS: usize = 0;
const IDX: usize = 2;
const ENTRIES: usize = 4;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

#[derive(Debug)]
pub struct Split {
    plan: Plan,
    table: Vec<(u64, u32)>,
    descriptors: Area,
    tables: Area,
    avail: Area,
    used: Area,
    /// Chains offered, published; taken back, seen in the used ring.
    offered: u16,
    published: u16,
    reclaimed: u16,
    seen: u16,
    /// Our used_event, kept in the past.
    used_event: u16,
}

impl Split {
    fn describe(&self, slot: u16) {
        let Plan { pieces, indirect, .. } = self.plan;
        let put = |index: u16, (addr, len): (u64, u32), flags: u16| {
            let at = usize::from(index) * DESCRIPTOR;
            self.descriptors.store_u64(at, addr, Relaxed);
            self.descriptors.store_u32(at + 8, len, Relaxed);
            self.descriptors.store_u16(at + 12, flags, Relaxed);
            self.descriptors.store_u16(at + 14, if flags & NEXT != 0 { index + 1 } else { 0 }, Relaxed);
        };
        let first = usize::from(slot) * usize::from(pieces);
        if indirect {
            let table = self.tables.gpa(first * DESCRIPTOR);
            return put(slot, (table, u32::from(pieces) * DESCRIPTOR as u32), INDIRECT);
        }
        for i in 0..pieces {
            let more = if i + 1 < pieces { NEXT } else { 0 };
            put(slot * pieces + i, self.table[first + usize::from(i)], self.plan.write_flag() | more);
        }
    }

    fn used_event_at(&self) -> usize {
        ENTRIES + 2 * usize::from(self.plan.size)
    }
}

impl Driver for Split {
    const BASE: u32 = 0;

    fn new(memory: &Arc<Memory>, plan: Plan, buffers: &Buffers) -> Self {
        let size = usize::from(plan.size);
        let split = Self {
            plan,
            table: buffers.table().to_vec(),
            descriptors: memory.area(size * DESCRIPTOR),
            tables: tables(memory, &plan, buffers, true),
            avail: memory.area(ENTRIES + size * 2 + 2),
            used: memory.area(ENTRIES + size * 8 + 2),
            offered: 0,
            published: 0,
            reclaimed: 0,
            seen: 0,
            used_event: u16::MAX,
        };
        (0..plan.slots()).for_each(|slot| split.describe(slot));
        match plan.event_idx {
            true => split.avail.store_u16(split.used_event_at(), split.used_event, Relaxed),
            false => split.avail.store_u16(FLAGS, NO_INTERRUPT, Relaxed),
        }
        split
    }

    fn addresses(&self) -> Addresses {
        Addresses { descriptors: self.descriptors.user(0), driver: self.avail.user(0), device: self.used.user(0) }
    }

    #[inline]
    fn reclaim(&mut self, used: &mut ArrayVec<Used, BURST>) {
        let (slots, entries) = (self.plan.slots(), u32::from(self.plan.entries()));
        if self.seen == self.reclaimed {
            self.seen = self.used.load_u16(IDX, Acquire);
            let out = self.published.wrapping_sub(self.reclaimed);
            assert!(self.seen.wrapping_sub(self.reclaimed) <= out, "the device used more than was offered");
        }
        while self.reclaimed != self.seen && !used.is_full() {
            let next = self.reclaimed & (slots - 1);
            let at = ENTRIES + 8 * usize::from(self.reclaimed & (self.plan.size - 1));
            if self.plan.in_order && !self.plan.receive {
                // The order says it all: nothing to read.
                used.push(Used { slot: next, written: 0 });
            } else {
                let (head, written) = (self.used.load_u32(at, Relaxed), self.used.load_u32(at + 4, Relaxed));
                let slot = head >> entries.trailing_zeros();
                used.push(match self.plan.in_order {
                    // One of several buffers that were reported at once, by the last of them.
                    true if slot != u32::from(next) => {
                        let first = usize::from(next) * usize::from(self.plan.pieces);
                        let whole = &self.table[first..first + usize::from(self.plan.pieces)];
                        Used { slot: next, written: whole.iter().map(|(_, len)| len).sum() }
                    }
                    _ => {
                        assert!(slot < slots.into(), "the device used head {head}");
                        Used { slot: slot as u16, written }
                    }
                });
            }
            self.reclaimed = self.reclaimed.wrapping_add(1);
        }
        // The device would signal once in 2^16 buffers.
        if self.plan.event_idx && self.reclaimed.wrapping_sub(self.used_event) > 1 << 14 {
            self.used_event = self.reclaimed.wrapping_sub(1);
            self.avail.store_u16(self.used_event_at(), self.used_event, Relaxed);
        }
    }

    #[inline]
    fn offer(&mut self, slot: u16) {
        debug_assert!(!self.plan.in_order || slot == self.offered & (self.plan.slots() - 1));
        if self.plan.rewrite {
            self.describe(slot);
        }
        let at = ENTRIES + 2 * usize::from(self.offered & (self.plan.size - 1));
        let head = slot * self.plan.entries();
        // A store of the same value would take the cache line from the device.
        if self.avail.load_u16(at, Relaxed) != head {
            self.avail.store_u16(at, head, Relaxed);
        }
        self.offered = self.offered.wrapping_add(1);
    }

    #[inline]
    fn publish(&mut self) -> bool {
        if self.offered == self.published {
            return false;
        }
        let old = self.published;
        self.published = self.offered;
        self.avail.store_u16(IDX, self.published, Release);
        fence(SeqCst);
        match self.plan.event_idx {
            true => {
                let event = self.used.load_u16(ENTRIES + 8 * usize::from(self.plan.size), Relaxed);
                need_event(event, self.published, old)
            }
            false => self.used.load_u16(FLAGS, Relaxed) & NO_NOTIFY == 0,
        }
    }
}
