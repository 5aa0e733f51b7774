//! Many ports on one core: what those cost that do nothing, and what those that do much cost the others. Real lanes on
//! a real poll core; the guests are the load guest's driver.
//!
//! - *idle, a turn*: both lanes of a port are given a turn, without a core; those of all ports one after the other.
//! - *idle, a round*: how much longer the rounds of a core become that has one lane at work, by each idle port.
//! - *busy*: what one port moves, alone and among idle ones. Its guest has another core.
//! - *first frame*: a port that was idle sends one while others have always more to send than a turn takes; from
//!   offered to taken. What feeds those others is on their core, too, and costs them some of it.
//!
//! `cargo bench --bench ports -- [--cores GUEST,RELAY] [--rounds N] [--seconds S] [--only soft:null|net_null]`

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use clap::Parser;
use core_affinity::CoreId;
use virtio_forwarder::Result;
use virtio_forwarder::guest::{Gpa, GuestMemory, RegionSpec, UserAddr};
use virtio_forwarder::relay::{
    Doorbell, GuestToVf, IdlePolicy, Lane, LaneCounters, LaneId, NotifyMark, Poller, RingPlan, Trigger, Turn, TxRules,
    VfToGuest,
};
use virtio_forwarder::ring::{RingAddresses, RingConfig, RingFault};
use virtio_forwarder::vf::{Lendable, Queues, RxQueue, TxQueue, Vf, VfConfig};

#[allow(dead_code, unused_imports)]
#[path = "../examples/load-guest/driver/mod.rs"]
mod driver;
use driver::memory::GPA;
use driver::{Buffers, Driver, HEADER, Memory, Plan, Split};

/// Many ports on one core
#[derive(Parser)]
struct Args {
    /// By default the first and the second
    #[arg(long, value_delimiter = ',', default_values_t = [0, 1])]
    cores: Vec<usize>,
    /// Length of a turn of each kind
    #[arg(long, default_value_t = 0.05)]
    seconds: f64,
    /// Turns of each kind, one after the other; medians are shown, of latencies the best
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Frames of a round by which a latency is judged
    #[arg(long, default_value_t = 300)]
    samples: usize,
    /// soft:null or net_null; both if not given
    #[arg(long)]
    only: Option<String>,
    /// cargo says so
    #[arg(long, hide = true)]
    bench: bool,
}

const RING: u16 = 512;
const MAX_FRAME: usize = 1522;
/// Between two first frames, at least and at most.
const GAP: (u64, u64) = (50_000, 150_000);

/// The driver's side of a port.
struct Guest {
    tx: Split,
    _rx: Split,
    _memory: Arc<Memory>,
}

impl Guest {
    /// Offers again what was taken. Returns how much that was.
    fn feed(&mut self) -> usize {
        let (mut used, mut n) = (ArrayVec::new(), 0);
        loop {
            used.clear();
            self.tx.reclaim(&mut used);
            if used.is_empty() {
                break;
            }
            n += used.len();
            used.iter().for_each(|done| self.tx.offer(done.slot));
        }
        self.tx.publish();
        n
    }

    fn fill(&mut self) {
        (0..RING).for_each(|slot| self.tx.offer(slot));
        self.tx.publish();
    }
}

/// The lanes of a port when they are home.
type Lanes = [Box<dyn Lane>; 2];

struct Port {
    guest: Option<Guest>,
    lanes: Option<Lanes>,
    ids: [LaneId; 2],
    vf: Vf,
}

impl Port {
    fn new(number: usize, spec: &str, frame: usize) -> Self {
        let plan = |receive| Plan {
            size: RING,
            pieces: 1,
            indirect: false,
            in_order: false,
            event_idx: false,
            rewrite: false,
            receive,
        };
        let space = [(false, frame), (true, MAX_FRAME)].map(|(receive, len)| Buffers::size(&plan(receive), &[len]));
        let memory = Memory::new(space.iter().sum::<usize>() + (64 << 10), false).expect("guest memory");
        let region = RegionSpec { gpa: Gpa(GPA), size: memory.len as u64, user: UserAddr(memory.user()), offset: 0 };
        let file = Arc::new(memory.file.try_clone().expect("dup"));
        let shared = GuestMemory::empty().replaced(vec![(region, file)]).expect("a region of our own");
        let ring = |receive, len| {
            let plan = plan(receive);
            let driver = Split::new(&memory, plan, &Buffers::new(&memory, &plan, &[len]));
            let at = driver.addresses();
            let config = RingConfig {
                packed: false,
                in_order: false,
                size: RING,
                addresses: RingAddresses {
                    desc: UserAddr(at.descriptors),
                    avail: UserAddr(at.driver),
                    used: UserAddr(at.device),
                },
                base: 0,
                indirect: true,
                event_idx: false,
                mergeable: true,
                header_len: HEADER,
                max_frame: MAX_FRAME,
            };
            let plan = RingPlan {
                lendable: Some(Lendable::all(shared.clone())),
                memory: shared.clone(),
                config,
                doorbell: Doorbell::default(),
                enabled: true,
                rules: TxRules { max_wire_frame: MAX_FRAME, ..TxRules::default() },
                guest_checksum: false,
            };
            (driver, plan)
        };
        let ((tx, tx_plan), (mut rx, rx_plan)) = (ring(false, frame), ring(true, MAX_FRAME));
        (0..RING).for_each(|slot| rx.offer(slot));
        rx.publish();
        let mut vf = Vf::probe(&spec.parse().expect("a VF")).expect("a VF");
        let queues = vf.configure(&VfConfig { queues: 1, mtu: 1500, mac: None }).expect("a VF that can be configured");
        vf.start().expect("a VF that starts");
        let ids = [LaneId(2 * number as u64), LaneId(2 * number as u64 + 1)];
        let lanes = match queues {
            Queues::Soft(tx, rx) => lanes(ids, tx, rx, tx_plan, rx_plan),
            #[cfg(feature = "dpdk")]
            Queues::Ethdev(tx, rx) => lanes(ids, tx, rx, tx_plan, rx_plan),
        };
        Self { guest: Some(Guest { tx, _rx: rx, _memory: memory }), lanes: Some(lanes), ids, vf }
    }

    fn leave(&mut self, core: &Poller) {
        self.lanes.take().expect("they are home").into_iter().for_each(|lane| core.adopt(lane));
    }

    fn come_home(&mut self, core: &Poller) {
        self.lanes = Some(self.ids.map(|id| recall(core, id)));
    }

    fn remove(mut self) {
        for lane in self.lanes.as_mut().expect("they are home") {
            lane.remove_ring(0);
        }
        drop(self.lanes);
        self.vf.stop().expect("its queues are gone");
        self.vf.remove().expect("its queues are gone");
    }
}

fn lanes<T: TxQueue, R: RxQueue>(
    ids: [LaneId; 2],
    tx: Vec<T>,
    rx: Vec<R>,
    sent: RingPlan,
    received: RingPlan,
) -> Lanes {
    let counters = || Arc::new(LaneCounters::default());
    let mut to_vf = GuestToVf::new(ids[0], 1, tx, Arc::new(true.into()), counters());
    let mut from_vf = VfToGuest::new(ids[1], 1, rx, counters());
    to_vf.insert_ring(0, sent).expect("a sound ring");
    from_vf.insert_ring(0, received).expect("a sound ring");
    [Box::new(to_vf), Box::new(from_vf)]
}

fn recall(core: &Poller, id: LaneId) -> Box<dyn Lane> {
    let (reply, back) = crossbeam::channel::bounded(1);
    core.recall(id, reply);
    back.recv().expect("the core has it")
}

/// What a core does in each round besides its lanes.
struct Errand<W> {
    id: LaneId,
    work: W,
}

impl<W: FnMut() + Send> Lane for Errand<W> {
    fn id(&self) -> LaneId {
        self.id
    }

    fn turn(&mut self, _turn: &Turn<'_>) -> usize {
        (self.work)();
        1
    }

    fn settle(&mut self, _turn: &Turn<'_>) {}

    fn doze(&mut self) -> bool {
        true
    }

    fn wake(&mut self) {}

    fn wake_fds(&self, _visit: &mut dyn FnMut(BorrowedFd<'_>, Trigger)) {}

    fn needs_naps(&self) -> bool {
        false
    }

    fn insert_ring(&mut self, _pair: usize, _plan: RingPlan) -> Result<()> {
        Ok(())
    }

    fn remove_ring(&mut self, _pair: usize) -> Option<u16> {
        None
    }

    fn fault(&self, _pair: usize) -> Option<RingFault> {
        None
    }

    fn discard(&mut self) {}
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Nanoseconds that a turn of both lanes of a port takes, if there is nothing to do.
fn idle_turn(args: &Args, ports: &mut [Port]) -> f64 {
    let mark = NotifyMark::default();
    let mut lanes: Vec<_> = ports.iter_mut().flat_map(|port| port.lanes.as_mut().expect("they are home")).collect();
    let time = |_| {
        let (start, mut rounds) = (Instant::now(), 0);
        while start.elapsed().as_secs_f64() < args.seconds {
            let turn = Turn { now: Instant::now(), mark: &mark };
            for _ in 0..16 {
                let moved: usize = lanes.iter_mut().map(|lane| lane.turn(&turn)).sum();
                assert_eq!(moved, 0, "the ports are idle");
            }
            rounds += 16;
        }
        start.elapsed().as_secs_f64() * 1e9 / f64::from(rounds) / (lanes.len() / 2) as f64
    };
    median((0..args.rounds).map(time).collect())
}

/// Nanoseconds by which an idle port lengthens the round of a core that has one lane at work.
fn idle_round(args: &Args, core: &Poller, ports: &mut [Port]) -> f64 {
    let rounds = Arc::new(AtomicU64::new(0));
    let errand = LaneId(u64::MAX);
    let counter = rounds.clone();
    let work = move || counter.store(counter.load(Relaxed) + 1, Relaxed);
    core.adopt(Box::new(Errand { id: errand, work }));
    let round = || {
        // Until idle ones are known to be.
        std::thread::sleep(Duration::from_millis(5));
        let (start, before) = (Instant::now(), rounds.load(Relaxed));
        std::thread::sleep(Duration::from_secs_f64(args.seconds));
        let done = rounds.load(Relaxed) - before;
        start.elapsed().as_secs_f64() * 1e9 / done as f64
    };
    let added = (0..args.rounds).map(|_| {
        let without = round();
        ports.iter_mut().for_each(|port| port.leave(core));
        let with = round();
        ports.iter_mut().for_each(|port| port.come_home(core));
        (with - without) / ports.len() as f64
    });
    let added = median(added.collect());
    recall(core, errand);
    added
}

/// Frames a second that one port moves alone, and the share of it that it moves among the others, idle.
fn busy_among_idle(args: &Args, core: &Poller, ports: &mut [Port]) -> (f64, f64) {
    let (busy, idle) = ports.split_first_mut().expect("a port");
    let mut guest = busy.guest.take().expect("a guest");
    guest.fill();
    let mut rate = || {
        let mut run = |seconds: f64| {
            let (start, mut n) = (Instant::now(), 0);
            while start.elapsed().as_secs_f64() < seconds {
                n += (0..64).map(|_| guest.feed()).sum::<usize>();
            }
            n as f64 / start.elapsed().as_secs_f64()
        };
        run(0.01);
        run(args.seconds)
    };
    busy.leave(core);
    let rates: Vec<_> = (0..args.rounds)
        .map(|_| {
            let alone = rate();
            idle.iter_mut().for_each(|port| port.leave(core));
            let among = rate();
            idle.iter_mut().for_each(|port| port.come_home(core));
            (alone, among / alone)
        })
        .collect();
    busy.come_home(core);
    (median(rates.iter().map(|rate| rate.0).collect()), median(rates.iter().map(|rate| rate.1).collect()))
}

/// Microseconds that first frames of an idle port wait, p50 and p99, while `busy` of the others have always something.
fn first_frames(args: &Args, core: &Poller, ports: &mut [Port], busy: usize) -> [f64; 2] {
    let (lone, others) = ports.split_first_mut().expect("a port");
    let mut guest = lone.guest.take().expect("a guest");
    let feeders: Vec<_> = others[..busy]
        .iter_mut()
        .map(|port| {
            let mut guest = port.guest.take().expect("a guest");
            guest.fill();
            let id = LaneId(port.ids[0].0 + (1 << 32));
            core.adopt(Box::new(Errand { id, work: move || _ = guest.feed() }));
            id
        })
        .collect();
    others.iter_mut().for_each(|port| port.leave(core));
    lone.leave(core);
    let (mut used, mut slot, mut seed) = (ArrayVec::new(), 0, 1_u64);
    let mut sample = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let gap = Duration::from_nanos(GAP.0 + (seed >> 33) % (GAP.1 - GAP.0));
        let rest = Instant::now();
        while rest.elapsed() < gap {
            std::hint::spin_loop();
        }
        let start = Instant::now();
        guest.tx.offer(slot);
        guest.tx.publish();
        used.clear();
        while used.is_empty() {
            guest.tx.reclaim(&mut used);
        }
        slot = (slot + 1) % RING;
        start.elapsed().as_secs_f64() * 1e6
    };
    let rounds: (Vec<_>, Vec<_>) = (0..args.rounds)
        .map(|_| {
            let mut times: Vec<_> = (0..args.samples).map(|_| sample()).collect();
            times.sort_by(f64::total_cmp);
            (times[args.samples / 2], times[args.samples * 99 / 100])
        })
        .unzip();
    lone.come_home(core);
    others.iter_mut().for_each(|port| port.come_home(core));
    feeders.into_iter().for_each(|id| drop(recall(core, id)));
    // Those of the best round: whatever else the machine does only slows.
    [rounds.0, rounds.1].map(|round| round.into_iter().fold(f64::INFINITY, f64::min))
}

fn measure(args: &Args, core: &Poller, kind: &str, count: usize, spec: impl Fn(usize) -> String) {
    if args.only.as_ref().is_some_and(|only| only != kind) {
        return;
    }
    let of = |frame| (0..count).map(|i| Port::new(i, &spec(i), frame)).collect::<Vec<_>>();
    let gone = |ports: Vec<Port>| ports.into_iter().for_each(Port::remove);
    let mut ports = of(60);
    println!("{kind:9} {count:2} ports  idle, a turn      {:8.1} ns a port", idle_turn(args, &mut ports));
    println!("{kind:9} {count:2} ports  idle, a round     {:8.1} ns a port", idle_round(args, core, &mut ports));
    let (alone, share) = busy_among_idle(args, core, &mut ports);
    println!(
        "{kind:9} {count:2} ports  busy alone        {:8.2} Mpps; among the others {:.1} % of it",
        alone / 1e6,
        100.0 * share
    );
    gone(ports);
    for (frame, busy) in [(60, 0), (60, 1), (60, 8), (60, count - 1), (1514, 8), (1514, count - 1)] {
        let mut ports = of(frame);
        let [p50, p99] = first_frames(args, core, &mut ports, busy);
        let bytes = frame + 4;
        println!(
            "{kind:9} {count:2} ports  first frame among {busy:2} busy with {bytes:4} bytes  p50 {p50:7.1}  p99 {p99:7.1} µs"
        );
        gone(ports);
    }
}

fn main() {
    let args = Args::parse();
    let allowed = core_affinity::get_core_ids().unwrap_or_default();
    let two = matches!(args.cores[..], [a, b] if a != b);
    if !two || !args.cores.iter().all(|id| allowed.contains(&CoreId { id: *id })) {
        println!("SKIPPED ports: needs two cores to itself, and cannot use {:?}", args.cores);
        return;
    }
    #[cfg(feature = "dpdk")]
    let eal = {
        use virtio_forwarder::vf::eal::{Eal, EalConfig};
        let config = EalConfig { no_huge: true, no_huge_mib: 1024, ..EalConfig::default() };
        Arc::new(Eal::start(&config).expect("an EAL"))
    };
    // Behind the EAL, which asks for our affinity.
    assert!(core_affinity::set_for_current(CoreId { id: args.cores[0] }));
    let mut core = Poller::start(args.cores[1], IdlePolicy::Poll, || Ok(())).expect("a poll core");
    measure(&args, &core, "soft:null", 64, |_| "soft:null".to_owned());
    core.stop();
    #[cfg(feature = "dpdk")]
    {
        let here = eal.clone();
        let mut core = Poller::start(args.cores[1], IdlePolicy::Poll, move || here.register_thread()).expect("a core");
        // As many as an ethdev's memory lets us have.
        measure(&args, &core, "net_null", 24, |i| format!("vdev:net_null{i},no-rx=1"));
        core.stop();
        drop(core);
        assert!(eal.end(), "no thread is left in the EAL");
    }
}
