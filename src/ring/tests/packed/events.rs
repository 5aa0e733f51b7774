//! Who wants to hear of what.

use proptest::prelude::*;

use super::*;

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
