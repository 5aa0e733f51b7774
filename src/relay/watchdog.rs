//! Frees cores that are stuck in a notification.

use std::time::{Duration, Instant};

use super::poller::Poller;

/// Looks at cores now and then, and interrupts a notification that it finds unfinished for too long.
#[derive(Debug)]
pub struct Watchdog {
    limit: Duration,
    /// Of each core: the notification it was in at the last look, and when that one was first seen.
    seen: Vec<Option<(u64, Instant)>>,
}

impl Watchdog {
    /// A notification may take `limit` from when it is first seen.
    pub fn new(limit: Duration) -> Self {
        Self { limit, seen: Vec::new() }
    }

    /// To be called every few milliseconds, always with the same cores.
    pub fn look(&mut self, cores: &[Poller], now: Instant) {
        self.seen.resize(cores.len(), None);
        for (core, seen) in cores.iter().zip(&mut self.seen) {
            let current = core.gauge().notification();
            // Again at every look until it ends: the signal may have come just before the system call.
            if is_stuck(seen, current, now, self.limit) {
                core.interrupt();
            }
        }
    }
}

/// Whether the core is in the notification it was in at least `limit` ago.
fn is_stuck(seen: &mut Option<(u64, Instant)>, current: Option<u64>, now: Instant, limit: Duration) -> bool {
    match (current, *seen) {
        (Some(current), Some((number, since))) if current == number => now.saturating_duration_since(since) >= limit,
        _ => {
            *seen = current.map(|number| (number, now));
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_notification_at_two_looks_is_stuck() {
        const LIMIT: Duration = Duration::from_millis(10);
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut seen = None;
        let mut stuck = |number, ms| is_stuck(&mut seen, number, at(ms), LIMIT);
        assert!(!stuck(None, 0));
        // However late it is in its round.
        assert!(!stuck(Some(1), 1000));
        assert!(!stuck(Some(1), 1009));
        assert!(stuck(Some(1), 1010));
        assert!(stuck(Some(1), 1011), "until it ends");
        // A busy core is in a notification at every look, in another one each time.
        for i in 0..100 {
            assert!(!stuck(Some(3 + 2 * i), 1020 + 10 * i));
        }
        assert!(!stuck(None, 3000));
        assert!(!stuck(Some(201), 3010), "it had left it meanwhile");
    }
}
