//! guest→VF: what the guest sent is what the VF took, plus the named drops, plus what is in flight.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use proptest::prelude::*;

use super::scripted::ScriptedTx;
use super::*;
use crate::ring::testing::{HEADER, number, numbered};

const PAIRS: usize = 2;
/// Shared by both pairs.
const SIZE: u16 = 128;

struct Rig {
    guest: Guest,
    vf: ScriptedTx,
    lane: GuestToVf<ScriptedTx>,
    ready: Arc<AtomicBool>,
    counters: Arc<LaneCounters>,
    clock: Clock,
    /// Offered so far, by pair: frames that can be sent.
    numbers: [u64; PAIRS],
    offered: u64,
    used: u64,
}

impl Rig {
    fn new() -> Self {
        let guest = Guest::new(PAIRS, SIZE);
        let (vf, ready) = (ScriptedTx::new(), Arc::new(AtomicBool::new(true)));
        let counters = Arc::new(LaneCounters::default());
        let mut lane = GuestToVf::new(LaneId(1), PAIRS, vec![vf.clone()], ready.clone(), counters.clone());
        let kick = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
        let doorbell = Doorbell { kick: Some(Arc::new(kick)), ..Doorbell::default() };
        for pair in 0..PAIRS {
            lane.insert_ring(pair, RingPlan { doorbell: doorbell.clone(), ..guest.tx_plan(pair) }).unwrap();
        }
        Self { guest, vf, lane, ready, counters, clock: Clock::new(), numbers: [0; PAIRS], offered: 0, used: 0 }
    }

    /// Offers `n` frames, as far as there is room; of the kind that `what` says.
    fn offer(&mut self, pair: usize, n: usize, what: What) {
        let tx = &mut self.guest.tx[pair];
        for _ in 0..n.min(tx.room()) {
            match what {
                What::Good => {
                    let len = 60 + (self.numbers[pair] % 1000) as usize;
                    tx.send(&[0; HEADER], &numbered(pair as u8, self.numbers[pair], len));
                    self.numbers[pair] += 1;
                }
                What::Rubbish => tx.send_rubbish(),
                What::Long => tx.send(&[0; HEADER], &[7; MAX_FRAME + 1]),
            }
            self.offered += 1;
        }
        tx.ring.publish();
    }

    fn turn(&mut self) {
        self.lane.turn(&self.clock.turn());
        self.check();
    }

    /// The rule, and that the VF has the frames in order, each once, and their bytes are counted.
    fn check(&mut self) {
        self.used += self.guest.tx.iter_mut().map(|tx| tx.reclaim() as u64).sum::<u64>();
        let counted = self.counters.snapshot();
        let script = self.vf.script();
        let ended = counted.packets + counted.dropped.total();
        match script.lends_from {
            usize::MAX => assert_eq!(self.used, ended, "{counted:?}"),
            // What the VF still reads, and all behind it, is not the guest's again.
            _ => assert!(self.used + script.out.len() as u64 <= ended, "{} used, {counted:?}", self.used),
        }
        assert_eq!(counted.packets, script.sent.len() as u64);
        assert!(counted.completions.total() + script.out.len() as u64 <= counted.zero_copied, "{counted:?}");
        assert_eq!(counted.bytes, script.sent.iter().map(|frame| frame.len() as u64).sum::<u64>());
        let mut last = [None; PAIRS];
        for frame in &script.sent {
            let (pair, number) = number(frame);
            let last = &mut last[usize::from(pair)];
            assert!(last.is_none_or(|last| last < number), "{number} behind {last:?}");
            *last = Some(number);
        }
    }

    fn rebuild(&mut self, pair: usize, enabled: bool) {
        self.vf.script().keeps = false;
        let position = self.lane.remove_ring(pair);
        assert_eq!(position, Some(self.guest.tx[pair].ring.used_idx()));
        self.lane.insert_ring(pair, RingPlan { enabled, ..self.guest.tx_plan(pair) }).unwrap();
    }

    /// As [`Self::rebuild`], for what does not need it: what is out stays out.
    fn change(&mut self, pair: usize, enabled: bool) {
        self.guest.grow();
        assert!(self.lane.change_ring(pair, &RingPlan { enabled, ..self.guest.tx_plan(pair) }));
        self.lane.forget_memories();
    }

    fn dropped(&self) -> Dropped {
        self.counters.snapshot().dropped
    }
}

#[derive(Clone, Copy, Debug)]
enum What {
    Good,
    Rubbish,
    Long,
}

#[derive(Clone, Debug)]
enum Step {
    Offer(usize, usize, What),
    /// What the next sends take and refuse, then a turn.
    Turn(Vec<usize>, u32),
    Pass(u64),
    Pool(usize),
    Ready(bool),
    Rebuild(usize, bool),
    Change(usize, bool),
    /// Whether the VF keeps what is lent to it.
    Keep(bool),
    /// It returns so many.
    Return(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let what = prop_oneof![6 => Just(What::Good), 1 => Just(What::Rubbish), 1 => Just(What::Long)];
    prop_oneof![
        6 => (0..PAIRS, 1..50_usize, what).prop_map(|(pair, n, what)| Step::Offer(pair, n, what)),
        6 => (prop::collection::vec(0..40_usize, 0..8), prop_oneof![3 => Just(0), 1 => any::<u32>()])
            .prop_map(|(takes, refuses)| Step::Turn(takes, refuses)),
        2 => (0..12_000_u64).prop_map(Step::Pass),
        1 => (0..100_usize).prop_map(Step::Pool),
        1 => any::<bool>().prop_map(Step::Ready),
        1 => (0..PAIRS, any::<bool>()).prop_map(|(pair, enabled)| Step::Rebuild(pair, enabled)),
        2 => (0..PAIRS, any::<bool>()).prop_map(|(pair, enabled)| Step::Change(pair, enabled)),
        1 => any::<bool>().prop_map(Step::Keep),
        3 => (1..100_usize).prop_map(Step::Return),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_the_vf_takes_nothing_is_lost_that_no_counter_names(
        lends_from in prop_oneof![Just(usize::MAX), 0..1100_usize],
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let mut rig = Rig::new();
        rig.vf.script().lends_from = lends_from;
        for step in steps {
            match step {
                Step::Offer(pair, n, what) => rig.offer(pair, n, what),
                Step::Turn(takes, refuses) => {
                    rig.vf.script().takes = takes.into();
                    rig.vf.script().refuses = refuses;
                    rig.turn();
                }
                Step::Pass(micros) => rig.clock.pass(micros),
                Step::Pool(n) => rig.vf.script().pool = n,
                Step::Ready(ready) => rig.ready.store(ready, Relaxed),
                Step::Rebuild(pair, enabled) => rig.rebuild(pair, enabled),
                Step::Change(pair, enabled) => rig.change(pair, enabled),
                Step::Keep(keeps) => rig.vf.script().keeps = keeps,
                Step::Return(n) => {
                    let mut script = rig.vf.script();
                    let n = n.min(script.out.len());
                    script.give_back(n);
                }
            }
            rig.check();
        }
        // In the end everything goes out, or is dropped by name.
        rig.vf.script().takes.clear();
        rig.vf.script().pool = 1000;
        rig.vf.script().keeps = false;
        for _ in 0..20 {
            rig.turn();
        }
        prop_assert_eq!(rig.used, rig.offered);
        let counted = rig.counters.snapshot();
        prop_assert_eq!(counted.completions.total(), counted.zero_copied);
    }
}

#[test]
fn a_vf_that_takes_nothing_is_waited_for_ten_milliseconds() {
    let mut rig = Rig::new();
    rig.offer(0, 40, What::Good);
    rig.vf.script().takes = vec![10].into();
    rig.vf.script().takes.extend([0; 100]);
    rig.turn();
    assert_eq!(rig.used, 10);
    // The time counts from the first turn in which nothing moved at all.
    rig.turn();
    rig.clock.pass(9_999);
    rig.turn();
    assert_eq!((rig.used, rig.dropped().vf_full), (10, 0));
    // One frame that gets through begins it anew.
    rig.vf.script().takes.push_front(1);
    rig.turn();
    rig.turn();
    rig.clock.pass(9_999);
    rig.turn();
    assert_eq!((rig.used, rig.dropped().vf_full), (11, 0));
    rig.clock.pass(1);
    rig.turn();
    // The burst is dropped; the 8 behind it begin to wait.
    assert_eq!((rig.used, rig.dropped().vf_full), (32, 21));
    rig.vf.script().takes.clear();
    rig.turn();
    assert_eq!((rig.used, rig.counters.snapshot().packets), (40, 19));
}

/// What the VF reads where it lies is the guest's again when the VF is done with it, and what is behind it, too.
#[test]
fn lent_frames_are_completed_in_order_when_they_are_back() {
    let mut rig = Rig::new();
    (rig.vf.script().lends_from, rig.vf.script().keeps) = (100, true);
    // 60 to 99 bytes are copied, the others lent.
    rig.offer(0, 100, What::Good);
    rig.turn();
    assert_eq!((rig.used, rig.vf.script().out.len()), (32, 60), "the burst that ends with a lent one waits whole");
    assert_eq!((rig.counters.snapshot().packets, rig.counters.snapshot().zero_copied), (100, 60));
    rig.offer(0, 3, What::Rubbish);
    rig.turn();
    assert_eq!((rig.used, rig.dropped().malformed), (32, 3));
    assert!(!rig.lane.doze() && rig.lane.needs_naps(), "a core that slept soundly would not see them come back");
    rig.lane.wake();
    rig.vf.script().give_back(23);
    rig.turn();
    assert_eq!(rig.used, 32);
    rig.vf.script().give_back(1);
    rig.turn();
    assert_eq!(rig.used, 64);
    rig.vf.script().give_back(36);
    rig.turn();
    assert_eq!((rig.used, rig.lane.doze(), rig.lane.needs_naps()), (103, false, false));
}

/// By the core's clock, from the turn in which the VF took a frame to the one in which its buffer is the guest's.
#[test]
fn lent_frames_are_counted_by_how_long_they_were_out() {
    let mut rig = Rig::new();
    (rig.vf.script().lends_from, rig.vf.script().keeps) = (100, true);
    let completions = |rig: &Rig| {
        let counted = rig.counters.snapshot();
        let filled = counted.completions.0.into_iter().enumerate().filter(|(_, frames)| *frames > 0);
        (filled.collect::<Vec<_>>(), counted.slowest_completion_us)
    };
    // 60 to 99 bytes: copied, and no completion of a lent frame. The second burst has 24 lent ones behind 8 copied.
    rig.offer(0, 64, What::Good);
    rig.turn();
    rig.clock.pass(100);
    rig.offer(0, 10, What::Good);
    rig.turn();
    assert_eq!(completions(&rig), (vec![], 0), "34 are out");
    rig.clock.pass(200);
    rig.vf.script().give_back(23);
    rig.turn();
    assert_eq!(completions(&rig), (vec![], 0), "a burst is completed whole");
    rig.clock.pass(200);
    rig.vf.script().give_back(1);
    rig.turn();
    assert_eq!(completions(&rig), (vec![(9, 24)], 500), "256 to 511 µs");
    rig.clock.pass(60_000);
    rig.vf.script().give_back(10);
    rig.turn();
    assert_eq!(completions(&rig), (vec![(9, 24), (16, 10)], 60_400));
    // Who is done at once is counted so, whatever the clock says.
    rig.vf.script().keeps = false;
    rig.offer(0, 20, What::Good);
    rig.turn();
    assert_eq!(completions(&rig), (vec![(0, 20), (9, 24), (16, 10)], 60_400));
    assert_eq!(rig.counters.snapshot().completions.total(), rig.counters.snapshot().zero_copied);
    // At home there is no turn, and it is counted all the same.
    rig.vf.script().keeps = true;
    rig.offer(0, 5, What::Good);
    rig.turn();
    rig.vf.script().keeps = false;
    assert_eq!(rig.lane.remove_ring(0), Some(99));
    assert_eq!(rig.counters.snapshot().completions.total(), rig.counters.snapshot().zero_copied);
}

/// Another call fd, more memory, less to be lent, enabled or not: nothing of that waits for the VF.
#[test]
fn a_ring_changes_while_its_frames_are_out() {
    let mut rig = Rig::new();
    (rig.vf.script().lends_from, rig.vf.script().keeps) = (0, true);
    rig.vf.script().takes = [20, 0].into();
    rig.offer(0, 40, What::Good);
    rig.turn();
    let call = Arc::new(rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap());
    let doorbell = Doorbell { call: Some(call.clone()), ..Doorbell::default() };
    rig.guest.grow();
    let plan = RingPlan { doorbell, lendable: None, ..rig.guest.tx_plan(0) };
    assert!(rig.lane.change_ring(0, &plan));
    assert_eq!((rig.vf.script().out.len(), rig.used), (20, 0), "they are where they were");
    // The rest of the burst was staged by then, and goes out as it is.
    rig.turn();
    rig.vf.script().give_back(32);
    assert!(rig.vf.script().out.is_empty(), "nothing more is lent");
    rig.turn();
    assert_eq!((rig.used, rig.counters.snapshot().packets), (40, 40));
    let mut signals = [0; 8];
    assert_eq!(rustix::io::read(&*call, &mut signals), Ok(8), "the new call fd is signalled");
    rig.vf.script().keeps = false;
    assert!(rig.lane.change_ring(0, &RingPlan { enabled: false, ..plan }));
    rig.offer(0, 5, What::Good);
    rig.turn();
    assert_eq!((rig.used, rig.dropped().disabled), (45, 5));
    assert_eq!(rig.lane.remove_ring(0), Some(45));
    assert!(!rig.lane.change_ring(0, &rig.guest.tx_plan(0)), "no ring to change");
}

/// What would take memory away, or make another ring of it, does not pass for a small change.
#[test]
fn a_ring_is_another_one_with_other_addresses_or_less_memory() {
    let mut guest = Guest::new(1, 16);
    let plan = guest.tx_plan(0);
    let moved = RingPlan { config: RingConfig { base: 7, ..plan.config }, ..plan.clone() };
    assert!(plan.is(&plan.clone()) && plan.is(&moved), "where it begins is no part of what it is");
    let other = RingPlan { config: RingConfig { event_idx: true, ..plan.config }, ..plan.clone() };
    assert!(!plan.is_near(&other));
    guest.grow();
    let grown = guest.tx_plan(0);
    assert!(plan.is_near(&grown) && !plan.is(&grown) && !grown.is_near(&plan));
    let disabled = RingPlan { enabled: false, ..plan.clone() };
    assert!(plan.is_near(&disabled) && !plan.is(&disabled));
}

/// A ring goes only when the VF is done with its frames, or is known not to be.
#[test]
fn a_ring_waits_for_the_frames_it_lent() {
    let mut rig = Rig::new();
    (rig.vf.script().lends_from, rig.vf.script().keeps) = (0, true);
    rig.offer(0, 40, What::Good);
    rig.turn();
    rig.vf.script().asks = Some(2);
    assert!(rig.lane.await_returns());
    assert_eq!(rig.lane.remove_ring(0), Some(40));
    rig.vf.script().asks = None;
    rig.offer(1, 40, What::Good);
    rig.turn();
    let start = Instant::now();
    assert!(!rig.lane.await_returns(), "the VF is to be restarted");
    // The VMM waits meanwhile. Much longer than the lane does, where the machine is busy.
    assert!((100..5000).contains(&start.elapsed().as_millis()), "{:?}", start.elapsed());
    rig.vf.script().give_back(40);
    assert!(rig.lane.await_returns());
    assert_eq!(rig.lane.remove_ring(1), Some(40));
}

/// A VF that was restarted, or is gone, has what it did not return not sent: the guest's next start sends it again.
#[test]
fn frames_that_are_given_up_are_the_guests_again() {
    let mut rig = Rig::new();
    (rig.vf.script().lends_from, rig.vf.script().keeps) = (0, true);
    rig.offer(0, 40, What::Good);
    rig.turn();
    rig.vf.script().give_back(32);
    rig.turn();
    rig.offer(0, 3, What::Good);
    rig.turn();
    assert_eq!(rig.counters.out_and_back(), (11, 32));
    assert_eq!(rig.lane.remove_ring(0), Some(32));
    assert_eq!(rig.guest.tx[0].ring.used_idx(), 32);
    assert_eq!(rig.counters.out_and_back(), (0, 32), "nobody waits for them");
}

/// As is a ring that lies while its frames are out.
#[test]
fn a_ring_with_frames_out_is_taken_off() {
    let mut rig = Rig::new();
    (rig.vf.script().lends_from, rig.vf.script().keeps) = (0, true);
    rig.offer(0, 40, What::Good);
    rig.turn();
    let ring = &rig.guest.tx[0].ring;
    ring.put_u16(ring.avail_at() + 2, ring.used_idx().wrapping_add(1000));
    rig.lane.turn(&rig.clock.turn());
    rig.lane.turn(&rig.clock.turn());
    assert_eq!(rig.lane.fault(0), Some(crate::ring::RingFault::AvailIndex));
    assert_eq!(rig.lane.remove_ring(0), Some(0));
}

#[test]
fn a_dry_pool_is_a_full_vf() {
    let mut rig = Rig::new();
    rig.vf.script().pool = 0;
    rig.offer(0, 5, What::Good);
    rig.turn();
    rig.clock.pass(10_000);
    rig.turn();
    assert_eq!(rig.dropped(), Dropped { vf_full: 5, ..Dropped::default() });
}

#[test]
fn each_reason_not_to_send_has_its_name() {
    let mut rig = Rig::new();
    rig.offer(0, 3, What::Good);
    rig.ready.store(false, Relaxed);
    rig.turn();
    rig.ready.store(true, Relaxed);
    rig.rebuild(0, false);
    rig.offer(0, 4, What::Good);
    rig.turn();
    rig.rebuild(0, true);
    rig.offer(0, 5, What::Rubbish);
    rig.offer(0, 6, What::Long);
    rig.offer(0, 7, What::Good);
    rig.vf.script().refuses = 0b11;
    rig.turn();
    let dropped = Dropped { not_ready: 3, disabled: 4, malformed: 5 + 2, oversize: 6, ..Dropped::default() };
    assert_eq!(rig.dropped(), dropped);
    assert_eq!(rig.counters.snapshot().packets, 5);
}

/// What was dropped behind a frame that waits is counted when it is completed, not when it is looked at.
#[test]
fn a_rebuilt_ring_counts_its_malformed_chains_once() {
    let mut rig = Rig::new();
    rig.offer(0, 1, What::Good);
    rig.offer(0, 9, What::Rubbish);
    rig.vf.script().takes = vec![0].into();
    rig.turn();
    rig.rebuild(0, true);
    rig.turn();
    assert_eq!((rig.used, rig.dropped().malformed, rig.counters.snapshot().packets), (10, 9, 1));
}

#[test]
fn a_ring_that_jumps_keeps_its_position_and_the_other_goes_on() {
    let mut rig = Rig::new();
    rig.offer(0, 7, What::Good);
    rig.turn();
    rig.guest.tx[0].ring.avail += SIZE + 1;
    rig.guest.tx[0].ring.publish();
    rig.offer(1, 8, What::Good);
    rig.turn();
    assert_eq!(rig.lane.fault(0), Some(crate::ring::RingFault::AvailIndex));
    assert_eq!(rig.counters.quarantined(), 1);
    rig.offer(1, 8, What::Good);
    rig.turn();
    assert_eq!((rig.used, rig.lane.fault(1)), (23, None));
    assert_eq!(rig.lane.remove_ring(0), Some(7));
    assert_eq!(rig.lane.fault(0), None);
}

/// One VF queue, two rings: one that is always full leaves the other its turn.
#[test]
fn rings_share_a_turn() {
    let mut rig = Rig::new();
    for _ in 0..50 {
        rig.offer(0, 1000, What::Good);
        rig.offer(1, 1, What::Good);
        rig.turn();
    }
    assert_eq!(rig.vf.script().sent.iter().filter(|frame| number(frame).0 == 1).count(), 50);
}

/// Chains of many empty descriptors take long to read: a turn has fewer of them.
#[test]
fn a_turn_of_long_chains_ends_early() {
    const LONGEST: u16 = 512;
    let mut guest = Guest::new(1, LONGEST);
    let (vf, counters) = (ScriptedTx::new(), Arc::new(LaneCounters::default()));
    let ready = Arc::new(AtomicBool::new(true));
    let mut lane = GuestToVf::new(LaneId(1), 1, vec![vf.clone()], ready, counters.clone());
    lane.insert_ring(0, guest.tx_plan(0)).unwrap();
    let ring = &mut guest.tx[0].ring;
    let frame = ring.gpa(ring.buffers().start);
    let mut chain = [(0, 0); LONGEST as usize];
    chain[usize::from(LONGEST) - 1] = (frame, 100);
    ring.chain(0, &chain, 0);
    (0..LONGEST).for_each(|_| ring.offer(0));
    ring.publish();
    let clock = Clock::new();
    lane.turn(&clock.turn());
    let moved = counters.snapshot().packets;
    assert!((1..=24).contains(&moved), "{moved} chains of {LONGEST} descriptors in a turn");
    // All of them in the end.
    for _ in 0..LONGEST {
        lane.turn(&clock.turn());
    }
    assert_eq!((counters.snapshot().packets, guest.tx[0].ring.used_idx()), (LONGEST.into(), LONGEST));
}

#[test]
fn each_lane_sends_on_the_queues_of_its_pairs() {
    const PAIRS: usize = 4;
    let mut guest = Guest::new(PAIRS, 64);
    // Two pairs share a queue, and so a lane.
    let vf = [ScriptedTx::new(), ScriptedTx::new()];
    let counters = [Arc::new(LaneCounters::default()), Arc::new(LaneCounters::default())];
    let ready = Arc::new(AtomicBool::new(true));
    let mut first = GuestToVf::new(LaneId(1), PAIRS, vf.to_vec(), ready, counters[0].clone());
    let mut second = first.sibling(LaneId(2), counters[1].clone()).unwrap();
    second.adopt_queue(1, first.release_queue(1).unwrap());
    let mut lanes: [Box<dyn Lane>; 2] = [Box::new(first), second];
    for pair in [3, 0, 1, 2] {
        lanes[pair % 2].insert_ring(pair, guest.tx_plan(pair)).unwrap();
        guest.tx[pair].send(&[0; 12], &numbered(pair as u8, 0, 64));
        guest.tx[pair].ring.publish();
    }
    let clock = Clock::new();
    for lane in &mut lanes {
        assert_eq!(lane.turn(&clock.turn()), 2);
    }
    let flows = |queue: usize| vf[queue].script().sent.iter().map(|frame| number(frame).0).collect::<Vec<_>>();
    assert_eq!((flows(0), flows(1)), (vec![0, 2], vec![1, 3]));
    assert_eq!(counters.map(|counters| counters.snapshot().packets), [2, 2]);
    // What is out is out, and the others stay.
    assert_eq!((lanes[1].remove_ring(1), lanes[1].remove_ring(1)), (Some(1), None));
    guest.tx[3].send(&[0; 12], &numbered(3, 1, 64));
    guest.tx[3].ring.publish();
    lanes[1].turn(&clock.turn());
    assert_eq!(flows(1), [1, 3, 3]);
}

/// The header of a partial TCP checksum of a frame over IPv4, or of its segmentation too.
fn asks(gso_size: u16) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..2].copy_from_slice(&[1, u8::from(gso_size > 0)]);
    header[4..6].copy_from_slice(&gso_size.to_le_bytes());
    header[6..10].copy_from_slice(&[34, 0, 16, 0]);
    header
}

fn tcp(len: usize) -> Vec<u8> {
    let mut frame = vec![2; 12];
    frame.extend([0x08, 0, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend([0, 80, 0, 90, 0, 0, 0, 0, 0, 0, 0, 1, 0x50, 0x18, 1, 0, 0, 0, 0, 0]);
    frame.resize(len, 7);
    frame
}

/// A guest that changes headers after they were judged: the VF gets those that were, and the rest from where it lies.
#[test]
fn what_was_judged_is_what_the_vf_gets() {
    let mut guest = Guest::new(1, 64);
    let vf = ScriptedTx::new();
    vf.script().takes_heads = true;
    vf.script().lends_from = 256;
    vf.script().keeps = true;
    // Copying them is work of the turn, which looks again.
    vf.script().takes.extend([0, 0]);
    let (ready, counters) = (Arc::new(AtomicBool::new(true)), Arc::new(LaneCounters::default()));
    let mut lane = GuestToVf::new(LaneId(1), 1, vec![vf.clone()], ready, counters.clone());
    let mut plan = guest.tx_plan(0);
    plan.rules = TxRules { checksum: true, tso4: true, vf_checksum: true, vf_tso: true, ..plan.rules };
    plan.config.max_frame = 65536;
    lane.insert_ring(0, plan).unwrap();
    // The last is too short to be worth it.
    let lens = [600, 1522, 2000, 511];
    for len in lens {
        guest.tx[0].send(&asks(if len > 1522 { 1400 } else { 0 }), &tcp(len));
    }
    guest.tx[0].ring.publish();
    let clock = Clock::new();
    lane.turn(&clock.turn());
    assert!(vf.script().sent.is_empty());
    // As `Guest` lays its memory out: behind two rings the buffers of the first, and of this one.
    let buffers = 2 * 16 * 1024 + 64 * BUFFER;
    for (slot, len) in lens.iter().enumerate() {
        guest.tx[0].ring.put(buffers + slot * BUFFER + HEADER, &vec![0xee; *len]);
    }
    lane.turn(&clock.turn());
    let sent = std::mem::take(&mut vf.script().sent);
    for (frame, len) in sent.iter().zip(lens) {
        let judged = if len < 512 { len } else { 256 };
        assert_eq!(frame.len(), len);
        assert_eq!(frame[..judged], tcp(len)[..judged]);
        assert!(frame[judged..].iter().all(|byte| *byte == 0xee));
    }
    let asked: Vec<_> = vf.script().offloads.iter().map(|offload| (offload.segment, offload.l3_len)).collect();
    assert_eq!(asked, [(0, 20), (0, 20), (1400, 20), (0, 20)]);
    // They are the guest's again when the VF is done with what it has of theirs.
    assert_eq!((counters.snapshot().zero_copied, guest.tx[0].reclaim()), (3, 0));
    vf.script().give_back(2);
    lane.turn(&clock.turn());
    assert_eq!(guest.tx[0].reclaim(), 0, "one is out");
    vf.script().give_back(1);
    lane.turn(&clock.turn());
    assert_eq!((guest.tx[0].reclaim(), counters.snapshot().packets), (4, 4));
    assert_eq!(vf.script().pool, 1000);
}
