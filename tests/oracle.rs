//! Our rings against rust-vmm's `virtio-queue`: two drivers do the same to two memories, one is served
//! by our ring, the other by `Queue` and the plainest code that can be written over it. What the
//! device sides return, and the memories, must stay equal.

use std::collections::VecDeque;

use proptest::prelude::*;
use virtio_forwarder::guest::{Gpa, GuestMemory, RegionSpec, UserAddr};
use virtio_forwarder::ring::{
    BURST, Gather, IN_FLIGHT, NetHeader, PushError, RingAddresses, RingConfig, RxRing, TxRing,
};
use virtio_queue::desc::split::Descriptor as QueueDescriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

#[path = "../src/ring/testing.rs"]
mod testing;
use testing::{Descriptor, Driver, GPA, INDIRECT, NEXT, USER, WRITE};

/// Two adjacent regions; nothing behind them.
const LEN: usize = 1 << 17;
const HALF: usize = LEN / 2;
const MAX_FRAME: usize = 1518;

#[derive(Clone, Copy, Debug)]
struct Setup {
    size: u16,
    start: u16,
    event_idx: bool,
    mergeable: bool,
}

/// What drivers and devices do.
#[derive(Clone, Debug)]
enum Act {
    /// A well-formed chain from this descriptor on, of these (offset, length), offered.
    Chain(u16, Vec<(u16, u16)>),
    /// The same through an indirect table.
    Indirect(u16, Vec<(u16, u16)>),
    /// Anything in a descriptor.
    Describe(u16, Descriptor),
    /// Any head.
    Offer(u16),
    Publish,
    UsedEvent(u16),
    NoInterrupt(bool),
    Pop(usize),
    Push(usize),
    Complete(usize),
    Rewind,
    Used,
    Kicks(bool),
}

fn buffers() -> impl Strategy<Value = Vec<(u16, u16)>> {
    // Often around the regions' border, and of any small length, 0 too.
    let offset = prop_oneof![0..3000_u16, (HALF / 2 - 2000) as u16..(HALF / 2) as u16];
    prop::collection::vec((offset, prop_oneof![0..64_u16, 0..1600_u16]), 1..5)
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let address = prop_oneof![
        8 => (0..LEN as u64 / 2).prop_map(|at| GPA + HALF as u64 / 2 + at),
        1 => (LEN as u64 - 100..LEN as u64 + 100).prop_map(|at| GPA + at),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![8 => 0..2000_u32, 1 => any::<u32>()];
    let flags = prop_oneof![Just(0), Just(NEXT), Just(WRITE), Just(NEXT | WRITE), Just(INDIRECT)];
    let descriptor = (address, len, flags, 0..70_u16);
    let descriptor = descriptor.prop_map(|(addr, len, flags, next)| Descriptor::new(addr, len, flags, next));
    let act = prop_oneof![
        6 => (any::<u16>(), buffers()).prop_map(|(at, b)| Act::Chain(at, b)),
        2 => (any::<u16>(), buffers()).prop_map(|(at, b)| Act::Indirect(at, b)),
        2 => (any::<u16>(), descriptor).prop_map(|(at, d)| Act::Describe(at, d)),
        3 => any::<u16>().prop_map(Act::Offer),
        5 => Just(Act::Publish),
        1 => any::<u16>().prop_map(|behind| Act::UsedEvent(behind % 8)),
        1 => any::<bool>().prop_map(Act::NoInterrupt),
        6 => (0..40_usize).prop_map(Act::Pop),
        6 => (14..MAX_FRAME).prop_map(Act::Push),
        6 => (0..40_usize).prop_map(Act::Complete),
        1 => Just(Act::Rewind),
        4 => Just(Act::Used),
        1 => any::<bool>().prop_map(Act::Kicks),
    ];
    prop::collection::vec(act, 1..120)
}

fn setups() -> impl Strategy<Value = Setup> {
    let start = prop_oneof![Just(0), 65500..=u16::MAX, any::<u16>()];
    (0..7_u32, start, any::<bool>(), any::<bool>()).prop_map(|(log, start, event_idx, mergeable)| Setup {
        size: 1 << log,
        start,
        event_idx,
        mergeable,
    })
}

/// One memory with its driver. `WRITE` or not is the direction of its well-formed chains.
fn drive(driver: &mut Driver, act: &Act, flags: u16) {
    let size = driver.size;
    let at = |offset: u16| GPA + HALF as u64 / 2 + u64::from(offset);
    let room = driver.avail.wrapping_sub(driver.used_idx()) < size;
    match act {
        Act::Chain(first, buffers) => {
            let first = first % size;
            let buffers: Vec<_> = buffers.iter().map(|(o, l)| (at(*o), u32::from(*l))).collect();
            let fits = buffers.len().min(usize::from(size - first));
            driver.chain(first, &buffers[..fits], flags);
            if room {
                driver.offer(first);
            }
        }
        Act::Indirect(first, buffers) => {
            let first = first % size;
            // The table is far from the buffers, and not aligned.
            let table = LEN - 8192 + 4 + usize::from(first) * 80;
            for (i, (offset, len)) in buffers.iter().enumerate() {
                let more = if i + 1 < buffers.len() { NEXT } else { 0 };
                let entry = Descriptor::new(at(*offset), (*len).into(), flags | more, i as u16 + 1);
                driver.put(table + 16 * i, &entry.bytes());
            }
            let len = 16 * buffers.len() as u32;
            driver.describe(first, Descriptor::new(driver.gpa(table), len, INDIRECT, 0));
            if room {
                driver.offer(first);
            }
        }
        Act::Describe(index, descriptor) => driver.describe(index % size, *descriptor),
        Act::Offer(head) if room => driver.offer(head % size),
        Act::Publish => driver.publish(),
        Act::UsedEvent(behind) => driver.set_used_event(driver.used_idx().wrapping_add(*behind).wrapping_sub(2)),
        Act::NoInterrupt(set) => driver.set_avail_flags((*set).into()),
        _ => {}
    }
}

fn driver(setup: &Setup) -> Driver {
    let driver = Driver::new(LEN, setup.size, setup.start);
    assert!(driver.buffers().start <= HALF / 2);
    let pattern: Vec<u8> = (0..LEN - HALF / 2).map(|i| (i ^ (i >> 8)) as u8).collect();
    driver.put(HALF / 2, &pattern);
    driver
}

fn ours(driver: &Driver, setup: &Setup) -> (std::sync::Arc<GuestMemory>, RingConfig) {
    let region = |at: usize| {
        let spec = RegionSpec {
            gpa: Gpa(GPA + at as u64),
            size: HALF as u64,
            user: UserAddr(USER + at as u64),
            offset: at as u64,
        };
        (spec, driver.file.try_clone().unwrap())
    };
    let memory = GuestMemory::empty().replaced(vec![region(0), region(HALF)]).unwrap();
    let user = |at: usize| UserAddr(USER + at as u64);
    let config = RingConfig {
        packed: false,
        in_order: false,
        size: setup.size,
        addresses: RingAddresses {
            desc: user(driver.desc_at()),
            avail: user(driver.avail_at()),
            used: user(driver.used_at()),
        },
        base: setup.start,
        indirect: true,
        event_idx: setup.event_idx,
        mergeable: setup.mergeable,
        header_len: NetHeader::LEN,
        max_frame: MAX_FRAME,
    };
    (memory, config)
}

/// The device side over `virtio-queue`.
struct Oracle {
    queue: Queue,
    memory: GuestMemoryMmap,
    event_idx: bool,
    in_flight: VecDeque<u16>,
    staged: Vec<(u16, u32)>,
}

impl Oracle {
    fn new(driver: &Driver, setup: &Setup) -> Self {
        let region = |at: usize| {
            let file = FileOffset::new(driver.file.try_clone().unwrap(), at as u64);
            (GuestAddress(GPA + at as u64), HALF, Some(file))
        };
        let memory = GuestMemoryMmap::from_ranges_with_files([region(0), region(HALF)]).unwrap();
        let mut queue = Queue::new(setup.size).unwrap();
        let at = |at: usize| GuestAddress(driver.gpa(at));
        queue.try_set_desc_table_address(at(driver.desc_at())).unwrap();
        queue.try_set_avail_ring_address(at(driver.avail_at())).unwrap();
        queue.try_set_used_ring_address(at(driver.used_at())).unwrap();
        queue.set_event_idx(setup.event_idx);
        queue.set_next_avail(setup.start);
        queue.set_next_used(setup.start);
        queue.set_ready(true);
        Self { queue, memory, event_idx: setup.event_idx, in_flight: VecDeque::new(), staged: Vec::new() }
    }

    /// The next chain: its head and what of it can be read.
    fn next(&mut self) -> Option<(u16, Vec<QueueDescriptor>)> {
        let chain = self.queue.iter(&self.memory).unwrap().next()?;
        Some((chain.head_index(), chain.collect()))
    }

    /// The bytes of a chain for the device to read, if it is well-formed.
    fn contents(&self, chain: &[QueueDescriptor]) -> Option<Vec<u8>> {
        let whole = chain.last().is_some_and(|last| !last.has_next());
        let total: u64 = chain.iter().map(|d| u64::from(d.len())).sum();
        let fits = (12 + 14..=12 + MAX_FRAME as u64).contains(&total);
        if !whole || !fits || chain.iter().any(|d| d.is_write_only()) {
            return None;
        }
        let mut bytes = Vec::new();
        for piece in chain {
            let mut part = vec![0; piece.len() as usize];
            self.memory.read_slice(&mut part, piece.addr()).ok()?;
            bytes.extend(part);
        }
        Some(bytes)
    }

    /// Where to write the next `want` bytes of a chain, as far as it goes; `None` if it is malformed there.
    fn targets(&self, chain: &[QueueDescriptor], want: usize) -> Option<Vec<(GuestAddress, usize)>> {
        let mut targets = Vec::new();
        let mut left = want;
        for piece in chain {
            if !piece.is_write_only() {
                return None;
            }
            // A buffer is looked at as far as it is needed.
            let len = left.min(piece.len() as usize);
            let mut probe = vec![0; len];
            self.memory.read_slice(&mut probe, piece.addr()).ok()?;
            targets.push((piece.addr(), len));
            left -= len;
            if left == 0 {
                return Some(targets);
            }
        }
        let whole = chain.last().is_some_and(|last| !last.has_next());
        whole.then_some(targets)
    }

    /// Puts one frame into the ring. `Err` in the words of ours: malformed, empty or oversize.
    fn push(&mut self, header: &NetHeader, frame: &[u8], mergeable: bool) -> Result<(), &'static str> {
        let total = NetHeader::LEN + frame.len();
        let start = self.queue.next_avail();
        let mut chains = Vec::new();
        let mut have = 0;
        while have < total {
            let Some((head, chain)) = self.next() else {
                self.queue.set_next_avail(start);
                let all = chains.len() == usize::from(self.queue.size());
                return Err(if all { "oversize" } else { "empty" });
            };
            let targets = self.targets(&chain, total - have);
            let len: usize = targets.iter().flatten().map(|(_, len)| len).sum();
            have += len;
            let short = have < total && len < NetHeader::LEN;
            if short || targets.is_none() {
                self.staged.extend(chains.iter().map(|(head, _, _)| (*head, 0)));
                self.staged.push((head, 0));
                return Err("malformed");
            }
            if have < total && !mergeable {
                self.queue.set_next_avail(start);
                return Err("oversize");
            }
            chains.push((head, targets.unwrap(), len));
        }
        let mut bytes = header.encode(chains.len() as u16).to_vec();
        bytes.extend(frame);
        let mut bytes = &bytes[..];
        for (head, targets, len) in chains {
            for (at, len) in targets {
                let (now, later) = bytes.split_at(len);
                self.memory.write_slice(now, at).unwrap();
                bytes = later;
            }
            self.staged.push((head, len as u32));
        }
        Ok(())
    }

    /// Publishes what is staged. Whether the driver wants to hear of it.
    fn publish(&mut self, driver: &Driver) -> bool {
        let any = !self.staged.is_empty();
        for (head, len) in self.staged.drain(..) {
            self.queue.add_used(&self.memory, head, len).unwrap();
        }
        // `Queue` does not know NO_INTERRUPT.
        let wanted = match self.event_idx {
            true => self.queue.needs_notification(&self.memory).unwrap(),
            false => driver.get_u16(driver.avail_at()) & 1 == 0,
        };
        any && wanted
    }

    fn kicks(&mut self, on: bool) -> bool {
        match on {
            true => self.queue.enable_notification(&self.memory).unwrap(),
            false => {
                self.queue.disable_notification(&self.memory).unwrap();
                false
            }
        }
    }
}

/// Everything but used.flags and avail_event: each side suppresses kicks in its own way.
fn image(driver: &Driver) -> Vec<u8> {
    let mut image = driver.get(0, LEN);
    let avail_event = driver.used_at() + 4 + 8 * usize::from(driver.size);
    for at in [driver.used_at(), avail_event] {
        image[at..at + 2].fill(0);
    }
    image
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn tx(setup in setups(), acts in acts()) {
        let (mut a, mut b) = (driver(&setup), driver(&setup));
        let (memory, config) = ours(&a, &setup);
        let mut ring = TxRing::new(memory, &config).unwrap();
        let mut oracle = Oracle::new(&b, &setup);
        for act in &acts {
            drive(&mut a, act, 0);
            drive(&mut b, act, 0);
            match *act {
                Act::Pop(max) => {
                    // A ring looks at avail.idx only when what it saw there is used up.
                    let max = max.min(BURST).min(IN_FLIGHT - ring.in_flight());
                    let mut popped = 0;
                    while let n @ 1.. = ring.pop(max - popped).unwrap() {
                      popped += n;
                      for i in 0..n {
                        let (head, chain) = oracle.next().unwrap();
                        oracle.in_flight.push_back(head);
                        let found = ring.frame(i).ok().map(|mut frame| {
                            let mut bytes = frame.header().encode(0)[..10].to_vec();
                            bytes.resize(10 + frame.len(), 0);
                            frame.copy_next(&mut bytes[10..]);
                            bytes
                        });
                        let expected = oracle.contents(&chain).map(|mut bytes| {
                            let first = bytes[..10].try_into().unwrap();
                            let decoded = NetHeader::decode(&first).encode(0);
                            bytes.splice(..12, decoded[..10].iter().copied());
                            bytes
                        });
                        prop_assert_eq!(found, expected);
                      }
                    }
                    if popped < max {
                        prop_assert!(oracle.next().is_none(), "all of it was popped");
                    }
                }
                Act::Complete(n) => {
                    let n = n.min(ring.in_flight());
                    ring.complete(n);
                    let done = oracle.in_flight.drain(..n).map(|head| (head, 0));
                    oracle.staged.extend(done);
                }
                Act::Rewind => {
                    ring.rewind();
                    let back = oracle.in_flight.drain(..).len() as u16;
                    let next = oracle.queue.next_avail().wrapping_sub(back);
                    oracle.queue.set_next_avail(next);
                }
                Act::Used => {
                    prop_assert_eq!(ring.publish(), oracle.publish(&b));
                    prop_assert_eq!(ring.position(), oracle.queue.next_used());
                }
                Act::Kicks(true) => prop_assert_eq!(ring.enable_kicks(), oracle.kicks(true)),
                Act::Kicks(false) => ring.disable_kicks(),
                _ => {}
            }
            prop_assert_eq!(ring.in_flight(), oracle.in_flight.len());
        }
        ring.publish();
        oracle.publish(&b);
        prop_assert!(image(&a) == image(&b), "memories differ");
    }

    #[test]
    fn rx(setup in setups(), acts in acts()) {
        let (mut a, mut b) = (driver(&setup), driver(&setup));
        let (memory, config) = ours(&a, &setup);
        let mut ring = RxRing::new(memory, &config).unwrap();
        let mut oracle = Oracle::new(&b, &setup);
        let mut number = 0_u8;
        for act in &acts {
            drive(&mut a, act, WRITE);
            drive(&mut b, act, WRITE);
            match *act {
                Act::Push(len) => {
                    number = number.wrapping_add(1);
                    let header = NetHeader { hdr_len: number.into(), ..NetHeader::default() };
                    let frame: Vec<u8> = (0..len).map(|i| number ^ i as u8).collect();
                    let found = ring.push(&header, &mut &frame[..]).map_err(|error| match error {
                        PushError::Empty => "empty",
                        PushError::Oversize => "oversize",
                        PushError::Chain(_) => "malformed",
                        PushError::Ring(_) => "broken",
                    });
                    prop_assert_eq!(found, oracle.push(&header, &frame, setup.mergeable));
                }
                Act::Used => {
                    prop_assert_eq!(ring.publish(), oracle.publish(&b));
                    prop_assert_eq!(ring.position(), oracle.queue.next_used());
                }
                Act::Kicks(true) => prop_assert_eq!(ring.enable_kicks(), oracle.kicks(true)),
                Act::Kicks(false) => ring.disable_kicks(),
                _ => {}
            }
        }
        ring.publish();
        oracle.publish(&b);
        prop_assert!(image(&a) == image(&b), "memories differ");
    }
}
