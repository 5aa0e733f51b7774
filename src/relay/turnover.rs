//! In which order the lanes of a port read their VF queues after the VF's RSS table was pointed elsewhere.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::vf_to_guest::MAX_PAIRS;

/// Frames read of each queue before the next ones have their turn, at most: what its ring holds, and some.
/// A queue that is never found empty, since what is not hashed arrives there, keeps the others waiting no longer.
const DEPTH: u16 = 1024;

/// Queues that are read first. A flow that has moved has its older frames in the queue it left: those that the
/// table does not point at any more are emptied before those that it still does, and these before new ones.
#[derive(Debug)]
pub(super) struct Turnover {
    ranks: Arc<Ranks>,
    /// Something may be in them.
    under_way: bool,
    /// Frames that may be read of each queue, while it is in a rank.
    credit: [u16; MAX_PAIRS],
    vf_queues: usize,
}

/// What a port's lanes have in common while the table's move is not over: queues, as bits. All lanes are at home when
/// a queue enters a rank; it leaves when its lane has shown its guest what was in it.
#[derive(Debug, Default)]
struct Ranks {
    /// Those that left the table and were not found empty since.
    left: AtomicU32,
    /// The same, of those that stayed. There is something in it only as long as all others wait.
    stayed: AtomicU32,
}

impl Ranks {
    /// The one whose queues are read now, and these.
    fn first(&self) -> (&AtomicU32, u32) {
        // Acquire: what was in queues that left is where their lanes have put it.
        match self.left.load(Ordering::Acquire) {
            0 => (&self.stayed, self.stayed.load(Ordering::Acquire)),
            left => (&self.left, left),
        }
    }
}

impl Turnover {
    /// Of a VF with so many queues.
    pub(super) fn of(vf_queues: usize) -> Self {
        Self { ranks: Arc::default(), under_way: false, credit: [DEPTH; MAX_PAIRS], vf_queues }
    }

    /// The same, for another lane.
    pub(super) fn shared(&self) -> Self {
        Self { ranks: self.ranks.clone(), ..Self::of(self.vf_queues) }
    }

    /// The table pointed at the queues in `before` (none: at all), and points at those in `now`.
    pub(super) fn table_moved(&mut self, before: &[u16], now: &[u16]) {
        let all = u32::MAX.checked_shr(u32::BITS - self.vf_queues as u32).unwrap_or(0);
        let bits = |queues: &[u16]| queues.iter().fold(0, |bits, queue| bits | 1 << queue);
        let (before, now) = (if before.is_empty() { all } else { bits(before) }, bits(now));
        self.ranks.left.store((self.ranks.left.load(Ordering::Relaxed) | before) & !now, Ordering::Relaxed);
        self.ranks.stayed.store(before & now, Ordering::Relaxed);
        self.look_again();
    }

    /// Another lane may have been told.
    pub(super) fn look_again(&mut self) {
        self.under_way = self.ranks.first().1 != 0;
        self.credit = [DEPTH; MAX_PAIRS];
    }

    /// Whether it is to be asked about queues.
    #[inline]
    pub(super) fn is_under_way(&self) -> bool {
        self.under_way
    }

    /// Whether the queue may be read now.
    pub(super) fn permits(&mut self, queue: u16) -> bool {
        let (_, first) = self.ranks.first();
        self.under_way = first != 0;
        first == 0 || first >> queue & 1 != 0
    }

    /// Of a queue that may be read, `n` frames were, and are shown; or it was found `empty`. Whether others may be read
    /// now that might not before.
    pub(super) fn was_read(&mut self, queue: u16, n: usize, empty: bool) -> bool {
        let (rank, first) = self.ranks.first();
        let bit = first & 1 << queue;
        if bit == 0 {
            return false;
        }
        let credit = &mut self.credit[usize::from(queue)];
        *credit = credit.saturating_sub(n.min(DEPTH.into()) as u16);
        if !empty && *credit > 0 {
            return false;
        }
        rank.fetch_and(!bit, Ordering::AcqRel) == bit
    }
}
