//! The lane from a VF's receive queues to a guest's RX rings: its parts, and its life at home.
//! The way of a packet through it is in [`super::lane`].

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;

use super::counters::{Cause, LaneCounters, Shortage};
use super::doorbell::{Blocked, Doorbell};
use super::headers;
use super::lane::{Lane, LaneId, Moving, RingPlan, Trigger, Turn, spend};
use super::turnover::Turnover;
use crate::error::Result;
use crate::ring::{BURST, NetHeader, PushError, RingFault, RxRing, Supply};
use crate::vf::{Lendable, RxPacket, RxQueue};

/// Most queue pairs of a port.
pub const MAX_PAIRS: usize = 32;

/// How long frames wait for a guest that has no ring for them. Beyond that it is another guest, or the
/// same after a reboot.
const STALE: Duration = Duration::from_secs(1);

/// Frames from this length on, on average, are worth being placed in the guest's buffers by the VF, in bytes.
const PLACE_FROM: usize = 256;

/// VF→guest.
pub struct VfToGuest<Q: RxQueue> {
    id: LaneId,
    /// Those of the VF's queues that are this lane's.
    pub(super) sources: Vec<Source<Q>>,
    /// The queue that the next turn begins with.
    next_queue: usize,
    /// One per queue pair.
    pub(super) seats: Vec<Option<RxSeat>>,
    /// Why a ring was taken off.
    faults: Vec<Option<(RingFault, RxRing)>>,
    pub(super) steering: Steering,
    turnover: Turnover,
    pub(super) tally: Tally,
    /// Rings with frames that are not published yet, as bits.
    touched: u32,
    /// What the queue at work took beyond its packets: see [`RxRing::toil`].
    pub(super) toil: usize,
    /// Rings for which the queue at work holds frames, as bits: newer ones go behind them.
    pub(super) waiting: u32,
    armed: bool,
}

/// A VF queue, and what was received from it and could not be placed yet.
pub(super) struct Source<Q: RxQueue> {
    pub(super) queue: Q,
    /// Which of the VF's: the ring of the pair of this number is its own.
    number: u16,
    /// In order of arrival, each with its time; at most a burst, for which there is room from the start.
    pub(super) held: VecDeque<(Instant, Q::Packet)>,
    /// The ring whose buffers are posted to the queue: as many are reserved there as the queue has places for.
    stocked: Option<u8>,
    /// What came last was long enough to be worth being placed: posting a buffer takes longer than copying a short frame.
    long: bool,
    /// The queue feeds exactly one ring: then the VF's own queue may wait behind what is held.
    pub(super) feeds_one: bool,
    /// Since when no ring is in its lane, where there is none; `None` before the first.
    deserted: Option<Instant>,
}

impl<Q: RxQueue> Source<Q> {
    /// What waits in it is for nobody any more.
    fn is_stale(&self) -> bool {
        self.deserted.is_none_or(|since| since.elapsed() > STALE)
    }

    /// Drops what was received while no guest was there to take it, and what is held. Returns how many frames that
    /// were.
    fn flush(&mut self) -> u64 {
        /// Most frames, about: others come meanwhile.
        const MOST: u64 = 8 * 1024;
        let mut flushed = self.held.drain(..).len() as u64;
        let mut burst = ArrayVec::new();
        while flushed < MOST && self.queue.receive(&mut burst) > 0 {
            flushed += burst.drain(..).len() as u64;
        }
        flushed
    }

    /// Whether another frame can be held.
    pub(super) fn has_room(&self) -> bool {
        self.held.len() < BURST
    }

    /// Looks at a burst: what comes next is taken to be like it.
    #[inline]
    pub(super) fn measure(&mut self, burst: &[Q::Packet]) {
        if !burst.is_empty() {
            self.long = burst.iter().map(RxPacket::len).sum::<usize>() >= PLACE_FROM * burst.len();
        }
    }

    /// Whether nothing more is received for now.
    pub(super) fn is_blocked(&self) -> bool {
        !self.held.is_empty() && self.feeds_one
    }

    /// Takes back the guest's buffers that its VF does not have. Whether those were all.
    fn take_back(&mut self, seats: &mut [Option<RxSeat>]) -> bool {
        let kept = self.queue.withdraw();
        let pair = if kept == 0 { self.stocked.take() } else { self.stocked };
        if let Some(seat) = pair.and_then(|pair| seats[usize::from(pair)].as_mut()) {
            seat.ring.release(kept);
        }
        kept == 0
    }
}

/// A ring in the lane.
#[derive(Debug)]
pub(super) struct RxSeat {
    ring: RxRing,
    doorbell: Doorbell,
    enabled: bool,
    /// Frames may come into the guest's buffers without us, if they are in this memory.
    lendable: Option<Arc<Lendable>>,
    room: Room,
    /// Why nothing was posted the last time.
    shortage: Shortage,
    guest_checksum: bool,
    /// It stayed empty for the whole grace; not waited for until it has room again.
    pub(super) dry: bool,
}

/// What a buffer must hold to be worth being posted: any frame of the port.
#[derive(Clone, Copy, Debug)]
struct Room {
    header: usize,
    frame: usize,
}

impl RxSeat {
    #[inline]
    fn header(guest_checksum: bool, packet: &impl RxPacket) -> NetHeader {
        NetHeader { data_valid: guest_checksum && packet.checksum_good(), ..NetHeader::default() }
    }

    pub(super) fn push(&mut self, packet: &impl RxPacket) -> Result<(), PushError> {
        self.ring.push(&Self::header(self.guest_checksum, packet), &mut packet.gather())?;
        self.dry = false;
        Ok(())
    }
}

/// Which ring a frame goes to. Set when the lane is at home.
#[derive(Debug, Default)]
pub(super) struct Steering {
    /// Rings that are running and enabled.
    open: ArrayVec<u8, MAX_PAIRS>,
    /// For each VF queue of the lane the ring of the same number, if that one is open and there are queues for all.
    direct: ArrayVec<Option<u8>, MAX_PAIRS>,
    /// Why there is none, if there is none.
    closed: Option<Cause>,
}

impl Steering {
    /// One VF queue per ring where that is possible; else a hash keeps each flow on one open ring.
    #[inline]
    pub(super) fn ring_for(&self, queue: usize, packet: &impl RxPacket) -> Result<usize, Cause> {
        match self.direct[queue] {
            Some(pair) => Ok(usize::from(pair)),
            None => self.ring_among_open(packet.head()),
        }
    }

    /// Whether no ring gets frames of two queues.
    fn each_has_its_ring(&self) -> bool {
        self.direct.iter().all(Option::is_some)
    }

    /// The ring that all frames of a VF queue go to, if there is one.
    #[inline]
    fn only_ring(&self, queue: usize) -> Option<usize> {
        let only = match self.open.as_slice() {
            [only] => Some(*only),
            _ => None,
        };
        self.direct[queue].or(only).map(usize::from)
    }

    fn ring_among_open(&self, head: &[u8]) -> Result<usize, Cause> {
        match self.open.as_slice() {
            [] => Err(self.closed.unwrap_or(Cause::NotReady)),
            [only] => Ok(usize::from(*only)),
            open => Ok(usize::from(open[headers::flow_hash(head) as usize % open.len()])),
        }
    }
}

/// Counts of one pass, added to the shared counters once.
#[derive(Debug)]
pub(super) struct Tally {
    packets: u64,
    /// Of these, not copied.
    placed: u64,
    bytes: u64,
    counters: Arc<LaneCounters>,
}

impl Tally {
    pub(super) fn add(&mut self, bytes: usize) {
        self.packets += 1;
        self.bytes += bytes as u64;
    }

    /// A frame that was not copied.
    fn add_placed(&mut self, bytes: usize) {
        self.placed += 1;
        self.add(bytes);
    }

    pub(super) fn drop(&mut self, cause: Cause, n: u64) {
        self.counters.dropped(cause, n);
    }

    fn settle(&mut self) {
        if self.packets > 0 {
            self.counters.delivered(self.packets, self.bytes);
            (self.packets, self.bytes) = (0, 0);
            if self.placed > 0 {
                self.counters.lent(std::mem::take(&mut self.placed));
            }
        }
    }
}

impl<Q: RxQueue> VfToGuest<Q> {
    /// Posts buffers of the guest to a VF queue whose frames go to one ring, and no other queue's do.
    #[inline]
    pub(super) fn stock(&mut self, queue: usize, turn: &Turn<'_>) {
        let source = &mut self.sources[queue];
        // Those that it takes early it takes one by one, so that a burst is to be there at any time.
        let early = source.queue.takes_early();
        if !source.long && !early {
            if let Some(pair) = source.stocked {
                self.take_back(pair.into());
            }
            return;
        }
        let Some(pair) = self.steering.direct[queue].filter(|_| source.held.is_empty()) else { return };
        let (Some(least), Some(seat)) = (source.queue.takes_buffers(), &mut self.seats[usize::from(pair)]) else {
            return;
        };
        let Some(lendable) = &seat.lendable else { return };
        let (posted, enough) = if early { (source.queue.waiting(), BURST) } else { (seat.ring.reserved(), BURST / 2) };
        if posted >= enough || early && source.stocked.is_some_and(|other| other != pair) {
            return;
        }
        // What another queue has for this ring would have to wait until the VF has used all of them.
        if early && !self.steering.each_has_its_ring() {
            return;
        }
        let Room { header, frame } = seat.room;
        let ahead = if early { source.queue.ahead() } else { 0 };
        let post = |buffer| source.queue.post(buffer, header, lendable);
        let supply = seat.ring.reserve(ahead, BURST - posted, header + frame.max(least), post);
        let shortage = match supply {
            _ if seat.ring.reserved() > 0 => Shortage::None,
            Ok(Supply::Enough) | Err(_) => seat.shortage,
            Ok(Supply::Few) => Shortage::Few,
            Ok(Supply::Unfit) => Shortage::Unfit,
        };
        if shortage != seat.shortage {
            seat.shortage = shortage;
            self.tally.counters.buffers_are(shortage);
        }
        source.stocked = Some(pair);
        if let Err(fault) = supply {
            self.quarantine(pair.into(), fault, turn);
        }
    }

    /// Takes the buffers of a ring back from the queue they were posted to.
    #[inline]
    pub(super) fn unstock(&mut self, pair: usize) {
        if self.is_reserved(pair) {
            self.take_back(pair);
        }
    }

    /// Whether buffers of the ring are reserved for frames to come.
    #[inline]
    fn is_reserved(&self, pair: usize) -> bool {
        self.seats[pair].as_ref().is_some_and(|seat| seat.ring.reserved() > 0)
    }

    /// Those that the VF has already stay with it, and reserved: see [`Lane::await_returns`].
    #[cold]
    fn take_back(&mut self, pair: usize) {
        for source in self.sources.iter_mut().filter(|source| source.stocked == Some(pair as u8)) {
            source.take_back(&mut self.seats);
        }
    }

    /// Places the first frames of a burst, as far as buffers are reserved for them: they came there, or are copied there.
    #[inline(never)]
    pub(super) fn fill_places(&mut self, queue: usize, burst: &mut ArrayVec<Q::Packet, BURST>) {
        let Some(pair) = self.sources[queue].stocked.map(usize::from) else { return };
        let reserved = self.seats[pair].as_ref().map_or(0, |seat| seat.ring.reserved());
        for packet in burst.drain(..reserved.min(burst.len())) {
            match packet.placed_at() {
                Some(at) => self.accept(queue, at, &packet),
                None => self.fill(pair, &packet),
            }
        }
    }

    /// Copies a frame to the buffer that was left free for it.
    fn fill(&mut self, pair: usize, packet: &Q::Packet) {
        let Some(seat) = self.seats[pair].as_mut().filter(|seat| seat.ring.is_place_free()) else {
            // The VF did not use its buffers in order: nothing is known of them any more.
            return self.tally.drop(Cause::NotReady, 1);
        };
        self.touched |= 1 << pair;
        seat.dry = false;
        match seat.ring.fill(&RxSeat::header(seat.guest_checksum, packet), &mut packet.gather()) {
            Ok(()) => self.tally.add(packet.len()),
            Err(_) => self.tally.drop(Cause::Oversize, 1),
        }
    }

    /// A frame came into a posted buffer.
    pub(super) fn accept(&mut self, queue: usize, at: usize, packet: &Q::Packet) {
        let source = &self.sources[queue];
        let pair = source.stocked.map_or(0, usize::from);
        let Some(seat) = self.seats[pair].as_mut() else {
            return self.tally.drop(Cause::NotReady, 1);
        };
        let (header, len) = (RxSeat::header(seat.guest_checksum, packet), packet.len());
        // What a device has it may still write to.
        let skip = if source.queue.takes_early() { 0 } else { BURST };
        // Longer than the MTU allows or not: what the driver wrote is there, as it is with a copied frame.
        if !seat.ring.accept(at, skip, &header, len) {
            return self.tally.drop(Cause::NotReady, 1);
        }
        self.touched |= 1 << pair;
        seat.dry = false;
        self.tally.add_placed(len);
    }

    /// Copies frames of a VF queue into the ring to which all of them go, as long as nothing about them or the ring's
    /// buffers is unusual. Returns how many.
    #[inline]
    pub(super) fn push_each<'p>(&mut self, queue: usize, packets: impl Iterator<Item = &'p Q::Packet> + Clone) -> usize
    where
        Q::Packet: 'p,
    {
        let Some(pair) = self.steering.only_ring(queue).filter(|pair| self.waiting & 1 << pair == 0) else { return 0 };
        let Some(seat) = self.seats[pair].as_mut().filter(|seat| seat.ring.reserved() == 0) else { return 0 };
        let RxSeat { ring, guest_checksum, .. } = seat;
        let frames = packets.clone().map_while(|packet| {
            let frame = packet.head();
            let whole = packet.placed_at().is_none() && frame.len() == packet.len();
            whole.then(|| (RxSeat::header(*guest_checksum, packet), frame))
        });
        let pushed = ring.push_each(frames);
        if pushed > 0 {
            seat.dry = false;
            self.touched |= 1 << pair;
            self.tally.packets += pushed as u64;
            self.tally.bytes += packets.take(pushed).map(|packet| packet.len() as u64).sum::<u64>();
        }
        pushed
    }

    /// Copies a frame into a ring and remembers to publish it.
    pub(super) fn push(&mut self, pair: usize, packet: &Q::Packet) -> Result<(), PushError> {
        let Some(seat) = self.seats[pair].as_mut() else {
            return Err(PushError::Empty);
        };
        self.touched |= 1 << pair;
        let pushed = seat.push(packet);
        self.toil += seat.ring.toil();
        pushed
    }

    /// Whether the ring is not waited for, because it stayed empty for the grace, now or earlier.
    pub(super) fn is_dry(&mut self, pair: usize, expired: bool) -> bool {
        self.seats[pair].as_mut().is_none_or(|seat| {
            seat.dry |= expired;
            seat.dry
        })
    }

    /// A lane of `pairs` queue pairs (at most [`MAX_PAIRS`]), with all of a VF's queues, without rings.
    pub fn new(id: LaneId, pairs: usize, queues: Vec<Q>, counters: Arc<LaneCounters>) -> Self {
        assert!(pairs <= MAX_PAIRS && queues.len() <= MAX_PAIRS, "more than {MAX_PAIRS} queue pairs");
        let vf_queues = queues.len();
        let source = |(number, queue)| Source {
            queue,
            number,
            held: VecDeque::with_capacity(BURST),
            stocked: None,
            long: true,
            feeds_one: false,
            deserted: None,
        };
        let sources = (0..).zip(queues).map(source).collect();
        Self::over(id, pairs, sources, Turnover::of(vf_queues), counters)
    }

    fn over(
        id: LaneId,
        pairs: usize,
        sources: Vec<Source<Q>>,
        turnover: Turnover,
        counters: Arc<LaneCounters>,
    ) -> Self {
        let mut lane = Self {
            id,
            sources,
            next_queue: 0,
            seats: (0..pairs).map(|_| None).collect(),
            faults: (0..pairs).map(|_| None).collect(),
            steering: Steering::default(),
            turnover,
            tally: Tally { packets: 0, placed: 0, bytes: 0, counters },
            touched: 0,
            toil: 0,
            waiting: 0,
            armed: false,
        };
        lane.steer();
        lane
    }

    /// No ring is in the lane, not even a quarantined one.
    fn is_empty(&self) -> bool {
        self.seats.iter().all(Option::is_none) && self.faults.iter().all(Option::is_none)
    }

    /// Works out the steering anew; the set of open rings has changed.
    fn steer(&mut self) {
        // Also from a queue whose buffers were all used: it knows the memory they were in.
        for source in &mut self.sources {
            source.take_back(&mut self.seats);
        }
        let open = |seat: &Option<RxSeat>| seat.as_ref().is_some_and(|seat| seat.enabled);
        let steering = &mut self.steering;
        steering.open = (0u8..).zip(&self.seats).filter(|(_, seat)| open(seat)).map(|(pair, _)| pair).collect();
        let running = self.seats.iter().flatten().next().is_some();
        steering.closed = steering.open.is_empty().then_some(if running { Cause::Disabled } else { Cause::NotReady });
        let numbers = || self.sources.iter().map(|source| source.number as u8);
        let queue_for_each = steering.open.iter().all(|pair| numbers().any(|number| number == *pair));
        steering.direct = numbers()
            .map(|number| Some(number).filter(|number| queue_for_each && steering.open.contains(number)))
            .collect();
        for (source, direct) in self.sources.iter_mut().zip(&steering.direct) {
            source.feeds_one = direct.is_some() || steering.open.len() == 1;
        }
    }

    /// Takes a ring that lies off the core's list and tells its front end.
    #[cold]
    pub(super) fn quarantine(&mut self, pair: usize, fault: RingFault, turn: &Turn<'_>) {
        let doorbell = self.stop(pair, fault);
        let silent = fault == RingFault::CallBlocks;
        if silent || doorbell.is_some_and(|doorbell| doorbell.err(turn.mark) == Err(Blocked)) {
            self.silence(pair);
        }
        self.steer();
    }

    /// Stops the ring. It stays in the lane: its position is asked for later. What was counted as delivered is
    /// shown to the guest first; it is not signalled.
    fn stop(&mut self, pair: usize, fault: RingFault) -> Option<Doorbell> {
        self.unstock(pair);
        let mut seat = self.seats[pair].take()?;
        seat.ring.publish();
        self.tally.counters.quarantine();
        self.faults[pair] = Some((fault, seat.ring));
        Some(seat.doorbell)
    }

    /// As in the other direction: a notification of this ring blocked, so nothing is signalled any more.
    fn silence(&mut self, pair: usize) {
        self.tally.counters.blocked();
        for pair in 0..self.seats.len() {
            self.stop(pair, RingFault::CallBlocks);
        }
        if let Some((fault, _)) = &mut self.faults[pair] {
            *fault = RingFault::CallBlocks;
        }
    }

    /// Shows what was pushed to the guest, once a ring.
    pub(super) fn publish(&mut self, turn: &Turn<'_>) {
        self.tally.settle();
        while self.touched != 0 {
            let pair = self.touched.trailing_zeros() as usize;
            self.touched &= self.touched - 1;
            let Some(seat) = &mut self.seats[pair] else {
                continue;
            };
            if !seat.ring.is_staged() {
                continue;
            }
            if !seat.ring.publish() {
                self.tally.counters.kicked(false);
                continue;
            }
            match seat.doorbell.call(turn.mark) {
                Ok(sent) => self.tally.counters.kicked(sent),
                Err(Blocked) => self.quarantine(pair, RingFault::CallBlocks, turn),
            }
        }
    }
}

impl<Q: RxQueue> Lane for VfToGuest<Q> {
    fn id(&self) -> LaneId {
        self.id
    }

    fn turn(&mut self, turn: &Turn<'_>) -> usize {
        let mut next = self.next_queue;
        let moved = spend(&mut next, self.sources.len(), |queue| {
            let (under_way, number) = (self.turnover.is_under_way(), self.sources[queue].number);
            if under_way && !self.turnover.permits(number) {
                return 0;
            }
            let n = self.relay(queue, turn);
            if !under_way {
                return n;
            }
            let empty = n == 0 && self.sources[queue].held.is_empty();
            // Others may be read now: that is work, too.
            n + usize::from(self.turnover.was_read(number, n, empty))
        });
        self.next_queue = next;
        moved
    }

    fn settle(&mut self, turn: &Turn<'_>) {
        self.turnover.look_again();
        for pair in 0..self.seats.len() {
            let Some(seat) = &mut self.seats[pair] else {
                continue;
            };
            seat.ring.disable_kicks();
            if seat.doorbell.call(turn.mark) == Err(Blocked) {
                self.quarantine(pair, RingFault::CallBlocks, turn);
            }
        }
    }

    fn doze(&mut self) -> bool {
        // What waits for another lane to read its queues first, no interrupt announces again.
        // Without a queue it waits for nothing.
        let others_first = !self.sources.is_empty() && self.turnover.is_under_way();
        if others_first || self.sources.iter().any(|source| !source.held.is_empty()) {
            return true;
        }
        self.armed = true;
        self.sources.iter_mut().for_each(|source| source.queue.arm());
        false
    }

    fn wake(&mut self) {
        if std::mem::take(&mut self.armed) {
            self.sources.iter_mut().for_each(|source| source.queue.disarm());
        }
    }

    fn wake_fds(&self, visit: &mut dyn FnMut(BorrowedFd<'_>, Trigger)) {
        self.sources.iter().filter_map(|source| source.queue.interrupt_fd()).for_each(|fd| visit(fd, Trigger::Level));
    }

    fn needs_naps(&self) -> bool {
        self.sources.iter().any(|source| source.queue.interrupt_fd().is_none() && !source.queue.is_silent())
    }

    fn insert_ring(&mut self, pair: usize, plan: RingPlan) -> Result<()> {
        let ring = RxRing::new(plan.memory, &plan.config)?;
        // A ring that is rebuilt, or a front end that reconnects at once, misses nothing. If it is disabled its
        // core would drop all of that; but it may be enabled before it has had a turn there.
        if self.is_empty() {
            for source in &mut self.sources {
                match source.is_stale() {
                    true => self.tally.drop(Cause::NotReady, source.flush()),
                    false if !plan.enabled => self.tally.drop(Cause::Disabled, source.flush()),
                    false => {}
                }
            }
        }
        self.faults[pair] = None;
        self.tally.counters.buffers_are(Shortage::None);
        self.seats[pair] = Some(RxSeat {
            ring,
            doorbell: plan.doorbell,
            enabled: plan.enabled,
            lendable: plan.lendable,
            room: Room { header: plan.config.header_len, frame: plan.rules.max_wire_frame },
            shortage: Shortage::None,
            guest_checksum: plan.guest_checksum,
            dry: false,
        });
        self.steer();
        Ok(())
    }

    fn change_ring(&mut self, pair: usize, plan: &RingPlan) -> bool {
        let Some(seat) = &self.seats[pair] else { return false };
        let moves = !Arc::ptr_eq(seat.ring.memory(), &plan.memory);
        let steers = seat.enabled != plan.enabled;
        // What the VF has not taken is posted anew, from what it may be by now.
        self.take_back(pair);
        if steers && !self.await_returns() {
            // Frames that other queues have by now would have to wait for those that come into these buffers.
            return false;
        }
        let Some(seat) = &mut self.seats[pair] else { return false };
        if moves {
            seat.ring.switch_memory(plan.memory.clone());
        }
        seat.doorbell = plan.doorbell.clone();
        seat.enabled = plan.enabled;
        seat.lendable.clone_from(&plan.lendable);
        if steers {
            self.steer();
        }
        true
    }

    fn await_returns(&mut self) -> bool {
        let mut all = true;
        for source in &mut self.sources {
            all &= source.take_back(&mut self.seats);
        }
        all
    }

    fn remove_ring(&mut self, pair: usize) -> Option<u16> {
        self.unstock(pair);
        let seat = self.seats[pair].take();
        let fault = self.faults[pair].take();
        self.steer();
        if self.is_empty() && (seat.is_some() || fault.is_some()) {
            let now = Some(Instant::now());
            self.sources.iter_mut().for_each(|source| source.deserted = now);
        }
        // Nothing of the guest's is in flight: what is held are buffers of ours. They stay held, for the
        // ring that comes back, or another, or are dropped by its absence.
        seat.map(|seat| seat.ring.position()).or(fault.map(|(_, ring)| ring.position()))
    }

    fn fault(&self, pair: usize) -> Option<RingFault> {
        self.faults[pair].as_ref().map(|(fault, _)| *fault)
    }

    fn sibling(&self, id: LaneId, counters: Arc<LaneCounters>) -> Option<Box<dyn Lane>> {
        Some(Box::new(Self::over(id, self.seats.len(), Vec::new(), self.turnover.shared(), counters)))
    }

    fn release_queue(&mut self, queue: u16) -> Option<Moving> {
        let at = self.sources.iter().position(|source| source.number == queue)?;
        (0..self.seats.len()).for_each(|pair| self.unstock(pair));
        let mut source = self.sources.remove(at);
        if source.stocked.take().is_some() {
            source.queue.withdraw();
        }
        if !self.is_empty() {
            source.deserted = Some(Instant::now());
        }
        self.next_queue = 0;
        self.steer();
        Some(Box::new(source))
    }

    fn adopt_queue(&mut self, _queue: u16, moving: Moving) {
        let Ok(source) = moving.downcast::<Source<Q>>() else {
            unreachable!("the lanes of a port have one kind of queue")
        };
        let mut source = *source;
        if !self.is_empty() && source.is_stale() {
            self.tally.drop(Cause::NotReady, source.flush());
        }
        self.sources.push(source);
        self.next_queue = 0;
        self.steer();
    }

    fn table_moved(&mut self, before: &[u16], now: &[u16]) {
        self.turnover.table_moved(before, now);
    }

    fn discard(&mut self) {
        (0..self.seats.len()).for_each(|pair| self.unstock(pair));
        for source in &mut self.sources {
            self.tally.counters.dropped(Cause::NotReady, source.held.len() as u64);
            source.held.clear();
        }
    }
}
