//! How long a port waits for a lane that is out on a core: what every message of a running guest costs that
//! pauses it. `round_trip` is a recall, answered, and an adopt. *Idle*: the core polls and finds nothing; *asleep*: it
//! is to be woken first; *busy*: it relays 256 frames of 64 bytes for another lane in every turn.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use rustix::event::{EventfdFlags, eventfd};
use virtio_forwarder::Result;
use virtio_forwarder::relay::{
    Doorbell, GuestToVf, IdlePolicy, Lane, LaneCounters, LaneId, Poller, RingPlan, Trigger, Turn,
};
use virtio_forwarder::ring::RingFault;
use virtio_forwarder::vf::soft::SoftTx;
use virtio_forwarder::vf::{Queues, Vf, VfConfig, VfSpec};

mod rig;
use rig::{Driver, HEADER, Sender, plan};

const RING: u16 = 512;
const BUFFER: usize = 128;
const AT: usize = 64 * 1024;
const LEN: usize = AT + RING as usize * BUFFER;
/// Frames of a busy turn.
const TURN: u16 = 256;

/// A lane, and the driver's side of its ring.
fn lane(id: u64) -> (GuestToVf<SoftTx>, Sender) {
    let mut vf = Vf::probe(&VfSpec::SoftNull).unwrap();
    let tx = match vf.configure(&VfConfig { queues: 1, mtu: 1500, mac: None }).unwrap() {
        Queues::Soft(tx, _) => tx,
        #[cfg(feature = "dpdk")]
        Queues::Ethdev(..) => unreachable!("a soft VF"),
    };
    let driver = Sender::new(Driver::new(LEN, RING, 0), AT, BUFFER);
    let mut lane = GuestToVf::new(LaneId(id), 1, tx, Arc::new(true.into()), Arc::new(LaneCounters::default()));
    // With a kick to wait for, a core may sleep until it is woken.
    let kick = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
    let doorbell = Doorbell { kick: Some(Arc::new(kick)), ..Doorbell::default() };
    let mut plan = plan(&driver.ring, LEN);
    plan.config.event_idx = false;
    lane.insert_ring(0, RingPlan { doorbell, ..plan }).unwrap();
    (lane, driver)
}

/// A lane whose guest has always something to send: it offers the same frames again before each turn.
struct Busy {
    lane: GuestToVf<SoftTx>,
    driver: Sender,
}

impl Busy {
    fn new(id: u64) -> Self {
        let (lane, mut driver) = lane(id);
        (0..RING).for_each(|_| driver.send(&[0; HEADER], &[7; 64]));
        driver.ring.avail = 0;
        Self { lane, driver }
    }
}

impl Lane for Busy {
    fn id(&self) -> LaneId {
        self.lane.id()
    }

    fn turn(&mut self, turn: &Turn<'_>) -> usize {
        self.driver.ring.avail = self.driver.ring.avail.wrapping_add(TURN);
        self.driver.ring.publish();
        self.lane.turn(turn)
    }

    fn settle(&mut self, turn: &Turn<'_>) {
        self.lane.settle(turn);
    }

    fn doze(&mut self) -> bool {
        self.lane.doze()
    }

    fn wake(&mut self) {
        self.lane.wake();
    }

    fn wake_fds(&self, visit: &mut dyn FnMut(BorrowedFd<'_>, Trigger)) {
        self.lane.wake_fds(visit);
    }

    fn needs_naps(&self) -> bool {
        false
    }

    fn insert_ring(&mut self, pair: usize, plan: RingPlan) -> Result<()> {
        self.lane.insert_ring(pair, plan)
    }

    fn remove_ring(&mut self, pair: usize) -> Option<u16> {
        self.lane.remove_ring(pair)
    }

    fn fault(&self, pair: usize) -> Option<RingFault> {
        self.lane.fault(pair)
    }

    fn discard(&mut self) {
        self.lane.discard();
    }
}

fn recall(core: &Poller, id: LaneId) -> Box<dyn Lane> {
    let (reply, back) = crossbeam::channel::bounded(1);
    core.recall(id, reply);
    back.recv().expect("the core has it")
}

fn hand_over(c: &mut Criterion) {
    let mut group = c.benchmark_group("hand_over");
    let mut core = Poller::start(0, IdlePolicy::Adaptive, || Ok(())).unwrap();
    core.adopt(Box::new(lane(2).0));
    let round_trip = |core: &Poller| core.adopt(recall(core, LaneId(2)));
    group.bench_function("round_trip_idle", |b| b.iter(|| round_trip(&core)));
    group.bench_function("round_trip_asleep", |b| {
        b.iter_custom(|iterations| {
            let timed = |_| {
                std::thread::sleep(Duration::from_millis(1));
                let start = Instant::now();
                round_trip(&core);
                start.elapsed()
            };
            (0..iterations).map(timed).sum()
        });
    });
    core.adopt(Box::new(Busy::new(1)));
    group.bench_function("round_trip_busy", |b| b.iter(|| round_trip(&core)));
    core.stop();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(30).warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(1));
    targets = hand_over
}
criterion_main!(benches);
