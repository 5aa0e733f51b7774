//! The ring a guest receives on.

use std::sync::Arc;

use arrayvec::ArrayVec;

use super::chain::{self, DESCRIPTORS, Stop};
use super::virtqueue::{Queue, Token, Virtqueue, either};
use super::{BURST, ChainFault, Gather, NetHeader, Ring, RingConfig, RingFault};
use crate::error::Result;
use crate::guest::{GuestMemory, GuestSink, GuestStore, HostRange};

const OVERTAKES: &str = "a frame overtakes those that reserved buffers wait for";

/// Why a frame was not placed. The frame is untouched only for `Empty`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PushError {
    /// The guest has posted too little: try again later. Nothing was consumed.
    #[error("guest ring empty")]
    Empty,
    /// The frame does not fit the guest's buffer; with mergeable buffers, not even all that its ring can
    /// hold. The buffer stays.
    #[error("frame larger than the guest's buffer")]
    Oversize,
    /// The buffer's chain was malformed; it was consumed with length 0. The same frame may be tried again.
    #[error("malformed chain: {0}")]
    Chain(ChainFault),
    /// The ring itself lies.
    #[error("ring fault: {0}")]
    Ring(RingFault),
}

/// A guest's RX virtqueue: frames are copied in, used elements are staged, then published at once.
pub type RxRing = Ring<Receiving>;

/// What a ring is for that the guest receives on.
#[derive(Debug)]
pub struct Receiving {
    place: Place,
    reserved: Reservations,
}

/// Most buffers that are reserved at a time: as many as the longest of a VF's receive rings that takes buffers early
/// (see [`crate::vf::RxQueue::ahead`]), and some bursts more.
const PLACES: usize = 256;

/// Buffers taken out for frames that are still to come, in their order, oldest first.
#[derive(Debug)]
struct Reservations {
    /// A ring: places are counted on, and taken modulo its length.
    places: Box<[Reserved; PLACES]>,
    first: usize,
    end: usize,
}

/// One of them.
#[derive(Clone, Copy, Debug)]
struct Reserved {
    token: Token,
    /// The frame comes there without us. Else it comes elsewhere, and is copied.
    posted: bool,
    buffer: HostRange,
}

impl Reservations {
    fn new() -> Self {
        let nothing = Reserved { token: Token::default(), posted: false, buffer: HostRange::NONE };
        Self { places: Box::new([nothing; PLACES]), first: 0, end: 0 }
    }

    #[inline]
    fn len(&self) -> usize {
        self.end - self.first
    }

    /// The one `behind` the oldest, which is there.
    #[inline]
    fn at(&self, behind: usize) -> &Reserved {
        &self.places[(self.first + behind) % PLACES]
    }

    /// One more, of fewer than [`PLACES`].
    #[inline]
    fn push(&mut self, reserved: Reserved) {
        self.places[self.end % PLACES] = reserved;
        self.end += 1;
    }

    /// The newest, if it is not the only one left of the first `n`.
    fn pop_back(&mut self, n: usize) -> Option<Reserved> {
        let newest = (self.len() > n).then(|| *self.at(self.len() - 1))?;
        self.end -= 1;
        self.rewind();
        Some(newest)
    }

    /// Takes the first `n` out.
    #[inline]
    fn pop(&mut self, n: usize) {
        self.first += n;
        self.rewind();
    }

    /// A few that are used up and renewed all the time stay in the same cache lines.
    #[inline]
    fn rewind(&mut self) {
        if self.first == self.end {
            (self.first, self.end) = (0, 0);
        }
    }
}

/// What [`RxRing::reserve`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Supply {
    /// As many as were asked for, or all that the guest has posted.
    Enough,
    /// Too few to leave places free ahead of the first; none was reserved.
    Few,
    /// Behind those that were reserved, if any, comes a buffer that is too short, or in pieces, or that was refused.
    Unfit,
}

/// Where in the guest's buffers the frame being pushed goes.
#[derive(Debug)]
struct Place {
    header_len: usize,
    mergeable: bool,
    /// The chains it needs.
    chains: Box<ArrayVec<Target, DESCRIPTORS>>,
    /// Slots they take together.
    slots: u16,
    /// Descriptors looked at for them.
    descriptors: usize,
    /// Their pieces, together exactly as long as header and frame.
    pieces: Box<ArrayVec<HostRange, DESCRIPTORS>>,
}

/// A chain to write to.
#[derive(Clone, Copy, Debug)]
struct Target {
    token: Token,
    /// Bytes to be written to it.
    len: u32,
}

impl RxRing {
    /// As [`super::TxRing::new`].
    ///
    /// # Errors
    /// As [`super::TxRing::new`].
    pub fn new(memory: Arc<GuestMemory>, config: &RingConfig) -> Result<Self> {
        let queue = Queue::new(memory, config)?;
        let side = Receiving {
            place: Place {
                header_len: config.header_len,
                mergeable: config.mergeable,
                chains: Box::new(ArrayVec::new()),
                slots: 0,
                descriptors: 0,
                pieces: Box::new(ArrayVec::new()),
            },
            reserved: Reservations::new(),
        };
        Ok(Self { queue, side })
    }

    /// Takes buffers out for frames that are still to come: the first `ahead` for frames that a device writes elsewhere
    /// ([`Self::fill`]), the others, at most `most`, for those that it is to write there itself ([`Self::accept`]). Each is in
    /// one piece of at least `room` bytes with the header. Ends at the first that is not so (malformed ones are left to
    /// [`Self::push`]), or that `post` refuses; if it refuses the first it gets, or comes to none, nothing is reserved.
    ///
    /// # Errors
    /// The ring is broken.
    #[inline]
    pub fn reserve(
        &mut self,
        ahead: usize,
        most: usize,
        room: usize,
        post: impl FnMut(HostRange) -> bool,
    ) -> Result<Supply, RingFault> {
        let Self { queue, side: Receiving { reserved, .. } } = self;
        let most = ahead + most;
        if most > PLACES - reserved.len() {
            return Ok(Supply::Few);
        }
        either!(queue, queue => reserve(queue, reserved, ahead, most, room, post))
    }

    /// Buffers reserved.
    #[inline]
    pub fn reserved(&self) -> usize {
        self.side.reserved.len()
    }

    /// The next frame is to be copied, to a buffer that was reserved for it.
    #[inline]
    pub fn is_place_free(&self) -> bool {
        let reserved = &self.side.reserved;
        reserved.len() > 0 && !reserved.at(0).posted
    }

    /// A frame of `len` bytes came to the address `at`, behind the header of a reserved buffer, which it gets. Buffers
    /// reserved before that one, at most `skip`, got none: they are used with length 0. `false`: it is in none.
    ///
    /// A driver that puts back the VLAN tag which the kernel took out does so in the headroom: then the frame begins
    /// where the header is to be, and is moved.
    #[inline]
    pub fn accept(&mut self, at: usize, skip: usize, header: &NetHeader, len: usize) -> bool {
        let Self { queue, side: Receiving { place, reserved } } = self;
        let header_len = place.header_len;
        let ahead = |to: &Reserved| (to.buffer.as_ptr().addr() + header_len).wrapping_sub(at);
        let is_there = |to: &Reserved| to.posted && ahead(to) <= header_len;
        // The first, but for what a driver took and did not use.
        let skipped = match reserved.len() > 0 && is_there(reserved.at(0)) {
            true => Some(0),
            false => (1..reserved.len().min(skip + 1)).find(|&behind| is_there(reserved.at(behind))),
        };
        let Some(skipped) = skipped else { return false };
        let Reserved { token, buffer, .. } = *reserved.at(skipped);
        let ahead = ahead(reserved.at(skipped));
        if ahead > 0 {
            let len = len.min(buffer.len() - header_len);
            // SAFETY: the buffer was translated by this ring's view, which keeps the memory; both places are in it.
            unsafe { GuestStore.shift(&buffer, header_len - ahead, header_len, len) };
        }
        either!(queue, queue => {
            (0..skipped).for_each(|behind| queue.stage(reserved.at(behind).token, 0));
            let encoded = header.encode(1);
            let write = |sink: &mut GuestSink<'_>| {
                if header_len != encoded.len() || !sink.put(&encoded) {
                    sink.write(&encoded[..header_len]);
                }
            };
            // SAFETY: the buffer was translated by this ring's view, which keeps the memory.
            unsafe { GuestStore.fill(buffer, write) };
            queue.trust().judge(false);
            queue.stage(token, (header_len + len).min(buffer.len()) as u32);
        });
        reserved.pop(skipped + 1);
        true
    }

    /// Copies a frame behind its header to the oldest reserved buffer, which was left free for it.
    ///
    /// # Errors
    /// [`PushError::Oversize`]: it does not fit. The buffer is used all the same, with length 0.
    ///
    /// # Panics
    /// If that buffer is for a frame that a device writes, or there is none.
    #[cold]
    pub fn fill(&mut self, header: &NetHeader, frame: &mut impl Gather) -> Result<(), PushError> {
        assert!(self.is_place_free(), "no place was left for this frame");
        let Self { queue, side: Receiving { place, reserved } } = self;
        let Reserved { token, buffer, .. } = *reserved.at(0);
        reserved.pop(1);
        let total = place.header_len + frame.remaining();
        either!(queue, queue => {
            if total > buffer.len() {
                queue.stage(token, 0);
                return Err(PushError::Oversize);
            }
            let encoded = header.encode(1);
            let write = |sink: &mut GuestSink<'_>| {
                sink.write(&encoded[..place.header_len]);
                frame.store_next(sink);
            };
            // SAFETY: the buffer was translated by this ring's view, which keeps the memory.
            unsafe { GuestStore.fill(buffer.first(total), write) };
            queue.trust().judge(false);
            queue.stage(token, total as u32);
        });
        Ok(())
    }

    /// Puts the newest reserved buffers back, so that `left` remain. No device may write to those any more, nor may
    /// anything be reserved before the places among them are free of frames.
    pub fn release(&mut self, left: usize) {
        let Self { queue, side: Receiving { reserved, .. } } = self;
        either!(queue, queue => put_back(queue, reserved, left));
    }

    /// What the last [`Self::push`] cost beyond what it is for ordinary chains: as [`super::TxRing::toil`].
    #[inline]
    pub fn toil(&self) -> usize {
        chain::toil(self.side.place.descriptors)
    }

    /// Copies frames, each behind its header, into the next buffers, as long as those are usual ones (one descriptor, in
    /// one piece) and each holds its frame. Returns how many. The next one is for [`Self::push`].
    ///
    /// # Panics
    /// As [`Self::push`].
    #[inline]
    pub fn push_each<'f>(&mut self, frames: impl Iterator<Item = (NetHeader, &'f [u8])> + Clone) -> usize {
        assert!(self.reserved() == 0, "{OVERTAKES}");
        let Self { queue, side: Receiving { place, .. } } = self;
        either!(queue, queue => place.push_each(queue, frames))
    }

    /// Copies one frame behind its header into the next buffer (several with MRG_RXBUF).
    /// On an error the source may have been read in part; the caller re-creates it for a retry.
    ///
    /// Descriptors behind those that the frame needs are not looked at (of a packed ring: not used).
    ///
    /// # Errors
    /// See [`PushError`]. [`PushError::Empty`] also while buffers are reserved: their frames come first.
    #[inline]
    pub fn push(&mut self, header: &NetHeader, frame: &mut impl Gather) -> Result<(), PushError> {
        if self.reserved() > 0 {
            self.side.place.descriptors = 0;
            return Err(PushError::Empty);
        }
        let Self { queue, side: Receiving { place, .. } } = self;
        either!(queue, queue => place.push(queue, header, frame))
    }
}

/// See [`RxRing::reserve`].
#[inline]
fn reserve(
    queue: &mut impl Virtqueue,
    reserved: &mut Reservations,
    ahead: usize,
    most: usize,
    room: usize,
    mut post: impl FnMut(HostRange) -> bool,
) -> Result<Supply, RingFault> {
    queue.look(false)?;
    if ahead > 0 && !queue.is_ready(ahead as u16) {
        // Those seen earlier are not enough; there may be more by now.
        queue.look(true)?;
        if !queue.is_ready(ahead as u16) {
            return Ok(Supply::Few);
        }
    }
    let before = reserved.len();
    let mut budget = DESCRIPTORS;
    let mut supply = Supply::Enough;
    // The next that is to be posted.
    let mut next = before + ahead;
    let place = |reserved: &mut Reservations, token, buffer: HostRange| {
        let fits = buffer.len() >= room;
        if fits {
            buffer.prefetch(0);
            reserved.push(Reserved { token, posted: reserved.len() >= before + ahead, buffer });
        }
        fits
    };
    while supply == Supply::Enough && reserved.len() - before < most && queue.is_ready(0) {
        // If `post` wants none, one look is enough to know it.
        let left = if reserved.len() < next { ahead } else { most } - (reserved.len() - before);
        let left = if next == before { 1 } else { left };
        if queue.take_simple::<true>(left, |token, buffer| place(reserved, token, buffer)) == 0 {
            let mut first = None;
            let piece = |piece: HostRange| {
                first = Some(piece);
                Err(Stop::Enough)
            };
            let (token, read) = queue.read::<true>(0, &mut budget, piece);
            if let Err(Stop::Ring(fault)) = read {
                return Err(fault);
            }
            match (first, read) {
                (Some(buffer), Err(Stop::Enough)) if place(reserved, token, buffer) => queue.advance(token.slots),
                _ => supply = Supply::Unfit,
            }
        }
        while next < reserved.len() && post(reserved.at(next).buffer) {
            next += 1;
        }
        if next < reserved.len() {
            supply = Supply::Unfit;
            put_back(queue, reserved, next);
        }
    }
    if ahead > 0 && next == before + ahead {
        // Nothing was posted behind them: the frames that they were for come as all do.
        put_back(queue, reserved, before);
    }
    Ok(supply)
}

/// Puts the newest back, so that `left` remain.
fn put_back(queue: &mut impl Virtqueue, reserved: &mut Reservations, left: usize) {
    while let Some(newest) = reserved.pop_back(left) {
        queue.put_back(newest.token.slots);
    }
}

impl Place {
    /// See [`RxRing::push_each`].
    #[inline]
    fn push_each<'f>(
        &mut self,
        queue: &mut impl Virtqueue,
        frames: impl Iterator<Item = (NetHeader, &'f [u8])> + Clone,
    ) -> usize {
        // What is known to wait may not be enough; what is wrong `push` finds, too.
        let most = frames.size_hint().1.unwrap_or(BURST).min(BURST);
        if most == 0 || queue.look(!queue.is_ready(most as u16 - 1)).is_err() {
            return 0;
        }
        let header_len = self.header_len;
        let mut lens = frames.clone().map(|(_, frame)| header_len + frame.len());
        let mut usual = ArrayVec::<_, BURST>::new();
        queue.take_simple::<true>(most, |token, buffer| {
            let Some(len) = lens.next().filter(|len| *len <= buffer.len()) else { return false };
            // Writing to one after the other would wait for each. Of the header's line often nothing changes.
            buffer.prefetch(0);
            buffer.prefetch_write(header_len);
            buffer.prefetch_write(len - 1);
            usual.push((token, buffer.first(len)));
            true
        });
        if usual.is_empty() {
            return 0;
        }
        queue.trust().judge(false);
        queue.stage_each(usual.iter().zip(frames).map(|(&(token, buffer), (header, frame))| {
            let encoded = header.encode(1);
            let write = |sink: &mut GuestSink<'_>| {
                if header_len != encoded.len() || !sink.put(&encoded) {
                    sink.write(&encoded[..header_len]);
                }
                sink.write(frame);
            };
            // SAFETY: the buffer was translated by this ring's view, which keeps the memory.
            unsafe { GuestStore.fill(buffer, write) };
            (token, buffer.len() as u32)
        }));
        usual.len()
    }

    /// See [`RxRing::push`].
    #[inline]
    fn push(
        &mut self,
        queue: &mut impl Virtqueue,
        header: &NetHeader,
        frame: &mut impl Gather,
    ) -> Result<(), PushError> {
        let total = self.header_len + frame.remaining();
        queue.look(false).map_err(PushError::Ring)?;
        let mut budget = DESCRIPTORS;
        let gathered = self.gather(queue, total, &mut budget);
        self.descriptors = DESCRIPTORS - budget;
        gathered?;

        // num_buffers is 1 without MRG_RXBUF (5.1.6.4.1); a header of ten bytes ends in front of it.
        let encoded = header.encode(self.chains.len() as u16);
        let mut header = &encoded[..self.header_len];
        for piece in self.pieces.iter() {
            let write = |sink: &mut GuestSink<'_>| {
                if header.len() == encoded.len() && sink.put(&encoded) {
                    header = &[];
                } else if !header.is_empty() {
                    let (now, later) = header.split_at(header.len().min(sink.room()));
                    sink.write(now);
                    header = later;
                }
                if sink.room() > 0 {
                    frame.store_next(sink);
                }
            };
            // SAFETY: the piece was translated by this ring's view, which keeps the memory.
            unsafe { GuestStore.fill(*piece, write) };
        }
        queue.trust().judge(false);
        queue.advance(self.slots);
        for chain in self.chains.iter() {
            queue.stage(chain.token, chain.len);
        }
        Ok(())
    }

    /// Finds room for `total` bytes, in `chains` and `pieces`; takes nothing out unless a chain is malformed.
    #[inline]
    fn gather(&mut self, queue: &mut impl Virtqueue, total: usize, budget: &mut usize) -> Result<(), PushError> {
        self.pieces.clear();
        self.chains.clear();
        self.slots = 0;
        queue.look(false).map_err(PushError::Ring)?;
        let mut missing = total;
        while missing > 0 {
            if !queue.is_ready(self.slots) {
                // Those seen earlier are not enough; there may be more by now.
                queue.look(true).map_err(PushError::Ring)?;
                if !queue.is_ready(self.slots) {
                    // A guest that has posted all it can will not post more.
                    let all = self.slots == queue.size();
                    return Err(if all { PushError::Oversize } else { PushError::Empty });
                }
            }
            let mut len = 0;
            let pieces = &mut self.pieces;
            let take = |piece: HostRange| {
                let piece = piece.first(missing);
                pieces.try_push(piece).map_err(|_| Stop::Budget)?;
                len += piece.len();
                missing -= piece.len();
                if missing == 0 { Err(Stop::Enough) } else { Ok(()) }
            };
            let (token, read) = queue.read::<true>(self.slots, budget, take);
            match read {
                Err(Stop::Fault(fault)) => return Err(self.refuse(queue, token, fault)),
                // In so many pieces that it alone is too much, or together with others.
                Err(Stop::Budget) if self.slots == 0 => return Err(self.refuse(queue, token, ChainFault::Long)),
                Err(Stop::Budget) => return Err(PushError::Oversize),
                Err(Stop::Ring(fault)) => return Err(PushError::Ring(fault)),
                Ok(()) | Err(Stop::Enough) => {}
            }
            // Each buffer has to hold the header at least (5.1.6.3.1).
            if missing > 0 && len < self.header_len {
                return Err(self.refuse(queue, token, ChainFault::Short));
            }
            if missing > 0 && !self.mergeable {
                return Err(PushError::Oversize);
            }
            self.slots += token.slots;
            self.chains.push(Target { token, len: len as u32 });
        }
        Ok(())
    }

    /// Takes a malformed chain out, and those in front of it that were gathered for the same frame:
    /// used buffers go back in order, and all of them with length 0.
    #[cold]
    fn refuse(&mut self, queue: &mut impl Virtqueue, bad: Token, fault: ChainFault) -> PushError {
        queue.trust().judge(true);
        queue.advance(self.slots + bad.slots);
        for chain in self.chains.iter() {
            queue.stage(chain.token, 0);
        }
        queue.stage(bad, 0);
        PushError::Chain(fault)
    }
}
