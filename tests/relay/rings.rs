//! Every kind of split ring a driver may set up.

use crate::support::frontend::feature::{EVENT_IDX, INDIRECT, MRG_RXBUF, VERSION_1};
use crate::support::guest::{Flows, Pair, Plan};
use crate::support::tx::Shape;
use crate::support::until;
use crate::{Port, all_counted};

/// Runs `frames` frames of at most `max_len` bytes round the loop.
pub(crate) fn goes_round(plan: Plan, window: usize, frames: usize, max_len: usize) {
    let port = Port::new("soft:loop", 1);
    let mut guest = port.guest(&plan);
    let mut flows = Flows::new(3).window(window);
    flows.exchange(&mut guest, &[0], frames, max_len);
    all_counted(&port.lanes(), &flows);
    port.goodbye(guest);
    port.daemon.stop();
}

fn of_size(size: u16) -> Plan {
    Plan { size, ..Plan::default() }
}

#[test]
fn ring_of_one() {
    goes_round(of_size(1), 1, 200, 1514);
}

#[test]
fn ring_of_two() {
    goes_round(of_size(2), 2, 400, 1514);
}

#[test]
fn ring_of_256() {
    goes_round(of_size(256), 128, 5000, 1514);
}

#[test]
fn ring_of_1024() {
    goes_round(of_size(1024), 256, 5000, 1514);
}

#[test]
fn ring_of_32768_whose_indices_wrap() {
    // More frames than a 16-bit index counts.
    goes_round(of_size(32768), 256, 70_000, 100);
}

#[test]
fn small_ring_whose_indices_wrap() {
    goes_round(of_size(64), 32, 70_000, 80);
}

#[test]
fn header_in_a_descriptor_of_its_own() {
    goes_round(Plan { shape: Shape::cut(&[12]), ..Plan::default() }, 64, 3000, 1514);
}

#[test]
fn header_and_frame_in_odd_pieces() {
    goes_round(Plan { shape: Shape::cut(&[1, 7, 12, 13, 30, 31, 200]), ..Plan::default() }, 16, 3000, 1514);
}

#[test]
fn chains_as_long_as_the_ring() {
    let cuts: Vec<usize> = (1..64).collect();
    goes_round(Plan { size: 64, shape: Shape::cut(&cuts), ..Plan::default() }, 1, 300, 1514);
}

#[test]
fn indirect_tables() {
    let features = VERSION_1 | MRG_RXBUF | INDIRECT;
    goes_round(Plan { features, shape: Shape::indirect(&[12, 100]), ..Plan::default() }, 64, 3000, 1514);
}

#[test]
fn indirect_tables_of_one() {
    let features = VERSION_1 | MRG_RXBUF | INDIRECT;
    goes_round(Plan { features, shape: Shape::indirect(&[]), ..Plan::default() }, 64, 3000, 1514);
}

#[test]
fn mergeable_buffers_smaller_than_a_frame() {
    // 1514 bytes and a header in buffers of 256: up to six of them each.
    goes_round(Plan { rx_pieces: vec![256], ..Plan::default() }, 32, 3000, 1514);
}

#[test]
fn mergeable_buffers_in_chains() {
    goes_round(Plan { rx_pieces: vec![12, 100, 700], ..Plan::default() }, 8, 3000, 1514);
}

#[test]
fn without_mergeable_buffers() {
    goes_round(Plan { features: VERSION_1, ..Plan::default() }, 64, 3000, 1514);
}

#[test]
fn without_mergeable_buffers_in_chains() {
    goes_round(Plan { features: VERSION_1, rx_pieces: vec![12, 1000, 1000], ..Plan::default() }, 32, 3000, 1514);
}

#[test]
fn header_of_ten_bytes() {
    goes_round(Plan { features: 0, shape: Shape::cut(&[10]), ..Plan::default() }, 64, 3000, 1514);
}

#[test]
fn header_of_ten_bytes_in_chains() {
    goes_round(Plan { features: 0, rx_pieces: vec![10, 1514], ..Plan::default() }, 64, 3000, 1514);
}

#[test]
fn mergeable_without_version_1() {
    goes_round(Plan { features: MRG_RXBUF, ..Plan::default() }, 64, 3000, 1514);
}

#[test]
fn memory_of_huge_pages() {
    let Some(region) = crate::support::memory::Region::huge(0x20_0000, 8 << 20) else {
        crate::support::skip!("memory_of_huge_pages", "fewer than 4 free huge pages");
    };
    goes_round(Plan { regions: Some(vec![region]), ..Plan::default() }, 64, 3000, 1514);
}

#[test]
fn buffers_in_a_region_of_their_own() {
    use crate::support::memory::{Region, memfd};
    // Two regions of one file, the second at an offset, as QEMU has them below and above 4 GiB.
    let file = memfd(16 << 20, false).expect("memfd");
    let low = Region::of_file(0, 4 << 20, 0, file.try_clone().expect("dup"));
    let high = Region::of_file(1 << 32, 12 << 20, 4 << 20, file);
    goes_round(Plan { regions: Some(vec![low, high]), ..Plan::default() }, 64, 3000, 1514);
}

pub(crate) fn by_calls(features: u64) {
    let port = Port::new("soft:loop", 1);
    let mut guest = port.guest(&Plan { features, size: 64, ..Plan::default() });
    let mut flows = Flows::new(1);
    flows.exchange_sleeping(&mut guest, 3000);
    let lanes = port.lanes();
    all_counted(&lanes, &flows);
    assert!(lanes.vf_to_guest.kicks_sent > 0, "{lanes:?}");
    port.goodbye(guest);
    port.daemon.stop();
}

#[test]
fn a_driver_that_sleeps_with_event_idx() {
    by_calls(VERSION_1 | MRG_RXBUF | EVENT_IDX);
}

#[test]
fn a_driver_that_sleeps_without_event_idx() {
    by_calls(VERSION_1 | MRG_RXBUF);
}

#[test]
fn a_driver_that_wants_no_calls_gets_none() {
    wants_no_calls(Plan::default());
}

pub(crate) fn wants_no_calls(plan: Plan) {
    let port = Port::new("soft:loop", 1);
    let mut guest = port.guest(&plan);
    let mut flows = Flows::new(1);
    flows.exchange(&mut guest, &[0], 100, 300);
    let Pair { rx, tx } = &guest.pairs[0];
    rx.queue.suppress_calls();
    tx.queue.suppress_calls();
    // What was on its way when the driver changed its mind: the core is done with it when it moves the next frame.
    flows.exchange(&mut guest, &[0], 1, 300);
    guest.pairs[0].rx.queue.take_calls();
    guest.pairs[0].tx.queue.take_calls();
    let before = port.lanes();
    flows.exchange(&mut guest, &[0], 5000, 300);
    let after = port.lanes();
    assert_eq!(guest.pairs[0].rx.queue.take_calls(), 0);
    assert_eq!(guest.pairs[0].tx.queue.take_calls(), 0);
    for (before, after) in [(before.guest_to_vf, after.guest_to_vf), (before.vf_to_guest, after.vf_to_guest)] {
        assert_eq!(after.kicks_sent, before.kicks_sent, "{after:?}");
        assert!(after.kicks_suppressed > before.kicks_suppressed, "{after:?}");
    }
    port.goodbye(guest);
    port.daemon.stop();
}

#[test]
fn a_busy_daemon_wants_no_kicks() {
    let port = Port::new("soft:loop", 1);
    for features in [VERSION_1, VERSION_1 | EVENT_IDX] {
        let mut guest = port.guest(&Plan { features, ..Plan::default() });
        Flows::new(1).exchange(&mut guest, &[0], 20_000, 100);
        let kicks = guest.pairs[0].tx.queue.kicks + guest.pairs[0].rx.queue.kicks;
        assert!(kicks < 10_000, "{kicks} kicks for 20000 frames under constant load");
        port.goodbye(guest);
    }
    port.daemon.stop();
}

#[test]
fn a_ring_goes_on_where_it_stopped() {
    goes_on_where_it_stopped(&Plan { size: 128, ..Plan::default() });
}

pub(crate) fn goes_on_where_it_stopped(plan: &Plan) {
    let port = Port::new("soft:loop", 1);
    let mut guest = port.guest(plan);
    let mut flows = Flows::new(1).window(32);
    for round in 1..=20 {
        flows.exchange(&mut guest, &[0], 77, 500);
        guest.stop();
        for Pair { rx, tx } in &mut guest.pairs {
            assert_eq!(tx.queue.used_idx(), (77 * round) as u16);
            // Frames sent while it is stopped wait in the ring.
            rx.queue.start(&guest.front);
            tx.queue.start(&guest.front);
        }
    }
    all_counted(&port.lanes(), &flows);
    until("both rings run", || {
        let show = port.daemon.show("port");
        (0..2).all(|ring| show["guest"]["rings"][ring]["running"] == true)
    });
    port.daemon.stop();
}

#[test]
fn frames_sent_before_the_ring_starts_are_forwarded() {
    let port = Port::new("soft:loop", 1);
    let mut guest = port.guest(&Plan::default());
    guest.stop();
    let mut flows = Flows::new(1);
    for _ in 0..50 {
        let bytes = flows.next(0, 300).bytes();
        assert!(guest.pairs[0].tx.send(&bytes));
    }
    guest.pairs[0].tx.queue.publish();
    let Pair { rx, tx } = &guest.pairs[0];
    rx.queue.start(&guest.front);
    // No kick follows: a started ring is looked at once without (a lost kick would be for ever).
    tx.queue.start(&guest.front);
    until("all frames are back", || {
        while let Some(received) = guest.pairs[0].rx.receive() {
            flows.came_back(&received.frame);
        }
        flows.total_received() == 50
    });
    all_counted(&port.lanes(), &flows);
    port.daemon.stop();
}
