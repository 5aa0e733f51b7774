//! A queue the guest sends on.

use std::sync::Arc;

use super::memory::Region;
use super::queue::{Desc, Piece, Queue};

/// `virtio_net_hdr` (virtio 1.3, 5.1.6), encoded independently of the code under test.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetHdr {
    pub flags: u8,
    pub gso_type: u8,
    pub hdr_len: u16,
    pub gso_size: u16,
    pub csum_start: u16,
    pub csum_offset: u16,
    pub num_buffers: u16,
}

impl NetHdr {
    pub const NEEDS_CSUM: u8 = 1;
    pub const DATA_VALID: u8 = 2;
    pub const GSO_TCPV4: u8 = 1;
    pub const GSO_TCPV6: u8 = 4;
    /// With `num_buffers`.
    pub const LEN: usize = 12;
    /// Without: neither VERSION_1 nor MRG_RXBUF.
    pub const LEGACY_LEN: usize = 10;

    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut bytes = [self.flags, self.gso_type, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let words = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset, self.num_buffers];
        for (i, word) in words.iter().enumerate() {
            bytes[2 + 2 * i..4 + 2 * i].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// Of a header of 10 or 12 bytes; `num_buffers` is 1 where there is no such field.
    pub fn decode(bytes: &[u8]) -> Self {
        let word = |at: usize| match bytes.get(at..at + 2) {
            Some(pair) => u16::from_le_bytes([pair[0], pair[1]]),
            None => 1,
        };
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
            num_buffers: word(10),
        }
    }
}

/// How a frame behind its header is laid out in descriptors: cut at these bytes, counted from the
/// header's first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    pub cuts: Vec<usize>,
    pub indirect: bool,
}

impl Shape {
    /// All in one descriptor.
    pub fn whole() -> Self {
        Self::default()
    }

    pub fn cut(cuts: &[usize]) -> Self {
        Self { cuts: cuts.to_vec(), indirect: false }
    }

    pub fn indirect(cuts: &[usize]) -> Self {
        Self { cuts: cuts.to_vec(), indirect: true }
    }

    fn pieces(&self, at: u64, len: usize) -> Vec<Piece> {
        let mut from = 0;
        let inside = self.cuts.iter().copied().take_while(|&cut| cut < len);
        inside
            .chain([len])
            .map(|to| {
                let piece = (at + from as u64, (to - from) as u32);
                from = to;
                piece
            })
            .collect()
    }
}

#[derive(Debug)]
pub struct TxQueue {
    pub queue: Queue,
    pub shape: Shape,
    pub header_len: usize,
    buffers: Arc<Region>,
    base: u64,
    slot: usize,
    tables: u64,
    table_len: u64,
}

impl TxQueue {
    /// Buffers of `slot` bytes (header and frame), one per descriptor, lie in `buffers`.
    pub fn new(queue: Queue, buffers: &Arc<Region>, slot: usize, header_len: usize, shape: Shape) -> Self {
        let n = u64::from(queue.size);
        let table_len = 16 * (shape.cuts.len() as u64 + 1);
        Self {
            base: buffers.alloc(n * slot as u64, 64),
            tables: queue.region.alloc(n * table_len, 16),
            buffers: buffers.clone(),
            queue,
            shape,
            header_len,
            slot,
            table_len,
        }
    }

    /// Adds a frame with an all-zero header; [`Self::flush`] makes it visible. `false`: the ring is full.
    pub fn send(&mut self, frame: &[u8]) -> bool {
        self.send_with(&NetHdr::default(), frame)
    }

    /// Adds a frame behind any header.
    pub fn send_with(&mut self, header: &NetHdr, frame: &[u8]) -> bool {
        self.reap();
        let len = self.header_len + frame.len();
        assert!(len <= self.slot, "{len} bytes for a slot of {}", self.slot);
        let count = self.shape.pieces(0, len).len();
        let descriptors = if self.shape.indirect { 1 } else { count };
        let Some(head) = self.queue.next_head(descriptors) else {
            return false;
        };
        let at = self.place(head);
        self.buffers.write(at, &header.encode()[..self.header_len]);
        self.buffers.write(at + self.header_len as u64, frame);
        let pieces = self.shape.pieces(at, len);
        let added = if self.shape.indirect {
            let table = self.tables + u64::from(head) * self.table_len;
            self.queue.add_indirect(table, &pieces, false)
        } else {
            self.queue.add(&pieces, false)
        };
        assert_eq!(added, Some(head), "the buffer was filled for another head");
        true
    }

    /// Address of the buffer (header first) that goes with a descriptor.
    pub fn place(&self, head: u16) -> u64 {
        self.base + u64::from(head) * self.slot as u64
    }

    /// Writes buffer, descriptor and available entry of one position anew, whatever the books say.
    pub fn rewrite(&self, position: u16, header: &NetHdr, frame: &[u8]) {
        let at = self.place(position);
        self.buffers.write(at, &header.encode()[..self.header_len]);
        self.buffers.write(at + self.header_len as u64, frame);
        let len = (self.header_len + frame.len()) as u32;
        let desc = Desc { addr: at, len, ..Desc::default() };
        self.queue.write_desc(position, desc);
        self.queue.write_head_at(position, position);
    }

    /// Publishes what was added, and kicks if asked to.
    pub fn flush(&mut self) {
        self.queue.notify();
    }

    /// Takes back what the device has used. How many.
    pub fn reap(&mut self) -> usize {
        let mut n = 0;
        while let Some((head, len)) = self.queue.pop() {
            assert_eq!(len, 0, "chain {head}: the device wrote nothing into it");
            n += 1;
        }
        n
    }
}
