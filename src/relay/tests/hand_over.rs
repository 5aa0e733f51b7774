//! Lanes that move between cores, under traffic.

use std::os::fd::OwnedFd;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{OFlags, fcntl_setfl};

use super::scripted::{ScriptedRx, ScriptedTx};
use super::traffic::{LONG, Running, Traffic};
use super::*;
use crate::ring::RingFault;
use crate::ring::testing::{HEADER, numbered};
use crate::vf::{Queues, Vf, VfConfig, VfSpec, soft};

fn poller(policy: IdlePolicy) -> Poller {
    Poller::start(0, policy, || Ok(())).unwrap()
}

fn event() -> Arc<OwnedFd> {
    Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap())
}

fn soft_loop() -> (Vf, Vec<soft::SoftTx>, Vec<soft::SoftRx>) {
    let mut vf = Vf::probe(&VfSpec::SoftLoop).unwrap();
    let queues = vf.configure(&VfConfig { queues: 1, mtu: 1500, mac: None }).unwrap();
    vf.start().unwrap();
    match queues {
        Queues::Soft(tx, rx) => (vf, tx, rx),
        #[cfg(feature = "dpdk")]
        Queues::Ethdev(..) => unreachable!(),
    }
}

fn recall(from: &Poller, id: LaneId) -> Box<dyn Lane> {
    let (reply, back) = crossbeam::channel::bounded(1);
    from.recall(id, reply);
    back.recv_timeout(LONG).expect("a core gives a lane back")
}

/// A thousand moves of both lanes, and now and then a new call fd, which is signalled when the lane arrives.
fn a_thousand_moves(policies: [IdlePolicy; 2], event_idx: bool) {
    let mut pollers = policies.map(poller);
    let (_vf, tx, rx) = soft_loop();
    let mut guest = Guest::new(1, 256);
    let kick = event();
    let with = |plan: RingPlan, kick: Option<&Arc<OwnedFd>>, call: &Arc<OwnedFd>| RingPlan {
        config: RingConfig { event_idx, ..plan.config },
        doorbell: Doorbell { kick: kick.cloned(), call: Some(call.clone()), err: None },
        ..plan
    };
    let (tx_plan, rx_plan) = (guest.tx_plan(0), guest.rx_plan(0));
    let counters = [(); 2].map(|()| Arc::new(LaneCounters::default()));
    let mut sender = GuestToVf::new(LaneId(1), 1, tx, Arc::new(true.into()), counters[0].clone());
    sender.insert_ring(0, with(tx_plan.clone(), Some(&kick), &event())).unwrap();
    let mut receiver = VfToGuest::new(LaneId(2), 1, rx, counters[1].clone());
    receiver.insert_ring(0, with(rx_plan.clone(), None, &event())).unwrap();
    pollers[0].adopt(Box::new(sender));
    pollers[1].adopt(Box::new(receiver));

    let (tx, rx) = (guest.tx.remove(0), guest.rx.remove(0));
    let traffic = Traffic { tx, rx, kick: kick.clone(), event_idx, sent: 0, received: 0 };
    let running = Running::start(traffic);
    // Where each lane is.
    let mut at = [0, 1];
    for i in 0..1000_usize {
        let which = i % 2;
        let mut lane = recall(&pollers[at[which]], LaneId(which as u64 + 1));
        let mut renewed = None;
        if i % 10 < 2 {
            let (plan, kick) = if which == 0 { (&tx_plan, Some(&kick)) } else { (&rx_plan, None) };
            let call = event();
            assert!(lane.remove_ring(0).is_some());
            lane.insert_ring(0, with(plan.clone(), kick, &call)).unwrap();
            renewed = Some(call);
        }
        // Now and then it stays.
        at[which] ^= usize::from(i % 7 != 0);
        pollers[at[which]].adopt(lane);
        if let Some(call) = renewed {
            let deadline = Instant::now() + LONG;
            while rustix::io::read(&call, &mut [0; 8]).is_err() {
                assert!(Instant::now() < deadline, "a new call fd is signalled once");
                std::thread::yield_now();
            }
        }
        if i % 20 == 0 {
            running.flows(50);
        }
    }
    let traffic = running.finish();
    let [sender, receiver] = [0, 1].map(|which| recall(&pollers[at[which]], LaneId(which as u64 + 1)));
    assert!(traffic.sent > 2500);
    for counters in counters {
        let counted = counters.snapshot();
        assert_eq!((counted.packets, counted.dropped.total()), (traffic.sent, 0));
    }
    drop((sender, receiver));
    pollers.iter_mut().for_each(Poller::stop);
}

#[test]
fn a_thousand_moves_lose_and_reorder_nothing() {
    a_thousand_moves([IdlePolicy::Adaptive, IdlePolicy::Adaptive], false);
}

#[test]
fn a_thousand_moves_lose_and_reorder_nothing_with_event_idx() {
    a_thousand_moves([IdlePolicy::Poll, IdlePolicy::Adaptive], true);
}

/// Nobody kicks, and nobody says that the VF is done: the guest has its buffer soon all the same, also when its core is
/// long asleep.
#[test]
fn what_a_vf_gives_back_late_is_completed_while_the_core_naps() {
    let mut core = poller(IdlePolicy::Adaptive);
    let mut guest = Guest::new(1, 64);
    let vf = ScriptedTx::new();
    (vf.script().lends_from, vf.script().keeps) = (0, true);
    let (kick, counters) = (event(), Arc::new(LaneCounters::default()));
    let mut lane = GuestToVf::new(LaneId(1), 1, vec![vf.clone()], Arc::new(true.into()), counters);
    let doorbell = Doorbell { kick: Some(kick.clone()), ..Doorbell::default() };
    lane.insert_ring(0, RingPlan { doorbell, ..guest.tx_plan(0) }).unwrap();
    core.adopt(Box::new(lane));
    for i in 0..30_u64 {
        guest.tx[0].send(&[0; HEADER], &numbered(0, i, 600));
        guest.tx[0].ring.publish();
        rustix::io::write(&kick, &1_u64.to_ne_bytes()).unwrap();
        let sent = Instant::now();
        while vf.script().out.is_empty() {
            assert!(sent.elapsed() < LONG, "not sent");
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_millis(i % 10 * 10));
        assert_eq!(guest.tx[0].reclaim(), 0, "the VF has it");
        vf.script().give_back(1);
        let back = Instant::now();
        while guest.tx[0].reclaim() == 0 {
            assert!(back.elapsed() < LONG, "never completed");
            std::thread::yield_now();
        }
        assert!(back.elapsed() < Duration::from_millis(50), "{:?}", back.elapsed());
    }
    drop(recall(&core, LaneId(1)));
    core.stop();
}

/// A core without naps sleeps until it is kicked: the kick is never lost, and never read.
#[test]
fn every_kick_wakes_a_sleeping_core() {
    for event_idx in [false, true] {
        let mut core = poller(IdlePolicy::Adaptive);
        let mut guest = Guest::new(1, 64);
        let kick = event();
        let vf = ScriptedTx::new();
        let counters = Arc::new(LaneCounters::default());
        let mut lane = GuestToVf::new(LaneId(1), 1, vec![vf], Arc::new(true.into()), counters.clone());
        let plan = guest.tx_plan(0);
        let config = RingConfig { event_idx, ..plan.config };
        let doorbell = Doorbell { kick: Some(kick.clone()), ..Doorbell::default() };
        lane.insert_ring(0, RingPlan { config, doorbell, ..plan }).unwrap();
        core.adopt(Box::new(lane));
        // A front end that makes the kick blocking must not be able to block the core.
        fcntl_setfl(&kick, OFlags::empty()).unwrap();
        let mut kicks = 0;
        for i in 0..300_u64 {
            std::thread::sleep(Duration::from_micros(i % 7 * 100));
            let tx = &mut guest.tx[0];
            let old = tx.ring.avail;
            tx.send(&[0; HEADER], &numbered(0, i, 64));
            tx.ring.publish();
            if tx.ring.kick_wanted(old, event_idx) {
                rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
                kicks += 1;
            }
            let deadline = Instant::now() + LONG;
            while guest.tx[0].reclaim() == 0 {
                assert!(Instant::now() < deadline, "frame {i} was not seen: a lost wake-up");
                std::thread::yield_now();
            }
        }
        assert!(kicks > 0);
        assert_eq!(counters.snapshot().packets, 300);
        let mut count = [0; 8];
        rustix::io::read(&kick, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), kicks);
        // Nothing is left that wakes it for ever.
        drop(recall(&core, LaneId(1)));
        core.stop();
    }
}

/// Full, and blocking again: what the front end can do behind our back.
fn block(fd: &OwnedFd) {
    rustix::io::write(fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    fcntl_setfl(fd, OFlags::empty()).unwrap();
}

/// Looks after the core until so many of the lane's rings were taken off it.
fn watch(core: &Poller, counters: &LaneCounters, quarantined: u64) {
    let mut watchdog = Watchdog::new(Duration::from_millis(10));
    wait_for(|| {
        std::thread::sleep(Duration::from_millis(1));
        watchdog.look(std::slice::from_ref(core), Instant::now());
        counters.quarantined() == quarantined
    });
}

/// A call fd made blocking again, and full: the watchdog ends the write, and the whole lane is taken off the
/// core, since each of its fds could do the same. Also while the frames are only dropped.
#[test]
fn the_watchdog_frees_a_core_from_a_call_that_blocks() {
    for enabled in [true, false] {
        let mut core = poller(IdlePolicy::Adaptive);
        let mut guest = Guest::new(2, 64);
        let calls = [event(), event()];
        let counters = Arc::new(LaneCounters::default());
        let ready = Arc::new(true.into());
        let mut lane = GuestToVf::new(LaneId(1), 2, vec![ScriptedTx::new()], ready, counters.clone());
        for (pair, call) in calls.iter().enumerate() {
            let doorbell = Doorbell { call: Some(call.clone()), err: Some(call.clone()), ..Doorbell::default() };
            lane.insert_ring(pair, RingPlan { enabled, doorbell, ..guest.tx_plan(pair) }).unwrap();
        }
        core.adopt(Box::new(lane));
        for call in &calls {
            wait_for(|| rustix::io::read(call, &mut [0; 8]).is_ok());
        }
        calls.iter().for_each(|call| block(call));

        guest.tx[0].send(&[0; HEADER], &numbered(0, 0, 64));
        guest.tx[0].ring.publish();
        wait_for(|| core.gauge().notification().is_some());
        let blocked = Instant::now();
        watch(&core, &counters, 2);
        // Generous: the machine may be busy. Without the watchdog it would be for ever.
        assert!(blocked.elapsed() < LONG, "{:?}", blocked.elapsed());

        let mut lane = recall(&core, LaneId(1));
        assert_eq!([0, 1].map(|pair| lane.fault(pair)), [Some(RingFault::CallBlocks); 2]);
        // What was sent is in the used ring, though the guest could not be told.
        assert_eq!((guest.tx[0].reclaim(), lane.remove_ring(0)), (1, Some(1)));
        let counted = counters.snapshot();
        assert_eq!((counted.packets, counted.dropped.disabled), if enabled { (1, 0) } else { (0, 1) });
        assert_eq!(counted.kicks_blocked, 1, "neither the other call nor an err is tried");
        core.stop();
    }
}

/// The same in the other direction, where nothing was dropped for it.
#[test]
fn a_call_that_blocks_costs_a_receiving_ring_no_frame() {
    let mut core = poller(IdlePolicy::Adaptive);
    let mut guest = Guest::new(1, 64);
    guest.rx[0].post(64);
    let (vf, call, counters) = (ScriptedRx::default(), event(), Arc::new(LaneCounters::default()));
    let mut lane = VfToGuest::new(LaneId(1), 1, vec![vf.clone()], counters.clone());
    let doorbell = Doorbell { call: Some(call.clone()), ..Doorbell::default() };
    lane.insert_ring(0, RingPlan { doorbell, ..guest.rx_plan(0) }).unwrap();
    core.adopt(Box::new(lane));
    wait_for(|| rustix::io::read(&call, &mut [0; 8]).is_ok());
    block(&call);
    vf.arrive(numbered(0, 0, 64));
    watch(&core, &counters, 1);
    let mut lane = recall(&core, LaneId(1));
    assert_eq!((lane.fault(0), lane.remove_ring(0)), (Some(RingFault::CallBlocks), Some(1)));
    assert_eq!(guest.rx[0].receive(), Some(numbered(0, 0, 64)));
    let counted = counters.snapshot();
    assert_eq!((counted.packets, counted.dropped.total(), counted.kicks_blocked), (1, 0, 1));
    core.stop();
}

/// All calls of a lane that arrives block: the core is held up once, not once a ring.
#[test]
fn a_lane_that_arrives_blocks_its_core_once() {
    let mut core = poller(IdlePolicy::Adaptive);
    let guest = Guest::new(4, 64);
    let call = event();
    block(&call);
    let doorbell = Doorbell { call: Some(call), ..Doorbell::default() };
    let counters = [(); 2].map(|()| Arc::new(LaneCounters::default()));
    let ready = Arc::new(true.into());
    let mut sender = GuestToVf::new(LaneId(1), 4, vec![ScriptedTx::new()], ready, counters[0].clone());
    let mut receiver = VfToGuest::new(LaneId(2), 4, vec![ScriptedRx::default()], counters[1].clone());
    for pair in 0..4 {
        sender.insert_ring(pair, RingPlan { doorbell: doorbell.clone(), ..guest.tx_plan(pair) }).unwrap();
        receiver.insert_ring(pair, RingPlan { doorbell: doorbell.clone(), ..guest.rx_plan(pair) }).unwrap();
    }
    let lanes: [Box<dyn Lane>; 2] = [Box::new(sender), Box::new(receiver)];
    for (lane, counters) in lanes.into_iter().zip(&counters) {
        let id = lane.id();
        core.adopt(lane);
        watch(&core, counters, 4);
        let lane = recall(&core, id);
        assert_eq!([0, 1, 2, 3].map(|pair| lane.fault(pair)), [Some(RingFault::CallBlocks); 4]);
        assert_eq!(counters.snapshot().kicks_blocked, 1);
    }
    core.stop();
}

/// The front end hears of a ring that lies, once. If that blocks, the core goes on without the lane.
#[test]
fn a_ring_that_lies_is_told_and_an_err_that_blocks_stops_its_lane() {
    for blocks in [false, true] {
        let mut core = poller(IdlePolicy::Adaptive);
        let mut guest = Guest::new(2, 64);
        let errs = [(); 2].map(|()| event());
        if blocks {
            errs.iter().for_each(|err| block(err));
        }
        let bell = |err: &Arc<OwnedFd>| Doorbell { err: Some(err.clone()), ..Doorbell::default() };
        let counters = [(); 2].map(|()| Arc::new(LaneCounters::default()));
        let vf = ScriptedRx::default();
        let ready = Arc::new(true.into());
        let mut sender = GuestToVf::new(LaneId(1), 2, vec![ScriptedTx::new()], ready, counters[0].clone());
        let mut receiver = VfToGuest::new(LaneId(2), 2, vec![vf.clone()], counters[1].clone());
        for pair in 0..2 {
            sender.insert_ring(pair, RingPlan { doorbell: bell(&errs[0]), ..guest.tx_plan(pair) }).unwrap();
            receiver.insert_ring(pair, RingPlan { doorbell: bell(&errs[1]), ..guest.rx_plan(pair) }).unwrap();
        }
        core.adopt(Box::new(sender));
        core.adopt(Box::new(receiver));
        for ring in [&mut guest.tx[0].ring, &mut guest.rx[0].ring] {
            ring.avail += 65;
            ring.publish();
        }
        // A receiving ring is looked at when there is a frame for it.
        (0..=255).for_each(|flow| vf.arrive(numbered(flow, 0, 64)));
        counters.iter().for_each(|counters| watch(&core, counters, if blocks { 2 } else { 1 }));
        for (counters, id) in counters.iter().zip([1, 2]) {
            let lane = recall(&core, LaneId(id));
            let faults = [0, 1].map(|pair| lane.fault(pair));
            match blocks {
                false => assert_eq!(faults, [Some(RingFault::AvailIndex), None]),
                true => assert_eq!(faults, [Some(RingFault::CallBlocks); 2]),
            }
            assert_eq!(counters.snapshot().kicks_blocked, u64::from(blocks));
        }
        for err in errs.iter().filter(|_| !blocks) {
            let mut count = [0; 8];
            rustix::io::read(err, &mut count).unwrap();
            assert_eq!(u64::from_ne_bytes(count), 1);
        }
        core.stop();
    }
}

/// What lives on its thread, as the EAL's registration does, is gone when the handle is.
#[test]
fn a_core_ends_with_its_handle() {
    let (alive, gone) = crossbeam::channel::bounded::<()>(0);
    let core = Poller::start(0, IdlePolicy::Adaptive, || Ok(alive)).unwrap();
    assert_eq!(gone.try_recv(), Err(crossbeam::channel::TryRecvError::Empty));
    drop(core);
    assert_eq!(gone.try_recv(), Err(crossbeam::channel::TryRecvError::Disconnected));
}

fn wait_for(mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
}
