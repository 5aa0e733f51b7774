//! Whether a VF lost what its driver had set up, because its PF was reset.
//!
//! A driver that learns of it tells so by RTE_ETH_EVENT_INTR_RESET, from an interrupt. Of igb the message itself is
//! looked at, too: QEMU (10.0) raises no interrupt for a mailbox on vector 0, where DPDK has it.

use std::ffi::{c_int, c_void};
use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use super::PciAddress;
use super::dma;

/// Held by a VF that is probed.
#[derive(Debug)]
pub(super) struct ResetWatch {
    port: u16,
    told: AtomicBool,
    mailbox: Option<Mailbox>,
}

impl ResetWatch {
    /// In a box, where the callback finds it.
    pub(super) fn over(port: u16) -> Box<Self> {
        let watch = Box::new(Self { port, told: AtomicBool::new(false), mailbox: None });
        // SAFETY: the callback is unregistered before its argument goes.
        let rc = unsafe {
            dpdk_sys::rte_eth_dev_callback_register(port, dpdk_sys::SHIM_EVENT_RESET, Some(told), watch.argument())
        };
        if rc != 0 {
            tracing::warn!(port, rc, "a reset of the VF's PF will not be noticed");
        }
        watch
    }

    /// Looks into the mailbox of a VF of igb, in this group, too.
    pub(super) fn look_into_mailbox(&mut self, group: RawFd, address: PciAddress) {
        match Mailbox::open(group, address) {
            Ok(mailbox) => self.mailbox = Some(mailbox),
            Err(error) => tracing::info!(vf = %address, %error, "its mailbox is not looked into"),
        }
    }

    /// The VF lost what was set up, and has not got it back.
    pub(super) fn is_lost(&self) -> bool {
        self.told.load(Relaxed) || self.mailbox.as_ref().is_some_and(|mailbox| mailbox.message() & ANSWER == 0)
    }

    /// And its PF may be ready for it to be set up again.
    pub(super) fn was_reset(&self) -> bool {
        self.told.load(Relaxed) || self.mailbox.as_ref().is_some_and(|mailbox| mailbox.message() == RESET)
    }

    /// The VF is about to start.
    pub(super) fn starts(&self) {
        self.told.store(false, Relaxed);
    }

    /// It has started: waits a little for the PF's answer to the driver's last request.
    pub(super) fn started(&self) {
        for _ in 0..20 {
            if !self.is_lost() {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn argument(&self) -> *mut c_void {
        (&raw const self.told).cast_mut().cast()
    }
}

impl Drop for ResetWatch {
    fn drop(&mut self) {
        loop {
            // SAFETY: what was registered.
            let rc = unsafe {
                dpdk_sys::rte_eth_dev_callback_unregister(
                    self.port,
                    dpdk_sys::SHIM_EVENT_RESET,
                    Some(told),
                    self.argument(),
                )
            };
            if rc != -libc::EAGAIN {
                return;
            }
            // It runs just now.
            std::thread::yield_now();
        }
    }
}

/// On EAL's interrupt thread.
unsafe extern "C" fn told(_port: u16, _event: u32, arg: *mut c_void, _: *mut c_void) -> c_int {
    // SAFETY: registered with an `AtomicBool` that is alive until it is unregistered.
    unsafe { &*arg.cast::<AtomicBool>() }.store(true, Relaxed);
    0
}

/// The mailbox of a VF of igb (82576, 7.10.2.9.1), through a file of our own to the device.
#[derive(Debug)]
struct Mailbox {
    device: File,
    /// Of the first register.
    registers: u64,
}

/// The message of a PF that has forgotten its VF: one that sends no "clear to send" along.
const RESET: u32 = 0x100;

/// What a PF says to a VF that it knows has one of these: positive or negative answer, "clear to send". What a reset has
/// wiped has none, nor has a request that nobody answers.
const ANSWER: u32 = 0xe000_0000;

impl Mailbox {
    /// Where the message is.
    const MESSAGE: u64 = 0x800;

    fn open(group: RawFd, address: PciAddress) -> io::Result<Self> {
        let device = dma::device(group, address)?;
        let registers = dma::first_region(&device)?;
        Ok(Self { device, registers })
    }

    /// The first word of what PF or VF said last. Reading it changes nothing.
    fn message(&self) -> u32 {
        let mut message = [0; 4];
        match self.device.read_exact_at(&mut message, self.registers + Self::MESSAGE) {
            Ok(()) => u32::from_le_bytes(message),
            // As of a device that is gone.
            Err(_) => u32::MAX,
        }
    }
}
