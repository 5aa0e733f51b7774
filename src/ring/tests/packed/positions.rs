//! Where a ring is, stops, and begins again.

use super::*;

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
fn bad_rings_are_refused() {
    let rig = Rig::new(15, Place::FIRST);
    for size in [0, 32769, 65535] {
        assert!(rig.refused(RingConfig { size, ..rig.config }).contains("not from 1 to 32768"), "{size}");
    }
    for base in [15, 0x8000 | 15, 0x7fff, 0xffff] {
        assert!(rig.refused(RingConfig { base, ..rig.config }).contains("not below its size 15"), "{base:#x}");
    }
    let (end, border) = (USER + LEN as u64, USER + LEN as u64 / 2);
    assert!(rig.refused_at(|a, u| a.desc = u, USER + 8).contains("aligned to 16"));
    assert!(rig.refused_at(|a, u| a.avail = u, USER + 2).contains("aligned to 4"));
    assert!(rig.refused_at(|a, u| a.used = u, USER + 2).contains("aligned to 4"));
    assert!(rig.refused_at(|a, u| a.desc = u, end - 16 * 14).contains("not inside one region"));
    assert!(rig.refused_at(|a, u| a.desc = u, border - 16).contains("not inside one region"));
    assert!(rig.refused_at(|a, u| a.avail = u, end).contains("not inside one region"));
    assert!(rig.refused_at(|a, u| a.used = u, u64::MAX - 3).contains("not inside one region"));
    assert!(rig.refused_at(|a, u| a.used = u, 0).contains("not inside one region"));
    // Exactly to the end.
    let mut config = rig.config;
    config.addresses.desc = UserAddr(end - 16 * 15);
    config.addresses.avail = UserAddr(border - 4);
    assert!(TxRing::new(mapped(&rig.driver), &config).is_ok());
}
