//! A port's lanes, the rings that are in them, and the VF under them.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

use tracing::{info, warn};

use super::features;
use super::lane_set::{GUEST_TO_VF, LaneSet, Undivided, VF_TO_GUEST, place_of};
use super::lending::Lending;
use super::plan::{PortCounters, RingStatus, VfStatus, ZeroCopy};
use super::port_log::PortLog;
use super::{Lanes, SessionState};
use crate::error::Result;
use crate::ethernet::{MAX_TSO_FRAME, TAGGED_HEADER};
use crate::guest::{Drained, GuestMemory};
use crate::relay::{Doorbell, Poller, RingPlan, TxRules};
use crate::ring::RingFault;
use crate::vf::{Dma, Vf, VfCaps, VfConfig, VfSpec};

/// The VF in place.
struct InPlace {
    spec: VfSpec,
    vf: Vf,
    queues: u16,
}

/// Lanes and VF of a port. Owned by the port's thread.
pub(super) struct PortLanes {
    id: String,
    log: Rc<PortLog>,
    counters: PortCounters,
    pairs: usize,
    mtu: u16,
    zero_copy: ZeroCopy,
    lending: Lending,
    set: LaneSet,
    /// What the rings in the lanes were built from; one is rebuilt when that changes.
    built: Vec<Option<RingPlan>>,
    faults: Vec<Option<String>>,
    /// Positions of rings that ran, and could not be built again.
    lost: Vec<Option<u16>>,
    /// A signal to this guest blocked.
    silenced: bool,
    /// A lane keeps memory that it has no use for but that frames of it are out.
    untidy: bool,
    vf: Option<InPlace>,
    /// The VF can send: shared with the lane.
    ready: Arc<AtomicBool>,
    reta: Vec<u16>,
    /// Rings so far, each of which may have waited for the VF.
    #[cfg(test)]
    pub(super) taken_out: usize,
}

impl PortLanes {
    /// Lanes without a VF: what a guest sends is consumed and counted as `not_ready`.
    pub(super) fn new(
        id: &str,
        log: Rc<PortLog>,
        pollers: Arc<Vec<Poller>>,
        cores: &[(usize, usize)],
        counters: PortCounters,
        pairs: u16,
        mtu: u16,
    ) -> Result<Self> {
        let ready = Arc::new(AtomicBool::new(false));
        let pairs = usize::from(pairs);
        let undivided = Undivided::without_vf(pairs, mtu, &ready, &counters)?;
        let set = LaneSet::new(pollers, cores, counters.clone(), pairs, undivided);
        Ok(Self {
            id: id.to_owned(),
            log,
            counters,
            pairs,
            mtu,
            zero_copy: ZeroCopy::default(),
            lending: Lending::default(),
            set,
            built: (0..2 * pairs).map(|_| None).collect(),
            faults: vec![None; 2 * pairs],
            lost: vec![None; 2 * pairs],
            silenced: false,
            untidy: false,
            vf: None,
            ready,
            reta: Vec::new(),
            #[cfg(test)]
            taken_out: 0,
        })
    }

    /// Configures and starts a VF and builds lanes over it. On failure the VF comes back, stopped, and the
    /// lanes are as they were without one. The caller has drained the lanes, and resumes them.
    pub(super) fn give_vf(
        &mut self,
        spec: VfSpec,
        mut vf: Vf,
        config: &VfConfig,
    ) -> Result<(), Box<(crate::Error, Vf)>> {
        self.assert_drained();
        let queues = match vf.configure(config) {
            Ok(queues) => queues,
            Err(error) => return Err(Box::new((error, vf))),
        };
        let lanes = Undivided::over(queues, self.pairs, &self.ready, &self.counters);
        #[cfg(debug_assertions)]
        delay_for_tests("START", &self.id);
        if let Err(error) = vf.start() {
            drop(lanes);
            return Err(Box::new((error, vf)));
        }
        self.mtu = config.mtu;
        self.vf = Some(InPlace { spec, vf, queues: lanes.queues() });
        self.set.install(lanes, self.pairs);
        self.reta.clear();
        self.look_at_link();
        Ok(())
    }

    /// Stops the VF and takes it out. The caller has drained the lanes.
    pub(super) fn take_vf(&mut self) -> Option<(VfSpec, Vf)> {
        self.assert_drained();
        let InPlace { spec, mut vf, .. } = self.vf.take()?;
        self.ready.store(false, Relaxed);
        self.set.discard();
        // A VF stops when its queues are gone.
        match Undivided::without_vf(self.pairs, self.mtu, &self.ready, &self.counters) {
            Ok(lanes) => self.set.install(lanes, self.pairs),
            Err(error) => warn!(port = %self.id, %error, "cannot build lanes without a VF"),
        }
        if let Err(error) = vf.stop() {
            warn!(port = %self.id, %error, "cannot stop the VF");
        }
        Some((spec, vf))
    }

    /// What is offered has changed; nobody is connected.
    pub(super) fn reshape(&mut self, pairs: u16, mtu: u16) -> Result<()> {
        self.assert_drained();
        (self.pairs, self.mtu) = (usize::from(pairs), mtu);
        self.built = (0..2 * self.pairs).map(|_| None).collect();
        self.faults = vec![None; 2 * self.pairs];
        self.lost = vec![None; 2 * self.pairs];
        if self.vf.is_none() {
            let lanes = Undivided::without_vf(self.pairs, mtu, &self.ready, &self.counters)?;
            self.set.install(lanes, self.pairs);
        }
        Ok(())
    }

    /// Moves the lanes to other cores. The caller pauses before and resumes after.
    pub(super) fn set_cores(&mut self, cores: &[(usize, usize)]) {
        self.set.place(cores);
        if !self.set.is_divided() {
            for ring in 0..self.built.len() {
                self.lost[ring] = self.take_out(ring);
            }
            self.set.divide();
        }
    }

    /// Reads the link state; returns whether it changed.
    pub(super) fn look_at_link(&mut self) -> bool {
        let up = self.vf.as_ref().is_some_and(|place| place.vf.link().up);
        self.ready.swap(up, Relaxed) != up
    }

    /// Whether the VF lost what its driver had set up.
    pub(super) fn was_reset(&self) -> bool {
        self.vf.as_ref().is_some_and(|place| place.vf.was_reset())
    }

    /// Sets such a VF up again. `false`: its driver does that only when it is probed. The caller pauses before and resumes
    /// after.
    pub(super) fn revive(&mut self) -> bool {
        if !self.vf.as_ref().is_some_and(|place| place.vf.revives()) {
            return false;
        }
        self.restart();
        true
    }

    /// The VF in place, to be asked.
    pub(super) fn vf_mut(&mut self) -> Option<&mut Vf> {
        self.vf.as_mut().map(|place| &mut place.vf)
    }

    /// A view of the VF in place.
    pub(super) fn vf_status(&self) -> Option<VfStatus> {
        self.vf.as_ref().map(|InPlace { spec, vf, queues }| VfStatus {
            spec: spec.clone(),
            caps: vf.caps().clone(),
            queues: *queues,
            lanes: self.set.count(),
            link: vf.link(),
            xstats: vf.xstats(),
            read: Instant::now(),
        })
    }

    /// A view of the rings. Faults of lanes that are out are those known when they last left.
    pub(super) fn ring_status(&self, state: &SessionState) -> Vec<RingStatus> {
        state
            .rings
            .iter()
            .enumerate()
            .map(|(index, ring)| RingStatus {
                size: ring.size,
                started: ring.started,
                enabled: ring.enabled,
                running: self.built[index].is_some() && self.faults[index].is_none(),
                cpu: self.built[index].is_some().then(|| self.set.cpu_of(index)),
                fault: self.faults[index].clone(),
            })
            .collect()
    }

    /// Whether a signal to the guest blocked: no ring of it is built again, the front end has to go.
    pub(super) fn is_silenced(&self) -> bool {
        self.silenced
    }

    /// Whether the lanes are to come home now and then, to let go of memory.
    pub(super) fn is_untidy(&self) -> bool {
        self.untidy
    }

    /// Whether rings are built for moving frames without a copy. The caller pauses before and resumes after.
    pub(super) fn set_zero_copy(&mut self, zero_copy: ZeroCopy) {
        self.zero_copy = zero_copy;
    }

    /// Whether [`Self::map_some`] has something to do.
    pub(super) fn is_mapping(&self) -> bool {
        self.lending.is_under_way()
    }

    /// Maps some of the guest's memory for the VF, beside the traffic. Whether the rings are to be built anew, now
    /// that all is: the caller pauses before and resumes after.
    pub(super) fn map_some(&mut self) -> bool {
        let done = self.lending.map_some(self.vf.as_ref().map(|place| &place.vf));
        if done
            && let Some(why) = self.lending.hindrance()
            && self.log.allows()
        {
            warn!(port = %self.id, why, "frames are copied");
        }
        done
    }

    /// Why not all frames are moved without a copy that might, in either direction.
    pub(super) fn copies(&self) -> Option<String> {
        self.vf.as_ref().filter(|place| place.vf.caps().dma == Dma::Own)?;
        self.lending.hindrance()
    }

    /// The guest is gone: the next one is another. Whether this one was silenced.
    pub(super) fn forgive(&mut self) -> bool {
        self.assert_drained();
        std::mem::take(&mut self.silenced)
    }

    fn assert_drained(&self) {
        assert!(self.built.iter().all(Option::is_none), "the caller drains first");
    }

    /// A ring was quarantined: others may get what comes for it, while the VF has their buffers, or its own. The caller
    /// pauses before and resumes after.
    pub(super) fn take_back_received(&mut self) {
        if !self.await_received() {
            self.restart_vf();
        }
    }

    /// Takes back the buffers of its guest that the VF has and no frame came into, if some are in memory in which none is
    /// posted any more. The caller pauses before and resumes after.
    pub(super) fn take_back_posted(&mut self) {
        if self.lending.is_in_the_past() {
            self.take_back_received();
        }
    }

    /// Takes back what the VF has of its guest's frames, if need be by restarting it. The caller pauses before and
    /// resumes after.
    pub(super) fn take_back(&mut self) {
        for ring in (0..self.built.len()).filter(|ring| place_of(*ring).0 == GUEST_TO_VF) {
            self.lost[ring] = self.take_out(ring);
        }
    }

    /// Brings lanes home, and asks them what became of their rings.
    fn bring_home(&mut self, wanted: impl Fn(usize, usize) -> bool) {
        self.set.bring_home(wanted);
        for ring in 0..self.built.len() {
            let (direction, pair) = place_of(ring);
            let lane = self.set.lane_of(pair);
            if self.built[ring].is_none() || self.faults[ring].is_some() || !self.set.is_home(direction, lane) {
                continue;
            }
            if let Some(fault) = self.set.home(direction, lane).fault(pair) {
                if self.log.allows() {
                    warn!(port = %self.id, ring, %fault, "ring quarantined");
                }
                self.faults[ring] = Some(fault.to_string());
                self.silenced |= fault == RingFault::CallBlocks;
            }
        }
    }

    /// Makes a ring what a plan near to its own says, while what is in flight stays so. `false`: it is to be taken out.
    fn change(&mut self, ring: usize, plan: &RingPlan) -> bool {
        let (direction, pair) = place_of(ring);
        self.pause_ring(ring);
        let lane = self.set.lane_of(pair);
        self.set.home(direction, lane).change_ring(pair, plan)
    }

    /// Lanes that are at home let go of memory that they have no use for.
    fn tidy_up(&mut self) {
        let (mut left, mut out) = (false, false);
        for lane in 0..self.set.count() {
            match self.set.is_home(GUEST_TO_VF, lane) {
                true => left |= !self.set.home(GUEST_TO_VF, lane).forget_memories(),
                false => out = true,
            }
        }
        self.untidy = left || self.untidy && out;
    }

    /// Takes a ring out; its position.
    fn take_out(&mut self, ring: usize) -> Option<u16> {
        #[cfg(test)]
        {
            self.taken_out += usize::from(self.built[ring].is_some());
        }
        let (direction, pair) = place_of(ring);
        self.pause_ring(ring);
        let lane = self.set.lane_of(pair);
        let quarantined = self.faults[ring].take().is_some();
        let lost = self.lost[ring].take();
        match self.built[ring].take() {
            Some(_) => {
                let mut back = self.set.home(direction, lane).await_returns();
                if quarantined && direction == VF_TO_GUEST {
                    // The VF's queue that has its buffers may be in another lane by now.
                    self.bring_home(|direction, _| direction == VF_TO_GUEST);
                    back &= self.await_received();
                }
                if !back {
                    if let (GUEST_TO_VF, Some(InPlace { spec, .. }), true) = (direction, &self.vf, self.log.allows()) {
                        let id = &self.id;
                        warn!(port = %id, vf = %spec, "frames that the VF does not send are taken back: it is restarted");
                    }
                    self.restart_vf();
                }
                self.set.home(direction, lane).remove_ring(pair)
            }
            None => lost,
        }
    }

    /// Pairs whose RX ring runs and is enabled.
    fn open(&self) -> Vec<usize> {
        let is_open = |pair: &usize| {
            let built = self.built[2 * pair].as_ref();
            built.is_some_and(|plan| plan.enabled) && self.faults[2 * pair].is_none()
        };
        (0..self.built.len() / 2).filter(is_open).collect()
    }

    /// In which lanes the VF's receive queues are to be, now that these are open; `None`: as they are.
    fn owners(&self, open: &[usize]) -> Option<Vec<usize>> {
        let in_lane = |lane: usize, pair: &usize| self.set.lane_of(*pair) == lane;
        let among_open = self.set.owners(|lane| open.iter().any(|pair| in_lane(lane, pair)));
        // What comes for rings that are disabled is dropped by them.
        let built = || (0..self.built.len() / 2).filter(|pair| self.built[2 * pair].is_some());
        among_open
            .or_else(|| self.set.owners(|lane| built().any(|pair| in_lane(lane, &pair))))
            .filter(|owners| !self.set.are_owners(owners))
    }

    /// Where the VF's RSS table is to point, now that these are open; `None`: where it does.
    fn table(&self, open: &[usize]) -> Option<Vec<u16>> {
        Some(self.set.table(open)).filter(|table| self.vf.is_some() && !table.is_empty() && *table != self.reta)
    }

    /// Has the frames of the VF go to the rings that are open.
    fn steer(&mut self) {
        let open = self.open();
        if self.owners(&open).is_none() && self.table(&open).is_none() {
            return;
        }
        self.bring_home(|direction, _| direction == VF_TO_GUEST);
        // They may have had news.
        let open = self.open();
        if let Some(owners) = self.owners(&open) {
            // A queue that the VF's buffers are with would leave their ring behind.
            if !self.await_received() {
                self.restart_vf();
            }
            self.set.set_owners(owners);
        }
        if let Some(table) = self.table(&open)
            && let Some(place) = &mut self.vf
        {
            // Best effort: queues of rings that are not open are polled all the same.
            let pointed = place.vf.point_reta(&table);
            let before = std::mem::replace(&mut self.reta, table);
            if pointed {
                self.set.home(VF_TO_GUEST, 0).table_moved(&before, &self.reta);
            }
        }
    }

    /// Lanes that receive take back what the VF has not of their guest's buffers. Whether that were all. They are at home.
    fn await_received(&mut self) -> bool {
        (0..self.set.count()).fold(true, |all, lane| all & self.set.home(VF_TO_GUEST, lane).await_returns())
    }

    /// The VF does not give back what it took of the guest's memory, which may be about to go.
    fn restart_vf(&mut self) {
        self.pause();
        if let Some(place) = self.vf.as_ref().filter(|_| self.log.allows()) {
            info!(port = %self.id, vf = %place.spec, "the VF is restarted: it gives back what it has of the guest's memory");
        }
        self.restart();
    }

    /// Lanes that receive are at home.
    fn restart(&mut self) {
        // It would begin with what is posted.
        self.await_received();
        let Some(place) = &mut self.vf else { return };
        if let Err(error) = place.vf.restart() {
            // The next look at it finds it stopped.
            warn!(port = %self.id, %error, "cannot restart the VF");
        }
        self.reta.clear();
        // Now all of it is back.
        self.await_received();
    }

    /// What ring `index` is to be built from, if it can run.
    fn plan(&self, index: usize, state: &SessionState, memory: &Arc<GuestMemory>) -> Option<RingPlan> {
        let acked = state.features.unwrap_or(0);
        let has = |bit| acked & bit != 0;
        let max_wire_frame = usize::from(self.mtu) + TAGGED_HEADER;
        let caps = self.vf.as_ref().map_or_else(VfCaps::default, |place| place.vf.caps().clone());
        let rules = TxRules {
            checksum: has(features::NET_CSUM),
            tso4: has(features::NET_HOST_TSO4),
            tso6: has(features::NET_HOST_TSO6),
            max_wire_frame,
            ..TxRules::default()
        }
        .for_vf(&caps);
        let max_frame = if rules.tso4 || rules.tso6 { MAX_TSO_FRAME } else { max_wire_frame };
        let ring = &state.rings[index];
        Some(RingPlan {
            memory: memory.clone(),
            config: state.ring_config(index, max_frame)?,
            doorbell: Doorbell { kick: ring.kick.clone(), call: ring.call.clone(), err: ring.err.clone() },
            enabled: ring.enabled,
            rules,
            lendable: self.lending.lendable(memory).filter(|_| match place_of(index).0 {
                GUEST_TO_VF => caps.copies.is_none(),
                _ => caps.copies_received.is_none(),
            }),
            guest_checksum: has(features::NET_GUEST_CSUM),
        })
    }
}

impl Lanes for PortLanes {
    fn pause(&mut self) {
        self.bring_home(|_, _| true);
    }

    fn pause_ring(&mut self, ring: usize) {
        let (direction, pair) = place_of(ring);
        let lane = self.set.lane_of(pair);
        self.bring_home(|of, number| (of, number) == (direction, lane));
    }

    fn stop_ring(&mut self, ring: usize) -> Option<u16> {
        self.take_out(ring)
    }

    fn drain(&mut self, state: &mut SessionState) -> Drained {
        self.pause();
        for ring in 0..self.built.len() {
            if let Some(position) = self.take_out(ring) {
                state.rings[ring].base = position;
            }
        }
        // Of rings that were quarantined, queues may be in another lane by now.
        if !self.await_received() {
            self.restart_vf();
        }
        // What the VF did not give back keeps what it is in: see `EthdevTx`.
        self.lending.end();
        Drained::attest()
    }

    fn resume(&mut self, state: &SessionState, memory: &Arc<GuestMemory>) {
        if self.silenced {
            return self.pause();
        }
        if self.zero_copy == ZeroCopy::Off || (0..self.built.len()).any(|ring| self.plan(ring, state, memory).is_some())
        {
            let vf = self.vf.as_ref().map(|place| &place.vf);
            self.lending.follow(vf, memory, self.zero_copy);
        }
        for ring in 0..self.built.len() {
            let (direction, pair) = place_of(ring);
            let plan = self.plan(ring, state, memory);
            match (&self.built[ring], &plan) {
                (None, None) => continue,
                (Some(built), Some(plan)) if built.is(plan) => continue,
                _ => {}
            }
            let near = |new: &&RingPlan| self.built[ring].as_ref().is_some_and(|built| built.is_near(new));
            if let Some(new) = plan.as_ref().filter(near)
                && self.change(ring, new)
            {
                self.built[ring] = plan;
                continue;
            }
            let rebuilt = self.built[ring].is_some();
            let position = self.take_out(ring);
            let Some(mut plan) = plan else { continue };
            if let Some(position) = position {
                plan.config.base = position;
            }
            let lane = self.set.lane_of(pair);
            match self.set.home(direction, lane).insert_ring(pair, plan.clone()) {
                Ok(()) => {
                    // Once a start: features that change build it anew.
                    if !rebuilt && self.log.allows() {
                        info!(port = %self.id, ring, size = plan.config.size, "ring runs");
                    }
                    self.built[ring] = Some(plan);
                }
                Err(error) => {
                    if self.log.allows() {
                        warn!(port = %self.id, ring, %error, "ring cannot run");
                    }
                    self.faults[ring] = Some(error.to_string());
                    self.lost[ring] = position;
                }
            }
        }
        self.tidy_up();
        self.steer();
        if self.silenced {
            return self.pause();
        }
        let (built, lane_of) = (&self.built, |pair| self.set.lane_of(pair));
        let lanes: Vec<_> = (0..built.len()).filter(|ring| built[*ring].is_some()).map(place_of).collect();
        let lanes: Vec<_> = lanes.into_iter().map(|(direction, pair)| (direction, lane_of(pair))).collect();
        self.set.hand_out(|direction, lane| lanes.contains(&(direction, lane)));
    }
}

/// `VIRTIO_FORWARDER_TEST_VF_START_DELAY_MS=<port>:<ms>` delays the start of that port's VF, `…_LOOK_…` each look at
/// it while all rings run, so that a test can show that nothing else waits for it. Not in release builds.
#[cfg(debug_assertions)]
pub(super) fn delay_for_tests(what: &str, port: &str) {
    let Ok(value) = std::env::var(format!("VIRTIO_FORWARDER_TEST_VF_{what}_DELAY_MS")) else { return };
    if let Some((name, ms)) = value.rsplit_once(':')
        && name == port
        && let Ok(ms) = ms.parse()
    {
        std::thread::sleep(std::time::Duration::from_millis(ms));
    }
}
