//! What a poll core asks of the kernel while it moves frames: nothing but to signal guests that want it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use clap::Parser;
use rustix::process::{Pid, Signal, kill_process};

#[allow(dead_code, clippy::duplicate_mod)]
#[path = "../examples/load-guest/main.rs"]
mod load_guest;
mod support;

use support::daemon::{Daemon, Options};
use support::guest::{Guest, Plan};
use support::{program, skip};

/// The thread of the daemon's poll core.
fn poll_thread(daemon: &Daemon) -> u32 {
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.pid())).expect("the daemon's threads");
    let mut tasks = tasks.map(|task| task.expect("a thread").path());
    let task = tasks.find(|task| fs::read_to_string(task.join("comm")).is_ok_and(|name| name == "poll-1\n"));
    task.and_then(|task| task.file_name()?.to_str()?.parse().ok()).expect("a thread poll-1")
}

/// The system calls that a thread makes meanwhile, by name.
fn system_calls(thread: u32, meanwhile: impl FnOnce()) -> BTreeMap<String, u64> {
    let mut strace = Command::new("strace")
        .args(["-c", "-U", "calls,name", "-p", &thread.to_string()])
        .stderr(Stdio::piped())
        .spawn()
        .expect("strace");
    let status = format!("/proc/{thread}/status");
    support::until("strace has the thread", || {
        let status = fs::read_to_string(&status).expect("the thread's status");
        status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
    });
    meanwhile();
    assert!(strace.try_wait().expect("strace").is_none(), "it ended before it was told to");
    kill_process(Pid::from_child(&strace), Signal::INT).expect("end strace");
    let said = strace.wait_with_output().expect("strace");
    let said = String::from_utf8(said.stderr).expect("what strace says");
    assert!(said.contains("attached"), "{said}");
    let counts = said.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        Some((words.next()?.parse().ok()?, words.next()?))
    });
    counts.filter(|(_, name)| *name != "total").map(|(calls, name)| (name.to_owned(), calls)).collect()
}

fn start() -> Daemon {
    Daemon::with(Options { args: vec!["--poll".into()], ..Options::default() })
}

#[test]
fn a_core_at_work_makes_no_system_call() {
    if program("strace").is_none() {
        skip!("a_core_at_work_makes_no_system_call", "no strace");
    }
    let daemon = start();
    let thread = poll_thread(&daemon);
    let mut cases = vec![
        ("soft:loop", "--direction both --touch"),
        ("soft:loop", "--direction both --event-idx --mergeable --size imix"),
        ("soft:loop", "--direction both --format packed --in-order"),
    ];
    if cfg!(feature = "dpdk") {
        cases.push(("vdev:net_null0", "--direction both --mergeable"));
        cases.push(("vdev:net_null0", "--direction both --mergeable --size 1518"));
        cases.push(("vdev:net_ring0", "--direction both --format packed --event-idx --mergeable"));
    }
    for (vf, options) in cases {
        let socket = daemon.attach("port", vf, 1);
        let mut moved = 0;
        let calls = std::thread::scope(|scope| {
            let load = scope.spawn(|| load(&socket, options));
            let packets = || {
                let lanes = daemon.lanes("port");
                (lanes.guest_to_vf.packets, lanes.vf_to_guest.packets)
            };
            let calls = {
                // Rings that start are signalled once.
                support::until("frames move", || packets().0.min(packets().1) > 10_000);
                system_calls(thread, || {
                    let before = packets();
                    std::thread::sleep(Duration::from_millis(300));
                    let after = packets();
                    moved = (after.0 - before.0).min(after.1 - before.1);
                })
            };
            load.join().expect("the load guest");
            calls
        });
        println!("{vf} {options}: {moved} frames each way, system calls: {calls:?}");
        assert!(moved > 10_000, "{vf} {options}: {moved} frames");
        assert_eq!(calls, BTreeMap::new(), "{vf} {options}");
        daemon.detach("port");
    }
    daemon.stop();
}

/// The load guest, for longer than is looked at.
fn load(socket: &Path, options: &str) {
    let line = format!("load-guest {} --seconds 1.5 {options}", socket.display());
    let args = load_guest::Args::try_parse_from(line.split_whitespace()).expect("options of the load guest");
    load_guest::run(&args).unwrap_or_else(|error| panic!("{options}: {error}"));
}

/// Of a guest that wants to be signalled each call is seen, and there is no other: what sees none elsewhere sees.
#[test]
fn a_guest_that_wants_signals_costs_one_a_burst() {
    if program("strace").is_none() {
        skip!("a_guest_that_wants_signals_costs_one_a_burst", "no strace");
    }
    let daemon = start();
    let socket = daemon.attach("port", "soft:null", 1);
    let mut guest = Guest::connect(&socket, &Plan::default());
    let tx = &mut guest.pairs[0].tx;
    let sent = || daemon.lanes("port").guest_to_vf.kicks_sent;
    let mut signals = 0;
    let mut calls = system_calls(poll_thread(&daemon), || {
        let before = sent();
        for _ in 0..1000 {
            assert!(tx.send(&[7; 100]));
            tx.flush();
            support::until("it is taken", || tx.reap() > 0);
        }
        signals = sent() - before;
    });
    println!("{signals} signals, system calls: {calls:?}");
    assert!(signals >= 1000);
    // Of the watchdog, who may take a call that strace holds up for one that blocks.
    calls.remove("rt_sigreturn");
    assert_eq!(calls, BTreeMap::from([("write".to_owned(), signals)]));
    drop(guest);
    daemon.stop();
}
