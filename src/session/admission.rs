//! When a port takes its next connection.
//!
//! A front end that comes and goes in a loop is slowed down, so that it costs its port's thread little. One
//! whose eventfds block holds up a core that others share, for as long as the watchdog waits: each time it is
//! kept away for longer.

use std::time::{Duration, Instant};

/// Between two connections, or two attempts to connect.
const SPACING: Duration = Duration::from_millis(50);

/// After the first connection that blocked a core; doubled each time.
const FIRST_PENALTY: Duration = Duration::from_millis(100);

/// The longest; and how long a connection has to live for the next penalty to be the first again. So at most
/// two lanes are blocked once every ten seconds, either way.
const LONGEST_PENALTY: Duration = Duration::from_secs(10);

/// A port's door.
#[derive(Debug)]
pub(super) struct Admission {
    opens: Instant,
    /// When the last connection was taken.
    began: Instant,
    penalty: Duration,
}

impl Admission {
    /// Open.
    pub(super) fn new(now: Instant) -> Self {
        Self { opens: now, began: now, penalty: FIRST_PENALTY }
    }

    /// How long it stays closed.
    pub(super) fn closed_for(&self, now: Instant) -> Duration {
        self.opens.saturating_duration_since(now)
    }

    /// A connection is taken, or tried.
    pub(super) fn begin(&mut self, now: Instant) {
        self.began = now;
        self.opens = now + SPACING;
    }

    /// The connection has ended. If it `blocked` a core: how long the next one is kept away.
    pub(super) fn end(&mut self, now: Instant, blocked: bool) -> Option<Duration> {
        if now.saturating_duration_since(self.began) >= LONGEST_PENALTY {
            self.penalty = FIRST_PENALTY;
        }
        blocked.then(|| {
            let penalty = self.penalty;
            self.opens = now + penalty;
            self.penalty = (2 * penalty).min(LONGEST_PENALTY);
            penalty
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_first_is_taken_at_once_and_the_next_after_a_while() {
        let mut now = Instant::now();
        let mut door = Admission::new(now);
        assert_eq!(door.closed_for(now), Duration::ZERO);
        door.begin(now);
        now += 10 * MS;
        assert_eq!(door.end(now, false), None);
        assert_eq!(door.closed_for(now), 40 * MS);
        assert_eq!(door.closed_for(now + 40 * MS), Duration::ZERO);
    }

    #[test]
    fn who_blocks_waits_longer_each_time_until_it_behaves() {
        let mut now = Instant::now();
        let mut door = Admission::new(now);
        let mut penalties = vec![];
        for _ in 0..10 {
            now += door.closed_for(now);
            door.begin(now);
            penalties.push(door.end(now, true).unwrap().as_millis());
            assert_eq!(door.closed_for(now).as_millis(), *penalties.last().unwrap());
            // A short good one between them is no excuse.
            now += door.closed_for(now);
            door.begin(now);
            now += SPACING;
            assert_eq!(door.end(now, false), None);
        }
        assert_eq!(penalties, [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000, 10_000]);
        door.begin(now);
        now += LONGEST_PENALTY;
        assert_eq!(door.end(now, true), Some(FIRST_PENALTY));
    }
}
