//! Ports whose pairs are spread over several poll cores, a lane a direction on each.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::queues::sets_change;
use crate::support::daemon::{Control, Daemon, Lanes};
use crate::support::frame::Frame;
use crate::support::guest::{Flows, Guest, Plan};
use crate::support::until;
use crate::{Port, all_counted};

const CORES: &str = "0-1";

/// What each lane counted, by direction, with its CPU; and that its sums are the port's.
fn each(daemon: &Daemon) -> [Vec<(u64, u64)>; 2] {
    let stats = daemon.call("stats", json!({"id": "port"})).expect("stats");
    let port = &stats["ports"][0];
    ["guest_to_vf", "vf_to_guest"].map(|direction| {
        let number = |value: &Value| value.as_u64().expect("a number");
        let lanes = port["lanes"][direction].as_array().expect("lanes");
        let lanes: Vec<_> = lanes.iter().map(|lane| (number(&lane["cpu"]), number(&lane["packets"]))).collect();
        let sum: u64 = lanes.iter().map(|(_, packets)| packets).sum();
        assert!(sum <= number(&port[direction]["packets"]), "{stats}");
        lanes
    })
}

#[test]
fn four_pairs_on_two_cores() {
    let port = Port::on_cores(CORES, "soft:loop", 4);
    let show = port.daemon.show("port");
    assert_eq!(show["lanes"], json!({"guest_to_vf": [0, 1], "vf_to_guest": [0, 1]}));
    let mut guest = port.guest(&Plan::pairs(4));
    let mut flows = Flows::new(64);
    flows.exchange(&mut guest, &[0, 1, 2, 3], 20_000, 1000);
    all_counted(&port.lanes(), &flows);
    // 16 flows a pair, all alike.
    assert_eq!(each(&port.daemon), [[(0, 10_000), (1, 10_000)], [(0, 10_000), (1, 10_000)]]);
    let cpus = |show: &Value| (0..8).map(|ring| show["guest"]["rings"][ring]["cpu"].clone()).collect::<Vec<_>>();
    assert_eq!(cpus(&port.daemon.show("port")), [0, 0, 1, 1, 0, 0, 1, 1].map(|cpu| json!(cpu)));
    port.goodbye(guest);
    port.daemon.stop();
}

#[test]
fn sets_of_enabled_pairs_change_under_traffic_on_several_cores() {
    sets_change(Port::on_cores(CORES, "soft:loop", 4), Plan::pairs(4).features);
}

fn place(control: &mut Control, socket: &Path, cores: &Value) {
    let params = json!({
        "id": "port", "vfs": ["soft:loop"], "socket": {"path": socket}, "queue_pairs": 4, "cores": cores,
    });
    let answer = control.call("port.attach", params).expect("attach");
    assert_eq!(answer["pending"], json!([]));
}

/// Other cores, and fewer and more of them, while frames are under way: nothing is lost, and flows stay in order.
#[test]
fn lanes_come_and_go_under_traffic() {
    let port = Port::on_cores(CORES, "soft:loop", 4);
    let mut guest = port.guest(&Plan::pairs(4));
    let mut flows = Flows::new(64);
    let mut control = port.daemon.control();
    let socket = port.socket.clone();
    let mover = std::thread::spawn(move || {
        for _ in 0..40 {
            for cores in [json!([0]), json!([0, 1]), json!([0, 1, 1, 0]), json!([1]), json!([1, 0, 1, 0])] {
                place(&mut control, &socket, &cores);
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    });
    while !mover.is_finished() {
        flows.exchange(&mut guest, &[0, 1, 2, 3], 2000, 1000);
    }
    mover.join().expect("all moves were made");
    all_counted(&port.lanes(), &flows);
    let moved = port.daemon.show("port");
    assert_eq!(moved["lanes"], json!({"guest_to_vf": [1, 0], "vf_to_guest": [1, 0]}));
    assert_eq!(moved["cores"], json!([1, 1]));
    flows.exchange(&mut guest, &[0, 1, 2, 3], 2_000, 1000);
    port.goodbye(guest);
    port.daemon.stop();
}

fn fault(daemon: &Daemon, ring: usize) -> bool {
    daemon.show("port")["guest"]["rings"][ring]["fault"] != Value::Null
}

/// A TX ring that lies is stopped; the pairs of the other lane do not notice, nor the other pair of its own.
#[test]
fn a_quarantined_ring_leaves_the_other_lanes() {
    let port = Port::on_cores(CORES, "soft:loop", 4);
    let mut guest = port.guest(&Plan::pairs(4));
    let mut flows = Flows::new(48);
    flows.exchange(&mut guest, &[0, 2, 3], 3000, 1000);
    let tx = &guest.pairs[1].tx.queue;
    tx.write_avail_idx(tx.avail_idx().wrapping_add(300));
    tx.kick_now();
    until("the ring is quarantined", || {
        flows.exchange(&mut guest, &[0, 2, 3], 300, 1000);
        fault(&port.daemon, 3)
    });
    flows.exchange(&mut guest, &[0, 2, 3], 3000, 1000);
    assert!((0..8).all(|ring| fault(&port.daemon, ring) == (ring == 3)));
    all_counted(&port.lanes(), &flows);
    drop(guest);
    port.daemon.until_guest("port", false);
    port.daemon.stop();
}

/// An RX ring that lies, the only one of its lane: what the VF has for it comes to the rings of the other lane, and
/// until then is dropped and counted.
#[test]
fn frames_of_a_quarantined_lane_go_to_another() {
    let port = Port::on_cores(CORES, "soft:loop", 2);
    let mut guest = port.guest(&Plan::pairs(2));
    let mut flows = Flows::new(16);
    flows.exchange(&mut guest, &[0, 1], 1600, 1000);
    let rx = &guest.pairs[1].rx.queue;
    rx.write_avail_idx(rx.avail_idx().wrapping_add(300));
    rx.kick_now();
    // By pair. The ring takes what fits into the buffers that it knows of, before it sees the lie.
    let (mut sent, mut received) = (0, [0, 0]);
    let mut send = |guest: &mut Guest| {
        let frame = Frame { flow: 99, seq: sent, len: 100 };
        guest.pairs[1].tx.reap();
        assert!(guest.pairs[1].tx.send(&frame.bytes()));
        guest.pairs[1].tx.flush();
        sent += 1;
        sent
    };
    let dropped = |lanes: &Lanes| lanes.vf_to_guest.dropped.not_ready;
    until("frames sent on pair 1 come back on pair 0", || {
        let sent = u64::from(send(&mut guest));
        until("it met its fate", || {
            for (received, pair) in received.iter_mut().zip(&mut guest.pairs) {
                *received += std::iter::from_fn(|| pair.rx.take()).count() as u64;
            }
            received[0] + received[1] + dropped(&port.lanes()) == sent
        });
        received[0] >= 10
    });
    assert!((0..4).all(|ring| fault(&port.daemon, ring) == (ring == 2)));
    let lanes = port.lanes();
    assert_eq!(lanes.guest_to_vf.dropped.total(), 0);
    assert_eq!(lanes.vf_to_guest.dropped.total(), dropped(&lanes), "{lanes:?}");
    assert_eq!(lanes.vf_to_guest.packets, 1600 + received[0] + received[1]);
    drop(guest);
    port.daemon.until_guest("port", false);
    port.daemon.stop();
}
