//! Starts that fail.

use std::path::Path;
use std::process::{Command, Output};

use crate::support::daemon::{Daemon, Options};
use crate::support::guest::{Guest, Plan};
use crate::support::until;

/// Starts a daemon that cannot start; how it ended.
fn start(control_socket: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_virtio-forwarder"));
    command.args(["--cores", "1", "--no-huge", "--control-socket"]).arg(control_socket).args(args);
    command.output().expect("start the daemon")
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The EAL could not be started either: the second daemon says what is wrong before it tries.
#[test]
fn a_second_daemon_on_a_control_socket_leaves_the_first_alone() {
    let daemon = Daemon::start();
    let output = start(&daemon.control_socket(), &["--eal-arg=--no-such-option"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let text = text(&output);
    assert!(text.contains("--control-socket") && !text.contains("EAL"), "{text}");
    assert!(daemon.control().call("info", serde_json::json!({})).is_ok(), "the first one's socket is its own");
    daemon.stop();
}

#[test]
fn a_control_socket_that_cannot_be_made_is_refused_first() {
    let output = start(Path::new("/proc/nowhere/control.sock"), &["--eal-arg=--no-such-option"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let text = text(&output);
    assert!(text.contains("/proc/nowhere") && !text.contains("EAL"), "{text}");
}

/// Whoever waits for the socket to answer sees it go.
#[cfg(feature = "dpdk")]
#[test]
fn a_start_that_fails_takes_its_control_socket_with_it() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let socket = dir.path().join("control.sock");
    let output = start(&socket, &["--eal-arg=--no-such-option"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let text = text(&output);
    assert!(text.contains("--eal-arg") && text.contains("--no-such-option"), "{text}");
    assert!(!socket.exists());
}

/// What stands in for an absent device forwards, and nobody can take it for the device.
fn stands_in(stand_in: &str) {
    let absent = "0000:ff:1f.6";
    let args = vec![format!("--stand-in={absent}={stand_in}")];
    let daemon = Daemon::with(Options { args, ..Options::default() });
    let socket = daemon.attach("port", absent, 1);
    let mut guest = Guest::connect(&socket, &Plan::default());
    guest.pairs[0].tx.send(&[0x42; 60]);
    guest.pairs[0].tx.flush();
    until("a frame goes through it", || daemon.lanes("port").guest_to_vf.packets == 1);
    let show = daemon.show("port");
    assert_eq!((&show["stand_in"], &show["vfs"][0]), (&stand_in.into(), &absent.into()), "{show}");
    assert_eq!(show["vf"]["spec"], stand_in, "{show}");
    let output = Command::new(env!("CARGO_BIN_EXE_vfctl"))
        .arg("--control-socket")
        .arg(daemon.control_socket())
        .args(["show", "port"])
        .output()
        .expect("vfctl");
    let shown = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    assert!(shown.contains(absent) && shown.contains(stand_in), "{shown}");
    assert!(shown.to_lowercase().contains("stand"), "{shown}");
    let log = daemon.log();
    let loud = |line: &str| line.contains("WARN") && line.contains("STANDS IN") && line.contains(absent);
    assert_eq!(log.lines().filter(|line| loud(line)).count(), 1, "{log}");
    drop(guest);
    daemon.stop();
}

#[test]
fn a_soft_vf_that_stands_in_says_so() {
    stands_in("soft:loop");
}

#[cfg(feature = "dpdk")]
#[test]
fn a_vdev_that_stands_in_says_so() {
    stands_in("vdev:net_null0");
}
