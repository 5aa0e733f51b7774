//! Rings against a driver that behaves, and one that does not.

mod packed;

use std::sync::Arc;

use super::testing::{Descriptor, Driver, GPA, INDIRECT, Memory, NEXT, Sender, USER, WRITE};
use super::*;
use crate::guest::{Gpa, GuestMemory, RegionSpec, UserAddr, install_sigbus_handler};

const LEN: usize = 1 << 21;

/// A driver, and the ring's view of it.
struct Rig {
    driver: Driver,
    config: RingConfig,
}

/// Two adjacent regions with a border at `LEN / 2`.
fn mapped(memory: &Memory) -> Arc<GuestMemory> {
    let region = |half: u64| {
        let at = half * LEN as u64 / 2;
        let spec = RegionSpec { gpa: Gpa(GPA + at), size: LEN as u64 / 2, user: UserAddr(USER + at), offset: at };
        (spec, memory.file.try_clone().unwrap())
    };
    GuestMemory::empty().replaced(vec![region(0), region(1)]).unwrap()
}

impl Rig {
    fn new(size: u16, start: u16) -> Self {
        let driver = Driver::new(LEN, size, start);
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
            base: start,
            indirect: true,
            event_idx: false,
            mergeable: false,
            header_len: NetHeader::LEN,
            max_frame: 1518,
        };
        Self { driver, config }
    }

    fn memory(&self) -> Arc<GuestMemory> {
        mapped(&self.driver)
    }

    fn tx(&self) -> TxRing {
        TxRing::new(self.memory(), &self.config).unwrap()
    }

    fn rx(&self) -> RxRing {
        RxRing::new(self.memory(), &self.config).unwrap()
    }

    /// Guest address `at` bytes behind the ring.
    fn buffer(&self, at: usize) -> u64 {
        self.driver.gpa(self.driver.buffers().start + at)
    }

    fn write(&self, gpa: u64, bytes: &[u8]) {
        self.driver.put((gpa - GPA) as usize, bytes);
    }

    fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        self.driver.get((gpa - GPA) as usize, len)
    }

    fn post(&mut self, heads: impl IntoIterator<Item = u16>) {
        heads.into_iter().for_each(|head| self.driver.offer(head));
        self.driver.publish();
    }
}

fn bytes(frame: &mut Frame<'_>) -> Vec<u8> {
    let mut into = vec![0; frame.remaining()];
    frame.copy_next(&mut into);
    into
}

/// Pops one chain that the driver described at 0, and completes it.
fn pop_one(rig: &mut Rig, ring: &mut TxRing) -> Result<(NetHeader, Vec<u8>), ChainFault> {
    rig.post([0]);
    assert_eq!(ring.pop(BURST), Ok(1));
    let found = ring.frame(0).map(|mut f| (f.header(), bytes(&mut f)));
    ring.complete(1);
    ring.publish();
    assert_eq!(rig.driver.take_used(), Some((0, 0)));
    found
}

#[test]
fn chains_come_out_in_order_at_every_size_and_wrap() {
    for size in [1, 2, 16, 256, 32768_u16] {
        let start = u16::MAX - 3;
        let mut rig = Rig::new(size, start);
        let mut ring = rig.tx();
        let at = rig.buffer(0);
        let batch = size.min(40);
        let mut number = 0_u16;
        for _ in 0..if size == 32768 { 2000 } else { 20 } {
            for i in 0..batch {
                // Heads backwards, so that heads and positions differ.
                let head = size - 1 - i;
                let gpa = at + u64::from(i) * 64;
                rig.write(gpa + 12, &[number.to_le_bytes(), [0; 2]].concat());
                rig.driver.describe(head, Descriptor::new(gpa, 64, 0, 0));
                rig.driver.offer(head);
                number = number.wrapping_add(1);
            }
            rig.driver.publish();
            let mut left = batch;
            while left > 0 {
                let n = ring.pop(BURST).unwrap();
                assert_eq!(n, BURST.min(left.into()));
                assert_eq!(ring.in_flight(), n);
                for i in 0..n {
                    let frame = bytes(&mut ring.frame(i).unwrap());
                    let expected = number.wrapping_sub(left - i as u16);
                    assert_eq!(frame[..2], expected.to_le_bytes(), "size {size}");
                }
                ring.complete(n);
                assert!(ring.publish(), "NO_INTERRUPT is not set");
                left -= n as u16;
            }
            for i in 0..batch {
                assert_eq!(rig.driver.take_used(), Some((u32::from(size - 1 - i), 0)));
            }
            assert_eq!(rig.driver.take_used(), None);
            assert_eq!(ring.position(), rig.driver.used_idx());
            assert!(!ring.publish(), "nothing was completed");
        }
    }
}

#[test]
fn any_layout_of_header_and_frame_is_understood() {
    let mut rig = Rig::new(64, 0);
    let mut ring = rig.tx();
    let header = NetHeader { needs_csum: true, csum_start: 34, csum_offset: 16, ..NetHeader::default() };
    let frame: Vec<u8> = (0..100).collect();
    let mut packet = header.encode(0).to_vec();
    packet.extend(&frame);

    let layouts: [&[usize]; 7] =
        [&[112], &[12, 100], &[11, 101], &[5, 5, 2, 100], &[1; 56], &[0, 12, 0, 0, 100, 0], &[13, 98, 1]];
    // The last place crosses the border of the regions, 7 bytes into the packet.
    for at in [rig.buffer(0), GPA + LEN as u64 / 2 - 7] {
        for lens in layouts {
            // [1; 56] is the first half of the packet.
            let total: usize = lens.iter().sum();
            rig.write(at, &packet);
            let mut from = at;
            let buffers: Vec<_> = lens
                .iter()
                .map(|len| {
                    from += *len as u64;
                    (from - *len as u64, *len as u32)
                })
                .collect();
            rig.driver.chain(0, &buffers, 0);
            let expected = Ok((header, frame[..total - 12].to_vec()));
            assert_eq!(pop_one(&mut rig, &mut ring), expected, "{lens:?}");

            // The same as an indirect table, alone and behind a direct descriptor; it need not be aligned.
            let table = rig.buffer(8192 + 4);
            for direct in 0..2.min(lens.len()) {
                let (first, rest) = buffers.split_at(direct);
                for (i, (addr, len)) in rest.iter().enumerate() {
                    let more = if i + 1 < rest.len() { NEXT } else { 0 };
                    let next = i as u16 + 1;
                    let entry = Descriptor::new(*addr, *len, more, next).bytes();
                    rig.write(table + 16 * i as u64, &entry);
                }
                if let [(addr, len)] = first {
                    rig.driver.describe(0, Descriptor::new(*addr, *len, NEXT, 9));
                }
                let last = if direct == 1 { 9 } else { 0 };
                if rest.is_empty() {
                    continue;
                }
                let len = 16 * rest.len() as u32;
                // WRITE of a descriptor that refers to a table is to be ignored (2.7.5.3.2).
                let refer = Descriptor::new(table, len, INDIRECT | WRITE, 0);
                rig.driver.describe(last, refer);
                let found = pop_one(&mut rig, &mut ring);
                assert_eq!(found, expected, "indirect {lens:?}");
            }
        }
    }
}

#[test]
fn a_header_of_ten_bytes_is_followed_by_the_frame() {
    let mut rig = Rig::new(4, 0);
    rig.config.header_len = NetHeader::LEGACY_LEN;
    let mut ring = rig.tx();
    let at = rig.buffer(0);
    rig.write(at, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4]);
    rig.driver.describe(0, Descriptor::new(at, 24, 0, 0));
    let (_, frame) = pop_one(&mut rig, &mut ring).unwrap();
    assert_eq!((frame.len(), &frame[..4]), (14, &[1, 2, 3, 4][..]));
}

#[test]
fn malformed_chains_are_consumed_and_named() {
    use ChainFault::*;
    let mut rig = Rig::new(16, 0);
    let mut ring = rig.tx();
    let good = rig.buffer(0);
    let end = GPA + LEN as u64;
    let table = |entries: &[Descriptor]| entries.iter().flat_map(|d| d.bytes()).collect::<Vec<_>>();
    rig.write(rig.buffer(4096), &table(&[Descriptor::new(good, 64, NEXT, 1), Descriptor::new(good, 64, INDIRECT, 0)]));
    rig.write(rig.buffer(4128), &table(&[Descriptor::new(good, 64, NEXT, 2), Descriptor::new(good, 64, 0, 0)]));
    rig.write(rig.buffer(4160), &table(&[Descriptor::new(good, 14, NEXT, 1), Descriptor::new(good, 14, NEXT, 0)]));
    let base = rig.buffer(0);
    let t = move |at: u64| base + at;
    let cases: Vec<(ChainFault, &str, Vec<Descriptor>)> = vec![
        (Index, "next", vec![Descriptor::new(good, 64, NEXT, 16)]),
        (Loop, "itself", vec![Descriptor::new(good, 14, NEXT, 0)]),
        (Loop, "cycle of empty ones", vec![Descriptor::new(0, 0, NEXT, 1), Descriptor::new(0, 0, NEXT, 0)]),
        (Address, "below", vec![Descriptor::new(GPA - 1, 64, 0, 0)]),
        (Address, "null", vec![Descriptor::new(0, 64, 0, 0)]),
        (Address, "over the end", vec![Descriptor::new(end - 63, 64, 0, 0)]),
        (Address, "wraps", vec![Descriptor::new(u64::MAX, 64, 0, 0)]),
        (Address, "second", vec![Descriptor::new(good, 64, NEXT, 1), Descriptor::new(end, 1, 0, 0)]),
        (Direction, "writable", vec![Descriptor::new(good, 64, WRITE, 0)]),
        (Direction, "last", vec![Descriptor::new(good, 64, NEXT, 1), Descriptor::new(good, 64, WRITE, 0)]),
        (Indirect, "and next", vec![Descriptor::new(t(4096), 32, INDIRECT | NEXT, 1)]),
        (Indirect, "length 0", vec![Descriptor::new(t(4096), 0, INDIRECT, 0)]),
        (Indirect, "length 24", vec![Descriptor::new(t(4096), 24, INDIRECT, 0)]),
        (Indirect, "nested", vec![Descriptor::new(t(4096), 32, INDIRECT, 0)]),
        (Index, "in the table", vec![Descriptor::new(t(4128), 32, INDIRECT, 0)]),
        (Loop, "in the table", vec![Descriptor::new(t(4160), 32, INDIRECT, 0)]),
        (Address, "table over the end", vec![Descriptor::new(end - 16, 32, INDIRECT, 0)]),
        (Address, "table over two regions", vec![Descriptor::new(GPA + LEN as u64 / 2 - 16, 32, INDIRECT, 0)]),
        (Short, "nothing", vec![Descriptor::new(0, 0, 0, 0)]),
        (Short, "13 bytes", vec![Descriptor::new(good, 12 + 13, 0, 0)]),
        (Short, "half a header", vec![Descriptor::new(good, 6, 0, 0)]),
        (Long, "1519 bytes", vec![Descriptor::new(good, 12 + 1519, 0, 0)]),
        (Long, "4 GiB", vec![Descriptor::new(GPA, u32::MAX, 0, 0)]),
    ];
    for (fault, what, descriptors) in &cases {
        for (i, descriptor) in descriptors.iter().enumerate() {
            rig.driver.describe(i as u16, *descriptor);
        }
        let found = pop_one(&mut rig, &mut ring).map(|_| ());
        assert_eq!(found, Err(*fault), "{what}");
    }

    // In one burst with good ones, in order.
    rig.driver.describe(1, Descriptor::new(good, 64, 0, 0));
    rig.driver.describe(2, Descriptor::new(good, 64, WRITE, 0));
    rig.post([1, 2, 99, 1]);
    assert_eq!(ring.pop(BURST), Ok(4));
    let faults: Vec<_> = (0..4).map(|i| ring.frame(i).err()).collect();
    assert_eq!(faults, [None, Some(Direction), Some(Index), None]);
    ring.complete(4);
    ring.publish();
    let heads: Vec<_> = std::iter::from_fn(|| rig.driver.take_used()).collect();
    assert_eq!(heads, [(1, 0), (2, 0), (99, 0), (1, 0)]);

    // Without INDIRECT_DESC no table is looked at.
    rig.config.indirect = false;
    let mut ring = rig.tx();
    rig.driver.describe(0, Descriptor::new(t(4128), 32, INDIRECT, 0));
    assert_eq!(pop_one(&mut rig, &mut ring).unwrap_err(), Indirect);
}

#[test]
fn the_work_of_a_burst_is_bounded() {
    let mut rig = Rig::new(1024, 0);
    rig.config.max_frame = 65535;
    let mut ring = rig.tx();
    let at = rig.buffer(0);
    // Heads share their tails: 1024 descriptors from 0, 624 from 400, 34 from 990.
    let buffers: Vec<_> = (0..1024).map(|i| (at + i, 1)).collect();
    rig.driver.chain(0, &buffers, 0);
    rig.post([400, 400, 400, 0, 990]);
    let mut bursts = Vec::new();
    while bursts.iter().sum::<usize>() < 5 {
        let n = ring.pop(BURST).unwrap();
        assert!((0..n).all(|i| ring.frame(i).is_ok()));
        bursts.push(n);
        ring.complete(n);
    }
    assert_eq!(bursts, [1, 1, 1, 1, 1]);
    ring.publish();

    // More descriptors than any burst looks at: an indirect table of 1025.
    let table = rig.buffer(65536);
    for i in 0..1025 {
        let more = if i < 1024 { NEXT } else { 0 };
        let entry = Descriptor::new(at, 1, more, i as u16 + 1);
        rig.write(table + 16 * i, &entry.bytes());
    }
    rig.driver.describe(7, Descriptor::new(table, 16 * 1025, INDIRECT, 0));
    rig.post([7, 990]);
    assert_eq!(ring.pop(BURST), Ok(1));
    assert_eq!(ring.frame(0).unwrap_err(), ChainFault::Long);
    assert_eq!(ring.pop(BURST), Ok(1));
    assert!(ring.frame(0).is_ok());
    assert_eq!(ring.in_flight(), 2);
}

#[test]
fn a_ring_that_lies_is_stopped() {
    let mut rig = Rig::new(16, 65530);
    let mut ring = rig.tx();
    let frame = Descriptor::new(rig.buffer(0), 64, 0, 0);
    rig.driver.describe(0, frame);
    rig.post([0; 16]);
    assert_eq!(ring.pop(4), Ok(4));
    // One more than it can have.
    rig.post([0]);
    assert_eq!(ring.pop(12), Ok(12), "those seen earlier are still good");
    assert_eq!(ring.pop(1), Err(RingFault::AvailIndex));
    assert!(ring.enable_kicks(), "not a ring to sleep on");
    // Repaired or not: it stays stopped; what was popped can be retired.
    rig.driver.put_u16(rig.driver.avail_at() + 2, rig.driver.avail - 1);
    assert_eq!(ring.pop(1), Err(RingFault::AvailIndex));
    ring.complete(16);
    assert!(ring.publish());
    assert_eq!(ring.position(), 65530_u16.wrapping_add(16));

    // Backwards.
    let mut ring = rig.tx();
    rig.driver.put_u16(rig.driver.avail_at() + 2, ring.position() - 1);
    assert_eq!(ring.pop(1), Err(RingFault::AvailIndex));

    // Nothing but malformed chains; a good one in time saves it.
    for good in [true, false] {
        let mut rig = Rig::new(16, 0);
        let mut ring = rig.tx();
        rig.driver.describe(0, frame);
        let mut popped = 0;
        let result = loop {
            rig.post([if good && popped == 1000 { 0 } else { 99 }]);
            match ring.pop(1) {
                Ok(n) => popped += n,
                fault => break fault,
            }
            ring.complete(1);
            ring.publish();
            if popped == 2000 {
                break Ok(0);
            }
        };
        let expected = if good { (2000, Ok(0)) } else { (1024, Err(RingFault::Malformed)) };
        assert_eq!((popped, result), expected);
    }
}

#[test]
fn memory_that_went_away_stops_the_ring() {
    install_sigbus_handler();
    let mut rig = Rig::new(16, 0);
    let mut ring = rig.tx();
    rig.driver.describe(0, Descriptor::new(rig.buffer(LEN / 2), 64, 0, 0));
    rig.post([0, 0]);
    rustix::fs::ftruncate(&rig.driver.file, LEN as u64 / 2).unwrap();
    assert_eq!(ring.pop(2), Ok(2));
    assert_eq!(bytes(&mut ring.frame(0).unwrap()), [0; 52]);
    assert_eq!(ring.pop(1), Err(RingFault::MemoryGone));
}

#[test]
fn rewound_chains_come_again() {
    let mut rig = Rig::new(8, 65535);
    let mut ring = rig.tx();
    for i in 0..4 {
        rig.driver.describe(i, Descriptor::new(rig.buffer(0), 32 + u32::from(i), 0, 0));
    }
    rig.post(0..4);
    assert_eq!(ring.pop(3), Ok(3));
    ring.complete(1);
    ring.rewind();
    assert_eq!(ring.in_flight(), 0);
    ring.publish();
    assert_eq!(ring.position(), 0);
    assert_eq!(ring.pop(BURST), Ok(3));
    let lens: Vec<_> = (0..3).map(|i| ring.frame(i).unwrap().len()).collect();
    assert_eq!(lens, [21, 22, 23]);

    // A successor resumes from used.idx, whatever base it is told.
    rig.config.base = 77;
    let mut ring = rig.tx();
    assert_eq!((ring.position(), ring.pop(BURST)), (0, Ok(3)));
}

#[test]
fn in_order_one_used_element_stands_for_a_batch() {
    for size in [1, 4, 64] {
        let mut rig = Rig::new(size, 65530);
        rig.config.in_order = true;
        let mut ring = rig.tx();
        let at = rig.driver.buffers().start;
        let mut sender = Sender::new(rig.driver, at, 128);
        sender.in_order = true;
        let mut sent = 0;
        for batch in [1, 3, 2, 33, 64, 5].into_iter().cycle().take(100) {
            let n = sender.room().min(batch);
            (0..n).for_each(|_| sender.send(&[0; 12], &[7; 60]));
            sender.ring.publish();
            let mut left = n;
            while left > 0 {
                let popped = ring.pop(BURST).unwrap();
                let first = popped / 3;
                ring.complete(first);
                ring.complete(popped - first);
                assert!(ring.publish());
                assert_eq!(sender.reclaim(), popped);
                left -= popped;
            }
            sent += n;
            assert_eq!(usize::from(ring.position()), (65530 + sent) % 65536);
        }
    }
}

#[test]
fn flags_say_who_wants_to_hear() {
    let mut rig = Rig::new(8, 0);
    let mut ring = rig.tx();
    assert_eq!(rig.driver.used_flags(), 1, "NO_NOTIFY from the start");
    assert!(!ring.enable_kicks());
    assert_eq!(rig.driver.used_flags(), 0);
    rig.driver.describe(0, Descriptor::new(rig.buffer(0), 64, 0, 0));
    rig.post([0, 0]);
    assert!(ring.enable_kicks(), "posted before");
    ring.disable_kicks();
    assert_eq!(rig.driver.used_flags(), 1);
    for (flags, wanted) in [(1, false), (0, true)] {
        rig.driver.set_avail_flags(flags);
        assert_eq!(ring.pop(1), Ok(1));
        ring.complete(1);
        assert_eq!(ring.publish(), wanted);
    }
}

#[test]
fn event_indices_say_who_wants_to_hear() {
    // The driver's own decision to kick (2.7.10), as its index moves from `old` to `new`.
    let kicks = |event: u16, old: u16, new: u16| (old..new).any(|index| index == event);
    for start in [0_u16, 4] {
        let mut rig = Rig::new(8, start);
        rig.config.event_idx = true;
        let mut ring = rig.tx();
        assert_eq!(rig.driver.used_flags(), 0, "flags are not used with EVENT_IDX");
        assert!((1..8).all(|n| !kicks(rig.driver.avail_event(), start, start + n)));
        assert!(!ring.enable_kicks());
        assert!((1..8).all(|n| kicks(rig.driver.avail_event(), start, start + n)));
        ring.disable_kicks();
        assert!((1..8).all(|n| !kicks(rig.driver.avail_event(), start, start + n)));

        rig.driver.describe(0, Descriptor::new(rig.buffer(0), 64, 0, 0));
        rig.post([0; 8]);
        assert!(ring.enable_kicks());
        rig.driver.set_used_event(start + 3);
        // used.idx moves to +2, +3, +4 (passes the event), +5.
        for (n, wanted) in [(2, false), (1, false), (1, true), (1, false)] {
            assert_eq!(ring.pop(n), Ok(n));
            ring.complete(n);
            assert_eq!(ring.publish(), wanted);
        }
        assert!(!ring.publish());
        rig.driver.set_used_event(start + 5);
        assert_eq!(ring.pop(BURST), Ok(3));
        ring.complete(3);
        assert!(ring.publish(), "passed within the burst");
    }
}

const HEADER: NetHeader = NetHeader {
    needs_csum: false,
    data_valid: true,
    gso: Gso::None,
    ecn: false,
    hdr_len: 0,
    gso_size: 0,
    csum_start: 0,
    csum_offset: 0,
};

/// A frame whose source does not know guest memory: it goes through the bounce buffer.
struct Foreign<'a>(&'a [u8]);

impl Gather for Foreign<'_> {
    fn remaining(&self) -> usize {
        self.0.remaining()
    }
    fn copy_next(&mut self, into: &mut [u8]) {
        self.0.copy_next(into);
    }
}

#[test]
fn a_mergeable_frame_fills_as_many_buffers_as_it_needs() {
    let mut rig = Rig::new(8, 65533);
    rig.config.mergeable = true;
    let mut ring = rig.rx();
    let frame: Vec<u8> = (0..1500).map(|i| i as u8).collect();
    for (head, at, len) in [(3, 0, 100), (1, 4096, 1400), (2, 8192, 64)] {
        rig.driver.describe(head, Descriptor::new(rig.buffer(at), len, WRITE, 0));
    }
    rig.post([3, 1]);
    assert_eq!(ring.push(&HEADER, &mut &frame[..]), Err(PushError::Empty));
    assert!(!ring.publish(), "nothing was consumed");
    rig.post([2]);
    for round in 0..3 {
        if round > 0 {
            rig.post([3, 1, 2]);
        }
        match round {
            0 => ring.push(&HEADER, &mut &frame[..]).unwrap(),
            _ => ring.push(&HEADER, &mut Foreign(&frame)).unwrap(),
        }
        assert!(ring.publish());
        let used: Vec<_> = std::iter::from_fn(|| rig.driver.take_used()).collect();
        assert_eq!(used, [(3, 100), (1, 1400), (2, 12)]);
        let parts = [(0, 100), (4096, 1400), (8192, 12)];
        let written = parts.map(|(at, len)| rig.read(rig.buffer(at), len)).concat();
        assert_eq!(written[..12], HEADER.encode(3));
        assert_eq!(written[12..], frame);
        for (at, len) in parts {
            rig.write(rig.buffer(at), &vec![0; len]);
        }
    }

    // More than the ring can ever hold.
    rig.post([2; 8]);
    let jumbo = [0; 8 * 64 - 12 + 1];
    assert_eq!(ring.push(&HEADER, &mut &jumbo[1..]), Ok(()));
    rig.post([]);
    assert!(ring.publish());
    rig.post([2; 8]);
    assert_eq!(ring.push(&HEADER, &mut &jumbo[..]), Err(PushError::Oversize));
    assert!(ring.enable_kicks(), "nothing was taken");
}

#[test]
fn without_merging_one_chain_holds_the_frame() {
    let mut rig = Rig::new(8, 0);
    let mut ring = rig.rx();
    let border = GPA + LEN as u64 / 2;
    // The Linux layout: the header apart; and a frame over the regions' border.
    let layouts = [vec![(rig.buffer(0), 12), (rig.buffer(64), 1518)], vec![(border - 20, 1530)]];
    for (i, layout) in layouts.iter().enumerate() {
        rig.driver.chain(0, layout, WRITE);
        rig.post([0]);
        let frame = [i as u8 + 1; 60];
        assert_eq!(ring.push(&HEADER, &mut &frame[..]), Ok(()));
        ring.publish();
        assert_eq!(rig.driver.take_used(), Some((0, 72)));
        let header = rig.read(layout[0].0, 12);
        assert_eq!(header, HEADER.encode(1), "num_buffers is 1 (5.1.6.4.1)");
        let at = layout.get(1).map_or(border - 8, |(at, _)| *at);
        assert_eq!(rig.read(at, 60), frame);
    }

    rig.driver.describe(0, Descriptor::new(rig.buffer(0), 71, WRITE, 0));
    rig.post([0]);
    assert_eq!(ring.push(&HEADER, &mut &[0; 60][..]), Err(PushError::Oversize));
    assert_eq!(ring.push(&HEADER, &mut &[0; 59][..]), Ok(()), "the buffer stayed");
    assert_eq!(ring.push(&HEADER, &mut &[0; 59][..]), Err(PushError::Empty));

    rig.driver.describe(1, Descriptor::new(rig.buffer(0), 71, 0, 0));
    rig.driver.describe(2, Descriptor::new(rig.buffer(0), 11, WRITE, 0));
    rig.driver.describe(3, Descriptor::new(rig.buffer(0), 100, WRITE, 0));
    rig.post([1, 2, 8, 3]);
    let mut push = || ring.push(&HEADER, &mut &[9; 60][..]);
    assert_eq!(push(), Err(PushError::Chain(ChainFault::Direction)));
    assert_eq!(push(), Err(PushError::Chain(ChainFault::Short)));
    assert_eq!(push(), Err(PushError::Chain(ChainFault::Index)));
    assert_eq!(push(), Ok(()));
    ring.publish();
    let used: Vec<_> = std::iter::from_fn(|| rig.driver.take_used()).collect();
    assert_eq!(used, [(0, 71), (1, 0), (2, 0), (8, 0), (3, 72)]);
}

#[test]
fn a_malformed_buffer_within_a_frame_goes_back_with_those_before_it() {
    let mut rig = Rig::new(8, 0);
    rig.config.mergeable = true;
    rig.config.event_idx = true;
    let mut ring = rig.rx();
    rig.driver.describe(0, Descriptor::new(rig.buffer(0), 64, WRITE, 0));
    rig.driver.describe(1, Descriptor::new(rig.buffer(0), 64, 0, 0));
    rig.post([0, 1, 0, 0]);
    let mut push = || ring.push(&HEADER, &mut &[9; 100][..]);
    assert_eq!(push(), Err(PushError::Chain(ChainFault::Direction)));
    assert_eq!(push(), Ok(()));
    ring.publish();
    let used: Vec<_> = std::iter::from_fn(|| rig.driver.take_used()).collect();
    assert_eq!(used, [(0, 0), (1, 0), (0, 64), (0, 48)]);

    // Each buffer must hold a header, the later ones too (5.1.6.3.1).
    let short = Descriptor::new(rig.buffer(0), 11, WRITE, 0);
    rig.driver.describe(2, short);
    rig.post([0, 2]);
    let found = ring.push(&HEADER, &mut &[9; 100][..]);
    assert_eq!(found, Err(PushError::Chain(ChainFault::Short)));
}

#[test]
fn bad_rings_are_refused() {
    let rig = Rig::new(16, 0);
    let refused = |config: RingConfig| TxRing::new(rig.memory(), &config).unwrap_err().to_string();
    let at = |field: fn(&mut RingAddresses, UserAddr), user: u64| {
        let mut config = rig.config;
        field(&mut config.addresses, UserAddr(user));
        refused(config)
    };
    for size in [0, 3, 32769, 65535] {
        assert!(refused(RingConfig { size, ..rig.config }).contains("power of two"), "{size}");
    }
    let (end, border) = (USER + LEN as u64, USER + LEN as u64 / 2);
    assert!(at(|a, u| a.desc = u, USER + 8).contains("aligned to 16"));
    assert!(at(|a, u| a.avail = u, USER + 1).contains("aligned to 2"));
    assert!(at(|a, u| a.used = u, USER + 2).contains("aligned to 4"));
    assert!(at(|a, u| a.desc = u, end - 16 * 15).contains("not inside one region"));
    assert!(at(|a, u| a.desc = u, border - 16).contains("not inside one region"));
    assert!(at(|a, u| a.avail = u, end - 34).contains("not inside one region"));
    assert!(at(|a, u| a.used = u, u64::MAX - 3).contains("not inside one region"));
    assert!(at(|a, u| a.used = u, 0).contains("not inside one region"));
    // Exactly to the end, which the event index then passes.
    let mut config = rig.config;
    config.addresses.avail = UserAddr(end - 36);
    assert!(TxRing::new(rig.memory(), &config).is_ok());
    config.event_idx = true;
    assert!(refused(config).contains("available ring"));
}

/// Buffers that frames come into without us: taken out in order, as long as each is good for any frame.
#[test]
fn reserved_buffers_are_used_in_order_or_put_back() {
    const ROOM: usize = NetHeader::LEN + 100;
    let mut rig = Rig::new(64, 60);
    let mut ring = rig.rx();
    let base = rig.buffer(0);
    let at = |i: u64| base + i * 256;
    let [short, split] = [at(40), at(41)];
    for i in 0..40 {
        rig.driver.describe(i, Descriptor::new(at(i.into()), ROOM as u32, WRITE, 0));
    }
    rig.driver.describe(40, Descriptor::new(short, ROOM as u32 - 1, WRITE, 0));
    rig.driver.chain(41, &[(split, 50), (split + 50, ROOM as u32 - 50)], WRITE);
    rig.driver.describe(43, Descriptor::new(split, ROOM as u32, 0, 0));
    let host = |ring: &RxRing, gpa: u64| {
        let at = ring.memory().translate(Gpa(gpa), 1).unwrap();
        at.as_ptr().addr() + NetHeader::LEN
    };
    let reserve = |ring: &mut RxRing| {
        let mut posted = Vec::new();
        let result = ring.reserve(ROOM, |buffer, _| {
            posted.push(buffer.gpa().0);
            true
        });
        assert_eq!(result, Ok(()));
        posted
    };
    rig.post(0..36);
    assert_eq!(reserve(&mut ring), (0..32).map(at).collect::<Vec<_>>());
    assert_eq!((ring.reserved(), reserve(&mut ring)), (32, vec![]));
    // The first gets a frame, the two behind it do not, then one that is nowhere.
    assert!(ring.accept(host(&ring, at(0)), &HEADER, 60));
    assert!(ring.accept(host(&ring, at(3)), &HEADER, 100));
    assert!(!ring.accept(host(&ring, at(1)), &HEADER, 60), "it was passed");
    assert!(ring.publish());
    let used: Vec<_> = std::iter::from_fn(|| rig.driver.take_used()).collect();
    assert_eq!(used, [(0, 72), (1, 0), (2, 0), (3, 112)]);
    assert_eq!(rig.read(at(3), 12), HEADER.encode(1));
    assert_eq!(ring.reserved(), 28);
    // Put back, they come again, and a copied frame takes the first.
    ring.release();
    assert_eq!((ring.reserved(), ring.position()), (0, 64));
    ring.push(&HEADER, &mut &[7; 20][..]).unwrap();
    ring.publish();
    assert_eq!(rig.driver.take_used(), Some((4, 32)));
    assert_eq!(reserve(&mut ring), (5..36).map(at).collect::<Vec<_>>());
    ring.release();
    // Not beyond one that is short, in pieces, or malformed; and not more than is wanted.
    for (head, what) in [(40, "short"), (41, "in pieces"), (43, "not writable"), (99, "no descriptor")] {
        let mut rig = Rig { driver: rig.driver.beside(0, 64, 60), config: rig.config };
        rig.driver.describe(0, Descriptor::new(at(0), ROOM as u32, WRITE, 0));
        rig.driver.describe(40, Descriptor::new(short, ROOM as u32 - 1, WRITE, 0));
        rig.driver.chain(41, &[(split, 50), (split + 50, ROOM as u32 - 50)], WRITE);
        rig.driver.describe(43, Descriptor::new(split, ROOM as u32, 0, 0));
        rig.post([0, 0, head, 0]);
        let mut ring = rig.rx();
        assert_eq!(reserve(&mut ring).len(), 2, "{what}");
        ring.release();
        assert_eq!(ring.reserve(ROOM, |_, _| false), Ok(()));
        assert_eq!(ring.reserved(), 0);
    }
}
