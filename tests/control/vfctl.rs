//! The operator's tool, as scripts see it.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::daemon::{BROKEN_VF, BUSY_PORT, Daemon};

fn command(socket: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vfctl"));
    command.env_remove("VFCTL_SOCKET").arg("--control-socket").arg(socket);
    command
}

/// Runs `vfctl`; words are separated by blanks.
fn run(daemon: &Daemon, words: &str) -> Output {
    command(&daemon.socket()).args(words.split_whitespace()).output().unwrap()
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn json_of(daemon: &Daemon, words: &str) -> Value {
    serde_json::from_str(&stdout(&run(daemon, &format!("--json {words}")))).unwrap()
}

/// The lines of a table, split at blanks.
fn rows(text: &str) -> Vec<Vec<&str>> {
    text.lines().map(|line| line.split_whitespace().collect()).collect()
}

#[test]
fn attach_list_show_stats_detach() {
    let daemon = Daemon::start();
    let socket = daemon.port_socket("a");
    let attach = format!(
        "attach a --socket {socket} --vf vdev:net_null0 --queues 2 --mtu 9000 --mac 52:54:00:00:00:01 --cores 2,1 \
         --offloads checksum,tso4 --group 0 --socket-mode 0666"
    );
    assert_eq!(stdout(&run(&daemon, &attach)), "a: attached, ready\n");
    assert_eq!(stdout(&run(&daemon, &attach)), "a: unchanged, ready\n");

    let list = stdout(&run(&daemon, "list"));
    assert_eq!(
        rows(&list),
        [
            vec!["PORT", "STATE", "VF", "SOCKET", "ROLE", "QUEUES", "MTU", "CORES"],
            vec!["a", "ready", "vdev:net_null0", &socket, "server", "2", "9000", "2,1"],
        ]
    );

    let show = stdout(&run(&daemon, "show a"));
    for part in ["group 0, mode 0666", "checksum,tso4 (offered: checksum,tso4)", "link up, 2 of 4", "not connected"] {
        assert!(show.contains(part), "{part:?} in {show}");
    }
    let port = json_of(&daemon, "show a");
    assert_eq!((&port["mac"], &port["cores"]), (&json!("52:54:00:00:00:01"), &json!([2, 1])));

    let stats = stdout(&run(&daemon, "stats a"));
    assert_eq!(rows(&stats)[1], ["a", "guest_to_vf", "2", "3", "180", "1", "0", "0", "-"]);
    assert_eq!(rows(&stats)[2][..4], ["a", "vf_to_guest", "1", "0"]);

    assert_eq!(stdout(&run(&daemon, &format!("detach --socket {socket}"))), "a: detached\n");
    assert_eq!(stdout(&run(&daemon, "detach a")), "unchanged: there was no such port\n");
    assert_eq!(json_of(&daemon, "list"), json!({"ports": []}));
}

#[test]
fn a_waiting_port_says_why() {
    let daemon = Daemon::start();
    let socket = daemon.port_socket("a");
    let text = stdout(&run(&daemon, &format!("attach a --socket {socket} --vf 0000:05:08.1 --role client")));
    assert_eq!(text, "a: attached, waiting\n  waits: 0000:05:08.1 is not there: create the VF\n");
    assert!(stdout(&run(&daemon, "list")).ends_with("a: 0000:05:08.1 is not there: create the VF\n"));
    assert_eq!(stdout(&run(&daemon, "detach --vf 0000:05:08.1")), "a: detached\n");
}

#[test]
fn sync_and_takeover() {
    let daemon = Daemon::start();
    for (id, vf) in [("a", "vdev:net_null0"), ("b", "vdev:net_null1"), (BUSY_PORT, "vdev:net_null2")] {
        stdout(&run(&daemon, &format!("attach {id} --socket {} --vf {vf}", daemon.port_socket(id))));
    }
    assert_eq!(stdout(&run(&daemon, "sync a z busy")), "surplus: b\nmissing: z\n");
    assert_eq!(stdout(&run(&daemon, "sync a busy --remove")), "detached: b\nmissing: -\n");

    let steal = |vf: &str| format!("attach thief --socket {} --vf {vf} --takeover", daemon.port_socket("thief"));
    assert_eq!(run(&daemon, &steal("vdev:net_null2")).status.code(), Some(5), "its guest is connected");
    assert_eq!(stdout(&run(&daemon, &steal("vdev:net_null0"))), "thief: attached, ready\n  taken from: a\n");
    assert_eq!(stdout(&run(&daemon, "sync --none --remove")), "detached: busy, thief\nmissing: -\n");

    let info = stdout(&run(&daemon, "info"));
    assert!(info.contains("1 (0 lanes), 2 (0 lanes)"), "{info}");
}

#[test]
fn a_pending_attribute_is_named() {
    let daemon = Daemon::start();
    let attach = |more: &str| format!("attach busy --socket {} --vf soft:null {more}", daemon.port_socket("busy"));
    stdout(&run(&daemon, &attach("")));
    let text = stdout(&run(&daemon, &attach("--mtu 9000")));
    assert_eq!(text, "busy: attached, connected\n  with the next guest connection: mtu\n");
}

#[test]
fn exit_codes_and_errors_can_be_relied_on() {
    let daemon = Daemon::start();
    let here = daemon.port_socket("a");
    stdout(&run(&daemon, &format!("attach a --socket {here} --vf vdev:net_null0")));
    let there = daemon.port_socket("b");
    for (words, code, message) in [
        (format!("attach b --socket {there} --vf {BROKEN_VF}"), 1, "no hugepages are left"),
        ("attach b".to_owned(), 2, "--socket"),
        ("frobnicate".to_owned(), 2, "unrecognized"),
        ("detach".to_owned(), 2, "required"),
        ("detach a --vf soft:null".to_owned(), 2, "cannot be used"),
        ("sync --remove".to_owned(), 2, "required"),
        (format!("attach b --socket {there} --vf 05:99.9"), 2, "names no VF"),
        ("show b".to_owned(), 4, "there is no port b"),
        ("stats b".to_owned(), 4, "there is no port b"),
        (format!("attach b --socket {there} --vf vdev:net_null0"), 5, "held by port a"),
        (format!("attach b --socket {here} --vf soft:null"), 5, "held by port a"),
        (format!("attach b --socket {there} --vf soft:null --mtu 1"), 6, "use 68 to 9216"),
        (format!("attach b --socket {there} --vf vdev:net_pcap0"), 6, "--allow-vdev net_pcap"),
        ("attach b --socket /etc/passwd --vf soft:null".to_owned(), 6, "--socket-dir /etc"),
    ] {
        let output = run(&daemon, &words);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{words}: {stderr}");
        assert!(stderr.contains(message), "{words}: {stderr}");
        assert!(output.stdout.is_empty());
    }
    let output = run(&daemon, "--json show b");
    let error: Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!((output.status.code(), &error["error"]["data"]["code"]), (Some(4), &json!("not_found")));

    let nobody = command(&daemon.dir.path().join("nobody")).arg("list").output().unwrap();
    assert_eq!(nobody.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&nobody.stderr).contains("is the daemon running"));
}

#[test]
fn the_socket_can_come_from_the_environment() {
    let daemon = Daemon::start();
    let output = Command::new(env!("CARGO_BIN_EXE_vfctl")).env("VFCTL_SOCKET", daemon.socket()).arg("list").output();
    assert!(output.unwrap().status.success());
}

#[test]
fn watch_shows_rates_until_interrupted() {
    let daemon = Daemon::start();
    stdout(&run(&daemon, &format!("attach a --socket {} --vf soft:null", daemon.port_socket("a"))));
    let mut watch = command(&daemon.socket()).args(["stats", "--watch"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.next().unwrap().contains("PACKETS/S"));
    assert_eq!(
        lines.next().unwrap().split_whitespace().collect::<Vec<_>>(),
        ["a", "ready", "guest_to_vf", "1", "0", "0.0", "0.0", "0", "-"]
    );
    kill_process(Pid::from_child(&watch), Signal::INT).unwrap();
    assert_eq!(watch.wait().unwrap().code(), Some(0));
}
