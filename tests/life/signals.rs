//! SIGTERM and SIGKILL.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::support::census;
use crate::support::daemon::{Attach, Daemon, Options};
use crate::support::frontend::{FrontEnd, VERSION, message, request};
use crate::support::guest::{Flows, Guest, Plan};
use crate::support::tries::{once_of_several, quicker};
use crate::support::until;

/// What a service manager, and a VMM that is to be restarted behind us, have to wait for at most.
const LIMIT: Duration = Duration::from_secs(1);

/// A daemon as `life` leaves it ends within a second of SIGTERM.
#[track_caller]
fn ends_in_time(mut life: impl FnMut() -> Duration) {
    once_of_several(|| {
        let took = life();
        println!("SIGTERM took {took:?}");
        quicker("SIGTERM", took, LIMIT)
    });
}

#[test]
fn sigterm_without_ports() {
    ends_in_time(|| Daemon::start().stop());
}

#[test]
fn sigterm_under_traffic() {
    ends_in_time(|| {
        let daemon = Daemon::start();
        let mut guests: Vec<Guest> = (0..4)
            .map(|i| Guest::connect(&daemon.attach(&format!("port-{i}"), "soft:loop", 1), &Plan::default()))
            .collect();
        for guest in &mut guests {
            Flows::new(1).exchange(guest, &[0], 200, 600);
            for _ in 0..100 {
                guest.pairs[0].tx.send(&[0x42; 600]);
            }
            guest.pairs[0].tx.flush();
        }
        daemon.stop()
    });
}

#[test]
fn sigterm_beside_a_vmm_that_says_nothing() {
    ends_in_time(|| {
        let daemon = Daemon::start();
        let socket = daemon.attach("port", "soft:loop", 1);
        let front = FrontEnd::connect(&socket);
        front.send_bytes(&message(request::SET_FEATURES, VERSION, 8, &[1]), &[]).expect("half a message");
        daemon.until_guest("port", true);
        daemon.stop()
    });
}

#[test]
fn sigterm_beside_a_vmm_that_reads_nothing() {
    ends_in_time(|| {
        let daemon = Daemon::start();
        let _deaf = deaf(&daemon.attach("port", "soft:loop", 1));
        daemon.stop()
    });
}

/// A front end that has asked as much as there was room for, and reads no answer.
fn deaf(socket: &Path) -> FrontEnd {
    let front = FrontEnd::connect(socket);
    front.stream().set_nonblocking(true).expect("non-blocking");
    let ask = message(request::GET_FEATURES, VERSION, 0, &[]);
    while front.send_bytes(&ask, &[]).is_ok() {}
    front
}

#[test]
fn sigterm_while_nobody_listens() {
    ends_in_time(|| {
        let daemon = Daemon::start();
        for i in 0..8 {
            daemon.attach_as(&Attach {
                id: format!("port-{i}"),
                socket: daemon.socket(&format!("nobody-{i}.sock")),
                client: true,
                vf: "soft:loop".into(),
                queues: 1,
                mtu: None,
            });
        }
        std::thread::sleep(Duration::from_millis(150));
        daemon.stop()
    });
}

/// A port's thread that does not come back, as from a driver: the daemon names it and ends without it.
#[test]
fn sigterm_beside_a_stuck_port() {
    once_of_several(|| quicker("SIGTERM", ends_beside_a_stuck_port(), Duration::from_millis(1500)));
}

fn ends_beside_a_stuck_port() -> Duration {
    let env = vec![("VIRTIO_FORWARDER_TEST_VF_START_DELAY_MS".to_owned(), "stuck:60000".to_owned())];
    let mut daemon = Daemon::with(Options { env, ..Options::default() });
    let mut guest = Guest::connect(&daemon.attach("port", "soft:loop", 1), &Plan::default());
    Flows::new(1).exchange(&mut guest, &[0], 200, 600);
    let attach = Attach {
        id: "stuck".into(),
        socket: daemon.socket("stuck.sock"),
        client: false,
        vf: "soft:loop".into(),
        queues: 1,
        mtu: None,
    };
    let request = serde_json::json!({"jsonrpc": "2.0", "id": 1, "method": "port.attach", "params": attach.params()});
    // The answer would come in a minute.
    let mut control = std::os::unix::net::UnixStream::connect(daemon.control_socket()).expect("control socket");
    writeln!(control, "{request}").expect("request");
    until("its VF is being started", || {
        daemon.call("port.show", serde_json::json!({"id": "stuck"})).is_ok_and(|_| attach.socket.exists())
    });
    let start = Instant::now();
    daemon.signal(rustix::process::Signal::TERM);
    let status = daemon.wait(Duration::from_secs(10));
    let took = start.elapsed();
    assert!(status.success(), "{status} after SIGTERM:\n{}", daemon.log());
    let named = |line: &str| line.contains("ERROR") && line.contains("stuck") && !line.contains("port=port");
    assert!(daemon.log().lines().any(named), "{}", daemon.log());
    // The other one was closed as ever.
    assert!(!daemon.socket("port.sock").exists());
    took
}

/// As above, while the port's lanes are out: the cores go on with them until the process ends, so DPDK must, too.
#[cfg(all(feature = "dpdk", debug_assertions))]
#[test]
fn sigterm_beside_a_stuck_port_whose_lanes_are_out() {
    let env = vec![("VIRTIO_FORWARDER_TEST_VF_LOOK_DELAY_MS".to_owned(), "stuck:60000".to_owned())];
    let args = vec!["--poll".to_owned()];
    let mut daemon = Daemon::with(Options { env, args, ..Options::default() });
    let mut guest = Guest::connect(&daemon.attach("stuck", "vdev:net_null0", 1), &Plan::default());
    let before = daemon.lanes("stuck").vf_to_guest;
    guest.pairs[0].tx.send(&[0x42; 600]);
    guest.pairs[0].tx.flush();
    until("its lanes are out", || daemon.lanes("stuck").guest_to_vf.packets > 0);
    // The port looks at its VF once a second: by now it does, and is stuck, also where its thread had to wait.
    std::thread::sleep(Duration::from_secs(4));
    assert!(daemon.lanes("stuck").vf_to_guest != before, "net_null has frames at all times");
    daemon.signal(rustix::process::Signal::TERM);
    let status = daemon.wait(Duration::from_secs(10));
    let log = daemon.log();
    assert!(status.success(), "{status} after SIGTERM:\n{log}");
    assert!(log.lines().any(|line| line.contains("ERROR") && line.contains("stuck")), "{log}");
    assert!(!log.contains("not ready port"), "{log}");
}

/// A front end that asks and asks, and reads an answer just often enough to keep its connection.
struct SlowReader {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl SlowReader {
    /// Between two answers that it reads. A front end is given up after 200 ms without one: the rest is for a
    /// machine that lets this thread wait.
    const PAUSE: Duration = Duration::from_millis(70);

    /// The port's thread waits for room for its answers when this returns.
    fn on(daemon: &Daemon, socket: &Path) -> Self {
        let front = FrontEnd::connect(socket);
        daemon.until_guest("port", true);
        front.stream().set_nonblocking(true).expect("non-blocking");
        let ask = message(request::GET_FEATURES, VERSION, 0, &[]);
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, (began, begun)) = (stop.clone(), std::sync::mpsc::channel());
        let thread = std::thread::spawn(move || {
            for round in 0.. {
                while front.send_bytes(&ask, &[]).is_ok() {}
                if round == 4 {
                    let _ = began.send(());
                }
                std::thread::sleep(Self::PAUSE);
                let read = front.receive();
                if stopped.load(Ordering::Relaxed) || read.is_err() {
                    break;
                }
            }
        });
        // Or it was given up before: who looks will see.
        let _ = begun.recv();
        Self { stop, thread }
    }

    fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the reader");
    }
}

#[test]
fn a_vmm_that_reads_slowly_delays_its_port_only_a_little() {
    once_of_several(|| {
        let daemon = Daemon::start();
        let socket = daemon.attach("port", "soft:loop", 1);
        let reader = SlowReader::on(&daemon, &socket);
        let params = serde_json::json!({
            "id": "port", "vfs": ["soft:loop"], "queue_pairs": 1, "socket": {"path": socket, "mode": "0600"},
        });
        let start = Instant::now();
        assert_eq!(daemon.call("port.attach", params).expect("attach")["changed"], true);
        let changed = start.elapsed();
        let stayed = daemon.show("port")["guest"]["guest"] == true;
        let start = Instant::now();
        daemon.detach("port");
        let detached = start.elapsed();
        reader.end();

        let socket = daemon.attach("port", "soft:loop", 1);
        let reader = SlowReader::on(&daemon, &socket);
        let stopped = daemon.stop();
        reader.end();
        println!("beside a slow reader: a change {changed:?}, detach {detached:?}, SIGTERM {stopped:?}");
        if !stayed {
            return Err("it was given up: slow is not gone".into());
        }
        quicker("a change", changed, LIMIT)?;
        quicker("detach", detached, LIMIT)?;
        quicker("SIGTERM", stopped, LIMIT)
    });
}

#[test]
fn detach_of_a_port_whose_vmm_is_stuck() {
    let daemon = Daemon::start();
    let before = daemon.census();
    once_of_several(|| {
        let socket = daemon.attach("port", "soft:loop", 1);
        let _deaf = deaf(&socket);
        let start = Instant::now();
        daemon.detach("port");
        let took = start.elapsed();
        assert!(!socket.exists(), "the socket file was left behind");
        assert_eq!(daemon.ports(), Vec::<String>::new());
        daemon.until_census(&before);
        quicker("detach", took, LIMIT)
    });
    daemon.stop();
}

/// A killed daemon leaves its sockets; the next one replaces them, and its guests carry on.
fn killed(times: usize, options: Options) {
    let mut daemon = Daemon::with(options);
    let huge = census::huge_kib(daemon.pid());
    for round in 0..times {
        let socket = daemon.attach("port", "soft:loop", 1);
        let mut guest = Guest::connect(&socket, &Plan::default());
        Flows::new(1).exchange(&mut guest, &[0], 100, 600);
        for _ in 0..100 {
            guest.pairs[0].tx.send(&[0x42; 600]);
        }
        guest.pairs[0].tx.flush();
        let killed = daemon.pid();
        daemon.kill();
        drop(guest);
        assert_eq!(census::huge_files(killed), Vec::<PathBuf>::new(), "after kill {round}");
        daemon.restart();
        assert_eq!(census::huge_kib(daemon.pid()), huge, "after kill {round}");
    }
    // The dead daemon's socket file is replaced, and goes with the port.
    daemon.attach("port", "soft:loop", 1);
    daemon.detach("port");
    daemon.stop();
}

#[test]
fn killed_and_started_again() {
    killed(5, Options::default());
}

#[cfg(feature = "dpdk")]
#[test]
fn killed_twenty_times_with_huge_pages() {
    if census::free_hugepages() < 32 {
        crate::support::skip!("killed_twenty_times_with_huge_pages", "fewer than 32 free huge pages");
    }
    let before = census::free_hugepages();
    killed(20, Options { huge: true, ..Options::default() });
    // Pages that others take or give meanwhile make it wait, or end early; pages of ours that stay make it fail.
    until("as many huge pages are free as before", || census::free_hugepages() >= before);
}

#[cfg(feature = "dpdk")]
#[test]
fn huge_pages_are_returned() {
    if census::free_hugepages() < 32 {
        crate::support::skip!("huge_pages_are_returned", "fewer than 32 free huge pages");
    }
    let daemon = Daemon::with(Options { huge: true, ..Options::default() });
    daemon.attach("first", "vdev:net_ring0", 1);
    daemon.detach("first");
    let pid = daemon.pid();
    let idle = census::huge_kib(pid);
    assert!(idle > 0, "the daemon uses hugepages");
    for _ in 0..20 {
        let socket = daemon.attach("port", "vdev:net_ring0", 1);
        let mut guest = Guest::connect(&socket, &Plan::default());
        Flows::new(1).exchange(&mut guest, &[0], 100, 600);
        assert!(census::huge_kib(pid) > idle, "a VF takes hugepages");
        daemon.detach("port");
    }
    assert_eq!(census::huge_kib(pid), idle, "detach returns every huge page");
    daemon.stop();
    assert_eq!(census::huge_files(pid), Vec::<PathBuf>::new());
}
