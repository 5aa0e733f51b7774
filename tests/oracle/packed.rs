//! Packed rings against a model of a device that is as slow and as plain as the words of the specification
//! (virtio 1.3, section 2.8): it knows bytes of memory, a few lists, and nothing of the code under test.

use std::collections::VecDeque;

use proptest::prelude::*;
use virtio_forwarder::ring::{BURST, IN_FLIGHT, NetHeader, RingAddresses, RingConfig, RxRing, TxRing};

use super::testing::packed::{AVAIL, DESC, DISABLE, Driver, ENABLE, Place, USED, bytes};
use super::testing::{Descriptor, GPA, INDIRECT, Memory, NEXT, WRITE};
use super::*;

/// No frame needs more descriptors; a limit that the device may set (2.8.5).
const MOST: usize = 1024;

#[derive(Clone, Copy, Debug)]
struct Setup {
    size: u16,
    start: Place,
    event_idx: bool,
    mergeable: bool,
    in_order: bool,
}

fn setups() -> impl Strategy<Value = Setup> {
    let size = prop_oneof![8 => 1..70_u16, 1 => Just(255), 1 => 900..1100_u16, 1 => Just(1500)];
    let features = (any::<bool>(), any::<bool>(), any::<bool>());
    (size, any::<u16>(), any::<bool>(), features).prop_map(|(size, start, wrap, features)| {
        let (event_idx, mergeable, in_order) = features;
        Setup { size, start: Place { index: start % size, wrap }, event_idx, mergeable, in_order }
    })
}

/// A descriptor in a chain, or in an indirect table.
#[derive(Clone, Copy, Debug)]
struct Element {
    addr: u64,
    len: u32,
    flags: u16,
}

/// Elements of a chain until its end, or `None` where something forbids to go on.
type Elements = Vec<Option<Element>>;

/// A chain that was taken out of the ring.
#[derive(Clone, Copy, Debug, Default)]
struct Chain {
    id: u16,
    slots: u16,
    /// Bytes written to it.
    len: u32,
}

/// The device.
struct Model {
    memory: Memory,
    setup: Setup,
    /// It reads buffers, or it writes to them.
    reads: bool,
    ring_at: usize,
    driver_at: usize,
    /// What it looks at next.
    next: Place,
    /// Where it writes its next used descriptor.
    used: Place,
    /// All in front of it is the driver's.
    published: Place,
    in_flight: VecDeque<Chain>,
    /// Used chains that are not yet visible.
    done: Vec<Chain>,
    /// A chain had no end.
    broken: bool,
}

impl Model {
    fn new(driver: &Driver, setup: &Setup, reads: bool) -> Self {
        Self {
            memory: driver.share(),
            setup: *setup,
            reads,
            ring_at: driver.ring_at(),
            driver_at: driver.driver_at(),
            next: setup.start,
            used: setup.start,
            published: setup.start,
            in_flight: VecDeque::new(),
            done: Vec::new(),
            broken: false,
        }
    }

    fn element(&self, at: usize) -> Element {
        let bytes = self.memory.get(at, 16);
        Element {
            addr: u64::from_le_bytes(bytes[..8].try_into().unwrap()),
            len: u32::from_le_bytes(bytes[8..12].try_into().unwrap()),
            flags: u16::from_le_bytes(bytes[14..].try_into().unwrap()),
        }
    }

    fn id(&self, at: usize) -> u16 {
        self.memory.get_u16(at + 12)
    }

    /// Offset in our memory of a range of the guest's, if all of it is there.
    fn offset(&self, addr: u64, len: u64) -> Option<usize> {
        let at = addr.checked_sub(GPA)?;
        (at.checked_add(len)? <= LEN as u64).then_some(at as usize)
    }

    /// Slots that are the device's: until their used descriptors are visible, no driver may touch them.
    fn owned(&self) -> u16 {
        self.in_flight.iter().chain(&self.done).map(|chain| chain.slots).sum()
    }

    /// Whether there is a descriptor for the device `ahead` slots behind the next one.
    fn is_ready(&self, ahead: u16) -> bool {
        if self.owned() + ahead == self.setup.size {
            return false;
        }
        let place = self.next.plus(ahead, self.setup.size);
        let flags = self.memory.get_u16(self.ring_at + 16 * usize::from(place.index) + 14);
        (flags & AVAIL != 0) == place.wrap && (flags & USED != 0) != place.wrap
    }

    /// The chain `ahead` slots behind the next one, if there is one.
    fn chain(&mut self, ahead: u16) -> Option<(Chain, Elements)> {
        if self.broken || !self.is_ready(ahead) {
            return None;
        }
        let size = self.setup.size;
        let left = size - self.owned() - ahead;
        let mut place = self.next.plus(ahead, size);
        let mut elements = Vec::new();
        for slots in 1..=left.min(MOST as u16) {
            let at = self.ring_at + 16 * usize::from(place.index);
            let element = self.element(at);
            if element.flags & INDIRECT != 0 {
                elements.extend(self.table(&element));
            } else {
                elements.push(Some(element));
            }
            if element.flags & NEXT == 0 {
                return Some((Chain { id: self.id(at), slots, len: 0 }, elements));
            }
            place = place.next(size);
        }
        // Nobody knows where the next one begins.
        self.broken = true;
        None
    }

    /// The elements of an indirect table (2.8.7); or something illegal.
    fn table(&self, refer: &Element) -> Elements {
        let len = u64::from(refer.len);
        // In one of the two regions as a whole: a limit of ours.
        let inside =
            |half: u64| refer.addr >= half && refer.addr.checked_add(len).is_some_and(|end| end <= half + HALF as u64);
        let legal = refer.flags & NEXT == 0 && len != 0 && len % 16 == 0;
        if !legal || !(inside(GPA) || inside(GPA + HALF as u64)) {
            return vec![None];
        }
        let at = (refer.addr - GPA) as usize;
        // A limit of others: DPDK's driver sets WRITE where it may only be read.
        let kept = if self.reads { !WRITE } else { !0 };
        let entries = (0..refer.len as usize / 16).map(|i| self.element(at + 16 * i));
        entries.map(|entry| Some(Element { flags: entry.flags & kept, ..entry })).collect()
    }

    fn take_out(&mut self, slots: u16) {
        self.next = self.next.plus(slots, self.setup.size);
    }

    /// The bytes of a chain for the device to read, if it is well-formed.
    fn contents(&self, elements: &Elements) -> Option<Vec<u8>> {
        if elements.len() > MOST {
            return None;
        }
        let mut bytes = Vec::new();
        for element in elements {
            let element = element.as_ref()?;
            if element.flags & WRITE != 0 {
                return None;
            }
            // Before it is read: it may be long.
            if bytes.len() + element.len as usize > NetHeader::LEN + MAX_FRAME {
                return None;
            }
            if element.len > 0 {
                let at = self.offset(element.addr, element.len.into())?;
                bytes.extend(self.memory.get(at, element.len as usize));
            }
        }
        (bytes.len() >= NetHeader::LEN + 14).then_some(bytes)
    }

    /// The next chain to read from: its bytes, if it is well-formed.
    fn pop(&mut self) -> Option<Option<Vec<u8>>> {
        let (chain, elements) = self.chain(0)?;
        self.take_out(chain.slots);
        self.in_flight.push_back(chain);
        Some(self.contents(&elements))
    }

    /// Uses the `n` oldest chains in flight. With IN_ORDER the last one stands for all (2.8.8).
    fn complete(&mut self, n: usize) {
        let mut chains: Vec<_> = self.in_flight.drain(..n).collect();
        if self.setup.in_order && n > 0 {
            let slots = chains.iter().map(|chain| chain.slots).sum();
            chains = vec![Chain { slots, ..chains[n - 1] }];
        }
        chains.into_iter().for_each(|chain| self.use_up(chain));
    }

    /// Uses a chain. The first used descriptor of a batch is written last, by `publish` (2.8.9).
    fn use_up(&mut self, chain: Chain) {
        if !self.done.is_empty() {
            self.write_used(self.used, chain);
        }
        self.used = self.used.plus(chain.slots, self.setup.size);
        self.done.push(chain);
    }

    fn write_used(&self, place: Place, chain: Chain) {
        let written = if chain.len > 0 { WRITE } else { 0 };
        let used = Descriptor::new(0, chain.len, place.used() | written, chain.id);
        // The address is unused, and stays.
        self.memory.put(self.ring_at + 16 * usize::from(place.index) + 8, &bytes(&used)[8..]);
    }

    fn rewind(&mut self) {
        self.in_flight.clear();
        self.next = self.used;
    }

    /// Where to write the next `want` bytes of a chain, as far as it goes; `None` if it is malformed there.
    /// `seen`: the descriptors looked at for this frame.
    fn targets(&self, elements: &Elements, want: usize, seen: &mut usize) -> Result<Vec<(usize, usize)>, &'static str> {
        let mut targets = Vec::new();
        let mut left = want;
        for element in elements {
            if left == 0 {
                break;
            }
            *seen += 1;
            if *seen > MOST {
                return Err("too many");
            }
            let element = element.as_ref().filter(|element| element.flags & WRITE != 0).ok_or("malformed")?;
            // A buffer is looked at as far as it is needed.
            let len = left.min(element.len as usize);
            if len > 0 {
                let at = self.offset(element.addr, len as u64).ok_or("malformed")?;
                targets.push((at, len));
            }
            left -= len;
        }
        Ok(targets)
    }

    /// Puts one frame into the ring.
    fn push(&mut self, header: &NetHeader, frame: &[u8]) -> Result<(), &'static str> {
        if self.broken {
            return Err("broken");
        }
        let total = NetHeader::LEN + frame.len();
        let mut chains: Vec<(Chain, Vec<(usize, usize)>)> = Vec::new();
        let (mut have, mut slots, mut seen) = (0, 0, 0);
        while have < total {
            let Some((mut chain, elements)) = self.chain(slots) else {
                let all = slots == self.setup.size;
                return Err(if self.broken {
                    "broken"
                } else if all {
                    "oversize"
                } else {
                    "empty"
                });
            };
            let targets = self.targets(&elements, total - have, &mut seen);
            if targets == Err("too many") && slots > 0 {
                return Err("oversize");
            }
            chain.len = targets.iter().flatten().map(|(_, len)| *len as u32).sum();
            have += chain.len as usize;
            slots += chain.slots;
            let short = have < total && (chain.len as usize) < NetHeader::LEN;
            let Some(targets) = targets.ok().filter(|_| !short) else {
                chains.push((chain, Vec::new()));
                self.take_out(slots);
                chains.iter().for_each(|(chain, _)| self.use_up(Chain { len: 0, ..*chain }));
                return Err("malformed");
            };
            if have < total && !self.setup.mergeable {
                return Err("oversize");
            }
            chains.push((chain, targets));
        }
        let mut bytes = header.encode(chains.len() as u16).to_vec();
        bytes.extend(frame);
        let mut bytes = &bytes[..];
        for (at, len) in chains.iter().flat_map(|(_, targets)| targets) {
            let (now, later) = bytes.split_at(*len);
            self.memory.put(*at, now);
            bytes = later;
        }
        self.take_out(slots);
        chains.iter().for_each(|(chain, _)| self.use_up(*chain));
        Ok(())
    }

    /// Shows what was used. Whether the driver wants to hear of it.
    fn publish(&mut self) -> bool {
        let old = self.published;
        let size = self.setup.size;
        if let Some(first) = self.done.first() {
            self.write_used(old, *first);
        }
        self.done.clear();
        self.published = self.used;
        let (event, flags) = (self.memory.get_u16(self.driver_at), self.memory.get_u16(self.driver_at + 2));
        let wanted = match flags {
            ENABLE => true,
            DISABLE => false,
            DESC if self.setup.event_idx => {
                let mut place = old;
                let slots = old.distance(self.published, size);
                (0..slots).any(|_| {
                    let hit = place == Place::decode(event);
                    place = place.next(size);
                    hit
                })
            }
            // Reserved, or not negotiated: better once too often.
            _ => true,
        };
        wanted && old != self.published
    }
}

/// What the driver does. `flags` is the direction of its well-formed chains. `position`: the device's.
fn drive(driver: &mut Driver, act: &Act, flags: u16, position: u16) {
    let size = driver.size;
    driver.trust(Place::decode(position));
    let room = usize::from(driver.room());
    match act {
        Act::Chain(id, buffers) if room > 0 => {
            let buffers: Vec<_> = buffers.iter().map(|(o, l)| (buffer_at(*o), u32::from(*l))).collect();
            driver.chain(*id, &buffers[..buffers.len().min(room)], flags);
        }
        Act::Indirect(id, buffers) if room > 0 => {
            // The table is far from the buffers, and not aligned.
            let table = LEN - 8192 + 4 + usize::from(id % 64) * 80;
            for (i, (offset, len)) in buffers.iter().enumerate() {
                // Only WRITE counts in there, now and then wrong.
                let ignored = if id % 2 == 0 { NEXT | AVAIL } else { 0 };
                let flags = flags | ignored | if id & 4 != 0 { WRITE } else { 0 };
                let entry = Descriptor::new(buffer_at(*offset), (*len).into(), flags, 7);
                driver.put(table + 16 * i, &bytes(&entry));
            }
            let refer = Descriptor::new(driver.gpa(table), 16 * buffers.len() as u32, INDIRECT | (id & WRITE), 0);
            driver.offer(*id, &[refer]);
        }
        // In any slot, whoever has it.
        Act::Describe(at, descriptor) if at % 4 == 0 => {
            let place = if descriptor.next % 2 == 0 { AVAIL } else { USED };
            let flags = descriptor.flags | if descriptor.next % 16 == 0 { AVAIL | USED } else { place };
            driver.describe((at / 4) % size, Descriptor { flags, ..*descriptor });
        }
        // A chain of anything; if it goes on, then into what the driver has not written.
        Act::Describe(id, descriptor) if room > 0 => driver.offer(*id, &[*descriptor]),
        // A good one behind it, perhaps.
        Act::Offer(id) if room > 0 => driver.chain(*id, &[(buffer_at(id % 512), 1600)], flags),
        Act::Publish => driver.publish(),
        Act::UsedEvent(behind) => {
            // From one in front of the device to some behind it.
            let place = Place::decode(position).plus((*behind + 2 * size - 1) % (2 * size), size);
            driver.set_driver_event(place, DESC);
        }
        Act::NoInterrupt(set) => driver.set_driver_event(Place::FIRST, if *set { DISABLE } else { ENABLE }),
        _ => {}
    }
}

/// Something that no driver may do to a ring (what buffers are like is another matter): a slot that is not its
/// own, a chain without an end.
fn is_lie(act: &Act) -> bool {
    matches!(act, Act::Describe(at, descriptor) if at % 4 == 0 || descriptor.flags & NEXT != 0)
}

fn driver(setup: &Setup) -> Driver {
    let driver = Driver::new(LEN, setup.size, setup.start);
    assert!(driver.buffers().start <= HALF / 2);
    pattern(&driver);
    driver
}

fn config(driver: &Driver, setup: &Setup) -> RingConfig {
    RingConfig {
        packed: true,
        in_order: setup.in_order,
        size: setup.size,
        addresses: RingAddresses {
            desc: user(driver.ring_at()),
            avail: user(driver.driver_at()),
            used: user(driver.device_at()),
        },
        base: setup.start.encode(),
        indirect: true,
        event_idx: setup.event_idx,
        mergeable: setup.mergeable,
        header_len: NetHeader::LEN,
        max_frame: MAX_FRAME,
    }
}

/// Of a ring that goes on where another one stopped.
fn successor(driver: &Driver, setup: &Setup, position: u16) -> RingConfig {
    RingConfig { base: position, ..config(driver, setup) }
}

/// Lies make a ring that contradicts itself: `None` if it was refused after some.
fn unless_lied_to<R>(ring: virtio_forwarder::Result<R>, acts: &[Act]) -> Option<R> {
    match ring {
        Ok(ring) => Some(ring),
        Err(_) if acts.iter().any(is_lie) => None,
        Err(error) => panic!("{error}"),
    }
}

/// Everything but what the device asks of the driver: the model leaves that alone.
fn image(driver: &Driver) -> Vec<u8> {
    let mut image = driver.get(0, LEN);
    image[driver.device_at()..driver.device_at() + 4].fill(0);
    image
}

/// What a ring says of kicks, against where it is.
fn asked(driver: &Driver, setup: &Setup, wanted: bool, next: Place) -> bool {
    match (driver.device_event(), wanted, setup.event_idx) {
        ((_, flags), false, _) => flags == DISABLE,
        ((_, flags), true, false) => flags == ENABLE,
        ((place, flags), true, true) => flags == DESC && place == next,
    }
}

/// What a ring showed its driver, and where it is then.
fn published(model: &mut Model, wanted: bool, position: u16) -> Result<(), TestCaseError> {
    prop_assert_eq!(wanted, model.publish());
    prop_assert_eq!(position, model.published.encode());
    Ok(())
}

/// What a ring says, and asks of its driver, when it is to be kicked.
fn kicks_enabled(driver: &Driver, setup: &Setup, model: &mut Model, ready: bool) -> Result<(), TestCaseError> {
    prop_assert_eq!(ready, model.broken || model.is_ready(0));
    prop_assert!(asked(driver, setup, true, model.next));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn tx(setup in setups(), acts in acts()) {
        let (mut a, mut b) = (driver(&setup), driver(&setup));
        let mut ring = TxRing::new(ours(&a), &config(&a, &setup)).unwrap();
        let mut model = Model::new(&b, &setup, true);
        prop_assert!(asked(&a, &setup, false, model.next));
        for act in &acts {
            drive(&mut a, act, 0, ring.position());
            drive(&mut b, act, 0, ring.position());
            match *act {
                Act::Pop(max) => {
                    let max = max.min(BURST).min(IN_FLIGHT - ring.in_flight());
                    let mut popped = 0;
                    while popped < max {
                        let Ok(n) = ring.pop(max - popped) else {
                            prop_assert!(model.pop().is_none() && model.broken);
                            break;
                        };
                        if n == 0 {
                            prop_assert!(model.pop().is_none() && !model.broken, "all of it was popped");
                            break;
                        }
                        popped += n;
                        for i in 0..n {
                            let expected = model.pop().expect("it is available").map(decoded);
                            prop_assert_eq!(frame_at(&ring, i), expected);
                        }
                    }
                }
                Act::Complete(n) => {
                    let n = n.min(ring.in_flight());
                    ring.complete(n);
                    model.complete(n);
                }
                Act::Rewind => {
                    ring.rewind();
                    model.rewind();
                }
                Act::Restart => {
                    ring.rewind();
                    model.rewind();
                    prop_assert_eq!(ring.publish(), model.publish());
                    let next = TxRing::new(ours(&a), &successor(&a, &setup, ring.position()));
                    let Some(next) = unless_lied_to(next, &acts) else { return Ok(()) };
                    (ring, model.broken) = (next, false);
                }
                Act::Used => {
                    let wanted = ring.publish();
                    published(&mut model, wanted, ring.position())?;
                }
                Act::Kicks(true) => {
                    let ready = ring.enable_kicks();
                    kicks_enabled(&a, &setup, &mut model, ready)?;
                }
                Act::Kicks(false) => {
                    ring.disable_kicks();
                    prop_assert!(asked(&a, &setup, false, model.next));
                }
                _ => {}
            }
            prop_assert_eq!(ring.in_flight(), model.in_flight.len());
        }
        prop_assert_eq!(ring.publish(), model.publish());
        prop_assert!(image(&a) == image(&b), "memories differ");
    }

    #[test]
    fn rx(setup in setups(), acts in acts()) {
        let (mut a, mut b) = (driver(&setup), driver(&setup));
        let mut ring = RxRing::new(ours(&a), &config(&a, &setup)).unwrap();
        let mut model = Model::new(&b, &setup, false);
        let mut number = 0_u8;
        for act in &acts {
            drive(&mut a, act, WRITE, ring.position());
            drive(&mut b, act, WRITE, ring.position());
            match *act {
                Act::Push(n, longest) => {
                    let frames = frames(&mut number, n, longest);
                    let (usual, others) =
                        frames.split_at(ring.push_each(frames.iter().map(|(header, frame)| (*header, &frame[..]))));
                    for (header, frame) in usual {
                        prop_assert_eq!(Ok(()), model.push(header, frame));
                    }
                    if let Some((header, frame)) = others.first() {
                        let found = ring.push(header, &mut &frame[..]).map_err(word);
                        prop_assert_eq!(found, model.push(header, frame));
                    }
                }
                Act::Restart => {
                    prop_assert_eq!(ring.publish(), model.publish());
                    let next = RxRing::new(ours(&a), &successor(&a, &setup, ring.position()));
                    let Some(next) = unless_lied_to(next, &acts) else { return Ok(()) };
                    (ring, model.broken) = (next, false);
                }
                Act::Used => {
                    let wanted = ring.publish();
                    published(&mut model, wanted, ring.position())?;
                }
                Act::Kicks(true) => {
                    let ready = ring.enable_kicks();
                    kicks_enabled(&a, &setup, &mut model, ready)?;
                }
                Act::Kicks(false) => ring.disable_kicks(),
                _ => {}
            }
        }
        prop_assert_eq!(ring.publish(), model.publish());
        prop_assert!(image(&a) == image(&b), "memories differ");
    }
}
