//! What a lane over net_null costs a frame of 64 bytes, with a driver that makes it wait for nothing, all on one
//! thread: the driver's part is outside of the measured part. So it moves less from run to run than two threads do, and
//! callgrind can count its instructions:
//!
//! ```text
//! cargo bench --bench lane_cost -- [--rounds N] [--only CASE]
//! valgrind --tool=callgrind --toggle-collect='*measured*' target/release/deps/lane_cost-… --rounds 1000 --only send-split
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use clap::Parser;
use virtio_forwarder::guest::{Gpa, GuestMemory, RegionSpec, UserAddr};
use virtio_forwarder::relay::{
    Doorbell, GuestToVf, Lane, LaneCounters, LaneId, NotifyMark, RingPlan, Turn, TxRules, VfToGuest,
};
use virtio_forwarder::ring::{RingAddresses, RingConfig};
use virtio_forwarder::vf::eal::{Eal, EalConfig};
use virtio_forwarder::vf::{Lendable, Queues, Vf, VfConfig};

#[allow(dead_code, unused_imports)]
#[path = "../examples/load-guest/driver/mod.rs"]
mod driver;
use driver::memory::GPA;
use driver::{Buffers, Driver, HEADER, Memory, Packed, Plan, Split};

const SIZE: u16 = 1024;
/// Turns that a figure is the mean of.
const BATCH: usize = 64;

/// What a lane over net_null costs a frame
#[derive(Parser)]
struct Args {
    /// Turns, of up to 256 frames; the fastest 64 in a row count
    #[arg(long, default_value_t = 64_000)]
    rounds: usize,
    /// The one case with this name
    #[arg(long)]
    only: Option<String>,
    /// As cargo passes it
    #[arg(long, hide = true)]
    bench: bool,
}

/// How the guest has set its device up.
#[derive(Clone, Copy)]
struct Case {
    receive: bool,
    in_order: bool,
    mergeable: bool,
    /// Of the guest's buffers. Those that hold any frame are received into without a copy.
    bytes: usize,
}

/// Has a name of its own, for callgrind.
#[inline(never)]
fn measured(lane: &mut impl Lane, turn: &Turn<'_>) -> usize {
    lane.turn(turn)
}

/// Nanoseconds a frame.
fn cost<D: Driver>(lane: &mut impl Lane, case: Case, rounds: usize) -> f64 {
    let Case { receive, in_order, mergeable, bytes } = case;
    let plan = Plan { size: SIZE, pieces: 1, indirect: false, in_order, event_idx: false, rewrite: false, receive };
    let lens = [bytes];
    let memory = Memory::new(Buffers::size(&plan, &lens) + (256 << 10), false).expect("guest memory");
    let buffers = Buffers::new(&memory, &plan, &lens);
    let mut driver = D::new(&memory, plan, &buffers);
    let at = driver.addresses();
    let config = RingConfig {
        packed: D::BASE != 0,
        in_order,
        size: SIZE,
        addresses: RingAddresses {
            desc: UserAddr(at.descriptors),
            avail: UserAddr(at.driver),
            used: UserAddr(at.device),
        },
        base: D::BASE as u16,
        indirect: true,
        event_idx: false,
        mergeable,
        header_len: HEADER,
        max_frame: 1522,
    };
    let region = RegionSpec { gpa: Gpa(GPA), size: memory.len as u64, user: UserAddr(memory.user()), offset: 0 };
    let file = Arc::new(memory.file.try_clone().expect("dup"));
    let memory = GuestMemory::empty().replaced(vec![(region, file)]).expect("a region of our own");
    let plan_of_ring = RingPlan {
        lendable: Some(Lendable::all(Arc::clone(&memory))),
        memory,
        config,
        doorbell: Doorbell::default(),
        enabled: true,
        rules: TxRules { max_wire_frame: 1522, ..TxRules::default() },
        guest_checksum: false,
    };
    lane.insert_ring(0, plan_of_ring).expect("a sound ring");
    (0..plan.slots()).for_each(|slot| driver.offer(slot));
    driver.publish();

    let mark = NotifyMark::default();
    let mut best = f64::MAX;
    for _ in 0..rounds.div_ceil(BATCH) {
        let (mut frames, mut time) = (0, Duration::ZERO);
        for _ in 0..BATCH {
            let now = Instant::now();
            frames += measured(lane, &Turn { now, mark: &mark });
            time += now.elapsed();
            let mut used = ArrayVec::new();
            loop {
                driver.reclaim(&mut used);
                if used.is_empty() {
                    break;
                }
                used.drain(..).for_each(|done| driver.offer(done.slot));
                driver.publish();
            }
        }
        assert!(frames > 0, "nothing moved");
        best = best.min(time.as_nanos() as f64 / frames as f64);
    }
    lane.remove_ring(0);
    best
}

fn main() {
    let args = Args::parse();
    let eal = Eal::start(&EalConfig { no_huge: true, no_huge_mib: 64, ..EalConfig::default() }).expect("DPDK");
    let mut vf = Vf::probe(&"vdev:net_null0,copy=0".parse().expect("a VF")).expect("net_null");
    let queues = vf.configure(&VfConfig { queues: 1, mtu: 1500, mac: None }).expect("one pair");
    vf.start().expect("net_null starts");
    let Queues::Ethdev(mut tx, mut rx) = queues else { unreachable!("an ethdev") };
    let counters = || Arc::new(LaneCounters::default());
    let mut send = GuestToVf::new(LaneId(1), 1, vec![tx.remove(0)], Arc::new(true.into()), counters());
    let mut receive = VfToGuest::new(LaneId(2), 1, vec![rx.remove(0)], counters());

    for (way, from_vf, bytes) in [("send", false, 60), ("receive", true, 256), ("receive-placed", true, 1600)] {
        for (format, in_order, mergeable) in [
            ("split", false, true),
            ("split-plain", false, false),
            ("packed", false, true),
            ("packed-in-order", true, true),
        ] {
            let name = format!("{way}-{format}");
            if args.only.as_ref().is_some_and(|only| *only != name) {
                continue;
            }
            let case = Case { receive: from_vf, in_order, mergeable, bytes };
            let ns = match (from_vf, format.starts_with("split")) {
                (false, true) => cost::<Split>(&mut send, case, args.rounds),
                (false, false) => cost::<Packed>(&mut send, case, args.rounds),
                (true, true) => cost::<Split>(&mut receive, case, args.rounds),
                (true, false) => cost::<Packed>(&mut receive, case, args.rounds),
            };
            println!("{name:30} {ns:6.2} ns");
        }
    }
    drop((send, receive));
    vf.stop().and_then(|()| vf.remove()).expect("net_null goes");
    drop(eal);
}
