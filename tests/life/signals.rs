//! SIGTERM and SIGKILL.

use std::path::PathBuf;
use std::time::Duration;

use crate::support::census;
use crate::support::daemon::{Attach, Daemon, Options};
use crate::support::frontend::{FrontEnd, VERSION, message, request};
use crate::support::guest::{Flows, Guest, Plan};

#[test]
fn sigterm_without_ports() {
    Daemon::start().stop();
}

#[test]
fn sigterm_under_traffic() {
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
    let took = daemon.stop();
    println!("SIGTERM with four busy guests took {took:?}");
}

#[test]
fn sigterm_beside_a_vmm_that_says_nothing() {
    let daemon = Daemon::start();
    let socket = daemon.attach("port", "soft:loop", 1);
    let front = FrontEnd::connect(&socket);
    front.send_bytes(&message(request::SET_FEATURES, VERSION, 8, &[1]), &[]).expect("half a message");
    daemon.until_guest("port", true);
    daemon.stop();
}

#[test]
fn sigterm_beside_a_vmm_that_reads_nothing() {
    let daemon = Daemon::start();
    let socket = daemon.attach("port", "soft:loop", 1);
    let front = FrontEnd::connect(&socket);
    front.stream().set_nonblocking(true).expect("non-blocking");
    let ask = message(request::GET_FEATURES, VERSION, 0, &[]);
    while front.send_bytes(&ask, &[]).is_ok() {}
    daemon.stop();
}

#[test]
fn sigterm_while_nobody_listens() {
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
    daemon.stop();
}

#[test]
fn detach_of_a_port_whose_vmm_is_stuck() {
    let daemon = Daemon::start();
    let before = daemon.census();
    let socket = daemon.attach("port", "soft:loop", 1);
    let front = FrontEnd::connect(&socket);
    front.stream().set_nonblocking(true).expect("non-blocking");
    let ask = message(request::GET_FEATURES, VERSION, 0, &[]);
    while front.send_bytes(&ask, &[]).is_ok() {}
    let start = std::time::Instant::now();
    daemon.detach("port");
    assert!(start.elapsed() < Duration::from_secs(1), "detach took {:?}", start.elapsed());
    assert!(!socket.exists(), "the socket file was left behind");
    assert_eq!(daemon.ports(), Vec::<String>::new());
    daemon.until_census(&before);
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
    killed(20, Options { huge: true, ..Options::default() });
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
