//! The driver's side of a virtqueue, with its areas open to lies: what follows is split (virtio 1.3, section
//! 2.7); where a packed one differs, [`super::packed`] has it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use super::frontend::{FrontEnd, pair, readable, request, vring_addr};
use super::memory::{Region, USER_OFFSET};
use super::packed::Packed;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// A descriptor as it lies in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Desc {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Desc {
    pub fn encode(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A piece of a chain: address and length.
pub type Piece = (u64, u32);

/// One virtqueue. Misuse of a well-behaved driver's calls panics; so does a device that breaks the
/// specification (unknown or repeated ids in the used ring, an index that runs ahead).
#[derive(Debug)]
pub struct Queue {
    /// Index among the port's rings: 2 × pair for receiving, 2 × pair + 1 for sending.
    pub index: u32,
    pub size: u16,
    pub region: Arc<Region>,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    pub kick: OwnedFd,
    pub call: OwnedFd,
    event_idx: bool,
    free: Vec<u16>,
    /// Descriptors of the chain that starts at an index; empty: not with the device.
    chains: Vec<Vec<u16>>,
    avail_idx: u16,
    kicked_idx: u16,
    used_idx: u16,
    /// Kicks the device wanted.
    pub kicks: u64,
    pub packed: Option<Packed>,
    /// Chains that were used together with a later one, which was taken already.
    taken: Vec<(u16, u32)>,
}

impl Queue {
    pub fn new(region: &Arc<Region>, index: u32, size: u16, event_idx: bool) -> Self {
        let n = u64::from(size);
        let fd = || eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).expect("eventfd");
        Self {
            index,
            size,
            desc: region.alloc(16 * n, 16),
            avail: region.alloc(6 + 2 * n, 2),
            used: region.alloc(6 + 8 * n, 4),
            region: region.clone(),
            kick: fd(),
            call: fd(),
            event_idx,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); size.into()],
            avail_idx: 0,
            kicked_idx: 0,
            used_idx: 0,
            kicks: 0,
            packed: None,
            taken: Vec::new(),
        }
    }

    /// A packed one.
    pub fn packed(region: &Arc<Region>, index: u32, size: u16, event_idx: bool) -> Self {
        let queue = Self::new(region, index, size, event_idx);
        // Both event suppression structures are aligned to 4.
        let avail = region.alloc(4, 4);
        let packed = Some(Packed::new(region, size, queue.desc, avail, queue.used));
        Self { avail, packed, ..queue }
    }

    /// Tells the back end everything about the ring but SET_VRING_ENABLE.
    pub fn start(&self, front: &FrontEnd) {
        self.set_up(front);
        self.kick_off(front);
    }

    /// Size, base, addresses and call fd.
    pub fn set_up(&self, front: &FrontEnd) {
        front.must(request::SET_VRING_NUM, &pair(self.index, self.size.into()), &[]);
        let base = self.packed.as_ref().map_or(self.used_idx.into(), Packed::base);
        front.must(request::SET_VRING_BASE, &pair(self.index, base), &[]);
        front.must(request::SET_VRING_ADDR, &self.addresses(), &[]);
        let ring = u64::from(self.index).to_ne_bytes();
        front.must(request::SET_VRING_CALL, &ring, &[self.call.as_fd()]);
    }

    /// SET_VRING_KICK: the ring is started.
    pub fn kick_off(&self, front: &FrontEnd) {
        let ring = u64::from(self.index).to_ne_bytes();
        front.must(request::SET_VRING_KICK, &ring, &[self.kick.as_fd()]);
    }

    /// The body of its SET_VRING_ADDR.
    pub fn addresses(&self) -> Vec<u8> {
        let user = |gpa| gpa + USER_OFFSET;
        vring_addr(self.index, user(self.desc), user(self.used), user(self.avail))
    }

    /// Descriptors not in use.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Chains with the device.
    pub fn outstanding(&self) -> u16 {
        self.avail_idx.wrapping_sub(self.used_idx)
    }

    pub fn avail_idx(&self) -> u16 {
        self.avail_idx
    }

    pub fn used_idx(&self) -> u16 {
        self.used_idx
    }

    /// Chains that the device has used, ever.
    #[track_caller]
    pub fn device_idx(&self) -> u16 {
        if let Some(packed) = &self.packed {
            return self.used_idx.wrapping_add(self.taken.len() as u16).wrapping_add(packed.visible().0);
        }
        self.region.load(self.used + 2, Ordering::Acquire)
    }

    /// The device's position, as GET_VRING_BASE has to answer.
    #[track_caller]
    pub fn position(&self) -> u16 {
        self.packed.as_ref().map_or_else(|| self.device_idx(), |packed| packed.visible().1)
    }

    /// Writes a descriptor of the table.
    pub fn write_desc(&self, index: u16, desc: Desc) {
        self.write_desc_at(self.desc + 16 * u64::from(index), desc);
    }

    /// Writes a descriptor anywhere.
    pub fn write_desc_at(&self, gpa: u64, desc: Desc) {
        self.region.write(gpa, &desc.encode());
    }

    /// Puts a head into the available ring without publishing it.
    pub fn write_head(&self, head: u16) {
        self.write_head_at(self.avail_idx, head);
    }

    pub fn write_head_at(&self, position: u16, head: u16) {
        let slot = u64::from(position % self.size);
        self.region.store(self.avail + 4 + 2 * slot, head, Ordering::Relaxed);
    }

    /// Publishes `n` heads written by [`Self::write_head_at`].
    pub fn advance(&mut self, n: u16) {
        self.avail_idx = self.avail_idx.wrapping_add(n);
        self.publish();
    }

    /// Stores any available index.
    pub fn write_avail_idx(&self, idx: u16) {
        self.region.store(self.avail + 2, idx, Ordering::Release);
    }

    /// Adds a chain, not yet published. `None`: too few free descriptors.
    pub fn add(&mut self, pieces: &[Piece], device_writes: bool) -> Option<u16> {
        if pieces.len() > self.free.len() {
            return None;
        }
        let chain = self.free.split_off(self.free.len() - pieces.len());
        if let Some(packed) = &mut self.packed {
            let last = pieces.len() - 1;
            let desc = |(i, &(addr, len)): (usize, &Piece)| {
                let flags = if device_writes { WRITE } else { 0 } | if i < last { NEXT } else { 0 };
                Desc { addr, len, flags, next: 0 }
            };
            packed.add(chain[0], &pieces.iter().enumerate().map(desc).collect::<Vec<_>>());
            return Some(self.made_available(chain));
        }
        for (i, &(addr, len)) in pieces.iter().enumerate() {
            let next = chain.get(i + 1);
            let flags = if device_writes { WRITE } else { 0 } | next.map_or(0, |_| NEXT);
            let next = next.copied().unwrap_or(0);
            let desc = Desc { addr, len, flags, next };
            self.write_desc(chain[i], desc);
        }
        Some(self.made_available(chain))
    }

    /// As [`Self::add`], through an indirect table at `table`.
    pub fn add_indirect(&mut self, table: u64, pieces: &[Piece], device_writes: bool) -> Option<u16> {
        let head = self.free.pop()?;
        if let Some(packed) = &mut self.packed {
            for (i, &(addr, len)) in pieces.iter().enumerate() {
                let flags = if device_writes { WRITE } else { 0 };
                packed.write_at(table + 16 * i as u64, Desc { addr, len, flags, next: 0 });
            }
            packed.add(head, &[Desc { addr: table, len: 16 * pieces.len() as u32, flags: INDIRECT, next: 0 }]);
            return Some(self.made_available(vec![head]));
        }
        for (i, &(addr, len)) in pieces.iter().enumerate() {
            let last = i + 1 == pieces.len();
            let flags = if device_writes { WRITE } else { 0 } | if last { 0 } else { NEXT };
            let next = if last { 0 } else { i as u16 + 1 };
            let desc = Desc { addr, len, flags, next };
            self.write_desc_at(table + 16 * i as u64, desc);
        }
        let desc = Desc { addr: table, len: 16 * pieces.len() as u32, flags: INDIRECT, next: 0 };
        self.write_desc(head, desc);
        Some(self.made_available(vec![head]))
    }

    /// Adds a chain of any descriptors to a packed ring.
    pub fn add_descs(&mut self, descs: &[Desc]) -> u16 {
        let chain = self.free.split_off(self.free.len() - descs.len());
        self.packed.as_mut().expect("a packed ring").add(chain[0], descs);
        self.made_available(chain)
    }

    fn made_available(&mut self, chain: Vec<u16>) -> u16 {
        let head = chain[0];
        if self.packed.is_none() {
            self.write_head(head);
        }
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.chains[usize::from(head)] = chain;
        head
    }

    /// The head a following [`Self::add`] will use, so that its buffer can be filled first.
    pub fn next_head(&self, pieces: usize) -> Option<u16> {
        let first = self.free.len().checked_sub(pieces)?;
        self.free.get(first).copied()
    }

    /// Makes added chains visible to the device.
    pub fn publish(&mut self) {
        if let Some(packed) = &mut self.packed {
            return packed.publish();
        }
        self.write_avail_idx(self.avail_idx);
    }

    /// Publishes, and kicks if the device asked for it.
    pub fn notify(&mut self) {
        self.publish();
        // Order the index before the look at the device's wish (virtio 1.3, 2.7.13.4.1).
        fence(Ordering::SeqCst);
        let wanted = if let Some(packed) = &mut self.packed {
            packed.kick_wanted()
        } else if self.event_idx {
            let event: u16 = self.region.load(self.used + 4 + 8 * u64::from(self.size), Ordering::Relaxed);
            let (new, old) = (self.avail_idx, self.kicked_idx);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.region.load::<u16>(self.used, Ordering::Relaxed) & 1 == 0
        };
        self.kicked_idx = self.avail_idx;
        if wanted {
            self.kicks += 1;
            self.kick_now();
        }
    }

    /// Kicks whether wanted or not.
    pub fn kick_now(&self) {
        rustix::io::write(&self.kick, &1u64.to_ne_bytes()).expect("kick");
    }

    /// Takes the next used element: head and written length.
    #[track_caller]
    pub fn pop(&mut self) -> Option<(u16, u32)> {
        if let Some(packed) = &mut self.packed {
            if self.taken.is_empty() {
                let (ids, len) = packed.take()?;
                // What stands behind a later one was used without anything being written.
                self.taken = ids.into_iter().rev().map(|id| (id, 0)).collect();
                self.taken[0].1 = len;
            }
            let (id, len) = self.taken.pop()?;
            self.used_idx = self.used_idx.wrapping_add(1);
            let chain = std::mem::take(&mut self.chains[usize::from(id)]);
            self.free.extend(chain.iter().rev());
            return Some((id, len));
        }
        let idx = self.device_idx();
        let ready = idx.wrapping_sub(self.used_idx);
        if ready == 0 {
            return None;
        }
        let ring = self.index;
        assert!(
            ready <= self.outstanding(),
            "ring {ring}: used index {idx} runs ahead: we are at {}, {} outstanding",
            self.used_idx,
            self.outstanding()
        );
        let at = self.used + 4 + 8 * u64::from(self.used_idx % self.size);
        let id: u32 = self.region.load(at, Ordering::Relaxed);
        let len: u32 = self.region.load(at + 4, Ordering::Relaxed);
        self.used_idx = self.used_idx.wrapping_add(1);
        let chain = self.chains.get_mut(id as usize).map(std::mem::take);
        let chain = chain.unwrap_or_else(|| panic!("ring {ring}: used id {id} of a table of {}", self.size));
        assert!(!chain.is_empty(), "ring {ring}: used id {id}, which the device does not have");
        self.free.extend(chain.iter().rev());
        Some((id as u16, len))
    }

    /// Takes the next used element of a chain the driver's books do not know: a lie. Id and length.
    pub fn take_foreign(&mut self) -> (u32, u32) {
        assert_ne!(self.device_idx(), self.used_idx, "nothing used");
        let at = self.used + 4 + 8 * u64::from(self.used_idx % self.size);
        self.used_idx = self.used_idx.wrapping_add(1);
        (self.region.load(at, Ordering::Relaxed), self.region.load(at + 4, Ordering::Relaxed))
    }

    /// Asks for a call at the next used element; `true` if there is one already.
    pub fn request_call(&self) -> bool {
        if let Some(packed) = &self.packed {
            packed.request_call(self.event_idx);
            return self.device_idx() != self.used_idx;
        }
        self.region.store::<u16>(self.avail, 0, Ordering::Relaxed);
        self.write_used_event(self.used_idx);
        fence(Ordering::SeqCst);
        self.device_idx() != self.used_idx
    }

    /// Asks not to be called (with EVENT_IDX: not before the index has gone all the way round).
    pub fn suppress_calls(&self) {
        if let Some(packed) = &self.packed {
            return packed.suppress_calls();
        }
        if self.event_idx {
            self.write_used_event(self.used_idx.wrapping_sub(1));
        } else {
            self.region.store::<u16>(self.avail, 1, Ordering::Relaxed);
        }
    }

    fn write_used_event(&self, value: u16) {
        let at = self.avail + 4 + 2 * u64::from(self.size);
        self.region.store(at, value, Ordering::Relaxed);
    }

    /// Sleeps until the device calls; `false` after `timeout`.
    pub fn wait_call(&self, timeout: Duration) -> bool {
        if !readable(self.call.as_fd(), timeout) {
            return false;
        }
        self.take_calls();
        true
    }

    /// Calls since the last time, taken.
    pub fn take_calls(&self) -> u64 {
        let mut count = [0; 8];
        match rustix::io::read(&self.call, &mut count) {
            Ok(8) => u64::from_ne_bytes(count),
            _ => 0,
        }
    }

    /// Where a started ring resumes: forgets what the device has, as a driver that is reset does.
    pub fn reset(&mut self) {
        self.free = (0..self.size).rev().collect();
        self.chains.iter_mut().for_each(Vec::clear);
        self.avail_idx = 0;
        self.kicked_idx = 0;
        self.used_idx = 0;
        self.taken.clear();
        if let Some(packed) = &mut self.packed {
            return packed.reset();
        }
        self.region.write(self.avail, &[0; 4]);
        self.region.write(self.used, &[0; 4]);
    }
}
