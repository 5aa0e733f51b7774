//! Attach and detach return every hugepage. A process of its own: it starts EAL with hugepages.
#![cfg(feature = "dpdk")]

#[allow(dead_code)]
mod wire;

use std::fs;

use arrayvec::ArrayVec;
use virtio_forwarder::vf::eal::{Eal, EalConfig};
use virtio_forwarder::vf::{Queues, RxQueue, TxQueue, Vf, VfConfig};

const RESERVED: &str = "/proc/sys/vm/nr_hugepages";

fn hugepages(what: &str) -> u64 {
    let info = fs::read_to_string("/proc/meminfo").unwrap();
    let line = info.lines().find(|line| line.starts_with(what)).expect("the kernel has hugepages");
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Hugepages reserved for the test, and given back.
struct Reservation(u64);

impl Reservation {
    fn of(pages: u64) -> Option<Self> {
        let before = hugepages("HugePages_Total");
        let reservation = Self(before);
        fs::write(RESERVED, (before + pages).to_string()).ok()?;
        (hugepages("HugePages_Free") >= pages).then_some(reservation)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let _ = fs::write(RESERVED, self.0.to_string());
    }
}

#[test]
fn attach_and_detach_return_every_hugepage() {
    let Some(_reservation) = Reservation::of(96) else {
        println!("SKIPPED: this machine has no 96 hugepages to reserve");
        return;
    };
    let directories = || {
        fs::read_dir("/run/dpdk").map_or(0, |entries| {
            let mine = format!("virtio-forwarder-{}", std::process::id());
            entries.filter(|entry| entry.as_ref().is_ok_and(|entry| entry.file_name() == mine.as_str())).count()
        })
    };
    let eal = Eal::start(&EalConfig::default()).unwrap();
    assert_eq!(directories(), 0, "EAL leaves no directory");

    let life = || {
        let mut vf = Vf::probe(&"vdev:net_ring0".parse().unwrap()).unwrap();
        let config = VfConfig { queues: 4, mtu: 9000, mac: None };
        let Queues::Ethdev(mut tx, mut rx) = vf.configure(&config).unwrap() else {
            panic!("an ethdev has ethdev queues")
        };
        vf.start().unwrap();
        let in_use = hugepages("HugePages_Free");
        let mut burst = ArrayVec::from_iter([tx[0].copy(&mut &*wire::frame(9014, 1)).unwrap()]);
        assert_eq!(tx[0].send(&mut burst, &mut 0), 1);
        assert_eq!(rx[0].receive(&mut ArrayVec::new()), 1);
        drop((tx, rx));
        vf.stop().unwrap();
        vf.remove().unwrap();
        in_use
    };
    // What DPDK sets up once and keeps.
    life();
    let before = hugepages("HugePages_Free");
    for _ in 0..10 {
        assert!(life() < before, "a VF takes hugepages");
        assert_eq!(hugepages("HugePages_Free"), before);
    }
    println!("{before} hugepages free before and after each of 10 lives");
    drop(eal);
}
