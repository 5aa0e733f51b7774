//! Receive and transmit queues of an ethdev, as a lane uses them.

use std::os::fd::BorrowedFd;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::Relaxed};

use arrayvec::ArrayVec;

use super::mbuf::{Mbuf, RxMbuf, TxMbuf};
use super::mempool::Pool;
use super::{RxQueue, TxQueue};
use crate::ring::{BURST, Gather};

/// A transmit queue of an ethdev.
#[derive(Debug)]
pub struct EthdevTx {
    pub(super) port: u16,
    pub(super) queue: u16,
    pub(super) pool: Arc<Pool>,
    /// Fresh mbufs, so that the pool is asked once per burst.
    pub(super) stash: ArrayVec<*mut dpdk_sys::rte_mbuf, BURST>,
    /// Bytes of a frame that fit one mbuf.
    pub(super) room: usize,
    /// Shortest frame the device takes safely; shorter ones are padded.
    pub(super) min: usize,
    /// Longest frame it takes, in however many mbufs.
    pub(super) max: usize,
}

// SAFETY: a transmit queue may be used from any thread, by one at a time; the stash is its own.
unsafe impl Send for EthdevTx {}

impl EthdevTx {
    /// A fresh mbuf. When the pool has less than a burst left, what it has.
    fn alloc(stash: &mut ArrayVec<*mut dpdk_sys::rte_mbuf, BURST>, pool: &Pool) -> Option<Mbuf> {
        if stash.is_empty() {
            let mut n = BURST;
            // SAFETY: the stash has room for BURST, and is empty; the pool is live.
            while unsafe { dpdk_sys::shim_pktmbuf_alloc_bulk(pool.raw(), stash.as_mut_ptr(), n as u32) } != 0 {
                n /= 2;
                if n == 0 {
                    return None;
                }
            }
            // SAFETY: DPDK wrote n pointers.
            unsafe { stash.set_len(n) };
        }
        // SAFETY: fresh from the pool.
        stash.pop().map(|raw| unsafe { Mbuf::new(raw) })
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
        TxMbuf::copy(source, self.room, self.min, || Self::alloc(stash, pool))
    }

    fn send(&mut self, burst: &mut ArrayVec<TxMbuf, BURST>, refused: &mut u32) -> usize {
        let mut taken = 0;
        while !burst.is_empty() {
            let ready = self.prepare(burst);
            let sent = if ready == 0 {
                0
            } else {
                // SAFETY: as in `prepare`; the driver owns the mbufs it takes.
                let sent =
                    unsafe { dpdk_sys::shim_tx_burst(self.port, self.queue, burst.as_mut_ptr().cast(), ready as u16) };
                usize::from(sent).min(ready)
            };
            forget_first(burst, sent);
            taken += sent;
            if sent < ready || burst.is_empty() {
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

/// What wakes a sleeper when a receive queue has frames. Known while the device is started.
#[derive(Debug)]
pub(super) struct Wake {
    /// The fd, or -1.
    fd: AtomicI32,
    /// It is an eventfd that the device signals once per arming; otherwise (tap) the fd *is* the
    /// queue, readable as long as frames wait, or the driver takes back its event itself (mlx5).
    counts: AtomicBool,
}

impl Wake {
    pub(super) fn none() -> Arc<Self> {
        Arc::new(Self { fd: AtomicI32::new(-1), counts: AtomicBool::new(false) })
    }

    /// Asks the driver for the queue's fd. After the device has started. `true` if it has one.
    pub(super) fn find(&self, port: u16, queue: u16) -> bool {
        // SAFETY: any port and queue are checked by DPDK.
        let fd = unsafe { dpdk_sys::rte_eth_dev_rx_intr_ctl_q_get_fd(port, queue) };
        let kind = std::fs::read_link(format!("/proc/self/fd/{fd}"));
        let (usable, counts) = match kind.as_deref().map(|path| path.to_string_lossy()) {
            Err(_) => (false, false),
            // Also there where the driver cannot arm it (net_e1000_igb_vf makes one, and has no way to enable it):
            // a sleeper would never wake.
            Ok(path) if path.starts_with("anon_inode:[eventfd") => (Self::can_arm(port, queue), true),
            // One interrupt for the whole device, which EAL's own thread reads.
            Ok(path) if path.starts_with("/dev/uio") => (false, false),
            Ok(_) => (true, false),
        };
        self.counts.store(counts, Relaxed);
        self.fd.store(if usable { fd } else { -1 }, Relaxed);
        usable
    }

    fn can_arm(port: u16, queue: u16) -> bool {
        // SAFETY: DPDK checks port and queue.
        unsafe {
            dpdk_sys::rte_eth_dev_rx_intr_enable(port, queue) == 0
                && dpdk_sys::rte_eth_dev_rx_intr_disable(port, queue) == 0
        }
    }

    pub(super) fn lose(&self) {
        self.fd.store(-1, Relaxed);
    }
}

/// A receive queue of an ethdev.
#[derive(Debug)]
pub struct EthdevRx {
    pub(super) port: u16,
    pub(super) queue: u16,
    pub(super) pool: Arc<Pool>,
    pub(super) wake: Arc<Wake>,
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
        for &mbuf in &raw[..n.into()] {
            // SAFETY: just received, from the queue of this pool, and no more than fit.
            unsafe {
                burst.push_unchecked(RxMbuf::new(Mbuf::new(mbuf), self.pool.raw(), stack));
            }
        }
        n.into()
    }

    fn interrupt_fd(&self) -> Option<BorrowedFd<'_>> {
        let fd = self.wake.fd.load(Relaxed);
        // SAFETY: the driver keeps the fd open while the VF runs, and lanes look at it only then.
        (fd >= 0).then(|| unsafe { BorrowedFd::borrow_raw(fd) })
    }

    fn arm(&mut self) {
        // Drivers whose fd is the queue itself have nothing to enable, and say so.
        // SAFETY: DPDK checks port and queue.
        unsafe { dpdk_sys::rte_eth_dev_rx_intr_enable(self.port, self.queue) };
    }

    fn disarm(&mut self) {
        // SAFETY: DPDK checks port and queue.
        unsafe { dpdk_sys::rte_eth_dev_rx_intr_disable(self.port, self.queue) };
        if let Some(fd) = self.interrupt_fd()
            && self.wake.counts.load(Relaxed)
        {
            let mut count = 0u64;
            // SAFETY: 8 bytes of ours. DPDK opens its eventfds non-blocking: nothing to read is no error.
            unsafe {
                libc::read(std::os::fd::AsRawFd::as_raw_fd(&fd), ptr::from_mut(&mut count).cast(), size_of::<u64>())
            };
        }
    }
}
