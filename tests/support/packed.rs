//! What a packed virtqueue (virtio 1.3, section 2.8) is in memory, for the books that [`super::queue`] keeps.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::memory::Region;
use super::queue::{Desc, WRITE};

pub const AVAIL: u16 = 1 << 7;
pub const USED: u16 = 1 << 15;

const EVENT_DISABLE: u16 = 1;
const EVENT_DESC: u16 = 2;

/// The ring, as its driver sees it. Positions count slots since the driver was reset, and only grow.
#[derive(Debug)]
pub struct Packed {
    region: Arc<Region>,
    size: u16,
    ring: u64,
    /// Event suppression: what the driver asks of the device, and the reverse.
    driver: u64,
    device: u64,
    pub in_order: bool,
    avail: u64,
    used: u64,
    kicked: u64,
    /// Of the first slot that is not yet visible: where its flags go, and what they are.
    hidden: Option<(u64, u16)>,
    /// Ids and slots of the chains that the device has, oldest first.
    out: VecDeque<(u16, u16)>,
}

impl Packed {
    pub fn new(region: &Arc<Region>, size: u16, ring: u64, driver: u64, device: u64) -> Self {
        Self {
            region: region.clone(),
            size,
            ring,
            driver,
            device,
            in_order: false,
            avail: 0,
            used: 0,
            kicked: 0,
            hidden: None,
            out: VecDeque::new(),
        }
    }

    fn slot(&self, position: u64) -> u64 {
        self.ring + 16 * (position % u64::from(self.size))
    }

    /// The wrap counter: it starts at 1.
    fn wrap(&self, position: u64) -> bool {
        (position / u64::from(self.size)).is_multiple_of(2)
    }

    /// A position as messages and event suppression structures have it.
    fn encode(&self, position: u64) -> u16 {
        (position % u64::from(self.size)) as u16 | if self.wrap(position) { 1 << 15 } else { 0 }
    }

    /// Writes any descriptor into a slot; `next` is its id.
    pub fn write_slot(&self, slot: u16, desc: Desc) {
        self.write_at(self.ring + 16 * u64::from(slot), desc);
    }

    /// Writes a descriptor anywhere.
    pub fn write_at(&self, gpa: u64, desc: Desc) {
        let Desc { addr, len, flags, next: id } = desc;
        self.region.write(gpa, &Desc { addr, len, flags: id, next: flags }.encode());
    }

    /// Flags of an available descriptor in the slot that is next.
    pub fn available(&self) -> u16 {
        if self.wrap(self.avail) { AVAIL } else { USED }
    }

    /// Writes a chain into the next slots, not yet visible.
    pub fn add(&mut self, id: u16, descs: &[Desc]) {
        for desc in descs {
            let (at, flags) = (self.slot(self.avail), desc.flags | self.available());
            if self.hidden.is_none() {
                let stale: u16 = self.region.load(at + 14, Ordering::Relaxed);
                self.write_at(at, Desc { flags: stale, next: id, ..*desc });
                self.hidden = Some((at + 14, flags));
            } else {
                self.write_at(at, Desc { flags, next: id, ..*desc });
            }
            self.avail += 1;
        }
        self.out.push_back((id, descs.len() as u16));
    }

    pub fn publish(&mut self) {
        if let Some((at, flags)) = self.hidden.take() {
            self.region.store(at, flags, Ordering::Release);
        }
    }

    /// What the device asks for: the position of its interest, and the flags.
    fn wish(&self) -> (u16, u16) {
        let word: u32 = self.region.load(self.device, Ordering::Relaxed);
        (word as u16, (word >> 16) as u16)
    }

    /// Whether it wants to be kicked, for this or that: it sleeps, or is about to.
    pub fn asks_for_kicks(&self) -> bool {
        self.wish().1 != EVENT_DISABLE
    }

    /// Whether the device wants to be kicked for what was published since the last time.
    pub fn kick_wanted(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let (event, flags) = self.wish();
        let mut news = std::mem::replace(&mut self.kicked, self.avail)..self.avail;
        match flags {
            EVENT_DISABLE => false,
            EVENT_DESC => news.any(|position| self.encode(position) == event),
            _ => true,
        }
    }

    /// The used descriptor at `position`: id, length, and how many of `out` from `first` on it stands for.
    #[track_caller]
    fn used_at(&self, position: u64, first: usize) -> Option<(u16, u32, usize)> {
        let at = self.slot(position);
        let flags: u16 = self.region.load(at + 14, Ordering::Acquire);
        let ours = if self.wrap(position) { AVAIL | USED } else { 0 };
        if flags & (AVAIL | USED) != ours || first == self.out.len() {
            return None;
        }
        let len: u32 = self.region.load(at + 8, Ordering::Relaxed);
        let id: u16 = self.region.load(at + 12, Ordering::Relaxed);
        // Without WRITE the length is reserved (2.8.4).
        let len = if flags & WRITE != 0 { len } else { 0 };
        let batch = self.out.iter().skip(first).position(|(out, _)| *out == id);
        let batch = batch.unwrap_or_else(|| panic!("used id {id}, which the device does not have")) + 1;
        assert!(batch == 1 || self.in_order, "{batch} chains with one used descriptor, or out of order");
        Some((id, len, batch))
    }

    fn slots(&self, first: usize, batch: usize) -> u64 {
        self.out.range(first..first + batch).map(|(_, slots)| u64::from(*slots)).sum()
    }

    /// Takes the next used chains: their ids, and the length of the last.
    #[track_caller]
    pub fn take(&mut self) -> Option<(Vec<u16>, u32)> {
        let (_, len, batch) = self.used_at(self.used, 0)?;
        self.used += self.slots(0, batch);
        Some((self.out.drain(..batch).map(|(id, _)| id).collect(), len))
    }

    /// Chains that could be taken now, and where the device is behind them.
    #[track_caller]
    pub fn visible(&self) -> (u16, u16) {
        let (mut position, mut chains) = (self.used, 0);
        while let Some((_, _, batch)) = self.used_at(position, chains) {
            position += self.slots(chains, batch);
            chains += batch;
        }
        (chains as u16, self.encode(position))
    }

    /// Where the driver has taken everything, as SET_VRING_BASE has it.
    pub fn base(&self) -> u32 {
        u32::from(self.encode(self.used)) << 16 | u32::from(self.encode(self.used))
    }

    /// Asks for a call at the next used descriptor.
    pub fn request_call(&self, event_idx: bool) {
        let flags = if event_idx { EVENT_DESC } else { 0 };
        self.ask(u32::from(flags) << 16 | u32::from(self.encode(self.used)));
        fence(Ordering::SeqCst);
    }

    pub fn suppress_calls(&self) {
        self.ask(u32::from(EVENT_DISABLE) << 16);
    }

    fn ask(&self, word: u32) {
        self.region.store(self.driver, word, Ordering::Relaxed);
    }

    /// As a driver that is reset.
    pub fn reset(&mut self) {
        self.region.write(self.ring, &vec![0; 16 * usize::from(self.size)]);
        self.region.write(self.driver, &[0; 4]);
        self.region.write(self.device, &[0; 4]);
        *self =
            Self { in_order: self.in_order, ..Self::new(&self.region, self.size, self.ring, self.driver, self.device) };
    }
}
