//! The ring a guest sends on.

use std::marker::PhantomData;
use std::sync::Arc;

use arrayvec::ArrayVec;

use super::chain::{self, DESCRIPTORS, Stop};
use super::virtqueue::{Queue, Token, Virtqueue, either};
use super::{BURST, ChainFault, Gather, IN_FLIGHT, LINE, NetHeader, Ring, RingConfig, RingFault};
use crate::error::Result;
use crate::ethernet;
use crate::guest::{GuestMemory, HostRange};

// Numbers of chains index `tokens` by their low bits.
const _: () = assert!(IN_FLIGHT.is_power_of_two());

/// A guest's TX virtqueue: chains come out in bursts, are completed strictly in order.
pub type TxRing = Ring<Sending>;

/// What a ring is for that the guest sends on.
#[derive(Debug)]
pub struct Sending {
    /// Of the chains in flight, by their number modulo `IN_FLIGHT`.
    tokens: Box<[Token; IN_FLIGHT]>,
    /// Numbers of the next chain to take out and of the oldest in flight, modulo 2^32.
    popped: u32,
    completed: u32,
    burst: Burst,
}

/// The chains popped last.
#[derive(Debug)]
struct Burst {
    header_len: usize,
    max_frame: usize,
    len: usize,
    /// Descriptors looked at for them.
    descriptors: usize,
    /// In the first `len` places.
    chains: [Chain; BURST],
    /// The pieces of their frames behind the first ones.
    pieces: Box<ArrayVec<HostRange, DESCRIPTORS>>,
}

/// A popped chain.
#[derive(Clone, Copy, Debug)]
enum Chain {
    /// One buffer, the header in front of the frame. The header is not read yet.
    Usual(HostRange),
    Parsed {
        header: [u8; NetHeader::LEN],
        /// The frame: this piece, then `pieces[first..end]`.
        piece: HostRange,
        first: u16,
        end: u16,
        /// Length of the frame.
        len: u32,
    },
    Faulty(ChainFault),
}

/// A frame that still lies in guest memory, behind its header, of which it has a private copy.
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
    #[inline]
    pub fn header(&self) -> NetHeader {
        let [legacy @ .., _, _] = &self.header;
        NetHeader::decode(legacy)
    }

    /// Bytes of the frame, without the virtio-net header.
    #[allow(clippy::len_without_is_empty)] // never empty: an Ethernet header is in it
    pub fn len(&self) -> usize {
        self.len
    }

    /// Where what was not read yet lies, if it is in one piece.
    pub fn rest(&self) -> Option<HostRange> {
        let piece = if self.piece.is_empty() { self.pieces.as_slice().first()? } else { &self.piece };
        (piece.len() == self.remaining).then_some(*piece)
    }
}

/// The usual frame: in one piece of guest memory, behind a header that asks for nothing.
#[derive(Debug)]
pub struct PlainFrame<'ring> {
    piece: HostRange,
    _ring: PhantomData<&'ring TxRing>,
}

impl PlainFrame<'_> {
    /// Where it lies.
    #[inline]
    pub fn place(&self) -> HostRange {
        self.piece
    }
}

impl Gather for PlainFrame<'_> {
    #[inline]
    fn remaining(&self) -> usize {
        self.piece.len()
    }

    #[inline]
    fn copy_next(&mut self, into: &mut [u8]) {
        debug_assert!(into.len() <= self.piece.len());
        let n = into.len().min(self.piece.len());
        // SAFETY: `n` is within the piece; the frame borrows the ring, which keeps the memory.
        unsafe { self.piece.read_into(0, &mut into[..n]) };
        self.piece = self.piece.after(n);
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
    /// Resolves and checks the ring's areas. A split ring resumes from used.idx in memory, whatever
    /// `config.base` says (virtio-user reconnects with base 0; QEMU restores used.idx); a packed one from the
    /// base, for its memory does not tell.
    /// Starts with kicks disabled. The first `publish` may find no signal wanted although the guest waits
    /// for one that a predecessor owed: signal once whenever a ring is handed out.
    ///
    /// # Errors
    /// [`crate::Error::Protocol`] for a bad size, base or alignment, [`crate::Error::Memory`] if an area is not
    /// inside one region.
    pub fn new(memory: Arc<GuestMemory>, config: &RingConfig) -> Result<Self> {
        let queue = Queue::new(memory, config)?;
        let side = Sending {
            tokens: Box::new([Token::default(); IN_FLIGHT]),
            popped: 0,
            completed: 0,
            burst: Burst {
                header_len: config.header_len,
                max_frame: config.max_frame,
                len: 0,
                descriptors: 0,
                chains: [Chain::Usual(HostRange::NONE); BURST],
                pieces: Box::new(ArrayVec::new()),
            },
        };
        Ok(Self { queue, side })
    }

    /// Parses up to `max` more chains (never more than [`BURST`], nor [`IN_FLIGHT`] popped and not completed) and
    /// returns how many this burst has; `frame(0..n)` then looks at them. Each descriptor is read once.
    ///
    /// # Errors
    /// The ring is broken, for good; what is in flight can still be completed and published.
    pub fn pop(&mut self, max: usize) -> Result<usize, RingFault> {
        let max = max.min(BURST).min(IN_FLIGHT - self.in_flight());
        if self.in_flight() == 0 {
            // The same few lines of `tokens` again.
            (self.side.popped, self.side.completed) = (0, 0);
        }
        let Self { queue, side: Sending { tokens, popped, burst, .. } } = self;
        burst.clear();
        either!(queue, queue => burst.fill(queue, max, tokens, popped)?);
        Ok(burst.len)
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
        self.side.burst.frame(i)
    }

    /// The frames from the `i`-th on, as long as they are usual ones.
    #[inline]
    pub fn plain_frames(&self, i: usize) -> impl Iterator<Item = PlainFrame<'_>> {
        let Burst { header_len, len, chains, .. } = &self.side.burst;
        let header_len = *header_len;
        chains[..*len].get(i..).unwrap_or_default().iter().map_while(move |chain| {
            let (asks, piece) = match *chain {
                // SAFETY: longer than its header; the ring keeps the memory. Of the header nothing else counts.
                Chain::Usual(buffer) => (unsafe { buffer.read_first() }, buffer.after(header_len)),
                Chain::Parsed { header: [flags, gso_type, ..], piece, len, .. } if piece.len() == len as usize => {
                    ([flags, gso_type], piece)
                }
                _ => return None,
            };
            NetHeader::is_plain(asks).then_some(PlainFrame { piece, _ring: PhantomData })
        })
    }

    /// What the last `pop` cost beyond what it is for ordinary chains, in packets: see `chain::toil`.
    #[inline]
    pub fn toil(&self) -> usize {
        chain::toil(self.side.burst.descriptors)
    }

    /// Chains popped and not completed.
    pub fn in_flight(&self) -> usize {
        self.side.popped.wrapping_sub(self.side.completed) as usize
    }

    /// Retires the `n` oldest popped chains, in order, with used length 0. Visible after `publish`.
    #[inline]
    pub fn complete(&mut self, n: usize) {
        debug_assert!(n <= self.in_flight());
        let mut left = n.min(self.in_flight());
        let Self { queue, side: Sending { tokens, completed, .. } } = self;
        while left > 0 {
            let n = left.min(BURST);
            let oldest = *completed as usize;
            let chains = (0..n).map(|i| tokens[(oldest + i) % IN_FLIGHT]);
            either!(queue, queue => queue.stage_empty(chains));
            *completed = completed.wrapping_add(n as u32);
            left -= n;
        }
    }

    /// Forgets the `n` chains popped last, which are not completed: they will be popped again.
    pub fn put_back(&mut self, n: usize) {
        debug_assert!(n <= self.in_flight());
        self.side.burst.clear();
        for _ in 0..n.min(self.in_flight()) {
            self.side.popped = self.side.popped.wrapping_sub(1);
            let slots = self.side.tokens[self.side.popped as usize % IN_FLIGHT].slots;
            either!(&mut self.queue, queue => queue.put_back(slots));
        }
    }

    /// Puts back all that is in flight.
    pub fn rewind(&mut self) {
        self.put_back(self.in_flight());
    }
}

impl Burst {
    fn clear(&mut self) {
        self.len = 0;
        self.descriptors = 0;
        self.pieces.clear();
    }

    /// See [`TxRing::pop`].
    #[inline]
    fn fill(
        &mut self,
        queue: &mut impl Virtqueue,
        max: usize,
        tokens: &mut [Token; IN_FLIGHT],
        popped: &mut u32,
    ) -> Result<(), RingFault> {
        queue.look(false)?;
        let mut budget = DESCRIPTORS;
        while self.len < max && queue.is_ready(0) {
            if self.take_simple(queue, max, tokens, popped) > 0 {
                queue.trust().judge(false);
                continue;
            }
            let (token, read) = self.parse(queue, &mut budget);
            let fault = match read {
                Ok(()) => None,
                Err(Stop::Fault(fault)) => Some(fault),
                // It may fit into a burst of its own.
                Err(Stop::Budget) if self.len > 0 => break,
                Err(Stop::Ring(fault)) if self.len == 0 => return Err(fault),
                // The next burst says why.
                Err(Stop::Ring(_)) => break,
                Err(_) => Some(ChainFault::Long),
            };
            queue.trust().judge(fault.is_some());
            queue.advance(token.slots);
            if let Some(fault) = fault {
                self.chains[self.len] = Chain::Faulty(fault);
            }
            self.len += 1;
            tokens[*popped as usize % IN_FLIGHT] = token;
            *popped = popped.wrapping_add(1);
        }
        self.descriptors = DESCRIPTORS - budget;
        Ok(())
    }

    /// Takes out the usual chains, one buffer each, until another comes. Returns how many.
    #[inline(always)]
    fn take_simple(
        &mut self,
        queue: &mut impl Virtqueue,
        max: usize,
        tokens: &mut [Token; IN_FLIGHT],
        popped: &mut u32,
    ) -> usize {
        let (header_len, max_frame) = (self.header_len, self.max_frame);
        let mut places = self.chains[self.len..].iter_mut();
        let mut number = *popped;
        let taken = queue.take_simple::<false>(max - self.len, |token, buffer| {
            // One comparison: what is too short is very long.
            let len = buffer.len().wrapping_sub(header_len);
            if len.wrapping_sub(ethernet::HEADER) > max_frame - ethernet::HEADER {
                return false;
            }
            let Some(place) = places.next() else { return false };
            buffer.prefetch(0);
            buffer.prefetch(LINE);
            *place = Chain::Usual(buffer);
            tokens[number as usize % IN_FLIGHT] = token;
            number = number.wrapping_add(1);
            true
        });
        *popped = number;
        self.len += taken;
        taken
    }

    /// Reads one chain into the next place of the burst; on failure none of its pieces stays.
    #[inline]
    fn parse(&mut self, queue: &mut impl Virtqueue, budget: &mut usize) -> (Token, Result<(), Stop>) {
        let Self { header_len, max_frame, pieces, chains, len, .. } = self;
        let first = pieces.len();
        let (mut header, mut start) = ([0; NetHeader::LEN], HostRange::NONE);
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
                header = unsafe { piece.read_first() };
                piece.after(header_len)
            } else {
                // The header may be spread over any number of descriptors (2.7.4.1).
                let n = (header_len - have).min(piece.len());
                // SAFETY: `n` is within the piece; the ring keeps the memory.
                unsafe { piece.read_into(0, &mut header[have..have + n]) };
                piece.after(n)
            };
            if start.is_empty() {
                start = frame;
            } else if !frame.is_empty() {
                pieces.try_push(frame).map_err(|_| Stop::Budget)?;
            }
            Ok(())
        };
        let (token, read) = queue.read::<false>(0, budget, take);
        let read = match read {
            Ok(()) if total < header_len + ethernet::HEADER => Err(Stop::Fault(ChainFault::Short)),
            read => read,
        };
        if read.is_err() {
            pieces.truncate(first);
            return (token, read);
        }
        let (first, end) = (first as u16, pieces.len() as u16);
        chains[*len] = Chain::Parsed { header, piece: start, first, end, len: (total - header_len) as u32 };
        (token, Ok(()))
    }

    /// See [`TxRing::frame`].
    #[inline]
    fn frame(&self, i: usize) -> Result<Frame<'_>, ChainFault> {
        let (header, piece, pieces, len) = match self.chains[..self.len][i] {
            Chain::Usual(buffer) => {
                // SAFETY: longer than its header; the ring keeps the memory.
                let header = unsafe { buffer.read_first() };
                (header, buffer.after(self.header_len), &[][..], buffer.len() - self.header_len)
            }
            Chain::Parsed { header, piece, first, end, len } => {
                (header, piece, &self.pieces[first.into()..end.into()], len as usize)
            }
            Chain::Faulty(fault) => return Err(fault),
        };
        Ok(Frame { header, len, remaining: len, piece, pieces: pieces.iter() })
    }
}
