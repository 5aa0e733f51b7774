//! Attach and detach return every hugepage. A process of its own: it starts EAL with hugepages.
#![cfg(feature = "dpdk")]

#[allow(dead_code)]
mod wire;

#[allow(dead_code)]
#[path = "support/census.rs"]
mod census;

use std::fs::{self, File};
use std::process;

use arrayvec::ArrayVec;
use rustix::fs::{FlockOperation, flock};
use virtio_forwarder::vf::eal::{Eal, EalConfig};
use virtio_forwarder::vf::{Queues, RxQueue, TxQueue, Vf, VfConfig};

const RESERVED: &str = "/proc/sys/vm/nr_hugepages";

/// Hugepages reserved for the test, and given back.
struct Reservation(i64);

impl Reservation {
    fn of(pages: i64) -> Option<Self> {
        let reservation = Self(change(pages));
        (census::free_hugepages() >= pages.unsigned_abs()).then_some(reservation)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        change(-self.0);
    }
}

/// Reserves more hugepages or fewer; how many it were. Others (`scripts/common.sh`) do so at the same time.
fn change(pages: i64) -> i64 {
    let Ok(lock) = File::open(RESERVED) else { return 0 };
    flock(&lock, FlockOperation::LockExclusive).expect("flock");
    let reserved = || fs::read_to_string(RESERVED).expect("a number").trim().parse::<i64>().expect("a number");
    let before = reserved();
    let _ = fs::write(RESERVED, (before + pages).max(0).to_string());
    reserved() - before
}

#[test]
fn attach_and_detach_return_every_hugepage() {
    let Some(_reservation) = Reservation::of(96) else {
        println!("SKIPPED attach_and_detach_return_every_hugepage: this machine has no 96 hugepages to reserve");
        return;
    };
    let directories = || {
        fs::read_dir("/run/dpdk").map_or(0, |entries| {
            let mine = format!("virtio-forwarder-{}", process::id());
            entries.filter(|entry| entry.as_ref().is_ok_and(|entry| entry.file_name() == mine.as_str())).count()
        })
    };
    let eal = Eal::start(&EalConfig::default()).unwrap();
    assert_eq!(directories(), 0, "EAL leaves no directory");

    let used = || census::huge_kib(process::id());
    let life = || {
        let mut vf = Vf::probe(&"vdev:net_ring0".parse().unwrap()).unwrap();
        let config = VfConfig { queues: 4, mtu: 9000, mac: None };
        let Queues::Ethdev(mut tx, mut rx) = vf.configure(&config).unwrap() else {
            panic!("an ethdev has ethdev queues")
        };
        vf.start().unwrap();
        let in_use = used();
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
    let before = used();
    for _ in 0..10 {
        assert!(life() > before, "a VF takes hugepages");
        assert_eq!(used(), before);
    }
    println!("{before} KiB of hugepages in use before and after each of 10 lives");
    drop(eal);
}
