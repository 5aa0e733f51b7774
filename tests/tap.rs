//! A guest and the kernel's network stack, through `net_tap`: real frames, real checks, both ways.
#![cfg(feature = "dpdk")]

mod support;

use support::daemon::Daemon;
use support::guest::{Guest, Plan};
use support::tap::{Tap, available, interface_name};
use support::{skip, until};

#[test]
fn datagrams_reach_the_kernel_and_come_back_byte_by_byte() {
    if let Err(reason) = available() {
        skip!("datagrams_reach_the_kernel_and_come_back_byte_by_byte", "{reason}");
    }
    let daemon = Daemon::start();
    let name = interface_name();
    let socket = daemon.attach("port", &format!("vdev:net_tap0,iface={name}"), 1);
    let mut guest = Guest::connect(&socket, &Plan::default());
    let tap = Tap::set_up(&name);
    let payload = |seq: usize| -> Vec<u8> {
        let len = 4 + seq * 53 % 1465;
        (0..len).map(|i| (seq * 7 + i * i) as u8).collect()
    };
    let mut buffer = [0; 2048];
    for first in (0..1000).step_by(20) {
        let batch = first..first + 20;
        for seq in batch.clone() {
            assert!(guest.pairs[0].tx.send(&tap.frame(&payload(seq))));
        }
        guest.pairs[0].tx.flush();
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
    assert!(lanes.vf_to_guest.packets >= 1000, "{lanes:?}");
    daemon.detach("port");
    assert!(!std::path::Path::new(&format!("/sys/class/net/{name}")).exists(), "the tap is gone with the VF");
    daemon.stop();
}
