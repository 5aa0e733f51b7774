//! A port's two lanes: at home in the port's thread, or out on their cores; and the VF under them.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use tracing::{info, warn};

use super::features;
use super::lending::Lending;
use super::plan::{PortCounters, RingStatus, VfStatus, ZeroCopy};
use super::port_log::PortLog;
use super::{Lanes, SessionState};
use crate::error::Result;
use crate::ethernet::{MAX_TSO_FRAME, TAGGED_HEADER};
use crate::guest::{Drained, GuestMemory};
use crate::relay::{Doorbell, GuestToVf, Lane, LaneId, Poller, RingPlan, TxRules, VfToGuest};
use crate::ring::{RingConfig, RingFault};
use crate::vf::{Dma, Queues, Vf, VfCaps, VfConfig, VfSpec};

/// Indices of the two directions.
const GUEST_TO_VF: usize = 0;
const VF_TO_GUEST: usize = 1;

/// The ring with this index: its direction and queue pair (virtio 1.3, 5.1.2: receiveq1 is 0, transmitq1 is 1).
fn place_of(ring: usize) -> (usize, usize) {
    (if ring % 2 == 1 { GUEST_TO_VF } else { VF_TO_GUEST }, ring / 2)
}

/// A lane of a port.
enum Whereabouts {
    Home(Box<dyn Lane>),
    Out(LaneId),
}

/// Whether a ring that was built from `ours` is what `plan` says. Where it begins is no part of what it is.
fn is_built_from(ours: &RingPlan, plan: &RingPlan) -> bool {
    Arc::ptr_eq(&ours.memory, &plan.memory)
        && RingConfig { base: 0, ..ours.config } == RingConfig { base: 0, ..plan.config }
        && ours.doorbell.is(&plan.doorbell)
        && ours.lendable.as_ref().map(Arc::as_ptr) == plan.lendable.as_ref().map(Arc::as_ptr)
        && (ours.enabled, ours.rules, ours.guest_checksum) == (plan.enabled, plan.rules, plan.guest_checksum)
}

/// Whether they differ at most by what [`Lane::amend_ring`] changes.
fn is_amended(ours: &RingPlan, plan: &RingPlan) -> bool {
    let RingPlan { doorbell, lendable, guest_checksum, .. } = plan.clone();
    is_built_from(&RingPlan { doorbell, lendable, guest_checksum, ..ours.clone() }, plan)
}

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
    pollers: Arc<Vec<Poller>>,
    /// Indices into `pollers`, by direction.
    cores: [usize; 2],
    counters: PortCounters,
    pairs: usize,
    mtu: u16,
    zero_copy: ZeroCopy,
    lending: Lending,
    lanes: [Whereabouts; 2],
    /// What the rings in the lanes were built from; one is rebuilt when that changes.
    built: Vec<Option<RingPlan>>,
    faults: Vec<Option<String>>,
    /// Positions of rings that ran, and could not be built again.
    lost: Vec<Option<u16>>,
    /// A signal to this guest blocked.
    silenced: bool,
    vf: Option<InPlace>,
    /// The VF can send: shared with the lane.
    ready: Arc<AtomicBool>,
    reta: Vec<u16>,
}

/// Lanes are numbered over the life of the process.
fn next_lane() -> LaneId {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    LaneId(NEXT.fetch_add(1, Relaxed))
}

impl PortLanes {
    /// Lanes without a VF: what a guest sends is consumed and counted as `not_ready`.
    pub(super) fn new(
        id: &str,
        log: Rc<PortLog>,
        pollers: Arc<Vec<Poller>>,
        cores: (usize, usize),
        counters: PortCounters,
        pairs: u16,
        mtu: u16,
    ) -> Result<Self> {
        let ready = Arc::new(AtomicBool::new(false));
        let pairs = usize::from(pairs);
        let (lanes, _) = lanes_without_vf(pairs, mtu, &ready, &counters)?;
        Ok(Self {
            id: id.to_owned(),
            log,
            pollers,
            cores: [cores.0, cores.1],
            counters,
            pairs,
            mtu,
            zero_copy: ZeroCopy::default(),
            lending: Lending::default(),
            lanes,
            built: (0..2 * pairs).map(|_| None).collect(),
            faults: vec![None; 2 * pairs],
            lost: vec![None; 2 * pairs],
            silenced: false,
            vf: None,
            ready,
            reta: Vec::new(),
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
        let (lanes, count) = lanes_over(queues, self.pairs, &self.ready, &self.counters);
        #[cfg(debug_assertions)]
        delay_for_tests("START", &self.id);
        if let Err(error) = vf.start() {
            drop(lanes);
            return Err(Box::new((error, vf)));
        }
        self.mtu = config.mtu;
        self.lanes = lanes;
        self.reta.clear();
        self.vf = Some(InPlace { spec, vf, queues: count });
        self.look_at_link();
        Ok(())
    }

    /// Stops the VF and takes it out. The caller has drained the lanes.
    pub(super) fn take_vf(&mut self) -> Option<(VfSpec, Vf)> {
        self.assert_drained();
        let InPlace { spec, mut vf, .. } = self.vf.take()?;
        self.ready.store(false, Relaxed);
        for lane in &mut self.lanes {
            if let Whereabouts::Home(lane) = lane {
                lane.discard();
            }
        }
        // A VF stops when its queues are gone.
        match lanes_without_vf(self.pairs, self.mtu, &self.ready, &self.counters) {
            Ok((lanes, _)) => self.lanes = lanes,
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
            self.lanes = lanes_without_vf(self.pairs, mtu, &self.ready, &self.counters)?.0;
        }
        Ok(())
    }

    /// Moves the lanes to other cores. The caller pauses before and resumes after.
    pub(super) fn set_cores(&mut self, cores: (usize, usize)) {
        self.cores = [cores.0, cores.1];
    }

    /// Reads the link state; returns whether it changed.
    pub(super) fn look_at_link(&mut self) -> bool {
        let up = self.vf.as_ref().is_some_and(|place| place.vf.link().up);
        self.ready.swap(up, Relaxed) != up
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
                fault: self.faults[index].clone(),
            })
            .collect()
    }

    /// Whether a signal to the guest blocked: no ring of it is built again, the front end has to go.
    pub(super) fn is_silenced(&self) -> bool {
        self.silenced
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

    /// Takes back the buffers of its guest that the VF has and no frame came into, now that none is posted any more. The
    /// caller pauses before and resumes after.
    pub(super) fn take_back_posted(&mut self) {
        if !self.home(VF_TO_GUEST).await_returns() {
            self.restart_vf();
        }
    }

    /// Takes back what the VF has of its guest's frames, if need be by restarting it. The caller pauses before and
    /// resumes after.
    pub(super) fn take_back(&mut self) {
        for ring in (0..self.built.len()).filter(|ring| place_of(*ring).0 == GUEST_TO_VF) {
            self.lost[ring] = self.take_out(ring);
        }
    }

    /// The lane of a direction, which is at home.
    fn home(&mut self, direction: usize) -> &mut Box<dyn Lane> {
        match &mut self.lanes[direction] {
            Whereabouts::Home(lane) => lane,
            Whereabouts::Out(_) => unreachable!("paused before"),
        }
    }

    /// Takes a ring out; its position.
    fn take_out(&mut self, ring: usize) -> Option<u16> {
        let (direction, pair) = place_of(ring);
        self.faults[ring] = None;
        let lost = self.lost[ring].take();
        match self.built[ring].take() {
            Some(_) => {
                if !self.home(direction).await_returns() {
                    if let (GUEST_TO_VF, Some(InPlace { spec, .. })) = (direction, &self.vf) {
                        let id = &self.id;
                        warn!(port = %id, vf = %spec, "frames that the VF does not send are taken back: it is restarted");
                    }
                    self.restart_vf();
                }
                self.home(direction).remove_ring(pair)
            }
            None => lost,
        }
    }

    /// The VF does not give back what it took of the guest's memory, which may be about to go. Both lanes are at home.
    fn restart_vf(&mut self) {
        // It would begin with what is posted.
        self.home(VF_TO_GUEST).await_returns();
        let Some(place) = &mut self.vf else { return };
        info!(port = %self.id, vf = %place.spec, "the VF is restarted: it gives back what it has of the guest's memory");
        if let Err(error) = place.vf.restart() {
            // The next look at it finds it stopped.
            warn!(port = %self.id, %error, "cannot restart the VF");
        }
        self.reta.clear();
        // Now all of it is back.
        self.home(VF_TO_GUEST).await_returns();
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
        // Both are asked before either is awaited: the front end waits for the longer turn, not for the sum.
        let asked = [GUEST_TO_VF, VF_TO_GUEST].map(|direction| {
            let Whereabouts::Out(id) = self.lanes[direction] else { return None };
            let (reply, returned) = crossbeam::channel::bounded(1);
            self.pollers[self.cores[direction]].recall(id, reply);
            Some(returned)
        });
        for (lane, returned) in self.lanes.iter_mut().zip(asked) {
            if let Some(returned) = returned {
                *lane = Whereabouts::Home(returned.recv().expect("a core gives back the lanes it was given"));
            }
        }
        for ring in 0..self.built.len() {
            let (direction, pair) = place_of(ring);
            if let (Some(fault), Some(_), None) =
                (self.home(direction).fault(pair), &self.built[ring], &self.faults[ring])
            {
                if self.log.allows() {
                    warn!(port = %self.id, ring, %fault, "ring quarantined");
                }
                self.faults[ring] = Some(fault.to_string());
                self.silenced |= fault == RingFault::CallBlocks;
            }
        }
    }

    fn stop_ring(&mut self, ring: usize) -> Option<u16> {
        self.pause();
        self.take_out(ring)
    }

    fn drain(&mut self, state: &mut SessionState) -> Drained {
        self.pause();
        for ring in 0..self.built.len() {
            if let Some(position) = self.take_out(ring) {
                state.rings[ring].base = position;
            }
        }
        // What the VF did not give back keeps what it is in: see `EthdevTx`.
        self.lending.end();
        Drained::attest()
    }

    fn resume(&mut self, state: &SessionState, memory: &Arc<GuestMemory>) {
        self.pause();
        if self.silenced {
            return;
        }
        if (0..self.built.len()).any(|ring| self.plan(ring, state, memory).is_some()) {
            let vf = self.vf.as_ref().map(|place| &place.vf);
            self.lending.follow(vf, memory, self.zero_copy);
        }
        for ring in 0..self.built.len() {
            let (direction, pair) = place_of(ring);
            let plan = self.plan(ring, state, memory);
            if let (Some(built), Some(plan)) = (&self.built[ring], &plan)
                && !is_built_from(built, plan)
                && is_amended(built, plan)
                && self.home(direction).amend_ring(pair, plan)
            {
                self.built[ring] = Some(plan.clone());
                continue;
            }
            match (&self.built[ring], plan) {
                (None, None) => {}
                (Some(built), Some(plan)) if is_built_from(built, &plan) => {}
                (built, plan) => {
                    let rebuilt = built.is_some();
                    let position = self.take_out(ring);
                    let Some(mut plan) = plan else { continue };
                    if let Some(position) = position {
                        plan.config.base = position;
                    }
                    match self.home(direction).insert_ring(pair, plan.clone()) {
                        Ok(()) => {
                            // Once a start: it is built anew for every small change.
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
            }
        }
        let direct = self.home(VF_TO_GUEST).direct_queues();
        if direct != self.reta
            && let Some(place) = &mut self.vf
        {
            // Best effort: queues of rings that are not open are polled all the same.
            let pointed = place.vf.point_reta(&direct);
            let before = std::mem::replace(&mut self.reta, direct.clone());
            if pointed {
                self.home(VF_TO_GUEST).table_moved(&before, &direct);
            }
        }
        for direction in [GUEST_TO_VF, VF_TO_GUEST] {
            let runs =
                self.built.iter().enumerate().any(|(ring, built)| built.is_some() && place_of(ring).0 == direction);
            if !runs {
                continue;
            }
            let id = self.home(direction).id();
            if let Whereabouts::Home(lane) = std::mem::replace(&mut self.lanes[direction], Whereabouts::Out(id)) {
                self.pollers[self.cores[direction]].adopt(lane);
            }
        }
    }
}

/// Lanes over the queues of a VF, and how many queue pairs it has.
fn lanes_over(
    queues: Queues,
    pairs: usize,
    ready: &Arc<AtomicBool>,
    counters: &PortCounters,
) -> ([Whereabouts; 2], u16) {
    fn build<T: crate::vf::TxQueue, R: crate::vf::RxQueue>(
        tx: Vec<T>,
        rx: Vec<R>,
        pairs: usize,
        ready: &Arc<AtomicBool>,
        counters: &PortCounters,
    ) -> ([Whereabouts; 2], u16) {
        let count = tx.len() as u16;
        let guest_to_vf = GuestToVf::new(next_lane(), pairs, tx, ready.clone(), counters.guest_to_vf.clone());
        let vf_to_guest = VfToGuest::new(next_lane(), pairs, rx, counters.vf_to_guest.clone());
        ([Whereabouts::Home(Box::new(guest_to_vf)), Whereabouts::Home(Box::new(vf_to_guest))], count)
    }
    match queues {
        Queues::Soft(tx, rx) => build(tx, rx, pairs, ready, counters),
        #[cfg(feature = "dpdk")]
        Queues::Ethdev(tx, rx) => build(tx, rx, pairs, ready, counters),
    }
}

/// Lanes that have no VF: over `soft:null`, never ready.
fn lanes_without_vf(
    pairs: usize,
    mtu: u16,
    ready: &Arc<AtomicBool>,
    counters: &PortCounters,
) -> Result<([Whereabouts; 2], u16)> {
    let queues = Vf::probe(&VfSpec::SoftNull)?.configure(&VfConfig { queues: 1, mtu, mac: None })?;
    Ok(lanes_over(queues, pairs, ready, counters))
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
