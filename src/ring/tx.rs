//! The ring a guest sends on.

use std::sync::Arc;

use arrayvec::ArrayVec;

use super::chain::{DESCRIPTORS, Stop};
use super::split::SplitRing;
use super::{BURST, ChainFault, Gather, NetHeader, RingConfig, RingFault};
use crate::error::Result;
use crate::ethernet;
use crate::guest::{GuestMemory, HostRange};

// Positions index `heads` by their low bits.
const _: () = assert!(BURST.is_power_of_two());

/// A guest's TX virtqueue: chains come out in bursts, are completed strictly in order.
#[derive(Debug)]
pub struct TxRing {
    split: SplitRing,
    header_len: usize,
    max_frame: usize,
    /// Heads of the chains in flight, by position modulo `BURST`.
    heads: [u16; BURST],
    /// The last burst, in the first `burst` places.
    chains: [Chain; BURST],
    burst: usize,
    /// The pieces of its frames, without their virtio-net headers.
    pieces: Box<ArrayVec<HostRange, DESCRIPTORS>>,
}

/// A popped chain.
#[derive(Clone, Copy, Debug, Default)]
struct Chain {
    /// What is wrong with it; then the rest means nothing.
    fault: Option<ChainFault>,
    header: [u8; NetHeader::LEN],
    /// Its pieces: `pieces[first..end]`.
    first: u16,
    end: u16,
    /// Length of the frame.
    len: u32,
}

/// A frame that still lies in guest memory, behind its header, which was read once and privately.
#[derive(Debug)]
pub struct Frame<'ring> {
    header: [u8; NetHeader::LEN],
    len: usize,
    remaining: usize,
    /// What is left of the piece being read.
    piece: HostRange,
    pieces: std::slice::Iter<'ring, HostRange>,
}

impl Frame<'_> {
    /// The private copy of the virtio-net header.
    pub fn header(&self) -> NetHeader {
        let [legacy @ .., _, _] = self.header;
        NetHeader::decode(&legacy)
    }

    /// Bytes of the frame, without the virtio-net header.
    #[allow(clippy::len_without_is_empty)] // never empty: an Ethernet header is in it
    pub fn len(&self) -> usize {
        self.len
    }
}

impl Gather for Frame<'_> {
    #[inline]
    fn remaining(&self) -> usize {
        self.remaining
    }

    #[inline]
    fn copy_next(&mut self, mut into: &mut [u8]) {
        debug_assert!(into.len() <= self.remaining);
        while !into.is_empty() {
            if self.piece.is_empty() {
                match self.pieces.next() {
                    Some(piece) => self.piece = *piece,
                    // More was asked for than there is; `into` keeps what it had.
                    None => return,
                }
            }
            let n = into.len().min(self.piece.len());
            let (now, later) = into.split_at_mut(n);
            // SAFETY: `n` is within the piece; the frame borrows the ring, which keeps the memory.
            unsafe { self.piece.read_into(0, now) };
            self.piece = self.piece.after(n);
            self.remaining -= n;
            into = later;
        }
    }
}

impl TxRing {
    /// Resolves and checks the ring's areas. If used.idx in memory differs from `config.base`, the
    /// ring resumes from used.idx (virtio-user reconnects with base 0; QEMU restores used.idx).
    /// Starts with kicks disabled. The first `publish` may find no signal wanted although the guest waits
    /// for one that a predecessor owed: signal once whenever a ring is handed out.
    ///
    /// # Errors
    /// [`crate::Error::Protocol`] for a bad size or alignment, [`crate::Error::Memory`] if an area is not
    /// inside one region.
    pub fn new(memory: Arc<GuestMemory>, config: &RingConfig) -> Result<Self> {
        Ok(Self {
            split: SplitRing::new(memory, config)?,
            header_len: config.header_len,
            max_frame: config.max_frame,
            heads: [0; BURST],
            chains: [Chain::default(); BURST],
            burst: 0,
            pieces: Box::new(ArrayVec::new()),
        })
    }

    /// Parses up to `max` more chains (never more than `BURST` popped and not completed) and returns how
    /// many this burst has; `frame(0..n)` then looks at them. Each descriptor is read once.
    ///
    /// # Errors
    /// The ring is broken, for good; what is in flight can still be completed and published.
    pub fn pop(&mut self, max: usize) -> Result<usize, RingFault> {
        self.burst = 0;
        self.pieces.clear();
        let room = BURST - usize::from(self.split.in_flight());
        let max = max.min(room).min(self.split.available(false)?.into());
        let mut budget = DESCRIPTORS;
        while self.burst < max {
            let head = self.split.head(0);
            let fault = match self.parse(head, &mut budget) {
                Ok(()) => None,
                Err(Stop::Fault(fault)) => Some(fault),
                // It may fit into a burst of its own.
                Err(_) if self.burst > 0 => break,
                Err(_) => Some(ChainFault::Long),
            };
            self.split.judge(fault.is_some());
            self.chains[self.burst].fault = fault;
            self.heads[usize::from(self.split.next()) % BURST] = head;
            self.split.advance(1);
            self.burst += 1;
        }
        Ok(self.burst)
    }

    /// Reads one chain into the next place of the burst; on failure none of its pieces stays.
    #[inline]
    fn parse(&mut self, head: u16, budget: &mut usize) -> Result<(), Stop> {
        let Self { split, header_len, max_frame, pieces, chains, burst, .. } = self;
        let chain = &mut chains[*burst];
        let first = pieces.len();
        let header_len = *header_len;
        let most = header_len + *max_frame;
        let mut total = 0;
        let take = |piece: HostRange| {
            let have = total;
            // No overflow: at most one piece beyond `most`.
            total += piece.len();
            if total > most {
                return Err(Stop::Fault(ChainFault::Long));
            }
            let frame = if have >= header_len {
                piece
            } else if have == 0 && piece.len() >= NetHeader::LEN {
                // SAFETY: the piece is so long; the ring keeps the memory.
                chain.header = unsafe { piece.read_first() };
                piece.after(header_len)
            } else {
                // The header may be spread over any number of descriptors (2.7.4.1).
                let n = (header_len - have).min(piece.len());
                // SAFETY: `n` is within the piece; the ring keeps the memory.
                unsafe { piece.read_into(0, &mut chain.header[have..have + n]) };
                piece.after(n)
            };
            if !frame.is_empty() {
                pieces.try_push(frame).map_err(|_| Stop::Budget)?;
            }
            Ok(())
        };
        let read = split.read::<false>(head, budget, take);
        let read = match read {
            Ok(()) if total < header_len + ethernet::HEADER => Err(Stop::Fault(ChainFault::Short)),
            read => read,
        };
        if let Err(stop) = read {
            pieces.truncate(first);
            return Err(stop);
        }
        chain.first = first as u16;
        chain.end = pieces.len() as u16;
        chain.len = (total - header_len) as u32;
        Ok(())
    }

    /// The `i`-th chain of the last `pop`, read from its start.
    ///
    /// # Errors
    /// The chain is malformed; it is to be completed like the others.
    ///
    /// # Panics
    /// If the last `pop` returned `i` or less.
    #[inline]
    pub fn frame(&self, i: usize) -> Result<Frame<'_>, ChainFault> {
        let chain = &self.chains[..self.burst][i];
        if let Some(fault) = chain.fault {
            return Err(fault);
        }
        let mut pieces = self.pieces[chain.first.into()..chain.end.into()].iter();
        let len = chain.len as usize;
        // Never fails: a chain has at least an Ethernet header.
        let piece = *pieces.next().ok_or(ChainFault::Short)?;
        Ok(Frame { header: chain.header, len, remaining: len, piece, pieces })
    }

    /// Chains popped and not completed.
    pub fn in_flight(&self) -> usize {
        self.split.in_flight().into()
    }

    /// Retires the `n` oldest popped chains, in order, with used length 0. Visible after `publish`.
    #[inline]
    pub fn complete(&mut self, n: usize) {
        debug_assert!(n <= self.in_flight());
        let oldest = usize::from(self.split.oldest());
        let heads = &self.heads;
        self.split.stage_empty((0..n.min(self.split.in_flight().into())).map(|i| heads[(oldest + i) % BURST]));
    }

    /// Forgets what was popped and not completed: it will be popped again.
    pub fn rewind(&mut self) {
        self.burst = 0;
        self.pieces.clear();
        self.split.rewind();
    }

    /// Makes completed chains visible with one release store. Returns whether the guest wants to be
    /// signalled for them (NO_INTERRUPT / used_event honoured, virtio 1.3, 2.7.7); never when nothing was completed.
    #[inline]
    pub fn publish(&mut self) -> bool {
        self.split.publish()
    }

    /// Asks the guest for a kick on its next buffer, then looks again: `true` if there is one already
    /// (do not sleep), or if the ring is broken (`pop` says how).
    pub fn enable_kicks(&mut self) -> bool {
        self.split.enable_kicks()
    }

    /// Tells the guest that we poll.
    pub fn disable_kicks(&mut self) {
        self.split.disable_kicks();
    }

    /// The used position: the answer to GET_VRING_BASE when nothing is in flight and all is published.
    pub fn position(&self) -> u16 {
        self.split.position()
    }

    /// Free-running count of chains the guest has made available beyond those popped (reads avail.idx).
    /// 0 if the ring is broken.
    pub fn backlog(&mut self) -> u16 {
        self.split.backlog()
    }

    /// Whether `publish` has something to show.
    #[inline]
    pub fn is_staged(&self) -> bool {
        self.split.is_staged()
    }

    /// The memory its pointers point into.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        self.split.memory()
    }
}
