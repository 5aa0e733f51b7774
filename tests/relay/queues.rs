//! Several queue pairs, and sets of them that change under traffic.

use crate::support::guest::{Flows, Guest, Plan};
use crate::support::until;
use crate::{Port, all_counted};

#[test]
fn every_pair_is_a_loop_of_its_own() {
    let port = Port::new("soft:loop", 4);
    let mut guest = port.guest(&Plan::pairs(4));
    let mut flows = Flows::new(64);
    flows.exchange(&mut guest, &[0, 1, 2, 3], 6400, 1000);
    all_counted(&port.lanes(), &flows);
    for pair in &guest.pairs {
        assert_eq!(pair.rx.queue.used_idx(), 1600, "pair {}", pair.rx.queue.index / 2);
    }
    port.goodbye(guest);
    port.daemon.stop();
}

#[test]
fn as_many_pairs_as_there_can_be() {
    let port = Port::new("soft:loop", 32);
    let mut guest = port.guest(&Plan { size: 64, ..Plan::pairs(32) });
    assert_eq!(guest.front.queue_num(), 32);
    let all: Vec<usize> = (0..32).collect();
    let mut flows = Flows::new(64);
    flows.exchange(&mut guest, &all, 6400, 500);
    all_counted(&port.lanes(), &flows);
    port.goodbye(guest);
    port.daemon.stop();
}

/// The rings' used positions.
fn positions(guest: &Guest) -> Vec<u16> {
    guest.pairs.iter().map(|pair| pair.rx.queue.device_idx()).collect()
}

/// Takes in whatever has arrived anywhere.
fn receive(guest: &mut Guest, flows: &mut Flows) {
    for pair in &mut guest.pairs {
        while let Some(received) = pair.rx.receive() {
            flows.came_back(&received.frame);
        }
    }
}

#[test]
fn sets_of_enabled_pairs_change_under_traffic() {
    sets_change(Port::new("soft:loop", 4), Plan::pairs(4).features);
}

pub(crate) fn sets_change(port: Port, features: u64) {
    const SETS: [&[usize]; 9] = [&[0], &[0, 1, 2, 3], &[0, 2], &[3], &[0], &[1, 3], &[0, 1, 2, 3], &[2], &[0]];
    let mut guest = port.guest(&Plan { enabled: vec![0], features, ..Plan::pairs(4) });
    let mut flows = Flows::new(64);
    let mut enabled = SETS[0];
    for &next in SETS.iter().cycle().skip(1).take(3 * SETS.len()) {
        flows.exchange(&mut guest, enabled, 640, 400);
        // A driver stops using a queue before it disables it; those that stay are in full flight.
        let stay: Vec<usize> = enabled.iter().copied().filter(|pair| next.contains(pair)).collect();
        for &pair in &stay {
            for flow in 0..16 {
                let bytes = flows.next(flow * 4 + pair, 400).bytes();
                assert!(guest.pairs[pair].tx.send(&bytes));
            }
            guest.pairs[pair].tx.flush();
        }
        for pair in 0..4 {
            if enabled.contains(&pair) != next.contains(&pair) {
                guest.enable(pair, next.contains(&pair));
            }
        }
        enabled = next;
        let frozen = positions(&guest);
        until("frames in flight are back", || {
            receive(&mut guest, &mut flows);
            flows.total_received() == flows.total_sent()
        });
        // Every flow, over the new set, in order.
        flows.exchange(&mut guest, enabled, 640, 400);
        for pair in (0..4).filter(|pair| !enabled.contains(pair)) {
            let now = guest.pairs[pair].rx.queue.device_idx();
            assert_eq!(now, frozen[pair], "pair {pair} is disabled and received");
        }
    }
    all_counted(&port.lanes(), &flows);
    port.goodbye(guest);
    port.daemon.stop();
}

#[test]
fn rings_are_enabled_before_features_are_set() {
    // QEMU does this while it realizes the device; the ring's state is remembered.
    use crate::support::frontend::FrontEnd;
    let port = Port::new("soft:loop", 2);
    let front = FrontEnd::connect(&port.socket);
    for ring in 0..4 {
        front.set_vring_enable(ring, true);
    }
    let mut guest = Guest::over(front, &Plan { enabled: vec![], ..Plan::pairs(2) });
    let mut flows = Flows::new(8);
    flows.exchange(&mut guest, &[0, 1], 400, 400);
    all_counted(&port.lanes(), &flows);
    port.goodbye(guest);
    port.daemon.stop();
}
