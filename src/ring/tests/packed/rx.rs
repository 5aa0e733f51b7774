//! Buffers that frames are put into.

use super::*;

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
        rig.assert_spread(&frame);
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
fn reserved_buffers_are_used_in_order_or_put_back() {
    const ROOM: usize = NetHeader::LEN + 100;
    let mut rig = Rig::new(7, Place { index: 5, wrap: true });
    let posted: Vec<_> = (0..6).map(|i| rig.buffer(i * 256)).collect();
    for i in 0..6 {
        rig.post(i + 10, &[piece(posted[usize::from(i)], ROOM as u32, WRITE)]);
    }
    let mut ring = rig.rx();
    let host = |ring: &RxRing, i: usize| place(ring, posted[i]);
    assert_eq!(reserve(&mut ring, ROOM), posted);
    assert!(ring.accept(host(&ring, 0), BURST, &HEADER, 60));
    assert!(ring.accept(host(&ring, 2), BURST, &HEADER, 61));
    ring.publish();
    ring.release(0);
    assert_eq!(reserve(&mut ring, ROOM), posted[3..]);
    assert!(ring.accept(host(&ring, 3), BURST, &HEADER, 62));
    ring.publish();
    ring.release(0);
    ring.push(&HEADER, &mut &[7; 51][..]).unwrap();
    ring.publish();
    let used: Vec<_> = std::iter::from_fn(|| rig.driver.take_used()).collect();
    assert_eq!(used, [(10, 72, 1), (11, 0, 1), (12, 73, 1), (13, 74, 1), (14, 63, 1)]);
    // A successor goes on behind them.
    rig.config.base = ring.position();
    assert_eq!(reserve(&mut rig.rx(), ROOM), posted[5..]);
}

/// Across the wrap of a ring of seven: those that whoever is to be given them refuses stay the next ones.
#[test]
fn buffers_that_nobody_wants_are_not_reserved() {
    const ROOM: usize = NetHeader::LEN + 100;
    for wanted in 0..6 {
        let mut rig = Rig::new(7, Place { index: 5, wrap: true });
        let posted: Vec<_> = (0..6).map(|i| rig.buffer(i * 256)).collect();
        for i in 0..6 {
            rig.post(i + 10, &[piece(posted[usize::from(i)], ROOM as u32, WRITE)]);
        }
        let mut ring = rig.rx();
        let mut seen = Vec::new();
        let memory = ring.memory().clone();
        let result = ring.reserve(0, BURST, ROOM, |buffer| {
            seen.push(gpa(buffer, &memory));
            seen.len() <= wanted
        });
        assert_eq!((result, ring.reserved()), (Ok(Supply::Unfit), wanted));
        assert_eq!(seen, posted[..=wanted]);
        assert_eq!(reserve(&mut ring, ROOM), posted[wanted..]);
        assert!(ring.accept(place(&ring, posted[0]), BURST, &HEADER, 60));
        ring.release(0);
        ring.push(&HEADER, &mut &[7; 51][..]).unwrap();
        ring.publish();
        let used: Vec<_> = std::iter::from_fn(|| rig.driver.take_used()).collect();
        assert_eq!(used, [(10, 72, 1), (11, 63, 1)]);
    }
}
