//! As many frames as the back end takes and gives.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::connection::Outcome;
use super::driver::Driver;
use super::guest::{Guest, Pair};
use super::{Args, median, print};

/// Rounds between two looks at the clock.
const ROUNDS: usize = 32;

pub fn run<D: Driver>(args: &Args) -> Outcome<Value> {
    let mut guest = Guest::<D>::connect(args)?;
    let (sends, receives) = (args.direction.sends(), args.direction.receives());
    for pair in &mut guest.pairs {
        if receives {
            pair.rx.fill();
        }
        if sends {
            pair.tx.fill();
        }
    }
    let windows = std::iter::once(args.warm_up).chain((0..args.windows).map(|_| args.seconds));
    let (mut tx, mut rx) = (vec![], vec![]);
    // Of a ring: how often nothing was back, and something.
    let mut polls = [0_u64; 2];
    for (i, seconds) in windows.enumerate() {
        let count = |guest: &Guest<D>| {
            let lanes = [guest.sum(|p| p.tx.packets), guest.sum(|p| p.rx.packets)];
            (lanes, guest.sum(|p| p.tx.bytes + p.rx.bytes))
        };
        let (before, bytes_before) = count(&guest);
        let start = Instant::now();
        let end = start + Duration::from_secs_f64(seconds);
        while Instant::now() < end {
            for _ in 0..ROUNDS {
                for pair in &mut guest.pairs {
                    if sends {
                        polls[usize::from(send(pair, args.touch))] += 1;
                    }
                    if receives {
                        polls[usize::from(receive(pair, args.touch))] += 1;
                    }
                }
            }
        }
        let time = start.elapsed().as_secs_f64();
        let (after, bytes) = count(&guest);
        if i > 0 {
            tx.push((after[0] - before[0]) as f64 / time);
            rx.push((after[1] - before[1]) as f64 / time);
            print(&json!({
                "kind": "window",
                "seconds": time,
                "tx_pps": tx.last(),
                "rx_pps": rx.last(),
                "gbps": (bytes - bytes_before) as f64 * 8e-9 / time,
            }));
        }
    }
    let out = guest.pairs.iter().map(|pair| if sends { pair.tx.slots.into() } else { 0 }).sum();
    guest.finish(out, |_, _| ())?;
    Ok(json!({
        "kind": "result",
        "tx_pps": median(&mut tx),
        "rx_pps": median(&mut rx),
        "sent": guest.sum(|p| p.tx.packets),
        "received": guest.sum(|p| p.rx.packets),
        "kicks": guest.sum(|p| p.tx.kicks + p.rx.kicks),
        // Near 0 it is this guest that is measured, not the back end.
        "idle_polls": polls[0] as f64 / polls.iter().sum::<u64>() as f64,
    }))
}

/// Whether there was anything to do.
#[inline]
fn send<D: Driver>(pair: &mut Pair<D>, touch: bool) -> bool {
    let lane = &mut pair.tx;
    if lane.reclaim() == 0 {
        return false;
    }
    lane.count_sent();
    if touch {
        for used in &lane.used {
            // What any driver writes: the header and the frame's first words.
            let (header, frame) = (lane.buffers.header(used.slot), lane.buffers.frame(used.slot));
            lane.buffers.area.store_u32(header, 0, Relaxed);
            lane.buffers.area.store_u64(frame + 16, lane.packets, Relaxed);
        }
    }
    lane.recycle();
    lane.publish();
    true
}

/// As [`send`].
#[inline]
fn receive<D: Driver>(pair: &mut Pair<D>, touch: bool) -> bool {
    let lane = &mut pair.rx;
    if lane.reclaim() == 0 {
        return false;
    }
    lane.count_received();
    if touch {
        for used in &lane.used {
            let (header, frame) = (lane.buffers.header(used.slot), lane.buffers.frame(used.slot));
            let read = lane.buffers.area.load_u32(header, Relaxed) ^ lane.buffers.area.load_u32(frame, Relaxed);
            std::hint::black_box(read);
        }
    }
    lane.recycle();
    lane.publish();
    true
}
