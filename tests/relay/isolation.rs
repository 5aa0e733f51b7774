//! One guest's troubles are not another's.

use std::time::{Duration, Instant};

use crate::support::daemon::Daemon;
use crate::support::frame::Frame;
use crate::support::guest::{Flows, Guest, Plan};
use crate::support::tries::{once_of_several, quicker};
use crate::support::{PATIENCE, percentile};

/// Round trips of single frames.
fn round_trips(guest: &mut Guest, flows: &mut Flows, n: usize, mut meanwhile: impl FnMut()) -> Vec<Duration> {
    (0..n)
        .map(|_| {
            meanwhile();
            let start = Instant::now();
            let bytes = flows.next(0, 200).bytes();
            assert!(guest.pairs[0].tx.send(&bytes));
            guest.pairs[0].tx.flush();
            loop {
                if let Some(received) = guest.pairs[0].rx.receive() {
                    flows.came_back(&received.frame);
                    return start.elapsed();
                }
                assert!(start.elapsed() < PATIENCE, "lost");
            }
        })
        .collect()
}

#[test]
fn a_guest_that_does_not_drain_its_ring_delays_nobody() {
    let daemon = Daemon::start();
    let stuck = daemon.attach("stuck", "soft:loop", 1);
    let other = daemon.attach("other", "soft:loop", 1);
    let mut stuck = Guest::connect(&stuck, &Plan { post: false, ..Plan::default() });
    let mut other = Guest::connect(&other, &Plan::default());
    let mut flows = Flows::new(1);
    let mut sent = 0;
    once_of_several(|| {
        let mut alone = round_trips(&mut other, &mut flows, 1000, || {});
        let mut beside = round_trips(&mut other, &mut flows, 1000, || {
            // Always something on its way to the guest that takes nothing.
            let tx = &mut stuck.pairs[0].tx;
            tx.reap();
            while tx.queue.outstanding() < 64 {
                assert!(tx.send(&Frame { flow: 0, seq: sent, len: 200 }.bytes()));
                sent += 1;
            }
            tx.flush();
        });
        let (alone, beside) = (percentile(&mut alone, 50), percentile(&mut beside, 50));
        println!("median round trip: {alone:?} alone, {beside:?} beside a stuck guest");
        // A held burst may cost the core 50 µs a turn; a wait would cost milliseconds.
        quicker("a round trip beside a stuck guest", beside, alone + Duration::from_millis(1))
    });
    let lanes = daemon.lanes("other");
    crate::all_counted(&lanes, &flows);
    crate::support::until("every frame of the stuck guest has met its fate", || {
        stuck.pairs[0].tx.reap();
        let lanes = daemon.lanes("stuck");
        lanes.vf_to_guest.dropped.guest_ring_empty == u64::from(sent) && lanes.guest_to_vf.packets == u64::from(sent)
    });
    drop((stuck, other));
    daemon.stop();
}

#[test]
fn a_full_receive_ring_does_not_delay_the_guests_other_rings() {
    let daemon = Daemon::start();
    let socket = daemon.attach("port", "soft:loop", 2);
    let mut guest = Guest::connect(&socket, &Plan { post: false, ..Plan::pairs(2) });
    guest.pairs[0].rx.post_all();
    let mut flows = Flows::new(1);
    let mut sent = 0;
    for _ in 0..200 {
        // Pair 1 has no receive buffers.
        let tx = &mut guest.pairs[1].tx;
        tx.reap();
        while tx.queue.outstanding() < 64 {
            assert!(tx.send(&Frame { flow: 9, seq: sent, len: 200 }.bytes()));
            sent += 1;
        }
        tx.flush();
        flows.exchange(&mut guest, &[0], 20, 300);
    }
    crate::support::until("every frame has met its fate", || {
        guest.pairs[1].tx.reap();
        let lanes = daemon.lanes("port");
        lanes.vf_to_guest.packets == flows.total_sent()
            && lanes.vf_to_guest.dropped.guest_ring_empty == u64::from(sent)
            && lanes.vf_to_guest.dropped.total() == u64::from(sent)
    });
    drop(guest);
    daemon.stop();
}

#[test]
fn a_guest_that_floods_does_not_starve_another() {
    let daemon = Daemon::start();
    let flood = daemon.attach("flood", "soft:null", 1);
    let other = daemon.attach("other", "soft:loop", 1);
    let mut flood = Guest::connect(&flood, &Plan { size: 1024, ..Plan::default() });
    let mut other = Guest::connect(&other, &Plan::default());
    let mut flows = Flows::new(1);
    once_of_several(|| {
        let mut times = round_trips(&mut other, &mut flows, 500, || {
            let tx = &mut flood.pairs[0].tx;
            while tx.send(&[0x5a; 60]) {}
            tx.flush();
        });
        let median = percentile(&mut times, 50);
        println!("median round trip beside a flood: {median:?}");
        quicker("a round trip beside a flood", median, Duration::from_millis(2))
    });
    crate::all_counted(&daemon.lanes("other"), &flows);
    drop((flood, other));
    daemon.stop();
}
