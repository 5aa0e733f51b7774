//! `dpdk-testpmd`'s virtio-user device as the guest: somebody else's driver and front end, packet-exact.

mod support;

use std::path::Path;

use support::daemon::{Attach, Daemon, Lanes, Options};
use support::frame::Frame;
use support::testpmd::{PortStats, Testpmd, VirtioUser};
use support::{skip, until};

/// VFs that send back what they are sent.
const LOOPS: &[&str] = &[
    "soft:loop",
    #[cfg(feature = "dpdk")]
    "vdev:net_ring0",
];

/// A VF that only swallows.
const SINK: &str = if cfg!(feature = "dpdk") { "vdev:net_null0,no-rx=1" } else { "soft:null" };

/// A port and testpmd on it.
struct Pair {
    daemon: Daemon,
    testpmd: Testpmd,
}

impl Pair {
    fn start(vf: &str, device: &VirtioUser, args: &[&str]) -> Option<Self> {
        Self::with(Options::default(), vf, device, args)
    }

    fn with(options: Options, vf: &str, device: &VirtioUser, args: &[&str]) -> Option<Self> {
        support::program("dpdk-testpmd")?;
        let daemon = Daemon::with(options);
        let socket = daemon.socket("port.sock");
        daemon.attach_as(&Attach {
            id: "port".into(),
            socket: socket.clone(),
            client: device.server,
            vf: vf.into(),
            queues: device.queues,
            mtu: None,
        });
        let testpmd = Testpmd::guest(&socket, device, args)?;
        until_all_enabled(&daemon, device.queues);
        Some(Self { daemon, testpmd })
    }

    fn lanes(&self) -> Lanes {
        self.daemon.lanes("port")
    }

    /// Waits until the daemon has moved all that testpmd sent.
    fn settle(&mut self) -> (PortStats, Lanes) {
        let sent = self.testpmd.port_stats(0);
        until("all sent frames are accounted for", || {
            let lane = self.lanes().guest_to_vf;
            lane.packets + lane.dropped.total() == sent.tx_packets
        });
        (sent, self.lanes())
    }

    fn end(self) {
        self.testpmd.quit();
        self.daemon.until_guest("port", false);
        self.daemon.stop();
    }
}

/// virtio-user waits for no answer: it may send before the daemon has come to its last message.
fn until_all_enabled(daemon: &Daemon, pairs: usize) {
    until("all rings run", || {
        let show = daemon.show("port");
        (0..2 * pairs).all(|i| {
            let ring = &show["guest"]["rings"][i];
            ring["running"] == true && ring["enabled"] == true
        })
    });
}

/// Frames that circle between guest and VF until testpmd stops, then every one of them is accounted for.
fn circles(vf: &str, device: &VirtioUser) {
    let Some(mut pair) = Pair::start(vf, device, &["--forward-mode=io"]) else {
        skip!("virtio_user", "no dpdk-testpmd");
    };
    circle(&mut pair, device);
    pair.end();
}

fn circle(pair: &mut Pair, device: &VirtioUser) {
    // 64 frames a queue circulate: fewer than any ring here holds, so none may be dropped.
    pair.testpmd.command("start tx_first 2");
    until("frames circle", || pair.lanes().vf_to_guest.packets > 20 * 64 * device.queues as u64);
    pair.testpmd.command("stop");
    let (sent, lanes) = pair.settle();
    assert_eq!(lanes.guest_to_vf.packets, sent.tx_packets, "{device:?} {lanes:?}");
    assert_eq!(lanes.guest_to_vf.bytes, sent.tx_bytes, "{device:?} {lanes:?}");
    until("all are back", || pair.lanes().vf_to_guest.packets == sent.tx_packets);
    // What testpmd has not yet read lies in its rings: it reads it now.
    pair.testpmd.command("set fwd rxonly");
    pair.testpmd.command("start");
    until("testpmd has read its rings", || pair.testpmd.port_stats(0).rx_packets == sent.tx_packets);
    pair.testpmd.command("stop");
    let received = pair.testpmd.port_stats(0);
    let lanes = pair.lanes();
    assert_eq!(lanes.vf_to_guest.packets, received.rx_packets, "{device:?} {lanes:?}");
    assert_eq!(lanes.vf_to_guest.bytes, received.rx_bytes, "{device:?} {lanes:?}");
    assert_eq!(lanes.guest_to_vf.dropped.total(), 0, "{device:?} {lanes:?}");
    assert_eq!(lanes.vf_to_guest.dropped.total(), 0, "{device:?} {lanes:?}");
}

fn matrix(queues: usize) {
    for mergeable in [false, true] {
        for queue_size in [256, 1024] {
            for server in [false, true] {
                for vf in LOOPS {
                    let in_order = false;
                    circles(vf, &VirtioUser { queues, mergeable, queue_size, server, in_order, ..Default::default() });
                }
            }
        }
    }
}

/// Of other formats than the plain split ring. 300: a packed ring's size is any number.
fn formats(packed: bool, in_order: bool) {
    let sizes: &[u16] = if packed { &[256, 300, 1024] } else { &[256, 1024] };
    for mergeable in [false, true] {
        for &queue_size in sizes {
            for (queues, server, vectorized) in [(1, false, false), (1, false, true), (3, true, false)] {
                let device = VirtioUser { queues, mergeable, queue_size, server, packed, in_order, vectorized };
                circles(LOOPS[usize::from(mergeable) % LOOPS.len()], &device);
            }
        }
    }
}

#[test]
fn split_rings_in_order() {
    formats(false, true);
}

#[test]
fn packed_rings() {
    formats(true, false);
}

#[test]
fn packed_rings_in_order() {
    formats(true, true);
}

#[test]
fn one_queue_pair() {
    matrix(1);
}

#[test]
fn two_queue_pairs() {
    matrix(2);
}

#[test]
fn three_queue_pairs() {
    matrix(3);
}

#[test]
fn four_queue_pairs() {
    matrix(4);
}

/// Each core has two pairs, and moves what is theirs.
#[test]
fn four_queue_pairs_on_two_cores() {
    for vf in LOOPS {
        for (packed, in_order) in [(false, true), (true, false)] {
            let device = VirtioUser { queues: 4, packed, in_order, ..VirtioUser::default() };
            let options = Options { cores: Some("0-1"), ..Options::default() };
            let Some(mut pair) = Pair::with(options, vf, &device, &["--forward-mode=io"]) else {
                skip!("four_queue_pairs_on_two_cores", "no dpdk-testpmd");
            };
            circle(&mut pair, &device);
            let stats = pair.daemon.call("stats", serde_json::json!({"id": "port"})).expect("stats");
            let port = &stats["ports"][0];
            for direction in ["guest_to_vf", "vf_to_guest"] {
                let packets = [0, 1].map(|lane| {
                    assert_eq!(port["lanes"][direction][lane]["cpu"], lane);
                    port["lanes"][direction][lane]["packets"].as_u64().expect("a number")
                });
                // Two pairs each, in which 64 frames circle: more than once. One core is testpmd's, too.
                assert!(packets.iter().all(|packets| *packets > 2 * 64), "{vf} {device:?} {direction} {packets:?}");
                assert_eq!(port[direction]["packets"], packets[0] + packets[1]);
            }
            pair.end();
        }
    }
}

#[test]
fn as_fast_as_it_sends() {
    for (packed, in_order) in [(false, false), (false, true), (true, false), (true, true)] {
        sends(&VirtioUser { queues: 2, packed, in_order, ..VirtioUser::default() });
    }
}

fn sends(device: &VirtioUser) {
    for size in ["64", "1514", "64,64,64"] {
        let Some(mut pair) = Pair::start(SINK, device, &["--forward-mode=txonly"]) else {
            skip!("as_fast_as_it_sends", "no dpdk-testpmd");
        };
        pair.testpmd.command(&format!("set txpkts {size}"));
        pair.testpmd.command("start");
        until("frames flow", || pair.lanes().guest_to_vf.packets > 200_000);
        pair.testpmd.command("stop");
        let (sent, lanes) = pair.settle();
        assert_eq!(lanes.guest_to_vf.packets, sent.tx_packets, "{size}: {lanes:?}");
        assert_eq!(lanes.guest_to_vf.bytes, sent.tx_bytes, "{size}: {lanes:?}");
        assert_eq!(lanes.guest_to_vf.dropped.total(), 0, "{size}: {lanes:?}");
        pair.end();
    }
}

#[test]
fn every_byte_of_a_capture_comes_back() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (sent, received) = (dir.path().join("sent.pcap"), dir.path().join("received.pcap"));
    // Fewer frames than a ring has entries: nothing can overflow, so nothing may be lost.
    let frames: Vec<Vec<u8>> = (0..500_u32)
        .map(|seq| Frame { flow: (seq % 8) as u16, seq, len: 60 + seq as usize * 29 % 1455 }.bytes())
        .collect();
    write_capture(&sent, &frames);
    let formats = [(false, false), (false, true), (true, false), (true, true)];
    for (vf, (packed, in_order)) in LOOPS.iter().flat_map(|vf| formats.map(|format| (vf, format))) {
        let device = VirtioUser { packed, in_order, ..VirtioUser::default() };
        let pcap = format!("net_pcap0,rx_pcap={},tx_pcap={}", sent.display(), received.display());
        let args = ["--forward-mode=io", "--port-topology=paired"];
        let daemon = Daemon::start();
        let socket = daemon.attach("port", vf, 1);
        let Some(mut testpmd) = Testpmd::guest_beside(&socket, &device, &pcap, &args) else {
            skip!("every_byte_of_a_capture_comes_back", "no dpdk-testpmd");
        };
        until_all_enabled(&daemon, 1);
        testpmd.command("start");
        until("all frames went to the capture", || testpmd.port_stats(1).tx_packets == 500);
        testpmd.command("stop");
        testpmd.quit();
        assert!(read_capture(&received) == frames, "{vf} {device:?}: the capture differs");
        let lanes = daemon.lanes("port");
        let bytes: usize = frames.iter().map(Vec::len).sum();
        for lane in [lanes.guest_to_vf, lanes.vf_to_guest] {
            assert_eq!((lane.packets, lane.bytes, lane.dropped.total()), (500, bytes as u64, 0), "{vf} {device:?}");
        }
        daemon.stop();
    }
}

#[test]
fn a_killed_guest_leaves_a_port_for_the_next() {
    let device = VirtioUser { queues: 2, queue_size: 256, packed: true, ..VirtioUser::default() };
    let daemon = Daemon::start();
    let socket = daemon.attach("port", "soft:loop", 2);
    let mut before = None;
    for _ in 0..4 {
        let Some(mut testpmd) = Testpmd::guest(&socket, &device, &["--forward-mode=io"]) else {
            skip!("a_killed_guest_leaves_a_port_for_the_next", "no dpdk-testpmd");
        };
        daemon.until_guest("port", true);
        let start = daemon.lanes("port").vf_to_guest.packets;
        testpmd.command("start tx_first 2");
        until("frames circle", || daemon.lanes("port").vf_to_guest.packets > start + 5000);
        testpmd.kill();
        daemon.until_guest("port", false);
        match &before {
            None => before = Some(daemon.census()),
            Some(before) => daemon.until_census(before),
        }
    }
    daemon.stop();
}

/// testpmd's port is stopped and started, then given another number of queues: the device is reset under the daemon.
#[test]
fn a_guest_that_starts_its_device_anew() {
    for (packed, in_order) in [(false, true), (true, false), (true, true)] {
        let device = VirtioUser { queues: 2, packed, in_order, queue_size: 256, ..VirtioUser::default() };
        let Some(mut pair) = Pair::start("soft:loop", &device, &["--forward-mode=io"]) else {
            skip!("a_guest_that_starts_its_device_anew", "no dpdk-testpmd");
        };
        for round in 0..4 {
            let before = pair.lanes().vf_to_guest.packets;
            pair.testpmd.command("start tx_first 2");
            until("frames circle", || pair.lanes().vf_to_guest.packets > before + 5000);
            pair.testpmd.command("stop");
            pair.testpmd.command("port stop 0");
            if round % 2 == 1 {
                let queues = 1 + round / 2;
                pair.testpmd.command(&format!("port config all rxq {queues}"));
                pair.testpmd.command(&format!("port config all txq {queues}"));
            }
            pair.testpmd.command("port start 0");
        }
        let before = pair.lanes().vf_to_guest.packets;
        pair.testpmd.command("start tx_first 2");
        until("frames circle", || pair.lanes().vf_to_guest.packets > before + 5000);
        pair.end();
    }
}

/// The daemon is killed. Nobody but it knew where it was in a packed ring, so virtio-user starts its rings anew.
#[test]
fn the_daemon_restarts_under_a_guest_with_packed_rings() {
    let device = VirtioUser { queues: 2, server: true, packed: true, ..VirtioUser::default() };
    let Some(Pair { mut daemon, mut testpmd }) = Pair::start("soft:loop", &device, &["--forward-mode=io"]) else {
        skip!("the_daemon_restarts_under_a_guest_with_packed_rings", "no dpdk-testpmd");
    };
    for _ in 0..3 {
        testpmd.command("start tx_first 2");
        until("frames circle", || daemon.lanes("port").vf_to_guest.packets > 5000);
        testpmd.command("stop");
        daemon.kill();
        daemon.restart();
        daemon.attach_as(&Attach {
            id: "port".into(),
            socket: daemon.socket("port.sock"),
            client: true,
            vf: "soft:loop".into(),
            queues: device.queues,
            mtu: None,
        });
        until_all_enabled(&daemon, device.queues);
    }
    let before = daemon.lanes("port").vf_to_guest.packets;
    testpmd.command("start tx_first 2");
    until("frames circle", || daemon.lanes("port").vf_to_guest.packets > before + 5000);
    testpmd.quit();
    daemon.stop();
}

/// A capture file (libpcap's classic format, microseconds, Ethernet).
fn write_capture(path: &Path, frames: &[Vec<u8>]) {
    let mut file: Vec<u8> = Vec::new();
    for word in [0xa1b2_c3d4_u32, 4 << 16 | 2, 0, 0, 65535, 1] {
        file.extend(word.to_ne_bytes());
    }
    for frame in frames {
        let len = frame.len() as u32;
        for word in [0, 0, len, len] {
            file.extend(word.to_ne_bytes());
        }
        file.extend(frame);
    }
    std::fs::write(path, file).expect("capture file");
}

fn read_capture(path: &Path) -> Vec<Vec<u8>> {
    let file = std::fs::read(path).expect("capture file");
    let mut rest = &file[24..];
    let mut frames = Vec::new();
    while !rest.is_empty() {
        let len = u32::from_ne_bytes(rest[8..12].try_into().expect("4 bytes")) as usize;
        frames.push(rest[16..16 + len].to_vec());
        rest = &rest[16 + len..];
    }
    frames
}
