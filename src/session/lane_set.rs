//! The lanes of a port: at home in the port's thread, or out on their cores; and which VF queue is in which.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use super::plan::PortCounters;
use crate::error::Result;
use crate::relay::{GuestToVf, Lane, LaneId, Poller, VfToGuest};
use crate::vf::{Queues, Vf, VfConfig, VfSpec};

/// Indices of the two directions.
pub(super) const GUEST_TO_VF: usize = 0;
pub(super) const VF_TO_GUEST: usize = 1;

/// The ring with this index: its direction and queue pair (virtio 1.3, 5.1.2: receiveq1 is 0, transmitq1 is 1).
pub(super) fn place_of(ring: usize) -> (usize, usize) {
    (if ring % 2 == 1 { GUEST_TO_VF } else { VF_TO_GUEST }, ring / 2)
}

/// How many lanes a direction has: lane *l* of *n* has the pairs that are *l* modulo *n*, and the VF queues of the same
/// numbers. Where pairs share a queue, they have to be in one lane with it.
fn lanes_for(pairs: usize, queues: usize, cores: usize) -> usize {
    let most = pairs.min(queues).min(cores);
    (1..=most).rev().find(|lanes| queues >= pairs || queues.is_multiple_of(*lanes)).unwrap_or(1)
}

/// A lane of a port.
enum Whereabouts {
    Home(Box<dyn Lane>),
    Out { id: LaneId, core: usize },
}

/// Both directions of a VF, before they are divided into lanes, and how many queue pairs it has.
pub(super) struct Undivided {
    directions: [Box<dyn Lane>; 2],
    queues: u16,
}

impl Undivided {
    /// Over the queues of a VF, for so many queue pairs of a guest.
    pub(super) fn over(queues: Queues, pairs: usize, ready: &Arc<AtomicBool>, counters: &PortCounters) -> Self {
        fn build<T: crate::vf::TxQueue, R: crate::vf::RxQueue>(
            tx: Vec<T>,
            rx: Vec<R>,
            pairs: usize,
            ready: &Arc<AtomicBool>,
            counters: &PortCounters,
        ) -> Undivided {
            let queues = tx.len() as u16;
            let to_vf = GuestToVf::new(next_lane(), pairs, tx, ready.clone(), counters.guest_to_vf.lane(0).clone());
            let to_guest = VfToGuest::new(next_lane(), pairs, rx, counters.vf_to_guest.lane(0).clone());
            Undivided { directions: [Box::new(to_vf), Box::new(to_guest)], queues }
        }
        match queues {
            Queues::Soft(tx, rx) => build(tx, rx, pairs, ready, counters),
            #[cfg(feature = "dpdk")]
            Queues::Ethdev(tx, rx) => build(tx, rx, pairs, ready, counters),
        }
    }

    /// Without a VF: over `soft:null`, never ready.
    pub(super) fn without_vf(pairs: usize, mtu: u16, ready: &Arc<AtomicBool>, counters: &PortCounters) -> Result<Self> {
        let queues = Vf::probe(&VfSpec::SoftNull)?.configure(&VfConfig { queues: 1, mtu, mac: None })?;
        Ok(Self::over(queues, pairs, ready, counters))
    }

    /// Queue pairs of the VF.
    pub(super) fn queues(&self) -> u16 {
        self.queues
    }
}

/// Lanes are numbered over the life of the process.
fn next_lane() -> LaneId {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    LaneId(NEXT.fetch_add(1, Relaxed))
}

/// The lanes.
pub(super) struct LaneSet {
    pollers: Arc<Vec<Poller>>,
    /// Of each lane, by number: indices into `pollers`, by direction.
    cores: Vec<[usize; 2]>,
    counters: PortCounters,
    pairs: usize,
    /// By direction and number.
    lanes: [Vec<Whereabouts>; 2],
    /// The lane of each queue of the VF, by direction.
    owners: [Vec<usize>; 2],
}

impl LaneSet {
    /// The lanes of a port whose guest has so many queue pairs.
    pub(super) fn new(
        pollers: Arc<Vec<Poller>>,
        cores: &[(usize, usize)],
        counters: PortCounters,
        pairs: usize,
        undivided: Undivided,
    ) -> Self {
        let (lanes, owners) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
        let mut set = Self { pollers, cores: Vec::new(), counters, pairs, lanes, owners };
        set.place(cores);
        set.install(undivided, pairs);
        set
    }

    /// Lanes over another VF. All rings are out.
    pub(super) fn install(&mut self, undivided: Undivided, pairs: usize) {
        self.pairs = pairs;
        self.owners = [GUEST_TO_VF, VF_TO_GUEST].map(|_| vec![0; undivided.queues.into()]);
        self.lanes = undivided.directions.map(|lane| vec![Whereabouts::Home(lane)]);
        self.divide();
    }

    /// The cores of the lanes, from the next time they are handed out.
    pub(super) fn place(&mut self, cores: &[(usize, usize)]) {
        self.cores = cores.iter().map(|&(guest_to_vf, vf_to_guest)| [guest_to_vf, vf_to_guest]).collect();
    }

    fn wanted(&self) -> usize {
        lanes_for(self.pairs, self.owners[GUEST_TO_VF].len(), self.cores.len().min(self.counters.guest_to_vf.lanes()))
    }

    /// Whether there are as many lanes as pairs, VF queues and cores allow.
    pub(super) fn is_divided(&self) -> bool {
        self.count() == self.wanted()
    }

    /// Makes as many lanes as pairs, VF queues and cores allow. All rings are out.
    pub(super) fn divide(&mut self) {
        let wanted = self.wanted();
        let counters = [self.counters.guest_to_vf.clone(), self.counters.vf_to_guest.clone()];
        for direction in [GUEST_TO_VF, VF_TO_GUEST] {
            for lane in self.lanes[direction].len()..wanted {
                let sibling = self.home(direction, 0).sibling(next_lane(), counters[direction].lane(lane).clone());
                self.lanes[direction].push(Whereabouts::Home(sibling.expect("a lane over a VF")));
            }
            let owners = (0..self.owners[direction].len()).map(|queue| queue % wanted).collect();
            self.move_queues(direction, owners);
            self.lanes[direction].truncate(wanted);
        }
    }

    /// How many lanes each direction has.
    pub(super) fn count(&self) -> usize {
        self.lanes[GUEST_TO_VF].len()
    }

    /// The lane of a queue pair's rings.
    pub(super) fn lane_of(&self, pair: usize) -> usize {
        pair % self.count()
    }

    /// The CPU of the lane of a ring.
    pub(super) fn cpu_of(&self, ring: usize) -> usize {
        let (direction, pair) = place_of(ring);
        self.pollers[self.cores[self.lane_of(pair)][direction]].cpu
    }

    /// Brings lanes home. All are asked before any is awaited: the front end waits for the longest turn, not for the
    /// sum.
    pub(super) fn bring_home(&mut self, wanted: impl Fn(usize, usize) -> bool) {
        let mut asked = Vec::new();
        for (direction, lanes) in self.lanes.iter().enumerate() {
            for (number, lane) in lanes.iter().enumerate() {
                if let Whereabouts::Out { id, core } = lane
                    && wanted(direction, number)
                {
                    let (reply, returned) = crossbeam::channel::bounded(1);
                    self.pollers[*core].recall(*id, reply);
                    asked.push((direction, number, returned));
                }
            }
        }
        for (direction, number, returned) in asked {
            let lane = returned.recv().expect("a core gives back the lanes it was given");
            self.lanes[direction][number] = Whereabouts::Home(lane);
        }
    }

    /// Whether a lane is at home.
    pub(super) fn is_home(&self, direction: usize, lane: usize) -> bool {
        matches!(self.lanes[direction][lane], Whereabouts::Home(_))
    }

    /// A lane, which is at home.
    pub(super) fn home(&mut self, direction: usize, lane: usize) -> &mut Box<dyn Lane> {
        match &mut self.lanes[direction][lane] {
            Whereabouts::Home(lane) => lane,
            Whereabouts::Out { .. } => unreachable!("brought home before"),
        }
    }

    /// Hands out those that are at home, and wanted on their cores.
    pub(super) fn hand_out(&mut self, wanted: impl Fn(usize, usize) -> bool) {
        for (direction, lanes) in self.lanes.iter_mut().enumerate() {
            for (number, place) in lanes.iter_mut().enumerate() {
                let Whereabouts::Home(lane) = place else { continue };
                if !wanted(direction, number) {
                    continue;
                }
                let out = Whereabouts::Out { id: lane.id(), core: self.cores[number][direction] };
                if let (Whereabouts::Home(lane), Whereabouts::Out { core, .. }) =
                    (std::mem::replace(place, out), &*place)
                {
                    self.pollers[*core].adopt(lane);
                }
            }
        }
    }

    /// Each lane lets go of the VF's buffers. All are at home.
    pub(super) fn discard(&mut self) {
        for direction in [GUEST_TO_VF, VF_TO_GUEST] {
            (0..self.count()).for_each(|lane| self.home(direction, lane).discard());
        }
    }

    /// The lanes in which the VF's receive queues are to be: each in its own if that one has rings that are open;
    /// else they go to those that have. `None`: as they are, since no lane has any.
    pub(super) fn owners(&self, has_rings: impl Fn(usize) -> bool) -> Option<Vec<usize>> {
        let takers: Vec<usize> = (0..self.count()).filter(|lane| has_rings(*lane)).collect();
        if takers.is_empty() {
            return None;
        }
        let owner = |queue: usize| match queue % self.count() {
            own if takers.contains(&own) => own,
            _ => takers[queue % takers.len()],
        };
        Some((0..self.owners[VF_TO_GUEST].len()).map(owner).collect())
    }

    /// Whether the VF's receive queues are in these lanes.
    pub(super) fn are_owners(&self, owners: &[usize]) -> bool {
        self.owners[VF_TO_GUEST] == owners
    }

    /// Puts the VF's receive queues into these lanes. All of that direction are at home.
    pub(super) fn set_owners(&mut self, owners: Vec<usize>) {
        self.move_queues(VF_TO_GUEST, owners);
    }

    fn move_queues(&mut self, direction: usize, owners: Vec<usize>) {
        let before = std::mem::replace(&mut self.owners[direction], owners.clone());
        for (queue, (from, to)) in before.into_iter().zip(owners).enumerate().filter(|(_, (from, to))| from != to) {
            let moving = self.home(direction, from).release_queue(queue as u16);
            let moving = moving.expect("a queue is in the lane that owns it");
            self.home(direction, to).adopt_queue(queue as u16, moving);
        }
    }

    /// The queues that the VF's RSS table is to point at when the rings of these pairs are open: theirs, if each has one;
    /// else those that feed them.
    pub(super) fn table(&self, open: &[usize]) -> Vec<u16> {
        let queues = self.owners[VF_TO_GUEST].len();
        if open.iter().all(|pair| *pair < queues) {
            return open.iter().map(|pair| *pair as u16).collect();
        }
        let feeds = |queue: &usize| open.iter().any(|pair| self.lane_of(*pair) == self.lane_of(*queue));
        (0..queues).filter(feeds).map(|queue| queue as u16).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_lanes_as_can_own_their_queues() {
        for (pairs, queues, cores, lanes) in [
            (1, 1, 4, 1),
            (4, 4, 1, 1),
            (4, 4, 2, 2),
            (4, 4, 3, 3),
            (4, 4, 8, 4),
            (4, 1, 4, 1),
            (4, 2, 4, 2),
            // Pairs 0 and 3 share queue 0: they are in one lane of three, not in one of two.
            (4, 3, 2, 1),
            (4, 3, 4, 3),
            (8, 6, 4, 3),
            (32, 32, 5, 5),
        ] {
            assert_eq!(lanes_for(pairs, queues, cores), lanes, "{pairs} pairs, {queues} queues, {cores} cores");
            for pair in 0..pairs {
                assert_eq!(pair % lanes, pair % queues % lanes, "pair {pair} is where its queue is");
            }
        }
    }
}
