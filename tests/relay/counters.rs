//! What the guest sent = what the VF accepted + what was dropped, each by its cause.

use std::time::Duration;

use crate::Port;
use crate::support::daemon::{Attach, Daemon};
use crate::support::frame::Frame;
use crate::support::frontend::feature::VERSION_1;
use crate::support::guest::{Flows, Guest, Plan};
use crate::support::until;

/// Sends `n` frames of `len` bytes over one pair; returns when all chains are back.
fn send(guest: &mut Guest, pair: usize, n: u32, len: usize) {
    let tx = &mut guest.pairs[pair].tx;
    for seq in 0..n {
        let bytes = Frame { flow: pair as u16, seq, len }.bytes();
        while !tx.send(&bytes) {
            tx.flush();
        }
    }
    tx.flush();
    until("all sent chains are back", || {
        tx.reap();
        tx.queue.outstanding() == 0
    });
}

#[test]
fn what_a_null_vf_swallows_is_counted() {
    let port = Port::new("soft:null", 1);
    let mut guest = port.guest(&Plan::default());
    send(&mut guest, 0, 10_000, 200);
    let lanes = port.lanes();
    assert_eq!(lanes.guest_to_vf.packets, 10_000);
    assert_eq!(lanes.guest_to_vf.bytes, 10_000 * 200);
    assert_eq!(lanes.guest_to_vf.dropped.total(), 0);
    assert_eq!(lanes.vf_to_guest.packets, 0);
    assert_eq!(lanes.vf_to_guest.dropped.total(), 0);
    port.goodbye(guest);
    port.daemon.stop();
}

#[test]
fn frames_for_a_guest_without_buffers() {
    let port = Port::new("soft:loop", 1);
    let mut guest = port.guest(&Plan { post: false, ..Plan::default() });
    let rx = &mut guest.pairs[0].rx;
    for _ in 0..100 {
        assert!(rx.post());
    }
    rx.flush();
    send(&mut guest, 0, 1000, 300);
    until("every frame has met its fate", || {
        let lane = port.lanes().vf_to_guest;
        lane.packets + lane.dropped.total() == 1000
    });
    let lanes = port.lanes();
    assert_eq!(lanes.guest_to_vf.packets, 1000, "{lanes:?}");
    assert_eq!(lanes.guest_to_vf.dropped.total(), 0, "{lanes:?}");
    assert_eq!(lanes.vf_to_guest.packets, 100, "{lanes:?}");
    assert_eq!(lanes.vf_to_guest.dropped.guest_ring_empty, 900, "{lanes:?}");
    assert_eq!(lanes.vf_to_guest.dropped.total(), 900, "{lanes:?}");
    for seq in 0..100 {
        let received = guest.pairs[0].rx.take().expect("a delivered frame");
        assert_eq!(Frame::parse(&received.frame).seq, seq, "the oldest are delivered");
    }
    assert!(guest.pairs[0].rx.take().is_none());
    port.goodbye(guest);
    port.daemon.stop();
}

#[test]
fn frames_on_a_disabled_pair() {
    let port = Port::new("soft:loop", 2);
    let mut guest = port.guest(&Plan { enabled: vec![0], ..Plan::pairs(2) });
    send(&mut guest, 1, 500, 300);
    let lanes = port.lanes();
    assert_eq!(lanes.guest_to_vf.dropped.disabled, 500, "{lanes:?}");
    assert_eq!(lanes.guest_to_vf.dropped.total(), 500, "{lanes:?}");
    assert_eq!(lanes.guest_to_vf.packets, 0, "{lanes:?}");
    assert_eq!(guest.pairs[1].rx.queue.device_idx(), 0, "a disabled ring receives nothing");
    // Enabled, it forwards; disabled again, it drops again.
    guest.enable(1, true);
    let mut flows = Flows::new(1);
    flows.exchange(&mut guest, &[1], 300, 300);
    guest.enable(1, false);
    send(&mut guest, 1, 50, 300);
    let lanes = port.lanes();
    assert_eq!(lanes.guest_to_vf.packets, 300, "{lanes:?}");
    assert_eq!(lanes.guest_to_vf.dropped.disabled, 550, "{lanes:?}");
    assert_eq!(lanes.vf_to_guest.packets, 300, "{lanes:?}");
    port.goodbye(guest);
    port.daemon.stop();
}

#[test]
fn frames_longer_than_the_ports_mtu() {
    let port = Port::new("soft:loop", 1);
    let mut guest = port.guest(&Plan { tx_slot: 4096, rx_pieces: vec![4096], ..Plan::default() });
    // 1500 bytes behind an Ethernet header pass; no tag makes 100 bytes more.
    for len in [1514, 1614, 1514, 3000] {
        send(&mut guest, 0, 10, len);
    }
    until("all frames that fit are back", || port.lanes().vf_to_guest.packets == 20);
    let lanes = port.lanes();
    assert_eq!(lanes.guest_to_vf.packets, 20, "{lanes:?}");
    assert_eq!(lanes.guest_to_vf.bytes, 20 * 1514, "{lanes:?}");
    assert_eq!(lanes.guest_to_vf.dropped.oversize, 20, "{lanes:?}");
    assert_eq!(lanes.guest_to_vf.dropped.total(), 20, "{lanes:?}");
    port.goodbye(guest);
    port.daemon.stop();
}

#[test]
fn jumbo_frames() {
    let daemon = Daemon::start();
    let socket = daemon.socket("jumbo.sock");
    daemon.attach_as(&Attach {
        id: "jumbo".into(),
        socket: socket.clone(),
        client: false,
        vf: "soft:loop".into(),
        queues: 1,
        mtu: Some(9000),
    });
    let mut guest = Guest::connect(&socket, &Plan { tx_slot: 9216, ..Plan::default() });
    let mut flows = Flows::new(2).window(32);
    flows.exchange(&mut guest, &[0], 2000, 9014);
    let lanes = daemon.lanes("jumbo");
    crate::all_counted(&lanes, &flows);
    drop(guest);
    daemon.stop();
}

#[test]
fn frames_longer_than_the_guests_buffers() {
    let port = Port::new("soft:loop", 1);
    let plan = Plan { features: VERSION_1, rx_pieces: vec![12 + 500], ..Plan::default() };
    let mut guest = port.guest(&plan);
    for _ in 0..20 {
        send(&mut guest, 0, 1, 500);
        send(&mut guest, 0, 1, 501);
    }
    until("every frame has met its fate", || {
        let lane = port.lanes().vf_to_guest;
        lane.packets + lane.dropped.total() == 40
    });
    let lanes = port.lanes();
    assert_eq!(lanes.vf_to_guest.packets, 20, "{lanes:?}");
    assert_eq!(lanes.vf_to_guest.dropped.oversize, 20, "{lanes:?}");
    assert_eq!(lanes.vf_to_guest.dropped.total(), 20, "{lanes:?}");
    for _ in 0..20 {
        let received = guest.pairs[0].rx.take().expect("a delivered frame");
        assert_eq!(received.frame.len(), 500);
    }
    port.goodbye(guest);
    port.daemon.stop();
}

#[test]
fn counters_outlive_connections() {
    let port = Port::new("soft:loop", 1);
    let mut sent = 0;
    for round in 1..=5 {
        let mut guest = port.guest(&Plan::default());
        let mut flows = Flows::new(1);
        flows.exchange(&mut guest, &[0], 100 * round, 300);
        sent += flows.total_sent();
        port.goodbye(guest);
        let lanes = port.lanes();
        assert_eq!(lanes.guest_to_vf.packets, sent);
        assert_eq!(lanes.vf_to_guest.packets, sent);
    }
    port.daemon.stop();
}

#[test]
fn nothing_happens_while_nothing_happens() {
    let port = Port::new("soft:loop", 1);
    let mut guest = port.guest(&Plan::default());
    Flows::new(1).exchange(&mut guest, &[0], 100, 300);
    // The last notification is counted behind what is seen of it.
    let mut before = port.lanes();
    until("the last notification is counted", || {
        std::thread::sleep(Duration::from_millis(50));
        std::mem::replace(&mut before, port.lanes()) == before
    });
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(port.lanes(), before, "an idle port counts");
    port.goodbye(guest);
    port.daemon.stop();
}
