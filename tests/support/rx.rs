//! A queue the guest receives on.

use std::sync::Arc;

use super::memory::Region;
use super::queue::{Desc, Piece, Queue, WRITE};
use super::tx::NetHdr;

/// A received frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    pub header: NetHdr,
    pub frame: Vec<u8>,
}

#[derive(Debug)]
pub struct RxQueue {
    pub queue: Queue,
    pub header_len: usize,
    mergeable: bool,
    /// Insist on num_buffers = 1 without MRG_RXBUF (virtio 1.3, 5.1.6.4.1); DPDK's vhost leaves 0.
    pub strict: bool,
    /// Lengths of the descriptors of one buffer; they lie one behind the other.
    pieces: Vec<u32>,
    buffers: Arc<Region>,
    base: u64,
}

impl RxQueue {
    pub fn new(queue: Queue, buffers: &Arc<Region>, pieces: &[u32], header_len: usize, mergeable: bool) -> Self {
        let len: u64 = pieces.iter().copied().map(u64::from).sum();
        Self {
            base: buffers.alloc(u64::from(queue.size) * len, 64),
            buffers: buffers.clone(),
            queue,
            header_len,
            mergeable,
            strict: true,
            pieces: pieces.to_vec(),
        }
    }

    fn buffer_len(&self) -> u64 {
        self.pieces.iter().copied().map(u64::from).sum()
    }

    fn place(&self, head: u16) -> u64 {
        self.base + u64::from(head) * self.buffer_len()
    }

    /// Posts one buffer; [`Self::flush`] makes it visible. `false`: the ring is full.
    pub fn post(&mut self) -> bool {
        let Some(head) = self.queue.next_head(self.pieces.len()) else {
            return false;
        };
        let mut at = self.place(head);
        let pieces: Vec<Piece> = self
            .pieces
            .iter()
            .map(|&len| {
                at += u64::from(len);
                (at - u64::from(len), len)
            })
            .collect();
        self.queue.add(&pieces, true).is_some()
    }

    /// Posts every buffer there is, and tells the device.
    pub fn post_all(&mut self) {
        let mut any = false;
        while self.post() {
            any = true;
        }
        if any {
            self.flush();
        }
    }

    /// Writes descriptor and available entry of one position anew, whatever the books say.
    pub fn rewrite(&self, position: u16) {
        let desc = Desc { addr: self.place(position), len: self.buffer_len() as u32, flags: WRITE, next: 0 };
        self.queue.write_desc(position, desc);
        self.queue.write_head_at(position, position);
    }

    /// Publishes what was posted, and kicks if asked to.
    pub fn flush(&mut self) {
        self.queue.notify();
    }

    /// Takes the next frame, without posting its buffers again.
    #[track_caller]
    pub fn take(&mut self) -> Option<Received> {
        let ring = self.queue.index;
        let mut bytes = self.take_buffer()?;
        assert!(
            bytes.len() >= self.header_len,
            "ring {ring}: {} bytes used, the header has {}",
            bytes.len(),
            self.header_len
        );
        let header = NetHdr::decode(&bytes[..self.header_len]);
        if self.mergeable {
            assert!(header.num_buffers >= 1, "ring {ring}: {header:?}");
        } else if self.strict {
            assert_eq!(header.num_buffers, 1, "ring {ring}: {header:?}");
        }
        let mut frame = bytes.split_off(self.header_len);
        for i in 1..header.num_buffers {
            // A frame's buffers become visible at once (virtio 1.3, 5.1.6.4.1).
            let more = self.take_buffer();
            frame.extend(more.unwrap_or_else(|| panic!("ring {ring}: {i} of {} buffers used", header.num_buffers)));
        }
        Some(Received { header, frame })
    }

    fn take_buffer(&mut self) -> Option<Vec<u8>> {
        let (head, len) = self.queue.pop()?;
        let room = self.buffer_len();
        assert!(u64::from(len) <= room, "ring {}: {len} bytes used of a buffer of {room}", self.queue.index);
        let mut bytes = vec![0; len as usize];
        self.buffers.read(self.place(head), &mut bytes);
        Some(bytes)
    }

    /// Takes the next frame and posts its buffers again.
    #[track_caller]
    pub fn receive(&mut self) -> Option<Received> {
        let received = self.take()?;
        self.post_all();
        Some(received)
    }
}
