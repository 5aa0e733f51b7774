//! How far our rings are from what two cores can do. One thread is the guest, another the relay, each pinned.
//!
//! - *exchange*: one side writes so many cache lines and a flag, the other reads them and answers. The slope is what a
//!   line costs that changes cores.
//! - *ceiling*: an array of 64-byte slots with two indices, filled and emptied in bursts: the least that is needed
//!   to hand over 64 bytes.
//! - *rings*: ours, driven by the load guest's driver, with no VF behind them: frames are copied to (or from) the
//!   relay's own buffer, or left where they are (`parse`). *touch*: the guest writes, or reads, each frame's first line
//!   and writes descriptors anew. Frames of one line are compared with the ceiling.
//!
//! `cargo bench --bench speed_of_light -- [--cores GUEST,RELAY] [--rounds N] [--seconds S]`

use std::hint::{black_box, spin_loop};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use clap::Parser;
use core_affinity::CoreId;
use crossbeam::utils::CachePadded;
use virtio_forwarder::guest::{Gpa, GuestMemory, RegionSpec, UserAddr};
use virtio_forwarder::ring::{Gather, NetHeader, RingAddresses, RingConfig, RxRing, TxRing};

#[allow(dead_code, unused_imports)]
#[path = "../examples/load-guest/driver/mod.rs"]
mod driver;
use driver::memory::GPA;
use driver::{Buffers, Driver, HEADER, Memory, Packed, Plan, Split};

/// How far our rings are from what two cores can do
#[derive(Parser)]
struct Args {
    /// By default the first and the second
    #[arg(long, value_delimiter = ',', default_values_t = [0, 1])]
    cores: Vec<usize>,
    /// Length of a round
    #[arg(long, default_value_t = 0.1)]
    seconds: f64,
    /// Of which the fastest is shown: whatever else the machine does only slows
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// cargo says so
    #[arg(long, hide = true)]
    bench: bool,
}

const SIZE: u16 = 1024;
const BURST: usize = 32;
const WARM_UP: Duration = Duration::from_millis(20);

#[derive(Default)]
#[repr(align(64))]
struct Line([AtomicU64; 8]);

impl Line {
    fn write(&self, value: u64) {
        self.0.iter().for_each(|word| word.store(value, Ordering::Relaxed));
    }

    fn read(&self) -> [u64; 8] {
        std::array::from_fn(|i| self.0[i].load(Ordering::Relaxed))
    }
}

/// Runs `guest` on its core until `relay` has returned its result on the other.
fn pair<T: Send>(cores: &[usize], guest: impl FnOnce(&AtomicBool) + Send, relay: impl FnOnce() -> T + Send) -> T {
    let end = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            assert!(core_affinity::set_for_current(CoreId { id: cores[0] }));
            guest(&end);
        });
        let relay = scope.spawn(|| {
            assert!(core_affinity::set_for_current(CoreId { id: cores[1] }));
            let result = relay();
            end.store(true, Ordering::Relaxed);
            result
        });
        relay.join().expect("the relay's thread")
    })
}

/// Calls `work`, which returns how much it did, for the warm-up and then for `seconds`; how much a second.
fn rate(seconds: f64, mut work: impl FnMut() -> usize) -> f64 {
    let mut run = |time: Duration| {
        let (start, mut done) = (Instant::now(), 0);
        while start.elapsed() < time {
            for _ in 0..64 {
                done += work();
            }
        }
        done as f64 / start.elapsed().as_secs_f64()
    };
    run(WARM_UP);
    run(Duration::from_secs_f64(seconds))
}

/// Exchanges of `n` lines a second.
fn exchange(args: &Args, n: usize) -> f64 {
    let lines: Vec<Line> = (0..n).map(|_| Line::default()).collect();
    let (there, back) = (CachePadded::new(AtomicU64::new(0)), CachePadded::new(AtomicU64::new(0)));
    let guest = |end: &AtomicBool| {
        let mut turn = 0;
        while !end.load(Ordering::Relaxed) {
            if there.load(Ordering::Acquire) == turn {
                spin_loop();
                continue;
            }
            turn += 1;
            lines.iter().for_each(|line| {
                black_box(line.read());
            });
            back.store(turn, Ordering::Release);
        }
    };
    let mut turn = 0;
    let relay = || {
        rate(args.seconds, || {
            turn += 1;
            lines.iter().for_each(|line| line.write(turn));
            there.store(turn, Ordering::Release);
            while back.load(Ordering::Acquire) != turn {
                spin_loop();
            }
            1
        })
    };
    pair(&args.cores, guest, relay)
}

/// Slots a second.
fn ceiling(args: &Args) -> f64 {
    let slots: Vec<Line> = (0..SIZE).map(|_| Line::default()).collect();
    let (head, tail) = (CachePadded::new(AtomicUsize::new(0)), CachePadded::new(AtomicUsize::new(0)));
    let guest = |end: &AtomicBool| {
        let (mut at, mut free) = (0, slots.len());
        while !end.load(Ordering::Relaxed) {
            if at + BURST > free {
                free = tail.load(Ordering::Acquire) + slots.len();
                continue;
            }
            (at..at + BURST).for_each(|i| slots[i % slots.len()].write(i as u64));
            at += BURST;
            head.store(at, Ordering::Release);
        }
    };
    let (mut at, mut filled) = (0, 0);
    let relay = || {
        rate(args.seconds, || {
            if at == filled {
                filled = head.load(Ordering::Acquire);
            }
            let n = BURST.min(filled - at);
            (at..at + n).for_each(|i| {
                black_box(slots[i % slots.len()].read());
            });
            if n > 0 {
                at += n;
                tail.store(at, Ordering::Release);
            }
            n
        })
    };
    pair(&args.cores, guest, relay)
}

/// A way to use a ring.
#[derive(Clone, Copy)]
struct Case {
    receive: bool,
    burst: usize,
    bytes: usize,
    /// The relay copies frames; else it only looks at their headers. Receiving always copies.
    copy: bool,
    touch: bool,
    in_order: bool,
}

/// Frames a second.
fn ring<D: Driver>(args: &Args, case: Case) -> f64 {
    let Case { receive, burst, bytes, copy, touch, in_order } = case;
    let plan = Plan { size: SIZE, pieces: 1, indirect: false, in_order, event_idx: false, rewrite: touch, receive };
    let lens = [bytes];
    let memory = Memory::new(Buffers::size(&plan, &lens) + (256 << 10), false).expect("guest memory");
    let buffers = Buffers::new(&memory, &plan, &lens);
    let mut driver = D::new(&memory, plan, &buffers);
    let at = driver.addresses();
    let addresses =
        RingAddresses { desc: UserAddr(at.descriptors), avail: UserAddr(at.driver), used: UserAddr(at.device) };
    let config = RingConfig {
        packed: D::BASE != 0,
        in_order: plan.in_order,
        size: SIZE,
        addresses,
        base: D::BASE as u16,
        indirect: true,
        event_idx: false,
        mergeable: true,
        header_len: HEADER,
        max_frame: 1522,
    };
    let region = RegionSpec { gpa: Gpa(GPA), size: memory.len as u64, user: UserAddr(memory.user()), offset: 0 };
    let file = Arc::new(memory.file.try_clone().expect("dup"));
    let shared = GuestMemory::empty().replaced(vec![(region, file)]).expect("a region of our own");

    let guest = move |end: &AtomicBool| {
        let mut used = ArrayVec::new();
        (0..plan.slots()).for_each(|slot| driver.offer(slot));
        driver.publish();
        while !end.load(Ordering::Relaxed) {
            used.clear();
            driver.reclaim(&mut used);
            for done in &used {
                let (header, frame) = (buffers.header(done.slot), buffers.frame(done.slot));
                match (touch, receive) {
                    (false, _) => {}
                    (true, false) => {
                        buffers.area.store_u32(header, 0, Ordering::Relaxed);
                        buffers.area.store_u64(frame, 0, Ordering::Relaxed);
                    }
                    (true, true) => {
                        black_box(buffers.area.load_u32(header, Ordering::Relaxed));
                        black_box(buffers.area.load_u64(frame, Ordering::Relaxed));
                    }
                }
                driver.offer(done.slot);
            }
            driver.publish();
        }
    };
    let mut frame = vec![7; bytes];
    let relay = || {
        if receive {
            let mut ring = RxRing::new(shared, &config).expect("a sound ring");
            ring.disable_kicks();
            let header = NetHeader::default();
            rate(args.seconds, || {
                let n = (0..burst).take_while(|_| ring.push(&header, &mut black_box(&frame[..])).is_ok()).count();
                ring.publish();
                n
            })
        } else {
            let mut ring = TxRing::new(shared, &config).expect("a sound ring");
            ring.disable_kicks();
            rate(args.seconds, || {
                let n = ring.pop(burst).expect("a sound ring");
                for i in 0..n {
                    let mut taken = ring.frame(i).expect("a sound frame");
                    if copy {
                        taken.copy_next(&mut frame);
                        black_box(&frame);
                    }
                    black_box(taken.header());
                }
                ring.complete(n);
                ring.publish();
                n
            })
        }
    };
    pair(&args.cores, guest, relay)
}

/// The most of so many figures.
fn best(rounds: usize, mut figure: impl FnMut() -> f64) -> f64 {
    (0..rounds.max(1)).map(|_| figure()).fold(0.0, f64::max)
}

fn main() {
    let args = Args::parse();
    let allowed = core_affinity::get_core_ids().unwrap_or_default();
    let two = matches!(args.cores[..], [a, b] if a != b);
    if !two || !args.cores.iter().all(|id| allowed.contains(&CoreId { id: *id })) {
        println!("SKIPPED speed_of_light: needs two cores to itself, and cannot use {:?}", args.cores);
        return;
    }
    let lines = [0, 1, 4, 16, 64];
    let times = lines.map(|n| 1e9 / best(args.rounds, || exchange(&args, n)));
    for (n, time) in lines.iter().zip(times) {
        println!("exchange  {n:2} lines  {time:8.1} ns");
    }
    println!("          a line     {:8.1} ns", (times[4] - times[1]) / 63.0);
    let most = best(args.rounds, || ceiling(&args));
    println!("ceiling   64 bytes   {:8.1} ns {:8.2} Mpps\n", 1e9 / most, most / 1e6);

    println!("ring             direction    bytes  burst  relay  guest        ns      Mpps  of the ceiling");
    for (receive, copy) in [(false, false), (false, true), (true, true)] {
        for bytes in [60, 1514] {
            for burst in [1, 4, BURST] {
                for touch in [false, true] {
                    for (format, in_order) in [("split", false), ("packed", false), ("packed-in-order", true)] {
                        let case = Case { receive, burst, bytes, copy, touch, in_order };
                        let figure = best(args.rounds, || match format {
                            "split" => ring::<Split>(&args, case),
                            _ => ring::<Packed>(&args, case),
                        });
                        println!(
                            "{format:15}  {}  {bytes:5}  {burst:5}  {}  {}  {:8.1}  {:8.2}{}",
                            if receive { "vf_to_guest" } else { "guest_to_vf" },
                            if copy { "copy " } else { "parse" },
                            if touch { "touch" } else { "leave" },
                            1e9 / figure,
                            figure / 1e6,
                            if bytes == 60 { format!("  {:6.0} %", 100.0 * figure / most) } else { String::new() },
                        );
                    }
                }
            }
        }
    }
}
