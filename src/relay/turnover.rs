//! In which order a lane reads its VF queues after the VF's RSS table was pointed elsewhere.

/// Frames read of each queue before the next ones have their turn, at most: what its ring holds, and some.
/// A queue that is never found empty, since what is not hashed arrives there, keeps the others waiting no longer.
const DEPTH: usize = 1024;

/// Queues that are read first. A flow that has moved has its older frames in the queue it left: those that the
/// table does not point at any more are emptied before those that it still does, and these before new ones.
#[derive(Debug, Default)]
pub(super) struct Turnover {
    /// As bits, those that left the table and were not found empty since.
    left: u32,
    /// The same, of those that stayed. There is something in it only as long as all others wait.
    stayed: u32,
    /// Frames that may be read before the next ones have their turn.
    credit: usize,
}

impl Turnover {
    /// The table pointed at the queues in `before` (none: at all `queues`), and points at those in `now`.
    pub(super) fn table_moved(&mut self, queues: usize, before: &[u16], now: &[u16]) {
        let all = u32::MAX.checked_shr(u32::BITS - queues as u32).unwrap_or(0);
        let bits = |queues: &[u16]| queues.iter().fold(0, |bits, queue| bits | 1 << queue);
        let (before, now) = (if before.is_empty() { all } else { bits(before) }, bits(now));
        *self = Self { left: (self.left | before) & !now, stayed: before & now, credit: 0 };
        self.credit = self.credit_of_first();
    }

    fn first(&self) -> u32 {
        if self.left != 0 { self.left } else { self.stayed }
    }

    fn credit_of_first(&self) -> usize {
        self.first().count_ones() as usize * DEPTH
    }

    /// Whether the queue may be read now.
    pub(super) fn permits(&self, queue: usize) -> bool {
        let first = self.first();
        first == 0 || first >> queue & 1 != 0
    }

    /// Of a queue that may be read, `n` frames were; or it was found `empty`. Whether others may be read now
    /// that might not before.
    pub(super) fn was_read(&mut self, queue: usize, n: usize, empty: bool) -> bool {
        if self.first() == 0 {
            return false;
        }
        self.credit = self.credit.saturating_sub(n);
        let done = match (empty, self.credit) {
            (_, 0) => self.first(),
            (true, _) => 1 << queue,
            (false, _) => return false,
        };
        let ranked = if self.left != 0 { &mut self.left } else { &mut self.stayed };
        *ranked &= !done;
        let over = *ranked == 0;
        if over {
            self.credit = self.credit_of_first();
        }
        over
    }
}
