//! A guest and the kernel's network stack, through `net_tap`: real frames, real checks, both ways.
#![cfg(feature = "dpdk")]

mod support;

use support::daemon::{Daemon, Lanes};
use support::guest::{Guest, Plan};
use support::tap::{Tap, available, interface_name, ip};
use support::{skip, until};

#[test]
fn datagrams_reach_the_kernel_and_come_back_byte_by_byte() {
    if let Err(reason) = available() {
        skip!("datagrams_reach_the_kernel_and_come_back_byte_by_byte", "{reason}");
    }
    let name = interface_name();
    let lanes = datagrams(&format!("vdev:net_tap0,iface={name}"), &name);
    assert_eq!(lanes.vf_to_guest.zero_copied, 0, "a tap's queue holds buffers before there are frames");
    assert!(!std::path::Path::new(&format!("/sys/class/net/{name}")).exists(), "the tap is gone with the VF");
}

/// Through `net_af_packet`, which takes frames from where they lie and puts them where the guest wants them.
#[test]
fn datagrams_cross_a_veth_without_a_copy_in_either_direction() {
    if let Err(reason) = available() {
        skip!("datagrams_cross_a_veth_without_a_copy_in_either_direction", "{reason}");
    }
    let (ours, theirs) = (interface_name(), format!("{}b", interface_name()));
    ip(&["link", "add", &ours, "type", "veth", "peer", "name", &theirs]);
    ip(&["link", "set", &ours, "up"]);
    let lanes = datagrams(&format!("vdev:net_af_packet0,iface={ours}"), &theirs);
    ip(&["link", "del", &ours]);
    let counted = lanes.vf_to_guest;
    assert!((400..counted.packets).contains(&counted.zero_copied), "all but those while it was off: {counted:?}");
}

/// A thousand datagrams of all lengths each way, with `zero_copy` switched on and off while they are on their way.
fn datagrams(vf: &str, interface: &str) -> Lanes {
    let daemon = Daemon::start();
    let socket = daemon.attach("port", vf, 1);
    let mut guest = Guest::connect(&socket, &Plan::default());
    let tap = Tap::set_up(interface);
    until("the link is up", || daemon.show("port")["vf"]["link_up"] == true);
    let payload = |seq: usize| -> Vec<u8> {
        let len = 4 + seq * 53 % 1465;
        (0..len).map(|i| (seq * 7 + i * i) as u8).collect()
    };
    let mut buffer = [0; 2048];
    let zero_copy = |when: &str| {
        let socket = serde_json::json!({"path": daemon.socket("port.sock")});
        let request = serde_json::json!({"id": "port", "socket": socket, "vfs": [vf], "zero_copy": when});
        assert_eq!(daemon.call("port.attach", request).expect("attach")["pending"], serde_json::json!([]));
        let copies = &daemon.show("port")["copies"]["guest_to_vf"];
        assert_eq!(copies.as_str(), (when == "off").then_some("zero_copy is off"));
    };
    // Of frames of 256 bytes or more, in the second half.
    let (mut large, mut before, mut placed) = (0, 0, 0);
    for first in (0..1000).step_by(20) {
        let batch = first..first + 20;
        match first {
            500 => zero_copy("off"),
            740 => zero_copy("auto"),
            _ => {}
        }
        if first == 500 {
            let lanes = daemon.lanes("port");
            (before, placed) = (lanes.guest_to_vf.zero_copied, lanes.vf_to_guest.zero_copied);
            assert!((1..500).contains(&before));
        } else if first == 740 {
            let lanes = daemon.lanes("port");
            assert_eq!((lanes.guest_to_vf.zero_copied, lanes.vf_to_guest.zero_copied), (before, placed), "it is off");
        }
        for seq in batch.clone() {
            let frame = tap.frame(&payload(seq));
            large += u64::from(first >= 740 && frame.len() >= 256);
            assert!(guest.pairs[0].tx.send(&frame));
        }
        guest.pairs[0].tx.flush();
        if first < 500 {
            // With frames on their way.
            zero_copy(if first / 20 % 2 == 0 { "off" } else { "auto" });
        }
        for seq in batch.clone() {
            let len = tap.socket.recv(&mut buffer).expect("the guest's datagram");
            assert_eq!(buffer[..len], payload(seq), "guest to kernel, {seq}");
        }
        for seq in batch.clone() {
            tap.socket.send(&payload(seq)).expect("a datagram to the guest");
        }
        let mut seq = first;
        until("the kernel's datagrams arrive", || {
            while let Some(received) = guest.pairs[0].rx.receive() {
                if let Some(bytes) = tap.payload(&received.frame) {
                    assert_eq!(bytes, payload(seq), "kernel to guest, {seq}");
                    seq += 1;
                }
            }
            seq == batch.end
        });
    }
    let lanes = daemon.lanes("port");
    assert_eq!(lanes.guest_to_vf.packets, 1000, "{lanes:?}");
    assert_eq!(lanes.guest_to_vf.dropped.total(), 0, "{lanes:?}");
    assert_eq!(lanes.guest_to_vf.zero_copied, before + large, "{lanes:?}");
    assert!(lanes.vf_to_guest.packets >= 1000, "{lanes:?}");
    daemon.detach("port");
    daemon.stop();
    lanes
}

/// The tap goes, and comes back with a VF that is set up anew; the guest stays, and learns nothing of it.
#[test]
fn a_tap_that_is_deleted_in_use_is_made_again() {
    if let Err(reason) = available() {
        skip!("a_tap_that_is_deleted_in_use_is_made_again", "{reason}");
    }
    let daemon = Daemon::start();
    let name = interface_name();
    let index = || std::fs::read_to_string(format!("/sys/class/net/{name}/ifindex")).ok();
    let socket = daemon.attach("port", &format!("vdev:net_tap0,iface={name}"), 1);
    let mut guest = Guest::connect(&socket, &Plan::default());
    let first = index();
    ip(&["link", "del", &name]);
    until("the tap is there again", || index().is_some_and(|now| Some(now) != first));
    until("the port forwards again", || daemon.show("port")["state"] == "connected");
    assert_eq!(daemon.show("port")["reason"], serde_json::Value::Null);
    assert!(daemon.log().contains("was deleted while it was in use"), "{}", daemon.log());
    let tap = Tap::set_up(&name);
    until("the link is up", || daemon.show("port")["vf"]["link_up"] == true);
    let mut buffer = [0; 2048];
    // Until the lane has seen the link, what is sent is `not_ready`.
    tap.socket.set_read_timeout(Some(std::time::Duration::from_millis(100))).expect("timeout");
    until("a datagram gets through", || {
        guest.pairs[0].tx.reap();
        assert!(guest.pairs[0].tx.send(&tap.frame(b"again")));
        guest.pairs[0].tx.flush();
        tap.socket.recv(&mut buffer).is_ok_and(|len| &buffer[..len] == b"again")
    });
    daemon.detach("port");
    daemon.stop();
}

/// An interface of somebody else's: the port says what it waits for, and goes on when it is there.
#[test]
fn an_interface_that_is_deleted_in_use_is_waited_for() {
    if let Err(reason) = available() {
        skip!("an_interface_that_is_deleted_in_use_is_waited_for", "{reason}");
    }
    let daemon = Daemon::start();
    let (ours, theirs) = (interface_name(), format!("{}b", interface_name()));
    let vf = format!("vdev:net_af_packet0,iface={ours}");
    let request = serde_json::json!({"id": "port", "socket": {"path": daemon.socket("port.sock")}, "vfs": [vf]});
    let error = daemon.call("port.attach", request).expect_err("there is no such interface");
    assert!(error.message.contains(&ours) && error.message.contains("ip link add"), "{error:?}");
    let create = || {
        ip(&["link", "add", &ours, "type", "veth", "peer", "name", &theirs]);
        for name in [&ours, &theirs] {
            ip(&["link", "set", name, "up"]);
        }
    };
    create();
    daemon.attach("port", &vf, 1);
    assert_eq!(daemon.show("port")["state"], "ready");
    ip(&["link", "del", &ours]);
    until("the port waits", || daemon.show("port")["state"] == "waiting");
    until("it says for what", || daemon.show("port")["reason"].as_str().is_some_and(|text| text.contains(&ours)));
    create();
    until("the port forwards again", || daemon.show("port")["state"] == "ready");
    daemon.detach("port");
    ip(&["link", "del", &ours]);
    daemon.stop();
}
