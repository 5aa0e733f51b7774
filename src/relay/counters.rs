//! Single-writer counters of a lane: the core that has the lane writes, anyone reads.

use std::ops::AddAssign;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crossbeam::utils::CachePadded;
use serde::{Deserialize, Serialize};

use super::completions::{CompletionCells, Completions};

/// Why a frame went no further. Each frame that was taken in and not delivered counts under exactly one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// VF→guest: the guest posted no buffer in time.
    GuestRingEmpty,
    /// guest→VF: the VF took nothing for 10 ms.
    VfFull,
    /// The other side is not there: no VF, link down, no started ring.
    NotReady,
    /// The ring is disabled (SET_VRING_ENABLE 0).
    Disabled,
    /// The guest's descriptor chain or header is malformed.
    Malformed,
    /// Longer than the port's MTU allows, or than the guest's buffer.
    Oversize,
}

const CAUSES: usize = 6;

/// Why no buffers of a guest are posted to its VF, though they might.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u64)]
pub enum Shortage {
    /// They are, or there was no need yet.
    #[default]
    None,
    /// The guest has fewer than the VF takes ahead.
    Few,
    /// They are too short, or in several pieces, or not in memory that the VF reaches.
    Unfit,
}

/// Counters of one lane.
#[derive(Debug, Default)]
pub struct LaneCounters(CachePadded<Cells>);

#[derive(Debug, Default)]
struct Cells {
    packets: AtomicU64,
    bytes: AtomicU64,
    bursts: AtomicU64,
    zero_copied: AtomicU64,
    given_up: AtomicU64,
    completions: CompletionCells,
    dropped: [AtomicU64; CAUSES],
    kicks_sent: AtomicU64,
    kicks_suppressed: AtomicU64,
    kicks_blocked: AtomicU64,
    quarantined: AtomicU64,
    shortage: AtomicU64,
}

/// Adds without a locked instruction: there is one writer.
pub(super) fn add(cell: &AtomicU64, n: u64) {
    cell.store(cell.load(Relaxed).wrapping_add(n), Relaxed);
}

impl LaneCounters {
    /// A burst that was delivered.
    pub fn delivered(&self, packets: u64, bytes: u64) {
        add(&self.0.packets, packets);
        add(&self.0.bytes, bytes);
        add(&self.0.bursts, 1);
    }

    /// Of the frames delivered, some that were not copied.
    pub fn lent(&self, frames: u64) {
        add(&self.0.zero_copied, frames);
    }

    /// Lent frames that the VF was done with when it had taken their burst.
    pub fn completed_at_once(&self, frames: u64) {
        self.0.completions.at_once(frames);
    }

    /// Lent frames that the VF was done with so long after it had taken them.
    pub fn completed(&self, time: Duration, frames: u64) {
        self.0.completions.after(time, frames);
    }

    /// Lent frames that are not waited for any more.
    pub fn given_up(&self, frames: u64) {
        add(&self.0.given_up, frames);
    }

    /// Lent frames that the VF has, and those that it was done with, ever.
    pub fn out_and_back(&self) -> (u64, u64) {
        let back = self.0.completions.snapshot().total();
        let gone = back + self.0.given_up.load(Relaxed);
        (self.0.zero_copied.load(Relaxed).saturating_sub(gone), back)
    }

    /// What hinders frames from coming into the guest's buffers.
    pub fn buffers_are(&self, shortage: Shortage) {
        self.0.shortage.store(shortage as u64, Relaxed);
    }

    /// The same, to be shown.
    pub fn shortage(&self) -> Shortage {
        let shortage = self.0.shortage.load(Relaxed);
        [Shortage::Few, Shortage::Unfit].into_iter().find(|&it| it as u64 == shortage).unwrap_or_default()
    }

    /// Frames that were dropped.
    pub fn dropped(&self, cause: Cause, n: u64) {
        add(&self.0.dropped[cause as usize], n);
    }

    /// A published burst for which the guest did, or did not, want a signal.
    pub fn kicked(&self, sent: bool) {
        add(if sent { &self.0.kicks_sent } else { &self.0.kicks_suppressed }, 1);
    }

    /// A signal that the watchdog had to end.
    pub fn blocked(&self) {
        add(&self.0.kicks_blocked, 1);
    }

    /// A ring was taken off its core.
    pub fn quarantine(&self) {
        add(&self.0.quarantined, 1);
    }

    /// How many rings were taken off their core since the port exists: a change says that there is a
    /// reason to be fetched from the lane.
    pub fn quarantined(&self) -> u64 {
        self.0.quarantined.load(Relaxed)
    }

    /// A copy. Each figure is exact; they may be of slightly different moments.
    pub fn snapshot(&self) -> LaneSnapshot {
        let get = |cell: &AtomicU64| cell.load(Relaxed);
        let dropped = |cause: Cause| get(&self.0.dropped[cause as usize]);
        LaneSnapshot {
            packets: get(&self.0.packets),
            bytes: get(&self.0.bytes),
            bursts: get(&self.0.bursts),
            zero_copied: get(&self.0.zero_copied),
            completions: self.0.completions.snapshot(),
            slowest_completion_us: self.0.completions.slowest_us(),
            dropped: Dropped {
                guest_ring_empty: dropped(Cause::GuestRingEmpty),
                vf_full: dropped(Cause::VfFull),
                not_ready: dropped(Cause::NotReady),
                disabled: dropped(Cause::Disabled),
                malformed: dropped(Cause::Malformed),
                oversize: dropped(Cause::Oversize),
            },
            kicks_sent: get(&self.0.kicks_sent),
            kicks_suppressed: get(&self.0.kicks_suppressed),
            kicks_blocked: get(&self.0.kicks_blocked),
        }
    }
}

/// Counters of the lanes of one direction of a port, by lane.
#[derive(Clone, Debug)]
pub struct DirectionCounters(Vec<Arc<LaneCounters>>);

impl DirectionCounters {
    /// Of at most so many lanes.
    pub fn new(lanes: usize) -> Self {
        Self((0..lanes).map(|_| Arc::default()).collect())
    }

    /// Those of a lane.
    pub fn lane(&self, lane: usize) -> &Arc<LaneCounters> {
        &self.0[lane]
    }

    /// Most lanes.
    pub fn lanes(&self) -> usize {
        self.0.len()
    }

    /// All lanes together.
    pub fn snapshot(&self) -> LaneSnapshot {
        self.0.iter().fold(LaneSnapshot::default(), |mut all, lane| {
            all += &lane.snapshot();
            all
        })
    }

    /// As [`LaneCounters::quarantined`].
    pub fn quarantined(&self) -> u64 {
        self.0.iter().map(|lane| lane.quarantined()).sum()
    }

    /// As [`LaneCounters::shortage`], of the first lane that has one.
    pub fn shortage(&self) -> Shortage {
        self.0.iter().map(|lane| lane.shortage()).find(|shortage| *shortage != Shortage::None).unwrap_or_default()
    }

    /// As [`LaneCounters::out_and_back`], by lane.
    pub fn out_and_back(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.0.iter().map(|lane| lane.out_and_back())
    }
}

/// Of one lane.
impl Default for DirectionCounters {
    fn default() -> Self {
        Self::new(1)
    }
}

/// A lane's counters at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaneSnapshot {
    /// Frames delivered: taken by the VF, or published to the guest.
    pub packets: u64,
    /// Their bytes, without virtio-net header and FCS.
    pub bytes: u64,
    /// Bursts they came in.
    pub bursts: u64,
    /// Frames among them that were not copied: sent from, or received into, the guest's memory.
    #[serde(default)]
    pub zero_copied: u64,
    /// guest→VF: those of them that are the guest's again, by how long that took.
    #[serde(default, skip_serializing_if = "Completions::is_empty")]
    pub completions: Completions,
    /// The slowest of these, in µs by the clock that the core reads once a round.
    #[serde(default)]
    pub slowest_completion_us: u64,
    /// Frames that were not, by cause.
    pub dropped: Dropped,
    /// Signals sent to the guest.
    pub kicks_sent: u64,
    /// Bursts for which the guest wanted none.
    pub kicks_suppressed: u64,
    /// Signals that blocked until the watchdog ended them: each cost the core about 10 ms, and the front end
    /// its connection.
    pub kicks_blocked: u64,
}

impl AddAssign<&Self> for LaneSnapshot {
    fn add_assign(&mut self, other: &Self) {
        self.packets += other.packets;
        self.bytes += other.bytes;
        self.bursts += other.bursts;
        self.zero_copied += other.zero_copied;
        self.completions.0.iter_mut().zip(other.completions.0).for_each(|(ours, theirs)| *ours += theirs);
        self.slowest_completion_us = self.slowest_completion_us.max(other.slowest_completion_us);
        self.dropped += &other.dropped;
        self.kicks_sent += other.kicks_sent;
        self.kicks_suppressed += other.kicks_suppressed;
        self.kicks_blocked += other.kicks_blocked;
    }
}

/// Dropped frames by [`Cause`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // the causes are documented once, at `Cause`
pub struct Dropped {
    pub guest_ring_empty: u64,
    pub vf_full: u64,
    pub not_ready: u64,
    pub disabled: u64,
    pub malformed: u64,
    pub oversize: u64,
}

impl AddAssign<&Self> for Dropped {
    fn add_assign(&mut self, other: &Self) {
        self.guest_ring_empty += other.guest_ring_empty;
        self.vf_full += other.vf_full;
        self.not_ready += other.not_ready;
        self.disabled += other.disabled;
        self.malformed += other.malformed;
        self.oversize += other.oversize;
    }
}

impl Dropped {
    /// All causes together.
    pub fn total(&self) -> u64 {
        self.guest_ring_empty + self.vf_full + self.not_ready + self.disabled + self.malformed + self.oversize
    }
}
