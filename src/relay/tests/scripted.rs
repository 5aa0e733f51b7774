//! VF queues that do what a test tells them.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard};

use arrayvec::ArrayVec;

use crate::guest::{GuestMemory, HostRange};
use crate::ring::{BURST, Gather};
use crate::vf::{Lendable, RxPacket, RxQueue, TxOffload, TxPacket, TxQueue};

/// What a transmit queue does, and what it did.
#[derive(Debug)]
pub struct Script {
    /// Frames that each next `send` takes; then it takes all.
    pub takes: VecDeque<usize>,
    /// Of the next `send`: places of frames that tx_prepare refuses.
    pub refuses: u32,
    /// Buffers in the pool.
    pub pool: usize,
    /// What went out.
    pub sent: Vec<Vec<u8>>,
    /// Frames from this length on are sent from where they lie.
    pub lends_from: usize,
    /// Those of which offloads are asked, too, behind a copy of their heads.
    pub takes_heads: bool,
    /// Offloads that were asked.
    pub offloads: Vec<TxOffload>,
    /// Lent frames are not returned until told.
    pub keeps: bool,
    /// Then how often the lane asks before they are.
    pub asks: Option<usize>,
    /// Lent and not returned, as they were when they were sent.
    pub out: VecDeque<(Lent, Vec<u8>)>,
    lent: u32,
    returned: u32,
}

impl Script {
    /// Returns the `n` oldest. They are as they were sent: the guest did not get them back before.
    pub fn give_back(&mut self, n: usize) {
        for ((frame, memory), sent) in self.out.drain(..n) {
            assert_eq!(frame.contents(&memory), sent[sent.len() - frame.len()..]);
            self.returned = self.returned.wrapping_add(1);
        }
    }
}

/// A frame where it lies.
type Lent = (HostRange, Arc<GuestMemory>);

/// A transmit queue.
#[derive(Clone, Debug)]
pub struct ScriptedTx(Arc<Mutex<Script>>);

impl ScriptedTx {
    pub fn new() -> Self {
        let script = Script {
            takes: VecDeque::new(),
            refuses: 0,
            pool: 1000,
            sent: Vec::new(),
            lends_from: usize::MAX,
            takes_heads: false,
            offloads: Vec::new(),
            keeps: false,
            asks: None,
            out: VecDeque::new(),
            // About to wrap.
            lent: u32::MAX - 100,
            returned: u32::MAX - 100,
        };
        Self(Arc::new(Mutex::new(script)))
    }

    pub fn script(&self) -> MutexGuard<'_, Script> {
        self.0.lock().unwrap()
    }
}

/// A frame, in a buffer of its queue's pool.
#[derive(Debug)]
pub struct Packet {
    bytes: Vec<u8>,
    lent: Option<Lent>,
    home: Option<ScriptedTx>,
}

impl Drop for Packet {
    fn drop(&mut self) {
        if let Some(home) = &self.home {
            home.script().pool += 1;
        }
    }
}

impl TxPacket for Packet {
    fn len(&self) -> usize {
        self.bytes.len()
    }

    fn head(&self) -> &[u8] {
        &self.bytes
    }

    fn head_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    fn set_offload(&mut self, offload: &TxOffload) {
        self.home.as_ref().expect("a frame that is sent").script().offloads.push(*offload);
    }
}

impl TxQueue for ScriptedTx {
    type Packet = Packet;

    fn copy(&mut self, source: &mut impl Gather) -> Option<Packet> {
        let mut script = self.script();
        script.pool = script.pool.checked_sub(1)?;
        drop(script);
        let mut bytes = vec![0; source.remaining()];
        source.copy_next(&mut bytes);
        Some(Packet { bytes, lent: None, home: Some(self.clone()) })
    }

    fn lends_from(&self) -> usize {
        self.script().lends_from
    }

    fn lend(&mut self, frame: HostRange, memory: &Arc<Lendable>) -> Option<Packet> {
        let mut script = self.script();
        script.pool = script.pool.checked_sub(1)?;
        drop(script);
        Some(Packet { bytes: Vec::new(), lent: Some((frame, memory.memory().clone())), home: Some(self.clone()) })
    }

    fn takes_heads(&self) -> bool {
        self.script().takes_heads
    }

    fn lend_behind(&mut self, head: &[u8], rest: HostRange, memory: &Arc<Lendable>) -> Option<Packet> {
        let mut packet = self.lend(rest, memory)?;
        packet.bytes = head.to_vec();
        Some(packet)
    }

    fn lent(&self) -> u32 {
        self.script().lent
    }

    fn returned(&mut self) -> u32 {
        let mut script = self.script();
        let asked = script.asks.as_mut().is_some_and(|left| {
            *left = left.saturating_sub(1);
            *left == 0
        });
        if !script.keeps || asked {
            let all = script.out.len();
            script.give_back(all);
        }
        script.returned
    }

    fn send(&mut self, burst: &mut ArrayVec<Packet, BURST>, refused: &mut u32) -> usize {
        let n = self.script().takes.pop_front().unwrap_or(BURST).min(burst.len());
        let mask = if n == 0 { 0 } else { std::mem::take(&mut self.script().refuses) };
        for (place, mut packet) in burst.drain(..n).enumerate() {
            if mask >> place & 1 == 0 {
                let mut script = self.script();
                let lent = packet.lent.take();
                let mut bytes = packet.bytes.clone();
                bytes.extend(lent.iter().flat_map(|(frame, memory)| frame.contents(memory)));
                if let Some(lent) = lent {
                    script.out.push_back((lent, bytes.clone()));
                    script.lent = script.lent.wrapping_add(1);
                }
                script.sent.push(bytes);
            } else {
                *refused |= 1 << place;
            }
        }
        n
    }
}

/// A receive queue, and what the test puts into it.
#[derive(Clone, Debug, Default)]
pub struct ScriptedRx(Arc<Mutex<VecDeque<Vec<u8>>>>);

impl ScriptedRx {
    pub fn arrive(&self, frame: Vec<u8>) {
        self.0.lock().unwrap().push_back(frame);
    }

    pub fn waiting(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

/// What a receive queue that takes buffers early has, and what the test does with it.
#[derive(Debug)]
pub struct Device {
    /// Its buffers, in the order of the frames to come.
    ring: VecDeque<Slot>,
    posted: VecDeque<(HostRange, Arc<Lendable>)>,
    /// See [`RxQueue::withdraw`].
    placed: usize,
    /// Arrived and not received.
    pub frames: VecDeque<Vec<u8>>,
}

#[derive(Debug)]
enum Slot {
    Own,
    Guest(HostRange, Arc<Lendable>),
}

impl Device {
    fn of_guest(&self) -> usize {
        self.ring.iter().filter(|slot| matches!(slot, Slot::Guest(..))).count()
    }
}

/// Such a queue.
#[derive(Clone, Debug)]
pub struct EarlyRx(Arc<Mutex<Device>>);

impl EarlyRx {
    /// Most bytes that its device writes to a buffer.
    pub const MOST: usize = 1600;

    pub fn new(descriptors: usize) -> Self {
        let ring = (0..descriptors).map(|_| Slot::Own).collect();
        Self(Arc::new(Mutex::new(Device { ring, posted: VecDeque::new(), placed: 0, frames: VecDeque::new() })))
    }

    pub fn device(&self) -> MutexGuard<'_, Device> {
        self.0.lock().unwrap()
    }

    /// Buffers of the guest that the device has.
    pub fn of_guest(&self) -> usize {
        self.device().of_guest()
    }

    /// Stops and starts the device, which wrote to all it had just before. How many frames are lost.
    pub fn restart(&self) -> usize {
        let mut device = self.device();
        assert!(device.posted.is_empty(), "it would begin with those");
        for slot in &mut device.ring {
            if let Slot::Guest(buffer, memory) = std::mem::replace(slot, Slot::Own) {
                buffer.overwrite(memory.memory(), &[0xa5; Self::MOST]);
            }
        }
        std::mem::take(&mut device.frames).len()
    }
}

/// A frame received by it.
#[derive(Debug)]
pub struct EarlyPacket {
    bytes: Vec<u8>,
    at: Option<usize>,
}

impl RxPacket for EarlyPacket {
    fn len(&self) -> usize {
        self.bytes.len()
    }

    fn head(&self) -> &[u8] {
        if self.at.is_some() { &[] } else { &self.bytes }
    }

    fn gather(&self) -> impl Gather + '_ {
        assert!(self.at.is_none(), "it is in the guest's memory");
        &self.bytes[..]
    }

    fn checksum_good(&self) -> bool {
        false
    }

    fn placed_at(&self) -> Option<usize> {
        self.at
    }
}

impl RxQueue for EarlyRx {
    type Packet = EarlyPacket;

    fn receive(&mut self, burst: &mut ArrayVec<EarlyPacket, BURST>) -> usize {
        let mut device = self.device();
        let n = device.frames.len().min(burst.remaining_capacity());
        for _ in 0..n {
            let bytes = device.frames.pop_front().unwrap();
            assert!(bytes.len() <= Self::MOST);
            let next = device.posted.pop_front().map_or(Slot::Own, |(buffer, memory)| Slot::Guest(buffer, memory));
            device.ring.push_back(next);
            let at = match device.ring.pop_front().unwrap() {
                Slot::Own => None,
                Slot::Guest(buffer, memory) => {
                    buffer.overwrite(memory.memory(), &bytes);
                    Some(buffer.as_ptr().addr())
                }
            };
            device.placed = device.placed.saturating_sub(1);
            burst.push(EarlyPacket { bytes, at });
        }
        n
    }

    fn takes_buffers(&self) -> Option<usize> {
        Some(Self::MOST)
    }

    fn takes_early(&self) -> bool {
        true
    }

    fn ahead(&self) -> usize {
        let device = self.device();
        device.ring.len() + device.posted.len() - device.placed
    }

    fn waiting(&self) -> usize {
        self.device().posted.len()
    }

    fn post(&mut self, buffer: HostRange, header: usize, memory: &Arc<Lendable>) -> bool {
        assert!(buffer.len() >= header + Self::MOST && memory.covers(&buffer));
        let mut device = self.device();
        device.posted.push_back((buffer.after(header), Arc::clone(memory)));
        device.placed = device.ring.len() + device.posted.len();
        true
    }

    fn withdraw(&mut self) -> usize {
        let mut device = self.device();
        let back = std::mem::take(&mut device.posted).len();
        device.placed = if device.of_guest() > 0 { device.placed - back } else { 0 };
        device.placed
    }

    fn interrupt_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn arm(&mut self) {}

    fn disarm(&mut self) {}
}

impl RxPacket for Packet {
    fn len(&self) -> usize {
        self.bytes.len()
    }

    fn head(&self) -> &[u8] {
        &self.bytes
    }

    fn gather(&self) -> impl Gather + '_ {
        &self.bytes[..]
    }

    fn checksum_good(&self) -> bool {
        false
    }
}

impl RxQueue for ScriptedRx {
    type Packet = Packet;

    fn receive(&mut self, burst: &mut ArrayVec<Packet, BURST>) -> usize {
        let mut frames = self.0.lock().unwrap();
        let n = frames.len().min(burst.remaining_capacity());
        burst.extend(frames.drain(..n).map(|bytes| Packet { bytes, lent: None, home: None }));
        n
    }

    fn interrupt_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn arm(&mut self) {}

    fn disarm(&mut self) {}
}
