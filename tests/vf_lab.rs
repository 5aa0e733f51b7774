//! `scripts/vf-lab`: the daemon on an SR-IOV VF with DPDK's own driver, VFIO and an IOMMU, all of it emulated. The
//! script says what each scenario shows; it ends at the first that fails, with the logs.
#![cfg(feature = "dpdk")]

mod support;

use std::path::Path;
use std::process::{Command, Stdio};

use support::{program, skip};

#[test]
fn the_daemon_drives_an_emulated_vf() {
    const NAME: &str = "the_daemon_drives_an_emulated_vf";
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    if !rustix::process::geteuid().is_root() {
        skip!(NAME, "needs root, for a network namespace");
    }
    // QEMU has igb since 8.0; the machine's own may be older.
    if !top.join("build/qemu/10.0/qemu-system-x86_64").exists() {
        skip!(NAME, "no build/qemu/10.0, which scripts/setup unpacks");
    }
    if program("tcpdump").is_none() || program("dpdk-testpmd").is_none() {
        skip!(NAME, "no tcpdump or no dpdk-testpmd, which scripts/setup installs");
    }
    let lab = Command::new(top.join("scripts/vf-lab")).stdin(Stdio::null()).status().expect("scripts/vf-lab starts");
    assert!(lab.success(), "scripts/vf-lab ended with {lab}; its output is above");
}
