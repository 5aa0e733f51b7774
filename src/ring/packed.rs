//! The packed virtqueue (virtio 1.3, section 2.8), device side: the part TX and RX rings share.
//!
//! One ring of descriptors serves both ways. The driver writes chains into consecutive slots, the device
//! overwrites the first slot of each chain with a used descriptor. Two flag bits tell, against a wrap
//! counter that flips at each round, whose a slot is. The other side looks at slots strictly in order,
//! so only the first of a batch has to be written last.

use std::sync::Arc;

use super::chain::{DESCRIPTOR_LEN, DESCRIPTORS, Descriptor, NEXT, Reader, SHAPE, Stop, WRITE};
use super::virtqueue::{Token, Trust, Virtqueue, area, need_event};
use super::{RingConfig, RingFault};
use crate::error::{Error, Result};
use crate::guest::{Gpa, GuestMemory, GuestStore, HostRange, View};

/// Of a descriptor; NEXT, WRITE and INDIRECT are as in a split ring (2.8.1).
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// Bytes of an event suppression structure: descriptor offset with wrap counter, then flags (2.8.14).
const EVENT_LEN: usize = 4;
const EVENT_ENABLE: u16 = 0;
const EVENT_DISABLE: u16 = 1;
const EVENT_DESC: u16 = 2;
const EVENT_FLAGS: u16 = 3;

/// Length, buffer id and flags of a descriptor are one aligned word; the address is in front of it.
const WORD: usize = 8;

const WRAP: u16 = 1 << 15;

/// A place in the ring, with the wrap counter of its round (2.8.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cursor {
    index: u16,
    wrap: bool,
}

impl Cursor {
    /// `slots` further on, at most one round.
    #[inline]
    fn plus(self, slots: u16, size: u16) -> Self {
        // No overflow: both are at most 32768, and the index is below the size.
        let index = self.index + slots;
        if index < size { Self { index, ..self } } else { Self { index: index - size, wrap: !self.wrap } }
    }

    /// `slots` back, at most one round.
    fn minus(self, slots: u16, size: u16) -> Self {
        match self.index.checked_sub(slots) {
            Some(index) => Self { index, ..self },
            None => Self { index: self.index + (size - slots), wrap: !self.wrap },
        }
    }

    /// Of the flags that say whose the descriptor there is: those of the device's.
    #[inline]
    fn available(self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }

    /// Those of a used one.
    #[inline]
    fn used(self) -> u16 {
        if self.wrap { AVAIL | USED } else { 0 }
    }

    /// Whether the flags of the descriptor there say that it is the device's.
    #[inline]
    fn is_available(self, flags: u16) -> bool {
        flags & (AVAIL | USED) == self.available()
    }

    /// Index in bits 0 to 14, wrap counter in bit 15.
    fn encode(self) -> u16 {
        self.index | if self.wrap { WRAP } else { 0 }
    }

    fn decode(position: u16) -> Self {
        Self { index: position & !WRAP, wrap: position & WRAP != 0 }
    }
}

/// A packed virtqueue over pointers that were resolved and checked once.
///
/// In ring order: `published` (what the guest may see as used), then `staged` slots, `used`, then `flying`
/// slots, `next`. They are the guest's again only once they are published, so
/// `staged + flying` is at most `size`.
#[derive(Debug)]
pub(super) struct PackedRing {
    ring: HostRange,
    driver: HostRange,
    device: HostRange,
    view: View,
    store: GuestStore,
    indirect: bool,
    event_idx: bool,
    in_order: bool,
    size: u16,

    next: Cursor,
    used: Cursor,
    published: Cursor,
    staged: u16,
    flying: u16,
    /// The used descriptor for `published`: the guest sees nothing of the batch before it.
    first: u64,
    trust: Trust,
}

impl PackedRing {
    /// See [`super::TxRing::new`].
    pub(super) fn new(memory: Arc<GuestMemory>, config: &RingConfig) -> Result<Self> {
        let RingConfig { size, addresses, base, .. } = *config;
        if !(1..=1 << 15).contains(&size) {
            return Err(Error::Protocol(format!("size {size} of a packed vring is not from 1 to 32768")));
        }
        let start = Cursor::decode(base);
        if start.index >= size {
            return Err(Error::Protocol(format!(
                "base {base:#x} of a packed vring: index {} is not below its size {size}",
                start.index
            )));
        }
        let ring = usize::from(size) * DESCRIPTOR_LEN;
        let mut ring = Self {
            ring: area(&memory, "descriptor ring", addresses.desc, ring, 16)?,
            driver: area(&memory, "driver event suppression", addresses.avail, EVENT_LEN, 4)?,
            device: area(&memory, "device event suppression", addresses.used, EVENT_LEN, 4)?,
            view: View::new(memory),
            store: GuestStore,
            indirect: config.indirect,
            event_idx: config.event_idx,
            in_order: config.in_order,
            size,
            next: start,
            used: start,
            published: start,
            staged: 0,
            flying: 0,
            first: 0,
            trust: Trust::default(),
        };
        if !ring.agrees_with(start) {
            return Err(Error::Protocol(format!(
                "base {base:#x} of a packed vring is not where its descriptors are: a front end cannot know it after a \
                 crash of its back end. Reset the guest's network device"
            )));
        }
        ring.ask_for_kicks(false);
        Ok(ring)
    }

    /// Whether the descriptors can be those of a ring that has come to `at`: from there on none is used in this
    /// round already, in front of it none in the round before only. Not every wrong place is found out.
    fn agrees_with(&self, at: Cursor) -> bool {
        (0..self.size).all(|slot| {
            let used = Cursor { index: slot, wrap: (slot >= at.index) == at.wrap }.used();
            (Self::word(&self.ring, slot) >> 48) as u16 & (AVAIL | USED) != used
        })
    }

    /// Length, id and flags of a slot. What the driver wrote before it made the slot available is visible.
    #[inline]
    fn word(ring: &HostRange, slot: u16) -> u64 {
        // SAFETY: callers keep `slot` below the size, so inside the ring, which is aligned (`new`); the
        // view keeps the memory.
        unsafe { ring.acquire_u64(usize::from(slot) * DESCRIPTOR_LEN + WORD) }
    }

    /// The descriptor in a slot.
    #[inline]
    fn descriptor(&self, slot: u16) -> Descriptor {
        let word = Self::word(&self.ring, slot);
        // SAFETY: as in `word`.
        let addr = unsafe { self.ring.read_u64(usize::from(slot) * DESCRIPTOR_LEN) };
        Descriptor::packed(addr, word)
    }

    /// The used descriptor of a chain whose first slot is at `at` (2.8.6).
    #[inline]
    fn used_word(at: Cursor, id: u16, len: u32) -> u64 {
        let written = if len > 0 { WRITE } else { 0 };
        u64::from(len) | u64::from(id) << 32 | u64::from(at.used() | written) << 48
    }

    /// Whether the guest wants to hear that used descriptors were written from `old` to before `new`,
    /// at least one and at most a round.
    fn is_awaited(&self, old: Cursor, new: Cursor) -> bool {
        // SAFETY: four bytes, aligned (`new`); the view keeps the memory.
        let word = unsafe { self.driver.ordered_u32(0) };
        let event = Cursor::decode(word as u16);
        match (word >> 16) as u16 & EVENT_FLAGS {
            EVENT_DISABLE => false,
            EVENT_DESC if self.event_idx => {
                // On one line: `new` in this round, the others of the round before in front of it.
                let old = if new.index <= old.index { old.index.wrapping_sub(self.size) } else { old.index };
                let event = if event.wrap != new.wrap { event.index.wrapping_sub(self.size) } else { event.index };
                need_event(event, new.index, old)
            }
            _ => true,
        }
    }
}

impl Virtqueue for PackedRing {
    #[inline]
    fn look(&mut self, _again: bool) -> Result<(), RingFault> {
        self.trust.check()?;
        if self.view.is_dead() {
            return Err(self.trust.stop(RingFault::MemoryGone));
        }
        Ok(())
    }

    #[inline]
    fn is_ready(&self, ahead: u16) -> bool {
        if ahead >= self.size - self.staged - self.flying {
            return false;
        }
        let at = self.next.plus(ahead, self.size);
        at.is_available((Self::word(&self.ring, at.index) >> 48) as u16)
    }

    #[inline]
    fn read<const WRITABLE: bool>(
        &mut self,
        ahead: u16,
        budget: &mut usize,
        take: impl FnMut(HostRange) -> Result<(), Stop>,
    ) -> (Token, Result<(), Stop>) {
        let most = (self.size - self.staged - self.flying - ahead).min(DESCRIPTORS as u16);
        let mut slot = self.next.plus(ahead, self.size).index;
        let mut slots = 0;
        let mut result = Ok(());
        let mut take = take;
        loop {
            let descriptor = self.descriptor(slot);
            slots += 1;
            if result.is_ok() {
                let (view, indirect) = (&mut self.view, self.indirect);
                result = Reader { view, indirect, budget, take: &mut take }.slot::<WRITABLE>(&descriptor);
            } else {
                // Looking for the end is work, too.
                *budget = budget.saturating_sub(1);
            }
            // Whatever is wrong with it or no longer needed: the next chain begins where this one ends.
            if descriptor.flags & NEXT == 0 {
                return (Token { id: descriptor.link, slots }, result);
            }
            if slots == most {
                return (Token::default(), Err(Stop::Ring(self.trust.stop(RingFault::Endless))));
            }
            slot = if slot + 1 == self.size { 0 } else { slot + 1 };
        }
    }

    #[inline(always)]
    fn take_simple<const WRITABLE: bool>(
        &mut self,
        max: usize,
        mut take: impl FnMut(Token, HostRange) -> bool,
    ) -> usize {
        let most = usize::from(self.size - self.staged - self.flying).min(max) as u16;
        let (mut at, mut taken) = (self.next, 0);
        let Self { ring, view, size, .. } = &mut *self;
        let size = *size;
        let mut one = |slot: u16, flags: u16| {
            let word = Self::word(ring, slot);
            if (word >> 48) as u16 & (AVAIL | USED | SHAPE) != flags {
                return false;
            }
            // SAFETY: as in `word`.
            let addr = unsafe { ring.read_u64(usize::from(slot) * DESCRIPTOR_LEN) };
            let buffer = view.whole(Gpa(addr), u64::from(word as u32));
            buffer.is_some_and(|buffer| take(Token { id: (word >> 32) as u16, slots: 1 }, buffer))
        };
        // What the flags of such a chain are changes only where a round ends.
        while taken < most {
            let flags = at.available() | if WRITABLE { WRITE } else { 0 };
            let round = (size - at.index).min(most - taken);
            let run = (0..round).find(|slot| !one(at.index + slot, flags)).unwrap_or(round);
            at = at.plus(run, size);
            taken += run;
            if run < round {
                break;
            }
        }
        self.next = at;
        self.flying += taken;
        taken.into()
    }

    #[inline]
    fn advance(&mut self, slots: u16) {
        self.next = self.next.plus(slots, self.size);
        self.flying += slots;
    }

    #[inline]
    fn stage_each(&mut self, chains: impl Iterator<Item = (Token, u32)>) {
        let (mut used, mut slots) = (self.used, 0);
        for (chain, len) in chains {
            let word = Self::used_word(used, chain.id, len);
            if self.staged + slots == 0 {
                self.first = word;
            } else {
                // Behind what the guest looks at, until `publish`.
                // SAFETY: a cursor's index is below the size, so inside the ring; the view keeps the memory.
                unsafe { self.store.u64(&self.ring, usize::from(used.index) * DESCRIPTOR_LEN + WORD, word) };
            }
            used = used.plus(chain.slots, self.size);
            slots += chain.slots;
        }
        debug_assert!(slots <= self.flying);
        self.used = used;
        self.staged += slots;
        self.flying -= slots;
    }

    #[inline]
    fn stage_empty(&mut self, chains: impl ExactSizeIterator<Item = Token>) {
        if !self.in_order {
            return self.stage_each(chains.map(|chain| (chain, 0)));
        }
        // The last one's id stands for all (2.8.7).
        let last = chains.fold(Token::default(), |all, chain| Token { slots: all.slots + chain.slots, ..chain });
        if last.slots > 0 {
            self.stage(last, 0);
        }
    }

    fn put_back(&mut self, slots: u16) {
        debug_assert!(slots <= self.flying);
        self.next = self.next.minus(slots, self.size);
        self.flying -= slots;
    }

    #[inline]
    fn publish(&mut self) -> bool {
        if self.staged == 0 {
            return false;
        }
        let old = std::mem::replace(&mut self.published, self.used);
        self.staged = 0;
        // As in a split ring: the store must not be overtaken by the load of what the guest wants.
        // SAFETY: a cursor's index is below the size, so inside the ring, which is aligned (`new`); the
        // view keeps the memory.
        unsafe { self.store.publish_u64(&self.ring, usize::from(old.index) * DESCRIPTOR_LEN + WORD, self.first) };
        self.is_awaited(old, self.published)
    }

    #[inline]
    fn is_staged(&self) -> bool {
        self.staged > 0
    }

    /// What we ask of the guest. With EVENT_IDX one kick, for the next slot, else one for each.
    fn ask_for_kicks(&mut self, wanted: bool) {
        let flags = match (wanted, self.event_idx) {
            (false, _) => EVENT_DISABLE,
            (true, true) => EVENT_DESC,
            (true, false) => EVENT_ENABLE,
        };
        let word = u32::from(self.next.encode()) | u32::from(flags) << 16;
        // SAFETY: four bytes, aligned (`new`); the view keeps the memory.
        unsafe { self.store.u32(&self.device, 0, word) };
    }

    fn position(&self) -> u16 {
        self.published.encode()
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
