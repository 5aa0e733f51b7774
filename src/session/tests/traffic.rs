//! Sessions that are torn down to their state and resumed, on real lanes, on a real core, under traffic.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::*;
use crate::relay::tests::traffic::{Running, Traffic};
use crate::relay::{IdlePolicy, Poller};
use crate::ring::testing::{self, Driver, Receiver, Sender};
use crate::session::SessionState;
use crate::session::features::EVENT_IDX;
use crate::session::lanes::PortLanes;
use crate::session::plan::PortCounters;
use crate::vf::{Vf, VfConfig, VfSpec};

/// Entries of each ring.
const RING: u16 = 256;

pub(super) fn core() -> Arc<Vec<Poller>> {
    Arc::new(vec![Poller::start(0, IdlePolicy::Adaptive, || Ok(())).unwrap()])
}

pub(super) fn end(core: Arc<Vec<Poller>>) {
    Arc::into_inner(core).expect("its lanes are gone").iter_mut().for_each(Poller::stop);
}

pub(super) const CONFIG: VfConfig = VfConfig { queues: 1, mtu: 1500, mac: None };

/// The lanes of a port with one queue pair.
pub(super) fn port(core: &Arc<Vec<Poller>>, vf: Vf) -> (PortLanes, PortCounters) {
    let counters = PortCounters::default();
    let log = std::rc::Rc::new(crate::session::port_log::PortLog::new("p"));
    let mut lanes = PortLanes::new("p", log, core.clone(), &[(0, 0)], counters.clone(), 1, 1500).unwrap();
    lanes.give_vf(VfSpec::SoftLoop, vf, &CONFIG).unwrap();
    (lanes, counters)
}

/// Has a front end set a session with these rings up by messages; returns its kick.
pub(super) fn negotiate<const RINGS: usize>(
    session: &mut Session,
    lanes: &mut PortLanes,
    features: u64,
    len: u64,
    rings: [&Driver; RINGS],
) -> OwnedFd {
    let kick = new_eventfd();
    let mut ok = |request: Request| {
        let name = request.name();
        match session.handle(request, lanes) {
            Ok(Outcome::Silent) => {}
            other => panic!("{name}: {other:?}"),
        }
    };
    ok(u64_message(Req::SET_FEATURES, PROTOCOL_FEATURES | VERSION_1 | features));
    let memory: OwnedFd = rings[0].file.try_clone().unwrap().into();
    ok(mem_table(&[([testing::GPA, len, testing::USER, 0], &memory)]));
    for (index, ring) in (0..).zip(rings) {
        ok(ring_message(Req::SET_VRING_NUM, index, ring.size.into()));
        ok(ring_message(Req::SET_VRING_BASE, index, 0));
        let mut body = Reply::ring_state(0, index, 0).body.to_vec();
        for at in [ring.desc_at(), ring.used_at(), ring.avail_at()] {
            body.extend((testing::USER + at as u64).to_ne_bytes());
        }
        body.extend(0_u64.to_ne_bytes());
        ok(message(Req::SET_VRING_ADDR, &body, Vec::new()));
        ok(eventfd_message(Req::SET_VRING_CALL, index));
        let index_body = u64::from(index).to_ne_bytes();
        ok(message(Req::SET_VRING_KICK, &index_body, vec![kick.try_clone().unwrap()]));
        ok(ring_message(Req::SET_VRING_ENABLE, index, 1));
    }
    kick
}

/// A guest whose traffic goes through a session; its rings are at the start of its memory.
fn guest(lanes: &mut PortLanes, features: u64) -> (Session, Running) {
    const BUFFER: usize = 2048;
    const AT: usize = 64 * 1024;
    let buffers = usize::from(RING) * BUFFER;
    let len = AT + 2 * buffers;
    let rx = Driver::new(len, RING, 0);
    let tx = rx.beside(AT / 2, RING, 0);
    let mut session = Session::new(offer(1));
    let kick = negotiate(&mut session, lanes, features, len as u64, [&rx, &tx]);
    let (rx, tx) = (Receiver::new(rx, AT, BUFFER), Sender::new(tx, AT + buffers, BUFFER));
    let event_idx = features & EVENT_IDX != 0;
    let traffic = Traffic { tx, rx, kick: Arc::new(kick), event_idx, sent: 0, received: 0 };
    (session, Running::start(traffic))
}

fn soft_loop() -> Vf {
    Vf::probe(&VfSpec::SoftLoop).unwrap()
}

/// The state is all there is of a session: a copy of it, with the lanes at home and the memory unmapped.
fn tear_down(session: Session, lanes: &mut PortLanes) -> SessionState {
    let memory = Arc::downgrade(session.memory());
    let state = session.suspend(lanes);
    assert!(memory.upgrade().is_none(), "the memory is unmapped");
    state.clone()
}

#[test]
fn a_session_resumes_from_its_state_under_traffic() {
    for features in [0, EVENT_IDX] {
        let core = core();
        let (mut lanes, counters) = port(&core, soft_loop());
        let (mut session, running) = guest(&mut lanes, features);
        for round in 0..200 {
            let state = tear_down(session, &mut lanes);
            assert!(state.rings.iter().all(|ring| ring.started && ring.enabled));
            session = Session::resume(offer(1), state, &mut lanes).unwrap();
            // Sometimes at once again.
            if round % 4 != 0 {
                running.flows(1 + round % 50);
            }
        }
        let traffic = running.finish();
        let state = session.suspend(&mut lanes);
        assert_eq!(state.rings.iter().map(|ring| ring.base).collect::<Vec<_>>(), [traffic.received as u16; 2]);
        for counters in [counters.guest_to_vf, counters.vf_to_guest] {
            let counted = counters.snapshot();
            assert_eq!((counted.packets, counted.dropped.total()), (traffic.sent, 0));
        }
        drop((lanes, state));
        end(core);
    }
}

/// The same state on the lanes of another port, over another VF, and back. What is in a VF stays there: so the
/// traffic rests for each move, and goes on while there is nobody to take it.
#[test]
fn a_session_resumes_on_other_lanes() {
    let core = core();
    let (first, first_counters) = port(&core, soft_loop());
    let (second, second_counters) = port(&core, soft_loop());
    let mut ports = [first, second];
    let (mut session, running) = guest(&mut ports[0], EVENT_IDX);
    for round in 0..60 {
        running.flows(50);
        running.hold();
        let state = tear_down(session, &mut ports[round % 2]);
        running.go_on();
        session = Session::resume(offer(1), state, &mut ports[(round + 1) % 2]).unwrap();
    }
    let traffic = running.finish();
    drop(session.suspend(&mut ports[0]));
    for counters in [&first_counters, &second_counters] {
        assert_eq!(counters.guest_to_vf.snapshot().packets, counters.vf_to_guest.snapshot().packets);
        assert!(counters.guest_to_vf.snapshot().packets >= 1000);
    }
    let sent = |counters: &PortCounters| counters.guest_to_vf.snapshot();
    let (first, second) = (sent(&first_counters), sent(&second_counters));
    assert_eq!(first.packets + second.packets, traffic.sent);
    assert_eq!(first.dropped.total() + second.dropped.total(), 0);
    drop(ports);
    end(core);
}

/// All that pauses a running session, under traffic: new call fds, features, a memory table that keeps what
/// is in use, another that does not; stop and start of a ring.
#[test]
fn messages_of_a_running_session_lose_nothing() {
    let core = core();
    let (mut lanes, counters) = port(&core, soft_loop());
    let (mut session, running) = guest(&mut lanes, 0);
    let [first_region]: [_; 1] = session.memory().regions().try_into().unwrap();
    let file: OwnedFd = session.state().regions[0].1.try_clone().unwrap().into();
    let region = [first_region.gpa.0, first_region.size, first_region.user.0, 0];
    let (beside, beside_file) = ([GPA, SIZE, USER + (1 << 40), 0], memfd(SIZE));
    for round in 0..100_u32 {
        let ring = round % 2;
        let request = match round % 7 {
            0 => eventfd_message(Req::SET_VRING_CALL, ring),
            1 => mem_table(&[(region, &file), (beside, &beside_file)]),
            2 => no_fd_message(Req::SET_VRING_CALL, ring),
            // Drains: a region goes away.
            3 => mem_table(&[(region, &file)]),
            4 => u64_message(Req::SET_FEATURES, PROTOCOL_FEATURES | VERSION_1 | u64::from(round & 8) << 25),
            5 => ring_message(Req::GET_VRING_BASE, ring, 0),
            _ => eventfd_message(Req::SET_VRING_ERR, ring),
        };
        let stopped = request.code == u32::from(Req::GET_VRING_BASE);
        let (taken_out, features) = (lanes.taken_out, session.state().features);
        let kick = session.state().rings[0].kick.clone().unwrap();
        match session.handle(request, &mut lanes).unwrap() {
            Outcome::Silent => {}
            Outcome::Reply(reply) if stopped => {
                let base = u32::from_ne_bytes(reply.body[4..].try_into().unwrap());
                let again = [
                    ring_message(Req::SET_VRING_BASE, ring, base),
                    message(Req::SET_VRING_KICK, &u64::from(ring).to_ne_bytes(), vec![kick.try_clone().unwrap()]),
                ];
                for request in again {
                    assert!(matches!(session.handle(request, &mut lanes), Ok(Outcome::Silent)));
                }
            }
            other => panic!("{other:?}"),
        }
        // What others do is not worth waiting for a VF that is slow.
        let drained = match round % 7 {
            3 => 2,
            4 => 2 * usize::from(features != session.state().features),
            5 => 1,
            _ => 0,
        };
        assert_eq!(lanes.taken_out - taken_out, drained, "round {round}");
        running.flows(20);
    }
    let traffic = running.finish();
    drop(session.suspend(&mut lanes));
    for counters in [counters.guest_to_vf, counters.vf_to_guest] {
        let counted = counters.snapshot();
        assert_eq!((counted.packets, counted.dropped.total()), (traffic.sent, 0));
    }
    drop(lanes);
    end(core);
}
