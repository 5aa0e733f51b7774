//! VF→guest: what the VF had is what the guest got, plus the named drops, plus what is held.

use proptest::prelude::*;

use super::scripted::ScriptedRx;
use super::*;
use crate::ring::testing::{number, numbered};

struct Rig {
    guest: Guest,
    vf: Vec<ScriptedRx>,
    lane: VfToGuest<ScriptedRx>,
    counters: Arc<LaneCounters>,
    clock: Clock,
    arrived: u64,
    received: u64,
    last: [Option<u64>; 256],
}

impl Rig {
    fn new(pairs: usize, queues: usize) -> Self {
        let guest = Guest::new(pairs, 64);
        let vf: Vec<_> = (0..queues).map(|_| ScriptedRx::default()).collect();
        let counters = Arc::new(LaneCounters::default());
        let mut lane = VfToGuest::new(LaneId(1), pairs, vf.clone(), counters.clone());
        for pair in 0..pairs {
            lane.insert_ring(pair, guest.rx_plan(pair)).unwrap();
        }
        Self { guest, vf, lane, counters, clock: Clock::new(), arrived: 0, received: 0, last: [None; 256] }
    }

    fn arrive(&mut self, queue: usize, flow: u8, n: usize) {
        for _ in 0..n {
            self.vf[queue].arrive(numbered(flow, self.arrived, 64));
            self.arrived += 1;
        }
    }

    fn turn(&mut self) {
        self.lane.turn(&self.clock.turn());
        self.check();
    }

    fn held(&self) -> u64 {
        self.lane.sources.iter().map(|source| source.held.len() as u64).sum()
    }

    fn check(&mut self) {
        for rx in &mut self.guest.rx {
            while let Some(frame) = rx.receive() {
                let (flow, number) = number(&frame);
                let last = &mut self.last[usize::from(flow)];
                assert!(last.is_none_or(|last| last < number), "flow {flow}: {number} behind {last:?}");
                *last = Some(number);
                self.received += 1;
            }
        }
        let counted = self.counters.snapshot();
        assert_eq!(self.received, counted.packets);
        assert_eq!(counted.bytes, 64 * counted.packets);
        let waiting: u64 = self.vf.iter().map(|queue| queue.waiting() as u64).sum();
        assert_eq!(self.arrived, self.received + counted.dropped.total() + self.held() + waiting, "{counted:?}");
    }

    fn empty(&self) -> u64 {
        self.counters.snapshot().dropped.guest_ring_empty
    }

    /// As the front end does with SET_VRING_ENABLE and ADD_MEM_REG.
    fn change(&mut self, pair: usize, enabled: bool) {
        self.guest.grow();
        assert!(self.lane.change_ring(pair, &RingPlan { enabled, ..self.guest.rx_plan(pair) }));
        self.check();
    }

    fn rebuild(&mut self, pair: usize, enabled: bool) {
        let used = self.guest.rx[pair].ring.used_idx();
        assert_eq!(self.lane.remove_ring(pair), Some(used));
        self.lane.insert_ring(pair, RingPlan { enabled, ..self.guest.rx_plan(pair) }).unwrap();
        self.check();
    }
}

/// A flow that the hash of two open rings sends to ring `pair`.
fn flow_to(pair: u32) -> u8 {
    (0..=255).find(|&flow| super::super::headers::flow_hash(&numbered(flow, 0, 64)) % 2 == pair).unwrap()
}

#[test]
fn a_burst_is_held_for_fifty_microseconds() {
    let mut rig = Rig::new(1, 1);
    rig.arrive(0, 0, 40);
    rig.turn();
    // One burst is held; the rest waits in the VF.
    assert_eq!((rig.held(), rig.vf[0].waiting(), rig.empty()), (32, 8, 0));
    rig.clock.pass(49);
    rig.turn();
    assert_eq!((rig.held(), rig.empty()), (32, 0));
    // In time.
    rig.guest.rx[0].post(10);
    rig.turn();
    assert_eq!((rig.received, rig.held(), rig.vf[0].waiting()), (10, 22, 8));
    rig.clock.pass(1);
    rig.turn();
    // Too late; and what comes now is read and dropped at once.
    assert_eq!((rig.held(), rig.vf[0].waiting(), rig.empty()), (0, 0, 30));
    rig.arrive(0, 0, 5);
    rig.turn();
    assert_eq!((rig.held(), rig.empty()), (0, 35));
    // Until there are buffers again: then there is a grace again.
    rig.guest.rx[0].post(3);
    rig.arrive(0, 0, 5);
    rig.turn();
    assert_eq!((rig.received, rig.held(), rig.empty()), (13, 2, 35));
}

/// One VF queue feeds two rings, neither of which has buffers, and one lies.
#[test]
fn held_frames_keep_their_order_when_another_ring_is_taken_off() {
    let (mut rig, flows) = (Rig::new(2, 1), [flow_to(0), flow_to(1)]);
    for flow in [flows[0], flows[1], flows[0], flows[0]] {
        rig.arrive(0, flow, 1);
    }
    rig.turn();
    assert_eq!(rig.held(), 4);
    let ring = &rig.guest.rx[1].ring;
    ring.put_u16(ring.avail_at() + 2, 1000);
    rig.turn();
    assert_eq!((rig.lane.fault(1), rig.held()), (Some(crate::ring::RingFault::AvailIndex), 3));
    rig.guest.rx[0].post(3);
    rig.turn();
    assert_eq!((rig.received, rig.held()), (3, 0));
}

/// One VF queue feeds two rings.
#[test]
fn a_full_ring_does_not_delay_another_of_the_same_queue() {
    let (mut rig, flows) = (Rig::new(2, 1), [flow_to(0), flow_to(1)]);
    rig.guest.rx[1].post(64);
    for _ in 0..20 {
        rig.arrive(0, flows[0], 3);
        rig.arrive(0, flows[1], 3);
        let before = rig.received;
        rig.turn();
        assert_eq!(rig.received, before + 3, "those of the other ring, at once");
        rig.guest.rx[1].post(64);
    }
    // 32 were held, the others dropped; the clock has not moved.
    assert_eq!((rig.held(), rig.empty()), (32, 28));
}

/// Each frame has a grace of its own: those of a ring that became full later are not dropped with the first.
#[test]
fn the_grace_of_one_ring_is_not_that_of_another() {
    let (mut rig, flows) = (Rig::new(2, 1), [flow_to(0), flow_to(1)]);
    rig.arrive(0, flows[0], 1);
    rig.turn();
    rig.clock.pass(40);
    rig.arrive(0, flows[1], 1);
    rig.turn();
    rig.clock.pass(10);
    rig.turn();
    assert_eq!((rig.held(), rig.empty()), (1, 1));
    rig.guest.rx[1].post(1);
    rig.turn();
    assert_eq!((rig.received, rig.held(), rig.empty()), (1, 0, 1));
}

#[test]
fn a_full_ring_does_not_delay_another_queue() {
    let mut rig = Rig::new(2, 2);
    rig.guest.rx[1].post(64);
    rig.arrive(0, 0, 100);
    rig.arrive(1, 1, 60);
    rig.turn();
    assert_eq!((rig.received, rig.held(), rig.vf[0].waiting()), (60, 32, 68));
}

/// What is held for a ring that is disabled meanwhile goes to one that is not, or nowhere.
#[test]
fn a_disabled_ring_gets_nothing_not_even_what_was_held_for_it() {
    let (mut rig, flows) = (Rig::new(2, 1), [flow_to(0), flow_to(1)]);
    rig.arrive(0, flows[0], 2);
    rig.arrive(0, flows[1], 2);
    rig.turn();
    rig.guest.rx.iter_mut().for_each(|rx| rx.post(64));
    rig.change(0, false);
    rig.turn();
    assert_eq!((rig.guest.rx[0].ring.used_idx(), rig.guest.rx[1].ring.used_idx()), (0, 4));
    rig.rebuild(1, false);
    rig.arrive(0, flows[1], 5);
    rig.turn();
    assert_eq!(rig.counters.snapshot().dropped.disabled, 5);
}

/// Other features on the only ring rebuild it.
#[test]
fn a_rebuilt_ring_misses_nothing_that_the_vf_has_received() {
    let mut rig = Rig::new(1, 1);
    rig.guest.rx[0].post(20);
    rig.arrive(0, 0, 50);
    rig.turn();
    assert_eq!((rig.received, rig.held()), (20, 12));
    rig.rebuild(0, true);
    rig.guest.rx[0].post(64);
    rig.turn();
    assert_eq!((rig.received, rig.counters.snapshot().dropped.total()), (50, 0));
}

#[test]
fn a_quarantined_ring_shows_what_was_counted_and_keeps_its_position() {
    let mut rig = Rig::new(2, 2);
    rig.guest.rx[0].post(40);
    rig.guest.rx[1].post(64);
    rig.arrive(0, 0, 1);
    rig.turn();
    // The lane looks at the index again in the second burst, for which seven buffers are left.
    rig.guest.rx[0].ring.avail += 100;
    rig.guest.rx[0].ring.publish();
    rig.arrive(0, 0, 40);
    rig.arrive(1, 1, 5);
    rig.turn();
    assert_eq!(rig.lane.fault(0), Some(crate::ring::RingFault::AvailIndex));
    assert_eq!(rig.guest.rx[0].ring.used_idx(), 33);
    // One frame met the fault; those behind it go to the ring that is left.
    assert_eq!((rig.received, rig.counters.snapshot().dropped.not_ready), (45, 1));
    assert_eq!(rig.counters.quarantined(), 1);
    assert_eq!(rig.lane.remove_ring(0), Some(33));
}

#[derive(Clone, Debug)]
enum Step {
    Arrive(usize, usize),
    Turn,
    Pass(u64),
    Post(usize, usize),
    Rebuild(usize, bool),
    Change(usize, bool),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..16_usize, 1..40_usize).prop_map(|(flow, n)| Step::Arrive(flow, n)),
        6 => Just(Step::Turn),
        3 => (0..60_u64).prop_map(Step::Pass),
        4 => (0..3_usize, 1..40_usize).prop_map(|(pair, n)| Step::Post(pair, n)),
        1 => (0..3_usize, any::<bool>()).prop_map(|(pair, enabled)| Step::Rebuild(pair, enabled)),
        1 => (0..3_usize, any::<bool>()).prop_map(|(pair, enabled)| Step::Change(pair, enabled)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_the_guest_posts_nothing_is_lost_that_no_counter_names(
        queues in 1..=3_usize,
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let mut rig = Rig::new(3, queues);
        for step in steps {
            match step {
                // A VF keeps each flow on one queue.
                Step::Arrive(flow, n) => rig.arrive(flow % queues, flow as u8, n),
                Step::Turn => rig.turn(),
                Step::Pass(micros) => rig.clock.pass(micros),
                Step::Post(pair, n) => rig.guest.rx[pair].post(n),
                Step::Rebuild(pair, enabled) => rig.rebuild(pair, enabled),
                Step::Change(pair, enabled) => rig.change(pair, enabled),
            }
            rig.check();
        }
        // What the VF still has is received in turns; nothing is held for longer than 50 µs.
        for _ in 0..30 {
            rig.turn();
            rig.clock.pass(50);
        }
        rig.turn();
        prop_assert_eq!(rig.held(), 0);
        prop_assert_eq!(rig.arrived, rig.received + rig.counters.snapshot().dropped.total());
    }
}

/// As in the other direction.
#[test]
fn a_turn_of_long_chains_ends_early() {
    const LONGEST: u16 = 512;
    let mut guest = Guest::new(1, LONGEST);
    let (vf, counters) = (ScriptedRx::default(), Arc::new(LaneCounters::default()));
    let mut lane = VfToGuest::new(LaneId(1), 1, vec![vf.clone()], counters.clone());
    lane.insert_ring(0, guest.rx_plan(0)).unwrap();
    let ring = &mut guest.rx[0].ring;
    let buffer = ring.gpa(ring.buffers().start);
    let mut chain = [(0, 0); LONGEST as usize];
    chain[usize::from(LONGEST) - 1] = (buffer, BUFFER as u32);
    ring.chain(0, &chain, crate::ring::testing::WRITE);
    (0..LONGEST).for_each(|_| ring.offer(0));
    ring.publish();
    (0..256).for_each(|n| vf.arrive(numbered(0, n, 64)));
    let clock = Clock::new();
    lane.turn(&clock.turn());
    assert_eq!(counters.snapshot().packets, 32, "one burst");
    for _ in 0..8 {
        lane.turn(&clock.turn());
    }
    assert_eq!((counters.snapshot().packets, guest.rx[0].ring.used_idx()), (256, 256));
}

/// What came before is not for a ring that begins disabled, however soon it is enabled.
#[test]
fn a_ring_that_starts_disabled_gets_nothing_from_before() {
    let mut guest = Guest::new(1, 64);
    let vf = ScriptedRx::default();
    let counters = Arc::new(LaneCounters::default());
    let mut lane = VfToGuest::new(LaneId(1), 1, vec![vf.clone()], counters.clone());
    lane.insert_ring(0, guest.rx_plan(0)).unwrap();
    lane.remove_ring(0).unwrap();
    (0..3).for_each(|n| vf.arrive(numbered(1, n, 64)));
    lane.insert_ring(0, RingPlan { enabled: false, ..guest.rx_plan(0) }).unwrap();
    assert_eq!((vf.waiting(), counters.snapshot().dropped.disabled), (0, 3));
    lane.remove_ring(0).unwrap();
    lane.insert_ring(0, guest.rx_plan(0)).unwrap();
    guest.rx[0].post(64);
    vf.arrive(numbered(1, 3, 64));
    lane.turn(&Clock::new().turn());
    assert_eq!(guest.rx[0].receive().map(|frame| number(&frame)), Some((1, 3)));
    assert!(guest.rx[0].receive().is_none());
    assert_eq!(counters.snapshot().dropped.total(), 3);
}
