//! Receive and transmit queues of an ethdev, as a lane uses them.

use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;

use super::lease::Lease;
use super::mbuf::{Mbuf, RxMbuf, TxMbuf};
use super::mempool::{Pool, Stack};
use super::wake::Wake;
use super::{Lendable, RxPacket, RxQueue, TxQueue};
use crate::guest::HostRange;
use crate::ring::{BURST, Gather};

/// A transmit queue of an ethdev.
#[derive(Debug)]
pub struct EthdevTx {
    pub(super) port: u16,
    pub(super) queue: u16,
    /// Of what is copied.
    pub(super) pool: Arc<Pool>,
    /// Free mbufs of it, so that it is asked once per burst.
    pub(super) stash: ArrayVec<*mut dpdk_sys::rte_mbuf, BURST>,
    /// Of what is lent, if the driver is good for that.
    pub(super) shells: Option<Arc<Pool>>,
    /// Bytes of a frame that fit one mbuf.
    pub(super) room: usize,
    /// Shortest frame the device takes safely; shorter ones are padded.
    pub(super) min: usize,
    /// Longest frame it takes, in however many mbufs.
    pub(super) max: usize,
    /// See [`TxQueue::lent`].
    pub(super) lent: u32,
    /// Frames that may be lent and were not yet sent.
    pub(super) staged: usize,
    /// The memories that lent frames are in, at least as long as they are out.
    pub(super) lenders: ArrayVec<Lender, LENDERS>,
    /// What is lent may begin in an mbuf of ours.
    pub(super) heads: bool,
    /// Of a driver that is to be asked what it is done with.
    pub(super) asking: Option<Asking>,
    pub(super) _lease: Lease,
}

/// A memory that lent frames are in.
#[derive(Debug)]
pub(super) struct Lender {
    memory: Arc<Lendable>,
    /// Another one has taken its place: none are out when so many are back (see [`TxQueue::returned`]).
    last: Option<u32>,
}

/// How a driver is asked that frees what it has sent only a ring later.
///
/// It must never be asked while a frame of several mbufs is in its ring (see [`super::zero_copy`]). So a queue has
/// either those or lent frames: after the last of those it copies until they cannot be there any more; and before the
/// first of those it waits until what is lent is back. That needs all frames to come in the order of [`TxQueue::copy`]
/// and [`TxQueue::lend`]: one ring to a queue.
#[derive(Debug)]
pub(super) struct Asking {
    /// Descriptors of the queue; each frame takes one, or more.
    ring: u32,
    /// So many frames more, and no frame of several mbufs is in the ring.
    chained: u32,
    last: Instant,
}

/// How often at most: each time the driver may look at its whole ring.
const ASK: Duration = Duration::from_micros(50);

impl Asking {
    pub(super) fn new(descriptors: u16) -> Self {
        Self { ring: descriptors.into(), chained: 0, last: Instant::now() }
    }
}

/// Memory tables that frames of a queue may be in at a time: changes of a guest's memory that overtake frames.
const LENDERS: usize = 4;

/// Frames from this length on are lent, in bytes.
const LEND_FROM: usize = 256;

// SAFETY: a transmit queue may be used from any thread, by one at a time; the stash is its own.
unsafe impl Send for EthdevTx {}

impl EthdevTx {
    /// A fresh mbuf.
    #[inline]
    fn alloc(stash: &mut ArrayVec<*mut dpdk_sys::rte_mbuf, BURST>, pool: &Pool) -> Option<Mbuf> {
        if stash.is_empty() {
            Self::refill(stash, pool);
        }
        // SAFETY: from the pool, ours alone, and as free mbufs are.
        stash.pop().map(|raw| unsafe { Mbuf::new(raw).fresh() })
    }

    /// When the pool has less than a burst left, what it has.
    #[cold]
    fn refill(stash: &mut ArrayVec<*mut dpdk_sys::rte_mbuf, BURST>, pool: &Pool) {
        let mut n = BURST;
        while n > 0 {
            // SAFETY: the stash has room for BURST, and is empty; the pool is live. DPDK writes n pointers or fails.
            unsafe {
                if dpdk_sys::shim_mempool_get_bulk(pool.raw(), stash.as_mut_ptr(), n as u32) == 0 {
                    return stash.set_len(n);
                }
            }
            n /= 2;
        }
    }

    /// Those free to be pointed into guest memory.
    #[inline]
    fn stack(&self) -> Option<NonNull<Stack>> {
        self.shells.as_ref()?.stack()
    }

    /// Keeps a memory mapped as long as frames in it may be out. `false`: too many are kept already.
    #[inline]
    fn keep(&mut self, memory: &Arc<Lendable>) -> bool {
        if self.lenders.last().is_some_and(|last| last.last.is_none() && Arc::ptr_eq(&last.memory, memory)) {
            return true;
        }
        self.keep_another(memory)
    }

    #[cold]
    fn keep_another(&mut self, memory: &Arc<Lendable>) -> bool {
        if let Some(lender) = self.lenders.iter_mut().find(|lender| Arc::ptr_eq(&lender.memory, memory)) {
            lender.last = None;
            return true;
        }
        // None makes room here: who lets go of the last of a memory unmaps it, which takes its time.
        self.lenders.try_push(Lender { memory: Arc::clone(memory), last: None }).is_ok()
    }

    /// How many frames from the first on may go into the ring now: see [`Asking`].
    fn unchained(&mut self, burst: &ArrayVec<TxMbuf, BURST>) -> usize {
        if self.asking.as_ref().is_none_or(|asking| asking.chained == 0) {
            return burst.len();
        }
        // Behind the first of several mbufs all are copies.
        match burst.iter().position(TxMbuf::is_chained) {
            Some(first) if self.lent != self.returned() || burst[..first].iter().any(TxMbuf::is_lent) => first,
            _ => burst.len(),
        }
    }

    /// How many frames from the first on the driver's tx_prepare accepts. Cheap where no frame has an offload.
    fn prepare(&self, burst: &mut ArrayVec<TxMbuf, BURST>) -> usize {
        if burst.iter().fold(0, |flags, frame| flags | frame.flags()) == 0 {
            return burst.len();
        }
        // SAFETY: `TxMbuf` is laid out as the pointer; the queue is ours and configured.
        unsafe {
            dpdk_sys::shim_tx_prepare(self.port, self.queue, burst.as_mut_ptr().cast(), burst.len() as u16).into()
        }
    }
}

impl Drop for EthdevTx {
    fn drop(&mut self) {
        if self.lent != self.returned() {
            tracing::error!(
                port = self.port,
                queue = self.queue,
                "frames of a guest are still with the device; their memory is kept"
            );
            self.lenders.drain(..).for_each(std::mem::forget);
        }
        // SAFETY: the stash's mbufs are ours alone.
        unsafe {
            dpdk_sys::rte_pktmbuf_free_bulk(self.stash.as_mut_ptr(), self.stash.len() as u32);
        }
    }
}

impl TxQueue for EthdevTx {
    type Packet = TxMbuf;

    fn copy(&mut self, source: &mut impl Gather) -> Option<TxMbuf> {
        if source.remaining() > self.max {
            return None;
        }
        let (stash, pool) = (&mut self.stash, &*self.pool);
        let packet = TxMbuf::copy(source, self.room, self.min, || Self::alloc(stash, pool))?;
        if let Some(asking) = &mut self.asking
            && packet.is_chained()
        {
            // Those staged before it do not count.
            asking.chained = asking.ring + BURST as u32;
        }
        Some(packet)
    }

    #[inline]
    fn copy_each(&mut self, frames: impl Iterator<Item = impl Gather>, into: &mut ArrayVec<TxMbuf, BURST>) {
        let fit = self.min..=self.room;
        for mut frame in frames {
            let packet = match fit.contains(&frame.remaining()) {
                true => Self::alloc(&mut self.stash, &self.pool).map(|mbuf| {
                    // SAFETY: fresh, and the frame fits.
                    unsafe { TxMbuf::whole(mbuf, &mut frame) }
                }),
                false => self.copy(&mut frame),
            };
            match packet {
                Some(packet) => into.push(packet),
                None => break,
            }
        }
    }

    fn lends_from(&self) -> usize {
        if self.shells.is_some() { LEND_FROM } else { usize::MAX }
    }

    fn lend(&mut self, frame: HostRange, memory: &Arc<Lendable>) -> Option<TxMbuf> {
        let stack = self.stack()?;
        let unfit = frame.len() < self.min || frame.len() > self.room;
        if unfit || self.asking.as_ref().is_some_and(|asking| asking.chained > 0) || !self.keep(memory) {
            return None;
        }
        // SAFETY: whoever owns the queue owns its shells; what comes is ours alone, and as free mbufs are; the memory is
        // kept.
        let frame = unsafe {
            let shell = Mbuf::new(Stack::get_one(stack)?.cast().as_ptr());
            TxMbuf::over(shell.fresh(), frame)
        };
        self.staged += 1;
        Some(frame)
    }

    fn takes_heads(&self) -> bool {
        self.heads
    }

    fn lend_behind(&mut self, head: &[u8], rest: HostRange, memory: &Arc<Lendable>) -> Option<TxMbuf> {
        let stack = self.stack().filter(|_| self.heads)?;
        let unfit = head.len() > self.room || rest.len() > u16::MAX.into() || head.len() + rest.len() > self.max;
        if unfit || !self.keep(memory) {
            return None;
        }
        let first = Self::alloc(&mut self.stash, &self.pool)?;
        // SAFETY: as in `lend`; the first has room for the head.
        let frame = unsafe {
            let Some(shell) = Stack::get_one(stack) else {
                self.stash.push(first.raw());
                return None;
            };
            TxMbuf::behind(first, head, Mbuf::new(shell.cast().as_ptr()).fresh(), rest)
        };
        self.staged += 1;
        Some(frame)
    }

    fn lent(&self) -> u32 {
        self.lent
    }

    fn returned(&mut self) -> u32 {
        match self.stack() {
            // SAFETY: whoever owns the queue owns its shells.
            Some(stack) => unsafe { Stack::returned(stack) },
            None => 0,
        }
    }

    #[inline]
    fn reclaim(&mut self, now: Instant) {
        let out = self.lent != self.returned();
        if let Some(asking) = &mut self.asking
            && out
            && now.saturating_duration_since(asking.last) >= ASK
        {
            asking.last = now;
            // SAFETY: the queue is ours, configured, and has no frame of several mbufs: see `Asking`.
            unsafe { dpdk_sys::rte_eth_tx_done_cleanup(self.port, self.queue, 0) };
        }
    }

    fn forget_memories(&mut self, current: Option<&Arc<Lendable>>) -> bool {
        let (lent, returned) = (self.lent, self.returned());
        let is_current = |lender: &Lender| current.is_some_and(|current| Arc::ptr_eq(current, &lender.memory));
        self.lenders.retain(|lender| {
            // Counts wrap; they are never half of their range apart.
            is_current(lender) || returned.wrapping_sub(*lender.last.get_or_insert(lent)).cast_signed() < 0
        });
        self.lenders.iter().all(is_current)
    }

    fn send(&mut self, burst: &mut ArrayVec<TxMbuf, BURST>, refused: &mut u32) -> usize {
        let mut taken = 0;
        while !burst.is_empty() {
            let prepared = self.prepare(burst);
            let ready = self.unchained(burst).min(prepared);
            let lent = if self.staged > 0 { lent_places(&burst[..ready]) } else { 0 };
            let sent = if ready == 0 {
                0
            } else {
                // SAFETY: as in `prepare`; the driver owns the mbufs it takes.
                let sent =
                    unsafe { dpdk_sys::shim_tx_burst(self.port, self.queue, burst.as_mut_ptr().cast(), ready as u16) };
                usize::from(sent).min(ready)
            };
            if let Some(asking) = &mut self.asking {
                let chained = burst[..sent].iter().any(TxMbuf::is_chained);
                asking.chained = if chained { asking.ring } else { asking.chained.saturating_sub(sent as u32) };
            }
            forget_first(burst, sent);
            let lent = (lent & first_bits(sent)).count_ones();
            self.lent = self.lent.wrapping_add(lent);
            // Those that were dropped unsent stay counted: they cost a look at later bursts.
            self.staged -= lent as usize;
            taken += sent;
            if sent < ready || ready < prepared || burst.is_empty() {
                break;
            }
            // The first that is left is the one that tx_prepare stopped at.
            drop(burst.remove(0));
            *refused |= 1 << taken;
            taken += 1;
        }
        taken
    }
}

/// A bit for each frame that is lent.
fn lent_places(frames: &[TxMbuf]) -> u32 {
    frames.iter().enumerate().fold(0, |bits, (place, frame)| bits | u32::from(frame.is_lent()) << place)
}

/// `n` bits, at most all.
fn first_bits(n: usize) -> u32 {
    ((1_u64 << n) - 1) as u32
}

/// Removes the first `n` without dropping them: they are the driver's.
fn forget_first(burst: &mut ArrayVec<TxMbuf, BURST>, n: usize) {
    let left = burst.len() - n;
    // SAFETY: the rest is moved to the front, and the length covers exactly that; without its
    // elements an ArrayVec does nothing when it is dropped.
    unsafe {
        burst.set_len(0);
        let base = burst.as_mut_ptr();
        ptr::copy(base.add(n), base, left);
        burst.set_len(left);
    }
}

/// A receive queue of an ethdev.
#[derive(Debug)]
pub struct EthdevRx {
    pub(super) port: u16,
    pub(super) queue: u16,
    pub(super) pool: Arc<Pool>,
    pub(super) wake: Arc<Wake>,
    /// Its driver is known for how it takes buffers, and writes at most so many bytes to one, without a look at its length.
    pub(super) places: Option<usize>,
    /// It takes them before there are frames for them.
    pub(super) early: bool,
    /// Of those, how many the driver has or gets next that have a place in the guest's order, oldest first.
    pub(super) placed: usize,
    /// The memories that posted buffers are in, at least as long as the driver may have some.
    pub(super) lenders: ArrayVec<Arc<Lendable>, LENDERS>,
    pub(super) _lease: Lease,
}

impl Drop for EthdevRx {
    fn drop(&mut self) {
        if self.withdraw() > 0 {
            tracing::error!(
                port = self.port,
                queue = self.queue,
                "buffers of a guest are still with the device; their memory is kept"
            );
            self.lenders.drain(..).for_each(std::mem::forget);
        }
    }
}

impl EthdevRx {
    /// Keeps a memory mapped as long as buffers in it may be with the device. `false`: too many are kept already.
    #[cold]
    fn keep(&mut self, memory: &Arc<Lendable>) -> bool {
        // SAFETY: the queue is ours, and so its pool.
        let none_is_out = self.pool.stack().is_some_and(|stack| unsafe { Stack::out(stack).1 == 0 });
        if !self.early || none_is_out && self.waiting() == 0 {
            // Those of before are done with.
            self.withdraw();
        }
        let kept = self.lenders.iter().any(|lender| Arc::ptr_eq(lender, memory));
        kept || self.lenders.try_push(Arc::clone(memory)).is_ok()
    }
}

impl RxQueue for EthdevRx {
    type Packet = RxMbuf;

    #[inline]
    fn receive(&mut self, burst: &mut ArrayVec<RxMbuf, BURST>) -> usize {
        let mut raw = [ptr::null_mut(); BURST];
        let Some(stack) = self.pool.stack() else {
            return 0;
        };
        // SAFETY: `raw` has room for BURST; the queue is ours.
        let n = unsafe {
            dpdk_sys::shim_rx_burst(self.port, self.queue, raw.as_mut_ptr(), burst.remaining_capacity() as u16)
        };
        let (before, posted) = (burst.len(), !self.lenders.is_empty());
        for &mbuf in &raw[..n.into()] {
            // SAFETY: just received, from the queue of this pool, and no more than fit.
            unsafe {
                burst.push_unchecked(RxMbuf::new(Mbuf::new(mbuf), self.pool.raw(), stack, posted));
            }
        }
        if self.early && n > 0 {
            let of_guest = burst[before..].iter().filter(|frame| frame.placed_at().is_some()).count();
            // SAFETY: the queue is ours, and so its pool.
            unsafe { Stack::received(stack, n.into(), of_guest) };
            self.placed = self.placed.saturating_sub(n.into());
        }
        n.into()
    }

    #[inline]
    fn takes_buffers(&self) -> Option<usize> {
        self.places
    }

    #[inline]
    fn takes_early(&self) -> bool {
        self.early
    }

    fn ahead(&self) -> usize {
        // SAFETY: the queue is ours, and so its pool.
        let out = |stack| unsafe { Stack::out(stack).0 + Stack::waiting(stack) };
        self.pool.stack().filter(|_| self.early).map_or(0, |stack| out(stack).saturating_sub(self.placed))
    }

    #[inline]
    fn waiting(&self) -> usize {
        // SAFETY: the queue is ours, and so its pool.
        self.pool.stack().map_or(0, |stack| unsafe { Stack::waiting(stack) })
    }

    #[inline]
    fn post(&mut self, buffer: HostRange, header: usize, memory: &Arc<Lendable>) -> bool {
        let holds = |most: usize| buffer.len().checked_sub(header).is_some_and(|room| room >= most);
        let Some(stack) = self.pool.stack().filter(|_| self.places.is_some_and(holds)) else {
            return false;
        };
        let buffer = buffer.after(header);
        let known = self.lenders.last().is_some_and(|lender| Arc::ptr_eq(lender, memory));
        if !memory.covers(&buffer) || !known && !self.keep(memory) {
            return false;
        }
        // SAFETY: the queue is ours, and so its pool; the memory is kept until the mbufs are back, and all of the buffer can
        // be written to.
        let posted = unsafe { Stack::post(stack, buffer.as_ptr(), buffer.len()) };
        if posted && self.early {
            // Whoever posts has left places for those ahead of it.
            // SAFETY: as above.
            self.placed = unsafe { Stack::out(stack).0 + Stack::waiting(stack) };
        }
        posted
    }

    fn withdraw(&mut self) -> usize {
        let Some(stack) = self.pool.stack() else { return 0 };
        // SAFETY: the queue is ours, and so its pool.
        let (back, of_guest) = unsafe { (Stack::withdraw(stack), Stack::out(stack).1) };
        self.placed = if self.early && of_guest > 0 { self.placed - back } else { 0 };
        if self.placed == 0 {
            self.lenders.clear();
        }
        self.placed
    }

    fn interrupt_fd(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the driver keeps the fd open until the VF is stopped, and it is not while we have its lease.
        self.wake.fd().map(|fd| unsafe { BorrowedFd::borrow_raw(fd) })
    }

    fn arm(&mut self) {
        // Drivers whose fd is the queue itself have nothing to enable, and say so.
        // SAFETY: DPDK checks port and queue.
        unsafe { dpdk_sys::rte_eth_dev_rx_intr_enable(self.port, self.queue) };
    }

    fn disarm(&mut self) {
        // SAFETY: DPDK checks port and queue.
        unsafe { dpdk_sys::rte_eth_dev_rx_intr_disable(self.port, self.queue) };
        self.wake.quench();
    }
}
