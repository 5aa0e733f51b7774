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
        doorbell: Doorbell { kick: kick.cloned(), call: Some(call.clone()) },
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
        lane.insert_ring(0, RingPlan { config, doorbell: Doorbell { kick: Some(kick.clone()), call: None }, ..plan })
            .unwrap();
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

/// A call fd made blocking again, and full: the watchdog ends the write, the ring is taken off the core, the
/// other ring of the lane goes on. Also while the frames are only dropped.
#[test]
fn the_watchdog_frees_a_core_from_a_call_that_blocks() {
    const LIMIT: Duration = Duration::from_millis(10);
    for enabled in [true, false] {
        let mut core = poller(IdlePolicy::Adaptive);
        let mut guest = Guest::new(2, 64);
        let calls = [event(), event()];
        let counters = Arc::new(LaneCounters::default());
        let ready = Arc::new(true.into());
        let mut lane = GuestToVf::new(LaneId(1), 2, vec![ScriptedTx::new()], ready, counters.clone());
        for (pair, call) in calls.iter().enumerate() {
            let doorbell = Doorbell { kick: None, call: Some(call.clone()) };
            lane.insert_ring(pair, RingPlan { enabled, doorbell, ..guest.tx_plan(pair) }).unwrap();
        }
        core.adopt(Box::new(lane));
        wait_for(|| rustix::io::read(&calls[0], &mut [0; 8]).is_ok());
        rustix::io::write(&calls[0], &(u64::MAX - 1).to_ne_bytes()).unwrap();
        fcntl_setfl(&calls[0], OFlags::empty()).unwrap();

        guest.tx[0].send(&[0; HEADER], &numbered(0, 0, 64));
        guest.tx[0].ring.publish();
        wait_for(|| core.gauge().in_notification().is_some());
        let blocked = Instant::now();
        wait_for(|| {
            std::thread::sleep(Duration::from_millis(1));
            core.watch(LIMIT);
            counters.quarantined() == 1
        });
        // Generous: the machine may be busy. Without the watchdog it would be for ever.
        assert!(blocked.elapsed() < Duration::from_millis(500), "{:?}", blocked.elapsed());

        guest.tx[1].send(&[0; HEADER], &numbered(1, 0, 64));
        guest.tx[1].ring.publish();
        wait_for(|| guest.tx[1].reclaim() == 1);
        let mut lane = recall(&core, LaneId(1));
        assert_eq!((lane.fault(0), lane.fault(1)), (Some(RingFault::CallBlocks), None));
        // What was sent is in the used ring, though the guest could not be told.
        assert_eq!((guest.tx[0].reclaim(), lane.remove_ring(0)), (1, Some(1)));
        let counted = counters.snapshot();
        assert_eq!((counted.packets, counted.dropped.disabled), if enabled { (2, 0) } else { (0, 2) });
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
    let doorbell = Doorbell { kick: None, call: Some(call.clone()) };
    lane.insert_ring(0, RingPlan { doorbell, ..guest.rx_plan(0) }).unwrap();
    core.adopt(Box::new(lane));
    wait_for(|| rustix::io::read(&call, &mut [0; 8]).is_ok());
    rustix::io::write(&call, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    fcntl_setfl(&call, OFlags::empty()).unwrap();
    vf.arrive(numbered(0, 0, 64));
    wait_for(|| {
        std::thread::sleep(Duration::from_millis(1));
        core.watch(Duration::from_millis(10));
        counters.quarantined() == 1
    });
    let mut lane = recall(&core, LaneId(1));
    assert_eq!((lane.fault(0), lane.remove_ring(0)), (Some(RingFault::CallBlocks), Some(1)));
    assert_eq!(guest.rx[0].receive(), Some(numbered(0, 0, 64)));
    let counted = counters.snapshot();
    assert_eq!((counted.packets, counted.dropped.total()), (1, 0));
    core.stop();
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
