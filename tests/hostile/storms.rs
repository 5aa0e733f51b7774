//! Front ends that do again and again what is cheap for them.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::OFlags;

use crate::support::daemon::{Attach, Daemon};
use crate::support::frontend::{FrontEnd, feature, request};
use crate::support::guest::{Flows, Guest, Plan, negotiate};
use crate::support::tries::{once_of_several, quicker};
use crate::support::{PATIENCE, until};
use crate::{Bystander, PAIRS};

/// How long a storm lasts.
const STORM: Duration = Duration::from_secs(3);

/// Lines a port may log in a storm: those it has at once, and a few for what becomes of it.
const LINES: usize = 150;

/// Makes an eventfd such that nothing more fits into it, and that a writer waits for it: behind the back of the
/// daemon, which has checked it, and perhaps signals it meanwhile.
fn block(fd: &OwnedFd) {
    let flags = rustix::fs::fcntl_getfl(fd).expect("flags");
    rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK).expect("flags");
    while rustix::io::write(fd, &(u64::MAX - 1).to_ne_bytes()).is_err() {
        let _ = rustix::io::read(fd, &mut [0; 8]);
    }
    rustix::fs::fcntl_setfl(fd, flags - OFlags::NONBLOCK).expect("flags");
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd")
}

fn start() -> (Daemon, Bystander) {
    let daemon = Daemon::start();
    let socket = daemon.attach("bystander", "soft:loop", 1);
    let mut bystander = Bystander { guest: Guest::connect(&socket, &Plan::default()), flows: Flows::new(4) };
    bystander.forwards(&daemon);
    (daemon, bystander)
}

/// Runs a storm in another thread for its time, while the bystander forwards. Counts what `strike` counts.
fn storm(daemon: &Daemon, bystander: &mut Bystander, mut strike: impl FnMut() -> usize + Send) -> (usize, Duration) {
    let (stop, begin) = (AtomicBool::new(false), Instant::now());
    let strikes = std::thread::scope(|scope| {
        let striker = scope.spawn(|| {
            let mut strikes = 0;
            while !stop.load(Relaxed) {
                strikes += strike();
            }
            strikes
        });
        let failed = catch_unwind(AssertUnwindSafe(|| {
            while begin.elapsed() < STORM {
                bystander.forwards(daemon);
            }
        }));
        // In any case: the scope waits for the striker.
        stop.store(true, Relaxed);
        failed.unwrap_or_else(|panic| resume_unwind(panic));
        striker.join().expect("the storm's own checks")
    });
    (strikes, begin.elapsed())
}

fn connections(daemon: &Daemon) -> u64 {
    daemon.show("target")["guest"]["connections"].as_u64().expect("a number")
}

fn blocked(daemon: &Daemon) -> u64 {
    let lanes = daemon.lanes("target");
    lanes.guest_to_vf.kicks_blocked + lanes.vf_to_guest.kicks_blocked
}

fn lines(daemon: &Daemon) -> usize {
    daemon.log().lines().filter(|line| line.contains("target")).count()
}

/// A ring lies, and the err eventfd by which its front end would hear of it blocks.
#[test]
fn an_err_that_blocks_holds_up_neither_detach_nor_exit() {
    for (noticed, detached) in [(false, true), (true, true), (true, false)] {
        once_of_several(|| an_err_that_blocks(noticed, detached));
    }
}

fn an_err_that_blocks(noticed: bool, detached: bool) -> Result<(), String> {
    const LIMIT: Duration = Duration::from_secs(1);
    let (daemon, mut bystander) = start();
    let socket = daemon.attach("target", "soft:loop", PAIRS);
    let guest = Guest::connect(&socket, &Plan::default());
    let err = event();
    for ring in [0_u64, 1] {
        guest.front.must(request::SET_VRING_ERR, &ring.to_ne_bytes(), &[err.as_fd()]);
    }
    block(&err);
    let ring = &guest.pairs[0].tx.queue;
    ring.write_avail_idx(ring.avail_idx().wrapping_add(257));
    ring.kick_now();
    until("the core has tried to tell", || blocked(&daemon) == 1);
    bystander.forwards(&daemon);
    if noticed {
        // What is seen of it: the front end has to go, and why.
        daemon.until_guest("target", false);
        let show = daemon.show("target");
        let why = show["guest"]["last_error"].as_str().unwrap_or_default();
        assert!(why.contains("eventfd blocks"), "{show}");
    }
    let start = Instant::now();
    if detached {
        daemon.detach("target");
    }
    let detach = start.elapsed();
    bystander.forwards(&daemon);
    drop(bystander);
    let exit = daemon.stop();
    drop((guest, err));
    quicker("detach", detach, LIMIT)?;
    quicker("exit", exit, LIMIT)
}

/// Each signal that blocks costs the core, and the bystander on it, 10 to 20 ms. So there is one for each lane of a
/// connection, whatever the front end changes, and it has to wait longer and longer for the next connection.
#[test]
fn calls_that_block_over_and_over() {
    let (daemon, mut bystander) = start();
    let socket = daemon.attach("target", "soft:loop", PAIRS);
    let strike = || {
        let guest = Guest::connect(&socket, &Plan::pairs(PAIRS));
        let calls: Vec<_> = (0..2).map(|_| event()).collect();
        // Until it is thrown out: each of these is another plan for a ring, and signals it.
        for change in 0..1000 {
            let ring = change as u64 % (2 * PAIRS as u64);
            let call = &calls[change / (2 * PAIRS) % 2];
            let told = guest.front.tell(request::SET_VRING_CALL, &ring.to_ne_bytes(), &[call.as_fd()]);
            block(call);
            if told.is_err() {
                return change;
            }
        }
        panic!("it was never thrown out");
    };
    let (changes, took) = storm(&daemon, &mut bystander, strike);
    let (connections, blocked) = (connections(&daemon), blocked(&daemon));
    println!("{connections} connections with {changes} changes blocked {blocked} signals in {took:?}");
    assert!(blocked > 0, "the storm did nothing");
    assert!(blocked <= 2 * connections, "{blocked} signals blocked in {connections} connections");
    // 100 ms, 200 ms, …: so many are over, and the one that ended the storm.
    let waits = (took.as_millis() / 100 + 1).ilog2() as u64;
    assert!(connections <= waits + 2, "{connections} connections in {took:?}");
    bystander.forwards(&daemon);
    drop(bystander);
    daemon.stop();
}

#[test]
fn a_front_end_that_comes_and_goes() {
    let (daemon, mut bystander) = start();
    let socket = daemon.socket("target.sock");
    once_of_several(|| {
        // Of a port that was just made, so that nothing was there before.
        daemon.detach("target");
        daemon.attach("target", "soft:loop", 1);
        let begin = Instant::now();
        drop(UnixStream::connect(&socket).expect("connect"));
        until("the first is taken", || connections(&daemon) == 1);
        quicker("the first connection", begin.elapsed(), Duration::from_millis(500))
    });
    let (_, took) = storm(&daemon, &mut bystander, || UnixStream::connect(&socket).is_ok().into());
    let taken = u128::from(connections(&daemon));
    println!("{taken} connections in {took:?}");
    assert!(taken > 2, "the storm did nothing");
    assert!(taken <= took.as_millis() / 50 + 3, "{taken} connections in {took:?}");
    assert!(lines(&daemon) < LINES, "{} lines", lines(&daemon));
    // And who stays is served.
    let mut guest = Guest::connect(&socket, &Plan::default());
    Flows::new(1).exchange(&mut guest, &[0], 100, 300);
    drop((guest, bystander));
    daemon.stop();
}

#[test]
fn a_listening_front_end_that_hangs_up() {
    let (daemon, mut bystander) = start();
    let socket = daemon.socket("vmm.sock");
    let listener = UnixListener::bind(&socket).expect("the VMM's socket");
    daemon.attach_as(&Attach {
        id: "target".into(),
        socket: socket.clone(),
        client: true,
        vf: "soft:loop".into(),
        queues: 1,
        mtu: None,
    });
    let (taken, took) = storm(&daemon, &mut bystander, || {
        drop(FrontEnd::accept(&listener));
        1
    });
    println!("{taken} connections in {took:?}");
    assert!(taken as u128 <= took.as_millis() / 50 + 3, "{taken} connections in {took:?}");
    // It tries again within 100 ms; a fifth of that rate leaves room for a busy machine.
    assert!(taken as u128 >= took.as_millis() / 500, "{taken} connections in {took:?}");
    assert!(lines(&daemon) < LINES, "{} lines", lines(&daemon));
    drop((listener, bystander));
    std::fs::remove_file(&socket).expect("ours");
    daemon.stop();
}

#[test]
fn messages_that_are_refused_fill_no_log() {
    let (daemon, mut bystander) = start();
    let socket = daemon.attach("target", "soft:loop", 1);
    let mut front = FrontEnd::connect(&socket);
    negotiate(&mut front, feature::VERSION_1 | feature::MRG_RXBUF);
    let (refused, _) = storm(&daemon, &mut bystander, || {
        let told = front.tell(request::SET_FEATURES, &u64::MAX.to_ne_bytes(), &[]);
        usize::from(told.expect("a refusal") == Some(1))
    });
    // Few on a busy machine, but more than are ever logged.
    assert!(refused > 2 * LINES, "the storm did little: {refused}");
    assert!(lines(&daemon) < LINES, "{} lines for {refused} messages", lines(&daemon));
    drop((front, bystander));
    daemon.until_guest("target", false);
    assert!(daemon.stop() < PATIENCE);
}
