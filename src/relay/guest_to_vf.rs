//! The lane from a guest's TX rings to a VF's transmit queues: its parts, and its life at home.
//! The way of a packet through it is in [`super::lane`].

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

use arrayvec::ArrayVec;

use super::checksum;
use super::counters::{Cause, LaneCounters};
use super::doorbell::{Blocked, Doorbell};
use super::lane::{Lane, LaneId, RingPlan, TURN_BUDGET, Trigger, Turn};
use super::offload::{self, Treatment, TxRules};
use super::segment::Segmenter;
use crate::error::Result;
use crate::ring::{BURST, ChainFault, Gather, RingFault, TxRing};
use crate::vf::{TxPacket, TxQueue};

/// guest→VF.
#[derive(Debug)]
pub struct GuestToVf<Q: TxQueue> {
    id: LaneId,
    /// One per queue pair.
    pub(super) slots: Vec<TxSlot<Q::Packet>>,
    /// The VF's transmit queues; pair *n* sends on queue *n* modulo their number.
    pub(super) queues: Vec<Q>,
    /// The VF is there and its link is up.
    pub(super) ready: Arc<AtomicBool>,
    pub(super) counters: Arc<LaneCounters>,
}

/// A queue pair's place in the lane.
#[derive(Debug)]
pub(super) struct TxSlot<P> {
    pub(super) seat: Option<TxSeat<P>>,
    /// Why the ring was taken off the core's list.
    fault: Option<(RingFault, TxRing, Doorbell)>,
}

/// A ring in the lane, and the burst it is in the middle of.
#[derive(Debug)]
pub(super) struct TxSeat<P> {
    pub(super) ring: TxRing,
    doorbell: Doorbell,
    enabled: bool,
    rules: TxRules,
    /// Packets not yet taken by the VF.
    pub(super) staged: ArrayVec<P, BURST>,
    /// What taking each of them finishes.
    ends: ArrayVec<End, BURST>,
    /// Chains of this burst, and the next of them to stage.
    popped: usize,
    next: usize,
    /// Segments in software; loaded while the chain `next` is being cut.
    cutter: Segmenter,
    cutting: bool,
    /// The VF refused a part of the frame whose rest is staged.
    spoiled: bool,
    pub(super) blocked_since: Option<Instant>,
}

/// Copying so many bytes counts as another packet of a turn: 256 frames of 64 KiB would make it very long.
const COPY_UNIT: usize = 16 * 1024;

/// What the acceptance of a staged packet finishes.
#[derive(Clone, Copy, Debug, Default)]
struct End {
    /// Bytes of the guest's frame that ends with this packet; 0 if it goes on.
    frame: u32,
    /// Dropped chains behind it. They are counted when they are completed: if the ring is taken out
    /// before, they come again.
    malformed: u8,
    oversize: u8,
}

impl End {
    /// Chains that can be completed: its own if it ends, and the dropped ones.
    fn chains(self) -> usize {
        usize::from(self.frame != 0) + usize::from(self.malformed) + usize::from(self.oversize)
    }
}

impl<P: TxPacket> TxSeat<P> {
    /// Between two bursts.
    pub(super) fn is_idle(&self) -> bool {
        self.staged.is_empty() && self.next == self.popped
    }

    /// A burst of `n` chains was popped.
    pub(super) fn begin(&mut self, n: usize) {
        (self.popped, self.next) = (n, 0);
    }

    /// Why nothing may be sent at all now.
    pub(super) fn closed(&self, ready: &AtomicBool) -> Option<Cause> {
        if !self.enabled {
            return Some(Cause::Disabled);
        }
        (!ready.load(Relaxed)).then_some(Cause::NotReady)
    }

    /// Turns chains into staged packets until the burst or the stage is used up. Returns how many were
    /// dropped, and one more for each [`COPY_UNIT`].
    pub(super) fn stage<Q: TxQueue<Packet = P>>(&mut self, queue: &mut Q, counters: &LaneCounters) -> usize {
        let (mut dropped, mut copied) = (0, 0);
        while !self.staged.is_full() {
            if self.cutting {
                if !self.stage_segments(queue) {
                    break;
                }
                continue;
            }
            if self.next == self.popped {
                break;
            }
            match self.stage_frame(queue, &mut copied) {
                Ok(true) => {}
                Ok(false) => break,
                Err(cause) => {
                    dropped += 1;
                    self.next += 1;
                    match (self.ends.last_mut(), cause) {
                        (Some(end), Cause::Oversize) => end.oversize += 1,
                        (Some(end), _) => end.malformed += 1,
                        (None, _) => {
                            counters.dropped(cause, 1);
                            self.ring.complete(1);
                        }
                    }
                }
            }
        }
        dropped + copied / COPY_UNIT
    }

    /// Stages the chain `next`; `false` if the VF's pool is dry.
    fn stage_frame<Q: TxQueue<Packet = P>>(&mut self, queue: &mut Q, copied: &mut usize) -> Result<bool, Cause> {
        let mut frame = self.ring.frame(self.next).map_err(|fault| match fault {
            ChainFault::Long => Cause::Oversize,
            _ => Cause::Malformed,
        })?;
        let (header, len) = (frame.header(), frame.len());
        // First of all, for the cutter has room only for what was negotiated.
        if !self.rules.permits(header.gso) {
            return Err(Cause::Malformed);
        }
        if self.rules.segments(&header, len) {
            *copied += len;
            frame.copy_next(self.cutter.load(len));
            match offload::judge(&header, self.cutter.frame(), len, &self.rules)? {
                Treatment::Segment { layers, headers, size } => self.cutter.start(layers, headers, size),
                _ => return Err(Cause::Malformed),
            }
            self.cutting = true;
            return Ok(true);
        }
        if len > self.rules.max_wire_frame && header.gso == crate::ring::Gso::None {
            return Err(Cause::Oversize);
        }
        let Some(mut packet) = queue.copy(&mut frame) else {
            return Ok(false);
        };
        *copied += len;
        match offload::judge(&header, packet.head(), len, &self.rules)? {
            Treatment::Plain => {}
            Treatment::Vf(offload) => packet.set_offload(&offload),
            // A frame that needs no segmentation is in one piece: buffers are as large as the MTU asks for.
            Treatment::Checksum { start, offset, udp } if packet.head().len() >= len => {
                checksum::complete(packet.head_mut(), start, offset, udp);
            }
            Treatment::Checksum { .. } | Treatment::Segment { .. } => return Err(Cause::Malformed),
        }
        self.staged.push(packet);
        self.ends.push(End { frame: len as u32, ..End::default() });
        self.next += 1;
        Ok(true)
    }

    /// Stages segments of the chain `next` while there is room; `false` if the VF's pool is dry.
    fn stage_segments<Q: TxQueue<Packet = P>>(&mut self, queue: &mut Q) -> bool {
        while !self.staged.is_full() {
            let Some(packet) = queue.copy(&mut self.cutter.segment()) else {
                return false;
            };
            self.staged.push(packet);
            if self.cutter.advance() {
                self.ends.push(End { frame: self.cutter.frame().len() as u32, ..End::default() });
                self.cutting = false;
                self.next += 1;
                return true;
            }
            self.ends.push(End::default());
        }
        true
    }

    /// The VF took the first `sent` staged packets; those with a bit in `refused` went nowhere.
    pub(super) fn accepted(&mut self, sent: usize, refused: u32, counters: &LaneCounters) {
        let (mut frames, mut bytes, mut malformed, mut oversize, mut chains) = (0u64, 0u64, 0u64, 0u64, 0);
        for (place, end) in self.ends.drain(..sent).enumerate() {
            self.spoiled |= refused >> place & 1 != 0;
            if end.frame != 0 {
                match std::mem::take(&mut self.spoiled) {
                    true => malformed += 1,
                    false => {
                        frames += 1;
                        bytes += u64::from(end.frame);
                    }
                }
            }
            malformed += u64::from(end.malformed);
            oversize += u64::from(end.oversize);
            chains += end.chains();
        }
        self.ring.complete(chains);
        if frames > 0 {
            counters.delivered(frames, bytes);
        }
        if malformed + oversize > 0 {
            counters.dropped(Cause::Malformed, malformed);
            counters.dropped(Cause::Oversize, oversize);
        }
    }

    /// Drops the whole burst: what is staged, what is being cut, what is not yet looked at.
    pub(super) fn drop_all(&mut self, cause: Cause, counters: &LaneCounters) -> usize {
        let staged = self.ends.iter().filter(|end| end.frame != 0).count();
        counters.dropped(cause, (staged + self.popped - self.next) as u64);
        for end in &self.ends {
            counters.dropped(Cause::Malformed, end.malformed.into());
            counters.dropped(Cause::Oversize, end.oversize.into());
        }
        let n = self.give_up();
        self.ring.complete(n);
        n
    }

    /// Forgets the burst; returns how many of its chains are not completed.
    fn give_up(&mut self) -> usize {
        self.staged.clear();
        self.ends.clear();
        self.cutter.abandon();
        (self.cutting, self.spoiled, self.blocked_since) = (false, false, None);
        (self.popped, self.next) = (0, 0);
        self.ring.in_flight()
    }

    /// Shows completed chains to the guest. The fault, if its call fd blocks.
    pub(super) fn publish(&mut self, turn: &Turn<'_>, counters: &LaneCounters) -> Option<RingFault> {
        if !self.ring.is_staged() {
            return None;
        }
        if !self.ring.publish() {
            counters.kicked(false);
            return None;
        }
        match self.doorbell.call(turn.mark) {
            Ok(sent) => counters.kicked(sent),
            Err(Blocked) => return Some(RingFault::CallBlocks),
        }
        None
    }
}

impl<P: TxPacket> TxSlot<P> {
    /// Stops the ring. It stays in the lane: its position is asked for later.
    fn stop(&mut self, fault: RingFault, counters: &LaneCounters) {
        if let Some(mut seat) = self.seat.take() {
            seat.give_up();
            seat.ring.rewind();
            counters.quarantine();
            self.fault = Some((fault, seat.ring, seat.doorbell));
        }
    }
}

impl<Q: TxQueue> GuestToVf<Q> {
    /// A lane of `pairs` queue pairs without rings. `ready` says whether the VF can send.
    pub fn new(id: LaneId, pairs: usize, queues: Vec<Q>, ready: Arc<AtomicBool>, counters: Arc<LaneCounters>) -> Self {
        assert!(!queues.is_empty(), "a VF has at least one transmit queue");
        let slots = (0..pairs).map(|_| TxSlot { seat: None, fault: None }).collect();
        Self { id, slots, queues, ready, counters }
    }

    /// Takes a ring that lies off the core's list and tells its front end. Returns the work that was.
    pub(super) fn quarantine(&mut self, pair: usize, fault: RingFault, turn: &Turn<'_>) -> usize {
        let slot = &mut self.slots[pair];
        slot.stop(fault, &self.counters);
        let silent = fault == RingFault::CallBlocks;
        if silent || slot.fault.as_ref().is_some_and(|(_, _, doorbell)| doorbell.err(turn.mark) == Err(Blocked)) {
            self.silence(pair);
        }
        1
    }

    /// A notification of this ring blocked: what the front end did once it can do with every fd, each time for
    /// as long as the watchdog waits. So nothing is signalled any more: all rings stop.
    fn silence(&mut self, pair: usize) {
        self.counters.blocked();
        for slot in &mut self.slots {
            slot.stop(RingFault::CallBlocks, &self.counters);
        }
        if let Some((fault, ..)) = &mut self.slots[pair].fault {
            *fault = RingFault::CallBlocks;
        }
    }

    fn seats(&self) -> impl Iterator<Item = &TxSeat<Q::Packet>> {
        self.slots.iter().filter_map(|slot| slot.seat.as_ref())
    }

    fn seats_mut(&mut self) -> impl Iterator<Item = &mut TxSeat<Q::Packet>> {
        self.slots.iter_mut().filter_map(|slot| slot.seat.as_mut())
    }
}

impl<Q: TxQueue> Lane for GuestToVf<Q> {
    fn id(&self) -> LaneId {
        self.id
    }

    fn turn(&mut self, turn: &Turn<'_>) -> usize {
        let mut moved = 0;
        loop {
            let before = moved;
            for pair in 0..self.slots.len() {
                moved += self.relay(pair, turn);
            }
            if moved == before || moved >= TURN_BUDGET {
                return moved;
            }
        }
    }

    fn settle(&mut self, turn: &Turn<'_>) {
        for pair in 0..self.slots.len() {
            let Some(seat) = &mut self.slots[pair].seat else { continue };
            seat.ring.disable_kicks();
            if seat.doorbell.call(turn.mark) == Err(Blocked) {
                self.quarantine(pair, RingFault::CallBlocks, turn);
            }
        }
    }

    fn doze(&mut self) -> bool {
        let mut work = false;
        for seat in self.seats_mut() {
            work |= !seat.is_idle() | seat.ring.enable_kicks();
        }
        work
    }

    fn wake(&mut self) {
        for seat in self.seats_mut() {
            seat.ring.disable_kicks();
        }
    }

    fn wake_fds(&self, visit: &mut dyn FnMut(BorrowedFd<'_>, Trigger)) {
        let running = self.seats().map(|seat| &seat.doorbell);
        let quarantined = self.slots.iter().filter_map(|slot| slot.fault.as_ref()).map(|(_, _, doorbell)| doorbell);
        running.chain(quarantined).filter_map(Doorbell::kick_fd).for_each(|fd| visit(fd, Trigger::Edge));
    }

    fn needs_naps(&self) -> bool {
        self.seats().any(|seat| seat.doorbell.kick.is_none())
    }

    fn insert_ring(&mut self, pair: usize, plan: RingPlan) -> Result<()> {
        let ring = TxRing::new(plan.memory, &plan.config)?;
        let cutter = if plan.rules.tso4 || plan.rules.tso6 {
            Segmenter::with_capacity(plan.config.max_frame, plan.rules.max_wire_frame)
        } else {
            Segmenter::with_capacity(0, 0)
        };
        let seat = TxSeat {
            ring,
            doorbell: plan.doorbell,
            enabled: plan.enabled,
            rules: plan.rules,
            staged: ArrayVec::new(),
            ends: ArrayVec::new(),
            popped: 0,
            next: 0,
            cutter,
            cutting: false,
            spoiled: false,
            blocked_since: None,
        };
        self.slots[pair] = TxSlot { seat: Some(seat), fault: None };
        Ok(())
    }

    fn remove_ring(&mut self, pair: usize) -> Option<u16> {
        let slot = std::mem::replace(&mut self.slots[pair], TxSlot { seat: None, fault: None });
        // What was staged was not accepted by the VF: its chains are not completed, the guest's next
        // start begins with them again.
        match slot {
            TxSlot { seat: Some(mut seat), .. } => {
                seat.give_up();
                seat.ring.rewind();
                Some(seat.ring.position())
            }
            TxSlot { fault: Some((_, ring, _)), .. } => Some(ring.position()),
            TxSlot { .. } => None,
        }
    }

    fn fault(&self, pair: usize) -> Option<RingFault> {
        self.slots[pair].fault.as_ref().map(|(fault, ..)| *fault)
    }

    fn discard(&mut self) {
        for seat in self.seats_mut() {
            seat.give_up();
            seat.ring.rewind();
        }
    }
}
