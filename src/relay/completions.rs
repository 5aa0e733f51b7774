//! How long lent frames keep a guest waiting: from the VF's taking them until their buffers are the guest's again.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::counters::add;

const BUCKETS: usize = 20;

/// One writer, as with the other counters.
#[derive(Debug, Default)]
pub(super) struct CompletionCells {
    buckets: [AtomicU64; BUCKETS],
    slowest_us: AtomicU64,
}

impl CompletionCells {
    /// No clock is read for these, and most drivers have no others.
    pub(super) fn at_once(&self, frames: u64) {
        add(&self.buckets[0], frames);
    }

    pub(super) fn after(&self, time: Duration, frames: u64) {
        let us = time.as_micros() as u64;
        let bucket = 1 + us.max(1).ilog2() as usize;
        add(&self.buckets[bucket.min(BUCKETS - 1)], frames);
        if us > self.slowest_us.load(Relaxed) {
            self.slowest_us.store(us, Relaxed);
        }
    }

    pub(super) fn snapshot(&self) -> Completions {
        Completions(std::array::from_fn(|bucket| self.buckets[bucket].load(Relaxed)))
    }

    pub(super) fn slowest_us(&self) -> u64 {
        self.slowest_us.load(Relaxed)
    }
}

/// Lent frames that are the guest's again, by the time from the VF's taking them to that. The first: the VF was done
/// with them when it had taken their burst. Of the others, number *n* are those that took less than 2^*n* µs and that
/// the one before has not, by the clock that the core reads once a round; the last has all that took longer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Completions(pub [u64; BUCKETS]);

impl Completions {
    /// Frames in it.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Nothing was lent.
    pub fn is_empty(&self) -> bool {
        self.total() == 0
    }

    /// So many percent of the frames took less µs than this: a power of two, 0 if the VF was done at once, `None`
    /// if it is beyond the last bound.
    pub fn percentile(&self, percent: u64) -> Option<u64> {
        let wanted = (self.total() * percent).div_ceil(100);
        let mut seen = 0;
        let bucket = self.0.iter().position(|frames| {
            seen += frames;
            seen >= wanted
        })?;
        match bucket {
            0 => Some(0),
            bucket if bucket == BUCKETS - 1 => None,
            bucket => Some(1 << bucket),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_time_has_its_bucket() {
        for (us, bucket) in [(0, 1), (1, 1), (2, 2), (3, 2), (4, 3), (999, 10), (1 << 18, 19), (1 << 40, 19)] {
            let cells = CompletionCells::default();
            cells.after(Duration::from_micros(us), 7);
            let counted = cells.snapshot();
            assert_eq!((counted.0[bucket], counted.total(), cells.slowest_us()), (7, 7, us), "{us} µs: {counted:?}");
        }
    }

    #[test]
    fn a_percentile_is_the_bound_of_its_bucket() {
        let cells = CompletionCells::default();
        assert!(cells.snapshot().is_empty());
        cells.at_once(50);
        cells.after(Duration::from_micros(5), 49);
        cells.after(Duration::from_secs(1), 1);
        cells.after(Duration::from_micros(5), 0);
        let counted = cells.snapshot();
        assert_eq!([50, 51, 99].map(|percent| counted.percentile(percent)), [Some(0), Some(8), Some(8)]);
        assert_eq!((counted.percentile(100), cells.slowest_us()), (None, 1_000_000));
    }
}
