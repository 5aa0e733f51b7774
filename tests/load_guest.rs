//! The load guest measures and checks others: here it is checked itself, against our daemon and against DPDK's back
//! end, which has the formats that ours has not.

use std::path::Path;

use clap::Parser;
use serde_json::Value;

#[allow(dead_code, clippy::duplicate_mod)]
#[path = "../examples/load-guest/main.rs"]
mod load_guest;
mod support;

use support::daemon::{Attach, Daemon};
use support::testpmd::Testpmd;

/// Its result.
fn run(socket: &Path, options: &str) -> Result<Value, String> {
    println!("load-guest {options}");
    let args =
        ["load-guest".as_ref(), socket.as_os_str()].into_iter().chain(options.split_whitespace().map(AsRef::as_ref));
    let args = load_guest::Args::try_parse_from(args).expect("options of the load guest");
    load_guest::run(&args).map_err(|error| error.to_string())
}

/// Ways to lay out a ring that every back end has.
const LAYOUTS: [&str; 6] = [
    "",
    "--mergeable --event-idx --size imix",
    "--mergeable --rx-buffer 256 --size 1518 --ring 128",
    "--indirect --pieces 4 --size 594",
    "--pieces 2 --ring 256",
    "--pieces 8 --touch --ring 64",
];

const FORMATS: [&str; 4] = ["", "--in-order", "--format packed", "--format packed --in-order"];

#[test]
fn verifies_our_daemon() {
    let daemon = Daemon::start();
    let socket = daemon.attach("port", "soft:loop", 2);
    for format in FORMATS {
        for options in LAYOUTS.into_iter().chain(["--pairs 2"]) {
            run(&socket, &format!("--mode verify --direction both --seconds 0.1 {format} {options}"))
                .expect("frames as they were sent");
        }
    }
    daemon.stop();
}

#[test]
fn listens() {
    let daemon = Daemon::start();
    let (id, vf) = ("port".to_owned(), "soft:loop".to_owned());
    let socket = daemon.socket("port");
    daemon.attach_as(&Attach { id, socket: socket.clone(), client: true, vf, queues: 1, mtu: None });
    for _ in 0..2 {
        run(&socket, "--listen --mode verify --direction both --seconds 0.1").expect("frames as they were sent");
    }
    daemon.stop();
}

#[test]
fn verifies_dpdk() {
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("vhost.sock");
    let vdevs = [format!("net_vhost0,iface={},queues=2", socket.display()), "net_ring0".into()];
    let Some(testpmd) = Testpmd::start(&vdevs, &["--auto-start", "--forward-mode=io", "--rxq=2", "--txq=2"]) else {
        support::skip!("verifies_dpdk", "no dpdk-testpmd");
    };
    for format in FORMATS {
        for options in LAYOUTS {
            run(&socket, &format!("--mode verify --direction both --seconds 0.1 {format} {options}"))
                .expect("frames as they were sent");
        }
    }
    testpmd.quit();
}

/// What the guest says it sent and received is what the daemon counted.
#[test]
fn counts_as_the_daemon_does() {
    let daemon = Daemon::start();
    let socket = daemon.attach("port", "soft:loop", 1);
    let (mut sent, mut received) = (0, 0);
    for options in [
        "--direction tx --seconds 0.2",
        "--direction both --seconds 0.2 --touch --pieces 2",
        "--direction both --seconds 0.2 --mergeable --rx-buffer 256 --size imix",
        "--mode latency --direction tx --samples 1000 --warm-up 0",
        "--mode latency --direction both --samples 1000 --warm-up 0",
    ] {
        let result = run(&socket, options).expect("a result");
        println!("{result}");
        let number = |name: &str| result[name].as_u64().expect("a number");
        assert!(number("sent") > 0 && (number("received") > 0) == options.contains("both"));
        sent += number("sent");
        received += number("received");
        let lanes = daemon.lanes("port");
        let dropped = lanes.guest_to_vf.dropped;
        assert_eq!(lanes.guest_to_vf.packets + dropped.vf_full + dropped.not_ready, sent, "{dropped:?}");
        assert_eq!(lanes.vf_to_guest.packets, received);
    }
    daemon.stop();
}

#[test]
fn says_what_is_wrong() {
    let daemon = Daemon::start();
    let socket = daemon.attach("port", "soft:null", 1);
    let absent = run(Path::new("/nowhere/port.sock"), "").expect_err("there is no socket");
    assert!(absent.contains("connect to /nowhere/port.sock"), "{absent}");
    let refused = run(&socket, "--pairs 2").expect_err("there is one pair only");
    assert!(refused.contains("does not offer MQ"), "{refused}");
    let lost = run(&socket, "--mode verify --direction both --seconds 0.1").expect_err("nothing comes back");
    assert!(lost.contains("\"lost\":128"), "{lost}");
    let lost = run(&socket, "--mode latency --direction both").expect_err("nothing comes back");
    assert!(lost.contains("did not come back"), "{lost}");
    daemon.stop();
}
