//! How a receive queue wakes a sleeping core.

use std::os::fd::RawFd;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::Relaxed};

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

    /// The queue's fd, if it has one.
    pub(super) fn fd(&self) -> Option<RawFd> {
        let fd = self.fd.load(Relaxed);
        (fd >= 0).then_some(fd)
    }

    /// Takes back what the device signalled, where it would stay.
    pub(super) fn quench(&self) {
        if let Some(fd) = self.fd()
            && self.counts.load(Relaxed)
        {
            let mut count = 0u64;
            // SAFETY: 8 bytes of ours. DPDK opens its eventfds non-blocking: nothing to read is no error.
            unsafe { libc::read(fd, ptr::from_mut(&mut count).cast(), size_of::<u64>()) };
        }
    }
}
