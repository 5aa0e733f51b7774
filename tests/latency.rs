//! How long a sleeping daemon takes to wake, without QEMU. Medians and percentiles over many samples: in
//! a test binary of its own, so that nothing else runs beside it.

mod support;

use std::panic::resume_unwind;
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use support::daemon::Daemon;
use support::frame::Frame;
use support::frontend::feature::EVENT_IDX;
use support::guest::{Guest, Plan};
use support::{PATIENCE, percentile};

const SAMPLES: u32 = 300;
/// Longer than any spinning before sleep.
const REST: Duration = Duration::from_millis(8);

/// Of one direction.
const P50: Duration = Duration::from_micros(200);
const P99: Duration = Duration::from_millis(1);

/// Noise only ever adds: the best of a few runs is nearest to the daemon's own doing.
const RUNS: usize = 8;

/// Runs `measure` until all its series are in time, at most [`RUNS`] times. A machine that is busy with
/// other things has stragglers of its own: beside each run, two plain threads wake each other in the same
/// way, and what theirs take is granted to ours.
fn in_time<const N: usize>(names: [&str; N], directions: u32, mut measure: impl FnMut() -> [Vec<Duration>; N]) {
    for run in 1..=RUNS {
        let series = measure();
        let mut plain = plain_threads();
        let [plain_p50, plain_p99] = [50, 99].map(|percent| percentile(&mut plain, percent));
        let mut good = true;
        for (name, mut times) in names.iter().zip(series) {
            let (p50, p99) = (percentile(&mut times, 50), percentile(&mut times, 99));
            println!("{name}, daemon asleep: p50 {p50:?}, p99 {p99:?} (plain threads: {plain_p50:?}, {plain_p99:?})");
            good &= p50 <= P50 * directions + plain_p50 && p99 <= P99 * directions + plain_p99;
        }
        if good {
            return;
        }
        assert!(run < RUNS, "{names:?} out of bounds in {RUNS} runs");
    }
}

/// The core of the daemon under test.
const CORE: usize = 1;

/// Runs `measure` in a thread on any core but the daemon's: awake, that one spins for as long as these tests allow a
/// wake-up to take, and who is placed there waits for it.
fn apart<T: Send>(measure: impl FnOnce() -> T + Send) -> T {
    let on_other_cores = || {
        let mut cores = sched_getaffinity(None).expect("affinity");
        cores.unset(CORE);
        if cores.count() > 0 {
            sched_setaffinity(None, &cores).expect("some of ours");
        }
        measure()
    };
    std::thread::scope(|scope| scope.spawn(on_other_cores).join()).unwrap_or_else(|panic| resume_unwind(panic))
}

/// Round trips between us and a thread on the daemon's core, which both sleep on eventfds.
fn plain_threads() -> Vec<Duration> {
    use rustix::event::{EventfdFlags, eventfd};
    let [there, back] = [(), ()].map(|()| eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd"));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut core = CpuSet::new();
            core.set(CORE);
            sched_setaffinity(None, &core).expect("the daemon's core");
            for _ in 0..SAMPLES {
                rustix::io::read(&there, &mut [0; 8]).expect("wait");
                rustix::io::write(&back, &1u64.to_ne_bytes()).expect("wake");
            }
        });
        apart(|| {
            (0..SAMPLES)
                .map(|_| {
                    std::thread::sleep(REST);
                    let start = Instant::now();
                    rustix::io::write(&there, &1u64.to_ne_bytes()).expect("wake");
                    rustix::io::read(&back, &mut [0; 8]).expect("wait");
                    start.elapsed()
                })
                .collect()
        })
    })
}

fn plan(features: u64) -> Plan {
    let plan = Plan::default();
    Plan { features: plan.features | features, ..plan }
}

/// Sends one frame to a daemon that sleeps; when.
fn kick_awake(guest: &mut Guest, frame: &[u8]) -> Instant {
    std::thread::sleep(REST);
    let start = Instant::now();
    assert!(guest.pairs[0].tx.send(frame));
    guest.pairs[0].tx.flush();
    start
}

/// Kick → the daemon wakes, takes the frame, gives the buffer back → call fd → we wake.
fn guest_to_vf(features: u64) -> Vec<Duration> {
    let daemon = Daemon::start();
    let mut guest = Guest::connect(&daemon.attach("port", "soft:null", 1), &plan(features));
    let times = apart(|| {
        (0..SAMPLES)
            .map(|seq| {
                let queue = &guest.pairs[0].tx.queue;
                queue.take_calls();
                assert!(!queue.request_call(), "nothing was sent");
                let start = kick_awake(&mut guest, &Frame { flow: 0, seq, len: 64 }.bytes());
                let tx = &mut guest.pairs[0].tx;
                while tx.reap() == 0 {
                    assert!(tx.queue.wait_call(PATIENCE), "no call");
                }
                start.elapsed()
            })
            .collect()
    });
    drop(guest);
    daemon.stop();
    times
}

/// Kick → the daemon wakes → VF → back → call fd → we wake.
fn round_trip(features: u64) -> Vec<Duration> {
    let daemon = Daemon::start();
    let mut guest = Guest::connect(&daemon.attach("port", "soft:loop", 1), &plan(features));
    let times = apart(|| {
        (0..SAMPLES)
            .map(|seq| {
                let queue = &guest.pairs[0].rx.queue;
                queue.take_calls();
                assert!(!queue.request_call(), "a frame nobody sent");
                let start = kick_awake(&mut guest, &Frame { flow: 0, seq, len: 64 }.bytes());
                let rx = &mut guest.pairs[0].rx;
                let received = loop {
                    if let Some(received) = rx.receive() {
                        break received;
                    }
                    assert!(rx.queue.wait_call(PATIENCE), "no call");
                };
                assert_eq!(Frame::parse(&received.frame).seq, seq);
                start.elapsed()
            })
            .collect()
    });
    drop(guest);
    daemon.stop();
    times
}

#[test]
fn guest_to_vf_wakes() {
    in_time(["guest to VF"], 1, || [guest_to_vf(0)]);
    in_time(["guest to VF, EVENT_IDX"], 1, || [guest_to_vf(EVENT_IDX)]);
}

#[test]
fn round_trip_wakes() {
    in_time(["round trip"], 2, || [round_trip(0)]);
    in_time(["round trip, EVENT_IDX"], 2, || [round_trip(EVENT_IDX)]);
}

/// Against the kernel's network stack on a tap: each direction by itself.
#[cfg(feature = "dpdk")]
#[test]
fn a_tap_wakes_and_is_woken() {
    use support::tap::{Tap, available, interface_name};
    if let Err(reason) = available() {
        support::skip!("a_tap_wakes_and_is_woken", "{reason}");
    }
    let daemon = Daemon::start();
    let name = interface_name();
    let socket = daemon.attach("port", &format!("vdev:net_tap0,iface={name}"), 1);
    let mut guest = Guest::connect(&socket, &Plan::default());
    let tap = Tap::set_up(&name);
    support::until("the link is up", || daemon.show("port")["vf"]["link_up"] == true);
    let mut buffer = [0; 2048];
    in_time(["guest to tap", "tap to guest"], 1, || {
        apart(|| {
            let (mut out, mut back) = (Vec::new(), Vec::new());
            for seq in 0..SAMPLES {
                let payload = seq.to_be_bytes().repeat(25);
                let start = kick_awake(&mut guest, &tap.frame(&payload));
                let len = tap.socket.recv(&mut buffer).expect("the guest's datagram");
                out.push(start.elapsed());
                assert_eq!(buffer[..len], payload);

                std::thread::sleep(REST);
                let rx = &mut guest.pairs[0].rx;
                while rx.receive().is_some() {}
                rx.queue.take_calls();
                rx.queue.request_call();
                let start = Instant::now();
                tap.socket.send(&payload).expect("a datagram to the guest");
                loop {
                    let Some(received) = rx.receive() else {
                        if !rx.queue.request_call() {
                            assert!(rx.queue.wait_call(PATIENCE), "no call");
                        }
                        continue;
                    };
                    if tap.payload(&received.frame) == Some(&payload) {
                        break;
                    }
                }
                back.push(start.elapsed());
            }
            [out, back]
        })
    });
    drop(guest);
    daemon.stop();
}
