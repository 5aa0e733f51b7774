//! The VF's RSS table follows the rings that are enabled.

use std::rc::Rc;
use std::sync::Arc;

use super::traffic::{core, end, negotiate};
use super::*;
use crate::relay::Poller;
use crate::ring::testing::Driver;
use crate::session::lanes::PortLanes;
use crate::session::plan::PortCounters;
use crate::session::port_log::PortLog;
use crate::vf::soft::SoftVf;
use crate::vf::{Vf, VfCaps, VfConfig, VfSpec};

const PAIRS: u16 = 4;
const RING: u16 = 64;
const SPACE: usize = 0x4000;

fn tables(lanes: &mut PortLanes) -> Vec<Vec<u16>> {
    match lanes.vf_mut() {
        Some(Vf::Soft(vf)) => vf.take_tables(),
        _ => panic!("a soft VF"),
    }
}

/// The session of a guest with four queue pairs, over the lanes of a port with so many, and a VF with so many queues.
fn guest(core: &Arc<Vec<Poller>>, cores: &[(usize, usize)], queues: u16) -> (Session, PortLanes) {
    let vf = Vf::Soft(SoftVf::for_test(VfCaps::default()).unwrap());
    let log = Rc::new(PortLog::new("p"));
    let mut lanes = PortLanes::new("p", log, core.clone(), cores, PortCounters::new(cores.len()), PAIRS, 1500).unwrap();
    lanes.give_vf(VfSpec::SoftNull, vf, &VfConfig { queues, mtu: 1500, mac: None }).unwrap();

    let len = 2 * usize::from(PAIRS) * SPACE;
    let first = Driver::new(len, RING, 0);
    let others: [Driver; 7] = std::array::from_fn(|index| first.beside((index + 1) * SPACE, RING, 0));
    let rings: [&Driver; 8] = std::array::from_fn(|index| if index == 0 { &first } else { &others[index - 1] });
    let mut session = Session::new(offer(PAIRS));
    negotiate(&mut session, &mut lanes, 0, len as u64, rings);
    (session, lanes)
}

fn enable(session: &mut Session, lanes: &mut PortLanes, ring: u32, on: u32) {
    match session.handle(ring_message(Req::SET_VRING_ENABLE, ring, on), lanes) {
        Ok(Outcome::Silent) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_table_points_at_the_queues_of_enabled_rings() {
    let core = core();
    let (mut session, mut lanes) = guest(&core, &[(0, 0)], PAIRS);
    // Rings come one by one, RX before TX of a pair.
    assert_eq!(tables(&mut lanes), [vec![0], vec![0, 1], vec![0, 1, 2], vec![0, 1, 2, 3]]);

    for (ring, on, expected) in [
        (6, 0, vec![vec![0, 1, 2]]),
        (7, 0, vec![]), // a TX ring
        (4, 0, vec![vec![0, 1]]),
        (4, 0, vec![]),
        (0, 0, vec![vec![1]]),
        (6, 1, vec![vec![1, 3]]),
    ] {
        enable(&mut session, &mut lanes, ring, on);
        assert_eq!(tables(&mut lanes), expected, "ring {ring}, enable {on}");
    }
    drop(session.suspend(&mut lanes));
    drop(lanes);
    end(core);
}

/// With fewer queues than rings, those that feed the open ones: all of a lane's, as its rings share them.
#[test]
fn the_table_points_at_the_queues_of_lanes_with_enabled_rings() {
    let core = core();
    for (cores, [first, third, both, back]) in [
        (&[(0, 0)][..], [vec![0], vec![0, 1], vec![], vec![1]]),
        (&[(0, 0), (0, 0)], [vec![0], vec![0], vec![0, 1], vec![1]]),
    ] {
        let (mut session, mut lanes) = guest(&core, cores, 2);
        assert_eq!(lanes.vf_status().unwrap().lanes, cores.len());
        tables(&mut lanes);
        for ring in [2, 4, 6] {
            enable(&mut session, &mut lanes, ring, 0);
        }
        // Pair 0, then also pair 2, which has the queue of pair 0, then all.
        assert_eq!(tables(&mut lanes).last(), Some(&first));
        enable(&mut session, &mut lanes, 4, 1);
        assert_eq!(tables(&mut lanes).last().unwrap_or(&first), &third);
        enable(&mut session, &mut lanes, 6, 1);
        assert_eq!(tables(&mut lanes).last().cloned().unwrap_or_default(), both);
        for (ring, on) in [(0, 0), (4, 0), (6, 0), (2, 1)] {
            enable(&mut session, &mut lanes, ring, on);
        }
        assert_eq!(tables(&mut lanes).last(), Some(&back));
        drop(session.suspend(&mut lanes));
    }
    end(core);
}
