//! The buffers of a ring's slots, each contiguous: virtio-net header, then the frame.

use std::sync::Arc;

use super::memory::{Area, Memory};
use super::{HEADER, Plan};

const LINE: usize = 64;
/// Places the header so that the frame begins at a cache line, as DPDK's drivers do.
const SHIFT: usize = LINE - HEADER;

#[derive(Debug)]
pub struct Buffers {
    pub area: Area,
    stride: usize,
    /// Bytes of each slot, with the header.
    lens: Vec<u32>,
    pieces: u16,
    /// The addresses and lengths of all pieces, slot by slot.
    table: Vec<(u64, u32)>,
}

impl Buffers {
    /// Slot `i` gets `lens[i % lens.len()]` bytes, and the header's.
    pub fn new(memory: &Arc<Memory>, plan: &Plan, lens: &[usize]) -> Self {
        let stride = Self::stride(lens);
        let slots = usize::from(plan.slots());
        let lens = lens.iter().cycle().take(slots).map(|len| (HEADER + len) as u32).collect();
        let area = memory.area(slots * stride);
        let mut buffers = Self { area, stride, lens, pieces: plan.pieces, table: vec![] };
        buffers.table = (0..plan.slots()).flat_map(|slot| buffers.split(slot)).collect();
        buffers
    }

    /// Memory that a ring's buffers need.
    pub fn size(plan: &Plan, lens: &[usize]) -> usize {
        usize::from(plan.slots()) * Self::stride(lens)
    }

    /// An odd number of cache lines: the first lines of all buffers then spread over all sets of a cache.
    fn stride(lens: &[usize]) -> usize {
        let longest = lens.iter().max().expect("at least one length");
        ((SHIFT + HEADER + longest).div_ceil(LINE) | 1) * LINE
    }

    /// A slot in pieces. From two on, the first is the header alone.
    fn split(&self, slot: u16) -> impl Iterator<Item = (u64, u32)> + use<> {
        let (gpa, total) = (self.area.gpa(self.header(slot)), self.len(slot));
        let (first, others) = match self.pieces {
            1 => (total, 1),
            n => (HEADER as u32, u32::from(n) - 1),
        };
        let part = (total - first).div_ceil(others);
        (0..u32::from(self.pieces)).map(move |i| match i {
            0 => (gpa, first),
            i => {
                let from = first + (i - 1) * part;
                (gpa + u64::from(from), part.min(total - from))
            }
        })
    }

    #[inline]
    pub fn piece(&self, slot: u16, piece: u16) -> (u64, u32) {
        self.table[usize::from(slot) * usize::from(self.pieces) + usize::from(piece)]
    }

    /// All pieces' addresses and lengths.
    pub fn table(&self) -> &[(u64, u32)] {
        &self.table
    }

    /// Bytes of a slot, with the header.
    #[inline]
    pub fn len(&self, slot: u16) -> u32 {
        self.lens[usize::from(slot)]
    }

    /// Where the header of a slot is in the area.
    #[inline]
    pub fn header(&self, slot: u16) -> usize {
        usize::from(slot) * self.stride + SHIFT
    }

    /// Where the frame is; a multiple of the cache line.
    #[inline]
    pub fn frame(&self, slot: u16) -> usize {
        self.header(slot) + HEADER
    }
}
