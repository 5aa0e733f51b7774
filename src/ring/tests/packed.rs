//! Packed rings.

use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::ring::testing::packed::{DESC, DISABLE, Driver, ENABLE, Place, Receiver, Sender, bytes as encoded};
use crate::ring::testing::{number, numbered};

/// A driver of a packed ring, and the ring's view of it.
struct Rig {
    driver: Driver,
    config: RingConfig,
}

impl Rig {
    fn new(size: u16, start: Place) -> Self {
        let driver = Driver::new(LEN, size, start);
        let user = |at: usize| UserAddr(USER + at as u64);
        let config = RingConfig {
            packed: true,
            in_order: false,
            size,
            addresses: RingAddresses {
                desc: user(driver.ring_at()),
                avail: user(driver.driver_at()),
                used: user(driver.device_at()),
            },
            base: start.encode(),
            indirect: true,
            event_idx: false,
            mergeable: false,
            header_len: NetHeader::LEN,
            max_frame: 1518,
        };
        Self { driver, config }
    }

    fn in_order(mut self) -> Self {
        self.config.in_order = true;
        self.driver.in_order = true;
        self
    }

    fn tx(&self) -> TxRing {
        TxRing::new(mapped(&self.driver), &self.config).unwrap()
    }

    fn rx(&self) -> RxRing {
        RxRing::new(mapped(&self.driver), &self.config).unwrap()
    }

    fn buffer(&self, at: usize) -> u64 {
        self.driver.gpa(self.driver.buffers().start + at)
    }

    fn write(&self, gpa: u64, bytes: &[u8]) {
        self.driver.put((gpa - GPA) as usize, bytes);
    }

    fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        self.driver.get((gpa - GPA) as usize, len)
    }

    /// A chain that is visible at once.
    fn post(&mut self, id: u16, chain: &[Descriptor]) {
        self.driver.offer(id, chain);
        self.driver.publish();
    }
}

/// A readable (or with WRITE writable) descriptor.
fn piece(addr: u64, len: u32, flags: u16) -> Descriptor {
    Descriptor::new(addr, len, flags, 0)
}

/// Pops the one chain that was posted, and completes it.
fn pop_one(rig: &mut Rig, ring: &mut TxRing, id: u16) -> Result<(NetHeader, Vec<u8>), ChainFault> {
    assert_eq!(ring.pop(BURST), Ok(1));
    let found = ring.frame(0).map(|mut f| (f.header(), bytes(&mut f)));
    ring.complete(1);
    ring.publish();
    assert_eq!(rig.driver.take_used(), Some((id, 0, 1)));
    found
}

const ROUNDS: [bool; 2] = [true, false];

#[test]
fn chains_come_out_in_order_at_every_size_and_wrap() {
    for (size, wrap) in [1, 2, 3, 7, 16, 33, 255, 256, 1000, 32768].into_iter().flat_map(|s| ROUNDS.map(|w| (s, w))) {
        for in_order in [false, true] {
            let start = Place { index: size - 1, wrap };
            let mut rig = Rig::new(size, start);
            if in_order {
                rig = rig.in_order();
            }
            let mut ring = rig.tx();
            let at = rig.buffer(0);
            let batch = size.min(40);
            let mut number = 0_u16;
            for _ in 0..if size == 32768 { 2000 } else { 20 } {
                for i in 0..batch {
                    let gpa = at + u64::from(i) * 64;
                    rig.write(gpa + 12, &[number.to_le_bytes(), [0; 2]].concat());
                    // Any id will do; it comes back.
                    rig.driver.offer(!number, &[piece(gpa, 64, 0)]);
                    number = number.wrapping_add(1);
                }
                assert_eq!(ring.pop(BURST), Ok(0), "not yet visible");
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
                    assert_eq!(rig.driver.take_used(), None, "not yet visible");
                    assert!(ring.publish(), "the driver wants to hear of everything");
                    let first = number.wrapping_sub(left);
                    left -= n as u16;
                    if in_order {
                        let last = number.wrapping_sub(left + 1);
                        assert_eq!(rig.driver.take_used(), Some((!last, 0, n)));
                    } else {
                        for i in 0..n as u16 {
                            assert_eq!(rig.driver.take_used(), Some((!first.wrapping_add(i), 0, 1)));
                        }
                    }
                }
                assert_eq!(rig.driver.take_used(), None);
                assert_eq!(ring.position(), rig.driver.used.encode());
                assert_eq!(rig.driver.used, rig.driver.avail);
                assert!(!ring.publish(), "nothing was completed");
            }
        }
    }
}

#[test]
fn any_layout_of_header_and_frame_is_understood() {
    let mut rig = Rig::new(61, Place::FIRST);
    let mut ring = rig.tx();
    let header = NetHeader { needs_csum: true, csum_start: 34, csum_offset: 16, ..NetHeader::default() };
    let frame: Vec<u8> = (0..100).collect();
    let mut packet = header.encode(0).to_vec();
    packet.extend(&frame);
    let layouts: [&[usize]; 7] =
        [&[112], &[12, 100], &[11, 101], &[5, 5, 2, 100], &[1; 56], &[0, 12, 0, 0, 100, 0], &[13, 98, 1]];
    let mut id = 0;
    // The last place crosses the border of the regions, 7 bytes into the packet.
    for at in [rig.buffer(0), GPA + LEN as u64 / 2 - 7] {
        for lens in layouts {
            // [1; 56] is the first half of the packet.
            let total: usize = lens.iter().sum();
            rig.write(at, &packet);
            let mut from = at;
            let pieces: Vec<_> = lens
                .iter()
                .map(|len| {
                    from += *len as u64;
                    (from - *len as u64, *len as u32)
                })
                .collect();
            let expected = Ok((header, frame[..total - 12].to_vec()));
            id += 1;
            rig.driver.chain(id, &pieces, 0);
            rig.driver.publish();
            assert_eq!(pop_one(&mut rig, &mut ring, id), expected, "{lens:?}");

            // As an indirect table, not aligned; of its entries' flags only WRITE counts (2.8.7), and not even that
            // where nothing is written: DPDK sets it. WRITE of the descriptor that refers to the table does not.
            let table = rig.buffer(8192 + 4);
            for (i, (addr, len)) in pieces.iter().enumerate() {
                let flags = if i % 2 == 0 { !0 } else { 0 };
                rig.write(table + 16 * i as u64, &encoded(&Descriptor::new(*addr, *len, flags, 99)));
            }
            rig.post(id, &[piece(table, 16 * pieces.len() as u32, INDIRECT | WRITE)]);
            assert_eq!(pop_one(&mut rig, &mut ring, id), expected, "indirect {lens:?}");
        }
    }
}

#[test]
fn a_header_of_ten_bytes_is_followed_by_the_frame() {
    let mut rig = Rig::new(4, Place::FIRST);
    rig.config.header_len = NetHeader::LEGACY_LEN;
    let mut ring = rig.tx();
    let at = rig.buffer(0);
    rig.write(at, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4]);
    rig.post(3, &[piece(at, 24, 0)]);
    let (_, frame) = pop_one(&mut rig, &mut ring, 3).unwrap();
    assert_eq!((frame.len(), &frame[..4]), (14, &[1, 2, 3, 4][..]));
}

#[test]
fn malformed_chains_are_consumed_and_named() {
    use ChainFault::*;
    let mut rig = Rig::new(13, Place { index: 5, wrap: false });
    let mut ring = rig.tx();
    let good = rig.buffer(0);
    let end = GPA + LEN as u64;
    let table = rig.buffer(4096);
    let entries = [piece(good, 64, 0), piece(good, 64, WRITE), piece(end, 64, 0)];
    rig.write(table, &entries.map(|entry| encoded(&entry)).concat());
    let then = |first: Descriptor| vec![Descriptor { flags: first.flags | NEXT, ..first }, piece(good, 64, 0)];
    let cases: Vec<(ChainFault, &str, Vec<Descriptor>)> = vec![
        (Address, "below", vec![piece(GPA - 1, 64, 0)]),
        (Address, "null", vec![piece(0, 64, 0)]),
        (Address, "over the end", vec![piece(end - 63, 64, 0)]),
        (Address, "wraps", vec![piece(u64::MAX, 64, 0)]),
        (Address, "first", then(piece(end, 1, 0))),
        (Address, "second", vec![piece(good, 64, NEXT), piece(end, 1, 0)]),
        (Direction, "writable", vec![piece(good, 64, WRITE)]),
        (Direction, "first", then(piece(good, 64, WRITE))),
        (Direction, "last", vec![piece(good, 64, NEXT), piece(good, 64, WRITE)]),
        (Indirect, "and next", then(piece(table, 16, INDIRECT))),
        (Indirect, "length 0", vec![piece(table, 0, INDIRECT)]),
        (Indirect, "length 24", vec![piece(table, 24, INDIRECT)]),
        (Address, "in the table", vec![piece(table + 32, 16, INDIRECT)]),
        (Address, "table over the end", vec![piece(end - 16, 32, INDIRECT)]),
        (Address, "table over two regions", vec![piece(GPA + LEN as u64 / 2 - 16, 32, INDIRECT)]),
        (Address, "table of 4 GiB", vec![piece(table, 0xffff_fff0, INDIRECT)]),
        (Short, "nothing", vec![piece(0, 0, 0)]),
        (Short, "a chain of nothing", vec![piece(0, 0, NEXT); 12].into_iter().chain([piece(0, 0, 0)]).collect()),
        (Short, "13 bytes", vec![piece(good, 12 + 13, 0)]),
        (Short, "half a header", vec![piece(good, 6, 0)]),
        (Long, "1519 bytes", vec![piece(good, 12 + 1519, 0)]),
        (Long, "4 GiB", vec![piece(GPA, u32::MAX, 0)]),
    ];
    for (id, (fault, what, chain)) in (0..).zip(&cases) {
        rig.post(id, chain);
        let found = pop_one(&mut rig, &mut ring, id).map(|_| ());
        assert_eq!(found, Err(*fault), "{what}");
    }

    // In one burst with good ones, in order; where the next begins is known though this one is bad.
    for (id, chain) in [
        (1, vec![piece(good, 64, 0)]),
        (2, vec![piece(good, 1, NEXT | WRITE), piece(good, 1, NEXT), piece(good, 1, 0)]),
        (2, vec![piece(good, 10, NEXT), piece(good, 54, 0)]),
        (1, vec![piece(good, 64, 0)]),
    ] {
        rig.driver.offer(id, &chain);
    }
    rig.driver.publish();
    assert_eq!(ring.pop(BURST), Ok(4));
    let faults: Vec<_> = (0..4).map(|i| ring.frame(i).err()).collect();
    assert_eq!(faults, [None, Some(Direction), None, None]);
    ring.complete(4);
    ring.publish();
    let ids: Vec<_> = std::iter::from_fn(|| rig.driver.take_used()).map(|(id, ..)| id).collect();
    assert_eq!(ids, [1, 2, 2, 1]);

    // Without INDIRECT_DESC no table is looked at.
    rig.config.base = ring.position();
    rig.config.indirect = false;
    let mut ring = rig.tx();
    rig.post(0, &[piece(table, 16, INDIRECT)]);
    assert_eq!(pop_one(&mut rig, &mut ring, 0).unwrap_err(), Indirect);
}

#[test]
fn the_work_of_a_burst_is_bounded() {
    let mut rig = Rig::new(32768, Place { index: 32767, wrap: true });
    rig.config.max_frame = 65535;
    let mut ring = rig.tx();
    let at = rig.buffer(0);
    let chain = |n: usize, flags: u16| {
        let mut chain = vec![piece(at, 1, NEXT); n];
        chain[0].flags |= flags;
        chain[n - 1].flags = 0;
        chain
    };
    // Good ones; and ones that are bad from the first descriptor on, whose ends have to be found nevertheless.
    for (name, flags, expected) in [("good", 0, vec![2; 4]), ("bad", WRITE, vec![3, 3, 2])] {
        (0..8).for_each(|id| rig.driver.offer(id, &chain(400, flags)));
        rig.driver.publish();
        let mut bursts = Vec::new();
        while bursts.iter().sum::<usize>() < 8 {
            let n = ring.pop(BURST).unwrap();
            bursts.push(n);
            ring.complete(n);
        }
        ring.publish();
        assert_eq!(bursts, expected, "{name}: 1024 descriptors a burst");
        while rig.driver.take_used().is_some() {}
    }

    // More descriptors than any burst looks at: an indirect table of 1025; the next chain is not lost.
    let table = rig.buffer(65536);
    for i in 0..1025 {
        rig.write(table + 16 * i, &encoded(&piece(at, 1, 0)));
    }
    rig.driver.offer(7, &[piece(table, 16 * 1025, INDIRECT)]);
    rig.driver.offer(8, &[piece(at, 64, 0)]);
    rig.driver.publish();
    assert_eq!(ring.pop(BURST), Ok(2), "one of a single buffer costs next to nothing");
    assert_eq!(ring.frame(0).unwrap_err(), ChainFault::Long);
    assert!(ring.frame(1).is_ok());
    assert_eq!(ring.in_flight(), 2);
}

#[test]
fn a_chain_without_end_stops_the_ring() {
    for size in [1, 2, 16, 1000, 32768] {
        let start = Place { index: size / 2, wrap: true };
        let mut rig = Rig::new(size, start);
        let good = piece(rig.buffer(0), 64, 0);
        let ahead = usize::from(size > 1);
        if ahead > 0 {
            rig.driver.offer(0, &[good]);
        }
        let rest = usize::from(size) - ahead;
        rig.driver.offer(1, &vec![Descriptor { flags: NEXT, ..good }; rest]);
        rig.driver.publish();
        let mut ring = rig.tx();
        if ahead > 0 {
            assert_eq!(ring.pop(BURST), Ok(1), "the good one in front of it");
        }
        assert_eq!(ring.pop(BURST), Err(RingFault::Endless), "size {size}");
        assert!(ring.enable_kicks(), "not a ring to sleep on");
        // It stays stopped; what was popped can be retired.
        ring.complete(ahead);
        assert_eq!(ring.publish(), ahead > 0);
        assert_eq!(ring.position(), start.plus(ahead as u16, size).encode());
        assert_eq!(ring.pop(BURST), Err(RingFault::Endless));

        let mut rig = Rig::new(size, start);
        let room = piece(rig.buffer(0), 64, WRITE | NEXT);
        rig.post(1, &vec![room; size.into()]);
        let mut ring = rig.rx();
        let endless = Err(PushError::Ring(RingFault::Endless));
        assert_eq!([ring.push(&HEADER, &mut &[0; 40][..]), ring.push(&HEADER, &mut &[0; 40][..])], [endless; 2]);
        assert!(!ring.publish());
    }

    // Up to what is the device's already: a chain may not go on into it.
    let mut rig = Rig::new(8, Place::FIRST);
    let good = piece(rig.buffer(0), 64, 0);
    (0..6).for_each(|id| rig.driver.offer(id, &[good]));
    rig.driver.offer(6, &[Descriptor { flags: NEXT, ..good }, Descriptor { flags: NEXT, ..good }]);
    rig.driver.publish();
    let mut ring = rig.tx();
    assert_eq!(ring.pop(BURST), Ok(6));
    assert_eq!(ring.pop(BURST), Err(RingFault::Endless));
}

#[test]
fn what_the_device_has_is_not_taken_twice() {
    for size in [1, 2, 5, 32] {
        let mut rig = Rig::new(size, Place::FIRST);
        let mut ring = rig.tx();
        let good = piece(rig.buffer(0), 64, 0);
        (0..size).for_each(|id| rig.driver.offer(id, &[good]));
        rig.driver.publish();
        assert_eq!(ring.pop(BURST), Ok(size.into()));
        // The driver says that all is available in the next round already.
        let next = Place { index: 0, wrap: false };
        (0..size).for_each(|slot| rig.driver.describe(slot, Descriptor { flags: next.available(), ..good }));
        assert_eq!(ring.pop(BURST), Ok(0));
        assert!(!ring.enable_kicks());
        ring.complete(size.into());
        assert_eq!(ring.pop(BURST), Ok(0), "it is not the guest's before it can see that");
        assert!(ring.publish());
        // It wrote over what the guest wrote where it should not have.
        assert_eq!(ring.pop(BURST), Ok(0));
        assert_eq!(rig.driver.take_used(), Some((0, 0, 1)));
    }
}

#[test]
fn nothing_but_malformed_chains_stop_the_ring() {
    for good in [true, false] {
        let mut rig = Rig::new(15, Place::FIRST);
        let mut ring = rig.tx();
        let mut popped = 0;
        let result = loop {
            let addr = if good && popped == 1000 { rig.buffer(0) } else { 0 };
            rig.post(0, &[piece(addr, 64, 0)]);
            match ring.pop(1) {
                Ok(n) => popped += n,
                fault => break fault,
            }
            ring.complete(1);
            ring.publish();
            rig.driver.take_used();
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
    let mut rig = Rig::new(16, Place::FIRST);
    let mut ring = rig.tx();
    let lost = piece(rig.buffer(LEN / 2), 64, 0);
    rig.driver.offer(0, &[lost]);
    rig.driver.offer(1, &[lost]);
    rig.driver.publish();
    rustix::fs::ftruncate(&rig.driver.file, LEN as u64 / 2).unwrap();
    assert_eq!(ring.pop(2), Ok(2));
    assert_eq!(bytes(&mut ring.frame(0).unwrap()), [0; 52]);
    assert_eq!(ring.pop(1), Err(RingFault::MemoryGone));
}

#[test]
fn rewound_chains_come_again() {
    let mut rig = Rig::new(9, Place { index: 7, wrap: false });
    let mut ring = rig.tx();
    let at = rig.buffer(0);
    // Over the end of the ring: slots 7 and 8, 0 and 1, 2 and 3.
    for i in 0..3 {
        rig.driver.offer(i, &[piece(at, 12, NEXT), piece(at, 20 + u32::from(i), 0)]);
    }
    rig.driver.publish();
    assert_eq!(ring.pop(2), Ok(2));
    ring.complete(1);
    ring.rewind();
    assert_eq!(ring.in_flight(), 0);
    assert_eq!(ring.position(), Place { index: 7, wrap: false }.encode(), "not yet published");
    ring.publish();
    assert_eq!(ring.position(), Place { index: 0, wrap: true }.encode());
    assert_eq!(ring.pop(BURST), Ok(2));
    let lens: Vec<_> = (0..2).map(|i| ring.frame(i).unwrap().len()).collect();
    assert_eq!(lens, [21, 22]);
}

#[test]
fn a_successor_goes_on_exactly_where_the_ring_stopped() {
    for (size, in_order) in [5, 7, 16, 64].into_iter().flat_map(|size| [false, true].map(|o| (size, o))) {
        let mut rig = Rig::new(size, Place::FIRST);
        if in_order {
            rig = rig.in_order();
        }
        let at = rig.buffer(0);
        let table = rig.buffer(65536);
        rig.write(table, &[encoded(&piece(at, 12, 0)), encoded(&piece(at, 60, 0))].concat());
        let (mut offered, mut taken, mut reclaimed) = (0_u16, 0_u16, 0);
        let mut ring = rig.tx();
        for stop in 0..200 {
            // Chains of one to three descriptors, and tables; each has its number for length.
            loop {
                let n = usize::from(offered % 4);
                let len = 60 + u32::from(offered);
                let chain = match n {
                    0 => {
                        rig.write(table + 32 * u64::from(offered % 64), &encoded(&piece(at, 12, 0)));
                        rig.write(table + 32 * u64::from(offered % 64) + 16, &encoded(&piece(at, len, 0)));
                        vec![piece(table + 32 * u64::from(offered % 64), 32, INDIRECT)]
                    }
                    1 => vec![piece(at, 12 + len, 0)],
                    2 => vec![piece(at, 12, NEXT), piece(at, len, 0)],
                    _ => vec![piece(at, 12, NEXT), piece(at, 1, NEXT), piece(at, len - 1, 0)],
                };
                if chain.len() > rig.driver.room().into() {
                    break;
                }
                rig.driver.offer(offered, &chain);
                offered += 1;
            }
            rig.driver.publish();
            let n = ring.pop(1 + stop % 7).unwrap();
            for i in 0..n {
                let frame = ring.frame(i).unwrap();
                assert_eq!(frame.len(), 60 + usize::from(taken) + i, "size {size}, stop {stop}");
            }
            let done = n.min(stop % 3);
            ring.complete(done);
            taken += done as u16;
            // The answer to GET_VRING_BASE, and what comes back as SET_VRING_BASE.
            ring.rewind();
            ring.publish();
            rig.config.base = ring.position();
            if stop % 2 == 0 {
                ring = rig.tx();
            }
            while let Some((_, _, batch)) = rig.driver.take_used() {
                reclaimed += batch;
            }
            assert_eq!((reclaimed, rig.driver.used.encode()), (taken.into(), ring.position()));
        }
        assert!(taken > 100, "size {size}: {taken}");
    }
}

/// A ring in use, of chains of one and two descriptors: it can be built again where it is, and nowhere else
/// where it shows.
#[test]
fn a_base_that_contradicts_the_descriptors_is_refused() {
    let size = 16;
    for in_order in [false, true] {
        let mut rig = Rig::new(size, Place::FIRST);
        if in_order {
            rig = rig.in_order();
        }
        let at = rig.buffer(0);
        let mut ring = rig.tx();
        for n in 0..100 {
            // Mostly empty, now and then full, in every round.
            while rig.driver.room() > if n % 5 == 0 { 1 } else { size - 4 } {
                rig.driver.offer(rig.driver.avail.index, &[piece(at, 12, NEXT), piece(at, 60, 0)]);
                rig.driver.offer(rig.driver.avail.index, &[piece(at, 72, 0)]);
                if rig.driver.room() < 3 {
                    break;
                }
            }
            rig.driver.publish();
            let popped = ring.pop(3).unwrap();
            ring.complete(popped);
            ring.publish();
            while rig.driver.take_used().is_some() {}
            rig.config.base = ring.position();
            ring = rig.tx();
        }
        // All is used: a base that is a few chains off is found out.
        while let n @ 1.. = ring.pop(BURST).unwrap() {
            ring.complete(n);
            ring.publish();
        }
        let here = Place::decode(ring.position());
        // (In order, one used descriptor stands for many chains: what it skips tells nothing.)
        for behind in (3..size - 3).filter(|_| !in_order) {
            let base = here.plus(2 * size - behind, size).encode();
            let refused = TxRing::new(mapped(&rig.driver), &RingConfig { base, ..rig.config }).unwrap_err();
            assert!(refused.to_string().contains("not where its descriptors are"), "{behind}: {refused}");
        }
        rig.config.base = here.encode();
        assert_eq!(rig.tx().position(), here.encode());
    }

    // A new ring is all zeros, and its first round is the one with the wrap counter set.
    let rig = Rig::new(16, Place::FIRST);
    for base in [0, 5, 0x8005] {
        assert!(TxRing::new(mapped(&rig.driver), &RingConfig { base, ..rig.config }).is_err(), "{base:#x}");
    }
}

#[test]
fn flags_say_who_wants_to_hear() {
    let mut rig = Rig::new(3, Place { index: 2, wrap: true });
    let mut ring = rig.tx();
    assert_eq!(rig.driver.device_event().1, DISABLE, "from the start");
    assert!(!ring.enable_kicks());
    assert_eq!(rig.driver.device_event().1, ENABLE, "DESC only with EVENT_IDX");
    let good = piece(rig.buffer(0), 64, 0);
    rig.driver.offer(0, &[good]);
    rig.driver.offer(1, &[good]);
    rig.driver.publish();
    assert!(ring.enable_kicks(), "posted before");
    ring.disable_kicks();
    assert_eq!(rig.driver.device_event().1, DISABLE);
    // 3 is reserved, DESC not negotiated: rather once too often.
    for (flags, wanted) in [(DISABLE, false), (ENABLE, true), (DESC, true), (3, true)] {
        rig.driver.set_driver_event(Place::FIRST, flags);
        assert_eq!(ring.pop(1), Ok(1));
        ring.complete(1);
        assert_eq!(ring.publish(), wanted, "{flags}");
        rig.driver.take_used();
        rig.post(0, &[good]);
    }
}

#[test]
fn the_device_asks_for_the_next_slot() {
    for start in [Place { index: 4, wrap: true }, Place { index: 0, wrap: false }] {
        let mut rig = Rig::new(5, start);
        rig.config.event_idx = true;
        let mut ring = rig.tx();
        let good = piece(rig.buffer(0), 64, 0);
        let mut old = start;
        assert_eq!(rig.driver.device_event().1, DISABLE);
        for round in 0..20 {
            assert!(!ring.enable_kicks());
            assert_eq!(rig.driver.device_event(), (rig.driver.avail, DESC));
            assert!(!rig.driver.kick_wanted(old), "for nothing new");
            old = rig.driver.avail;
            (0..1 + round % 5).for_each(|id| rig.driver.offer(id, &[good]));
            rig.driver.publish();
            assert!(rig.driver.kick_wanted(old), "round {round}");
            assert!(ring.enable_kicks());
            let n = ring.pop(BURST).unwrap();
            // In flight or not: what matters is what comes next.
            assert!(!ring.enable_kicks());
            assert_eq!(rig.driver.device_event(), (rig.driver.avail, DESC));
            ring.complete(n);
            ring.publish();
            while rig.driver.take_used().is_some() {}
            old = rig.driver.avail;
            ring.disable_kicks();
            assert!(!rig.driver.kick_wanted(old));
        }
    }
}

proptest! {
    /// 2.8.10 in words: a call is wanted if the slot that the driver names, in the round it names, is among those
    /// that became used. Against positions that only grow.
    #[test]
    fn an_event_is_wanted_if_its_slot_is_among_the_used(
        size in 1..80_u16,
        start in 0..160_u64,
        moves in prop::collection::vec((1..33_u16, 0..200_u64), 1..40),
        in_order: bool,
    ) {
        let place = |position: u64| {
            let size = u64::from(size);
            Place { index: (position % size) as u16, wrap: (position / size).is_multiple_of(2) }
        };
        let mut rig = Rig::new(size, place(start));
        if in_order {
            rig = rig.in_order();
        }
        rig.config.event_idx = true;
        let mut ring = rig.tx();
        let good = piece(rig.buffer(0), 64, 0);
        let mut position = start;
        for (n, ahead) in moves {
            let n = n.min(size);
            (0..n).for_each(|id| rig.driver.offer(id, &[good]));
            rig.driver.publish();
            // From the round before to the one after this.
            let event = position + ahead % (2 * u64::from(size));
            rig.driver.set_driver_event(place(event), DESC);
            prop_assert_eq!(ring.pop(n.into()), Ok(n.into()));
            ring.complete(n.into());
            let wanted = (position..position + u64::from(n)).any(|used| place(used) == place(event));
            prop_assert_eq!(ring.publish(), wanted);
            position += u64::from(n);
            prop_assert_eq!(ring.position(), place(position).encode());
            while rig.driver.take_used().is_some() {}
        }
    }
}

#[test]
fn a_mergeable_frame_fills_as_many_buffers_as_it_needs() {
    let mut rig = Rig::new(7, Place { index: 5, wrap: true });
    rig.config.mergeable = true;
    let mut ring = rig.rx();
    let frame: Vec<u8> = (0..1500).map(|i| i as u8).collect();
    // Buffers of one, three and two descriptors: 100, 1400 and 64 bytes.
    let buffer = |rig: &Rig, at: usize, lens: &[u32]| -> Vec<Descriptor> {
        let mut from = rig.buffer(at);
        let mut chain: Vec<_> = lens
            .iter()
            .map(|len| {
                from += u64::from(*len);
                piece(from - u64::from(*len), *len, WRITE | NEXT)
            })
            .collect();
        chain.last_mut().unwrap().flags = WRITE;
        chain
    };
    let chains: [(usize, &[u32]); 3] = [(0, &[100]), (4096, &[5, 7, 1388]), (8192, &[60, 4])];
    for round in 0..9 {
        for (i, (at, lens)) in chains.into_iter().enumerate() {
            let chain = buffer(&rig, at, lens);
            rig.post(40 + i as u16, &chain);
            if i < 2 {
                assert_eq!(ring.push(&HEADER, &mut &frame[..]), Err(PushError::Empty));
                assert!(!ring.publish(), "nothing was consumed");
            }
        }
        match round % 2 {
            0 => ring.push(&HEADER, &mut &frame[..]).unwrap(),
            _ => ring.push(&HEADER, &mut Foreign(&frame)).unwrap(),
        }
        assert_eq!(rig.driver.take_used(), None, "a frame's buffers become visible at once");
        assert!(ring.publish());
        let used: Vec<_> = std::iter::from_fn(|| rig.driver.take_used()).collect();
        assert_eq!(used, [(40, 100, 1), (41, 1400, 1), (42, 12, 1)]);
        let parts = [(0, 100), (4096, 1400), (8192, 12)];
        let written = parts.map(|(at, len)| rig.read(rig.buffer(at), len)).concat();
        assert_eq!(written[..12], HEADER.encode(3));
        assert_eq!(written[12..], frame);
        for (at, len) in parts {
            rig.write(rig.buffer(at), &vec![0; len]);
        }
    }

    // More than the ring can ever hold.
    let small = piece(rig.buffer(0), 64, WRITE);
    let jumbo = [0; 7 * 64 - 12 + 1];
    for (len, expected) in [(jumbo.len() - 1, Ok(())), (jumbo.len(), Err(PushError::Oversize))] {
        (0..7).for_each(|id| rig.post(id, &[small]));
        assert_eq!(ring.push(&HEADER, &mut &jumbo[..len]), expected);
        ring.publish();
        while rig.driver.take_used().is_some() {}
    }
    assert!(ring.enable_kicks(), "nothing was taken");
}

#[test]
fn without_merging_one_chain_holds_the_frame() {
    let mut rig = Rig::new(6, Place::FIRST);
    let mut ring = rig.rx();
    let border = GPA + LEN as u64 / 2;
    let at = rig.buffer(0);
    let table = rig.buffer(65536);
    // The header apart; over several descriptors; a frame over the regions' border; through a table.
    let layouts: [&[(u64, u32)]; 4] = [
        &[(at, 12), (at + 12, 1518)],
        &[(at, 1), (at + 1, 5), (at + 6, 0), (at + 6, 7), (at + 13, 1518)],
        &[(border - 20, 1530)],
        &[(border - 20, 11), (border - 9, 1530)],
    ];
    for (i, layout) in layouts.iter().enumerate() {
        for indirect in [false, true] {
            if indirect {
                for (i, (addr, len)) in layout.iter().enumerate() {
                    rig.write(table + 16 * i as u64, &encoded(&piece(*addr, *len, WRITE)));
                }
                rig.post(9, &[piece(table, 16 * layout.len() as u32, INDIRECT)]);
            } else {
                rig.driver.chain(9, layout, WRITE);
                rig.driver.publish();
            }
            let frame = [2 * i as u8 + u8::from(indirect) + 1; 60];
            assert_eq!(ring.push(&HEADER, &mut &frame[..]), Ok(()));
            ring.publish();
            assert_eq!(rig.driver.take_used(), Some((9, 72, 1)));
            let written = rig.read(layout[0].0, 72);
            assert_eq!(written[..12], HEADER.encode(1), "num_buffers is 1 (5.1.6.4.1)");
            assert_eq!(written[12..], frame);
        }
    }

    rig.post(0, &[piece(at, 71, WRITE)]);
    assert_eq!(ring.push(&HEADER, &mut &[0; 60][..]), Err(PushError::Oversize));
    assert_eq!(ring.push(&HEADER, &mut &[0; 59][..]), Ok(()), "the buffer stayed");
    assert_eq!(ring.push(&HEADER, &mut &[0; 59][..]), Err(PushError::Empty));
    ring.publish();
    assert_eq!(rig.driver.take_used(), Some((0, 71, 1)));

    rig.write(table, &encoded(&piece(at, 71, !WRITE)));
    rig.driver.offer(0, &[piece(table, 16, INDIRECT | WRITE)]);
    rig.driver.offer(1, &[piece(at, 71, NEXT), piece(at, 71, WRITE)]);
    rig.driver.offer(2, &[piece(at, 11, WRITE)]);
    rig.driver.offer(3, &[piece(at, 72, NEXT | WRITE), piece(0, 7, 0)]);
    rig.driver.publish();
    let mut push = || ring.push(&HEADER, &mut &[9; 60][..]);
    assert_eq!(push(), Err(PushError::Chain(ChainFault::Direction)), "in the table");
    assert_eq!(push(), Err(PushError::Chain(ChainFault::Direction)));
    assert_eq!(push(), Err(PushError::Chain(ChainFault::Short)));
    assert_eq!(push(), Ok(()), "descriptors that are not needed are not looked at");
    ring.publish();
    let used: Vec<_> = std::iter::from_fn(|| rig.driver.take_used()).collect();
    assert_eq!(used, [(0, 0, 1), (1, 0, 1), (2, 0, 1), (3, 72, 1)]);
}

#[test]
fn a_malformed_buffer_within_a_frame_goes_back_with_those_before_it() {
    let mut rig = Rig::new(11, Place { index: 8, wrap: false });
    rig.config.mergeable = true;
    let mut ring = rig.rx();
    let at = rig.buffer(0);
    let good = [piece(at, 32, WRITE | NEXT), piece(at + 32, 32, WRITE)];
    rig.driver.offer(0, &good);
    rig.driver.offer(1, &[piece(at, 64, NEXT), piece(at, 64, WRITE)]);
    rig.driver.offer(2, &good);
    rig.driver.offer(3, &good);
    rig.driver.publish();
    let mut push = || ring.push(&HEADER, &mut &[9; 100][..]);
    assert_eq!(push(), Err(PushError::Chain(ChainFault::Direction)));
    assert_eq!(push(), Ok(()));
    ring.publish();
    let used: Vec<_> = std::iter::from_fn(|| rig.driver.take_used()).collect();
    assert_eq!(used, [(0, 0, 1), (1, 0, 1), (2, 64, 1), (3, 48, 1)]);
}

#[test]
fn driver_and_device_on_two_threads() {
    const FRAMES: u64 = 20_000;
    let late = Instant::now() + Duration::from_secs(60);
    for (size, in_order) in [(1, false), (3, true), (33, false), (128, true)] {
        let mut rig = Rig::new(size, Place { index: size - 1, wrap: false });
        if in_order {
            rig = rig.in_order();
        }
        let room = (rig.driver.buffers().start + 512 * usize::from(size)).next_multiple_of(4096);
        let other = rig.driver.beside(room, size, Place::FIRST);
        let mut tx = rig.tx();
        let user = |at: usize| UserAddr(USER + at as u64);
        let addresses = RingAddresses {
            desc: user(other.ring_at()),
            avail: user(other.driver_at()),
            used: user(other.device_at()),
        };
        let config = RingConfig { addresses, base: Place::FIRST.encode(), ..rig.config };
        let mut rx = RxRing::new(mapped(&rig.driver), &config).unwrap();
        let at = rig.driver.buffers().start;
        let mut sender = Sender::new(rig.driver, at, 512);
        let at = other.buffers().start;
        let mut receiver = Receiver::new(other, at, 512);
        let device = std::thread::spawn(move || {
            let mut moved = 0;
            while moved < FRAMES {
                assert!(Instant::now() < late, "{moved} frames moved");
                let n = tx.pop(BURST).unwrap();
                for i in 0..n {
                    loop {
                        match rx.push(&HEADER, &mut tx.frame(i).unwrap()) {
                            Ok(()) => break,
                            Err(PushError::Empty) if Instant::now() < late => rx.publish(),
                            other => panic!("{other:?}"),
                        };
                        std::thread::yield_now();
                    }
                }
                tx.complete(n);
                tx.publish();
                rx.publish();
                moved += n as u64;
                if n == 0 {
                    std::thread::yield_now();
                }
            }
        });
        let (mut sent, mut received) = (0, 0);
        while received < FRAMES {
            assert!(Instant::now() < late, "{received} of {sent} frames received");
            receiver.post(usize::from(size));
            while sent < FRAMES && sender.room() > 0 {
                sender.send(&[0; 12], &numbered(1, sent, 60 + sent as usize % 400));
                sent += 1;
            }
            sender.ring.publish();
            sender.reclaim();
            let before = received;
            while let Some(frame) = receiver.receive() {
                assert_eq!(number(&frame), (1, received), "size {size}");
                received += 1;
            }
            if received == before {
                std::thread::yield_now();
            }
        }
        device.join().unwrap();
    }
}

#[test]
fn bad_rings_are_refused() {
    let rig = Rig::new(15, Place::FIRST);
    let refused = |config: RingConfig| TxRing::new(mapped(&rig.driver), &config).unwrap_err().to_string();
    let at = |field: fn(&mut RingAddresses, UserAddr), user: u64| {
        let mut config = rig.config;
        field(&mut config.addresses, UserAddr(user));
        refused(config)
    };
    for size in [0, 32769, 65535] {
        assert!(refused(RingConfig { size, ..rig.config }).contains("not from 1 to 32768"), "{size}");
    }
    for base in [15, 0x8000 | 15, 0x7fff, 0xffff] {
        assert!(refused(RingConfig { base, ..rig.config }).contains("not below its size 15"), "{base:#x}");
    }
    let (end, border) = (USER + LEN as u64, USER + LEN as u64 / 2);
    assert!(at(|a, u| a.desc = u, USER + 8).contains("aligned to 16"));
    assert!(at(|a, u| a.avail = u, USER + 2).contains("aligned to 4"));
    assert!(at(|a, u| a.used = u, USER + 2).contains("aligned to 4"));
    assert!(at(|a, u| a.desc = u, end - 16 * 14).contains("not inside one region"));
    assert!(at(|a, u| a.desc = u, border - 16).contains("not inside one region"));
    assert!(at(|a, u| a.avail = u, end).contains("not inside one region"));
    assert!(at(|a, u| a.used = u, u64::MAX - 3).contains("not inside one region"));
    assert!(at(|a, u| a.used = u, 0).contains("not inside one region"));
    // Exactly to the end.
    let mut config = rig.config;
    config.addresses.desc = UserAddr(end - 16 * 15);
    config.addresses.avail = UserAddr(border - 4);
    assert!(TxRing::new(mapped(&rig.driver), &config).is_ok());
}

#[test]
fn reserved_buffers_are_used_in_order_or_put_back() {
    const ROOM: usize = NetHeader::LEN + 100;
    let mut rig = Rig::new(7, Place { index: 5, wrap: true });
    let posted: Vec<_> = (0..6).map(|i| rig.buffer(i * 256)).collect();
    for i in 0..6 {
        rig.post(i + 10, &[piece(posted[usize::from(i)], ROOM as u32, WRITE)]);
    }
    let mut ring = rig.rx();
    let reserve = |ring: &mut RxRing| {
        let mut found = Vec::new();
        let result = ring.reserve(ROOM, |buffer, _| {
            found.push(buffer.gpa().0);
            true
        });
        assert_eq!(result, Ok(()));
        found
    };
    let host =
        |ring: &RxRing, i: usize| ring.memory().translate(Gpa(posted[i]), 1).unwrap().as_ptr().addr() + NetHeader::LEN;
    assert_eq!(reserve(&mut ring), posted);
    assert!(ring.accept(host(&ring, 0), &HEADER, 60));
    assert!(ring.accept(host(&ring, 2), &HEADER, 61));
    ring.publish();
    ring.release();
    assert_eq!(reserve(&mut ring), posted[3..]);
    assert!(ring.accept(host(&ring, 3), &HEADER, 62));
    ring.publish();
    ring.release();
    ring.push(&HEADER, &mut &[7; 51][..]).unwrap();
    ring.publish();
    let used: Vec<_> = std::iter::from_fn(|| rig.driver.take_used()).collect();
    assert_eq!(used, [(10, 72, 1), (11, 0, 1), (12, 73, 1), (13, 74, 1), (14, 63, 1)]);
    // A successor goes on behind them.
    rig.config.base = ring.position();
    assert_eq!(reserve(&mut rig.rx()), posted[5..]);
}
