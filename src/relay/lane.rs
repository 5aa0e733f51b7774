//! A lane: the unit of work and of scheduling, one direction of one port. This file is the way of a packet.
//!
//! ```text
//! guest driver ─avail→ TxRing::pop ─┬→ plain_frames ─→ TxQueue::copy_each ──┬→ TxQueue::send ─→ VF
//!                                   ├→ plain_frames ─→ TxQueue::lend ───────┤     │ taken; if lent, come back
//!                                   └→ frame ─→ copy or lend_behind, offload ┘     └→ TxRing::complete, publish ─→ call eventfd
//!
//! VF ─→ RxQueue::receive ─┬→ all for one ring ─→ RxRing::push_each ───────────┬→ RxRing::publish ─→ call eventfd
//!                         ├→ which ring? ─→ RxRing::push (header, copy) ──────┤
//!                         └→ a place is reserved: it is there ─→ accept ──────┤
//!                                                 elsewhere ─→ fill (copy) ───┘
//! ```
//!
//! The first way of each direction is that of usual frames: in one piece, and nothing is asked for them. The VF reads and
//! writes the guest's memory itself on the way over `lend`, and over buffers that were reserved (zero-copy). The rest is
//! for all that is odd, one frame after the other.
//!
//! A lane moves by value between its port's thread and a core. On a core it takes turns; at home its
//! rings are put in and taken out. The two directions share nothing that is written.

use std::any::Any;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;

use super::counters::LaneCounters;
use super::doorbell::{Doorbell, NotifyMark};
use super::guest_to_vf::GuestToVf;
use super::offload::TxRules;
use super::vf_to_guest::VfToGuest;
use crate::error::Result;
use crate::guest::GuestMemory;
use crate::ring::{BURST, PushError, RingConfig, RingFault};
use crate::vf::{Lendable, RxPacket, RxQueue, TxQueue};

/// Packets a busy lane moves in one turn, about.
pub const TURN_BUDGET: usize = 256;

/// How long a burst is held for a guest that posted no buffers, before it is dropped as `guest_ring_empty`.
const GUEST_RING_EMPTY: Duration = Duration::from_micros(50);

/// Names a lane among all of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LaneId(pub u64);

/// A VF queue on its way from one lane of its port to another, with what was received from it and not placed.
pub type Moving = Box<dyn Any + Send>;

/// What a core gives a lane for a turn.
#[derive(Clone, Copy, Debug)]
pub struct Turn<'core> {
    /// The time, read once for all lanes.
    pub now: Instant,
    /// The core's mark for the watchdog.
    pub mark: &'core NotifyMark,
}

/// A ring to be put into a lane, as the session describes it.
#[derive(Clone, Debug)]
pub struct RingPlan {
    /// The memory its addresses are in.
    pub memory: Arc<GuestMemory>,
    /// Size, addresses, base, format.
    pub config: RingConfig,
    /// Kick, call and err.
    pub doorbell: Doorbell,
    /// SET_VRING_ENABLE.
    pub enabled: bool,
    /// Offloads negotiated (TX rings).
    pub rules: TxRules,
    /// What frames may be sent from where they lie, or received into without a copy.
    pub lendable: Option<Arc<Lendable>>,
    /// The guest takes "checksum is good" (RX rings; VIRTIO_NET_F_GUEST_CSUM).
    pub guest_checksum: bool,
}

impl RingPlan {
    /// Whether these are the same but for the place where the ring begins.
    pub fn is(&self, other: &Self) -> bool {
        let lendable = |plan: &Self| plan.lendable.as_ref().map(Arc::as_ptr);
        self.is_near(other)
            && Arc::ptr_eq(&self.memory, &other.memory)
            && self.doorbell.is(&other.doorbell)
            && lendable(self) == lendable(other)
            && self.enabled == other.enabled
    }

    /// Whether a ring of this plan can become one of the `other` while frames of it are in flight: the ring itself is the
    /// same, and what frames are, and no memory goes away.
    pub fn is_near(&self, other: &Self) -> bool {
        RingConfig { base: 0, ..self.config } == RingConfig { base: 0, ..other.config }
            && (self.rules, self.guest_checksum) == (other.rules, other.guest_checksum)
            && !self.memory.loses_regions_in(&other.memory)
    }
}

/// When an fd ends a core's sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// Once for each signal; nobody reads it.
    Edge,
    /// As long as it is readable.
    Level,
}

/// Takes turns over `places`, from `next` on, until a whole round moves nothing or [`TURN_BUDGET`] is used up. The
/// next turn goes on behind the last place, so that one busy ring leaves the others their share.
pub(super) fn spend(next: &mut usize, places: usize, mut relay: impl FnMut(usize) -> usize) -> usize {
    let (mut moved, mut idle) = (0, 0);
    while idle < places && moved < TURN_BUDGET {
        let now = relay(*next);
        *next = if *next + 1 == places { 0 } else { *next + 1 };
        idle = if now == 0 { idle + 1 } else { 0 };
        moved += now;
    }
    moved
}

/// A lane, of whichever direction and kind of VF: chosen once, when it is built.
pub trait Lane: Send {
    /// Which.
    fn id(&self) -> LaneId;

    /// On the core: moves up to about [`TURN_BUDGET`] packets; returns how many it moved or dropped.
    fn turn(&mut self, turn: &Turn<'_>) -> usize;

    /// On the core, when it arrives: signals each ring once and sets the notification states anew, since
    /// what happened while the lane was away is unknown.
    fn settle(&mut self, turn: &Turn<'_>);

    /// On the core: asks for kicks and interrupts. `true`: there is work, do not sleep.
    fn doze(&mut self) -> bool;

    /// On the core: back to polling.
    fn wake(&mut self);

    /// What a sleeping core waits on for this lane: the same fds from its arrival to its departure,
    /// whatever becomes of its rings.
    fn wake_fds(&self, visit: &mut dyn FnMut(BorrowedFd<'_>, Trigger));

    /// Something can arrive for this lane without any of its fds becoming readable.
    fn needs_naps(&self) -> bool;

    /// At home: puts the ring of a queue pair of the port in.
    fn insert_ring(&mut self, pair: usize, plan: RingPlan) -> Result<()>;

    /// At home: makes the ring of a queue pair what `plan` says, which differs in no more than
    /// [`RingPlan::is_near`] allows; what of it is in flight stays there. `false`: it does not run, and is to be taken out
    /// and put in again.
    fn change_ring(&mut self, _pair: usize, _plan: &RingPlan) -> bool {
        false
    }

    /// At home: waits a little until the VF has given back what it took from where it lies; takes back what was posted and
    /// not taken. `false`: the VF has some left; it is to be restarted before any ring is taken out, and this called again.
    fn await_returns(&mut self) -> bool {
        true
    }

    /// At home: lets go of memory that frames were sent from, once none of them is out, and its ring has another by now.
    /// `false`: some is left, and this is to be called again.
    fn forget_memories(&mut self) -> bool {
        true
    }

    /// At home: takes it out, with nothing of it in flight. Its used position; `None` if it was not in.
    fn remove_ring(&mut self, pair: usize) -> Option<u16>;

    /// At home: why the ring of this pair stands still, if it does.
    fn fault(&self, pair: usize) -> Option<RingFault>;

    /// At home: another lane of this port and direction, without a ring or a VF queue. Only lanes over a VF have some.
    fn sibling(&self, _id: LaneId, _counters: Arc<LaneCounters>) -> Option<Box<dyn Lane>> {
        None
    }

    /// At home: gives a VF queue away, to a sibling. `None` if it has no such queue. One that sends goes when no ring
    /// is in the lane.
    fn release_queue(&mut self, _queue: u16) -> Option<Moving> {
        None
    }

    /// At home: takes the VF queue of this number that a sibling gave away.
    fn adopt_queue(&mut self, _queue: u16, _moving: Moving) {}

    /// At home: the VF's RSS table pointed at the queues in `before` (none: at all of them), and points at those
    /// in `now`. Until what waits in the queues is placed, this lane and its siblings, which are at home, too, read them in
    /// an order that keeps flows in theirs.
    fn table_moved(&mut self, _before: &[u16], _now: &[u16]) {}

    /// At home: lets go of the VF's buffers. Chains whose frames were not yet taken are popped again later;
    /// received frames that were not yet placed are counted as `not_ready`.
    fn discard(&mut self);
}

impl<Q: TxQueue> GuestToVf<Q> {
    /// One burst of one guest ring: pop, copy, treat, send, complete. Returns how many packets moved or were
    /// dropped, and more for large ones and for those of many descriptors.
    pub(super) fn relay(&mut self, place: usize, turn: &Turn<'_>) -> usize {
        let slot = &mut self.slots[place];
        let queue = &mut self.queues[slot.queue];
        let Some(seat) = &mut slot.seat else { return 0 };
        let mut moved = usize::from(seat.collect(queue, turn.now, &self.counters));
        if seat.is_idle() {
            match seat.ring.pop(BURST) {
                Ok(n) => {
                    seat.begin(n);
                    moved += seat.ring.toil();
                }
                Err(fault) => return self.quarantine(place, fault, turn),
            }
        }
        if !seat.is_idle() {
            if let Some(cause) = seat.closed(&self.ready) {
                moved += seat.drop_all(cause, queue, &self.counters);
            } else {
                moved += seat.stage(queue, &self.counters);
                moved += seat.send(queue, turn.now, &self.counters);
            }
        }
        if let Some(fault) = seat.publish(turn, &self.counters) {
            self.quarantine(place, fault, turn);
        }
        moved
    }
}

impl<Q: RxQueue> VfToGuest<Q> {
    /// One burst of one VF queue: receive, choose the ring, push. Returns how many packets moved or were dropped.
    pub(super) fn relay(&mut self, queue: usize, turn: &Turn<'_>) -> usize {
        let mut moved = self.retry_held(queue, turn);
        let source = &mut self.sources[queue];
        if !source.is_blocked() {
            self.stock(queue, turn);
            let mut burst = ArrayVec::new();
            moved += self.sources[queue].queue.receive(&mut burst);
            self.sources[queue].measure(&burst);
            if self.sources[queue].queue.takes_early() {
                self.fill_places(queue, &mut burst);
            }
            let pushed = self.push_each(queue, burst.iter());
            burst.drain(..pushed);
            // Not `in burst`, which would move it to another place as a whole.
            for packet in burst.drain(..) {
                match packet.placed_at() {
                    Some(at) => self.accept(queue, at, &packet),
                    None => {
                        if let Some(packet) = self.place(queue, packet, turn.now, turn) {
                            self.sources[queue].held.push_back((turn.now, packet));
                        }
                    }
                }
            }
        }
        self.publish(turn);
        moved + std::mem::take(&mut self.toil)
    }

    /// Places a frame that came at `since` in a guest's ring, or drops it, or returns it: it is to wait.
    fn place(&mut self, queue: usize, packet: Q::Packet, since: Instant, turn: &Turn<'_>) -> Option<Q::Packet> {
        let pair = match self.steering.ring_for(queue, &packet) {
            Ok(pair) => pair,
            Err(cause) => {
                self.tally.drop(cause, 1);
                return None;
            }
        };
        self.unstock(pair);
        let pushed = match self.waiting & 1 << pair {
            0 => self.push(pair, &packet),
            _ => Err(PushError::Empty),
        };
        match pushed {
            Ok(()) => self.tally.add(packet.len()),
            Err(PushError::Oversize) => self.tally.drop(super::Cause::Oversize, 1),
            Err(PushError::Chain(_)) => self.tally.drop(super::Cause::Malformed, 1),
            Err(PushError::Ring(fault)) => {
                self.tally.drop(super::Cause::NotReady, 1);
                self.quarantine(pair, fault, turn);
            }
            // A ring that stayed empty for the whole grace is not waited for again until it has buffers.
            Err(PushError::Empty) => {
                let expired = turn.now.saturating_duration_since(since) >= GUEST_RING_EMPTY;
                if !self.is_dry(pair, expired) && self.sources[queue].has_room() {
                    self.waiting |= 1 << pair;
                    return Some(packet);
                }
                self.tally.drop(super::Cause::GuestRingEmpty, 1);
            }
        }
        None
    }

    /// Tries again to place what the queue holds, in order. Returns how much of it went on, or was dropped.
    fn retry_held(&mut self, queue: usize, turn: &Turn<'_>) -> usize {
        self.waiting = 0;
        let before = self.sources[queue].held.len();
        if before == 0 {
            return 0;
        }
        let mut held = std::mem::take(&mut self.sources[queue].held);
        let pushed = self.push_each(queue, held.iter().map(|(_, packet)| packet));
        held.drain(..pushed);
        self.sources[queue].held = held;
        // Of those that were held: a ring may be taken off meanwhile.
        let feeds_one = self.sources[queue].feeds_one;
        for _ in pushed..before {
            let Some((since, packet)) = self.sources[queue].held.pop_front() else { break };
            let Some(packet) = self.place(queue, packet, since, turn) else { continue };
            let source = &mut self.sources[queue];
            if feeds_one {
                // So do those behind it, which are younger.
                source.held.push_front((since, packet));
                break;
            }
            source.held.push_back((since, packet));
        }
        before - self.sources[queue].held.len()
    }
}
