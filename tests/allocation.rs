//! A poll core at work allocates nothing and frees nothing.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use virtio_forwarder::relay::{GuestToVf, IdlePolicy, LaneCounters, LaneId, Poller, VfToGuest};
use virtio_forwarder::vf::{Queues, Vf, VfConfig, VfSpec};

#[path = "../benches/rig/mod.rs"]
mod rig;
use rig::{Driver, HEADER, Receiver, Sender, plan};

const PATIENCE: Duration = Duration::from_secs(20);
const RING: u16 = 256;
const BUFFER: usize = 2048;
const AT: usize = 64 * 1024;
const LEN: usize = AT + RING as usize * BUFFER;

thread_local! {
    static WATCHED: Cell<bool> = const { Cell::new(false) };
}
static CALLS: AtomicU64 = AtomicU64::new(0);

/// The system's allocator, and how often a watched thread calls it.
struct Counting;

fn count() {
    if WATCHED.get() {
        CALLS.fetch_add(1, Relaxed);
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: it is the system's; the counter does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count();
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, len: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, len) }
    }
}

/// Sends frames round a VF that loops until so many more are back.
fn exchange(tx: &mut Sender, rx: &mut Receiver, frames: usize) {
    let (start, mut sent, mut back) = (Instant::now(), 0, 0);
    while back < frames {
        // As many as a VF's queue holds, so that none is dropped.
        while sent < frames && sent - back < usize::from(RING) / 2 && tx.room() > 0 {
            tx.send(&[0; HEADER], &[7; 1514][..60 + sent * 37 % 1455]);
            sent += 1;
        }
        tx.ring.publish();
        tx.reclaim();
        rx.post(usize::from(RING));
        back += std::iter::from_fn(|| rx.receive()).count();
        assert!(start.elapsed() < PATIENCE, "{back} of {sent} frames are back");
    }
}

#[test]
fn a_core_at_work_allocates_nothing() {
    let mut vf = Vf::probe(&VfSpec::SoftLoop).unwrap();
    let queues = vf.configure(&VfConfig { queues: 1, mtu: 1500, mac: None }).unwrap();
    vf.start().unwrap();
    let (txs, rxs) = match queues {
        Queues::Soft(txs, rxs) => (txs, rxs),
        #[cfg(feature = "dpdk")]
        Queues::Ethdev(..) => unreachable!("a soft VF"),
    };
    let mut tx = Sender::new(Driver::new(LEN, RING, 0), AT, BUFFER);
    let mut rx = Receiver::new(Driver::new(LEN, RING, 0), AT, BUFFER);
    let counters = || Arc::new(LaneCounters::default());
    let mut to_vf = GuestToVf::new(LaneId(1), 1, txs, Arc::new(true.into()), counters());
    let mut from_vf = VfToGuest::new(LaneId(2), 1, rxs, counters());
    use virtio_forwarder::relay::Lane;
    to_vf.insert_ring(0, plan(&tx.ring, LEN)).unwrap();
    from_vf.insert_ring(0, plan(&rx.ring, LEN)).unwrap();

    let mut core = Poller::start(0, IdlePolicy::Adaptive, || {
        WATCHED.set(true);
        Ok(())
    })
    .unwrap();
    core.adopt(Box::new(to_vf));
    core.adopt(Box::new(from_vf));
    exchange(&mut tx, &mut rx, 1000);
    let before = CALLS.load(Relaxed);
    assert!(before > 0, "what a core allocates when it starts is counted");
    exchange(&mut tx, &mut rx, 200_000);
    // It sleeps, and is woken: without a kick fd, by a nap's end.
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(5));
        exchange(&mut tx, &mut rx, 10);
    }
    assert_eq!(CALLS.load(Relaxed) - before, 0, "calls of the allocator while the core was at work");
    core.stop();
}
