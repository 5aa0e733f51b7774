//! Buffers that frames are put into.

use super::*;

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
        rig.assert_spread(&frame);
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
fn frames_are_pushed_at_once_as_far_as_their_buffers_are_usual() {
    let mut rig = Rig::new(8, 65533);
    let mut ring = rig.rx();
    let frame = |i: u8| [i; 60];
    let push = |ring: &mut RxRing, from: u8, n: u8| {
        let frames: Vec<_> = (from..from + n).map(frame).collect();
        ring.push_each(frames.iter().map(|frame| (HEADER, &frame[..])))
    };
    assert_eq!(push(&mut ring, 0, 2), 0, "there is none");
    for (head, len) in [(0, 72), (1, 1500), (2, 100), (3, 71)] {
        rig.driver.describe(head, Descriptor::new(rig.buffer(usize::from(head) * 2048), len, WRITE, 0));
    }
    rig.post([0]);
    assert_eq!(push(&mut ring, 1, 1), 1);
    // More than it knew of: it looks again.
    rig.post([1, 2, 3, 1]);
    assert_eq!(push(&mut ring, 2, 1), 1);
    assert_eq!(push(&mut ring, 3, 3), 1, "the next one is too short");
    assert_eq!(ring.push(&HEADER, &mut &frame(4)[..]), Err(PushError::Oversize));
    ring.publish();
    let used: Vec<_> = std::iter::from_fn(|| rig.driver.take_used()).collect();
    assert_eq!(used, [(0, 72), (1, 72), (2, 72)]);
    for i in 0..3_u8 {
        let at = rig.buffer(usize::from(i) * 2048);
        assert_eq!(rig.read(at, 72), [&HEADER.encode(1)[..], &frame(i + 1)].concat());
    }
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
    rig.post(0..36);
    assert_eq!(reserve(&mut ring, ROOM), (0..32).map(at).collect::<Vec<_>>());
    assert_eq!((ring.reserved(), reserve(&mut ring, ROOM)), (32, vec![]));
    // The first gets a frame, the two behind it do not, then one that is nowhere.
    assert!(ring.accept(place(&ring, at(0)), BURST, &HEADER, 60));
    assert!(ring.accept(place(&ring, at(3)), BURST, &HEADER, 100));
    assert!(!ring.accept(place(&ring, at(1)), BURST, &HEADER, 60), "it was passed");
    assert!(ring.publish());
    let used: Vec<_> = std::iter::from_fn(|| rig.driver.take_used()).collect();
    assert_eq!(used, [(0, 72), (1, 0), (2, 0), (3, 112)]);
    assert_eq!(rig.read(at(3), 12), HEADER.encode(1));
    assert_eq!(ring.reserved(), 28);
    // Put back, they come again, and a copied frame takes the first.
    ring.release(0);
    assert_eq!((ring.reserved(), ring.position()), (0, 64));
    ring.push(&HEADER, &mut &[7; 20][..]).unwrap();
    ring.publish();
    assert_eq!(rig.driver.take_used(), Some((4, 32)));
    assert_eq!(reserve(&mut ring, ROOM), (5..36).map(at).collect::<Vec<_>>());
    ring.release(0);
    // Not beyond one that is short, in pieces, or malformed; and not more than is wanted.
    for (head, what) in [(40, "short"), (41, "in pieces"), (43, "not writable"), (99, "no descriptor")] {
        let mut rig = Rig { driver: rig.driver.beside(0, 64, 60), config: rig.config };
        rig.driver.describe(0, Descriptor::new(at(0), ROOM as u32, WRITE, 0));
        rig.driver.describe(40, Descriptor::new(short, ROOM as u32 - 1, WRITE, 0));
        rig.driver.chain(41, &[(split, 50), (split + 50, ROOM as u32 - 50)], WRITE);
        rig.driver.describe(43, Descriptor::new(split, ROOM as u32, 0, 0));
        rig.post([0, 0, head, 0]);
        let mut ring = rig.rx();
        assert_eq!(reserve(&mut ring, ROOM).len(), 2, "{what}");
        ring.release(0);
        for wanted in 0..2 {
            let mut left = wanted;
            let post = |_| std::mem::replace(&mut left, 0) > 0;
            assert!(ring.reserve(0, BURST, ROOM, post).is_ok());
            assert_eq!(ring.reserved(), wanted);
            ring.release(0);
        }
    }
}

/// Places left free ahead of a buffer that a device has: for frames that come elsewhere.
#[test]
fn places_are_left_free_only_ahead_of_a_buffer_that_is_posted() {
    const ROOM: usize = NetHeader::LEN + 100;
    let mut rig = Rig::new(8, 65533);
    let at = |i: u64| GPA + 4096 + i * 256;
    for i in 0..8 {
        rig.driver.describe(i, Descriptor::new(at(i.into()), ROOM as u32, WRITE, 0));
    }
    let mut ring = rig.rx();
    let give = |ring: &mut RxRing, ahead: usize, most: usize, takes: usize| {
        let mut given = Vec::new();
        let memory = ring.memory().clone();
        let supply = ring.reserve(ahead, most, ROOM, |buffer| {
            let takes = given.len() < takes;
            takes.then(|| given.push(gpa(buffer, &memory)));
            takes
        });
        (supply, given, ring.reserved())
    };
    rig.post(0..3);
    // One more than the places is needed, and taken.
    assert_eq!(give(&mut ring, 3, 4, 4), (Ok(Supply::Few), vec![], 0));
    rig.post(3..5);
    assert_eq!(give(&mut ring, 3, 4, 0), (Ok(Supply::Unfit), vec![], 0));
    assert_eq!(give(&mut ring, 3, 4, 4), (Ok(Supply::Enough), vec![at(3), at(4)], 5));
    // Others have to wait; those for which a place was left do not.
    assert_eq!(ring.push(&HEADER, &mut &[9; 60][..]), Err(PushError::Empty));
    ring.fill(&HEADER, &mut &[7; 100][..]).unwrap();
    assert_eq!(ring.fill(&HEADER, &mut &[8; 101][..]), Err(PushError::Oversize));
    // Not with a buffer in front that gets none.
    assert!(ring.is_place_free() && !ring.accept(place(&ring, at(3)), 0, &HEADER, 60));
    ring.fill(&HEADER, &mut Foreign(&[9; 60])).unwrap();
    assert!(!ring.is_place_free() && !ring.accept(place(&ring, at(4)), 0, &HEADER, 60));
    assert!(ring.accept(place(&ring, at(3)), 0, &HEADER, 60));
    assert!(ring.publish());
    let used: Vec<_> = std::iter::from_fn(|| rig.driver.take_used()).collect();
    assert_eq!(used, [(0, 112), (1, 0), (2, 72), (3, 72)]);
    assert_eq!(rig.read(at(0), 13), [&HEADER.encode(1)[..], &[7]].concat());
    // The newest are put back.
    rig.post([5, 6, 7]);
    assert_eq!(give(&mut ring, 1, 2, 2), (Ok(Supply::Enough), vec![at(6), at(7)], 4));
    ring.release(1);
    assert_eq!(give(&mut ring, 0, 2, 2), (Ok(Supply::Enough), vec![at(5), at(6)], 3));
    // More than can ever be reserved is no place to leave.
    assert_eq!(give(&mut ring, 300, 1, 1), (Ok(Supply::Few), vec![], 3));
}
