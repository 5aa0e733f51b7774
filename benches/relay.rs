//! What a lane costs: one turn with a burst of 32 frames, on one thread, over soft VFs. The driver's side (posting,
//! taking back) and the far side of the VF are outside of the measured part. A lane looks once more for
//! work before its turn ends, and that is measured, too.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use virtio_forwarder::relay::{GuestToVf, Lane, LaneCounters, LaneId, NotifyMark, Turn, VfToGuest};
use virtio_forwarder::ring::BURST;
use virtio_forwarder::vf::soft::{SoftRx, SoftTx};
use virtio_forwarder::vf::{Queues, TxQueue, Vf, VfConfig, VfSpec};

mod rig;
use rig::{Driver, HEADER, Receiver, Sender, plan};

const RING: u16 = 256;
const BUFFER: usize = 2048;
const AT: usize = 64 * 1024;
const LEN: usize = AT + RING as usize * BUFFER;

fn soft(spec: &VfSpec) -> (Vf, SoftTx, SoftRx) {
    let mut vf = Vf::probe(spec).unwrap();
    let queues = vf.configure(&VfConfig { queues: 1, mtu: 1500, mac: None }).unwrap();
    vf.start().unwrap();
    match queues {
        Queues::Soft(mut tx, mut rx) => (vf, tx.remove(0), rx.remove(0)),
        #[cfg(feature = "dpdk")]
        Queues::Ethdev(..) => unreachable!("a soft VF"),
    }
}

/// One measured turn, of 32 frames.
fn turn(lane: &mut impl Lane, mark: &NotifyMark) -> Duration {
    let start = Instant::now();
    let moved = lane.turn(&Turn { now: start, mark });
    let time = start.elapsed();
    assert!(moved >= BURST);
    time
}

fn relay(c: &mut Criterion) {
    let mut group = c.benchmark_group("relay");
    group.throughput(Throughput::Elements(BURST as u64));
    let mark = NotifyMark::default();
    for len in [64, 1518] {
        let frame = vec![7; len];

        let (_vf, tx, _) = soft(&VfSpec::SoftNull);
        let mut driver = Sender::new(Driver::new(LEN, RING, 0), AT, BUFFER);
        let counters = Arc::new(LaneCounters::default());
        let mut lane = GuestToVf::new(LaneId(1), 1, vec![tx], Arc::new(true.into()), counters);
        lane.insert_ring(0, plan(&driver.ring, LEN)).unwrap();
        group.bench_function(format!("guest_to_vf_{len}"), |b| {
            b.iter_custom(|iterations| {
                (0..iterations)
                    .map(|_| {
                        (0..BURST).for_each(|_| driver.send(&[0; HEADER], &frame));
                        driver.ring.publish();
                        let time = turn(&mut lane, &mark);
                        assert_eq!(driver.reclaim(), BURST);
                        time
                    })
                    .sum()
            });
        });

        let (_vf, mut tx, rx) = soft(&VfSpec::SoftLoop);
        let mut driver = Receiver::new(Driver::new(LEN, RING, 0), AT, BUFFER);
        let mut lane = VfToGuest::new(LaneId(2), 1, vec![rx], Arc::new(LaneCounters::default()));
        lane.insert_ring(0, plan(&driver.ring, LEN)).unwrap();
        group.bench_function(format!("vf_to_guest_{len}"), |b| {
            b.iter_custom(|iterations| {
                (0..iterations)
                    .map(|_| {
                        driver.post(BURST);
                        let mut burst: ArrayVec<_, BURST> =
                            (0..BURST).map(|_| tx.copy(&mut &frame[..]).expect("a buffer")).collect();
                        assert_eq!(tx.send(&mut burst, &mut 0), BURST);
                        let time = turn(&mut lane, &mark);
                        assert_eq!(std::iter::from_fn(|| driver.receive()).count(), BURST);
                        time
                    })
                    .sum()
            });
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(30).warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(1));
    targets = relay
}
criterion_main!(benches);
