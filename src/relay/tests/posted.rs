//! VF→guest over a VF that takes buffers before there are frames for them: each of those has its place among the guest's,
//! in whichever buffer it comes.

use proptest::prelude::*;

use super::scripted::EarlyRx;
use super::*;
use crate::ring::testing::{number, numbered, packed};

/// Of the VF's ring, and of the guest's.
const DESCRIPTORS: usize = 24;
const SIZE: u16 = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Split,
    Packed,
    PackedInOrder,
}

enum Driven {
    Split(Receiver),
    Packed(packed::Receiver),
}

impl Driven {
    fn post(&mut self, n: usize) {
        match self {
            Self::Split(rx) => rx.post(n),
            Self::Packed(rx) => rx.post(n),
        }
    }

    fn receive(&mut self) -> Option<Vec<u8>> {
        match self {
            Self::Split(rx) => rx.receive(),
            Self::Packed(rx) => rx.receive(),
        }
    }

    fn posted(&self) -> usize {
        match self {
            Self::Split(rx) => rx.posted(),
            Self::Packed(rx) => rx.posted(),
        }
    }
}

struct Rig {
    driven: Driven,
    plan: RingPlan,
    vf: EarlyRx,
    lane: VfToGuest<EarlyRx>,
    counters: Arc<LaneCounters>,
    clock: Clock,
    arrived: u64,
    received: u64,
    /// By restarts of the VF.
    lost: u64,
    last: Option<u64>,
    /// Frames are from these lengths.
    lens: usize,
}

impl Rig {
    fn new(format: Format) -> Self {
        const LEN: usize = 256 << 10;
        let from = 16 << 10;
        let mut guest = Guest::new(1, SIZE);
        let mut plan = guest.rx_plan(0);
        let driven = match format {
            Format::Split => Driven::Split(guest.rx.remove(0)),
            _ => {
                let start = packed::Place { index: 60, wrap: true };
                let mut ring = packed::Driver::new(LEN, SIZE, start);
                ring.in_order = format == Format::PackedInOrder;
                let spec = RegionSpec { gpa: Gpa(GPA), size: LEN as u64, user: UserAddr(USER), offset: 0 };
                plan.memory = GuestMemory::empty().replaced(vec![(spec, ring.file.try_clone().unwrap())]).unwrap();
                let user = |at: usize| UserAddr(USER + at as u64);
                plan.config.addresses = RingAddresses {
                    desc: user(ring.ring_at()),
                    avail: user(ring.driver_at()),
                    used: user(ring.device_at()),
                };
                (plan.config.packed, plan.config.base) = (true, start.encode());
                plan.config.in_order = ring.in_order;
                plan.lendable = Some(Lendable::all(plan.memory.clone()));
                Driven::Packed(packed::Receiver::new(ring, from, BUFFER))
            }
        };
        let (vf, counters) = (EarlyRx::new(DESCRIPTORS), Arc::new(LaneCounters::default()));
        let mut lane = VfToGuest::new(LaneId(1), 1, vec![vf.clone()], counters.clone());
        lane.insert_ring(0, plan.clone()).unwrap();
        let clock = Clock::new();
        Self { driven, plan, vf, lane, counters, clock, arrived: 0, received: 0, lost: 0, last: None, lens: 0 }
    }

    fn arrive(&mut self, n: usize) {
        for _ in 0..n {
            self.lens = (self.lens + 397) % 1400;
            self.vf.device().frames.push_back(numbered(0, self.arrived, 60 + self.lens));
            self.arrived += 1;
        }
    }

    fn turn(&mut self) {
        self.lane.turn(&self.clock.turn());
        self.check();
    }

    fn held(&self) -> u64 {
        self.lane.sources[0].held.len() as u64
    }

    fn counted(&self) -> crate::relay::LaneSnapshot {
        self.counters.snapshot()
    }

    fn check(&mut self) {
        while let Some(frame) = self.driven.receive() {
            if !frame.is_empty() {
                let (_, number) = number(&frame);
                assert!(self.last.is_none_or(|last| last < number), "{number} behind {:?}", self.last);
                self.last = Some(number);
                self.received += 1;
            }
        }
        let counted = self.counted();
        assert_eq!(self.received, counted.packets);
        let waiting = self.vf.device().frames.len() as u64;
        assert_eq!(
            self.arrived,
            self.received + counted.dropped.total() + self.held() + waiting + self.lost,
            "{counted:?}"
        );
    }

    /// As a port does.
    fn take_back(&mut self) {
        if !self.lane.await_returns() {
            self.lost += self.vf.restart() as u64;
            assert!(self.lane.await_returns(), "a VF that was stopped has nothing");
        }
        assert_eq!(self.vf.of_guest(), 0);
    }

    fn rebuild(&mut self) {
        self.take_back();
        self.plan.config.base = self.lane.remove_ring(0).unwrap();
        self.check();
        self.lane.insert_ring(0, self.plan.clone()).unwrap();
    }

    /// Nothing of the ring is taken out for it.
    fn amend(&mut self, lends: bool) {
        let lendable = lends.then(|| Lendable::all(self.plan.memory.clone()));
        assert!(self.lane.change_ring(0, &RingPlan { lendable, ..self.plan.clone() }));
    }
}

const FORMATS: [Format; 3] = [Format::Split, Format::Packed, Format::PackedInOrder];

#[test]
fn frames_come_in_order_whichever_buffers_they_come_in() {
    for format in FORMATS {
        let mut rig = Rig::new(format);
        // All buffers are the VF's own, and each has to have a place ahead of the guest's first: one more is needed.
        rig.driven.post(DESCRIPTORS);
        rig.arrive(1);
        rig.turn();
        assert_eq!((rig.received, rig.vf.of_guest(), rig.driven.posted()), (1, 0, DESCRIPTORS - 1), "{format:?}");
        assert_eq!(rig.counters.shortage(), Shortage::Few);
        rig.driven.post(12);
        rig.arrive(1);
        rig.turn();
        assert_eq!((rig.received, rig.vf.of_guest(), rig.counted().zero_copied), (2, 1, 0), "{format:?}");
        assert_eq!(rig.counters.shortage(), Shortage::None);
        // The places of those that came before are copied to, until the guest's own come.
        for _ in 0..DESCRIPTORS - 1 {
            rig.driven.post(64);
            rig.arrive(1);
            rig.turn();
        }
        assert_eq!((rig.counted().zero_copied, rig.vf.of_guest()), (0, DESCRIPTORS), "{format:?}");
        rig.driven.post(64);
        for _ in 0..10 {
            rig.arrive(32);
            rig.turn();
            rig.driven.post(64);
        }
        let counted = rig.counted();
        assert_eq!((counted.packets, counted.dropped.total()), (rig.arrived, 0), "{format:?}");
        assert!(counted.zero_copied >= 320 - 8, "{format:?}: {counted:?}");
        // The guest is slow: more frames than it has buffers. Those that come then are in the VF's own again, and so are
        // some of the next.
        rig.arrive(200);
        for _ in 0..8 {
            rig.turn();
        }
        assert!(rig.counted().packets < rig.arrived);
        for _ in 0..20 {
            rig.clock.pass(100);
            rig.turn();
            rig.driven.post(64);
        }
        let before = rig.counted();
        for _ in 0..100 {
            rig.arrive(7);
            rig.turn();
            rig.driven.post(64);
        }
        let counted = rig.counted();
        assert_eq!(counted.packets - before.packets, 700, "{format:?}");
        assert!(counted.zero_copied - before.zero_copied >= 700 - 2 * DESCRIPTORS as u64, "{format:?}");
    }
}

#[test]
fn short_buffers_are_not_posted_and_it_says_so() {
    let mut rig = Rig::new(Format::Split);
    let Driven::Split(rx) = &mut rig.driven else { unreachable!() };
    let ring = &mut rx.ring;
    // All but the last are long enough for a frame, and not for all that the VF may write.
    let gpa = ring.gpa(ring.buffers().start);
    for id in 0..SIZE {
        ring.chain(id, &[(gpa, 12 + EarlyRx::MOST as u32 - 1)], crate::ring::testing::WRITE);
        ring.offer(id);
    }
    ring.publish();
    rig.arrive(30);
    rig.lane.turn(&rig.clock.turn());
    assert_eq!((rig.counted().packets, rig.counted().zero_copied, rig.vf.of_guest()), (30, 0, 0));
    assert_eq!(rig.counters.shortage(), Shortage::Unfit);
}

/// SET_VRING_CALL on a running ring.
#[test]
fn a_new_doorbell_leaves_posted_buffers_where_they_are() {
    for format in FORMATS {
        let mut rig = Rig::new(format);
        for _ in 0..5 {
            rig.driven.post(64);
            rig.arrive(20);
            rig.turn();
        }
        let before = rig.vf.of_guest();
        assert_eq!(before, DESCRIPTORS);
        rig.amend(true);
        assert_eq!(rig.vf.of_guest(), before);
        rig.driven.post(64);
        rig.arrive(30);
        rig.turn();
        assert_eq!((rig.counted().packets, rig.lost), (130, 0), "{format:?}");
    }
}

#[test]
fn switched_off_under_traffic_it_loses_nothing_and_ends() {
    for format in FORMATS {
        let mut rig = Rig::new(format);
        for round in 0..20 {
            rig.amend(round % 2 == 0);
            for _ in 0..4 {
                rig.driven.post(64);
                rig.arrive(20);
                rig.turn();
            }
            if round % 2 == 1 {
                assert_eq!(rig.vf.of_guest(), 0, "{format:?}: all were used");
            }
        }
        let counted = rig.counted();
        assert_eq!((counted.packets, rig.lost), (1600, 0), "{format:?}");
        assert!(counted.zero_copied > 400 && counted.zero_copied < 1200, "{format:?}: {counted:?}");
    }
}

/// GET_VRING_BASE: what is posted comes back, and the next one begins with it.
#[test]
fn a_ring_that_stops_gets_its_buffers_back() {
    for format in FORMATS {
        let mut rig = Rig::new(format);
        for _ in 0..5 {
            for _ in 0..5 {
                rig.driven.post(64);
                rig.arrive(20);
                rig.turn();
            }
            assert_eq!(rig.vf.of_guest(), DESCRIPTORS);
            let posted = rig.driven.posted();
            rig.arrive(3);
            rig.rebuild();
            assert_eq!(rig.driven.posted(), posted, "{format:?}: none was used");
        }
        assert_eq!(rig.lost, 15);
        assert_eq!(rig.counted().packets, 500);
    }
}

/// On its core, where nothing can be taken back: frames still come into the guest's memory, and go no further.
#[test]
fn a_quarantined_ring_leaves_its_buffers_with_the_vf() {
    let mut rig = Rig::new(Format::Split);
    for _ in 0..3 {
        rig.driven.post(64);
        rig.arrive(20);
        rig.turn();
    }
    assert_eq!(rig.vf.of_guest(), DESCRIPTORS);
    rig.driven.post(64);
    let Driven::Split(rx) = &mut rig.driven else { unreachable!() };
    rx.ring.avail += 1000;
    rx.ring.publish();
    rig.arrive(500);
    (0..20).for_each(|_| rig.turn());
    assert_eq!(rig.lane.fault(0), Some(crate::ring::RingFault::AvailIndex));
    let counted = rig.counted();
    assert_eq!(counted.packets + counted.dropped.not_ready, rig.arrived);
    rig.take_back();
    let position = rig.lane.remove_ring(0);
    let Driven::Split(rx) = &rig.driven else { unreachable!() };
    assert_eq!(position, Some(rx.ring.used_idx()));
}

/// Two queues, of which each has a ring or both have the same: then what comes from one must not wait until the VF has
/// used the buffers that it got by the other.
#[test]
fn two_queues_with_one_ring_get_no_buffers_of_it() {
    let mut guest = Guest::new(2, SIZE);
    let plans = [guest.rx_plan(0), guest.rx_plan(1)];
    let queues = [EarlyRx::new(DESCRIPTORS), EarlyRx::new(DESCRIPTORS)];
    let counters = Arc::new(LaneCounters::default());
    let mut lane = VfToGuest::new(LaneId(1), 2, queues.to_vec(), counters.clone());
    let clock = Clock::new();
    let arrive = |queue: usize, n: u64| {
        queues[queue].device().frames.extend((0..n).map(|i| numbered(queue as u8, i, 600)));
    };
    let mut turns = |lane: &mut VfToGuest<EarlyRx>| {
        for rx in &mut guest.rx {
            rx.post(usize::from(SIZE));
        }
        (0..4).for_each(|_| _ = lane.turn(&clock.turn()));
        guest.rx.iter_mut().map(|rx| std::iter::from_fn(|| rx.receive()).count()).collect::<Vec<_>>()
    };
    let of_guest = || queues.iter().map(EarlyRx::of_guest).collect::<Vec<_>>();
    lane.insert_ring(0, plans[0].clone()).unwrap();
    for _ in 0..5 {
        (0..2).for_each(|queue| arrive(queue, 20));
        assert_eq!(turns(&mut lane), [40, 0]);
    }
    assert_eq!(of_guest(), [0, 0]);
    lane.insert_ring(1, plans[1].clone()).unwrap();
    for _ in 0..5 {
        (0..2).for_each(|queue| arrive(queue, 20));
        assert_eq!(turns(&mut lane), [20, 20]);
    }
    assert!(of_guest().iter().all(|n| *n > 0), "{:?}", of_guest());
    // The other way round the VF has to give back all of them first.
    let disabled = RingPlan { enabled: false, ..plans[1].clone() };
    assert!(!lane.change_ring(1, &disabled));
    assert!(!lane.await_returns());
    queues.iter().for_each(|queue| _ = queue.restart());
    assert!(lane.await_returns() && lane.change_ring(1, &disabled));
    for _ in 0..5 {
        (0..2).for_each(|queue| arrive(queue, 20));
        assert_eq!(turns(&mut lane), [40, 0]);
    }
    assert_eq!((of_guest(), counters.snapshot().dropped.total()), (vec![0, 0], 0));
}

#[derive(Clone, Debug)]
enum Step {
    Arrive(usize),
    Turn,
    Pass(u64),
    Post(usize),
    Amend(bool),
    Rebuild,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (1..50_usize).prop_map(Step::Arrive),
        8 => Just(Step::Turn),
        2 => (0..60_u64).prop_map(Step::Pass),
        6 => (1..65_usize).prop_map(Step::Post),
        1 => any::<bool>().prop_map(Step::Amend),
        1 => Just(Step::Rebuild),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_frames_keep_their_order_and_each_is_counted(
        format in prop::sample::select(FORMATS.to_vec()),
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let mut rig = Rig::new(format);
        for step in steps {
            match step {
                Step::Arrive(n) => rig.arrive(n),
                Step::Turn => rig.turn(),
                Step::Pass(micros) => rig.clock.pass(micros),
                Step::Post(n) => rig.driven.post(n),
                Step::Amend(lends) => rig.amend(lends),
                Step::Rebuild => rig.rebuild(),
            }
            rig.check();
        }
        for _ in 0..200 {
            rig.turn();
            rig.clock.pass(50);
        }
        prop_assert_eq!(rig.held(), 0);
        prop_assert_eq!(rig.arrived, rig.received + rig.counted().dropped.total() + rig.lost);
    }
}
