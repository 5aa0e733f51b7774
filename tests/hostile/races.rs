//! A second guest processor that changes shared memory while the daemon works on it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::support::frontend::feature;
use crate::support::guest::{Guest, Plan};
use crate::support::memory::Region;
use crate::support::queue::Queue;
use crate::support::tx::NetHdr;
use crate::{Kept, Target, attacks};

/// How long each race is run.
const RACE: Duration = Duration::from_millis(150);

attacks! {
    // CVE-2020-14375: read twice, checked once.
    descriptors_that_change_while_sent: |t| race(t, |guest| areas_of(&guest.pairs[0].tx.queue, Area::Desc));
    descriptors_that_change_while_received: |t| race(t, |guest| areas_of(&guest.pairs[0].rx.queue, Area::Desc));
    heads_that_change: |t| race(t, |guest| areas_of(&guest.pairs[0].tx.queue, Area::Heads));
    used_rings_that_change: |t| race(t, |guest| {
        let mut areas = areas_of(&guest.pairs[0].tx.queue, Area::Used);
        areas.extend(areas_of(&guest.pairs[0].rx.queue, Area::Used));
        areas
    });
    // The fix in DPDK of 2025-10: csum_start was read once to check and once to use.
    headers_that_change: |t| race(t, |guest| {
        // Every send buffer begins with its virtio-net header.
        let region = &guest.regions[0];
        (0..256).map(|i| (guest.pairs[0].tx.place(i) - region.gpa, 16)).collect()
    });
}

enum Area {
    Desc,
    Heads,
    Used,
}

/// Offset in the region and length of what is overwritten.
type Spots = Vec<(u64, u64)>;

fn areas_of(queue: &Queue, area: Area) -> Spots {
    let n = u64::from(queue.size);
    let (at, len) = match area {
        Area::Desc => (queue.desc, 16 * n),
        Area::Heads => (queue.avail + 4, 2 * n),
        Area::Used => (queue.used, 4 + 8 * n),
    };
    vec![(at - queue.region.gpa, len)]
}

fn race(target: &Target<'_>, spots: impl Fn(&Guest) -> Spots) -> Kept {
    let offered = target.raw().features();
    let offloads = feature::CSUM | feature::HOST_TSO4 | feature::HOST_TSO6;
    let plan =
        Plan { features: Plan::default().features | offered & (offloads | feature::INDIRECT), ..Plan::default() };
    let mut guest = target.guest(&plan);
    let stop = Arc::new(AtomicBool::new(false));
    let flipper = flip(guest.regions[0].clone(), spots(&guest), stop.clone());
    let start = Instant::now();
    let header = NetHdr { flags: NetHdr::NEEDS_CSUM, csum_start: 34, csum_offset: 6, ..NetHdr::default() };
    // The driver's own books are void once the areas change: the indices alone drive the device.
    while start.elapsed() < RACE {
        for position in 0..256 {
            let tx = &mut guest.pairs[0].tx;
            tx.rewrite(position, &header, &[0x55; 200]);
            let rx = &mut guest.pairs[0].rx;
            rx.rewrite(position);
        }
        for queue in [&guest.pairs[0].tx.queue, &guest.pairs[0].rx.queue] {
            queue.write_avail_idx(queue.device_idx().wrapping_add(queue.size));
            queue.kick_now();
        }
    }
    stop.store(true, Ordering::Relaxed);
    flipper.join().expect("flipper");
    Box::new(guest)
}

/// Overwrites random words of `spots` with values that are often nearly right.
fn flip(region: Arc<Region>, spots: Spots, stop: Arc<AtomicBool>) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let mut x = 0x1234_5677_u32;
        let mut next = || {
            x ^= x << 13;
            x ^= x >> 17;
            x ^= x << 5;
            x
        };
        let tempting = [0_u16, 1, 2, 3, 4, 12, 255, 256, 257, 0x7fff, 0x8000, 0xffff];
        while !stop.load(Ordering::Relaxed) {
            let (at, len) = spots[next() as usize % spots.len()];
            let word = u64::from(next()) % (len / 2);
            let value = tempting[next() as usize % tempting.len()];
            region.store(region.gpa + at + 2 * word, value, Ordering::Relaxed);
        }
    })
}
