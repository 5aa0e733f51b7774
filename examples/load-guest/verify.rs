//! Every frame numbered and checked. Against a VF that loops (`both`) few enough are on their way that nothing may
//! be lost; `tx` sends what another guest's `rx` checks.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Args;
use super::connection::Outcome;
use super::driver::{Driver, HEADER};
use super::guest::{Guest, Lane, number_of_buffers};
use super::number::Numbered;

/// Frames on their way, at most: no VF's queue is shorter. Nor may they be more than one ring has buffers for.
const WINDOW: u64 = 128;

/// After so long without any, those on their way are lost: no machine keeps its back end waiting for longer.
const LOST: Duration = Duration::from_secs(5);

/// What came of one guest's flows.
#[derive(Default)]
struct Checker {
    /// The frame being put together, per ring.
    partial: HashMap<usize, (Vec<u8>, u16)>,
    next: HashMap<u16, u64>,
    received: u64,
    corrupt: u64,
    /// Numbers that were skipped, and that came late or twice.
    missing: u64,
    disordered: u64,
}

impl Checker {
    fn take<D: Driver>(&mut self, ring: usize, lane: &Lane<D>) {
        for used in &lane.used {
            let (frame, more) = self.partial.entry(ring).or_default();
            let mut at = lane.buffers.header(used.slot);
            let mut len = used.written as usize;
            if *more == 0 {
                *more = number_of_buffers(&lane.buffers, used.slot);
                frame.clear();
                at += HEADER;
                len = len.saturating_sub(HEADER);
            }
            let from = frame.len();
            frame.resize(from + len, 0);
            lane.buffers.area.read(at, &mut frame[from..]);
            *more -= 1;
            if *more > 0 {
                continue;
            }
            self.received += 1;
            let Some(Numbered { flow, number }) = Numbered::parse(frame) else {
                self.corrupt += 1;
                continue;
            };
            let next = self.next.entry(flow).or_default();
            match number.checked_sub(*next) {
                Some(skipped) => {
                    self.missing += skipped;
                    *next = number + 1;
                }
                None => self.disordered += 1,
            }
        }
    }
}

pub fn run<D: Driver>(args: &Args) -> Outcome<Value> {
    let (sends, receives) = (args.direction.sends(), args.direction.receives());
    let mut guest = Guest::<D>::connect(args)?;
    let mut checker = Checker::default();
    // Slots to send from next, in order of their return.
    let mut free: Vec<_> =
        guest.pairs.iter().map(|p| (0..p.tx.slots).collect::<std::collections::VecDeque<_>>()).collect();
    let mut numbers = vec![0; guest.pairs.len()];
    if receives {
        guest.pairs.iter_mut().for_each(|pair| pair.rx.fill());
    }
    let window = WINDOW.min(guest.pairs[0].rx.frames());
    let end = Instant::now() + Duration::from_secs_f64(args.seconds);
    let mut progress = Instant::now();
    while Instant::now() < end {
        let sent: u64 = numbers.iter().sum();
        let mut room = match receives {
            true => window.saturating_sub(sent.saturating_sub(checker.received)),
            false => u64::MAX,
        };
        for (i, pair) in guest.pairs.iter_mut().enumerate() {
            if receives && pair.rx.reclaim() > 0 {
                progress = Instant::now();
                pair.rx.count_received();
                checker.take(i, &pair.rx);
                pair.rx.recycle();
                pair.rx.publish();
            }
            if !sends {
                continue;
            }
            pair.tx.reclaim();
            pair.tx.count_sent();
            free[i].extend(pair.tx.used.iter().map(|used| used.slot));
            for _ in 0..free[i].len().min(32) {
                if room == 0 {
                    break;
                }
                room -= 1;
                let slot = free[i].pop_front().expect("counted");
                let buffers = &pair.tx.buffers;
                let frame = Numbered { flow: i as u16, number: numbers[i] };
                buffers.area.write(buffers.frame(slot), &frame.bytes(buffers.len(slot) as usize - HEADER));
                pair.tx.driver.offer(slot);
                numbers[i] += 1;
            }
            pair.tx.publish();
        }
        if sends && receives && progress.elapsed() > LOST {
            break; // the frames on their way are lost: told below
        }
    }
    let out = guest.pairs.iter().zip(&free).map(|(p, free)| usize::from(p.tx.slots) - free.len()).sum();
    let sent: u64 = numbers.iter().sum();
    if receives {
        // Those on their way.
        let end = Instant::now() + if sends { LOST } else { Duration::ZERO };
        while checker.received < sent && Instant::now() < end {
            for (i, pair) in guest.pairs.iter_mut().enumerate() {
                pair.rx.reclaim();
                pair.rx.count_received();
                checker.take(i, &pair.rx);
                pair.rx.recycle();
                pair.rx.publish();
            }
        }
    }
    guest.finish(if sends { out } else { 0 }, |i, rx| checker.take(i, rx))?;
    let lost = if sends && receives { sent.saturating_sub(checker.received) } else { 0 };
    let Checker { received, corrupt, missing, disordered, .. } = checker;
    let result = json!({
        "kind": "result",
        "sent": sent,
        "received": received,
        "lost": lost,
        "corrupt": corrupt,
        "missing": missing,
        "disordered": disordered,
    });
    let wrong = corrupt + disordered + lost + if sends { missing } else { 0 };
    if wrong > 0 || sent + received == 0 {
        return Err(format!("the frames did not all arrive as they were sent: {result}").into());
    }
    Ok(result)
}
