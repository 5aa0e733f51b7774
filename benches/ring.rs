//! What a ring costs per frame, on one core: no cache misses, no driver at work (it re-offers the same
//! descriptors by moving avail.idx). `ring/pop_*` takes frames of 64 bytes out and copies them,
//! `ring/parse_*` does not copy; `ring/push_*` puts such frames in. `virtio_queue/*` is the same by
//! rust-vmm's queue over vm-memory, without copies.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use virtio_forwarder::ring::{Gather, NetHeader, RxRing, TxRing};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};

mod rig;
use rig::{Descriptor, Driver, WRITE, config, memory};

const SIZE: u16 = 256;
const FRAME: usize = 64;
const HEADER: usize = NetHeader::LEN;
/// The buffers are in the first region, or in both in turns.
const REGIONS: usize = 2;
const REGION: usize = 1 << 20;

/// A driver that has offered its whole ring, with one buffer a descriptor, in `regions` regions.
fn driver(flags: u16, regions: usize) -> Driver {
    let mut driver = Driver::new(REGIONS * REGION, SIZE, 0);
    for i in 0..SIZE {
        let region = usize::from(i) % regions;
        let at = REGION * region + REGION / 2 + usize::from(i) * 2048;
        let addr = driver.gpa(at % (REGIONS * REGION));
        driver.describe(i, Descriptor::new(addr, (HEADER + FRAME) as u32, flags, 0));
        driver.offer(i);
    }
    driver.avail = 0;
    driver
}

fn more(driver: &mut Driver, n: u16) {
    driver.avail = driver.avail.wrapping_add(n);
    driver.publish();
}

fn ring(c: &mut Criterion) {
    let mut group = c.benchmark_group("ring");
    for burst in [1_u16, 8, 32] {
        group.throughput(Throughput::Elements(burst.into()));
        for (name, regions, copy) in [("pop", 1, true), ("parse", 1, false), ("parse_2_regions", 2, false)] {
            let mut driver = driver(0, regions);
            let mut ring = TxRing::new(memory(&driver, REGIONS, REGION), &config(&driver)).unwrap();
            group.bench_function(format!("{name}_{burst}"), |b| {
                let mut into = [0; FRAME];
                b.iter(|| {
                    more(&mut driver, burst);
                    let n = ring.pop(burst.into()).unwrap();
                    for i in 0..n {
                        let mut frame = ring.frame(i).unwrap();
                        if copy {
                            frame.copy_next(&mut into);
                            black_box(&into);
                        }
                        black_box(frame.remaining());
                    }
                    ring.complete(n);
                    assert_eq!(n, usize::from(burst));
                    ring.publish()
                });
            });
        }
        let mut driver = driver(WRITE, 1);
        let mut ring = RxRing::new(memory(&driver, REGIONS, REGION), &config(&driver)).unwrap();
        group.bench_function(format!("push_{burst}"), |b| {
            let frame = [7; FRAME];
            let header = NetHeader::default();
            b.iter(|| {
                more(&mut driver, burst);
                for _ in 0..burst {
                    ring.push(&header, &mut black_box(&frame[..])).unwrap();
                }
                ring.publish()
            });
        });
    }
}

fn virtio_queue(c: &mut Criterion) {
    let mut group = c.benchmark_group("virtio_queue");
    for burst in [1_u16, 8, 32] {
        group.throughput(Throughput::Elements(burst.into()));
        let mut driver = driver(0, 1);
        let range = |i: usize| {
            let file = vm_memory::FileOffset::new(driver.file.try_clone().unwrap(), (i * REGION) as u64);
            (GuestAddress(driver.gpa(i * REGION)), REGION, Some(file))
        };
        let memory = GuestMemoryMmap::<()>::from_ranges_with_files((0..REGIONS).map(range)).unwrap();
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_size(SIZE);
        queue.try_set_desc_table_address(GuestAddress(driver.gpa(driver.desc_at()))).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(driver.gpa(driver.avail_at()))).unwrap();
        queue.try_set_used_ring_address(GuestAddress(driver.gpa(driver.used_at()))).unwrap();
        queue.set_event_idx(true);
        queue.set_ready(true);
        group.bench_function(format!("parse_{burst}"), |b| {
            b.iter(|| {
                more(&mut driver, burst);
                let mut heads = [0; 32];
                let mut n = 0;
                for chain in queue.iter(&memory).unwrap() {
                    heads[n] = chain.head_index();
                    for piece in chain {
                        let len = piece.len() as usize;
                        black_box(memory.get_slice(piece.addr(), len).unwrap());
                    }
                    n += 1;
                }
                for head in &heads[..n] {
                    queue.add_used(&memory, *head, 0).unwrap();
                }
                assert_eq!(n, usize::from(burst));
                queue.needs_notification(&memory).unwrap()
            });
        });
    }
}

criterion_group!(benches, ring, virtio_queue);
criterion_main!(benches);
