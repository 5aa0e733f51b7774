//! VFs in plain Rust: `soft:null` and `soft:loop`, for tests, benches and builds without DPDK.

use std::mem;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst, fence};

use arrayvec::ArrayVec;
use crossbeam::queue::ArrayQueue;

use super::lease::{Lease, Leases};
use super::{Mac, Queues, RxPacket, RxQueue, TxOffload, TxPacket, TxQueue, VfCaps, VfConfig, VfLink, VfSpec};
use crate::error::{Error, Result};
use crate::ethernet::{MAX_MTU, MAX_TSO_FRAME, MIN_MTU, TAGGED_HEADER};
use crate::event::Event;
use crate::ring::{BURST, Gather};

/// Queue pairs of a soft VF.
const QUEUES: u16 = 32;

/// Frames a looping queue holds, as many as an ethdev's ring has descriptors.
const DEPTH: usize = 512;

/// Where the frames go that a soft VF takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Far {
    /// Nowhere.
    Null,
    /// To the receive queue of the same number.
    Loop,
    /// To a test, which looks at what a VF with offloads was given.
    #[cfg(test)]
    Test,
}

/// A soft VF.
#[derive(Debug)]
pub struct SoftVf {
    far: Far,
    caps: VfCaps,
    mac: Mac,
    started: bool,
    wires: Vec<Arc<Wire>>,
    leases: Leases,
    /// What a test's RSS table was pointed at.
    #[cfg(test)]
    tables: Vec<Vec<u16>>,
}

/// What the two queues of one number share.
#[derive(Debug)]
struct Wire {
    /// Buffers nobody uses.
    free: ArrayQueue<Box<[u8]>>,
    far: Far,
    /// Frames sent and not yet received; not of `soft:null`.
    frames: Option<ArrayQueue<SoftPacket>>,
    /// The interrupt of the receive queue, and whether it wants one; of `soft:loop`.
    interrupt: Option<Event>,
    armed: AtomicBool,
    /// Written by the transmit queue only.
    packets: AtomicU64,
    bytes: AtomicU64,
}

impl Wire {
    fn new(far: Far, longest: usize) -> Result<Arc<Self>> {
        // Enough for a full loop and a burst in the hands of either lane.
        let buffers = DEPTH + 4 * BURST;
        let free = ArrayQueue::new(buffers);
        for _ in 0..buffers {
            let buffer = vec![0; longest].into_boxed_slice();
            free.push(buffer).expect("made for as many");
        }
        let interrupt = match far {
            Far::Loop => Some(Event::new("a soft VF")?),
            _ => None,
        };
        Ok(Arc::new(Self {
            free,
            far,
            frames: (far != Far::Null).then(|| ArrayQueue::new(DEPTH)),
            interrupt,
            armed: AtomicBool::new(false),
            packets: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        }))
    }

    /// Frames were queued: wakes a receiver that sleeps, or is about to. It says so, then looks at the queue;
    /// we queue, then look whether it said so.
    fn interrupt(&self) {
        fence(SeqCst);
        if let Some(interrupt) = &self.interrupt
            && self.armed.load(Relaxed)
            && self.armed.swap(false, Relaxed)
        {
            interrupt.signal();
        }
    }
}

impl SoftVf {
    pub(super) fn probe(spec: &VfSpec) -> Result<Self> {
        let far = match spec {
            VfSpec::SoftNull => Far::Null,
            VfSpec::SoftLoop => Far::Loop,
            other => return Err(Error::Invalid(format!("{other} is not a soft VF"))),
        };
        Ok(Self {
            far,
            caps: VfCaps {
                driver: spec.to_string(),
                max_queues: QUEUES,
                max_mtu: MAX_MTU,
                copies: Some(format!("{spec} is not known to be done with sent frames in time and in order").into()),
                copies_received: Some(format!("{spec} has buffers of its own").into()),
                ..VfCaps::default()
            },
            // Locally administered; nothing filters by it.
            mac: Mac([0x02, 0, 0, 0, 0, 1]),
            started: false,
            wires: Vec::new(),
            leases: Leases::default(),
            #[cfg(test)]
            tables: Vec::new(),
        })
    }

    pub(super) fn caps(&self) -> &VfCaps {
        &self.caps
    }

    pub(super) fn configure(&mut self, config: &VfConfig) -> Result<Queues> {
        if !self.wires.is_empty() {
            return Err(Error::Invalid("the soft VF is configured already".into()));
        }
        if config.queues == 0 || !(MIN_MTU..=MAX_MTU).contains(&config.mtu) {
            return Err(Error::Invalid(format!(
                "{} queue pairs with MTU {}: a soft VF takes 1 to {QUEUES} pairs and an MTU of {MIN_MTU} to {MAX_MTU}",
                config.queues, config.mtu
            )));
        }
        self.mac = config.mac.unwrap_or(self.mac);
        let longest = if self.caps.tso { MAX_TSO_FRAME } else { usize::from(config.mtu) + TAGGED_HEADER };
        self.wires = (0..config.queues.min(QUEUES)).map(|_| Wire::new(self.far, longest)).collect::<Result<_>>()?;
        let tx = self.wires.iter().map(|wire| SoftTx(Arc::clone(wire), self.leases.lease()));
        let rx = self.wires.iter().map(|wire| SoftRx(Arc::clone(wire), self.leases.lease()));
        Ok(Queues::Soft(tx.collect(), rx.collect()))
    }

    pub(super) fn start(&mut self) -> Result<()> {
        if self.wires.is_empty() {
            return Err(Error::Invalid("the soft VF is not configured".into()));
        }
        self.started = true;
        Ok(())
    }

    /// Frames on their way are dropped.
    pub(super) fn stop(&mut self) -> Result<()> {
        self.leases.require_none(&self.caps.driver)?;
        self.started = false;
        for frames in self.wires.iter().filter_map(|wire| wire.frames.as_ref()) {
            while frames.pop().is_some() {}
        }
        Ok(())
    }

    pub(super) fn set_mac(&mut self, mac: Mac) -> Result<()> {
        self.mac = mac;
        Ok(())
    }

    /// Queue *i* loops to queue *i*: there is no table to point.
    pub(super) fn point_reta(&mut self, _queues: &[u16]) -> bool {
        #[cfg(test)]
        if self.far == Far::Test {
            self.tables.push(_queues.to_vec());
            return true;
        }
        false
    }

    pub(super) fn link(&self) -> VfLink {
        VfLink { up: self.started, speed: 0, mac: Some(self.mac) }
    }

    pub(super) fn xstats(&self) -> Vec<(String, u64)> {
        self.wires
            .iter()
            .enumerate()
            .flat_map(|(queue, wire)| {
                [("packets", &wire.packets), ("bytes", &wire.bytes)]
                    .map(|(what, cell)| (format!("tx_q{queue}_{what}"), cell.load(Relaxed)))
            })
            .collect()
    }

    pub(super) fn remove(mut self) -> Result<()> {
        self.stop()
    }

    /// A VF with these abilities, whose frames a test takes.
    #[cfg(test)]
    pub(crate) fn for_test(caps: VfCaps) -> Result<Self> {
        let caps = VfCaps { driver: "test".into(), max_queues: QUEUES, max_mtu: MAX_MTU, ..caps };
        Ok(Self { far: Far::Test, caps, ..Self::probe(&VfSpec::SoftNull)? })
    }

    /// What the RSS table of a VF for tests was pointed at since the last time.
    #[cfg(test)]
    pub(crate) fn take_tables(&mut self) -> Vec<Vec<u16>> {
        mem::take(&mut self.tables)
    }

    /// What a VF for tests was given since the last time, and what it is to do with it.
    #[cfg(test)]
    pub(crate) fn take_sent(&mut self) -> Vec<(Vec<u8>, TxOffload)> {
        let frames = self.wires.iter().filter_map(|wire| wire.frames.as_ref());
        frames
            .flat_map(|frames| std::iter::from_fn(|| frames.pop()))
            .map(|packet| (packet.buffer[..packet.len].to_vec(), packet.offload))
            .collect()
    }
}

/// Its transmit queue.
#[derive(Debug)]
pub struct SoftTx(Arc<Wire>, #[allow(dead_code)] Lease);

/// Its receive queue. Of `soft:loop`: queue *i* receives what was sent on queue *i*.
#[derive(Debug)]
pub struct SoftRx(Arc<Wire>, #[allow(dead_code)] Lease);

/// A frame in a buffer of ours; buffers are pooled, no allocation after configure.
#[derive(Debug)]
pub struct SoftPacket {
    buffer: Box<[u8]>,
    len: usize,
    offload: TxOffload,
    home: Arc<Wire>,
}

impl Drop for SoftPacket {
    fn drop(&mut self) {
        // An empty box is no allocation; and the queue has a place for each of its buffers.
        let _ = self.home.free.push(mem::take(&mut self.buffer));
    }
}

impl TxPacket for SoftPacket {
    fn len(&self) -> usize {
        self.len
    }

    fn head(&self) -> &[u8] {
        &self.buffer[..self.len]
    }

    fn head_mut(&mut self) -> &mut [u8] {
        &mut self.buffer[..self.len]
    }

    fn set_offload(&mut self, offload: &TxOffload) {
        debug_assert!(!matches!(self.home.far, Far::Null | Far::Loop), "a soft VF has no offloads: {offload:?}");
        self.offload = *offload;
    }
}

impl RxPacket for SoftPacket {
    fn len(&self) -> usize {
        self.len
    }

    fn head(&self) -> &[u8] {
        &self.buffer[..self.len]
    }

    fn gather(&self) -> impl Gather + '_ {
        RxPacket::head(self)
    }

    fn checksum_good(&self) -> bool {
        false
    }
}

impl TxQueue for SoftTx {
    type Packet = SoftPacket;

    fn copy(&mut self, source: &mut impl Gather) -> Option<SoftPacket> {
        let len = source.remaining();
        let buffer = self.0.free.pop()?;
        // Owned before the length is checked, so that the buffer goes home in any case.
        let mut packet = SoftPacket { buffer, len, offload: TxOffload::default(), home: Arc::clone(&self.0) };
        source.copy_next(packet.buffer.get_mut(..len)?);
        Some(packet)
    }

    fn send(&mut self, burst: &mut ArrayVec<SoftPacket, BURST>, _refused: &mut u32) -> usize {
        let mut bytes = 0;
        let taken = match &self.0.frames {
            // Only this queue pushes, so what is free now stays free.
            Some(frames) => {
                let n = burst.len().min(frames.capacity() - frames.len());
                for packet in burst.drain(..n) {
                    bytes += packet.len as u64;
                    frames.push(packet).expect("room was counted");
                }
                self.0.interrupt();
                n
            }
            None => {
                bytes = burst.iter().map(|packet| packet.len as u64).sum();
                burst.drain(..).len()
            }
        };
        let add = |cell: &AtomicU64, n| cell.store(cell.load(Relaxed).wrapping_add(n), Relaxed);
        add(&self.0.packets, taken as u64);
        add(&self.0.bytes, bytes);
        taken
    }
}

impl RxQueue for SoftRx {
    type Packet = SoftPacket;

    fn receive(&mut self, burst: &mut ArrayVec<SoftPacket, BURST>) -> usize {
        let before = burst.len();
        if let (Far::Loop, Some(frames)) = (self.0.far, &self.0.frames) {
            while !burst.is_full()
                && let Some(packet) = frames.pop()
            {
                burst.push(packet);
            }
        }
        burst.len() - before
    }

    fn interrupt_fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.interrupt.as_ref().map(AsFd::as_fd)
    }

    fn is_silent(&self) -> bool {
        self.0.far != Far::Loop
    }

    fn arm(&mut self) {
        self.0.armed.store(true, Relaxed);
        fence(SeqCst);
    }

    fn disarm(&mut self) {
        self.0.armed.store(false, Relaxed);
        if let Some(interrupt) = &self.0.interrupt {
            interrupt.take();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vf(spec: VfSpec, queues: u16, mtu: u16) -> (SoftVf, Vec<SoftTx>, Vec<SoftRx>) {
        let mut vf = SoftVf::probe(&spec).unwrap();
        let config = VfConfig { queues, mtu, mac: None };
        let queues = vf.configure(&config).unwrap();
        vf.start().unwrap();
        match queues {
            Queues::Soft(tx, rx) => (vf, tx, rx),
            #[cfg(feature = "dpdk")]
            Queues::Ethdev(..) => panic!("soft queues"),
        }
    }

    fn frame(len: usize, seed: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 31 + seed) as u8).collect()
    }

    fn send(tx: &mut SoftTx, bytes: &[u8]) -> usize {
        let mut burst = ArrayVec::new();
        burst.push(tx.copy(&mut &*bytes).unwrap());
        tx.send(&mut burst, &mut 0)
    }

    #[test]
    fn a_loop_returns_each_queue_its_own_frames_in_order() {
        let (_vf, mut tx, mut rx) = vf(VfSpec::SoftLoop, 40, 9000);
        assert_eq!((tx.len(), rx.len()), (32, 32));
        for (queue, tx) in tx.iter_mut().enumerate() {
            assert_eq!(send(tx, &frame(60, queue)), 1);
            assert_eq!(send(tx, &frame(9014, queue)), 1);
        }
        for (queue, rx) in rx.iter_mut().enumerate() {
            let mut burst = ArrayVec::new();
            assert_eq!(rx.receive(&mut burst), 2);
            assert_eq!(RxPacket::head(&burst[0]), frame(60, queue));
            let mut bytes = vec![0; 9014];
            let mut gather = burst[1].gather();
            assert_eq!(gather.remaining(), 9014);
            gather.copy_next(&mut bytes);
            assert_eq!(bytes, frame(9014, queue));
        }
    }

    #[test]
    fn a_full_loop_takes_a_prefix_and_stop_gives_every_buffer_back() {
        let (mut vf, mut tx, mut rx) = vf(VfSpec::SoftLoop, 1, 1500);
        let mut sent = 0;
        let left = loop {
            let mut burst: ArrayVec<_, BURST> =
                (0..20).map(|i| tx[0].copy(&mut &*frame(64, sent + i)).unwrap()).collect();
            let n = tx[0].send(&mut burst, &mut 0);
            sent += n;
            if n < 20 {
                assert_eq!(burst.len(), 20 - n);
                break burst;
            }
        };
        assert_eq!(sent, DEPTH);
        // What was not taken is the rest, still in order.
        assert_eq!(TxPacket::head(&left[0]), frame(64, DEPTH));
        drop(left);

        let mut burst = ArrayVec::new();
        assert_eq!(rx[0].receive(&mut burst), BURST);
        assert_eq!(RxPacket::head(&burst[31]), frame(64, 31));
        drop(burst);
        assert!(vf.stop().unwrap_err().to_string().contains("2 of its queues"));
        assert!(vf.link().up);
        drop((tx, rx));
        vf.stop().unwrap();
        let wire = &vf.wires[0];
        assert_eq!(wire.free.len(), wire.free.capacity());
    }

    #[test]
    fn null_counts_what_it_discards() {
        let (vf, mut tx, mut rx) = vf(VfSpec::SoftNull, 2, 1500);
        for _ in 0..3 * DEPTH {
            assert_eq!(send(&mut tx[1], &frame(100, 0)), 1);
        }
        assert_eq!(rx[1].receive(&mut ArrayVec::new()), 0);
        let stats = vf.xstats();
        assert!(stats.contains(&("tx_q1_packets".into(), 3 * DEPTH as u64)));
        assert!(stats.contains(&("tx_q1_bytes".into(), 300 * DEPTH as u64)));
        assert!(stats.contains(&("tx_q0_packets".into(), 0)));
    }

    #[test]
    fn a_frame_beyond_the_mtu_and_a_dry_pool_are_no_frames() {
        let (_vf, mut tx, _rx) = vf(VfSpec::SoftNull, 1, 1500);
        assert!(tx[0].copy(&mut &*frame(1522, 0)).is_some());
        assert!(tx[0].copy(&mut &*frame(1523, 0)).is_none());
        let held: Vec<_> = std::iter::from_fn(|| tx[0].copy(&mut &*frame(60, 0))).collect();
        assert_eq!(held.len(), DEPTH + 4 * BURST);
        drop(held);
        assert!(tx[0].copy(&mut &*frame(60, 0)).is_some());
    }

    #[test]
    fn what_it_cannot_be_is_refused() {
        for (queues, mtu) in [(0, 1500), (1, 67), (1, 9217)] {
            let mut vf = SoftVf::probe(&VfSpec::SoftLoop).unwrap();
            let mac = None;
            let wrong = vf.configure(&VfConfig { queues, mtu, mac });
            assert!(matches!(wrong, Err(Error::Invalid(_))));
            assert!(matches!(vf.start(), Err(Error::Invalid(_))));
        }
    }
}
