//! The lab itself: real guests of both QEMU releases on DPDK's own vhost-user back end. When these fail
//! as well, look at the machine or at the guest, not at the daemon.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use support::vm::{Qemu, Vm, VmConfig};

/// `dpdk-testpmd` in the daemon's place: a vhost-user server socket relayed to a tap.
struct Reference {
    testpmd: Child,
    socket: PathBuf,
}

impl Reference {
    fn start(dir: &Path, tap: &str) -> Reference {
        let socket = dir.join("port.sock");
        let log = fs::File::create(dir.join("testpmd.log")).unwrap();
        let testpmd = Command::new("dpdk-testpmd")
            .args([
                "--lcores",
                "0@0,1@0",
                "--no-huge",
                "-m",
                "128",
                "--no-pci",
                "--no-shconf",
                "--no-telemetry",
                "--vdev",
            ])
            .arg(format!("net_vhost0,iface={},queues=1", socket.display()))
            .args(["--vdev", &format!("net_tap0,iface={tap}"), "--", "-i", "--auto-start", "--nb-cores=1"])
            .args(["--forward-mode=io", "--total-num-mbufs=4096"])
            // testpmd ends when its standard input does.
            .stdin(Stdio::piped())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("dpdk-testpmd starts");
        let reference = Reference { testpmd, socket };
        let deadline = Instant::now() + support::PATIENCE;
        while !(reference.socket.exists() && Path::new("/sys/class/net").join(tap).exists()) {
            let log = fs::read_to_string(dir.join("testpmd.log")).unwrap();
            assert!(Instant::now() < deadline, "testpmd made no socket and tap:\n{log}");
            std::thread::sleep(Duration::from_millis(50));
        }
        reference
    }
}

impl Drop for Reference {
    fn drop(&mut self) {
        let _ = self.testpmd.kill();
        let _ = self.testpmd.wait();
    }
}

fn host(program: &str, arguments: &str) {
    let done = Command::new(program).args(arguments.split(' ')).output().unwrap();
    assert!(done.status.success(), "{program} {arguments}: {}", String::from_utf8_lossy(&done.stderr));
}

fn boots_pings_reboots(qemu: Qemu, tap: &str, net: &str) {
    if !rustix::process::geteuid().is_root() {
        support::skip!("lab", "needs root, for taps");
    }
    if support::program("dpdk-testpmd").is_none() {
        support::skip!("lab", "no dpdk-testpmd: scripts/setup installs it, and unpacks QEMU");
    }
    let dir = tempfile::tempdir().unwrap();
    let reference = Reference::start(dir.path(), tap);
    host("ip", &format!("addr add {net}.1/28 dev {tap}"));
    host("ip", &format!("link set {tap} up"));

    let mut vm =
        Vm::boot(VmConfig { qemu, address: Some(format!("{net}.2/28")), ..VmConfig::new(&reference.socket) }).unwrap();
    assert_eq!(vm.run("echo to stdout; echo to stderr >&2; exit 3").unwrap().status, 3);
    assert_eq!(vm.must("printf 'no line break'"), "no line break");
    // Ten are sent, no more: once the addresses are known, none has a reason to be lost.
    support::until("an answer to the guest", || {
        vm.run(&format!("ping -q -c 1 -W 1 {net}.1")).is_ok_and(|ping| ping.success())
    });
    let ping = vm.must(&format!("ping -q -c 10 -A -w 60 {net}.1"));
    assert!(ping.contains("10 packets received"), "{ping}");

    vm.reboot().unwrap();
    host("ping", &format!("-q -c 5 -i 0.05 -w 60 {net}.2"));
    vm.kill().unwrap();
}

#[test]
fn qemu_7_2_boots_pings_reboots() {
    boots_pings_reboots(Qemu::V7_2, "vflab72", "198.18.5");
}

#[test]
fn qemu_10_0_boots_pings_reboots() {
    boots_pings_reboots(Qemu::V10_0, "vflab100", "198.18.6");
}
