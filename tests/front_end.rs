//! Our own test client against somebody else's back end (DPDK's vhost): what the other tests find
//! wrong with the daemon is the daemon's fault and not the client's.

mod support;

use support::frontend::{FrontEnd, Verdict, feature, pair, request};
use support::guest::{Flows, Guest, Plan};
use support::skip;
use support::testpmd::Testpmd;
use support::tx::Shape;

struct Peer {
    dir: tempfile::TempDir,
    _testpmd: Testpmd,
}

impl Peer {
    /// testpmd as a back end that sends everything back.
    fn start(queues: usize) -> Option<Self> {
        let dir = tempfile::tempdir().expect("temporary directory");
        let socket = dir.path().join("peer.sock");
        let vdev = format!("net_vhost0,iface={},queues={queues}", socket.display());
        let (rxq, txq) = (format!("--rxq={queues}"), format!("--txq={queues}"));
        let args = ["--forward-mode=io", &rxq, &txq];
        let mut testpmd = Testpmd::start(&[vdev], &args)?;
        testpmd.command("start");
        Some(Self { dir, _testpmd: testpmd })
    }

    fn guest(&self, plan: &Plan) -> Guest {
        Guest::connect(&self.dir.path().join("peer.sock"), plan)
    }
}

#[test]
fn frames_come_back_from_a_dpdk_back_end() {
    let Some(peer) = Peer::start(1) else {
        skip!("frames_come_back_from_a_dpdk_back_end", "no dpdk-testpmd");
    };
    let base = Plan::default();
    let indirect = feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT;
    let every_byte: Vec<usize> = (1..64).collect();
    // Plan, frames on their way at most, frames, longest frame.
    let plans = [
        (base.clone(), 64, 2000, 1514),
        (Plan { size: 32768, ..base.clone() }, 256, 70_000, 100),
        (Plan { size: 64, shape: Shape::cut(&every_byte), ..base.clone() }, 1, 200, 1514),
        (Plan { rx_pieces: vec![300], shape: Shape::cut(&[1, 7, 12, 13, 30]), ..base.clone() }, 16, 2000, 1514),
        (Plan { rx_pieces: vec![12, 100, 700], ..base.clone() }, 8, 2000, 1514),
        (Plan { features: indirect, shape: Shape::indirect(&[12]), ..base.clone() }, 64, 2000, 1514),
        (Plan { features: 0, shape: Shape::cut(&[10]), rx_pieces: vec![10, 1514], ..base }, 64, 2000, 1514),
    ];
    for (plan, window, frames, max_len) in plans {
        let mut guest = peer.guest(&plan);
        guest.pairs[0].rx.strict = false;
        let mut flows = Flows::new(3).window(window);
        flows.exchange(&mut guest, &[0], frames, max_len);
        guest.stop();
    }
}

/// The packed driver, too, which knows nothing of the daemon's own tests.
#[test]
fn frames_come_back_from_a_dpdk_back_end_over_packed_rings() {
    let Some(peer) = Peer::start(1) else {
        skip!("frames_come_back_from_a_dpdk_back_end_over_packed_rings", "no dpdk-testpmd");
    };
    let base = Plan { features: Plan::default().features | feature::RING_PACKED, ..Plan::default() };
    let indirect = feature::VERSION_1 | feature::RING_PACKED | feature::EVENT_IDX | feature::INDIRECT;
    let in_order = base.features | feature::IN_ORDER;
    let plans = [
        (base.clone(), 64, 2000, 1514),
        (Plan { size: 32768, ..base.clone() }, 256, 70_000, 100),
        (Plan { size: 300, shape: Shape::cut(&[1, 7, 12, 13, 30]), ..base.clone() }, 16, 2000, 1514),
        (Plan { rx_pieces: vec![300], ..base.clone() }, 16, 2000, 1514),
        (Plan { features: indirect, shape: Shape::indirect(&[12]), ..base.clone() }, 64, 2000, 1514),
        (Plan { features: in_order, ..base }, 64, 2000, 1514),
    ];
    for (plan, window, frames, max_len) in plans {
        let mut guest = peer.guest(&plan);
        guest.pairs[0].rx.strict = false;
        Flows::new(3).window(window).exchange(&mut guest, &[0], frames, max_len);
        // It answers GET_VRING_BASE with half of what the specification wants.
        drop(guest);
    }
}

#[test]
fn a_driver_that_sleeps_is_woken_by_a_dpdk_back_end() {
    let Some(peer) = Peer::start(1) else {
        skip!("a_driver_that_sleeps_is_woken_by_a_dpdk_back_end", "no dpdk-testpmd");
    };
    let packed = feature::RING_PACKED;
    for features in [0, feature::EVENT_IDX, packed, packed | feature::EVENT_IDX] {
        let features = Plan::default().features | features;
        let mut guest = peer.guest(&Plan { features, size: 64, ..Plan::default() });
        Flows::new(1).exchange_sleeping(&mut guest, 1000);
    }
}

#[test]
fn several_queue_pairs_of_a_dpdk_back_end() {
    let Some(peer) = Peer::start(4) else {
        skip!("several_queue_pairs_of_a_dpdk_back_end", "no dpdk-testpmd");
    };
    let mut guest = peer.guest(&Plan::pairs(4));
    let mut flows = Flows::new(64);
    flows.exchange(&mut guest, &[0, 1, 2, 3], 6400, 600);
    assert_eq!(flows.total_received(), 6400);
}

#[test]
fn a_dpdk_back_end_survives_a_ring_out_of_range() {
    let Some(peer) = Peer::start(1) else {
        skip!("a_dpdk_back_end_survives_a_ring_out_of_range", "no dpdk-testpmd");
    };
    let front = FrontEnd::connect(&peer.dir.path().join("peer.sock"));
    let verdict = front.verdict(request::SET_VRING_NUM, &pair(1 << 16, 256), &[]);
    assert_eq!(verdict, Verdict::Closed);
    let mut guest = peer.guest(&Plan::default());
    Flows::new(1).exchange(&mut guest, &[0], 100, 100);
}
