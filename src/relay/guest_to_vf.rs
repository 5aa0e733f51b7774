//! The lane from a guest's TX rings to a VF's transmit queues: its parts, and its life at home.
//! The way of a packet through it is in [`super::lane`].

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::counters::LaneCounters;
use super::doorbell::{Blocked, Doorbell};
use super::lane::{Lane, LaneId, Moving, RingPlan, Trigger, Turn, spend};
use super::tx_seat::TxSeat;
use crate::error::Result;
use crate::ring::{RingFault, TxRing};
use crate::vf::{TxPacket, TxQueue};

/// How long at most a lane waits at home for a VF that still reads frames where they lie. The VMM waits meanwhile.
const RETURN: Duration = Duration::from_millis(100);

/// guest→VF.
#[derive(Debug)]
pub struct GuestToVf<Q: TxQueue> {
    id: LaneId,
    /// Of the rings that are in, by queue pair.
    pub(super) slots: Vec<TxSlot<Q::Packet>>,
    /// The slot that the next turn begins with.
    next_slot: usize,
    /// Those of the VF's transmit queues that are this lane's, and their numbers.
    pub(super) queues: Vec<Q>,
    numbers: Vec<u16>,
    /// How many the VF has; pair *n* sends on queue *n* modulo that.
    vf_queues: usize,
    /// The VF is there and its link is up.
    pub(super) ready: Arc<AtomicBool>,
    pub(super) counters: Arc<LaneCounters>,
}

/// A ring's place in the lane.
#[derive(Debug)]
pub(super) struct TxSlot<P> {
    pair: usize,
    /// Where its VF queue is in [`GuestToVf::queues`].
    pub(super) queue: usize,
    pub(super) seat: Option<TxSeat<P>>,
    /// Why the ring was taken off the core's list.
    fault: Option<(RingFault, TxRing, Doorbell)>,
}

impl<P: TxPacket> TxSlot<P> {
    /// Stops the ring. It stays in the lane: its position is asked for later.
    fn stop(&mut self, fault: RingFault, counters: &LaneCounters) {
        if let Some(seat) = self.seat.take() {
            let (ring, doorbell) = seat.close(counters);
            counters.quarantine();
            self.fault = Some((fault, ring, doorbell));
        }
    }
}

impl<Q: TxQueue> GuestToVf<Q> {
    /// A lane of `pairs` queue pairs, with all of a VF's queues, without rings. `ready` says whether the VF can send.
    pub fn new(id: LaneId, pairs: usize, queues: Vec<Q>, ready: Arc<AtomicBool>, counters: Arc<LaneCounters>) -> Self {
        assert!(!queues.is_empty(), "a VF has at least one transmit queue");
        let vf_queues = queues.len();
        let numbers = (0..vf_queues as u16).collect();
        let slots = Vec::with_capacity(pairs);
        Self { id, slots, next_slot: 0, queues, numbers, vf_queues, ready, counters }
    }

    /// Takes a ring that lies off the core's list and tells its front end. Returns the work that was.
    #[cold]
    pub(super) fn quarantine(&mut self, place: usize, fault: RingFault, turn: &Turn<'_>) -> usize {
        let slot = &mut self.slots[place];
        slot.stop(fault, &self.counters);
        let silent = fault == RingFault::CallBlocks;
        if silent || slot.fault.as_ref().is_some_and(|(_, _, doorbell)| doorbell.err(turn.mark) == Err(Blocked)) {
            self.silence(place);
        }
        1
    }

    /// A notification of this ring blocked: what the front end did once it can do with every fd, each time for
    /// as long as the watchdog waits. So nothing is signalled any more: all rings stop.
    fn silence(&mut self, place: usize) {
        self.counters.blocked();
        for slot in &mut self.slots {
            slot.stop(RingFault::CallBlocks, &self.counters);
        }
        if let Some((fault, ..)) = &mut self.slots[place].fault {
            *fault = RingFault::CallBlocks;
        }
    }

    fn slot(&self, pair: usize) -> Option<usize> {
        self.slots.iter().position(|slot| slot.pair == pair)
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
        let mut next = self.next_slot;
        let moved = spend(&mut next, self.slots.len(), |place| self.relay(place, turn));
        self.next_slot = next;
        moved
    }

    fn settle(&mut self, turn: &Turn<'_>) {
        for place in 0..self.slots.len() {
            let Some(seat) = &mut self.slots[place].seat else { continue };
            seat.ring.disable_kicks();
            if seat.doorbell.call(turn.mark) == Err(Blocked) {
                self.quarantine(place, RingFault::CallBlocks, turn);
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
        self.seats().any(|seat| seat.doorbell.kick.is_none() || seat.is_owing())
    }

    fn insert_ring(&mut self, pair: usize, plan: RingPlan) -> Result<()> {
        let seat = Some(TxSeat::new(plan)?);
        let number = (pair % self.vf_queues) as u16;
        let queue = self.numbers.iter().position(|ours| *ours == number).expect("the pair's VF queue is in its lane");
        self.slots.retain(|slot| slot.pair != pair);
        let at = self.slots.partition_point(|slot| slot.pair < pair);
        self.slots.insert(at, TxSlot { pair, queue, seat, fault: None });
        self.next_slot = 0;
        Ok(())
    }

    fn change_ring(&mut self, pair: usize, plan: &RingPlan) -> bool {
        let Some(seat) = self.slot(pair).and_then(|place| self.slots[place].seat.as_mut()) else { return false };
        seat.change(plan);
        true
    }

    fn forget_memories(&mut self) -> bool {
        if self.queues.iter().all(|queue| queue.lends_from() == usize::MAX) {
            return true;
        }
        if self.seats().any(|seat| !seat.staged.is_empty()) {
            return false;
        }
        // All rings of a port are lent the same.
        let current = self.seats().find_map(TxSeat::lendable).cloned();
        self.queues.iter_mut().fold(true, |all, queue| all & queue.forget_memories(current.as_ref()))
    }

    fn await_returns(&mut self) -> bool {
        let start = Instant::now();
        loop {
            let now = Instant::now();
            let all = self.queues.iter_mut().fold(true, |all, queue| {
                queue.reclaim(now);
                all & (queue.lent() == queue.returned())
            });
            if all || start.elapsed() > RETURN {
                return all;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    fn remove_ring(&mut self, pair: usize) -> Option<u16> {
        let slot = self.slots.remove(self.slot(pair)?);
        self.next_slot = 0;
        // What was staged was not accepted by the VF: its chains are not completed, the guest's next
        // start begins with them again.
        let position = match slot {
            TxSlot { seat: Some(mut seat), queue, .. } => {
                seat.collect(&mut self.queues[queue], Instant::now(), &self.counters);
                Some(seat.close(&self.counters).0.position())
            }
            TxSlot { fault: Some((_, ring, _)), .. } => Some(ring.position()),
            TxSlot { .. } => None,
        };
        // The memory may be about to go. The last ring that is taken out finds nothing staged.
        self.forget_memories();
        position
    }

    fn fault(&self, pair: usize) -> Option<RingFault> {
        self.slots[self.slot(pair)?].fault.as_ref().map(|(fault, ..)| *fault)
    }

    fn sibling(&self, id: LaneId, counters: Arc<LaneCounters>) -> Option<Box<dyn Lane>> {
        let (ready, vf_queues) = (self.ready.clone(), self.vf_queues);
        let (slots, queues, numbers) = (Vec::with_capacity(self.slots.capacity()), Vec::<Q>::new(), Vec::new());
        Some(Box::new(Self { id, slots, next_slot: 0, queues, numbers, vf_queues, ready, counters }))
    }

    fn release_queue(&mut self, queue: u16) -> Option<Moving> {
        assert!(self.slots.is_empty(), "rings send on the queues that their lane has");
        let at = self.numbers.iter().position(|ours| *ours == queue)?;
        self.numbers.remove(at);
        Some(Box::new(self.queues.remove(at)))
    }

    fn adopt_queue(&mut self, queue: u16, moving: Moving) {
        let Ok(moving) = moving.downcast::<Q>() else { unreachable!("the lanes of a port have one kind of queue") };
        self.numbers.push(queue);
        self.queues.push(*moving);
    }

    fn discard(&mut self) {
        self.seats_mut().for_each(TxSeat::put_back);
    }
}
