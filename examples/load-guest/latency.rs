//! One frame at a time: from the moment it is offered until the device has taken it (`tx`), or until it is back
//! from a VF that loops (`both`).

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Args;
use super::connection::Outcome;
use super::driver::Driver;
use super::guest::Guest;

/// After which a frame is lost.
const PATIENCE: Duration = Duration::from_secs(5);

pub fn run<D: Driver>(args: &Args) -> Outcome<Value> {
    if !args.direction.sends() {
        return Err("latency is that of a frame which this guest sends: use --direction tx or both".into());
    }
    let round_trip = args.direction.receives();
    let mut guest = Guest::<D>::connect(args)?;
    let pair = &mut guest.pairs[0];
    if round_trip {
        pair.rx.fill();
    }
    let warm_up = Instant::now() + Duration::from_secs_f64(args.warm_up);
    let mut samples = Vec::with_capacity(args.samples);
    let mut slot = 0;
    while samples.len() < args.samples {
        let start = Instant::now();
        pair.tx.driver.offer(slot);
        pair.tx.publish();
        let (mut taken, mut arrived) = (false, !round_trip);
        while !(taken && arrived) {
            for _ in 0..64 {
                if !taken && pair.tx.reclaim() > 0 {
                    pair.tx.count_sent();
                    taken = true;
                }
                if !arrived && pair.rx.reclaim() > 0 {
                    let before = pair.rx.packets;
                    pair.rx.count_received();
                    arrived = pair.rx.packets > before;
                    pair.rx.recycle();
                    if !arrived {
                        pair.rx.publish();
                    }
                }
                if taken && arrived {
                    break;
                }
                std::hint::spin_loop();
            }
            if !(taken && arrived) && start.elapsed() > PATIENCE {
                let what = if taken { "did not come back" } else { "was not taken" };
                return Err(format!("frame {} {what} within {PATIENCE:?}", pair.tx.packets + 1).into());
            }
        }
        let time = start.elapsed();
        // Outside of the time measured: the next frame's buffer.
        pair.rx.publish();
        slot = (slot + 1) % pair.tx.slots;
        if start > warm_up {
            samples.push(time.as_nanos() as u64);
        }
    }
    samples.sort_unstable();
    let at = |share: f64| samples[((samples.len() - 1) as f64 * share) as usize];
    guest.finish(0, |_, _| ())?;
    Ok(json!({
        "kind": "result",
        "samples": samples.len(),
        "p50_ns": at(0.5),
        "p99_ns": at(0.99),
        "p999_ns": at(0.999),
        "max_ns": at(1.0),
        "sent": guest.sum(|p| p.tx.packets),
        "received": guest.sum(|p| p.rx.packets),
    }))
}
