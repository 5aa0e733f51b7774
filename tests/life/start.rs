//! Starts that fail.

use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use crate::support::daemon::Daemon;

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
    let begin = Instant::now();
    let output = start(&daemon.control_socket(), &["--eal-arg=--no-such-option"]);
    let took = begin.elapsed();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let text = text(&output);
    assert!(text.contains("--control-socket") && !text.contains("EAL"), "{text}");
    // Generous: the machine may be busy. The EAL alone takes longer than the refusal.
    assert!(took < Duration::from_secs(1), "{took:?}");
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
