//! Which ring a flow goes to, as rings are enabled and disabled.

use super::scripted::ScriptedRx;
use super::*;
use crate::ring::testing::{number, numbered};

const PAIRS: usize = 4;
const FLOWS: u8 = 64;

/// 64 flows, spread by the VF over its queues, under enabled sets {0}, {0–3}, {0,2}, {3}, {0}: every frame
/// arrives, in its flow's order, on an enabled ring, and each flow on one ring while a set lasts.
fn boot_reality(queues: usize) {
    let mut guest = Guest::new(PAIRS, 256);
    let vf: Vec<_> = (0..queues).map(|_| ScriptedRx::default()).collect();
    let counters = Arc::new(LaneCounters::default());
    let mut lane = VfToGuest::new(LaneId(1), PAIRS, vf.clone(), counters.clone());
    let mut clock = Clock::new();
    for pair in 0..PAIRS {
        lane.insert_ring(pair, RingPlan { enabled: false, ..guest.rx_plan(pair) }).unwrap();
        guest.rx[pair].post(256);
    }
    let (mut sent, mut seen) = ([0_u64; FLOWS as usize], [0_u64; FLOWS as usize]);
    for enabled in [&[0][..], &[0, 1, 2, 3], &[0, 2], &[3], &[0]] {
        // Some are on their way while the set changes.
        for flow in 0..FLOWS {
            vf[usize::from(flow) % queues].arrive(numbered(flow, sent[usize::from(flow)], 64));
            sent[usize::from(flow)] += 1;
        }
        for pair in 0..PAIRS {
            lane.remove_ring(pair).unwrap();
            lane.insert_ring(pair, RingPlan { enabled: enabled.contains(&pair), ..guest.rx_plan(pair) }).unwrap();
        }
        let mut home = [None; FLOWS as usize];
        let mut rings = [false; PAIRS];
        for round in 0..20 {
            for flow in 0..FLOWS {
                // Uneven, so that bursts of all lengths occur.
                if (round + flow) % 3 != 0 {
                    vf[usize::from(flow) % queues].arrive(numbered(flow, sent[usize::from(flow)], 64));
                    sent[usize::from(flow)] += 1;
                }
            }
            lane.turn(&clock.turn());
            clock.pass(10);
            for (pair, rx) in guest.rx.iter_mut().enumerate() {
                while let Some(frame) = rx.receive() {
                    let (flow, number) = number(&frame);
                    let flow = usize::from(flow);
                    assert!(enabled.contains(&pair), "ring {pair} is disabled");
                    assert_eq!(*home[flow].get_or_insert(pair), pair, "flow {flow} has one ring");
                    assert_eq!(number, seen[flow], "flow {flow} in order");
                    seen[flow] += 1;
                    rings[pair] = true;
                }
                rx.post(256);
            }
        }
        assert_eq!(rings.iter().filter(|used| **used).count(), enabled.len(), "every enabled ring is used");
        assert_eq!(seen, sent);
    }
    assert_eq!(counters.snapshot().dropped.total(), 0);
}

#[test]
fn every_enabled_set_keeps_flows_in_order_with_a_queue_for_each_ring() {
    boot_reality(4);
}

#[test]
fn every_enabled_set_keeps_flows_in_order_with_fewer_queues_than_rings() {
    for queues in 1..4 {
        boot_reality(queues);
    }
}

/// Flow 0 of a lane whose VF hashes it by a table: each change of the table moves it to another queue, with frames
/// of it waiting in the old one, and new ones in the new one before the lane looks.
#[test]
fn a_flow_that_the_vf_moves_to_another_queue_stays_in_order() {
    let mut guest = Guest::new(PAIRS, 256);
    let vf: Vec<_> = (0..PAIRS).map(|_| ScriptedRx::default()).collect();
    let counters = Arc::new(LaneCounters::default());
    let mut lane = VfToGuest::new(LaneId(1), PAIRS, vf.clone(), counters.clone());
    let clock = Clock::new();
    guest.rx[0].post(256);
    lane.insert_ring(0, guest.rx_plan(0)).unwrap();
    let (mut sent, mut seen) = (0, 0);
    let mut arrive = |queue: usize, n: usize| {
        for _ in 0..n {
            vf[queue].arrive(numbered(0, sent, 64));
            sent += 1;
        }
    };
    // Removed before kept, removed before new, kept before new; before: wherever the driver pointed.
    for (from, to, before, now) in [
        (3, 0, &[][..], &[0, 1][..]),
        (1, 0, &[0, 1], &[0]),
        (2, 0, &[2, 3], &[0, 1]),
        (0, 3, &[0, 1], &[2, 3]),
        (1, 2, &[1], &[1, 2]),
        (3, 1, &[1, 2, 3], &[1, 2]),
    ] {
        arrive(from, 70);
        lane.table_moved(before, now);
        arrive(to, 40);
        // Others do not hinder.
        lane.turn(&clock.turn());
        while let Some(frame) = guest.rx[0].receive() {
            assert_eq!(number(&frame), (0, seen), "moved from queue {from} to {to}");
            seen += 1;
        }
        guest.rx[0].post(256);
        assert_eq!(seen as usize % 110, 0, "all of them, in one turn");
    }
    assert_eq!(counters.snapshot().dropped.total(), 0);
}

/// What the VF does not hash keeps coming to a queue that left the table: the others do not wait for ever.
#[test]
fn a_queue_that_is_never_empty_does_not_keep_others_waiting() {
    let mut guest = Guest::new(1, 256);
    let vf: Vec<_> = (0..2).map(|_| ScriptedRx::default()).collect();
    let mut lane = VfToGuest::new(LaneId(1), 1, vf.clone(), Arc::new(LaneCounters::default()));
    let clock = Clock::new();
    lane.insert_ring(0, guest.rx_plan(0)).unwrap();
    lane.table_moved(&[0], &[1]);
    vf[1].arrive(numbered(1, 0, 64));
    let mut others = 0;
    while vf[1].waiting() > 0 {
        (vf[0].waiting()..300).for_each(|_| vf[0].arrive(numbered(0, 0, 64)));
        guest.rx[0].post(256);
        lane.turn(&clock.turn());
        while guest.rx[0].receive().is_some() {
            others += 1;
        }
        assert!(others < 4096, "waits for ever");
    }
    assert!(others > 500, "the old queue first: {others}");
}

/// Two lanes over four queues of a VF, with a counter of their own each.
fn two_lanes(vf: &[ScriptedRx]) -> ([Box<dyn Lane>; 2], [Arc<LaneCounters>; 2]) {
    let counters = [Arc::new(LaneCounters::default()), Arc::new(LaneCounters::default())];
    let mut first = VfToGuest::new(LaneId(1), PAIRS, vf.to_vec(), counters[0].clone());
    let mut second = first.sibling(LaneId(2), counters[1].clone()).unwrap();
    for queue in [1, 3] {
        second.adopt_queue(queue, first.release_queue(queue).unwrap());
    }
    assert!(first.release_queue(1).is_none(), "it has an owner");
    ([Box::new(first), second], counters)
}

#[test]
fn each_lane_feeds_the_rings_of_its_queues() {
    let mut guest = Guest::new(PAIRS, 256);
    let vf: Vec<_> = (0..PAIRS).map(|_| ScriptedRx::default()).collect();
    let (mut lanes, counters) = two_lanes(&vf);
    let clock = Clock::new();
    for pair in 0..PAIRS {
        lanes[pair % 2].insert_ring(pair, guest.rx_plan(pair)).unwrap();
        guest.rx[pair].post(256);
        (0..10).for_each(|n| vf[pair].arrive(numbered(pair as u8, n, 64)));
    }
    lanes[1].turn(&clock.turn());
    assert!(guest.rx[0].receive().is_none() && guest.rx[2].receive().is_none(), "not its rings");
    lanes[0].turn(&clock.turn());
    for (pair, rx) in guest.rx.iter_mut().enumerate() {
        // Some are looked at above; none of those was there.
        for n in 0..10 {
            assert_eq!(rx.receive().map(|frame| number(&frame)), Some((pair as u8, n)));
        }
        assert!(rx.receive().is_none());
    }
    assert_eq!(counters.map(|counters| counters.snapshot().packets), [20, 20]);
}

/// Queues go from lane to lane with what they hold, and what waited for nobody is not taken along.
#[test]
fn a_queue_goes_to_another_lane_with_its_frames_in_order() {
    let mut guest = Guest::new(PAIRS, 256);
    let vf: Vec<_> = (0..PAIRS).map(|_| ScriptedRx::default()).collect();
    let (mut lanes, counters) = two_lanes(&vf);
    let clock = Clock::new();
    // From before there was a guest.
    (0..5).for_each(|n| vf[1].arrive(numbered(1, n, 64)));
    (0..7).for_each(|n| vf[0].arrive(numbered(0, n, 64)));
    lanes[0].insert_ring(0, guest.rx_plan(0)).unwrap();
    assert_eq!(counters[0].snapshot().dropped.not_ready, 7);
    // The second lane has no ring yet.
    let moving = lanes[1].release_queue(1).unwrap();
    lanes[0].adopt_queue(1, moving);
    assert_eq!(counters[0].snapshot().dropped.not_ready, 12);

    // Held, since the guest has no buffers.
    (0..8).for_each(|n| vf[1].arrive(numbered(1, n, 64)));
    lanes[0].turn(&clock.turn());
    assert_eq!((vf[1].waiting(), counters[0].snapshot().packets), (0, 0));
    (8..12).for_each(|n| vf[1].arrive(numbered(1, n, 64)));
    lanes[1].insert_ring(1, guest.rx_plan(1)).unwrap();
    let moving = lanes[0].release_queue(1).unwrap();
    lanes[1].adopt_queue(1, moving);
    guest.rx[1].post(256);
    lanes[1].turn(&clock.turn());
    for n in 0..12 {
        assert_eq!(guest.rx[1].receive().map(|frame| number(&frame)), Some((1, n)));
    }
    assert_eq!(counters[0].snapshot().dropped.total() + counters[1].snapshot().dropped.total(), 12);
}

/// As above with one lane: a flow that the VF moves from a queue of one lane to a queue of the other.
#[test]
fn a_flow_that_the_vf_moves_to_another_lane_stays_in_order() {
    let mut guest = Guest::new(PAIRS, 256);
    let vf: Vec<_> = (0..PAIRS).map(|_| ScriptedRx::default()).collect();
    let (mut lanes, counters) = two_lanes(&vf);
    let clock = Clock::new();
    for pair in 0..PAIRS {
        lanes[pair % 2].insert_ring(pair, guest.rx_plan(pair)).unwrap();
        guest.rx[pair].post(256);
    }
    let (mut sent, mut seen) = (0, 0);
    let mut arrive = |queue: usize, n: usize| {
        for _ in 0..n {
            vf[queue].arrive(numbered(0, sent, 64));
            sent += 1;
        }
    };
    for (from, to, before, now) in [
        (3, 0, &[][..], &[0, 1][..]),
        (1, 0, &[0, 1], &[0]),
        (2, 1, &[2, 3], &[0, 1]),
        (0, 3, &[0, 1], &[2, 3]),
        (1, 2, &[1], &[1, 2]),
    ] {
        arrive(from, 70);
        // Any of them is told, and the others look when they are handed out.
        lanes[from % 2].table_moved(before, now);
        lanes.iter_mut().for_each(|lane| lane.settle(&clock.turn()));
        arrive(to, 40);
        // The lane with the newer ones is the first to have turns.
        let (newer, older) = (to % 2, from % 2);
        for round in 0..3 {
            lanes[newer].turn(&clock.turn());
            lanes[newer].turn(&clock.turn());
            if round == 0 && newer != older {
                assert!(lanes[newer].doze(), "its core would sleep on frames that wait for the other lane");
                lanes[newer].wake();
            }
            if newer != older {
                let waiting = vf[to].waiting();
                assert!(waiting == 40 || vf[from].waiting() == 0, "{waiting} wait in {to}, older ones in {from}");
            }
            lanes[older].turn(&clock.turn());
        }
        for lane in &mut lanes {
            assert!(!lane.doze());
            lane.wake();
        }
        for (ring, frames) in [(from, 70), (to, 40)] {
            for _ in 0..frames {
                assert_eq!(guest.rx[ring].receive().map(|frame| number(&frame)), Some((0, seen)), "{from} to {to}");
                seen += 1;
            }
            guest.rx[ring].post(256);
        }
    }
    assert_eq!(seen, sent);
    assert!(counters.iter().all(|counters| counters.snapshot().dropped.total() == 0));
}
