//! Guest memory that a VF may send from, and receive into.

use std::ops::Range;
use std::sync::Arc;

use super::DmaMap;
use crate::guest::{GuestMemory, HostRange};

/// What of a guest's memory a VF can reach by itself. As long as anybody holds it, all of it stays where it is.
#[derive(Debug)]
pub struct Lendable {
    /// Merged, in order; `None`: all.
    ranges: Option<Box<[Range<usize>]>>,
    // Before the memory: unmapped for the device first.
    _maps: Vec<Arc<DmaMap>>,
    memory: Arc<GuestMemory>,
}

impl Lendable {
    /// For a VF whose driver reads and writes by the CPU.
    pub fn all(memory: Arc<GuestMemory>) -> Arc<Self> {
        Arc::new(Self { ranges: None, _maps: Vec::new(), memory })
    }

    /// For one that reaches what is mapped for it.
    pub fn mapped(memory: Arc<GuestMemory>, maps: Vec<Arc<DmaMap>>) -> Arc<Self> {
        let ranges = merged(maps.iter().map(|map| map.pages().clone()).collect());
        Arc::new(Self { ranges: Some(ranges), _maps: maps, memory })
    }

    /// Of which guest memory it is.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Whether the VF can reach all of a frame, or of a buffer for one.
    #[inline]
    pub fn covers(&self, frame: &HostRange) -> bool {
        self.ranges.as_ref().is_none_or(|ranges| hold(ranges, frame.as_ptr().addr(), frame.len()))
    }
}

#[inline]
fn hold(ranges: &[Range<usize>], start: usize, len: usize) -> bool {
    // Most guests' memory has a hole or two; that of some was plugged in up to 509 pieces.
    let behind = ranges.partition_point(|range| range.start <= start);
    ranges[..behind].last().is_some_and(|range| start < range.end && len <= range.end - start)
}

fn merged(mut ranges: Vec<Range<usize>>) -> Box<[Range<usize>]> {
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.dedup_by(|next, last| {
        let touches = last.end == next.start;
        if touches {
            last.end = next.end;
        }
        touches
    });
    ranges.into_boxed_slice()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_covered_that_lie_in_maps_from_end_to_end() {
        let ranges = merged(vec![0x6000..0x8000, 0x1000..0x2000, 0x2000..0x4000]);
        assert_eq!(*ranges, [0x1000..0x4000, 0x6000..0x8000]);
        let covers = |start, len| hold(&ranges, start, len);
        assert!(covers(0x1000, 1) && covers(0x1fff, 2) && covers(0x1000, 0x3000) && covers(0x7fff, 1));
        assert!(!covers(0xfff, 2) && !covers(0x3fff, 2) && !covers(0x4000, 1) && !covers(0x1000, 0x3001));
        assert!(!covers(0x4000, 0x3000) && !covers(0x7000, usize::MAX), "no wrap around either");
    }
}
