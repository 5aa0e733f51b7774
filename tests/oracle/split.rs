//! Split rings against `virtio-queue`, and the plainest code that can be written over it.

use std::collections::VecDeque;

use proptest::prelude::*;
use virtio_forwarder::ring::{BURST, IN_FLIGHT, NetHeader, RingAddresses, RingConfig, RxRing, TxRing};
use virtio_queue::desc::split::Descriptor as QueueDescriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::testing::{Descriptor, Driver, GPA, INDIRECT, NEXT, WRITE};
use super::*;

#[derive(Clone, Copy, Debug)]
struct Setup {
    size: u16,
    start: u16,
    event_idx: bool,
    mergeable: bool,
    in_order: bool,
}

fn setups() -> impl Strategy<Value = Setup> {
    let start = prop_oneof![Just(0), 65500..=u16::MAX, any::<u16>()];
    let features = (any::<bool>(), any::<bool>(), any::<bool>());
    (0..7_u32, start, features).prop_map(|(log, start, (event_idx, mergeable, in_order))| Setup {
        size: 1 << log,
        start,
        event_idx,
        mergeable,
        in_order,
    })
}

/// One memory with its driver. `WRITE` or not is the direction of its well-formed chains.
fn drive(driver: &mut Driver, act: &Act, flags: u16) {
    let size = driver.size;
    let room = driver.avail.wrapping_sub(driver.used_idx()) < size;
    match act {
        Act::Chain(first, buffers) => {
            let first = first % size;
            let buffers: Vec<_> = buffers.iter().map(|(o, l)| (buffer_at(*o), u32::from(*l))).collect();
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
                let entry = Descriptor::new(buffer_at(*offset), (*len).into(), flags | more, i as u16 + 1);
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
    pattern(&driver);
    driver
}

fn config(driver: &Driver, setup: &Setup) -> RingConfig {
    RingConfig {
        packed: false,
        in_order: setup.in_order,
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
    }
}

/// The device side over `virtio-queue`.
struct Oracle {
    queue: Queue,
    memory: GuestMemoryMmap,
    event_idx: bool,
    in_flight: VecDeque<u16>,
    staged: Vec<(u16, u32)>,
    /// The batches among `staged`, by their lengths: with IN_ORDER one used element stands for each.
    batches: Vec<usize>,
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
        Self { queue, memory, event_idx: setup.event_idx, in_flight: VecDeque::new(), staged: vec![], batches: vec![] }
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
        self.batches.clear();
        // `Queue` does not know NO_INTERRUPT.
        let wanted = match self.event_idx {
            true => self.queue.needs_notification(&self.memory).unwrap(),
            false => driver.get_u16(driver.avail_at()) & 1 == 0,
        };
        any && wanted
    }

    /// What the used ring has to have, by position: of a batch the last one's id in the first place (2.7.9).
    fn batched(&self) -> Vec<(u16, (u16, u32))> {
        let mut position = self.queue.next_used();
        let mut staged = &self.staged[..];
        let mut places = Vec::new();
        for batch in &self.batches {
            let (now, later) = staged.split_at(*batch);
            places.extend(now.last().map(|last| (position, *last)));
            position = position.wrapping_add(*batch as u16);
            staged = later;
        }
        places
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

/// Everything but used.flags and avail_event: each side suppresses kicks in its own way. With IN_ORDER
/// used elements, too, are compared in another way, if they may stand for several chains.
fn image(driver: &Driver, batches: bool) -> Vec<u8> {
    let mut image = driver.get(0, LEN);
    let elements = driver.used_at() + 4..driver.used_at() + 4 + 8 * usize::from(driver.size);
    for at in [driver.used_at(), elements.end] {
        image[at..at + 2].fill(0);
    }
    if batches {
        image[elements].fill(0);
    }
    image
}

/// The used element at a position.
fn element(driver: &Driver, position: u16) -> (u16, u32) {
    let at = driver.used_at() + 4 + 8 * usize::from(position % driver.size);
    let bytes = driver.get(at, 8);
    let field = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    (field(0) as u16, field(4))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn tx(setup in setups(), acts in acts()) {
        let (mut a, mut b) = (driver(&setup), driver(&setup));
        let mut ring = TxRing::new(ours(&a), &config(&a, &setup)).unwrap();
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
                            let expected = oracle.contents(&chain).map(decoded);
                            prop_assert_eq!(frame_at(&ring, i), expected);
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
                    oracle.batches.push(n);
                }
                Act::Rewind => {
                    ring.rewind();
                    let back = oracle.in_flight.drain(..).len() as u16;
                    let next = oracle.queue.next_avail().wrapping_sub(back);
                    oracle.queue.set_next_avail(next);
                }
                Act::Restart => {
                    ring.rewind();
                    let back = oracle.in_flight.drain(..).len() as u16;
                    let next = oracle.queue.next_avail().wrapping_sub(back);
                    oracle.queue.set_next_avail(next);
                    prop_assert_eq!(ring.publish(), oracle.publish(&b));
                    ring = TxRing::new(ours(&a), &config(&a, &setup)).unwrap();
                }
                Act::Used => {
                    let batched = oracle.batched();
                    prop_assert_eq!(ring.publish(), oracle.publish(&b));
                    prop_assert_eq!(ring.position(), oracle.queue.next_used());
                    prop_assert_eq!(a.used_idx(), b.used_idx());
                    for (position, used) in batched.into_iter().filter(|_| setup.in_order) {
                        prop_assert_eq!(element(&a, position), used);
                    }
                }
                Act::Kicks(true) => prop_assert_eq!(ring.enable_kicks(), oracle.kicks(true)),
                Act::Kicks(false) => ring.disable_kicks(),
                _ => {}
            }
            prop_assert_eq!(ring.in_flight(), oracle.in_flight.len());
        }
        ring.publish();
        oracle.publish(&b);
        prop_assert!(image(&a, setup.in_order) == image(&b, setup.in_order), "memories differ");
    }

    #[test]
    fn rx(setup in setups(), acts in acts()) {
        let (mut a, mut b) = (driver(&setup), driver(&setup));
        let mut ring = RxRing::new(ours(&a), &config(&a, &setup)).unwrap();
        let mut oracle = Oracle::new(&b, &setup);
        let mut number = 0_u8;
        for act in &acts {
            drive(&mut a, act, WRITE);
            drive(&mut b, act, WRITE);
            match *act {
                Act::Push(n, longest) => {
                    let frames = frames(&mut number, n, longest);
                    let (usual, others) =
                        frames.split_at(ring.push_each(frames.iter().map(|(header, frame)| (*header, &frame[..]))));
                    for (header, frame) in usual {
                        prop_assert_eq!(Ok(()), oracle.push(header, frame, setup.mergeable));
                    }
                    if let Some((header, frame)) = others.first() {
                        let found = ring.push(header, &mut &frame[..]).map_err(word);
                        prop_assert_eq!(found, oracle.push(header, frame, setup.mergeable));
                    }
                }
                Act::Restart => {
                    prop_assert_eq!(ring.publish(), oracle.publish(&b));
                    ring = RxRing::new(ours(&a), &config(&a, &setup)).unwrap();
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
        // Each buffer has its own length, so its own used element, IN_ORDER or not.
        prop_assert!(image(&a, false) == image(&b, false), "memories differ");
    }
}
