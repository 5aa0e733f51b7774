//! Drivers that lie, and memory that goes away.

use super::*;

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
        let result = pop_one_by_one(&mut ring, |popped| {
            rig.driver.take_used();
            let addr = if good && popped == 1000 { rig.buffer(0) } else { 0 };
            rig.post(0, &[piece(addr, 64, 0)]);
        });
        let expected = if good { (2000, Ok(0)) } else { (1024, Err(RingFault::Malformed)) };
        assert_eq!(result, expected);
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
