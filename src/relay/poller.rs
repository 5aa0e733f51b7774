//! A poll core: a pinned thread that gives its lanes turns, and sleeps when there is nothing to do.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::Sender;
use rustix::event::epoll;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

use super::doorbell::NotifyMark;
use super::interrupt;
use super::lane::{Lane, LaneId, Trigger, Turn};
use super::mailbox::{Bell, Mailbox};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::ring::BURST;

/// How long a lane has its turns without a packet before it is no longer visited in every round: longer than the gaps
/// of an exchange, of which each direction is a lane.
const IDLE: Duration = Duration::from_micros(200);

/// How often a lane is visited that is idle, or that has little to do while others have much.
const VISIT: Duration = Duration::from_micros(20);

/// Packets of a turn from which on it is a long one: others wait meanwhile.
const LONG_TURN: usize = 2 * BURST;

/// How long a core without a packet goes on polling before it sleeps: longer than the gaps in a
/// request-response exchange, short enough to cost nothing when idle.
const SPIN: Duration = Duration::from_micros(200);

/// How long it sleeps at most while a lane can receive something that wakes nobody (a VF without interrupts,
/// a front end without a kick fd). Mean wake-up latency is half of it.
const NAP: Duration = Duration::from_micros(250);

/// After so many naps in vain they become longer: 50 ms without a packet is idle, and each nap costs what a
/// timer interrupt and two system calls cost, 1 to 3 % of a core with short ones.
const NAPS: u32 = 200;
const LONG_NAP: Duration = Duration::from_millis(1);

/// A core's orders not yet taken; a port has two lanes and at most one order out for each.
const MAILBOX: usize = 256;

/// Orders taken between two rounds: whoever sends more, the lanes have their turns in between.
const ORDERS: usize = 32;

/// Whether a core may sleep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IdlePolicy {
    /// Sleeps on kicks and interrupts when idle.
    #[default]
    Adaptive,
    /// Never sleeps.
    Poll,
}

/// An order to a core.
enum Order {
    /// Take this lane.
    Adopt(Box<dyn Lane>),
    /// Give that lane back, paused.
    Recall(LaneId, Sender<Box<dyn Lane>>),
    /// Go home.
    Stop,
}

impl std::fmt::Debug for Order {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Adopt(lane) => write!(f, "Adopt({:?})", lane.id()),
            Self::Recall(id, _) => write!(f, "Recall({id:?})"),
            Self::Stop => f.write_str("Stop"),
        }
    }
}

/// Ends a core's sleep.
impl Bell for Event {
    fn ring(&self) {
        self.signal();
    }
}

/// What the control plane may look at while the core works.
#[derive(Debug, Default)]
pub struct CoreGauge {
    mark: NotifyMark,
}

impl CoreGauge {
    /// The number of the notification the core is in, if it is in one.
    pub fn notification(&self) -> Option<u64> {
        self.mark.current()
    }
}

/// The handle of a poll core. Dropping it stops the core, as [`Poller::stop`] does.
#[derive(Debug)]
pub struct Poller {
    /// CPU number.
    pub cpu: usize,
    mailbox: Arc<Mailbox<Order, Event>>,
    gauge: Arc<CoreGauge>,
    thread: Option<JoinHandle<()>>,
}

impl Poller {
    /// Starts a thread pinned to `cpu`. Whatever `enter` returns lives on that thread as long as it does
    /// (its registration with the EAL).
    pub fn start<G: 'static>(
        cpu: usize,
        policy: IdlePolicy,
        enter: impl FnOnce() -> Result<G> + Send + 'static,
    ) -> Result<Self> {
        interrupt::prepare()?;
        let mailbox = Arc::new(Mailbox::new(MAILBOX, Event::new(&format!("core {cpu}"))?));
        let gauge = Arc::new(CoreGauge::default());
        let (ready, started) = crossbeam::channel::bounded(1);
        let (their_mailbox, their_gauge) = (mailbox.clone(), gauge.clone());
        let thread = std::thread::Builder::new()
            .name(format!("poll-{cpu}"))
            .spawn(move || {
                let pinned = core_affinity::set_for_current(core_affinity::CoreId { id: cpu });
                let prepared = match pinned {
                    true => enter().and_then(|guard| Ok((guard, Core::new(policy, their_mailbox, their_gauge)?))),
                    false => Err(Error::Invalid(format!(
                        "cannot pin a poll core to CPU {cpu}: it does not exist or is not in our affinity mask; see --cores"
                    ))),
                };
                match prepared {
                    Ok((_guard, mut core)) => {
                        let _ = ready.send(Ok(()));
                        core.run();
                    }
                    Err(error) => {
                        let _ = ready.send(Err(error));
                    }
                }
            })
            .map_err(Error::io(format!("cannot start the thread of core {cpu}")))?;
        match started.recv().expect("a poll thread reports before it ends") {
            Ok(()) => Ok(Self { cpu, mailbox, gauge, thread: Some(thread) }),
            Err(error) => {
                // Its registrations end with it.
                let _ = thread.join();
                Err(error)
            }
        }
    }

    /// Hands a lane to the core.
    pub fn adopt(&self, lane: Box<dyn Lane>) {
        self.send(Order::Adopt(lane));
    }

    /// Asks for a lane back. It comes through `reply`; if the core does not have it, `reply` is dropped.
    pub fn recall(&self, lane: LaneId, reply: Sender<Box<dyn Lane>>) {
        self.send(Order::Recall(lane, reply));
    }

    /// What the core does.
    pub fn gauge(&self) -> &CoreGauge {
        &self.gauge
    }

    /// Ends the system call the core is in: see [`super::Watchdog`].
    pub(super) fn interrupt(&self) {
        if let Some(thread) = &self.thread {
            interrupt::interrupt(thread);
        }
    }

    /// Stops the core; lanes it still has are dropped. Blocks until the thread has ended.
    pub fn stop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.send(Order::Stop);
            let _ = thread.join();
        }
    }

    fn send(&self, mut order: Order) {
        // More orders than ports exist are only out if a core does not get to run: let it.
        while let Err(back) = self.mailbox.send(order) {
            order = back;
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A lane on the core.
struct Seat {
    lane: Box<dyn Lane>,
    /// One of its fds cannot be waited on.
    unwatched: bool,
    /// When it last moved something, or nothing was known of it.
    last_work: Instant,
    /// Its last turn was a long one.
    heavy: bool,
    /// The round of that, and what it moved in all its turns of that round.
    round: u64,
    spent: usize,
}

impl Seat {
    fn turn(&mut self, turn: &Turn<'_>, round: u64) -> usize {
        let moved = self.lane.turn(turn);
        self.spent = moved + if self.round == round { self.spent } else { 0 };
        self.round = round;
        if moved > 0 {
            self.last_work = turn.now;
        }
        self.heavy = moved >= LONG_TURN;
        moved
    }

    /// It has had what others get in a long turn, at once or bit by bit.
    fn has_had_much(&self, round: u64) -> bool {
        self.heavy || self.round == round && self.spent >= LONG_TURN
    }
}

/// What the poll thread owns.
struct Core {
    policy: IdlePolicy,
    mailbox: Arc<Mailbox<Order, Event>>,
    gauge: Arc<CoreGauge>,
    /// The first so many have a turn in every round, the others are idle.
    busy: usize,
    seats: Vec<Seat>,
    round: u64,
    last_visit: Instant,
    sleeper: Sleeper,
    stopping: bool,
}

impl Core {
    fn new(policy: IdlePolicy, mailbox: Arc<Mailbox<Order, Event>>, gauge: Arc<CoreGauge>) -> Result<Self> {
        let sleeper = Sleeper::new(mailbox.bell()).map_err(Error::io("cannot prepare a poll core's sleep"))?;
        let seats = Vec::with_capacity(MAILBOX);
        let last_visit = Instant::now();
        Ok(Self { policy, mailbox, gauge, busy: 0, seats, round: 0, last_visit, sleeper, stopping: false })
    }

    fn run(&mut self) {
        let mut last_work = Instant::now();
        let gauge = self.gauge.clone();
        while !self.stopping {
            let now = Instant::now();
            let turn = Turn { now, mark: &gauge.mark };
            if self.mailbox.has_orders() {
                self.obey(&turn);
                last_work = now;
            }
            if self.round(&turn) > 0 {
                last_work = now;
            } else if now.duration_since(last_work) > SPIN {
                match self.policy {
                    IdlePolicy::Adaptive => last_work = self.sleep(&turn),
                    IdlePolicy::Poll => std::hint::spin_loop(),
                }
            }
        }
    }

    /// One turn for every lane that is due. Returns the packets moved.
    fn round(&mut self, turn: &Turn<'_>) -> usize {
        let mut turn = *turn;
        self.round = self.round.wrapping_add(1);
        let mut moved = self.visit(&turn);
        let mut at = 0;
        while at < self.busy {
            let seat = &mut self.seats[at];
            let now = seat.turn(&turn, self.round);
            moved += now;
            if now == 0 && turn.now.saturating_duration_since(seat.last_work) > IDLE {
                self.busy -= 1;
                self.seats.swap(at, self.busy);
                continue;
            }
            at += 1;
            if now >= LONG_TURN && at < self.busy {
                // Nobody with little to do waits for all that have much.
                turn.now = Instant::now();
                moved += self.visit(&turn);
            }
        }
        moved
    }

    /// Every [`VISIT`], and whenever nobody has anything to do: a turn for lanes that are idle or have little to do.
    /// Returns the packets moved.
    fn visit(&mut self, turn: &Turn<'_>) -> usize {
        if self.busy > 0 && turn.now.saturating_duration_since(self.last_visit) < VISIT {
            return 0;
        }
        self.last_visit = turn.now;
        let mut moved = 0;
        for at in 0..self.seats.len() {
            let seat = &mut self.seats[at];
            if seat.has_had_much(self.round) {
                continue;
            }
            let now = seat.turn(turn, self.round);
            moved += now;
            if now > 0 && at >= self.busy {
                self.seats.swap(at, self.busy);
                self.busy += 1;
            }
        }
        moved
    }

    fn obey(&mut self, turn: &Turn<'_>) {
        for _ in 0..ORDERS {
            // With more behind the last one, the mailbox goes on saying so.
            let Some(order) = self.mailbox.take() else { return };
            match order {
                Order::Adopt(mut lane) => {
                    lane.settle(turn);
                    let unwatched = !self.sleeper.add(&*lane);
                    self.seats.push(Seat { lane, unwatched, last_work: turn.now, heavy: false, round: 0, spent: 0 });
                    self.all_are_busy(turn.now);
                }
                Order::Recall(id, reply) => {
                    if let Some(at) = self.seats.iter().position(|seat| seat.lane.id() == id) {
                        let seat = self.seats.swap_remove(at);
                        self.all_are_busy(turn.now);
                        self.sleeper.remove(&*seat.lane);
                        let _ = reply.send(seat.lane);
                    }
                }
                Order::Stop => self.stopping = true,
            }
        }
    }

    /// Nothing is known of them: all have a turn in the next rounds.
    fn all_are_busy(&mut self, now: Instant) {
        self.busy = self.seats.len();
        self.seats.iter_mut().for_each(|seat| seat.last_work = now);
    }

    /// Sleeps until something wakes us, unless there is work after all. Returns the time to count idleness from.
    fn sleep(&mut self, turn: &Turn<'_>) -> Instant {
        // First ask to be woken, then look once more: whoever comes in between does one or the other.
        let mut work = false;
        let mut naps = false;
        for seat in &mut self.seats {
            work |= seat.lane.doze();
            naps |= seat.unwatched || seat.lane.needs_naps();
        }
        self.all_are_busy(turn.now);
        work |= self.round(turn) > 0;
        let mut idle_since = Instant::now();
        if !work && self.mailbox.doze() {
            let mut taken = 0u32;
            loop {
                let interval = if taken < NAPS { NAP } else { LONG_NAP };
                taken = taken.saturating_add(1);
                self.sleeper.nap_every(naps.then_some(interval));
                let Awakening { called, broken } = self.sleeper.sleep();
                let now = Instant::now();
                idle_since = now;
                if let Some(fd) = broken {
                    for seat in &mut self.seats {
                        seat.unwatched |= self.sleeper.forsake(&*seat.lane, fd);
                    }
                }
                // A nap is a long poll interval: after a look in vain it goes on, with all still armed. Not if a
                // lane's fd ended it: an interrupt without a frame stays readable until the lane wakes.
                if !naps || called || self.mailbox.has_orders() || self.round(&Turn { now, ..*turn }) > 0 {
                    break;
                }
            }
            self.sleeper.nap_every(None);
            self.mailbox.wake();
        }
        for seat in &mut self.seats {
            seat.lane.wake();
        }
        self.all_are_busy(idle_since);
        idle_since
    }
}

/// What a core sleeps on: its bell, the kicks and interrupts of its lanes, and a timer for naps.
///
/// Eventfds are edge-triggered: each signal ends one sleep, and none has to be read for it. A kick must not be
/// read at all: the front end can make it blocking again, and a read of one that nobody signals never ends.
/// A VF's fd is level-triggered: net_tap shows a frame only after a signal that may come later than the fd's
/// edge, so that one look after the edge can miss it.
struct Sleeper {
    epoll: OwnedFd,
    timer: OwnedFd,
    interval: Option<Duration>,
}

/// What the event of our bell or timer says; that of a lane's fd says its number.
const OURS: u64 = u64::MAX;

/// How a sleep ended.
#[derive(Default)]
struct Awakening {
    /// An fd of a lane ended it.
    called: bool,
    /// It is broken (the interface behind it was deleted, a kick overflowed): it would end every sleep.
    broken: Option<RawFd>,
}

const EDGE: epoll::EventFlags = epoll::EventFlags::IN.union(epoll::EventFlags::ET);

impl Sleeper {
    fn new(bell: &Event) -> std::io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
        for fd in [bell.as_fd(), timer.as_fd()] {
            epoll::add(&epoll, fd, epoll::EventData::new_u64(OURS), EDGE)?;
        }
        Ok(Self { epoll, timer, interval: None })
    }

    /// Whether everything that wakes the lane can be waited on. If not (no more epoll watches), the core
    /// naps while it has this lane: that costs latency, not frames.
    fn add(&self, lane: &dyn Lane) -> bool {
        let mut all = true;
        lane.wake_fds(&mut |fd, trigger| {
            let flags = match trigger {
                Trigger::Edge => EDGE,
                Trigger::Level => epoll::EventFlags::IN,
            };
            all &= epoll::add(&self.epoll, fd, epoll::EventData::new_u64(fd.as_raw_fd() as u64), flags).is_ok();
        });
        all
    }

    fn remove(&self, lane: &dyn Lane) {
        lane.wake_fds(&mut |fd, _| {
            let _ = epoll::delete(&self.epoll, fd);
        });
    }

    /// Ends sleeps that often, or no more. A timerfd, since epoll's own limit is in milliseconds.
    fn nap_every(&mut self, interval: Option<Duration>) {
        if std::mem::replace(&mut self.interval, interval) != interval {
            let nanoseconds = interval.unwrap_or_default().subsec_nanos();
            let time = Timespec { tv_sec: 0, tv_nsec: nanoseconds.into() };
            let timer = Itimerspec { it_interval: time, it_value: time };
            let _ = rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &timer);
        }
    }

    /// Waits no longer on an fd of the lane. Whether it has it.
    fn forsake(&self, lane: &dyn Lane, broken: RawFd) -> bool {
        let mut found = false;
        lane.wake_fds(&mut |fd, _| {
            if fd.as_raw_fd() == broken {
                found = true;
                let _ = epoll::delete(&self.epoll, fd);
            }
        });
        found
    }

    /// Sleeps until something happens.
    fn sleep(&self) -> Awakening {
        let mut events = [const { std::mem::MaybeUninit::<epoll::Event>::uninit() }; 8];
        let mut awakening = Awakening::default();
        // Interrupted, by the watchdog: its notification has ended meanwhile.
        if let Ok((events, _)) = epoll::wait(&self.epoll, &mut events, None) {
            for event in events.iter().filter(|event| event.data.u64() != OURS) {
                awakening.called = true;
                if { event.flags }.intersects(epoll::EventFlags::ERR | epoll::EventFlags::HUP) {
                    awakening.broken = Some(event.data.u64() as RawFd);
                }
            }
        }
        if self.interval.is_some() {
            // A periodic timerfd starts its next period only when the last one was read.
            let _ = rustix::io::read(&self.timer, &mut [0; 8]);
        }
        awakening
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::BorrowedFd;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use super::super::lane::RingPlan;
    use super::*;
    use crate::ring::RingFault;

    /// A lane whose turns take a while and move so many packets.
    struct Scripted {
        id: u64,
        takes: Duration,
        moves: usize,
        turns: Arc<AtomicUsize>,
    }

    impl Scripted {
        fn new(id: u64, takes: Duration, moves: usize) -> (Box<Self>, Arc<AtomicUsize>) {
            let turns = Arc::new(AtomicUsize::new(0));
            (Box::new(Self { id, takes, moves, turns: turns.clone() }), turns)
        }
    }

    impl Lane for Scripted {
        fn id(&self) -> LaneId {
            LaneId(self.id)
        }

        fn turn(&mut self, _turn: &Turn<'_>) -> usize {
            let start = Instant::now();
            while start.elapsed() < self.takes {}
            self.turns.fetch_add(1, Relaxed);
            self.moves
        }

        fn settle(&mut self, _turn: &Turn<'_>) {}

        fn doze(&mut self) -> bool {
            false
        }

        fn wake(&mut self) {}

        fn wake_fds(&self, _visit: &mut dyn FnMut(BorrowedFd<'_>, Trigger)) {}

        fn needs_naps(&self) -> bool {
            false
        }

        fn insert_ring(&mut self, _pair: usize, _plan: RingPlan) -> Result<()> {
            Ok(())
        }

        fn remove_ring(&mut self, _pair: usize) -> Option<u16> {
            None
        }

        fn fault(&self, _pair: usize) -> Option<RingFault> {
            None
        }

        fn discard(&mut self) {}
    }

    fn core() -> (Core, Arc<Mailbox<Order, Event>>, Arc<CoreGauge>) {
        let mailbox = Arc::new(Mailbox::new(MAILBOX, Event::new("a test").unwrap()));
        let gauge = Arc::new(CoreGauge::default());
        (Core::new(IdlePolicy::Poll, mailbox.clone(), gauge.clone()).unwrap(), mailbox, gauge)
    }

    /// Each long turn is followed by one for whoever has little to do, and not by all the others first.
    #[test]
    fn a_lane_with_little_to_do_does_not_wait_for_all_that_have_much() {
        const HEAVY: usize = 10;
        let (mut core, mailbox, gauge) = core();
        for id in 0..HEAVY as u64 {
            mailbox.send(Order::Adopt(Scripted::new(id, VISIT, LONG_TURN).0)).unwrap();
        }
        let (idle, idles) = Scripted::new(100, Duration::ZERO, 0);
        let (light, lights) = Scripted::new(101, Duration::ZERO, 1);
        mailbox.send(Order::Adopt(idle)).unwrap();
        mailbox.send(Order::Adopt(light)).unwrap();
        core.obey(&Turn { now: Instant::now(), mark: &gauge.mark });
        core.round(&Turn { now: Instant::now(), mark: &gauge.mark });
        for turns in [idles, lights] {
            let before = turns.load(Relaxed);
            core.round(&Turn { now: Instant::now(), mark: &gauge.mark });
            let after = turns.load(Relaxed);
            assert!(after - before >= HEAVY, "{before} to {after}");
        }
    }

    /// Whoever shows its packets bit by bit would else have a turn between all turns of the others.
    #[test]
    fn a_lane_gets_no_more_for_asking_often() {
        const HEAVY: usize = 10;
        let (mut core, mailbox, gauge) = core();
        for id in 0..HEAVY as u64 {
            mailbox.send(Order::Adopt(Scripted::new(id, VISIT, LONG_TURN).0)).unwrap();
        }
        let (sly, turns) = Scripted::new(100, Duration::ZERO, LONG_TURN - 1);
        mailbox.send(Order::Adopt(sly)).unwrap();
        core.obey(&Turn { now: Instant::now(), mark: &gauge.mark });
        for _ in 0..10 {
            core.round(&Turn { now: Instant::now(), mark: &gauge.mark });
        }
        // Two visits, and its own turn.
        assert!((10..=30).contains(&turns.load(Relaxed)), "{turns:?} in 10 rounds");
    }

    /// While others are at work. If nobody is, the core has nothing better to do.
    #[test]
    fn an_idle_lane_is_visited_now_and_then() {
        let (mut core, mailbox, gauge) = core();
        let (idle, idles) = Scripted::new(0, Duration::ZERO, 0);
        let (light, lights) = Scripted::new(1, Duration::ZERO, 1);
        mailbox.send(Order::Adopt(idle)).unwrap();
        mailbox.send(Order::Adopt(light)).unwrap();
        let mut now = Instant::now();
        let mut rounds = |core: &mut Core, n: usize, apart: Duration| {
            let before = (idles.load(Relaxed), lights.load(Relaxed));
            for _ in 0..n {
                now += apart;
                core.round(&Turn { now, mark: &gauge.mark });
            }
            (idles.load(Relaxed) - before.0, lights.load(Relaxed) - before.1)
        };
        core.obey(&Turn { now: Instant::now(), mark: &gauge.mark });
        // However many rounds those are: who has just had a packet may get the answer to it.
        assert!(rounds(&mut core, 1000, IDLE / 2000).0 >= 1000);
        rounds(&mut core, 1000, IDLE / 100);
        let (idle, light) = rounds(&mut core, 1000, VISIT / 10);
        assert!((99..=101).contains(&idle) && light >= 1000, "{idle} visits, {light} turns");
        let (reply, back) = crossbeam::channel::bounded(1);
        mailbox.send(Order::Recall(LaneId(1), reply)).unwrap();
        core.obey(&Turn { now: Instant::now(), mark: &gauge.mark });
        back.recv().unwrap();
        assert_eq!(rounds(&mut core, 1000, VISIT / 10).1, 0, "it is home");
        assert_eq!(core.busy, 0);
        assert_eq!(rounds(&mut core, 1000, VISIT / 10).0, 1000);
    }

    #[test]
    fn a_flood_of_orders_is_taken_in_parts() {
        let (mut core, mailbox, gauge) = core();
        let (reply, replies) = crossbeam::channel::unbounded();
        for lane in 0..100 {
            mailbox.send(Order::Recall(LaneId(lane), reply.clone())).unwrap();
        }
        drop(reply);
        let turn = Turn { now: Instant::now(), mark: &gauge.mark };
        for _ in 0..3 {
            core.obey(&turn);
            assert!(mailbox.has_orders(), "the next round goes on with them");
        }
        core.obey(&turn);
        assert!(!mailbox.has_orders());
        assert!(replies.recv().is_err(), "all were answered: no lane is here");
    }
}
