//! Who wants to hear of what.

use super::*;

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
