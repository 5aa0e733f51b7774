//! Bounds the log lines that a front end can cause: it decides how often it connects, and what it sends.

use std::cell::Cell;
use std::time::{Duration, Instant};

use tracing::warn;

/// Lines at once: all the rings of a guest.
const LINES: u32 = 100;

/// One more after each of these.
const REFILL: Duration = Duration::from_secs(1);

/// What a port has left to log about its front end.
#[derive(Debug)]
pub(super) struct PortLog {
    id: String,
    lines: Cell<u32>,
    /// Until when it was refilled.
    refilled: Cell<Instant>,
    left_out: Cell<u64>,
}

impl PortLog {
    /// Of the port with this id.
    pub(super) fn new(id: &str) -> Self {
        let refilled = Cell::new(Instant::now());
        Self { id: id.to_owned(), lines: Cell::new(LINES), refilled, left_out: Cell::new(0) }
    }

    /// Whether one more line may be logged now. Says before it how many could not.
    pub(super) fn allows(&self) -> bool {
        let Some(left_out) = self.take(Instant::now()) else { return false };
        if left_out > 0 {
            warn!(port = %self.id, left_out, "the front end caused more log lines than are written");
        }
        true
    }

    /// Takes a line; how many were left out before it.
    fn take(&self, now: Instant) -> Option<u64> {
        let periods = now.saturating_duration_since(self.refilled.get()).as_secs() / REFILL.as_secs();
        let periods = u32::try_from(periods).unwrap_or(u32::MAX);
        self.refilled.set(self.refilled.get() + REFILL * periods);
        let lines = self.lines.get().saturating_add(periods).min(LINES);
        self.lines.set(lines.saturating_sub(1));
        if lines == 0 {
            self.left_out.set(self.left_out.get() + 1);
            return None;
        }
        Some(self.left_out.take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_storm_is_cut_off_and_counted() {
        let log = PortLog::new("a");
        let start = log.refilled.get();
        let written = (0..73_000).filter(|_| log.take(start).is_some()).count();
        assert_eq!(written, LINES as usize);
        assert_eq!(log.take(start + REFILL - Duration::from_nanos(1)), None);
        assert_eq!(log.take(start + REFILL), Some(73_000 - u64::from(LINES) + 1));
        assert_eq!(log.take(start + REFILL), None);
        // As much as at first, at most, however long it was quiet.
        let later = start + REFILL * 100_000;
        assert_eq!(log.take(later), Some(1));
        assert_eq!((1..1000).filter(|_| log.take(later).is_some()).count(), LINES as usize - 1);
    }
}
