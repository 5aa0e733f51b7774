//! A driver's side of a split ring over a memfd, for tests, benches and fuzzing: it posts what it is
//! told to, lies included; [`packed`] has that of a packed one. Free of `unsafe` and of this crate, so that
//! they can include it as a file.

#![allow(dead_code, missing_docs)]

#[path = "testing/packed.rs"]
pub mod packed;

use std::collections::VecDeque;
use std::fs::File;
use std::ops::{Deref, Range};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, FileOffset, VolatileMemory};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Where the guest sees the first byte of the memory; where the front end does.
pub const GPA: u64 = 0x1_0000_0000;
pub const USER: u64 = 0x7f00_0000_0000;

/// What a driver writes into a descriptor; `addr` is a guest physical address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Descriptor {
    pub fn new(addr: u64, len: u32, flags: u16, next: u16) -> Self {
        Self { addr, len, flags, next }
    }

    pub fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// Guest memory.
#[derive(Debug)]
pub struct Memory {
    pub file: File,
    map: Arc<MmapRegion>,
}

impl Memory {
    /// `len` bytes of zeros.
    pub fn new(len: usize) -> Self {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, len as u64).unwrap();
        let map = MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 0), len).unwrap();
        Self { file, map: Arc::new(map) }
    }

    /// The same memory.
    pub fn share(&self) -> Self {
        Self { file: self.file.try_clone().unwrap(), map: self.map.clone() }
    }

    /// Where it ends.
    pub fn end(&self) -> usize {
        self.map.len()
    }

    pub fn put(&self, at: usize, bytes: &[u8]) {
        self.map.as_volatile_slice().write_slice(bytes, at).unwrap();
    }

    pub fn get(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.map.as_volatile_slice().read_slice(&mut bytes, at).unwrap();
        bytes
    }

    pub fn put_u16(&self, at: usize, value: u16) {
        self.map.as_volatile_slice().store(value.to_le(), at, Ordering::Release).unwrap();
    }

    pub fn get_u16(&self, at: usize) -> u16 {
        let value: u16 = self.map.as_volatile_slice().load(at, Ordering::Acquire).unwrap();
        u16::from_le(value)
    }

    /// Guest physical address of a byte of the memory.
    pub fn gpa(&self, at: usize) -> u64 {
        GPA + at as u64
    }
}

/// Guest memory with a ring in it, at its start if there is one only.
#[derive(Debug)]
pub struct Driver {
    memory: Memory,
    at: usize,
    pub size: u16,
    /// Index of the next entry of the available ring, and of the next used element to look at.
    pub avail: u16,
    pub used: u16,
}

impl Driver {
    /// `len` bytes of memory, with a ring of `size` entries whose indices start at `start`.
    pub fn new(len: usize, size: u16, start: u16) -> Self {
        Self { memory: Memory::new(len), at: 0, size, avail: start, used: start }.reset(start)
    }

    /// Another ring in the same memory, `at` bytes from its start.
    pub fn beside(&self, at: usize, size: u16, start: u16) -> Self {
        Self { memory: self.memory.share(), at, size, avail: start, used: start }.reset(start)
    }

    fn reset(self, start: u16) -> Self {
        let driver = self;
        assert!(driver.buffers().start < driver.end());
        driver.put_u16(driver.avail_at() + 2, start);
        driver.put_u16(driver.used_at() + 2, start);
        driver
    }

    pub fn desc_at(&self) -> usize {
        self.at
    }

    pub fn avail_at(&self) -> usize {
        self.at + usize::from(self.size) * 16
    }

    pub fn used_at(&self) -> usize {
        (self.avail_at() + 6 + 2 * usize::from(self.size)).next_multiple_of(4)
    }

    /// Bytes behind the ring, from a page boundary.
    pub fn buffers(&self) -> Range<usize> {
        let end = self.used_at() + 6 + 8 * usize::from(self.size);
        end.next_multiple_of(4096)..self.end()
    }

    /// Writes descriptor `index` of the table.
    pub fn describe(&self, index: u16, descriptor: Descriptor) {
        self.put(self.desc_at() + usize::from(index) * 16, &descriptor.bytes());
    }

    /// Writes a chain of `buffers` (guest address, length) to the descriptors from `first` on.
    pub fn chain(&self, first: u16, buffers: &[(u64, u32)], flags: u16) {
        for (i, (addr, len)) in buffers.iter().enumerate() {
            let index = first + i as u16;
            let more = if i + 1 < buffers.len() { NEXT } else { 0 };
            self.describe(index, Descriptor::new(*addr, *len, flags | more, index.wrapping_add(1)));
        }
    }

    /// Puts a chain into the available ring, not yet visible.
    pub fn offer(&mut self, head: u16) {
        let slot = usize::from(self.avail % self.size);
        self.put_u16(self.avail_at() + 4 + 2 * slot, head);
        self.avail = self.avail.wrapping_add(1);
    }

    /// Makes all that was offered visible.
    pub fn publish(&self) {
        self.put_u16(self.avail_at() + 2, self.avail);
    }

    /// Whether the device wants to be kicked for what was published since the index was `old`.
    pub fn kick_wanted(&self, old: u16, event_idx: bool) -> bool {
        fence(Ordering::SeqCst);
        match event_idx {
            true => self.avail.wrapping_sub(self.avail_event()).wrapping_sub(1) < self.avail.wrapping_sub(old),
            false => self.used_flags() & 1 == 0,
        }
    }

    /// The next used element, if any: head and length.
    pub fn take_used(&mut self) -> Option<(u32, u32)> {
        if self.used == self.used_idx() {
            return None;
        }
        let at = self.used_at() + 4 + 8 * usize::from(self.used % self.size);
        self.used = self.used.wrapping_add(1);
        let bytes = self.get(at, 8);
        let field = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        Some((field(0), field(4)))
    }

    pub fn used_idx(&self) -> u16 {
        self.get_u16(self.used_at() + 2)
    }

    pub fn used_flags(&self) -> u16 {
        self.get_u16(self.used_at())
    }

    pub fn avail_event(&self) -> u16 {
        self.get_u16(self.used_at() + 4 + 8 * usize::from(self.size))
    }

    pub fn set_avail_flags(&self, flags: u16) {
        self.put_u16(self.avail_at(), flags);
    }

    pub fn set_used_event(&self, event: u16) {
        self.put_u16(self.avail_at() + 4 + 2 * usize::from(self.size), event);
    }
}

impl Deref for Driver {
    type Target = Memory;

    fn deref(&self) -> &Memory {
        &self.memory
    }
}

/// Length of the header in front of each frame.
pub const HEADER: usize = 12;

/// Buffers of equal length, one for each descriptor of a ring.
#[derive(Debug)]
pub struct Buffers {
    at: usize,
    len: usize,
}

impl Buffers {
    /// Of `len` bytes, from `at` on.
    pub fn new(at: usize, len: usize) -> Self {
        Self { at, len }
    }

    fn place(&self, index: u16) -> usize {
        self.at + usize::from(index) * self.len
    }

    /// Puts a frame into one: what to offer.
    pub fn fill(&self, memory: &Memory, index: u16, header: &[u8; HEADER], frame: &[u8]) -> Descriptor {
        let (at, len) = (self.place(index), HEADER + frame.len());
        assert!(len <= self.len);
        memory.put(at, header);
        memory.put(at + HEADER, frame);
        Descriptor::new(memory.gpa(at), len as u32, 0, 0)
    }

    /// One for the device to write to.
    pub fn empty(&self, memory: &Memory, index: u16) -> Descriptor {
        Descriptor::new(memory.gpa(self.place(index)), self.len as u32, WRITE, 0)
    }

    /// The frame that came into one, of which `len` bytes are used; empty if none came.
    pub fn frame(&self, memory: &Memory, index: u16, len: u32) -> Vec<u8> {
        memory.get(self.place(index) + HEADER, (len as usize).saturating_sub(HEADER))
    }
}

/// A driver that sends: each descriptor has a buffer of its own, and is used in turns.
#[derive(Debug)]
pub struct Sender {
    pub ring: Driver,
    buffers: Buffers,
    /// Heads offered and not yet taken back, oldest first.
    out: VecDeque<u16>,
    next: u16,
    /// IN_ORDER was negotiated: a used element stands for those before it, too (virtio 1.3, 2.7.9).
    pub in_order: bool,
}

impl Sender {
    /// Buffers of `buffer` bytes, from `at` on.
    pub fn new(ring: Driver, at: usize, buffer: usize) -> Self {
        Self { ring, buffers: Buffers::new(at, buffer), out: VecDeque::new(), next: 0, in_order: false }
    }

    /// Frames that can be sent before some are taken back.
    pub fn room(&self) -> usize {
        usize::from(self.ring.size) - self.out.len()
    }

    /// Offers a frame; [`Driver::publish`] shows it. There is room.
    pub fn send(&mut self, header: &[u8; HEADER], frame: &[u8]) {
        assert!(self.room() > 0);
        let head = self.next;
        self.ring.describe(head, self.buffers.fill(&self.ring, head, header, frame));
        self.offer(head);
    }

    /// Offers a chain that is no frame.
    pub fn send_rubbish(&mut self) {
        let head = self.next;
        self.ring.describe(head, Descriptor::new(7, 100, 0, 0));
        self.offer(head);
    }

    fn offer(&mut self, head: u16) {
        self.ring.offer(head);
        self.out.push_back(head);
        self.next = (head + 1) % self.ring.size;
    }

    /// Takes back what the device has used, which must be in order, each once. Returns how many.
    pub fn reclaim(&mut self) -> usize {
        let mut n = 0;
        while let Some((id, len)) = self.ring.take_used() {
            let batch = self.out.iter().position(|head| id == u32::from(*head)).expect("it was offered") + 1;
            assert!(batch == 1 || self.in_order, "chains are used in order");
            assert_eq!(len, 0);
            self.out.drain(..batch);
            // One of them was taken above.
            self.ring.used = self.ring.used.wrapping_add(batch as u16 - 1);
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
    out: VecDeque<u16>,
    next: u16,
}

impl Receiver {
    /// Buffers of `buffer` bytes, from `at` on.
    pub fn new(ring: Driver, at: usize, buffer: usize) -> Self {
        Self { ring, buffers: Buffers::new(at, buffer), out: VecDeque::new(), next: 0 }
    }

    /// Posts up to `n` buffers, as many as there are.
    pub fn post(&mut self, n: usize) {
        for _ in 0..n.min(usize::from(self.ring.size) - self.out.len()) {
            let head = self.next;
            self.ring.describe(head, self.buffers.empty(&self.ring, head));
            self.ring.offer(head);
            self.out.push_back(head);
            self.next = (head + 1) % self.ring.size;
        }
        self.ring.publish();
    }

    /// Posted buffers without a frame.
    pub fn posted(&self) -> usize {
        self.out.len()
    }

    /// The next frame, each in one buffer.
    pub fn receive(&mut self) -> Option<Vec<u8>> {
        let (head, len) = self.ring.take_used()?;
        assert_eq!(Some(head), self.out.pop_front().map(u32::from), "buffers are used in order");
        Some(self.buffers.frame(&self.ring, head as u16, len))
    }
}

/// A frame with a number: its flow is in the Ethernet addresses, every byte depends on flow and number.
pub fn numbered(flow: u8, number: u64, len: usize) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, flow, 2, 0, 0, 0, 1, flow, 0x88, 0xb5];
    frame.extend(number.to_be_bytes());
    let fill = (frame.len()..len).map(|i| (i as u64).wrapping_mul(31).wrapping_add(number ^ u64::from(flow)) as u8);
    frame.extend(fill);
    frame
}

/// Flow and number of such a frame.
pub fn number(frame: &[u8]) -> (u8, u64) {
    let (flow, number) = (frame[5], u64::from_be_bytes(frame[14..22].try_into().unwrap()));
    assert_eq!(frame, numbered(flow, number, frame.len()), "frame changed on its way");
    (flow, number)
}
