//! The port thread: joins one session, one VF and their lanes.
//!
//! It blocks in one place, `poll`, on the port's socket and its commands. All that is slow of a port is done
//! here, so that it delays no other port: starting a VF, mapping memory, waiting for a stuck front end.

use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;
use tracing::{info, warn};

use super::admission::Admission;
use super::conversation::{Outcome, Session};
use super::lanes::PortLanes;
use super::port_log::PortLog;
use super::socket::{self, ServerSocket};
use super::wire::{Connection, Received};
use super::{Lanes, Offer, SessionState};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::relay::Poller;
use crate::vf::{Mac, Vf, VfConfig, VfSpec};

pub use super::plan::{PortCounters, PortPlan, PortStatus, RingStatus, Role, SocketPlan, VfStatus, ZeroCopy};

/// How often link state, statistics and quarantined rings are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Most messages answered, and how long about, before the clock is looked at again. For a command it is left after
/// the message it is at, which may wait as long as [`super::wire`] does for a reply to be read.
const MESSAGES: usize = 64;
const CONVERSATION: Duration = Duration::from_millis(100);

/// A command to a port thread.
#[derive(Debug)]
pub enum PortCommand {
    /// Configure and start this VF, and forward. Answer: [`PortEvent::VfReady`] or [`PortEvent::VfFailed`].
    GiveVf {
        /// Which.
        spec: VfSpec,
        /// Probed, and not configured.
        vf: Vf,
        /// What it is to be.
        config: VfConfig,
    },
    /// Change attributes. Answer: [`PortEvent::Changed`].
    Change {
        /// Cores of the lanes: see [`PortPlan::cores`].
        cores: Option<Vec<(usize, usize)>>,
        /// Whether frames may be moved without a copy.
        zero_copy: Option<ZeroCopy>,
        /// MAC of the VF.
        mac: Option<Mac>,
        /// Owner, group and mode of a listening socket.
        socket: Option<SocketPlan>,
        /// When no guest is connected: what the next one is offered.
        next_connection: Option<(Offer, VfConfig)>,
    },
    /// Drain, stop the VF, remove the socket, end. Answer: [`PortEvent::Closed`].
    Close,
}

/// What a port thread tells.
#[derive(Debug)]
pub enum PortEvent {
    /// The first: the socket listens with its final owner and mode, or the client has begun to try.
    Opened(Result<()>),
    /// The VF forwards; again whenever it was looked at.
    VfReady(VfStatus),
    /// The VF does not forward; here it is, stopped.
    VfFailed {
        /// Why.
        error: Error,
        /// Probed, and not configured.
        vf: Option<Vf>,
    },
    /// A change was made, or not.
    Changed(Result<()>),
    /// The port's view has changed.
    Status(PortStatus),
    /// The last: the thread ends, socket and lanes are gone.
    Closed {
        /// The VF, stopped, if there was one.
        vf: Option<Vf>,
    },
}

/// The handle of a port thread.
#[derive(Debug)]
pub struct PortThread {
    commands: Sender<PortCommand>,
    /// The thread's own: it goes with it.
    wake: Weak<Event>,
    thread: JoinHandle<()>,
}

impl PortThread {
    /// Starts it. `tell` is called on the thread and must not block.
    pub fn start(plan: PortPlan, pollers: Arc<Vec<Poller>>, tell: impl Fn(PortEvent) + Send + 'static) -> Result<Self> {
        let name = plan.id.chars().take(10).collect::<String>();
        let wake = Arc::new(Event::new("a port")?);
        let (commands, inbox) = crossbeam::channel::unbounded();
        let ours = Arc::downgrade(&wake);
        let thread = std::thread::Builder::new()
            .name(format!("port-{name}"))
            .spawn(move || match Port::open(plan, pollers, inbox, wake, &tell) {
                Ok(mut port) => {
                    tell(PortEvent::Opened(Ok(())));
                    port.run();
                    let vf = port.close();
                    drop(port);
                    tell(PortEvent::Closed { vf });
                }
                Err(error) => tell(PortEvent::Opened(Err(error))),
            })
            .map_err(Error::io("cannot start a port's thread"))?;
        Ok(Self { commands, wake: ours, thread })
    }

    /// Sends a command. Returns at once.
    pub fn send(&self, command: PortCommand) {
        // A thread that has ended has told so; the command is moot.
        let _ = self.commands.send(command);
        if let Some(wake) = self.wake.upgrade() {
            wake.signal();
        }
    }

    /// Whether the thread has ended, or is about to: it has told [`PortEvent::Closed`] or a failed `Opened`.
    pub fn is_over(&self) -> bool {
        self.wake.strong_count() == 0
    }

    /// The thread, to be joined.
    pub fn into_handle(self) -> JoinHandle<()> {
        self.thread
    }
}

/// A connected front end.
struct Guest {
    connection: Connection,
    session: Session,
}

/// What the thread owns.
struct Port<'tell> {
    plan: PortPlan,
    tell: &'tell dyn Fn(PortEvent),
    commands: Receiver<PortCommand>,
    wake: Arc<Event>,
    lanes: PortLanes,
    /// Of a server port.
    listener: Option<ServerSocket>,
    guest: Option<Guest>,
    /// When the next one is taken.
    admission: Admission,
    log: Rc<PortLog>,
    connections: u64,
    last_error: Option<String>,
    told: PortStatus,
    quarantined: u64,
    /// By lane, frames that the VF was done with at the last look, if it had others.
    owed: Vec<Option<u64>>,
    /// When to take back what is posted in memory that nothing is lent in any more, after zero-copy was switched.
    switched: Option<Instant>,
    next_look: Instant,
    next_connection: Option<(Offer, VfConfig)>,
    closing: bool,
}

impl<'tell> Port<'tell> {
    fn open(
        plan: PortPlan,
        pollers: Arc<Vec<Poller>>,
        commands: Receiver<PortCommand>,
        wake: Arc<Event>,
        tell: &'tell dyn Fn(PortEvent),
    ) -> Result<Self> {
        let Offer { queue_pairs, mtu, .. } = plan.offer;
        let log = Rc::new(PortLog::new(&plan.id));
        let counters = plan.counters.clone();
        let mut lanes = PortLanes::new(&plan.id, log.clone(), pollers, &plan.cores, counters, queue_pairs, mtu)?;
        lanes.set_zero_copy(plan.zero_copy);
        let listener = match plan.socket.role {
            Role::Server => Some(ServerSocket::bind(&plan.socket)?),
            Role::Client => None,
        };
        Ok(Self {
            plan,
            tell,
            commands,
            wake,
            lanes,
            listener,
            guest: None,
            admission: Admission::new(Instant::now()),
            log,
            connections: 0,
            last_error: None,
            told: PortStatus::default(),
            quarantined: 0,
            owed: Vec::new(),
            switched: None,
            next_look: Instant::now(),
            next_connection: None,
            closing: false,
        })
    }

    fn run(&mut self) {
        while !self.closing {
            self.connect();
            let ready = self.wait();
            self.obey();
            if ready {
                match &mut self.guest {
                    Some(_) => self.converse(),
                    None => self.accept(),
                }
            }
            self.look();
            if self.lanes.is_silenced() {
                self.part(None);
            }
            self.map();
            self.tell_status();
        }
    }

    /// Waits for a command, the socket, or the time to look or retry. Whether the socket is ready.
    fn wait(&mut self) -> bool {
        let now = Instant::now();
        let mut limit = match self.lanes.is_mapping() {
            true => Duration::ZERO,
            false => self.next_look.saturating_duration_since(now),
        };
        let closed = self.admission.closed_for(now);
        let socket: Option<BorrowedFd<'_>> = match (&self.guest, &self.listener) {
            (Some(guest), _) => Some(guest.connection.as_fd()),
            (None, Some(listener)) if closed.is_zero() => Some(listener.as_fd()),
            (None, _) => {
                limit = limit.min(closed);
                None
            }
        };
        let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
        let wake = PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN);
        let mut ready = false;
        match socket {
            Some(socket) => {
                let mut fds = [wake, PollFd::from_borrowed_fd(socket, PollFlags::IN)];
                let _ = poll(&mut fds, Some(&limit));
                ready = !fds[1].revents().is_empty();
            }
            None => {
                let _ = poll(&mut [wake], Some(&limit));
            }
        }
        self.wake.take();
        ready
    }

    /// A client port without a guest tries to connect.
    fn connect(&mut self) {
        let now = Instant::now();
        if self.guest.is_some() || self.listener.is_some() || !self.admission.closed_for(now).is_zero() {
            return;
        }
        self.admission.begin(now);
        match socket::try_connect(&self.plan.socket.path) {
            Ok(Some(stream)) => self.welcome(Connection::new(stream)),
            // Most often nobody listens yet: that is no error.
            Ok(None) => {}
            Err(error) => self.last_error = Some(error.to_string()),
        }
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        self.admission.begin(Instant::now());
        match listener.accept() {
            Ok(Some(stream)) => self.welcome(Connection::new(stream)),
            Ok(None) => {}
            // Out of fds, most likely: who waits goes on waiting.
            Err(error) => self.last_error = Some(error.to_string()),
        }
    }

    fn welcome(&mut self, connection: Result<Connection>) {
        match connection {
            Ok(connection) => {
                if self.log.allows() {
                    info!(port = %self.plan.id, "front end connected");
                }
                self.connections += 1;
                self.last_error = None;
                let session = Session::limited(self.plan.offer, self.plan.guest_memory);
                self.guest = Some(Guest { connection, session });
            }
            Err(error) => self.last_error = Some(error.to_string()),
        }
    }

    /// Answers what the front end has sent, until there is no whole message more.
    fn converse(&mut self) {
        // A front end that never stops talking, or reads too slowly, does not keep us from everything else.
        let end = Instant::now() + CONVERSATION;
        for _ in 0..MESSAGES {
            if !self.commands.is_empty() || Instant::now() >= end {
                return;
            }
            let Some(guest) = &mut self.guest else { return };
            let answered = match guest.connection.poll_request() {
                Ok(Received::Pending) => return,
                Ok(Received::Closed) => return self.part(None),
                Ok(Received::Request(request)) => guest.session.handle(request, &mut self.lanes),
                Err(error) => Err(error),
            };
            // Before the reply: who has it finds in `port.show` what it confirms.
            self.tell_status();
            let Some(guest) = &mut self.guest else { return };
            let sent = match answered {
                Ok(Outcome::Silent) => Ok(()),
                Ok(Outcome::Reply(reply)) => guest.connection.send(&reply),
                Ok(Outcome::Refused(reply, error)) => {
                    if self.log.allows() {
                        warn!(port = %self.plan.id, %error, "message refused");
                    }
                    self.last_error = Some(error.to_string());
                    guest.connection.send(&reply)
                }
                Err(error) => Err(error),
            };
            if let Err(error) = sent {
                return self.part(Some(error));
            }
        }
    }

    /// The front end is gone, or has to go: its rings leave the lanes, its memory is unmapped.
    fn part(&mut self, error: Option<Error>) {
        let Some(guest) = self.guest.take() else { return };
        drop(guest.session.suspend(&mut self.lanes));
        let penalty = self.admission.end(Instant::now(), self.lanes.forgive());
        let blocked = penalty.map(|penalty| {
            Error::Protocol(format!(
                "a call or err eventfd blocks, which holds up a core: the connection is closed, the next one is \
                 taken in {penalty:?}"
            ))
        });
        let error = blocked.or(error);
        if self.log.allows() {
            match &error {
                Some(error) => warn!(port = %self.plan.id, %error, "front end disconnected"),
                None => info!(port = %self.plan.id, "front end disconnected"),
            }
        }
        self.last_error = error.map(|error| error.to_string());
        self.reshape();
    }

    /// Commands of control.
    fn obey(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                PortCommand::GiveVf { spec, vf, config } => self.give_vf(spec, vf, &config),
                PortCommand::Change { cores, zero_copy, mac, socket, next_connection } => {
                    let result = self.change(mac, socket);
                    if result.is_ok() {
                        self.move_lanes(cores.as_deref(), zero_copy);
                    }
                    if let (Ok(()), Some(next)) = (&result, next_connection) {
                        self.next_connection = Some(next);
                        self.reshape();
                    }
                    (self.tell)(PortEvent::Changed(result));
                }
                PortCommand::Close => {
                    self.closing = true;
                    return;
                }
            }
        }
    }

    /// Runs `work` while nothing of the guest's is in a lane, then lets its rings run again.
    fn while_drained<R>(&mut self, work: impl FnOnce(&mut PortLanes) -> R) -> R {
        match &mut self.guest {
            Some(guest) => {
                guest.session.drain(&mut self.lanes);
                let result = work(&mut self.lanes);
                guest.session.hand_out(&mut self.lanes);
                result
            }
            None => {
                self.lanes.drain(&mut SessionState::default());
                work(&mut self.lanes)
            }
        }
    }

    fn give_vf(&mut self, spec: VfSpec, vf: Vf, config: &VfConfig) {
        match self.while_drained(|lanes| lanes.give_vf(spec, vf, config)) {
            Ok(()) => self.tell_vf(),
            Err(failed) => {
                let (error, vf) = *failed;
                (self.tell)(PortEvent::VfFailed { error, vf: Some(vf) });
            }
        }
    }

    /// To other cores, or to another way of moving frames.
    fn move_lanes(&mut self, cores: Option<&[(usize, usize)]>, zero_copy: Option<ZeroCopy>) {
        if cores.is_none() && zero_copy.is_none() {
            return;
        }
        self.lanes.pause();
        if let Some(cores) = cores {
            self.lanes.set_cores(cores);
        }
        if let Some(zero_copy) = zero_copy {
            self.lanes.set_zero_copy(zero_copy);
            self.switched = (zero_copy != ZeroCopy::On).then(|| Instant::now() + LOOK);
        }
        if let Some(guest) = &mut self.guest {
            guest.session.hand_out(&mut self.lanes);
        }
        if cores.is_some() {
            self.tell_vf();
        }
    }

    /// Goes on mapping the guest's memory for the VF. When all is, rings lend frames.
    fn map(&mut self) {
        if self.lanes.is_mapping()
            && self.lanes.map_some()
            && let Some(guest) = &mut self.guest
        {
            self.lanes.pause();
            guest.session.hand_out(&mut self.lanes);
        }
    }

    fn change(&mut self, mac: Option<Mac>, socket: Option<SocketPlan>) -> Result<()> {
        if let (Some(plan), Some(listener)) = (&socket, &self.listener) {
            listener.set_access(plan)?;
        }
        if let (Some(mac), Some(vf)) = (mac, self.lanes.vf_mut())
            && let Err(error) = vf.set_mac(mac)
        {
            // All or nothing.
            if let (Some(_), Some(listener)) = (&socket, &self.listener) {
                listener.set_access(&self.plan.socket)?;
            }
            return Err(error);
        }
        if let Some(plan) = socket {
            self.plan.socket = plan;
        }
        if mac.is_some() {
            self.tell_vf();
        }
        Ok(())
    }

    /// What waited for the guest to go is done now.
    fn reshape(&mut self) {
        if self.guest.is_some() {
            return;
        }
        let Some((offer, _)) = self.next_connection.take() else { return };
        self.plan.offer = offer;
        let vf = self.lanes.take_vf();
        if let Err(error) = self.lanes.reshape(offer.queue_pairs, offer.mtu) {
            self.last_error = Some(error.to_string());
        }
        if let Some((_, vf)) = vf {
            // Before: what control gives back is for the guests to come.
            self.tell_status();
            // A VF is configured once in its life: control probes it afresh and gives it back.
            let error = Error::VfAbsent("the VF is set up anew, with the attributes that changed".into());
            (self.tell)(PortEvent::VfFailed { error, vf: Some(vf) });
        }
    }

    /// Looks at link, statistics, quarantined rings, frames that do not come back, and memory that is kept for such, once
    /// a second.
    fn look(&mut self) {
        let now = Instant::now();
        if now < self.next_look {
            return;
        }
        self.next_look = now + LOOK;
        #[cfg(debug_assertions)]
        if !self.told.rings.is_empty() && self.told.rings.iter().all(|ring| ring.running && ring.enabled) {
            super::lanes::delay_for_tests("LOOK", &self.plan.id);
        }
        if self.lanes.was_reset() {
            self.revive();
        }
        self.lanes.look_at_link();
        if let Some(Err(error)) = self.lanes.vf_mut().map(|vf| vf.require_present()) {
            self.give_back(error);
        }
        self.tell_vf();
        let counters = &self.plan.counters;
        let quarantined = counters.guest_to_vf.quarantined() + counters.vf_to_guest.quarantined();
        let owed: Vec<_> = counters.guest_to_vf.out_and_back().map(|(out, back)| (out > 0).then_some(back)).collect();
        // A VF that stood still from one look to the next, with frames of the guest: it would wait for them for ever.
        let stuck = owed.iter().zip(&self.owed).any(|(owed, before)| owed.is_some() && owed == before);
        self.owed = owed;
        // Frames that came meanwhile have used up what was posted. If too few came, it is not waited for them.
        let switched = self.switched.take_if(|when| Instant::now() >= *when).is_some();
        if quarantined != self.quarantined || stuck || switched || self.lanes.is_untidy() {
            self.lanes.pause();
            if quarantined != self.quarantined {
                self.lanes.take_back_received();
            }
            self.quarantined = quarantined;
            if stuck {
                self.lanes.take_back();
            }
            if switched {
                self.lanes.take_back_posted();
            }
            if let Some(guest) = &mut self.guest {
                guest.session.hand_out(&mut self.lanes);
            }
        }
    }

    /// Sets a VF up again whose PF was reset. What it had taken is lost, and what the guest sends meanwhile is not ready.
    fn revive(&mut self) {
        warn!(port = %self.plan.id, "the PF was reset, and its VF with it: the VF is set up again");
        // Before all else.
        self.lanes.look_at_link();
        self.lanes.pause();
        let revived = self.lanes.revive();
        if let Some(guest) = &mut self.guest {
            guest.session.hand_out(&mut self.lanes);
        }
        if !revived {
            self.give_back(Error::VfAbsent("the PF was reset, and its VF with it: the VF is set up anew".into()));
        }
    }

    /// The VF does not work any more: it goes back to control.
    fn give_back(&mut self, error: Error) {
        let vf = self.while_drained(PortLanes::take_vf).map(|(_, vf)| vf);
        (self.tell)(PortEvent::VfFailed { error, vf });
    }

    fn tell_vf(&mut self) {
        if let Some(status) = self.lanes.vf_status() {
            (self.tell)(PortEvent::VfReady(status));
        }
    }

    fn tell_status(&mut self) {
        let session = self.guest.as_ref().map(|guest| &guest.session);
        let status = PortStatus {
            guest: session.is_some(),
            connections: self.connections,
            features: session.and_then(|session| session.state().features),
            rings: session.map(|session| self.lanes.ring_status(session.state())).unwrap_or_default(),
            guest_memory: session.map_or(0, |session| session.state().regions.iter().map(|(spec, _)| spec.size).sum()),
            copies: session.and_then(|_| self.lanes.copies()),
            last_error: self.last_error.clone(),
        };
        if status != self.told {
            self.told.clone_from(&status);
            (self.tell)(PortEvent::Status(status));
        }
    }

    /// Takes everything down; the VF, stopped.
    fn close(&mut self) -> Option<Vf> {
        self.next_connection = None;
        self.part(None);
        // A VF that was on its way here goes back with the rest.
        let mut vf = self.lanes.take_vf().map(|(_, vf)| vf);
        while let Ok(command) = self.commands.try_recv() {
            if let PortCommand::GiveVf { vf: late, .. } = command {
                vf = Some(late);
            }
        }
        vf
    }
}
