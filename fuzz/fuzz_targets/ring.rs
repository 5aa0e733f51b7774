//! A hostile driver against both rings: the input is a program of stores to guest memory and calls of
//! the device side. Nothing may panic or touch memory that is not mapped, and work is bounded.

#![no_main]

use libfuzzer_sys::fuzz_target;
use virtio_forwarder::guest::{Gpa, GuestMemory, RegionSpec, UserAddr};
use virtio_forwarder::ring::testing::{Descriptor, Driver, GPA, USER};
use virtio_forwarder::ring::{BURST, Gather, NetHeader, PushError, RingAddresses, RingConfig, RxRing, TxRing};

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

fn run(input: &mut Input<'_>) {
    let features = input.byte();
    let size = 1 << (input.byte() % 9);
    let mut driver = Driver::new(LEN, size, input.word());
    let mergeable = features & 4 != 0;
    let legacy = !mergeable && features & 8 != 0;
    let user = |at: usize| UserAddr(USER + at as u64);
    let config = RingConfig {
        packed: false,
        in_order: false,
        size,
        addresses: RingAddresses {
            desc: user(driver.desc_at()),
            avail: user(driver.avail_at()),
            used: user(driver.used_at()),
        },
        base: 0,
        indirect: features & 1 != 0,
        event_idx: features & 2 != 0,
        mergeable,
        header_len: if legacy { 10 } else { 12 },
        max_frame: MAX_FRAME,
    };
    let region = |half: usize| {
        let at = (half * LEN / 2) as u64;
        let spec = RegionSpec { gpa: Gpa(GPA + at), size: LEN as u64 / 2, user: UserAddr(USER + at), offset: at };
        (spec, driver.file.try_clone().unwrap())
    };
    let memory = GuestMemory::empty().replaced(vec![region(0), region(1)]).unwrap();
    let mut tx = TxRing::new(memory.clone(), &config).unwrap();
    let mut rx = RxRing::new(memory, &config).unwrap();

    while !input.0.is_empty() {
        match input.byte() % 13 {
            0 => {
                let at = usize::from(input.word()) % (LEN - 2);
                // Ring fields have even addresses; a driver's 16-bit store, too.
                driver.put_u16(at & !1, input.word());
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
                let flags = u16::from(input.byte() & 7);
                let next = u16::from(input.byte());
                driver.describe(index, Descriptor::new(addr, len, flags, next));
            }
            3 => driver.offer(input.word() % (size + 1)),
            4 => driver.publish(),
            5 => driver.put_u16(driver.avail_at() + 2, input.word()),
            6 => pop(&mut tx, usize::from(input.byte())),
            7 => {
                let n = usize::from(input.byte()).min(tx.in_flight());
                tx.complete(n);
            }
            8 => {
                tx.publish();
                rx.publish();
            }
            9 => push(&mut rx, usize::from(input.word()) % (2 * MAX_FRAME), mergeable),
            10 => {
                tx.enable_kicks();
                rx.enable_kicks();
            }
            11 => {
                tx.disable_kicks();
                rx.disable_kicks();
            }
            _ => tx.rewind(),
        }
    }
}

fn pop(tx: &mut TxRing, max: usize) {
    let before = tx.in_flight();
    let Ok(n) = tx.pop(max) else { return };
    assert!(n <= max && tx.in_flight() == before + n && tx.in_flight() <= BURST);
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

fn push(rx: &mut RxRing, len: usize, mergeable: bool) {
    let frame = vec![0x5a; len];
    let mut source = &frame[..];
    match rx.push(&NetHeader::default(), &mut source) {
        Ok(()) => assert!(source.is_empty(), "all of it was written"),
        Err(PushError::Oversize) => assert!(!mergeable || len > 0),
        Err(_) => {}
    }
}
