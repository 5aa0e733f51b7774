//! The split virtqueue (virtio 1.3, section 2.7), device side: the part TX and RX rings share.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use arrayvec::ArrayVec;

use super::RingFault;
use super::chain::{DESCRIPTOR_LEN, Reader, Stop, Table};
use crate::error::{Error, Result};
use crate::guest::{GuestMemory, GuestStore, HostRange, UserAddr, View};

/// Where a ring's three areas are, in the front end's address space (SET_VRING_ADDR).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingAddresses {
    /// Descriptor table, 16-byte aligned.
    pub desc: UserAddr,
    /// Available ring, 2-byte aligned.
    pub avail: UserAddr,
    /// Used ring, 4-byte aligned.
    pub used: UserAddr,
}

/// All that is needed to run a ring; chosen once, at negotiation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingConfig {
    /// Queue size: a power of two, 1 to 32768 (virtio 1.3, 2.7).
    pub size: u16,
    /// Where its areas are.
    pub addresses: RingAddresses,
    /// Next index to consume: SET_VRING_BASE, or where the ring was taken out. A split ring does not need it and
    /// begins at used.idx, which is the same after an orderly stop, and right after a crash of either side too.
    pub base: u16,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// VIRTIO_NET_F_MRG_RXBUF was negotiated.
    pub mergeable: bool,
    /// Length of the virtio-net header: 12 with VERSION_1 or MRG_RXBUF, else 10.
    pub header_len: usize,
    /// Longest frame taken from the guest, without the header, in bytes.
    pub max_frame: usize,
}

// Offsets in the available and the used ring (2.7.6, 2.7.8): flags, idx, then the entries.
const FLAGS: usize = 0;
const IDX: usize = 2;
const ENTRIES: usize = 4;
const AVAIL_LEN: usize = 2;
const USED_LEN: usize = 8;

const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

/// So many malformed chains without a good one between them stop the ring.
const MALFORMED_RUN: u32 = 1024;

/// Used elements kept back, so that the guest's cache lines are written a burst at a time.
const SHADOW: usize = 64;

/// Whether the other side wants to hear of a move from `old` to `new` when it asked for `event` (2.7.10).
#[inline]
fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

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
    malformed: u32,
    fault: Option<RingFault>,
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
        let area = |name: &str, at: UserAddr, len: usize, align: usize| {
            let Some(range) = memory.translate_user(at, len as u64) else {
                return Err(Error::Memory(format!("{name} at {at:?} with {len:#x} bytes is not inside one region")));
            };
            if !range.as_ptr().addr().is_multiple_of(align) {
                return Err(Error::Protocol(format!("{name} at {at:?} is not aligned to {align} bytes")));
            }
            Ok(range)
        };
        let desc = entries * DESCRIPTOR_LEN;
        let avail = ENTRIES + entries * AVAIL_LEN + event;
        let used = ENTRIES + entries * USED_LEN + event;
        let desc = area("descriptor table", addresses.desc, desc, 16)?;
        let avail = area("available ring", addresses.avail, avail, 2)?;
        let used_ring = area("used ring", addresses.used, used, 4)?;

        // SAFETY: inside the used ring and aligned, by the checks above; `memory` is alive.
        let published = unsafe { used_ring.read_u16(IDX) };
        let mut ring = Self {
            table: Table::new(desc),
            view: View::new(memory),
            indirect: config.indirect,
            event_idx: config.event_idx,
            size,
            avail,
            used_ring,
            store: GuestStore,
            seen: published,
            next: published,
            used: published,
            published,
            shadow: ArrayVec::new(),
            malformed: 0,
            fault: None,
        };
        ring.disable_kicks();
        Ok(ring)
    }

    /// How many chains wait. avail.idx, a cache line that the guest writes, is read only when those
    /// seen earlier are used up, or when `look`.
    #[inline]
    pub(super) fn available(&mut self, look: bool) -> Result<u16, RingFault> {
        if let Some(fault) = self.fault {
            return Err(fault);
        }
        if self.seen == self.next || look {
            if self.view.is_dead() {
                return Err(self.stop(RingFault::MemoryGone));
            }
            // SAFETY: inside the available ring and aligned (`new`); the view keeps the memory.
            let seen = unsafe { self.avail.acquire_u16(IDX) };
            // All that is not used belongs to us, and a driver has no more than `size` to give.
            if seen.wrapping_sub(self.published) > self.size || seen.wrapping_sub(self.next) > self.size {
                return Err(self.stop(RingFault::AvailIndex));
            }
            self.seen = seen;
        }
        Ok(self.seen.wrapping_sub(self.next))
    }

    /// The head of the chain `ahead` of the next one; `ahead` is below `available`.
    #[inline]
    pub(super) fn head(&self, ahead: u16) -> u16 {
        let slot = self.next.wrapping_add(ahead) & (self.size - 1);
        // SAFETY: masked by the size, so inside the available ring; the view keeps the memory.
        unsafe { self.avail.read_u16(ENTRIES + usize::from(slot) * AVAIL_LEN) }
    }

    /// Reads the chain at `head`: see [`Reader::read`].
    #[inline]
    pub(super) fn read<const WRITABLE: bool>(
        &mut self,
        head: u16,
        budget: &mut usize,
        take: impl FnMut(HostRange) -> Result<(), Stop>,
    ) -> Result<(), Stop> {
        let mut reader = Reader { view: &mut self.view, indirect: self.indirect, budget, take };
        reader.read::<WRITABLE, false>(&self.table, head)
    }

    /// The position of the next chain.
    #[inline]
    pub(super) fn next(&self) -> u16 {
        self.next
    }

    /// Takes the next `n` chains out; `n` is at most `available`.
    #[inline]
    pub(super) fn advance(&mut self, n: u16) {
        self.next = self.next.wrapping_add(n);
    }

    /// Chains taken out and not staged.
    #[inline]
    pub(super) fn in_flight(&self) -> u16 {
        self.next.wrapping_sub(self.used)
    }

    /// The position of the oldest chain in flight.
    #[inline]
    pub(super) fn oldest(&self) -> u16 {
        self.used
    }

    /// Puts the chains in flight back.
    pub(super) fn rewind(&mut self) {
        self.next = self.used;
    }

    /// Retires the oldest chain in flight, with `len` bytes written. `head` is its own.
    #[inline]
    pub(super) fn stage(&mut self, head: u16, len: u32) {
        debug_assert!(self.in_flight() > 0);
        if self.shadow.is_full() {
            self.flush();
        }
        let element = u64::from(head) | u64::from(len) << 32;
        self.shadow.push(element.to_le_bytes());
        self.used = self.used.wrapping_add(1);
    }

    /// Retires the oldest chains in flight, at most `SHADOW` of them, with nothing written.
    #[inline]
    pub(super) fn stage_empty(&mut self, heads: impl ExactSizeIterator<Item = u16>) {
        let n = heads.len();
        debug_assert!(n <= self.in_flight().into());
        if self.shadow.remaining_capacity() < n {
            self.flush();
        }
        self.shadow.extend(heads.map(|head| u64::from(head).to_le_bytes()));
        self.used = self.used.wrapping_add(n as u16);
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

    /// See [`super::TxRing::publish`].
    #[inline]
    pub(super) fn publish(&mut self) -> bool {
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

    /// See [`super::TxRing::enable_kicks`].
    pub(super) fn enable_kicks(&mut self) -> bool {
        self.ask_for_kicks(true);
        // The mirror image of `publish`: first say what we want, then look.
        fence(Ordering::SeqCst);
        // A fault is something to wake up for, too.
        self.available(true).map_or(true, |waiting| waiting > 0)
    }

    pub(super) fn disable_kicks(&mut self) {
        self.ask_for_kicks(false);
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

    /// The ring yields nothing more.
    fn stop(&mut self, fault: RingFault) -> RingFault {
        *self.fault.get_or_insert(fault)
    }

    pub(super) fn memory(&self) -> &Arc<GuestMemory> {
        self.view.memory()
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// Whether there is something to publish.
    #[inline]
    pub(super) fn is_staged(&self) -> bool {
        self.used != self.published
    }

    /// used.idx, as the guest sees it.
    pub(super) fn position(&self) -> u16 {
        self.published
    }

    /// See [`super::TxRing::backlog`].
    pub(super) fn backlog(&mut self) -> u16 {
        self.available(true).unwrap_or(0)
    }
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
