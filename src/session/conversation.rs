//! Answers vhost-user messages.
//!
//! The rule behind every message: check first, against the session's state and without touching
//! anything; then bring the lanes home, change the state, hand the lanes out. So a refused message
//! has changed nothing, and no lane ever looks at a state that is half of one message.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures as Protocol};

use super::features::{PROTOCOL_FEATURES, RING_PACKED};
use super::message::Message;
use super::wire::{Reply, Request, message_name};
use super::{Lanes, Offer, RingState, SessionState};
use crate::error::{Error, Result};
use crate::ethernet::MIN_MTU;
use crate::guest::{Drained, GuestMemory, RegionSpec};
use crate::ring::RingAddresses;

/// Most regions in a SET_MEM_TABLE of a front end without CONFIGURE_MEM_SLOTS (the protocol's old limit).
const BASELINE_REGIONS: usize = 8;
/// Most regions added one by one: what Linux's own vhost allows.
const MEMORY_SLOTS: usize = 509;
/// Longest split virtqueue (virtio 1.3, 2.7).
const MAX_RING_SIZE: u32 = 32768;
/// VIRTIO_CONFIG_S_FEATURES_OK.
const STATUS_FEATURES_OK: u8 = 8;

/// One front end's session.
///
/// It owns the state and the mapped memory; the lanes belong to the caller. Drop it only through
/// [`Self::suspend`]: mappings that devices or cores may use are given up with a proof.
#[derive(Debug)]
pub struct Session {
    offer: Offer,
    state: SessionState,
    memory: Arc<GuestMemory>,
}

/// What a handled message asks of the connection.
#[derive(Debug)]
pub enum Outcome {
    /// Nothing to send.
    Silent,
    /// Send this.
    Reply(Reply),
    /// The message was refused and has changed nothing; send this, the session goes on.
    Refused(Reply, Error),
}

impl Session {
    /// The session of a new connection.
    pub fn new(offer: Offer) -> Self {
        Self::limited(offer, GuestMemory::DEFAULT_LIMIT)
    }

    /// The session of a new connection, for which at most `memory` bytes of the guest's are mapped.
    pub fn limited(offer: Offer, memory: u64) -> Self {
        Self { offer, state: SessionState::new(offer.rings()), memory: GuestMemory::limited(memory) }
    }

    /// A session from a saved state: maps its memory and starts its rings where they were.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the state does not fit the offer, [`Error::Memory`] if its memory cannot be mapped.
    pub fn resume(offer: Offer, state: SessionState, lanes: &mut impl Lanes) -> Result<Self> {
        let unknown = state.features.unwrap_or(0) & !offer.features;
        let unknown_protocol = state.protocol_features & !offer.protocol_features;
        if state.rings.len() != offer.rings() || unknown != 0 || unknown_protocol != 0 {
            return Err(Error::Invalid(format!(
                "the saved session has {} rings where {} are offered, and features {unknown:#x} and \
                 protocol features {unknown_protocol:#x} that are not offered",
                state.rings.len(),
                offer.rings()
            )));
        }
        let memory = GuestMemory::empty().replaced(state.regions.clone())?;
        let session = Self { offer, state, memory };
        session.hand_out(lanes);
        Ok(session)
    }

    /// Ends the session: every lane is home and without rings, nothing is in flight, the memory is
    /// unmapped. The state is complete: [`Self::resume`] starts from it; dropping it closes its fds.
    pub fn suspend(mut self, lanes: &mut impl Lanes) -> SessionState {
        let proof = self.drain(lanes);
        self.memory.release(&proof);
        self.state
    }

    /// Takes every ring home, drained, for a reason of the port's own (a VF that stops).
    /// [`Self::hand_out`] goes on.
    pub fn drain(&mut self, lanes: &mut impl Lanes) -> Drained {
        lanes.pause();
        lanes.drain(&mut self.state)
    }

    /// Starts what can run.
    pub fn hand_out(&self, lanes: &mut impl Lanes) {
        lanes.resume(&self.state, &self.memory);
    }

    /// What the session knows.
    pub fn state(&self) -> &SessionState {
        &self.state
    }

    /// The guest's memory.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Answers one message. The reply is due only after this returns: what it confirms is in force.
    ///
    /// # Errors
    /// The message was refused (it has changed nothing) and the front end would not learn of it:
    /// the connection is to be closed.
    pub fn handle(&mut self, request: Request, lanes: &mut impl Lanes) -> Result<Outcome> {
        let (code, need_reply) = (request.code, request.need_reply);
        let result = Message::decode(request).and_then(|message| {
            let applied = self.apply(message, lanes);
            applied.map_err(|error| match error {
                Error::Protocol(why) => Error::Protocol(format!("{} {why}", message_name(code))),
                other => other,
            })
        });
        // Looked up after the message: SET_PROTOCOL_FEATURES is acknowledged if it negotiates REPLY_ACK.
        let acknowledge = need_reply && self.negotiated(Protocol::REPLY_ACK);
        match result {
            Ok(Answer::U64(value)) => Ok(Outcome::Reply(Reply::u64(code, value))),
            Ok(Answer::RingState(ring, base)) => Ok(Outcome::Reply(Reply::ring_state(code, ring, base))),
            Ok(Answer::Done) if acknowledge => Ok(Outcome::Reply(Reply::u64(code, 0))),
            Ok(Answer::Done) => Ok(Outcome::Silent),
            // Who waits for a reply of another kind would take an acknowledgement for it.
            Err(error) if acknowledge && !has_own_reply(code) => Ok(Outcome::Refused(Reply::u64(code, 1), error)),
            Err(error) => Err(error),
        }
    }

    fn apply(&mut self, message: Message, lanes: &mut impl Lanes) -> Result<Answer> {
        match message {
            Message::GetFeatures => return Ok(Answer::U64(self.offer.features)),
            Message::SetFeatures(features) => self.set_features(features, lanes)?,
            // Sent once per connection; a second time it changes nothing.
            Message::SetOwner => self.state.owned = true,
            Message::ResetOwner => self.reset_owner(lanes),
            Message::GetProtocolFeatures => {
                return Ok(Answer::U64(self.offer.protocol_features));
            }
            Message::SetProtocolFeatures(features) => {
                let unknown = features & !self.offer.protocol_features;
                if unknown != 0 {
                    return Err(refused(format!("protocol features {unknown:#x} not offered")));
                }
                self.state.protocol_features = features;
            }
            Message::GetQueueNum => return Ok(Answer::U64(self.offer.queue_pairs.into())),
            Message::SetMemTable(regions) => self.set_mem_table(regions, lanes)?,
            Message::GetMaxMemSlots => {
                self.require(Protocol::CONFIGURE_MEM_SLOTS)?;
                return Ok(Answer::U64(MEMORY_SLOTS as u64));
            }
            Message::AddMemReg(region, file) => self.add_mem_reg(region, file, lanes)?,
            Message::RemMemReg(region) => self.rem_mem_reg(&region, lanes)?,
            Message::SetVringNum(ring, size) => self.set_vring_num(ring, size, lanes)?,
            Message::SetVringAddr(ring, flags, addresses) => {
                self.set_vring_addr(ring, flags, addresses, lanes)?;
            }
            Message::SetVringBase(ring, base) => self.set_vring_base(ring, base)?,
            Message::GetVringBase(ring) => return self.get_vring_base(ring, lanes),
            Message::SetVringKick(ring, eventfd) => {
                let index = self.ring(ring)?;
                lanes.pause_ring(index);
                let ring = &mut self.state.rings[index];
                ring.kick = eventfd;
                // We poll, so the first kick need not be awaited: buffers may be there before it.
                ring.started = true;
                self.hand_out(lanes);
            }
            Message::SetVringCall(ring, eventfd) => {
                let index = self.ring(ring)?;
                self.change_ring(index, lanes, |ring| ring.call = eventfd);
            }
            Message::SetVringErr(ring, eventfd) => {
                let index = self.ring(ring)?;
                self.change_ring(index, lanes, |ring| ring.err = eventfd);
            }
            Message::SetVringEnable(ring, on) => {
                // QEMU sends it before SET_FEATURES, while it realizes the device.
                let index = self.ring(ring)?;
                if self.state.rings[index].enabled != on {
                    self.change_ring(index, lanes, |ring| ring.enabled = on);
                }
            }
            Message::NetSetMtu(mtu) => {
                self.require(Protocol::MTU)?;
                let largest = u64::from(self.offer.mtu);
                if !(MIN_MTU.into()..=largest).contains(&mtu) {
                    return Err(refused(format!("MTU {mtu} for the guest; the port's is {largest}")));
                }
            }
            Message::SetStatus(status) => self.set_status(status, lanes)?,
            Message::GetStatus => {
                self.require(Protocol::STATUS)?;
                return Ok(Answer::U64(self.state.status.into()));
            }
            Message::ResetDevice => {
                self.require(Protocol::RESET_DEVICE)?;
                self.reset_device(lanes);
            }
        }
        Ok(Answer::Done)
    }

    fn set_features(&mut self, features: u64, lanes: &mut impl Lanes) -> Result<()> {
        let unknown = features & !self.offer.features;
        if unknown != 0 {
            return Err(refused(format!("virtio features {unknown:#x} not offered")));
        }
        // Without the extension there is no SET_VRING_ENABLE: rings are enabled from the start.
        let enable_all = features & PROTOCOL_FEATURES == 0;
        let all_enabled = self.state.rings.iter().all(|ring| ring.enabled);
        // QEMU repeats it for every queue pair while the first ones run already.
        if self.state.features == Some(features) && (all_enabled || !enable_all) {
            return Ok(());
        }
        self.change(lanes, |state| {
            state.features = Some(features);
            for ring in &mut state.rings {
                ring.enabled |= enable_all;
            }
        });
        Ok(())
    }

    fn set_mem_table(&mut self, mut regions: Vec<(RegionSpec, Arc<File>)>, lanes: &mut impl Lanes) -> Result<()> {
        let count = regions.len();
        if count > BASELINE_REGIONS && !self.negotiated(Protocol::CONFIGURE_MEM_SLOTS) {
            return Err(refused(format!(
                "{count} memory regions; without CONFIGURE_MEM_SLOTS there are at most {BASELINE_REGIONS}"
            )));
        }
        // A region we have keeps its file too, so that the new fd is closed.
        for (spec, file) in &mut regions {
            let ours =
                self.state.regions.iter().find(|(our_spec, our_file)| our_spec == spec && same_file(our_file, file));
            if let Some((_, ours)) = ours {
                *file = ours.clone();
            }
        }
        let memory = self.memory.replaced(regions.clone())?;
        self.switch_memory(memory, regions, lanes);
        Ok(())
    }

    fn add_mem_reg(&mut self, region: RegionSpec, file: Arc<File>, lanes: &mut impl Lanes) -> Result<()> {
        self.require(Protocol::CONFIGURE_MEM_SLOTS)?;
        if self.state.regions.len() >= MEMORY_SLOTS {
            return Err(refused(format!("all {MEMORY_SLOTS} memory slots are in use")));
        }
        let memory = self.memory.with(region, file.clone())?;
        let mut regions = self.state.regions.clone();
        regions.push((region, file));
        self.switch_memory(memory, regions, lanes);
        Ok(())
    }

    fn rem_mem_reg(&mut self, region: &RegionSpec, lanes: &mut impl Lanes) -> Result<()> {
        self.require(Protocol::CONFIGURE_MEM_SLOTS)?;
        let memory = self.memory.without(region)?;
        let mut regions = self.state.regions.clone();
        regions.retain(|(ours, _)| (ours.gpa, ours.user, ours.size) != (region.gpa, region.user, region.size));
        self.switch_memory(memory, regions, lanes);
        Ok(())
    }

    /// Pauses for a table that keeps every region, drains for one that loses some.
    fn switch_memory(
        &mut self,
        memory: Arc<GuestMemory>,
        regions: Vec<(RegionSpec, Arc<File>)>,
        lanes: &mut impl Lanes,
    ) {
        lanes.pause();
        let proof = self.memory.loses_regions_in(&memory).then(|| lanes.drain(&mut self.state));
        let old = std::mem::replace(&mut self.memory, memory);
        self.state.regions = regions;
        match proof {
            Some(proof) => {
                old.release(&proof);
                self.hand_out(lanes);
            }
            // Paused rings hold on to the old table until they get the new one, and what is in flight until it is back.
            None => {
                self.hand_out(lanes);
                drop(old);
            }
        }
    }

    /// The rings are packed ones.
    fn is_packed(&self) -> bool {
        self.state.features.is_some_and(|features| features & RING_PACKED != 0)
    }

    fn set_vring_num(&mut self, ring: u32, size: u32, lanes: &mut impl Lanes) -> Result<()> {
        let index = self.idle_ring(ring, "size")?;
        if !(1..=MAX_RING_SIZE).contains(&size) || !(self.is_packed() || size.is_power_of_two()) {
            return Err(refused(format!(
                "size {size} of ring {ring}; it must be a power of two (of a packed ring any number) up to {MAX_RING_SIZE}"
            )));
        }
        // The ring may have been started before it was complete.
        self.change_ring(index, lanes, |ring| ring.size = size as u16);
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        ring: u32,
        flags: u32,
        addresses: RingAddresses,
        lanes: &mut impl Lanes,
    ) -> Result<()> {
        let index = self.ring(ring)?;
        if flags != 0 {
            return Err(refused(format!("flags {flags:#x} of ring {ring}: dirty logging is not offered")));
        }
        let RingAddresses { desc, avail, used } = addresses;
        // Virtio 1.3, 2.7 and 2.8.
        let avail_align = if self.is_packed() { 4 } else { 2 };
        if desc.0 % 16 != 0 || avail.0 % avail_align != 0 || used.0 % 4 != 0 {
            return Err(refused(format!("misaligned ring {ring}: {addresses:x?}")));
        }
        if self.state.rings[index].addresses == Some(addresses) {
            return Ok(());
        }
        let index = self.idle_ring(ring, "addresses")?;
        self.change_ring(index, lanes, |ring| ring.addresses = Some(addresses));
        Ok(())
    }

    fn set_vring_base(&mut self, ring: u32, base: u32) -> Result<()> {
        let index = self.idle_ring(ring, "base")?;
        let base = if self.is_packed() {
            // Where to go on reading, and in the upper half where to go on writing: the same for us, who
            // retire in order, and front ends disagree about what they send there.
            let base = base as u16;
            let (at, size) = (base & 0x7fff, self.state.rings[index].size);
            if size != 0 && at >= size {
                return Err(refused(format!("base {base:#x} of ring {ring}: descriptor {at} of {size}")));
            }
            base
        } else {
            u16::try_from(base)
                .map_err(|_| refused(format!("base {base:#x} of ring {ring}; a split ring's has 16 bits")))?
        };
        self.state.rings[index].base = base;
        Ok(())
    }

    /// Stops a ring; legal at any time, before there is memory too.
    fn get_vring_base(&mut self, ring: u32, lanes: &mut impl Lanes) -> Result<Answer> {
        let index = self.ring(ring)?;
        if self.state.rings[index].started {
            lanes.pause_ring(index);
            let position = lanes.stop_ring(index);
            stop(&mut self.state.rings[index], position);
            self.hand_out(lanes);
        }
        let base = u32::from(self.state.rings[index].base);
        Ok(Answer::RingState(ring, if self.is_packed() { base | base << 16 } else { base }))
    }

    fn set_status(&mut self, status: u64, lanes: &mut impl Lanes) -> Result<()> {
        self.require(Protocol::STATUS)?;
        let Ok(mut status) = u8::try_from(status) else {
            return Err(refused(format!("device status {status:#x}; it has 8 bits")));
        };
        // Virtio 1.3, 3.1.1: the driver reads it back to see whether its features were taken.
        if self.state.features.is_none() {
            status &= !STATUS_FEATURES_OK;
        }
        // 0 resets the device (virtio 1.3, 2.1): its rings must not be touched any more.
        if status == 0 {
            self.stop_all(lanes, |_| ());
        }
        self.state.status = status;
        Ok(())
    }

    /// Deprecated; the specification leaves it to "ignore" or "disable all rings". Front ends that
    /// still send it set everything up anew without GET_VRING_BASE, so the rings are stopped as well.
    fn reset_owner(&mut self, lanes: &mut impl Lanes) {
        self.stop_all(lanes, |state| {
            for ring in &mut state.rings {
                ring.enabled = false;
            }
            state.owned = false;
        });
    }

    /// The device as a driver first sees it. What belongs to the connection stays: the memory table
    /// (QEMU sends only differences), protocol features, and call and err eventfds, which QEMU
    /// sends when it connects.
    fn reset_device(&mut self, lanes: &mut impl Lanes) {
        self.stop_all(lanes, |state| {
            for ring in &mut state.rings {
                *ring = RingState { call: ring.call.take(), err: ring.err.take(), ..RingState::default() };
            }
            state.features = None;
            state.status = 0;
        });
    }

    /// Stops every started ring, then makes the further change.
    fn stop_all(&mut self, lanes: &mut impl Lanes, change: impl FnOnce(&mut SessionState)) {
        if self.state.rings.iter().any(|ring| ring.started) {
            // Nothing is unmapped, so the proof is not needed.
            let _drained = self.drain(lanes);
            for ring in &mut self.state.rings {
                stop(ring, None);
            }
            change(&mut self.state);
            self.hand_out(lanes);
        } else {
            change(&mut self.state);
        }
    }

    /// Changes something that lanes look at.
    fn change(&mut self, lanes: &mut impl Lanes, change: impl FnOnce(&mut SessionState)) {
        if self.state.rings.iter().any(|ring| ring.started) {
            lanes.pause();
            change(&mut self.state);
            self.hand_out(lanes);
        } else {
            change(&mut self.state);
        }
    }

    /// Changes something of one ring that its lane looks at, once it is started.
    fn change_ring(&mut self, index: usize, lanes: &mut impl Lanes, change: impl FnOnce(&mut RingState)) {
        if self.state.rings[index].started {
            lanes.pause_ring(index);
            change(&mut self.state.rings[index]);
            self.hand_out(lanes);
        } else {
            change(&mut self.state.rings[index]);
        }
    }

    /// Holds a ring index against the queue count, before it is narrowed.
    fn ring(&self, ring: u32) -> Result<usize> {
        let rings = self.state.rings.len();
        match usize::try_from(ring) {
            Ok(index) if index < rings => Ok(index),
            _ => Err(refused(format!("ring {ring}; there are {rings}"))),
        }
    }

    /// A ring whose `what` may be changed because nothing is reading it.
    fn idle_ring(&self, ring: u32, what: &str) -> Result<usize> {
        let index = self.ring(ring)?;
        if self.state.runs(index) {
            return Err(refused(format!("new {what} of ring {ring} while it runs; GET_VRING_BASE stops it")));
        }
        Ok(index)
    }

    fn negotiated(&self, feature: Protocol) -> bool {
        Protocol::from_bits_retain(self.state.protocol_features).contains(feature)
    }

    fn require(&self, feature: Protocol) -> Result<()> {
        if self.negotiated(feature) {
            Ok(())
        } else {
            Err(refused(format!("a message of {feature:?}, not negotiated")))
        }
    }
}

/// What a message is answered with, besides an acknowledgement.
enum Answer {
    Done,
    U64(u64),
    /// Ring index and position.
    RingState(u32, u32),
}

fn refused(what: String) -> Error {
    Error::Protocol(format!("refused: {what}"))
}

/// Whether the front end waits for a reply of the message's own kind.
fn has_own_reply(code: u32) -> bool {
    matches!(
        FrontendReq::try_from(code),
        Ok(FrontendReq::GET_FEATURES
            | FrontendReq::GET_PROTOCOL_FEATURES
            | FrontendReq::GET_QUEUE_NUM
            | FrontendReq::GET_MAX_MEM_SLOTS
            | FrontendReq::GET_VRING_BASE
            | FrontendReq::GET_STATUS)
    )
}

/// `position` is where the lane left it, if it ran. The call and err eventfds stay: they may be signalled
/// at any time, and QEMU sends them again only when they change.
fn stop(ring: &mut RingState, position: Option<u16>) {
    ring.started = false;
    ring.kick = None;
    ring.base = position.unwrap_or(ring.base);
}

fn same_file(a: &File, b: &File) -> bool {
    match (a.metadata(), b.metadata()) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}
