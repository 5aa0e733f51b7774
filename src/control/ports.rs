//! The decisions over all ports: who may have which VF and socket, what a request changes, and when it
//! is answered.
//!
//! Nothing here waits. A request that cannot be answered yet becomes a [`Pending`]; after every request
//! and event all of them are looked at again, in order of arrival, until nothing moves. An attach that
//! has to wait (for a port that goes down, or for an earlier attach it overlaps with) is decided anew
//! each time, so that it is always decided on what is.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Map, Value};
use tracing::{error, info, warn};

use super::api::{Attach, Attached, Detached, Method, PortList, Selector, Stats, StatsQuery, Sync, Synced};
use super::placement::Cores;
use super::policy::INTERFACE_CLAIM;
use super::port::Port;
use super::rpc::RpcError;
use super::{Crew, DaemonInfo, Event, Failure, Placement, Policy, PortId, PortSpec, SocketDefaults};
use crate::error::Error;

/// How long the daemon, when it ends, waits for a port's thread while nothing else happens. A thread that is
/// alive needs less to answer its front end, to drain its lanes and to stop a VF.
const PATIENCE: Duration = Duration::from_millis(500);

/// And how long for the device thread, which probes and removes one VF after the other: drivers take their time.
const DRIVER_PATIENCE: Duration = Duration::from_secs(5);

/// Names a request; chosen by the caller of [`Ports::call`], unique among those not yet answered.
pub type Token = u64;

/// All ports, and the requests about them that are not answered yet.
pub struct Ports<C: Crew> {
    crew: C,
    policy: Policy,
    defaults: SocketDefaults,
    info: DaemonInfo,
    ports: BTreeMap<PortId, Port<C::Vf>>,
    pending: Vec<Pending>,
    answers: Vec<(Token, Result<Value, RpcError>)>,
    next_serial: u64,
    /// The daemon ends. When a thread was last done with something, or it began to end.
    stopping: Option<Instant>,
    /// Something happened in this turn that may let others go further.
    moved: bool,
}

/// A request that is not answered yet.
struct Pending {
    token: Token,
    /// `None` while it is looked at, and when it was answered.
    wait: Option<Wait>,
}

enum Wait {
    /// For an attach to be possible.
    Attach {
        spec: Box<PortSpec>,
        takeover: bool,
        /// Whom it has been taken from so far.
        taken_from: Vec<PortId>,
    },
    /// For a port to listen, with its VF or known to wait for it.
    Up { serial: u64, taken_from: Vec<PortId> },
    /// For a change of a port to be done.
    Change { serial: u64 },
    /// For ports to be gone.
    Gone { serials: BTreeSet<u64>, then: Box<Answer> },
}

type Answer = Result<Value, Failure>;

/// What becomes of an attach now.
enum Decision {
    Answer(Answer),
    Wait(Wait),
}

impl<C: Crew> Ports<C> {
    /// No ports.
    pub fn new(crew: C, policy: Policy, defaults: SocketDefaults, info: DaemonInfo) -> Self {
        Self {
            crew,
            policy,
            defaults,
            info,
            ports: BTreeMap::new(),
            pending: vec![],
            answers: vec![],
            next_serial: 0,
            stopping: None,
            moved: false,
        }
    }

    /// Starts a request; its answer comes out of [`Self::answers`], perhaps at once.
    pub fn call(&mut self, token: Token, method: &str, params: Map<String, Value>, now: Instant) {
        match Method::parse(method, params) {
            Err(error) => self.answers.push((token, Err(error))),
            Ok(method) => match self.start(method, now) {
                Decision::Answer(answer) => self.answer(token, answer),
                Decision::Wait(wait) => self.pending.push(Pending { token, wait: Some(wait) }),
            },
        }
        self.turn(now);
    }

    /// Takes in what the crew has to say.
    pub fn event(&mut self, event: Event<C::Vf>, now: Instant) {
        let Some(id) = event.port().cloned() else {
            self.stop(now);
            return self.turn(now);
        };
        let Some(port) = self.ports.get_mut(&id) else {
            error!(port = %id, "an event of a port that is not there");
            return;
        };
        if let (Some(progress), Event::Closed { .. } | Event::Probed { .. } | Event::Removed { .. }) =
            (&mut self.stopping, &event)
        {
            *progress = now;
        }
        match event {
            Event::Changed { result, .. } => {
                port.changed(result.is_ok());
                let serial = port.serial;
                self.answer_change(serial, result.map_err(Failure::from));
            }
            event => {
                if let Err(error) = port.event(event, &mut self.crew, now) {
                    self.roll_back(&id, error);
                }
            }
        }
        self.turn(now);
    }

    /// Does what is due without an event.
    pub fn tick(&mut self, now: Instant) {
        if let Some(progress) = self.stopping {
            self.abandon(now.saturating_duration_since(progress));
        }
        self.turn(now);
    }

    /// When [`Self::tick`] is due.
    pub fn due(&self) -> Option<Instant> {
        let patience = if self.ports.values().any(Port::has_thread) { PATIENCE } else { DRIVER_PATIENCE };
        let stuck = self.stopping.filter(|_| !self.ports.is_empty()).map(|progress| progress + patience);
        self.ports.values().filter_map(Port::due).chain(stuck).min()
    }

    /// The answers since the last call; each request gets exactly one.
    pub fn answers(&mut self) -> std::vec::Drain<'_, (Token, Result<Value, RpcError>)> {
        self.answers.drain(..)
    }

    /// [`Event::Stop`] was received and every port is gone, or was given up.
    pub fn finished(&self) -> bool {
        self.stopping.is_some() && self.ports.is_empty()
    }

    #[cfg(test)]
    pub(super) fn crew(&mut self) -> &mut C {
        &mut self.crew
    }

    fn start(&mut self, method: Method, now: Instant) -> Decision {
        Decision::Answer(match method {
            Method::Attach(request) => return self.attach(&request),
            Method::Detach(selector) => return self.detach(&selector),
            Method::Sync(sync) => return self.sync(&sync),
            Method::List => {
                value(&PortList { ports: self.ports.values().map(|port| port.view(&self.info.cpus)).collect() })
            }
            Method::Show(selector) => self.show(&selector),
            Method::Stats(query) => self.stats(&query, now),
            Method::Info => value(&self.info.view(now, &self.lanes(usize::MAX), self.ports.len(), self.policy.view())),
        })
    }

    fn attach(&mut self, request: &Attach) -> Decision {
        let spec = match PortSpec::new(request, &self.policy, &self.defaults)
            // Cores are chosen when the port starts; wrong ones are refused before anything is taken down.
            .and_then(|spec| self.place(&spec, &[]).map(|_| spec))
        {
            Ok(spec) => spec,
            Err(error) => return Decision::Answer(Err(error.into())),
        };
        Decision::Wait(Wait::Attach { spec: Box::new(spec), takeover: request.takeover, taken_from: vec![] })
    }

    /// Cores for a port that has those of `now`.
    fn place(&self, spec: &PortSpec, now: &[(usize, usize)]) -> Result<Cores, Error> {
        let (lanes, first) = (self.lanes(usize::MAX), self.lanes(1));
        let placement = Placement { cpus: &self.info.cpus, lanes: &lanes, first: &first };
        placement.place(&spec.cores, spec.queue_pairs.into(), now)
    }

    /// Lanes on each core, of the first so many of each port's.
    fn lanes(&self, first: usize) -> Vec<usize> {
        let mut lanes = vec![0; self.info.cpus.len()];
        for (guest_to_vf, vf_to_guest) in self.ports.values().flat_map(|port| port.lanes().iter().take(first)) {
            lanes[*guest_to_vf] += 1;
            lanes[*vf_to_guest] += 1;
        }
        lanes
    }

    /// Decides about an attach, on what is now. Changes nothing unless it can succeed.
    fn decide(&mut self, spec: Box<PortSpec>, takeover: bool, mut taken_from: Vec<PortId>, index: usize) -> Decision {
        if self.stopping.is_some() {
            return Decision::Answer(Err(Failure::stopping()));
        }
        let wait = |spec, taken_from| Decision::Wait(Wait::Attach { spec, takeover, taken_from });
        // Behind earlier attaches that it overlaps with.
        let overlaps = |earlier: &Pending| match &earlier.wait {
            Some(Wait::Attach { spec: other, .. }) => other.id == spec.id || !other.claims.is_disjoint(&spec.claims),
            _ => false,
        };
        let mut waits = self.pending[..index].iter().any(overlaps);
        let mut to_take_down = vec![];
        if let Some(port) = self.ports.get(&spec.id) {
            let differences = port.spec.identity_differences(&spec);
            if port.down {
                waits = true;
            } else if differences.is_empty() {
                return if waits || !port.settled || port.changing.is_some() {
                    wait(spec, taken_from)
                } else {
                    self.change(*spec)
                };
            } else if port.status.guest {
                return Decision::Answer(Err(Failure::differs(&spec.id, &differences)));
            } else {
                to_take_down.push(spec.id.clone());
            }
        }
        for (id, other) in &self.ports {
            if *id == spec.id {
                continue;
            }
            // A device says more than the interface it is on.
            let claims = other.spec.claims.intersection(&spec.claims);
            let Some(claim) = claims.min_by_key(|claim| claim.starts_with(INTERFACE_CLAIM)) else {
                continue;
            };
            if other.down {
                waits = true;
            } else if !takeover || other.status.guest {
                return Decision::Answer(Err(Failure::held(claim, id, other.status.guest)));
            } else {
                to_take_down.push(id.clone());
            }
        }
        if waits {
            return wait(spec, taken_from);
        }
        for id in &to_take_down {
            if *id == spec.id {
                info!(port = %id, "is replaced");
            } else {
                warn!(port = %id, by = %spec.id, "is taken down: another port takes what it held");
                taken_from.push(id.clone());
            }
            self.take_down(id, || Failure::superseded(id));
        }
        if !to_take_down.is_empty() {
            return wait(spec, taken_from);
        }
        let cores = match self.place(&spec, &[]) {
            Ok(cores) => cores,
            Err(error) => return Decision::Answer(Err(error.into())),
        };
        let serial = self.next_serial;
        self.next_serial += 1;
        info!(port = %spec.id, "attaching");
        let id = spec.id.clone();
        self.ports.insert(id, Port::new(serial, *spec, cores, self.info.cpus.len()));
        self.moved = true;
        Decision::Wait(Wait::Up { serial, taken_from })
    }

    /// An attach of a port that is there: nothing, or its attributes.
    fn change(&mut self, spec: PortSpec) -> Decision {
        let place = self.place(&spec, &self.ports[&spec.id].cores);
        let port = self.ports.get_mut(&spec.id).expect("just found");
        if !port.spec.attributes_differ(&spec) {
            return Decision::Answer(attached(port, &self.info.cpus, false, vec![]));
        }
        let cores = match place {
            // Not even others that would be less loaded now.
            _ if spec.cores.is_empty() && spec.queue_pairs == port.spec.queue_pairs => port.cores.clone(),
            Ok(cores) => cores,
            Err(error) => return Decision::Answer(Err(error.into())),
        };
        let (change, offer) = port.change_to(&spec, &cores);
        info!(port = %spec.id, ?change, "changes");
        let nothing = change == Default::default();
        let id = spec.id.clone();
        port.changing = Some((spec, cores, offer));
        if nothing {
            port.changed(true);
            return Decision::Answer(attached(port, &self.info.cpus, true, vec![]));
        }
        self.crew.change(&id, change);
        Decision::Wait(Wait::Change { serial: port.serial })
    }

    fn answer_change(&mut self, serial: u64, result: Result<(), Failure>) {
        let waiting = |pending: &Pending| matches!(pending.wait, Some(Wait::Change { serial: of }) if of == serial);
        // None if the port went down meanwhile: then it is answered that.
        if let Some(index) = self.pending.iter().position(waiting) {
            match result {
                // Perhaps its VF is set up anew.
                Ok(()) => self.pending[index].wait = Some(Wait::Up { serial, taken_from: vec![] }),
                Err(failure) => {
                    let token = self.pending.remove(index).token;
                    self.answer(token, Err(failure));
                }
            }
        }
    }

    fn detach(&mut self, selector: &Selector) -> Decision {
        // Soft VFs are not somebody's: several ports may have one.
        let several: Vec<_> = self.ports.values().filter(|port| self.selects(selector, &port.spec)).collect();
        if several.len() > 1 {
            let ids: Vec<_> = several.iter().map(|port| port.spec.id.to_string()).collect();
            let what = format!("{} ports match: {}; detach by id", ids.len(), ids.join(", "));
            return Decision::Answer(Err(Error::Conflict(what).into()));
        }
        // An attach that has not begun is called off as if it had.
        let (matching, others): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.pending).into_iter().partition(|pending| match &pending.wait {
                Some(Wait::Attach { spec, .. }) => self.selects(selector, spec),
                _ => false,
            });
        self.pending = others;
        let mut id = None;
        for Pending { token, wait } in matching {
            if let Some(Wait::Attach { spec, .. }) = wait {
                self.answer(token, Err(Failure::superseded(&spec.id)));
                id = Some(spec.id);
            }
        }
        let found = self.ports.values().find(|port| self.selects(selector, &port.spec));
        let serials = found.map(|port| port.serial).into_iter().collect();
        if let Some(port) = found {
            let found = port.spec.id.clone();
            if !port.down {
                info!(port = %found, "detaching");
            }
            self.take_down(&found, || Failure::superseded(&found));
            id = Some(found);
        }
        let changed = id.is_some();
        let then = Box::new(value(&Detached { changed, id }));
        Decision::Wait(Wait::Gone { serials, then })
    }

    fn sync(&mut self, sync: &Sync) -> Decision {
        // A port on its way down is there no more.
        let stays = |id: &PortId| self.ports.get(id).is_some_and(|port| !port.down);
        let surplus: Vec<PortId> =
            self.ports.keys().filter(|id| stays(id) && !sync.ids.contains(*id)).cloned().collect();
        let missing = sync.ids.iter().filter(|id| !stays(id));
        let answer =
            value(&Synced { missing: missing.cloned().collect(), surplus: surplus.clone(), removed: sync.remove });
        if !sync.remove {
            return Decision::Answer(answer);
        }
        let going = self.ports.iter().filter(|(id, port)| port.down && !sync.ids.contains(*id));
        let mut serials: BTreeSet<_> = going.map(|(_, port)| port.serial).collect();
        for id in surplus {
            warn!(port = %id, "detaching: not in the set of ports that should be");
            if let Decision::Wait(Wait::Gone { serials: more, .. }) = self.detach(&Selector::Id(id)) {
                serials.extend(more);
            }
        }
        let then = Box::new(answer);
        Decision::Wait(Wait::Gone { serials, then })
    }

    fn selects(&self, selector: &Selector, spec: &PortSpec) -> bool {
        match selector {
            Selector::Id(id) => spec.id == *id,
            Selector::Vf(vf) => spec.vfs.contains(vf),
            Selector::Socket(path) => {
                let path = std::path::Path::new(path);
                spec.path.path == path || spec.path.real == path
            }
        }
    }

    fn show(&self, selector: &Selector) -> Answer {
        let port = self.ports.values().find(|port| self.selects(selector, &port.spec));
        let port = port.ok_or_else(|| Failure::not_found(selector))?;
        value(&port.view(&self.info.cpus))
    }

    fn stats(&self, query: &StatsQuery, now: Instant) -> Answer {
        let wanted = |id: &PortId| query.id.as_ref().is_none_or(|wanted| wanted == id);
        let ports: Vec<_> =
            self.ports.iter().filter(|(id, _)| wanted(id)).map(|(_, port)| port.stats(&self.info.cpus, now)).collect();
        match &query.id {
            Some(id) if ports.is_empty() => Err(Failure::not_found(&Selector::Id(id.clone()))),
            _ => value(&Stats { time_us: now.duration_since(self.info.started).as_micros() as u64, ports }),
        }
    }

    fn stop(&mut self, now: Instant) {
        self.stopping.get_or_insert(now);
        let ids: Vec<_> = self.ports.keys().cloned().collect();
        for id in ids {
            self.take_down(&id, Failure::stopping);
        }
    }

    /// The daemon ends without the threads that do nothing for so long; the crew names those of ports when it goes.
    fn abandon(&mut self, idle: Duration) {
        if idle >= PATIENCE {
            self.ports.retain(|_, port| !port.has_thread());
        }
        if idle >= DRIVER_PATIENCE {
            for id in std::mem::take(&mut self.ports).into_keys() {
                error!(port = %id, "the driver of its VF does not return: ending without it");
            }
        }
    }

    /// A port could not be set up: undoes what was done; its attach is answered when all of it is undone.
    fn roll_back(&mut self, id: &PortId, error: Error) {
        error!(port = %id, "{error}");
        let mut error = Some(error);
        self.take_down(id, || match error.take() {
            Some(error) => error.into(),
            None => Failure::superseded(id),
        });
    }

    /// Sends a port on its way down. Requests that wait for it to come up or to change fail, once it is gone.
    fn take_down(&mut self, id: &PortId, mut why: impl FnMut() -> Failure) {
        let Some(port) = self.ports.get_mut(id).filter(|port| !port.down) else {
            return;
        };
        port.down = true;
        self.moved = true;
        let gone = port.serial;
        for pending in &mut self.pending {
            if let Some(Wait::Up { serial, .. } | Wait::Change { serial }) = pending.wait
                && serial == gone
            {
                pending.wait = Some(Wait::Gone { serials: BTreeSet::from([gone]), then: Box::new(Err(why())) });
            }
        }
    }

    /// Lets every port and every pending request go as far as they can.
    fn turn(&mut self, now: Instant) {
        loop {
            self.moved = false;
            self.step_ports(now);
            for index in 0..self.pending.len() {
                if let Some(wait) = self.pending[index].wait.take() {
                    match self.proceed(wait, index) {
                        Decision::Wait(wait) => self.pending[index].wait = Some(wait),
                        Decision::Answer(answer) => self.answer(self.pending[index].token, answer),
                    }
                }
            }
            self.pending.retain(|pending| pending.wait.is_some());
            if !self.moved {
                return;
            }
        }
    }

    fn step_ports(&mut self, now: Instant) {
        let mut failed = vec![];
        for (id, port) in &mut self.ports {
            if let Err(error) = port.step(&mut self.crew, &self.policy, now) {
                failed.push((id.clone(), error));
            }
            port.settled |= port.up();
        }
        for (id, error) in failed {
            self.roll_back(&id, error);
        }
        self.ports.retain(|id, port| {
            if port.gone() {
                info!(port = %id, "gone");
            }
            !port.gone()
        });
    }

    /// Looks at a request again; those before `index` came earlier.
    fn proceed(&mut self, wait: Wait, index: usize) -> Decision {
        let find = |serial| self.ports.values().find(|port| port.serial == serial);
        match wait {
            Wait::Attach { spec, takeover, taken_from } => self.decide(spec, takeover, taken_from, index),
            Wait::Up { serial, taken_from } => match find(serial) {
                Some(port) if port.up() => Decision::Answer(attached(port, &self.info.cpus, true, taken_from)),
                _ => Decision::Wait(Wait::Up { serial, taken_from }),
            },
            Wait::Gone { serials, then } => {
                if serials.iter().any(|serial| find(*serial).is_some()) {
                    Decision::Wait(Wait::Gone { serials, then })
                } else {
                    Decision::Answer(*then)
                }
            }
            Wait::Change { serial } => Decision::Wait(Wait::Change { serial }),
        }
    }

    fn answer(&mut self, token: Token, answer: Answer) {
        self.moved = true;
        let answer = answer.map_err(|failure| RpcError::from(&failure));
        self.answers.push((token, answer));
    }
}

/// A result for a client. All of them are plain data with string keys, which cannot fail.
fn value(result: &impl Serialize) -> Answer {
    Ok(serde_json::to_value(result).expect("plain data with string keys"))
}

fn attached<V>(port: &Port<V>, cpus: &[usize], changed: bool, taken_from: Vec<PortId>) -> Answer {
    value(&Attached { changed, pending: port.pending(), taken_from, port: port.view(cpus) })
}
