//! One port's life, as control sees it: what was asked of the crew and what came back.
//!
//! A port has a thread (with its socket) and a VF, which come and go on their own. [`Port::step`] looks at
//! both and at where the port shall go, and asks the crew for the one next thing:
//!
//! ```text
//! up:    probe the VF → open (socket; also if the VF is absent) → give the VF → forwarding
//!                         absent VF: probe again each second
//! down:  close (the VF comes back) → remove the VF → gone
//! ```

use std::time::{Duration, Instant};

use tracing::{error, info, warn};

use super::api::{Copies, LaneCpus, LanesStats, PortStats, PortView, State, VfView};
use super::crew::{Crew, Event, PortChange};
use super::placement::Cores;
use super::policy::Policy;
use super::{PortId, PortSpec, stats};
use crate::error::Error;
use crate::relay::{MAX_PAIRS, Shortage};
use crate::session::Offer;
use crate::session::port::{PortCounters, PortPlan, PortStatus, VfStatus, ZeroCopy};
use crate::vf::{VfCaps, VfSpec};

/// An absent or failed VF is probed again, at most this often. One that worked for longer is probed at once, and
/// so is one that is set up anew because attributes changed.
const RETRY: Duration = Duration::from_secs(1);

/// The port's thread, with its socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Thread {
    None,
    Opening,
    Open,
    Closing,
}

/// The port's VF. Where it is, and who has been asked.
#[derive(Debug)]
enum Vf<V> {
    /// Never looked for, or gone for good.
    None,
    /// The device thread looks for it.
    Probing,
    /// In our hands, to be given to the port thread or removed.
    Held(V),
    /// The port thread starts it.
    Starting,
    /// It forwards.
    Ready(VfStatus),
    /// The device thread removes it.
    Removing,
    /// Not there; look again at this time.
    Absent(Instant),
}

/// A port.
pub(super) struct Port<V> {
    /// Tells this port from earlier ones of the same id.
    pub serial: u64,
    /// As it was asked for, last.
    pub spec: PortSpec,
    /// Of `spec`, what the guest of the moment sees: differs in attributes that are pending.
    in_force: PortSpec,
    /// A change the thread has been asked for: the spec when it succeeds, with the cores and the offer.
    pub changing: Option<(PortSpec, Cores, Offer)>,
    /// The cores of its lanes, as placed: the VF may have queues for fewer.
    pub cores: Cores,
    counters: PortCounters,
    offer: Offer,
    /// What the offer was resolved with; kept, so that it stays what it is when the VF is replaced.
    offer_caps: Option<VfCaps>,
    /// What the VF in place can do.
    caps: Option<VfCaps>,
    thread: Thread,
    vf: Vf<V>,
    /// When its VF was last looked for.
    probed: Option<Instant>,
    stand_in: Option<VfSpec>,
    /// The thread will give the VF back, to be set up with what was changed: that is no failure.
    anew: bool,
    /// Why there is no VF.
    reason: Option<String>,
    /// It has been open, with a VF or known to wait for one: its attach was answered.
    pub settled: bool,
    /// It is on its way down.
    pub down: bool,
    /// The guest's side.
    pub status: PortStatus,
}

impl<V> Port<V> {
    /// Nothing is asked of the crew before the first [`Self::step`]. Of so many cores each may get a lane some day.
    pub fn new(serial: u64, spec: PortSpec, cores: Cores, poll_cores: usize) -> Self {
        Self {
            serial,
            in_force: spec.clone(),
            changing: None,
            cores,
            counters: PortCounters::new(poll_cores.clamp(1, MAX_PAIRS)),
            offer: spec.offer(None),
            offer_caps: None,
            caps: None,
            thread: Thread::None,
            vf: Vf::None,
            probed: None,
            stand_in: None,
            anew: false,
            reason: None,
            settled: false,
            down: false,
            status: PortStatus::default(),
            spec,
        }
    }

    /// Asks the crew for the next thing, if it is time. An error is final for a port that is not settled.
    pub fn step(&mut self, crew: &mut impl Crew<Vf = V>, policy: &Policy, now: Instant) -> Result<(), Error> {
        let id = &self.spec.id;
        match (self.down, self.thread, &self.vf) {
            (true, Thread::Open, _) => {
                self.thread = Thread::Closing;
                crew.close(id);
            }
            (true, Thread::None, Vf::Held(_)) => self.remove_vf(crew),
            (true, ..) => {}
            (false, Thread::None, Vf::None) => self.probe(crew, policy, now)?,
            (false, Thread::None, Vf::Held(_) | Vf::Absent(_)) => {
                self.offer_caps = self.caps.clone();
                self.offer = self.spec.offer(self.caps.as_ref());
                self.thread = Thread::Opening;
                crew.open(PortPlan {
                    id: id.to_string(),
                    socket: self.spec.socket_plan(),
                    offer: self.offer,
                    cores: self.cores.clone(),
                    zero_copy: self.spec.zero_copy,
                    guest_memory: policy.guest_memory,
                    counters: self.counters.clone(),
                });
            }
            (false, Thread::Open, Vf::None) => self.probe(crew, policy, now)?,
            (false, Thread::Open, Vf::Absent(again)) if *again <= now => self.probe(crew, policy, now)?,
            // A change on its way decides how it is configured.
            (false, Thread::Open, Vf::Held(_)) if self.changing.is_none() => {
                let Vf::Held(vf) = std::mem::replace(&mut self.vf, Vf::Starting) else { unreachable!("just matched") };
                self.anew = !self.in_force.deferred_differences(&self.spec).is_empty();
                let spec = self.stand_in.as_ref().unwrap_or(&self.spec.vfs[0]).clone();
                // Not what is pending: the guest of the moment would be served with what it was not offered.
                crew.give_vf(id, spec, vf, self.in_force.vf_config());
            }
            (false, ..) => {}
        }
        Ok(())
    }

    fn probe(&mut self, crew: &mut impl Crew<Vf = V>, policy: &Policy, now: Instant) -> Result<(), Error> {
        self.probed = Some(now);
        let id = &self.spec.id;
        let (vf, stands_in) = match policy.resolve(&self.spec.vfs[0]) {
            Ok(resolved) => resolved,
            Err(error) => return self.vf_error(error, now),
        };
        let stand_in = stands_in.then(|| vf.clone());
        if stand_in.is_some() && stand_in != self.stand_in {
            warn!(port = %id, "PCI device {} does not exist: {vf} STANDS IN for it", self.spec.vfs[0]);
        }
        self.stand_in = stand_in;
        self.vf = Vf::Probing;
        crew.probe(id, &vf);
        Ok(())
    }

    fn remove_vf(&mut self, crew: &mut impl Crew<Vf = V>) {
        if let Vf::Held(vf) = std::mem::replace(&mut self.vf, Vf::Removing) {
            crew.remove(&self.spec.id, vf);
        }
    }

    fn absent(&self, now: Instant) -> Vf<V> {
        Vf::Absent(self.probed.map_or(now, |probed| now.max(probed + RETRY)))
    }

    /// The VF did not come or did not work. A settled port waits for a better one.
    fn vf_error(&mut self, error: Error, now: Instant) -> Result<(), Error> {
        if !matches!(self.vf, Vf::Removing) {
            self.vf = self.absent(now);
        }
        if !self.settled && !matches!(error, Error::VfAbsent(_)) {
            return Err(error);
        }
        let reason = error.to_string();
        if self.reason.as_ref() != Some(&reason) {
            warn!(port = %self.spec.id, "waits for its VF: {reason}");
        }
        self.reason = Some(reason);
        Ok(())
    }

    /// Takes in an event of this port. An error is final for a port that is not settled.
    pub fn event(&mut self, event: Event<V>, crew: &mut impl Crew<Vf = V>, now: Instant) -> Result<(), Error> {
        match event {
            Event::Probed { result: Ok((vf, caps)), .. } => {
                debug_assert!(matches!(self.vf, Vf::Probing));
                self.caps = Some(caps);
                self.vf = Vf::Held(vf);
            }
            Event::Probed { result: Err(error), .. } => return self.vf_error(error, now),
            Event::Removed { result, .. } => {
                if let Err(error) = result {
                    error!(port = %self.spec.id, "a VF could not be removed and is lost until the daemon restarts: {error}");
                }
                self.vf = self.absent(now);
            }
            Event::Opened { result: Ok(()), .. } => self.thread = Thread::Open,
            Event::Opened { result: Err(error), .. } => {
                self.thread = Thread::None;
                return Err(error);
            }
            Event::VfReady { status, .. } => {
                if let Vf::Starting | Vf::Ready(_) = self.vf {
                    if matches!(self.vf, Vf::Starting) {
                        info!(port = %self.spec.id, "forwards through {}", status.spec);
                    }
                    self.reason = None;
                    self.caps = Some(status.caps.clone());
                    self.vf = Vf::Ready(status);
                }
            }
            Event::VfFailed { error, vf, .. } => {
                debug_assert!(matches!(self.vf, Vf::Starting | Vf::Ready(_)));
                self.caps = None;
                if std::mem::take(&mut self.anew) {
                    self.probed = None;
                }
                if let Some(vf) = vf {
                    // A fresh probe may do better; giving it back to the thread would not.
                    self.vf = Vf::Held(vf);
                    self.remove_vf(crew);
                }
                return self.vf_error(error, now);
            }
            Event::Status { status, .. } => {
                if !status.guest || status.connections != self.status.connections {
                    self.in_force = self.spec.clone();
                }
                self.status = status;
            }
            Event::Closed { vf, .. } => {
                if !self.down {
                    error!(port = %self.spec.id, "its thread ended unasked; it is started anew");
                }
                self.thread = Thread::None;
                self.status = PortStatus::default();
                match vf {
                    Some(vf) => self.vf = Vf::Held(vf),
                    None if matches!(self.vf, Vf::Starting | Vf::Ready(_)) => self.vf = Vf::None,
                    None => {}
                }
            }
            Event::Changed { .. } | Event::Stop => {}
        }
        Ok(())
    }

    /// Nothing is left of it: no thread, no socket, no VF.
    pub fn gone(&self) -> bool {
        self.down && self.thread == Thread::None && matches!(self.vf, Vf::None | Vf::Absent(_))
    }

    /// Its thread runs, or is starting or ending.
    pub fn has_thread(&self) -> bool {
        self.thread != Thread::None
    }

    /// It listens (or tries), and the VF forwards or is known to be waited for.
    pub fn up(&self) -> bool {
        !self.down && self.thread == Thread::Open && matches!(self.vf, Vf::Ready(_) | Vf::Absent(_))
    }

    /// When [`Self::step`] is due without an event.
    pub fn due(&self) -> Option<Instant> {
        match (self.down, self.thread, &self.vf) {
            (false, Thread::Open, Vf::Absent(again)) => Some(*again),
            _ => None,
        }
    }

    /// What to ask of the thread so that the port becomes `wanted`, of the same identity.
    pub fn change_to(&mut self, wanted: &PortSpec, cores: &Cores) -> (PortChange, Offer) {
        let caps = if wanted.offloads == self.spec.offloads { self.offer_caps.as_ref() } else { self.caps.as_ref() };
        let offer = wanted.offer(caps);
        let deferred = |from: &PortSpec| !from.deferred_differences(wanted).is_empty();
        let deferred = deferred(&self.spec) || deferred(&self.in_force);
        self.anew |= deferred;
        let change = PortChange {
            cores: (*cores != self.cores).then(|| cores.clone()),
            zero_copy: (wanted.zero_copy != self.spec.zero_copy).then_some(wanted.zero_copy),
            mac: wanted.mac.filter(|_| wanted.mac != self.spec.mac),
            socket: (wanted.socket_plan() != self.spec.socket_plan()).then(|| wanted.socket_plan()),
            next_connection: deferred.then(|| (offer, wanted.vf_config())),
        };
        (change, offer)
    }

    /// The change in flight was done, or (`false`) was not.
    pub fn changed(&mut self, done: bool) {
        let Some((spec, cores, offer)) = self.changing.take().filter(|_| done) else {
            return;
        };
        if spec.offloads != self.spec.offloads {
            self.offer_caps = self.caps.clone();
        }
        self.cores = cores;
        self.offer = offer;
        self.in_force = if self.status.guest {
            PortSpec {
                queue_pairs: self.in_force.queue_pairs,
                mtu: self.in_force.mtu,
                offloads: self.in_force.offloads.clone(),
                mac: spec.mac.or(self.in_force.mac),
                ..spec.clone()
            }
        } else {
            spec.clone()
        };
        self.spec = spec;
    }

    /// Attributes that wait for the guest of the moment to disconnect.
    pub fn pending(&self) -> Vec<String> {
        let names = self.in_force.deferred_differences(&self.spec);
        names.into_iter().map(str::to_owned).collect()
    }

    fn state(&self) -> State {
        match (self.down, self.settled, &self.vf) {
            (true, ..) => State::Detaching,
            (_, false, _) => State::Attaching,
            (_, _, Vf::Ready(_)) if self.status.guest => State::Connected,
            (_, _, Vf::Ready(_)) => State::Ready,
            (_, _, Vf::Starting | Vf::Held(_)) => State::Starting,
            _ => State::Waiting,
        }
    }

    /// The cores of the lanes that there are; of all that may be, while there is no VF.
    pub fn lanes(&self) -> &[(usize, usize)] {
        let lanes = self.vf_status().map_or(usize::MAX, |status| status.lanes);
        &self.cores[..lanes.min(self.cores.len())]
    }

    /// The CPUs of its lanes, of the daemon's poll cores.
    fn cpus(&self, cpus: &[usize]) -> LaneCpus {
        let (guest_to_vf, vf_to_guest) = self.lanes().iter().map(|(a, b)| (cpus[*a], cpus[*b])).unzip();
        LaneCpus { guest_to_vf, vf_to_guest }
    }

    fn vf_status(&self) -> Option<&VfStatus> {
        match &self.vf {
            Vf::Ready(status) => Some(status),
            _ => None,
        }
    }

    fn vf_view(&self) -> Option<VfView> {
        self.vf_status().map(stats::vf_view)
    }

    /// Why frames are copied, in each direction.
    fn copies(&self) -> Copies {
        let both = |why: &str| Copies { guest_to_vf: Some(why.to_owned()), vf_to_guest: Some(why.to_owned()) };
        let Some(vf) = self.vf_status() else {
            return both("there is no VF");
        };
        if self.spec.zero_copy == ZeroCopy::Off {
            return both("zero_copy is off");
        }
        let hindrance = || self.status.copies.clone();
        let shortage = || match self.counters.vf_to_guest.shortage() {
            _ if !self.status.guest => None,
            Shortage::None => None,
            Shortage::Few => Some("the guest has posted no more buffers than the VF holds ready".into()),
            Shortage::Unfit => Some("the guest's buffers are shorter than what the VF may write, or in pieces".into()),
        };
        Copies {
            guest_to_vf: vf.caps.copies.clone().map(Into::into).or_else(hindrance),
            vf_to_guest: vf.caps.copies_received.clone().map(Into::into).or_else(hindrance).or_else(shortage),
        }
    }

    /// For clients.
    pub fn view(&self, cpus: &[usize]) -> PortView {
        PortView {
            id: self.spec.id.clone(),
            state: self.state(),
            reason: self.reason.clone(),
            socket: self.spec.socket_view(),
            vfs: self.spec.vfs.clone(),
            vf: self.vf_view(),
            stand_in: self.stand_in.clone(),
            queue_pairs: self.spec.queue_pairs,
            mtu: self.spec.mtu,
            mac: self.spec.mac,
            cores: (cpus[self.cores[0].0], cpus[self.cores[0].1]),
            lanes: self.cpus(cpus),
            offloads: self.spec.offloads.clone(),
            offered: self.offer.offloads(),
            zero_copy: self.spec.zero_copy,
            copies: self.copies(),
            pending: self.pending(),
            guest: self.status.clone(),
        }
    }

    /// Its counters, for clients.
    pub fn stats(&self, cpus: &[usize], now: Instant) -> PortStats {
        let LaneCpus { guest_to_vf, vf_to_guest } = self.cpus(cpus);
        let (to_vf, to_guest) = (&self.counters.guest_to_vf, &self.counters.vf_to_guest);
        PortStats {
            id: self.spec.id.clone(),
            state: self.state(),
            guest_to_vf: stats::all_lanes(guest_to_vf[0], to_vf),
            vf_to_guest: stats::all_lanes(vf_to_guest[0], to_guest),
            lanes: LanesStats {
                guest_to_vf: stats::each_lane(&guest_to_vf, to_vf),
                vf_to_guest: stats::each_lane(&vf_to_guest, to_guest),
            },
            vf: self.vf_view(),
            xstats: self.vf_status().map(|status| status.xstats.iter().cloned().collect()).unwrap_or_default(),
            xstats_age_ms: self.vf_status().map(|status| now.duration_since(status.read).as_millis() as u64),
        }
    }
}

impl<V> Event<V> {
    /// Whose event it is; `None`: [`Event::Stop`].
    pub(super) fn port(&self) -> Option<&PortId> {
        match self {
            Self::Probed { port, .. }
            | Self::Removed { port, .. }
            | Self::Opened { port, .. }
            | Self::VfReady { port, .. }
            | Self::VfFailed { port, .. }
            | Self::Changed { port, .. }
            | Self::Status { port, .. }
            | Self::Closed { port, .. } => Some(port),
            Self::Stop => None,
        }
    }
}
