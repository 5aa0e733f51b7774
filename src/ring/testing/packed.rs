//! A driver's side of a packed ring (virtio 1.3, section 2.8), as simple as its neighbour for split ones.

use std::collections::VecDeque;
use std::ops::{Deref, Range};
use std::sync::atomic::{Ordering, fence};

use super::{Buffers, Descriptor, HEADER, Memory, NEXT, WRITE};

pub const AVAIL: u16 = 1 << 7;
pub const USED: u16 = 1 << 15;

/// Values of an event suppression structure's flags.
pub const ENABLE: u16 = 0;
pub const DISABLE: u16 = 1;
pub const DESC: u16 = 2;

/// A slot, and the wrap counter of the round in which it is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub index: u16,
    pub wrap: bool,
}

impl Place {
    /// Where a new ring starts.
    pub const FIRST: Self = Self { index: 0, wrap: true };

    /// From its form in messages and event suppression structures: the wrap counter is bit 15.
    pub fn decode(word: u16) -> Self {
        Self { index: word % (1 << 15), wrap: word >= 1 << 15 }
    }

    pub fn encode(self) -> u16 {
        self.index + if self.wrap { 1 << 15 } else { 0 }
    }

    /// The next one: behind the last slot the counter flips (2.8.1).
    pub fn next(self, size: u16) -> Self {
        if self.index + 1 == size {
            Self { index: 0, wrap: !self.wrap }
        } else {
            Self { index: self.index + 1, ..self }
        }
    }

    pub fn plus(self, slots: u16, size: u16) -> Self {
        (0..slots).fold(self, |place, _| place.next(size))
    }

    /// Slots from here up to `other`, less than two rounds.
    pub fn distance(self, other: Self, size: u16) -> u32 {
        let line = |place: Self| u32::from(place.index) + if place.wrap { 0 } else { u32::from(size) };
        (line(other) + 2 * u32::from(size) - line(self)) % (2 * u32::from(size))
    }

    /// The flags of a descriptor that is available, or used, here.
    pub fn available(self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }

    pub fn used(self) -> u16 {
        if self.wrap { AVAIL | USED } else { 0 }
    }
}

/// A descriptor's bytes; `next` is its buffer id (2.8.12).
pub fn bytes(descriptor: &Descriptor) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&descriptor.addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&descriptor.len.to_le_bytes());
    bytes[12..14].copy_from_slice(&descriptor.next.to_le_bytes());
    bytes[14..].copy_from_slice(&descriptor.flags.to_le_bytes());
    bytes
}

/// Guest memory with a packed ring in it, at its start if there is one only.
#[derive(Debug)]
pub struct Driver {
    memory: Memory,
    at: usize,
    pub size: u16,
    /// Where the next descriptor goes, and where the next used one is looked for.
    pub avail: Place,
    pub used: Place,
    /// IN_ORDER was negotiated: a used descriptor stands for the chains before it, too (2.8.8).
    pub in_order: bool,
    /// Where the chains begin that are not yet visible, and the flags to be written there.
    hidden: Option<(Place, u16)>,
    /// Ids and slots of the chains that the device has, oldest first.
    out: VecDeque<(u16, u16)>,
}

impl Driver {
    /// `len` bytes of memory, with a ring of `size` slots of which the first to be used is `start`.
    pub fn new(len: usize, size: u16, start: Place) -> Self {
        Self::over(Memory::new(len), 0, size, start)
    }

    /// Another ring in the same memory, `at` bytes from its start.
    pub fn beside(&self, at: usize, size: u16, start: Place) -> Self {
        Self::over(self.share(), at, size, start)
    }

    fn over(memory: Memory, at: usize, size: u16, start: Place) -> Self {
        let out = VecDeque::new();
        let driver = Self { memory, at, size, avail: start, used: start, in_order: false, hidden: None, out };
        assert!(driver.buffers().start < driver.end());
        // As it is after the rounds before: slots in front of the start were used in this one, the others in
        // the last.
        let before = Place { index: 0, wrap: !start.wrap };
        for slot in 0..size {
            let place = if slot < start.index { start } else { before };
            driver.put_u16(driver.slot_at(slot) + 14, place.used());
        }
        driver
    }

    pub fn ring_at(&self) -> usize {
        self.at
    }

    pub fn slot_at(&self, slot: u16) -> usize {
        self.at + usize::from(slot) * 16
    }

    /// The driver's event suppression structure: what we ask of the device.
    pub fn driver_at(&self) -> usize {
        self.slot_at(self.size)
    }

    /// The device's, what it asks of us.
    pub fn device_at(&self) -> usize {
        self.driver_at() + 4
    }

    /// Bytes behind the ring, from a page boundary.
    pub fn buffers(&self) -> Range<usize> {
        (self.device_at() + 4).next_multiple_of(4096)..self.end()
    }

    /// Slots that the device does not have.
    pub fn room(&self) -> u16 {
        self.size - self.used.distance(self.avail, self.size) as u16
    }

    /// Takes back all in front of the device's own position, whatever the books say; if the device was lied to
    /// and is ahead, goes on from there.
    pub fn trust(&mut self, position: Place) {
        self.out.clear();
        self.used = position;
        if position.distance(self.avail, self.size) > self.size.into() {
            self.avail = position;
            self.hidden = None;
        }
    }

    /// Writes a descriptor as it is.
    pub fn describe(&self, slot: u16, descriptor: Descriptor) {
        self.put(self.slot_at(slot), &bytes(&descriptor));
    }

    /// Puts a chain with these descriptors into the next slots, not yet visible. NEXT is as told; availability and
    /// the id are ours to set, the latter in the last one only: all others have one that means nothing.
    pub fn offer(&mut self, id: u16, chain: &[Descriptor]) {
        assert!(!chain.is_empty() && chain.len() <= self.room().into(), "no room");
        for (i, descriptor) in chain.iter().enumerate() {
            let next = if i + 1 == chain.len() { id } else { !id };
            let flags = descriptor.flags | self.avail.available();
            if self.hidden.is_some() {
                self.describe(self.avail.index, Descriptor { next, flags, ..*descriptor });
            } else {
                // What the slot's flags say stays as it is: not available.
                let at = self.slot_at(self.avail.index);
                self.put(at, &bytes(&Descriptor { next, ..*descriptor })[..14]);
                self.hidden = Some((self.avail, flags));
            }
            self.avail = self.avail.next(self.size);
        }
        self.out.push_back((id, chain.len() as u16));
    }

    /// Puts a well-formed chain of `buffers` (guest address, length) into the next slots.
    pub fn chain(&mut self, id: u16, buffers: &[(u64, u32)], flags: u16) {
        let last = buffers.len() - 1;
        let more = |i: usize| if i < last { NEXT } else { 0 };
        let chain = buffers.iter().enumerate();
        let chain: Vec<_> = chain.map(|(i, (addr, len))| Descriptor::new(*addr, *len, flags | more(i), 0)).collect();
        self.offer(id, &chain);
    }

    /// Makes all that was offered visible: its first descriptor last (2.8.6).
    pub fn publish(&mut self) {
        if let Some((place, flags)) = self.hidden.take() {
            self.put_u16(self.slot_at(place.index) + 14, flags);
        }
    }

    /// The next used descriptor, if any: id, length, and how many chains it stands for.
    pub fn take_used(&mut self) -> Option<(u16, u32, usize)> {
        let at = self.slot_at(self.used.index);
        let flags = self.get_u16(at + 14);
        if flags & (AVAIL | USED) != self.used.used() {
            return None;
        }
        let bytes = self.get(at + 8, 6);
        let len = u32::from_le_bytes(bytes[..4].try_into().unwrap());
        let id = u16::from_le_bytes(bytes[4..].try_into().unwrap());
        assert_eq!(flags & WRITE != 0, len > 0, "WRITE says whether something was written (2.8.3)");
        let batch = self.out.iter().position(|(out, _)| *out == id).expect("it was offered") + 1;
        assert!(batch == 1 || self.in_order, "chains are used in order");
        let slots = self.out.drain(..batch).map(|(_, slots)| slots).sum();
        self.used = self.used.plus(slots, self.size);
        Some((id, len, batch))
    }

    /// What the device asks: the place it names, and its flags.
    pub fn device_event(&self) -> (Place, u16) {
        (Place::decode(self.get_u16(self.device_at())), self.get_u16(self.device_at() + 2))
    }

    /// Whether the device wants to be kicked for what was published since `old` (2.8.10).
    pub fn kick_wanted(&self, old: Place) -> bool {
        fence(Ordering::SeqCst);
        match self.device_event() {
            (_, DISABLE) => false,
            (event, DESC) => passes(old, self.avail, event, self.size),
            _ => true,
        }
    }

    pub fn set_driver_event(&self, place: Place, flags: u16) {
        self.put_u16(self.driver_at(), place.encode());
        self.put_u16(self.driver_at() + 2, flags);
    }
}

impl Deref for Driver {
    type Target = Memory;

    fn deref(&self) -> &Memory {
        &self.memory
    }
}

/// Whether a move from `old` to `new`, of a round at most, passes the slot `event` in its round.
pub fn passes(old: Place, new: Place, event: Place, size: u16) -> bool {
    let slots = old.distance(new, size) as u16;
    (0..slots).any(|n| old.plus(n, size) == event)
}

/// A driver that sends: each slot has a buffer of its own, and is used in turns.
#[derive(Debug)]
pub struct Sender {
    pub ring: Driver,
    buffers: Buffers,
}

impl Sender {
    /// Buffers of `buffer` bytes, from `at` on.
    pub fn new(ring: Driver, at: usize, buffer: usize) -> Self {
        Self { ring, buffers: Buffers::new(at, buffer) }
    }

    /// Frames that can be sent before some are taken back.
    pub fn room(&self) -> usize {
        self.ring.room().into()
    }

    /// Offers a frame; [`Driver::publish`] shows it. There is room.
    pub fn send(&mut self, header: &[u8; HEADER], frame: &[u8]) {
        assert!(self.room() > 0);
        let id = self.ring.avail.index;
        let filled = self.buffers.fill(&self.ring, id, header, frame);
        self.ring.offer(id, &[filled]);
    }

    /// Takes back what the device has used, which must be in order, each once. Returns how many.
    pub fn reclaim(&mut self) -> usize {
        let mut n = 0;
        while let Some((_, len, batch)) = self.ring.take_used() {
            assert_eq!(len, 0);
            n += batch;
        }
        n
    }
}

/// A driver that receives, into buffers of its own.
#[derive(Debug)]
pub struct Receiver {
    pub ring: Driver,
    buffers: Buffers,
}

impl Receiver {
    /// Buffers of `buffer` bytes, from `at` on.
    pub fn new(ring: Driver, at: usize, buffer: usize) -> Self {
        Self { ring, buffers: Buffers::new(at, buffer) }
    }

    /// Posts up to `n` buffers, as many as there are.
    pub fn post(&mut self, n: usize) {
        for _ in 0..n.min(self.ring.room().into()) {
            let id = self.ring.avail.index;
            let empty = self.buffers.empty(&self.ring, id);
            self.ring.offer(id, &[empty]);
        }
        self.ring.publish();
    }

    /// Posted buffers without a frame.
    pub fn posted(&self) -> usize {
        usize::from(self.ring.size - self.ring.room())
    }

    /// The next frame, each in one buffer.
    pub fn receive(&mut self) -> Option<Vec<u8>> {
        let (id, len, batch) = self.ring.take_used()?;
        assert_eq!(batch, 1, "each has a length of its own");
        Some(self.buffers.frame(&self.ring, id, len))
    }
}
