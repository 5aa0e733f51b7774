//! Drivers that lie, and memory that goes away.

use super::*;

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
        let result = pop_one_by_one(&mut ring, |popped| rig.post([if good && popped == 1000 { 0 } else { 99 }]));
        let expected = if good { (2000, Ok(0)) } else { (1024, Err(RingFault::Malformed)) };
        assert_eq!(result, expected);
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
