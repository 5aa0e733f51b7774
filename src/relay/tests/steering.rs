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
        let direct: Vec<u16> = enabled.iter().filter(|&&pair| pair < queues).map(|&pair| pair as u16).collect();
        let direct = if direct.len() == enabled.len() { direct } else { Vec::new() };
        assert_eq!(lane.direct_queues(), direct, "{enabled:?}");

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
