//! VFs: what a port's packets leave through and arrive from. The only room that knows DPDK.
//!
//! Two kinds: [`ethdev`] (a DPDK Ethernet device: an SR-IOV VF, or a vdev that stands in for one)
//! and [`soft`] (plain Rust: `soft:null`, `soft:loop`). Lanes see neither: they are generic over
//! [`TxQueue`] and [`RxQueue`], chosen once when the lane is built.

#[cfg(feature = "dpdk")]
mod device_info;
mod dma;
#[cfg(feature = "dpdk")]
mod domain;
#[cfg(feature = "dpdk")]
pub mod eal;
#[cfg(feature = "dpdk")]
pub mod ethdev;
mod lease;
mod lendable;
#[cfg(feature = "dpdk")]
mod mbuf;
#[cfg(feature = "dpdk")]
mod mempool;
#[cfg(feature = "dpdk")]
mod pci;
#[cfg(feature = "dpdk")]
mod queue;
#[cfg(feature = "dpdk")]
mod quirks;
#[cfg(feature = "dpdk")]
mod reset_watch;
pub mod soft;
mod spec;
#[cfg(feature = "dpdk")]
mod wake;
#[cfg(feature = "dpdk")]
mod zero_copy;

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use arrayvec::ArrayVec;

pub use dma::DmaMap;
pub use lendable::Lendable;
pub use spec::{Mac, PciAddress, VfSpec};

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::guest::HostRange;
use crate::ring::{BURST, Gather};

// `TxQueue::send` has a bit for each frame.
const _: () = assert!(BURST <= u32::BITS as usize);

/// What a VF is asked to be; fixed from configure to removal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VfConfig {
    /// Queue pairs wanted; the VF gets as many of them as it has.
    pub queues: u16,
    /// Largest layer-3 packet, in bytes, [`crate::ethernet::MIN_MTU`] to [`crate::ethernet::MAX_MTU`].
    pub mtu: u16,
    /// MAC to set; `None` keeps the VF's own.
    pub mac: Option<Mac>,
}

/// What a VF can do, read once after the probe; `rx_interrupt` is known from the first start on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VfCaps {
    /// Driver name, e.g. `net_tap`.
    pub driver: String,
    /// Most queue pairs.
    pub max_queues: u16,
    /// Largest MTU.
    pub max_mtu: u16,
    /// Completes L4 checksums (TCP and UDP over IPv4 and IPv6) of sent frames.
    pub tx_checksum: bool,
    /// Segments TCP over IPv4 and IPv6.
    pub tso: bool,
    /// Says whether a received frame's L4 checksum is good.
    pub rx_checksum: bool,
    /// Takes frames of several segments.
    pub multi_segment: bool,
    /// Why it does not send frames from where they lie in guest memory; `None`: its driver is known to be done with them
    /// in time and in order.
    pub copies: Option<Box<str>>,
    /// Why it does not receive frames where the guest wants them; `None`: its driver is known for how it takes buffers.
    pub copies_received: Option<Box<str>>,
    /// Can wake a sleeping core when a frame arrives.
    pub rx_interrupt: bool,
    /// What it finds in memory.
    pub dma: Dma,
    /// Why that is [`Dma::Shared`].
    pub dma_shared: Option<Box<str>>,
}

/// What a VF finds in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dma {
    /// It is no device: its driver reads and writes by the CPU.
    #[default]
    None,
    /// The daemon's own buffers, and what of its guest's memory is mapped for it.
    Own,
    /// The same as other VFs: no guest's memory is mapped.
    Shared,
}

/// Link and address of a VF, as the operator sees them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VfLink {
    /// Carrier is up.
    pub up: bool,
    /// Mb/s; 0 if unknown.
    pub speed: u32,
    /// The MAC in force.
    pub mac: Option<Mac>,
}

/// What the VF has to do to a frame; offsets were checked against the frame's private copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TxOffload {
    /// Complete the L4 checksum.
    pub checksum: bool,
    /// Cut into segments of this many payload bytes; 0: do not.
    pub segment: u16,
    /// L4 is UDP (else TCP).
    pub udp: bool,
    /// L3 is IPv6 (else IPv4).
    pub ipv6: bool,
    /// Length of the Ethernet header with its VLAN tags.
    pub l2_len: u8,
    /// Length of the IP header with its extensions.
    pub l3_len: u16,
    /// Length of the TCP header; 0 if not segmented.
    pub l4_len: u8,
}

/// A frame of our own on its way to a VF.
#[allow(clippy::len_without_is_empty)] // a frame is never empty
pub trait TxPacket: Send {
    /// Length of the frame.
    fn len(&self) -> usize;
    /// The first contiguous piece (whole headers: at least `min(len, 256)` bytes).
    fn head(&self) -> &[u8];
    /// The same, to complete a checksum in.
    fn head_mut(&mut self) -> &mut [u8];
    /// Tells the VF what to do. An offload the VF lacks is a bug of the caller.
    fn set_offload(&mut self, offload: &TxOffload);
}

/// One transmit queue of a VF. Owned by exactly one lane.
pub trait TxQueue: Send + 'static {
    /// Its frames.
    type Packet: TxPacket;
    /// Copies the rest of `source` into a new frame; `None` when the pool is dry, or when the frame is longer than
    /// the VF takes: a frame of the configured MTU with two VLAN tags, or with `tso`
    /// [`crate::ethernet::MAX_TSO_FRAME`].
    fn copy(&mut self, source: &mut impl Gather) -> Option<Self::Packet>;
    /// Copies frames, each in one piece, in front of which `into` has room for all, until one cannot be copied: see
    /// [`Self::copy`].
    #[inline]
    fn copy_each(&mut self, frames: impl Iterator<Item = impl Gather>, into: &mut ArrayVec<Self::Packet, BURST>) {
        for mut frame in frames {
            match self.copy(&mut frame) {
                Some(packet) => into.push(packet),
                None => break,
            }
        }
    }
    /// Offers the frames, in order; those that were taken leave `burst` (a prefix). Returns their
    /// number. A frame that the driver's tx_prepare refuses is dropped, counts as taken, and sets the bit of
    /// its place in `refused`.
    fn send(&mut self, burst: &mut ArrayVec<Self::Packet, BURST>, refused: &mut u32) -> usize;
    /// Shortest frame that is worth being sent from where it lies, in bytes; `usize::MAX`: none is.
    fn lends_from(&self) -> usize {
        usize::MAX
    }
    /// A frame that stays where it is, covered by `memory`, until it is sent: see [`Self::lent`]. Whoever has it must not
    /// give it back to the guest before. `None` as for [`Self::copy`], or if this queue cannot, or not now.
    fn lend(&mut self, _frame: HostRange, _memory: &Arc<Lendable>) -> Option<Self::Packet> {
        None
    }
    /// Whether [`Self::lend_behind`] is worth being tried.
    fn takes_heads(&self) -> bool {
        false
    }
    /// As [`Self::lend`], for a frame of which offloads are asked: a copy of its `head`, and the `rest` where it lies.
    fn lend_behind(&mut self, _head: &[u8], _rest: HostRange, _memory: &Arc<Lendable>) -> Option<Self::Packet> {
        None
    }
    /// Lent frames taken by `send`, ever, modulo 2^32.
    fn lent(&self) -> u32 {
        0
    }
    /// At home, with no frame staged: keeps no memory any longer in which no lent frame is out, but for `current`. Whether
    /// that is all it keeps.
    fn forget_memories(&mut self, _current: Option<&Arc<Lendable>>) -> bool {
        true
    }
    /// Has the VF say what it is done with, where it does not unasked; not more often than is worth it.
    fn reclaim(&mut self, _now: Instant) {}
    /// How many of these the VF is done with, in the order of sending.
    fn returned(&mut self) -> u32 {
        0
    }
}

/// A received frame.
#[allow(clippy::len_without_is_empty)] // a frame is never empty
pub trait RxPacket: Send {
    /// Length of the frame.
    fn len(&self) -> usize;
    /// The first contiguous piece, for the flow hash.
    fn head(&self) -> &[u8];
    /// All of it.
    fn gather(&self) -> impl Gather + '_;
    /// The VF verified the L4 checksum.
    fn checksum_good(&self) -> bool;
    /// It came into a buffer posted to its queue: where its first byte is. Its bytes are not to be read.
    fn placed_at(&self) -> Option<usize> {
        None
    }
}

/// One receive queue of a VF. Owned by exactly one lane.
pub trait RxQueue: Send + 'static {
    /// Its frames. Dropping one gives its buffer back.
    type Packet: RxPacket;
    /// Receives into `burst` until it is full or the queue is empty. Returns how many came.
    fn receive(&mut self, burst: &mut ArrayVec<Self::Packet, BURST>) -> usize;
    /// Frames can come into buffers that are posted, in that order: its VF writes at most so many bytes to one, and does not
    /// ask how long it is. `None`: they cannot.
    fn takes_buffers(&self) -> Option<usize> {
        None
    }
    /// Its VF takes buffers before there are frames for them, its own where none is posted, and uses all of them in the order
    /// in which it took them. Whoever posts leaves a place in the guest's order for each that a frame is still to come
    /// into. Else it takes one for a frame that is there.
    fn takes_early(&self) -> bool {
        false
    }
    /// Of such a VF: how many buffers of its own frames will come into before one comes into the next that is posted, but for
    /// those before the one that was posted last.
    fn ahead(&self) -> usize {
        0
    }
    /// Buffers that are posted, and not taken.
    fn waiting(&self) -> usize {
        0
    }
    /// The next frame, after those for which buffers are there already, is to come into `buffer`, in `memory`, behind its
    /// first `header` bytes. Whoever posts does not let the guest have it back before a frame came into it or
    /// [`Self::withdraw`]. `false`: not now.
    fn post(&mut self, _buffer: HostRange, _header: usize, _memory: &Arc<Lendable>) -> bool {
        false
    }
    /// Takes back the buffers that its VF has not taken. Returns how many places are left, up to the last one of a buffer that
    /// it has: if any are, it gives those back only when a frame comes into them, or when it is stopped.
    fn withdraw(&mut self) -> usize {
        0
    }
    /// The fd that becomes readable when a frame arrives after [`Self::arm`]; `None` if the VF has none.
    fn interrupt_fd(&self) -> Option<BorrowedFd<'_>>;
    /// Nothing ever arrives: there is nothing to wait for.
    fn is_silent(&self) -> bool {
        false
    }
    /// Enables the interrupt. The caller receives once more before it sleeps.
    fn arm(&mut self);
    /// Disables the interrupt and takes back what made the fd readable.
    fn disarm(&mut self);
}

/// Queues of a configured VF, by kind, so that lanes can be built for the kind.
#[derive(Debug)]
pub enum Queues {
    /// Of a soft VF.
    Soft(Vec<soft::SoftTx>, Vec<soft::SoftRx>),
    /// Of a DPDK ethdev.
    #[cfg(feature = "dpdk")]
    Ethdev(Vec<ethdev::EthdevTx>, Vec<ethdev::EthdevRx>),
}

/// A probed VF. Life: `probe` (device thread) → `configure` → `start` → `stop` (port thread) →
/// `remove` (device thread). As long as a queue handed out by `configure` lives, `stop` and `remove` are refused.
#[derive(Debug)]
pub enum Vf {
    /// Plain Rust.
    Soft(soft::SoftVf),
    /// DPDK.
    #[cfg(feature = "dpdk")]
    Ethdev(ethdev::EthdevVf),
}

impl Vf {
    /// Finds or creates the device. [`crate::error::Error::VfAbsent`] if a PCI device is not there yet or not
    /// bound to a driver DPDK can use: the caller may try again later. Device thread only.
    pub fn probe(spec: &VfSpec) -> Result<Self> {
        match spec {
            VfSpec::SoftNull | VfSpec::SoftLoop => soft::SoftVf::probe(spec).map(Self::Soft),
            #[cfg(feature = "dpdk")]
            VfSpec::Pci(_) | VfSpec::Vdev { .. } => ethdev::EthdevVf::probe(spec).map(Self::Ethdev),
            #[cfg(not(feature = "dpdk"))]
            VfSpec::Pci(_) | VfSpec::Vdev { .. } => Err(crate::error::Error::Invalid(format!(
                "{spec} needs DPDK, which this build lacks; use soft:null or soft:loop"
            ))),
        }
    }

    /// What it can do.
    pub fn caps(&self) -> &VfCaps {
        match self {
            Self::Soft(vf) => vf.caps(),
            #[cfg(feature = "dpdk")]
            Self::Ethdev(vf) => vf.caps(),
        }
    }

    /// Configures queues, MTU, MAC, promiscuous where allowed; creates the pools.
    pub fn configure(&mut self, config: &VfConfig) -> Result<Queues> {
        match self {
            Self::Soft(vf) => vf.configure(config),
            #[cfg(feature = "dpdk")]
            Self::Ethdev(vf) => vf.configure(config),
        }
    }

    /// Starts it.
    pub fn start(&mut self) -> Result<()> {
        match self {
            Self::Soft(vf) => vf.start(),
            #[cfg(feature = "dpdk")]
            Self::Ethdev(vf) => vf.start(),
        }
    }

    /// Stops it; every buffer the device held is back afterwards. [`crate::Error::Conflict`], and nothing is done,
    /// if one of its queues was not dropped.
    pub fn stop(&mut self) -> Result<()> {
        match self {
            Self::Soft(vf) => vf.stop(),
            #[cfg(feature = "dpdk")]
            Self::Ethdev(vf) => vf.stop(),
        }
    }

    /// Stops and starts it, so that it gives back every frame it took: what was not sent is lost. The caller has all its
    /// queues, paused.
    pub fn restart(&mut self) -> Result<()> {
        match self {
            Self::Soft(_) => Ok(()),
            #[cfg(feature = "dpdk")]
            Self::Ethdev(vf) => vf.restart(),
        }
    }

    /// Whether it lost what its driver had set up, because its PF was reset, which may be ready by now: it neither sends
    /// nor receives, and [`Self::link`] says so. [`Self::restart`] sets it up again if [`Self::revives`]; else it is to be
    /// removed and probed again.
    pub fn was_reset(&self) -> bool {
        match self {
            Self::Soft(_) => false,
            #[cfg(feature = "dpdk")]
            Self::Ethdev(vf) => vf.was_reset(),
        }
    }

    /// Whether its driver sets up all of it when it starts.
    pub fn revives(&self) -> bool {
        match self {
            Self::Soft(_) => true,
            #[cfg(feature = "dpdk")]
            Self::Ethdev(vf) => vf.revives(),
        }
    }

    /// Lets it read pages of its guest's memory, and write them if it receives there. Of a VF with [`Dma::Own`].
    pub fn map(&self, pages: Range<usize>) -> Result<DmaMap> {
        match self {
            #[cfg(feature = "dpdk")]
            Self::Ethdev(vf) => vf.map(pages),
            Self::Soft(_) => Err(crate::error::Error::Invalid(format!("a soft VF reads no memory by DMA: {pages:x?}"))),
        }
    }

    /// Changes the MAC.
    pub fn set_mac(&mut self, mac: Mac) -> Result<()> {
        match self {
            Self::Soft(vf) => vf.set_mac(mac),
            #[cfg(feature = "dpdk")]
            Self::Ethdev(vf) => vf.set_mac(mac),
        }
    }

    /// Points the RSS table at `queues`. `false` where the driver cannot.
    pub fn point_reta(&mut self, queues: &[u16]) -> bool {
        match self {
            Self::Soft(vf) => vf.point_reta(queues),
            #[cfg(feature = "dpdk")]
            Self::Ethdev(vf) => vf.point_reta(queues),
        }
    }

    /// Link state, without waiting.
    pub fn link(&self) -> VfLink {
        match self {
            Self::Soft(vf) => vf.link(),
            #[cfg(feature = "dpdk")]
            Self::Ethdev(vf) => vf.link(),
        }
    }

    /// [`crate::Error::VfAbsent`] if the device, or the kernel's interface that it is on, has gone: it is to be
    /// stopped, removed, and probed again.
    pub fn require_present(&self) -> Result<()> {
        match self {
            Self::Soft(_) => Ok(()),
            #[cfg(feature = "dpdk")]
            Self::Ethdev(vf) => vf.require_present(),
        }
    }

    /// The driver's extended statistics.
    pub fn xstats(&self) -> Vec<(String, u64)> {
        match self {
            Self::Soft(vf) => vf.xstats(),
            #[cfg(feature = "dpdk")]
            Self::Ethdev(vf) => vf.xstats(),
        }
    }

    /// Closes and removes the device; every hugepage of it is returned. Device thread only. If one of its queues
    /// was not dropped, that is an error, and the device stays for the rest of the process.
    pub fn remove(self) -> Result<()> {
        match self {
            Self::Soft(vf) => vf.remove(),
            #[cfg(feature = "dpdk")]
            Self::Ethdev(vf) => vf.remove(),
        }
    }
}
