//! The VF's RSS table follows the rings that are enabled.

use std::rc::Rc;

use super::traffic::{core, end, negotiate};
use super::*;
use crate::ring::testing::Driver;
use crate::session::lanes::PortLanes;
use crate::session::plan::PortCounters;
use crate::session::port_log::PortLog;
use crate::vf::soft::SoftVf;
use crate::vf::{Vf, VfCaps, VfConfig, VfSpec};

const PAIRS: u16 = 4;

fn tables(lanes: &mut PortLanes) -> Vec<Vec<u16>> {
    match lanes.vf_mut() {
        Some(Vf::Soft(vf)) => vf.take_tables(),
        _ => panic!("a soft VF"),
    }
}

#[test]
fn the_table_points_at_the_queues_of_enabled_rings() {
    const RING: u16 = 64;
    const SPACE: usize = 0x4000;
    let core = core();
    let vf = Vf::Soft(SoftVf::for_test(VfCaps::default()).unwrap());
    let mut lanes =
        PortLanes::new("p", Rc::new(PortLog::new("p")), core.clone(), &[(0, 0)], PortCounters::default(), PAIRS, 1500)
            .unwrap();
    lanes.give_vf(VfSpec::SoftNull, vf, &VfConfig { queues: PAIRS, mtu: 1500, mac: None }).unwrap();

    let len = 2 * usize::from(PAIRS) * SPACE;
    let first = Driver::new(len, RING, 0);
    let others: [Driver; 7] = std::array::from_fn(|index| first.beside((index + 1) * SPACE, RING, 0));
    let rings: [&Driver; 8] = std::array::from_fn(|index| if index == 0 { &first } else { &others[index - 1] });
    let mut session = Session::new(offer(PAIRS));
    negotiate(&mut session, &mut lanes, 0, len as u64, rings);
    // Rings come one by one, RX before TX of a pair.
    assert_eq!(tables(&mut lanes), [vec![0], vec![0, 1], vec![0, 1, 2], vec![0, 1, 2, 3]]);

    for (ring, enable, expected) in [
        (6, 0, vec![vec![0, 1, 2]]),
        (7, 0, vec![]), // a TX ring
        (4, 0, vec![vec![0, 1]]),
        (4, 0, vec![]),
        (0, 0, vec![vec![1]]),
        (6, 1, vec![vec![1, 3]]),
    ] {
        match session.handle(ring_message(Req::SET_VRING_ENABLE, ring, enable), &mut lanes) {
            Ok(Outcome::Silent) => {}
            other => panic!("{other:?}"),
        }
        assert_eq!(tables(&mut lanes), expected, "ring {ring}, enable {enable}");
    }
    drop(session.suspend(&mut lanes));
    drop(lanes);
    end(core);
}
