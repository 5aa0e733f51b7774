//! The split virtqueue (virtio 1.3, section 2.7), device side: the part TX and RX rings share.

use std::sync::Arc;

use arrayvec::ArrayVec;

use super::chain::{DESCRIPTOR_LEN, Reader, Stop, Table};
use super::virtqueue::{Token, Trust, Virtqueue, area, need_event};
use super::{RingConfig, RingFault};
use crate::error::{Error, Result};
use crate::guest::{GuestMemory, GuestStore, HostRange, View};

// Offsets in the available and the used ring (2.7.6, 2.7.8): flags, idx, then the entries.
const FLAGS: usize = 0;
const IDX: usize = 2;
const ENTRIES: usize = 4;
const AVAIL_LEN: usize = 2;
const USED_LEN: usize = 8;

const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

/// Used elements kept back, so that the guest's cache lines are written a burst at a time.
const SHADOW: usize = 64;

/// A split virtqueue over pointers that were resolved and checked once.
///
/// Its positions only grow, modulo 2^16, and keep this order:
/// `published` (used.idx in memory) ≤ `used` (staged) ≤ `next` (popped) ≤ `seen` (avail.idx when last read),
/// with `seen - published` at most `size`.
#[derive(Debug)]
pub(super) struct SplitRing {
    table: Table,
    view: View,
    indirect: bool,
    event_idx: bool,
    in_order: bool,
    size: u16,
    avail: HostRange,
    used_ring: HostRange,
    store: GuestStore,

    seen: u16,
    next: u16,
    used: u16,
    published: u16,
    /// Elements `used - shadow.len()..used`, not yet in memory.
    shadow: ArrayVec<[u8; USED_LEN], SHADOW>,
    trust: Trust,
}

impl SplitRing {
    /// See [`super::TxRing::new`].
    pub(super) fn new(memory: Arc<GuestMemory>, config: &RingConfig) -> Result<Self> {
        let RingConfig { size, addresses, .. } = *config;
        if !size.is_power_of_two() {
            return Err(Error::Protocol(format!("vring size {size} is not a power of two from 1 to 32768")));
        }
        let entries = usize::from(size);
        // used_event and avail_event are there only with EVENT_IDX.
        let event = if config.event_idx { 2 } else { 0 };
        let desc = entries * DESCRIPTOR_LEN;
        let avail = ENTRIES + entries * AVAIL_LEN + event;
        let used = ENTRIES + entries * USED_LEN + event;
        let desc = area(&memory, "descriptor table", addresses.desc, desc, 16)?;
        let avail = area(&memory, "available ring", addresses.avail, avail, 2)?;
        let used_ring = area(&memory, "used ring", addresses.used, used, 4)?;

        // SAFETY: inside the used ring and aligned, by the checks above; `memory` is alive.
        let published = unsafe { used_ring.read_u16(IDX) };
        let mut ring = Self {
            table: Table::new(desc),
            view: View::new(memory),
            indirect: config.indirect,
            event_idx: config.event_idx,
            in_order: config.in_order,
            size,
            avail,
            used_ring,
            store: GuestStore,
            seen: published,
            next: published,
            used: published,
            published,
            shadow: ArrayVec::new(),
            trust: Trust::default(),
        };
        ring.ask_for_kicks(false);
        Ok(ring)
    }

    /// Writes the shadow into the used ring, behind what the guest looks at.
    fn flush(&mut self) {
        let mut slot = self.used.wrapping_sub(self.shadow.len() as u16);
        for element in self.shadow.drain(..) {
            let offset = ENTRIES + usize::from(slot & (self.size - 1)) * USED_LEN;
            // SAFETY: masked by the size, so inside the used ring; the view keeps the memory.
            unsafe { self.store.bytes(&self.used_ring, offset, &element) };
            slot = slot.wrapping_add(1);
        }
    }
}

impl Virtqueue for SplitRing {
    /// avail.idx, a cache line that the guest writes, is read only when the chains seen earlier are used
    /// up, or when `again`.
    #[inline]
    fn look(&mut self, again: bool) -> Result<(), RingFault> {
        self.trust.check()?;
        if self.seen == self.next || again {
            if self.view.is_dead() {
                return Err(self.trust.stop(RingFault::MemoryGone));
            }
            // SAFETY: inside the available ring and aligned (`new`); the view keeps the memory.
            let seen = unsafe { self.avail.acquire_u16(IDX) };
            // All that is not used belongs to us, and a driver has no more than `size` to give.
            if seen.wrapping_sub(self.published) > self.size || seen.wrapping_sub(self.next) > self.size {
                return Err(self.trust.stop(RingFault::AvailIndex));
            }
            self.seen = seen;
        }
        Ok(())
    }

    #[inline]
    fn is_ready(&self, ahead: u16) -> bool {
        ahead < self.seen.wrapping_sub(self.next)
    }

    #[inline]
    fn read<const WRITABLE: bool>(
        &mut self,
        ahead: u16,
        budget: &mut usize,
        take: impl FnMut(HostRange) -> Result<(), Stop>,
    ) -> (Token, Result<(), Stop>) {
        let slot = self.next.wrapping_add(ahead) & (self.size - 1);
        // SAFETY: masked by the size, so inside the available ring; the view keeps the memory.
        let id = unsafe { self.avail.read_u16(ENTRIES + usize::from(slot) * AVAIL_LEN) };
        let mut reader = Reader { view: &mut self.view, indirect: self.indirect, budget, take };
        (Token { id, slots: 1 }, reader.chain::<WRITABLE, false>(&self.table, id))
    }

    #[inline(always)]
    fn take_simple<const WRITABLE: bool>(
        &mut self,
        max: usize,
        mut take: impl FnMut(Token, HostRange) -> bool,
    ) -> usize {
        let ready = usize::from(self.seen.wrapping_sub(self.next)).min(max) as u16;
        let mut one = |ahead| {
            let slot = self.next.wrapping_add(ahead) & (self.size - 1);
            // SAFETY: masked by the size, so inside the available ring; the view keeps the memory.
            let id = unsafe { self.avail.read_u16(ENTRIES + usize::from(slot) * AVAIL_LEN) };
            let buffer = self.table.descriptor(id)?.simple::<WRITABLE>(&mut self.view)?;
            take(Token { id, slots: 1 }, buffer).then_some(())
        };
        let taken = (0..ready).find(|&ahead| one(ahead).is_none()).unwrap_or(ready);
        self.next = self.next.wrapping_add(taken);
        taken.into()
    }

    #[inline]
    fn advance(&mut self, slots: u16) {
        self.next = self.next.wrapping_add(slots);
    }

    #[inline]
    fn stage_each(&mut self, chains: impl Iterator<Item = (Token, u32)>) {
        for (chain, len) in chains {
            if self.shadow.is_full() {
                self.flush();
            }
            let element = u64::from(chain.id) | u64::from(len) << 32;
            self.shadow.push(element.to_le_bytes());
            self.used = self.used.wrapping_add(1);
        }
    }

    #[inline]
    fn stage_empty(&mut self, chains: impl ExactSizeIterator<Item = Token>) {
        let n = chains.len();
        debug_assert!(n <= SHADOW);
        if self.in_order {
            // One element, in the first place, stands for all with the last one's id (2.7.9).
            if let Some(last) = chains.last() {
                self.flush();
                self.stage(last, 0);
                self.flush();
                self.used = self.used.wrapping_add(n as u16 - 1);
            }
            return;
        }
        if self.shadow.remaining_capacity() < n {
            self.flush();
        }
        self.shadow.extend(chains.map(|chain| u64::from(chain.id).to_le_bytes()));
        self.used = self.used.wrapping_add(n as u16);
    }

    fn put_back(&mut self, slots: u16) {
        self.next = self.next.wrapping_sub(slots);
    }

    #[inline]
    fn publish(&mut self) -> bool {
        if self.used == self.published {
            return false;
        }
        self.flush();
        let old = std::mem::replace(&mut self.published, self.used);
        // The guest writes what it wants to hear of, then looks at used.idx; we do the reverse. If neither's
        // load overtakes its store, one sees the other (2.7.7.2): sequentially consistent, both. On x86
        // that is one xchg, cheaper than a fence.
        // SAFETY: inside the used ring and aligned (`new`); the view keeps the memory.
        unsafe { self.store.publish_u16(&self.used_ring, IDX, self.used) };
        if self.event_idx {
            let used_event = ENTRIES + usize::from(self.size) * AVAIL_LEN;
            // SAFETY: as above, for the available ring; its length includes used_event with EVENT_IDX.
            let event = unsafe { self.avail.ordered_u16(used_event) };
            need_event(event, self.used, old)
        } else {
            // SAFETY: as above, for the available ring.
            let flags = unsafe { self.avail.ordered_u16(FLAGS) };
            flags & AVAIL_F_NO_INTERRUPT == 0
        }
    }

    #[inline]
    fn is_staged(&self) -> bool {
        self.used != self.published
    }

    /// With EVENT_IDX a driver ignores NO_NOTIFY, which must be 0 then (2.7.10): it kicks when its
    /// index passes avail_event. To be left alone, name an index it has passed already: there
    /// remains one kick every 65536 buffers.
    fn ask_for_kicks(&mut self, wanted: bool) {
        let flags = match wanted || self.event_idx {
            true => 0,
            false => USED_F_NO_NOTIFY,
        };
        // SAFETY: inside the used ring and aligned (`new`); the view keeps the memory.
        unsafe { self.store.u16(&self.used_ring, FLAGS, flags) };
        if self.event_idx {
            let avail_event = ENTRIES + usize::from(self.size) * USED_LEN;
            let event = self.next.wrapping_sub(u16::from(!wanted));
            // SAFETY: as above; the used ring's length includes avail_event with EVENT_IDX.
            unsafe { self.store.u16(&self.used_ring, avail_event, event) };
        }
    }

    fn position(&self) -> u16 {
        self.published
    }

    #[inline]
    fn trust(&mut self) -> &mut Trust {
        &mut self.trust
    }

    fn size(&self) -> u16 {
        self.size
    }

    fn memory(&self) -> &Arc<GuestMemory> {
        self.view.memory()
    }

    fn view_mut(&mut self) -> &mut View {
        &mut self.view
    }
}
