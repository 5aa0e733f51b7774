//! Where a ring is, stops, and begins again.

use super::*;

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
fn bad_rings_are_refused() {
    let rig = Rig::new(16, 0);
    for size in [0, 3, 32769, 65535] {
        assert!(rig.refused(RingConfig { size, ..rig.config }).contains("power of two"), "{size}");
    }
    let (end, border) = (USER + LEN as u64, USER + LEN as u64 / 2);
    assert!(rig.refused_at(|a, u| a.desc = u, USER + 8).contains("aligned to 16"));
    assert!(rig.refused_at(|a, u| a.avail = u, USER + 1).contains("aligned to 2"));
    assert!(rig.refused_at(|a, u| a.used = u, USER + 2).contains("aligned to 4"));
    assert!(rig.refused_at(|a, u| a.desc = u, end - 16 * 15).contains("not inside one region"));
    assert!(rig.refused_at(|a, u| a.desc = u, border - 16).contains("not inside one region"));
    assert!(rig.refused_at(|a, u| a.avail = u, end - 34).contains("not inside one region"));
    assert!(rig.refused_at(|a, u| a.used = u, u64::MAX - 3).contains("not inside one region"));
    assert!(rig.refused_at(|a, u| a.used = u, 0).contains("not inside one region"));
    // Exactly to the end, which the event index then passes.
    let mut config = rig.config;
    config.addresses.avail = UserAddr(end - 36);
    assert!(TxRing::new(mapped(&rig.driver), &config).is_ok());
    config.event_idx = true;
    assert!(rig.refused(config).contains("available ring"));
}
