//! A hostile driver against both rings: the input is a program of stores to guest memory and calls of
//! the device side. Nothing may panic or touch memory that is not mapped, and work is bounded.

#![no_main]

use libfuzzer_sys::fuzz_target;
use virtio_forwarder::guest::{Gpa, GuestMemory, RegionSpec, UserAddr};
use virtio_forwarder::ring::testing::packed::{self, AVAIL, Place, USED};
use virtio_forwarder::ring::testing::{Descriptor, Driver, GPA, Memory, USER};
use virtio_forwarder::ring::{
    BURST, Gather, IN_FLIGHT, NetHeader, PushError, RingAddresses, RingConfig, RxRing, TxRing,
};

/// Two adjacent regions, then a hole.
const LEN: usize = 64 << 10;
const MAX_FRAME: usize = 9018;

/// The rest of the input; zeroes behind its end.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }
}

fuzz_target!(|data: &[u8]| run(&mut Input(data)));

/// The driver of either format.
enum Guest {
    Split(Driver),
    Packed(packed::Driver),
}

impl Guest {
    fn new(packed: bool, size: u8, start: u16) -> Self {
        if packed {
            let size = u16::from(size) + 1;
            let Place { index, wrap } = Place::decode(start);
            return Self::Packed(packed::Driver::new(LEN, size, Place { index: index % size, wrap }));
        }
        Self::Split(Driver::new(LEN, 1 << (size % 9), start))
    }

    fn memory(&self) -> &Memory {
        match self {
            Self::Split(driver) => driver,
            Self::Packed(driver) => driver,
        }
    }

    fn size(&self) -> u16 {
        match self {
            Self::Split(driver) => driver.size,
            Self::Packed(driver) => driver.size,
        }
    }

    fn base(&self) -> u16 {
        match self {
            // A split ring knows.
            Self::Split(_) => 0,
            Self::Packed(driver) => driver.used.encode(),
        }
    }

    fn addresses(&self) -> RingAddresses {
        let (desc, avail, used) = match self {
            Self::Split(driver) => (driver.desc_at(), driver.avail_at(), driver.used_at()),
            Self::Packed(driver) => (driver.ring_at(), driver.driver_at(), driver.device_at()),
        };
        let user = |at: usize| UserAddr(USER + at as u64);
        RingAddresses { desc: user(desc), avail: user(avail), used: user(used) }
    }

    /// Writes a descriptor, in a packed ring with any availability.
    fn describe(&self, index: u16, descriptor: Descriptor, available: u8) {
        match self {
            Self::Split(driver) => driver.describe(index, descriptor),
            Self::Packed(driver) => {
                let avail = if available & 1 != 0 { AVAIL } else { 0 } | if available & 2 != 0 { USED } else { 0 };
                driver.describe(index, Descriptor { flags: descriptor.flags | avail, ..descriptor });
            }
        }
    }

    /// Offers a head; in a packed ring that many slots as they are, as one chain or single ones.
    fn offer(&mut self, head: u16) {
        match self {
            Self::Split(driver) => driver.offer(head % (driver.size + 1)),
            Self::Packed(driver) => {
                for _ in 0..(1 + head % 8).min(driver.room()) {
                    let at = driver.slot_at(driver.avail.index);
                    let bytes = driver.get(at, 16);
                    let descriptor = Descriptor {
                        addr: u64::from_le_bytes(bytes[..8].try_into().unwrap()),
                        len: u32::from_le_bytes(bytes[8..12].try_into().unwrap()),
                        flags: u16::from_le_bytes(bytes[14..].try_into().unwrap()) & 7,
                        next: 0,
                    };
                    driver.offer(head, &[descriptor]);
                }
            }
        }
    }

    fn publish(&mut self) {
        match self {
            Self::Split(driver) => driver.publish(),
            Self::Packed(driver) => driver.publish(),
        }
    }

    /// A lie about where the driver is, or of what it wants to hear.
    fn lie(&mut self, word: u16) {
        match self {
            Self::Split(driver) => driver.put_u16(driver.avail_at() + 2, word),
            Self::Packed(driver) => driver.set_driver_event(Place::decode(word), word & 3),
        }
    }

    /// Takes back what the device has used.
    fn reclaim(&mut self, position: u16) {
        if let Self::Packed(driver) = self {
            driver.trust(Place::decode(position));
        }
    }
}

fn run(input: &mut Input<'_>) {
    let features = input.byte();
    let packed = features & 16 != 0;
    let mut driver = Guest::new(packed, input.byte(), input.word());
    let size = driver.size();
    let mergeable = features & 4 != 0;
    let legacy = !mergeable && features & 8 != 0;
    let config = RingConfig {
        packed,
        in_order: features & 32 != 0,
        size,
        addresses: driver.addresses(),
        base: driver.base(),
        indirect: features & 1 != 0,
        event_idx: features & 2 != 0,
        mergeable,
        header_len: if legacy { 10 } else { 12 },
        max_frame: MAX_FRAME,
    };
    let region = |half: usize| {
        let at = (half * LEN / 2) as u64;
        let spec = RegionSpec { gpa: Gpa(GPA + at), size: LEN as u64 / 2, user: UserAddr(USER + at), offset: at };
        (spec, driver.memory().file.try_clone().unwrap())
    };
    let memory = GuestMemory::empty().replaced(vec![region(0), region(1)]).unwrap();
    let mut tx = TxRing::new(memory.clone(), &config).unwrap();
    let mut rx = RxRing::new(memory, &config).unwrap();

    while !input.0.is_empty() {
        match input.byte() % 14 {
            0 => {
                let at = usize::from(input.word()) % (LEN - 2);
                // Ring fields have even addresses; a driver's 16-bit store, too.
                driver.memory().put_u16(at & !1, input.word());
            }
            1 | 2 => {
                let index = input.word() % size;
                // Mostly inside the memory, now and then at its ends or anywhere.
                let addr = match input.byte() {
                    0xff => u64::MAX - u64::from(input.word()),
                    0xfe => (GPA - 4096) + u64::from(input.word()),
                    _ => GPA + u64::from(input.word()),
                };
                let len = match input.byte() {
                    0xff => u32::from(input.word()) << 16,
                    high => u32::from(high & 0x0f) << 8 | u32::from(input.byte()),
                };
                let flags = input.byte();
                let next = u16::from(input.byte());
                driver.describe(index, Descriptor::new(addr, len, u16::from(flags & 7), next), flags >> 6);
            }
            3 => driver.offer(input.word()),
            4 => driver.publish(),
            5 => driver.lie(input.word()),
            6 => pop(&mut tx, usize::from(input.byte())),
            7 => {
                let n = usize::from(input.byte()).min(tx.in_flight());
                tx.complete(n);
            }
            8 => {
                tx.publish();
                rx.publish();
                // Both serve one ring: the driver believes either.
                driver.reclaim(if features & 64 != 0 { rx.position() } else { tx.position() });
            }
            9 => push(&mut rx, usize::from(input.word()) % (2 * MAX_FRAME), usize::from(input.byte()), mergeable),
            10 => {
                tx.enable_kicks();
                rx.enable_kicks();
            }
            11 => {
                tx.disable_kicks();
                rx.disable_kicks();
            }
            12 => reserve(&mut rx, usize::from(input.word()) % 4096, usize::from(input.byte() % 8), usize::from(input.byte())),
            _ => tx.rewind(),
        }
        if packed {
            for position in [tx.position(), rx.position()] {
                assert!(Place::decode(position).index < size);
            }
        }
    }
}

fn pop(tx: &mut TxRing, max: usize) {
    let before = tx.in_flight();
    let Ok(n) = tx.pop(max) else { return };
    assert!(n <= max.min(BURST) && tx.in_flight() == before + n && tx.in_flight() <= IN_FLIGHT);
    for frame in tx.plain_frames(0) {
        assert!((14..=MAX_FRAME).contains(&frame.remaining()));
    }
    for i in 0..n {
        let Ok(mut frame) = tx.frame(i) else { continue };
        assert!((14..=MAX_FRAME).contains(&frame.len()));
        assert_eq!(frame.remaining(), frame.len());
        frame.header();
        let mut into = vec![0; frame.len()];
        let (head, tail) = into.split_at_mut(14);
        frame.copy_next(head);
        frame.copy_next(tail);
        assert_eq!(frame.remaining(), 0);
    }
}

/// Takes buffers out, and lets some have a frame: those that were left free, and every other one that was posted.
fn reserve(rx: &mut RxRing, len: usize, ahead: usize, wanted: usize) {
    let frame = vec![0x5a; len];
    let room = NetHeader::LEN + len;
    let mut places = Vec::new();
    let supply = rx.reserve(ahead, BURST, room, |buffer| {
        assert!(buffer.len() >= room);
        places.push(buffer.as_ptr().addr() + NetHeader::LEN);
        places.len() <= wanted
    });
    assert!(supply.is_err() || rx.reserved() <= ahead + wanted);
    while rx.is_place_free() {
        assert!(rx.fill(&NetHeader::default(), &mut &frame[..]).is_ok());
    }
    for at in places.iter().step_by(2) {
        rx.accept(*at, BURST, &NetHeader::default(), len);
    }
    rx.release(0);
}

fn push(rx: &mut RxRing, len: usize, n: usize, mergeable: bool) {
    let frame = vec![0x5a; len];
    assert!(rx.push_each((0..n).map(|_| (NetHeader::default(), &frame[..]))) <= n.min(BURST));
    let mut source = &frame[..];
    match rx.push(&NetHeader::default(), &mut source) {
        Ok(()) => assert!(source.is_empty(), "all of it was written"),
        Err(PushError::Oversize) => assert!(!mergeable || len > 0),
        Err(_) => {}
    }
}
