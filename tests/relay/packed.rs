//! Packed rings, and buffers that are used in order.

use crate::rings::{by_calls, goes_on_where_it_stopped, goes_round, wants_no_calls};
use crate::support::frame::Frame;
use crate::support::frontend::feature::{EVENT_IDX, IN_ORDER, INDIRECT, MQ, MRG_RXBUF, RING_PACKED, VERSION_1};
use crate::support::frontend::{pair, request};
use crate::support::guest::{Flows, Pair, Plan};
use crate::support::queue::{Desc, NEXT};
use crate::support::tx::Shape;
use crate::support::until;
use crate::{Port, all_counted};

const PACKED: u64 = VERSION_1 | MRG_RXBUF | RING_PACKED;

fn plan() -> Plan {
    Plan { features: PACKED, ..Plan::default() }
}

/// A plan, and the same with buffers used in order.
fn both(plan: &Plan) -> [Plan; 2] {
    [plan.clone(), Plan { features: plan.features | IN_ORDER, ..plan.clone() }]
}

#[test]
fn rings_of_any_size() {
    for (size, window, frames) in
        [(1, 1, 200), (2, 2, 400), (3, 3, 400), (255, 128, 5000), (256, 128, 5000), (1000, 256, 5000)]
    {
        for plan in both(&Plan { size, ..plan() }) {
            goes_round(plan, window, frames, 1514);
        }
    }
}

#[test]
fn the_largest_ring_goes_into_another_round() {
    goes_round(Plan { size: 32768, ..plan() }, 256, 70_000, 100);
}

#[test]
fn a_small_ring_goes_many_rounds() {
    goes_round(Plan { size: 61, ..plan() }, 32, 70_000, 80);
}

#[test]
fn header_and_frame_in_odd_pieces() {
    for cuts in [&[12][..], &[1, 7, 12, 13, 30, 31, 200]] {
        for plan in both(&Plan { shape: Shape::cut(cuts), ..plan() }) {
            goes_round(plan, 16, 3000, 1514);
        }
    }
}

#[test]
fn chains_as_long_as_the_ring() {
    let cuts: Vec<usize> = (1..63).collect();
    goes_round(Plan { size: 63, shape: Shape::cut(&cuts), ..plan() }, 1, 300, 1514);
}

#[test]
fn indirect_tables() {
    for shape in [Shape::indirect(&[12, 100]), Shape::indirect(&[])] {
        for plan in both(&Plan { features: PACKED | INDIRECT, shape, ..plan() }) {
            goes_round(plan, 64, 3000, 1514);
        }
    }
}

#[test]
fn mergeable_buffers_smaller_than_a_frame() {
    for plan in both(&Plan { rx_pieces: vec![256], ..plan() }) {
        goes_round(plan, 32, 3000, 1514);
    }
}

#[test]
fn mergeable_buffers_in_chains() {
    for plan in both(&Plan { rx_pieces: vec![12, 100, 700], size: 250, ..plan() }) {
        goes_round(plan, 8, 3000, 1514);
    }
}

#[test]
fn without_mergeable_buffers() {
    for rx_pieces in [vec![2048], vec![12, 1000, 1000]] {
        for plan in both(&Plan { features: VERSION_1 | RING_PACKED, rx_pieces, ..plan() }) {
            goes_round(plan, 32, 3000, 1514);
        }
    }
}

#[test]
fn drivers_that_sleep() {
    for features in [PACKED, PACKED | EVENT_IDX, PACKED | EVENT_IDX | IN_ORDER] {
        by_calls(features);
    }
}

#[test]
fn a_daemon_that_sleeps_is_kicked() {
    for features in [PACKED, PACKED | EVENT_IDX, PACKED | EVENT_IDX | IN_ORDER] {
        let port = Port::new("soft:loop", 1);
        let mut guest = port.guest(&Plan { features, size: 50, ..plan() });
        let mut flows = Flows::new(1).window(20);
        // 17 a time: every slot comes to be the one that is asked for.
        for round in 0..60 {
            let queue = &guest.pairs[0].tx.queue;
            let before = queue.kicks;
            // However late its core comes to it; and then it is given a moment to fall asleep.
            until("the daemon asks for kicks", || queue.packed.as_ref().expect("a packed ring").asks_for_kicks());
            std::thread::sleep(std::time::Duration::from_millis(5));
            flows.exchange(&mut guest, &[0], 17, 300);
            assert!(guest.pairs[0].tx.queue.kicks > before, "round {round}: it slept and was not kicked");
        }
        all_counted(&port.lanes(), &flows);
        port.goodbye(guest);
        port.daemon.stop();
    }
}

#[test]
fn a_driver_that_wants_no_calls_gets_none() {
    wants_no_calls(plan());
}

#[test]
fn a_ring_goes_on_where_it_stopped() {
    for plan in both(&Plan { size: 130, ..plan() }) {
        goes_on_where_it_stopped(&plan);
    }
    // Chains of two: 65 of them are a round.
    goes_on_where_it_stopped(&Plan { size: 130, shape: Shape::cut(&[12]), ..plan() });
}

#[test]
fn sets_of_enabled_pairs_change_under_traffic() {
    for features in [PACKED | MQ, PACKED | MQ | IN_ORDER | EVENT_IDX] {
        crate::queues::sets_change(Port::new("soft:loop", 4), features);
    }
}

/// What is in flight when both rings stop comes back once and in order after they are started again, or was
/// dropped for want of a ring and counted.
#[test]
fn rings_stop_and_start_under_traffic() {
    let port = Port::new("soft:loop", 1);
    let (mut sent, mut received) = (0, 0);
    for plan in both(&Plan { size: 100, shape: Shape::cut(&[12, 60]), rx_pieces: vec![128], ..plan() }) {
        let mut guest = port.guest(&plan);
        let mut flows = Flows::new(1);
        let mut last = None;
        for round in 0..40 {
            let tx = &mut guest.pairs[0].tx;
            for _ in 0..20 {
                assert!(tx.send(&flows.next(0, 900).bytes()), "round {round}");
                sent += 1;
            }
            tx.flush();
            // Of these some have gone, some are on their way, some still in the ring.
            guest.stop();
            let Pair { rx, tx } = &guest.pairs[0];
            let (first, second) = if round % 2 == 0 { (&rx.queue, &tx.queue) } else { (&tx.queue, &rx.queue) };
            // The driver has perhaps not looked at all that was used: its base is the device's.
            for queue in [first, second] {
                queue.set_up(&guest.front);
                let base = u32::from(queue.position()) << 16 | u32::from(queue.position());
                guest.front.must(request::SET_VRING_BASE, &pair(queue.index, base), &[]);
                queue.kick_off(&guest.front);
            }
            until("all are back, or counted as dropped", || {
                let Pair { rx, tx } = &mut guest.pairs[0];
                tx.reap();
                while let Some(frame) = rx.receive() {
                    let seq = Some(Frame::parse(&frame.frame).seq);
                    assert!(seq > last, "{seq:?} behind {last:?}");
                    last = seq;
                    received += 1;
                }
                let lanes = port.lanes();
                let dropped = lanes.guest_to_vf.dropped.total() + lanes.vf_to_guest.dropped.total();
                tx.queue.outstanding() == 0 && received + dropped == sent
            });
        }
        port.goodbye(guest);
    }
    assert!(received > sent / 4, "{received} of {sent}");
    port.daemon.stop();
}

#[test]
fn a_ring_that_lies_is_stopped_and_the_others_go_on() {
    let port = Port::new("soft:loop", 2);
    let mut guest = port.guest(&Plan { features: PACKED | MQ, size: 50, ..Plan::pairs(2) });
    let mut flows = Flows::new(2).window(20);
    flows.exchange(&mut guest, &[0, 1], 200, 500);
    let ring = &mut guest.pairs[0].tx.queue;
    let at = guest.regions[0].gpa;
    // All the slots there are, and each goes on.
    ring.add_descs(&[Desc { addr: at, len: 60, flags: NEXT, next: 0 }; 50]);
    ring.notify();
    ring.kick_now();
    let fault = |ring: usize| port.daemon.show("port")["guest"]["rings"][ring]["fault"].as_str().map(str::to_owned);
    until("it is stopped", || fault(1).is_some());
    assert_eq!(fault(1).as_deref(), Some("descriptor chain does not end"));
    assert_eq!([fault(0), fault(2), fault(3)], [None, None, None]);
    let mut flows = Flows::new(1).window(20);
    flows.exchange(&mut guest, &[1], 200, 500);
    // Its position is still known, and a new start is a new chance.
    guest.stop();
    for Pair { rx, tx } in &mut guest.pairs {
        for queue in [&mut rx.queue, &mut tx.queue] {
            queue.reset();
            queue.start(&guest.front);
        }
        rx.post_all();
    }
    let mut flows = Flows::new(2).window(20);
    flows.exchange(&mut guest, &[0, 1], 200, 500);
    port.goodbye(guest);
    port.daemon.stop();
}

#[test]
fn split_and_packed_guests_take_turns() {
    let port = Port::new("soft:loop", 1);
    let mut flows = Flows::new(3);
    for _ in 0..3 {
        for plan in [Plan::default(), Plan { size: 200, ..plan() }] {
            let mut guest = port.guest(&plan);
            flows.exchange(&mut guest, &[0], 500, 1514);
            port.goodbye(guest);
        }
    }
    all_counted(&port.lanes(), &flows);
    port.daemon.stop();
}
