//! A port with several lanes a direction, on several cores, under traffic on all of its pairs.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use super::traffic::{end, negotiate};
use super::*;
use crate::relay::tests::traffic::{Running, Traffic};
use crate::relay::{IdlePolicy, Poller};
use crate::ring::testing::{Driver, Receiver, Sender};
use crate::session::Lanes;
use crate::session::lanes::PortLanes;
use crate::session::plan::PortCounters;
use crate::session::port_log::PortLog;
use crate::vf::{Vf, VfConfig, VfSpec};

const PAIRS: usize = 4;
const RING: u16 = 256;

/// Two cores; on one CPU where there are not two.
fn cores() -> Arc<Vec<Poller>> {
    let cpus = core_affinity::get_core_ids().unwrap();
    let core = |at: usize| Poller::start(cpus[at % cpus.len()].id, IdlePolicy::Adaptive, || Ok(())).unwrap();
    Arc::new(vec![core(0), core(1)])
}

struct Port {
    lanes: PortLanes,
    counters: PortCounters,
    session: Session,
    /// One a pair.
    running: Vec<Running>,
}

/// A port with a lane on each core, over a looping VF with so many queues, and traffic on all pairs.
fn port(cores: &Arc<Vec<Poller>>, queues: u16) -> Port {
    const BUFFER: usize = 2048;
    const SPACE: usize = 32 * 1024;
    let counters = PortCounters::new(2);
    let log = Rc::new(PortLog::new("p"));
    let placed = [(0, 0), (1, 1)];
    let mut lanes = PortLanes::new("p", log, cores.clone(), &placed, counters.clone(), PAIRS as u16, 1500).unwrap();
    let vf = Vf::probe(&VfSpec::SoftLoop).unwrap();
    lanes.give_vf(VfSpec::SoftLoop, vf, &VfConfig { queues, mtu: 1500, mac: None }).unwrap();

    let buffers = usize::from(RING) * BUFFER;
    let at = |ring: usize| (ring * SPACE, 2 * PAIRS * SPACE + ring * buffers);
    let len = at(2 * PAIRS).1;
    let first = Driver::new(len, RING, 0);
    let others: [Driver; 7] = std::array::from_fn(|index| first.beside(at(index + 1).0, RING, 0));
    let rings: [&Driver; 8] = std::array::from_fn(|index| if index == 0 { &first } else { &others[index - 1] });
    let mut session = Session::new(offer(PAIRS as u16));
    let kick: Arc<OwnedFd> = Arc::new(negotiate(&mut session, &mut lanes, 0, len as u64, rings));
    let mut rings = std::iter::once(first).chain(others);
    let running = (0..PAIRS).map(|pair| {
        let rx = Receiver::new(rings.next().unwrap(), at(2 * pair).1, BUFFER);
        let tx = Sender::new(rings.next().unwrap(), at(2 * pair + 1).1, BUFFER);
        Running::start(Traffic { tx, rx, kick: kick.clone(), event_idx: false, sent: 0, received: 0 })
    });
    let running = running.collect();
    Port { lanes, counters, session, running }
}

impl Port {
    fn flows(&self, n: u64) {
        self.running.iter().for_each(|running| running.flows(n));
    }

    /// Ends the traffic, of which nothing was lost. How many frames each pair had.
    fn finish(self) -> Vec<u64> {
        let Self { mut lanes, counters, session, running } = self;
        let sent: Vec<_> = running.into_iter().map(|running| running.finish().sent).collect();
        drop(session.suspend(&mut lanes));
        for direction in [&counters.guest_to_vf, &counters.vf_to_guest] {
            let counted = direction.snapshot();
            assert_eq!((counted.packets, counted.dropped.total()), (sent.iter().sum(), 0), "{counted:?}");
        }
        sent
    }
}

#[test]
fn each_lane_has_the_pairs_of_its_number() {
    let cores = cores();
    let port = port(&cores, PAIRS as u16);
    assert_eq!(port.lanes.vf_status().unwrap().lanes, 2);
    port.flows(500);
    let counters = port.counters.clone();
    let cpus: Vec<_> = port.lanes.ring_status(port.session.state()).iter().map(|ring| ring.cpu).collect();
    let sent = port.finish();
    for direction in [&counters.guest_to_vf, &counters.vf_to_guest] {
        let lanes = [0, 1].map(|lane| direction.lane(lane).snapshot().packets);
        assert_eq!(lanes, [sent[0] + sent[2], sent[1] + sent[3]]);
    }
    for (ring, cpu) in cpus.into_iter().enumerate() {
        assert_eq!(cpu, Some(cores[ring / 2 % 2].cpu));
    }
    end(cores);
}

/// Other cores, fewer and more of them: that moves the lanes, and makes fewer and more.
#[test]
fn lanes_move_and_are_divided_anew_under_traffic() {
    let cores = cores();
    let mut port = port(&cores, PAIRS as u16);
    let placed: [&[(usize, usize)]; 5] =
        [&[(0, 0)], &[(1, 0), (0, 1)], &[(1, 1)], &[(1, 1), (0, 0)], &[(0, 0), (1, 1)]];
    for round in 0..60 {
        let to = placed[round % placed.len()];
        port.lanes.pause();
        port.lanes.set_cores(to);
        port.session.hand_out(&mut port.lanes);
        assert_eq!(port.lanes.vf_status().unwrap().lanes, to.len());
        port.flows(30);
    }
    port.finish();
    end(cores);
}

/// Where pairs share a queue of the VF, frames come back on any ring of its lane: the flows of this guest do not tell.
#[test]
fn with_one_queue_there_is_one_lane() {
    let cores = cores();
    for (queues, lanes) in [(1, 1), (3, 1), (2, 2)] {
        let counters = PortCounters::new(2);
        let log = Rc::new(PortLog::new("p"));
        let placed = [(0, 0), (1, 1)];
        let mut port = PortLanes::new("p", log, cores.clone(), &placed, counters, PAIRS as u16, 1500).unwrap();
        let vf = Vf::probe(&VfSpec::SoftLoop).unwrap();
        port.give_vf(VfSpec::SoftLoop, vf, &VfConfig { queues, mtu: 1500, mac: None }).unwrap();
        assert_eq!(port.vf_status().unwrap().lanes, lanes, "{queues} queues");
        port.take_vf().unwrap();
    }
    end(cores);
}

/// A message about one ring takes home the lane that has it.
#[test]
fn a_lane_goes_on_while_another_is_home() {
    let cores = cores();
    let mut port = port(&cores, PAIRS as u16);
    for ring in 0..2 * PAIRS {
        let pair = ring / 2;
        port.flows(10);
        port.lanes.pause_ring(ring);
        for (other, running) in port.running.iter().enumerate() {
            if other % 2 != pair % 2 {
                running.flows(300);
            }
        }
        port.session.hand_out(&mut port.lanes);
    }
    port.flows(10);
    port.finish();
    end(cores);
}

/// Every message of a running session that is about one ring, on each ring, with traffic on all.
#[test]
fn messages_about_one_ring_lose_nothing() {
    let cores = cores();
    let mut port = port(&cores, PAIRS as u16);
    for round in 0..96_u32 {
        let ring = round % 8;
        let request = match round / 8 % 3 {
            0 => eventfd_message(Req::SET_VRING_CALL, ring),
            1 => ring_message(Req::GET_VRING_BASE, ring, 0),
            _ => eventfd_message(Req::SET_VRING_ERR, ring),
        };
        let stopped = request.code == u32::from(Req::GET_VRING_BASE);
        let kick = port.session.state().rings[0].kick.clone().unwrap();
        // What a stopped ring was to get would be another's, or be dropped.
        if stopped && ring % 2 == 0 {
            port.running.iter().for_each(Running::hold);
        }
        match port.session.handle(request, &mut port.lanes).unwrap() {
            Outcome::Silent => {}
            Outcome::Reply(reply) if stopped => {
                let base = u32::from_ne_bytes(reply.body[4..].try_into().unwrap());
                let again = [
                    ring_message(Req::SET_VRING_BASE, ring, base),
                    message(Req::SET_VRING_KICK, &u64::from(ring).to_ne_bytes(), vec![kick.try_clone().unwrap()]),
                ];
                for request in again {
                    assert!(matches!(port.session.handle(request, &mut port.lanes), Ok(Outcome::Silent)));
                }
                if ring % 2 == 0 {
                    port.running.iter().for_each(Running::go_on);
                }
            }
            other => panic!("{other:?}"),
        }
        port.flows(10);
    }
    port.finish();
    end(cores);
}
