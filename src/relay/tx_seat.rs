//! A guest's TX ring in its lane, and the burst it is in the middle of.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;

use super::checksum;
use super::counters::{Cause, LaneCounters};
use super::doorbell::{Blocked, Doorbell};
use super::lane::{RingPlan, Turn};
use super::offload::{self, Treatment, TxRules};
use super::owed::{Lent, Owed};
use super::segment::Segmenter;
use crate::error::Result;
use crate::ring::{BURST, ChainFault, Gather, Gso, NetHeader, PlainFrame, RingFault, TxRing};
use crate::vf::{Lendable, TxPacket, TxQueue};

/// A ring in the lane, and the burst it is in the middle of.
#[derive(Debug)]
pub(super) struct TxSeat<P> {
    pub(super) ring: TxRing,
    pub(super) doorbell: Doorbell,
    enabled: bool,
    rules: TxRules,
    /// Frames in it may be sent from where they lie.
    lendable: Option<Arc<Lendable>>,
    /// Packets not yet taken by the VF.
    pub(super) staged: ArrayVec<P, BURST>,
    /// What taking each of them finishes.
    ends: ArrayVec<End, BURST>,
    /// Bytes of the frames that end with them; and whether one of them finishes anything but one frame.
    bytes: u64,
    odd: bool,
    /// Chains of this burst, and the next of them to stage.
    popped: usize,
    next: usize,
    /// Segments in software; loaded while the chain `next` is being cut.
    cutter: Segmenter,
    cutting: bool,
    /// The VF refused a part of the frame whose rest is staged.
    spoiled: bool,
    blocked_since: Option<Instant>,
    /// Chains that the VF took and is not known to be done with.
    owed: Owed,
}

/// How long a VF may refuse frames, with its link up, before they are dropped as `vf_full`.
const VF_FULL: Duration = Duration::from_millis(10);

/// Copying so many bytes counts as another packet of a turn. It takes about as long; and 256 frames of 1518 bytes would
/// make other ports wait for some 60 µs, frames of 64 KiB for much longer.
const COPY_UNIT: usize = 1024;

/// Bytes of a frame that are copied in front of what stays where it lies: what [`offload::judge`] looks at. An even
/// number: a VF's driver may sum the two one after the other.
const HEAD: usize = 256;

/// The longest TCP header.
const LONGEST_TCP: usize = 60;

/// What the acceptance of a staged packet finishes.
#[derive(Clone, Copy, Debug, Default)]
struct End {
    /// Bytes of the guest's frame that ends with this packet; 0 if it goes on.
    frame: u32,
    /// Dropped chains behind it. They are counted when they are completed: if the ring is taken out
    /// before, they come again.
    malformed: u8,
    oversize: u8,
}

impl End {
    /// Chains that can be completed: its own if it ends, and the dropped ones.
    fn chains(self) -> usize {
        usize::from(self.frame != 0) + usize::from(self.malformed) + usize::from(self.oversize)
    }
}

impl<P: TxPacket> TxSeat<P> {
    pub(super) fn new(plan: RingPlan) -> Result<Self> {
        let cutter = if plan.rules.tso4 || plan.rules.tso6 {
            Segmenter::with_capacity(plan.config.max_frame, plan.rules.max_wire_frame)
        } else {
            Segmenter::with_capacity(0, 0)
        };
        Ok(Self {
            ring: TxRing::new(plan.memory, &plan.config)?,
            doorbell: plan.doorbell,
            enabled: plan.enabled,
            rules: plan.rules,
            lendable: plan.lendable,
            staged: ArrayVec::new(),
            ends: ArrayVec::new(),
            bytes: 0,
            odd: false,
            popped: 0,
            next: 0,
            cutter,
            cutting: false,
            spoiled: false,
            blocked_since: None,
            owed: Owed::new(),
        })
    }

    /// Becomes what `plan` says. What was staged stays so, and what is owed.
    pub(super) fn change(&mut self, plan: &RingPlan) {
        if !Arc::ptr_eq(self.ring.memory(), &plan.memory) {
            self.ring.switch_memory(plan.memory.clone());
        }
        self.doorbell = plan.doorbell.clone();
        self.enabled = plan.enabled;
        self.lendable = plan.lendable.clone();
    }

    /// What frames in it may be sent from.
    pub(super) fn lendable(&self) -> Option<&Arc<Lendable>> {
        self.lendable.as_ref()
    }

    /// Between two bursts.
    pub(super) fn is_idle(&self) -> bool {
        self.staged.is_empty() && self.next == self.popped
    }

    /// The VF has frames that it does not say when it is done with.
    pub(super) fn is_owing(&self) -> bool {
        !self.owed.is_empty()
    }

    /// Completes what the VF is done with. Whether there was any.
    #[inline]
    pub(super) fn collect<Q: TxQueue<Packet = P>>(
        &mut self,
        queue: &mut Q,
        now: Instant,
        counters: &LaneCounters,
    ) -> bool {
        if self.owed.is_empty() {
            return false;
        }
        queue.reclaim(now);
        let due = self.owed.due(queue.returned(), |Lent { frames, since }| {
            counters.completed(now.saturating_duration_since(since), frames.into());
        });
        self.ring.complete(due);
        if due > 0 {
            // It goes on.
            self.blocked_since = None;
        }
        due > 0
    }

    /// Completes chains in order: after those that are owed, if any are.
    fn retire(&mut self, chains: usize, queue: &impl TxQueue) {
        match self.owed.is_empty() {
            true => self.ring.complete(chains),
            false => self.owed.push(chains, queue.lent(), None),
        }
    }

    /// A burst of `n` chains was popped.
    pub(super) fn begin(&mut self, n: usize) {
        (self.popped, self.next) = (n, 0);
    }

    /// Why nothing may be sent at all now.
    pub(super) fn closed(&self, ready: &AtomicBool) -> Option<Cause> {
        if !self.enabled {
            return Some(Cause::Disabled);
        }
        (!ready.load(Relaxed)).then_some(Cause::NotReady)
    }

    /// Turns chains into staged packets until the burst or the stage is used up. Returns how many were
    /// dropped, and one more for each [`COPY_UNIT`].
    pub(super) fn stage<Q: TxQueue<Packet = P>>(&mut self, queue: &mut Q, counters: &LaneCounters) -> usize {
        let (mut dropped, mut copied) = (0, 0);
        while !self.staged.is_full() {
            if self.cutting {
                if !self.stage_segments(queue) {
                    break;
                }
                continue;
            }
            if self.next == self.popped {
                break;
            }
            if self.copy_plain(queue, &mut copied) > 0 || self.lend_plain(queue) > 0 {
                continue;
            }
            match self.stage_frame(queue, &mut copied) {
                Ok(true) => {}
                Ok(false) => break,
                Err(cause) => {
                    dropped += 1;
                    self.next += 1;
                    self.odd = true;
                    match (self.ends.last_mut(), cause) {
                        (Some(end), Cause::Oversize) => end.oversize += 1,
                        (Some(end), _) => end.malformed += 1,
                        (None, _) => {
                            counters.dropped(cause, 1);
                            self.retire(1, queue);
                        }
                    }
                }
            }
        }
        dropped + copied / COPY_UNIT
    }

    /// Stages copies of the frames from the chain `next` on, as long as nothing is asked for them and they are not to be
    /// lent. Returns how many: none, if the first is another, or the VF's pool is dry.
    #[inline]
    fn copy_plain<Q: TxQueue<Packet = P>>(&mut self, queue: &mut Q, copied: &mut usize) -> usize {
        let before = self.ends.len();
        let longest = self.rules.max_wire_frame;
        let lent_from = if self.lendable.is_some() { queue.lends_from() } else { usize::MAX };
        let (ends, room) = (&mut self.ends, self.staged.remaining_capacity());
        let fits = |frame: &PlainFrame<'_>| frame.remaining() <= longest && frame.remaining() < lent_from;
        let frames = self.ring.plain_frames(self.next).take(room).take_while(fits);
        let frames = frames.inspect(|frame| ends.push(End { frame: frame.remaining() as u32, ..End::default() }));
        queue.copy_each(frames, &mut self.staged);
        // The last one may not have been copied.
        self.ends.truncate(self.staged.len());
        let new = &self.ends[before..];
        let bytes = new.iter().map(|end| end.frame as usize).sum::<usize>();
        self.next += new.len();
        self.bytes += bytes as u64;
        *copied += bytes;
        new.len()
    }

    /// Stages the frames from the chain `next` on where they lie, as long as nothing is asked for them and they can be
    /// lent. So nothing of them is looked at: the guest may change them as it likes. Returns how many.
    #[inline]
    fn lend_plain<Q: TxQueue<Packet = P>>(&mut self, queue: &mut Q) -> usize {
        let Some(lendable) = &self.lendable else { return 0 };
        let before = self.ends.len();
        let fit = queue.lends_from()..=self.rules.max_wire_frame;
        for frame in self.ring.plain_frames(self.next).take(self.staged.remaining_capacity()) {
            let len = frame.remaining();
            if !fit.contains(&len) || !lendable.covers(&frame.place()) {
                break;
            }
            let Some(packet) = queue.lend(frame.place(), lendable) else { break };
            self.staged.push(packet);
            self.ends.push(End { frame: len as u32, ..End::default() });
            self.bytes += len as u64;
        }
        self.next += self.ends.len() - before;
        self.ends.len() - before
    }

    /// Stages the chain `next`; `false` if the VF's pool is dry.
    fn stage_frame<Q: TxQueue<Packet = P>>(&mut self, queue: &mut Q, copied: &mut usize) -> Result<bool, Cause> {
        let mut frame = self.ring.frame(self.next).map_err(|fault| match fault {
            ChainFault::Long => Cause::Oversize,
            _ => Cause::Malformed,
        })?;
        let (header, len) = (frame.header(), frame.len());
        // First of all, for the cutter has room only for what was negotiated.
        if !self.rules.permits(header.gso) {
            return Err(Cause::Malformed);
        }
        if self.rules.segments(&header, len) {
            *copied += len;
            frame.copy_next(self.cutter.load(len));
            match offload::judge(&header, self.cutter.frame(), len, &self.rules)? {
                Treatment::Segment { layers, headers, size } => self.cutter.start(layers, headers, size),
                _ => return Err(Cause::Malformed),
            }
            self.cutting = true;
            return Ok(true);
        }
        if len > self.rules.max_wire_frame && header.gso == Gso::None {
            return Err(Cause::Oversize);
        }
        if queue.takes_heads()
            && len >= HEAD + queue.lends_from()
            && let Some(packet) = self.behind_head(queue, &header)?
        {
            *copied += HEAD;
            self.stage_packet(packet, len);
            return Ok(true);
        }
        let Some(mut packet) = queue.copy(&mut frame) else {
            return Ok(false);
        };
        *copied += len;
        match offload::judge(&header, packet.head(), len, &self.rules)? {
            Treatment::Plain => {}
            Treatment::Vf(offload) => packet.set_offload(&offload),
            // A frame that needs no segmentation is in one piece: buffers are as large as the MTU asks for.
            Treatment::Checksum { start, offset, udp } if packet.head().len() >= len => {
                checksum::complete(packet.head_mut(), start, offset, udp);
            }
            Treatment::Checksum { .. } | Treatment::Segment { .. } => return Err(Cause::Malformed),
        }
        self.stage_packet(packet, len);
        Ok(true)
    }

    /// The chain `next` as a copy of its headers, in front of the rest where it lies, if the VF does what is asked for it:
    /// what was judged is what it gets, whatever the guest does meanwhile. `None`: all of it is to be copied.
    fn behind_head<Q: TxQueue<Packet = P>>(&self, queue: &mut Q, header: &NetHeader) -> Result<Option<P>, Cause> {
        let (Some(lendable), Ok(mut frame)) = (&self.lendable, self.ring.frame(self.next)) else { return Ok(None) };
        let mut head = [0; HEAD];
        frame.copy_next(&mut head);
        let Some(rest) = frame.rest().filter(|rest| lendable.covers(rest)) else { return Ok(None) };
        let Treatment::Vf(offload) = offload::judge(header, &head, frame.len(), &self.rules)? else {
            return Ok(None);
        };
        if usize::from(offload.l2_len) + usize::from(offload.l3_len) + LONGEST_TCP > HEAD {
            return Ok(None);
        }
        let mut packet = queue.lend_behind(&head, rest, lendable);
        if let Some(packet) = &mut packet {
            packet.set_offload(&offload);
        }
        Ok(packet)
    }

    /// The packet that the chain `next` became, of `len` bytes.
    fn stage_packet(&mut self, packet: P, len: usize) {
        self.staged.push(packet);
        self.ends.push(End { frame: len as u32, ..End::default() });
        self.bytes += len as u64;
        self.next += 1;
    }

    /// Stages segments of the chain `next` while there is room; `false` if the VF's pool is dry.
    fn stage_segments<Q: TxQueue<Packet = P>>(&mut self, queue: &mut Q) -> bool {
        self.odd = true;
        while !self.staged.is_full() {
            let Some(packet) = queue.copy(&mut self.cutter.segment()) else {
                return false;
            };
            self.staged.push(packet);
            if self.cutter.advance() {
                self.ends.push(End { frame: self.cutter.frame().len() as u32, ..End::default() });
                self.cutting = false;
                self.next += 1;
                return true;
            }
            self.ends.push(End::default());
        }
        true
    }

    /// Offers what is staged to the VF. Returns how many packets it took.
    pub(super) fn send<Q: TxQueue<Packet = P>>(
        &mut self,
        queue: &mut Q,
        now: Instant,
        counters: &LaneCounters,
    ) -> usize {
        let (mut refused, before) = (0, queue.lent());
        let sent = queue.send(&mut self.staged, &mut refused);
        let chains = self.accepted(sent, refused, counters);
        let lent = queue.lent();
        if lent == before && self.owed.is_empty() {
            self.ring.complete(chains);
        } else {
            let frames = lent.wrapping_sub(before);
            counters.lent(frames.into());
            if self.owed.is_empty() && queue.returned() == lent {
                counters.completed_at_once(frames.into());
                self.ring.complete(chains);
            } else {
                self.owed.push(chains, lent, (frames > 0).then_some(Lent { frames, since: now }));
                self.collect(queue, now, counters);
            }
        }
        if sent > 0 || self.is_idle() {
            self.blocked_since = None;
            return sent;
        }
        let since = *self.blocked_since.get_or_insert(now);
        match now.saturating_duration_since(since) >= VF_FULL {
            true => self.drop_all(Cause::VfFull, queue, counters),
            false => 0,
        }
    }

    /// The VF took the first `sent` staged packets; those with a bit in `refused` went nowhere. Returns how many
    /// chains that ends.
    fn accepted(&mut self, sent: usize, refused: u32, counters: &LaneCounters) -> usize {
        if sent == self.ends.len() && refused == 0 && !self.odd {
            self.ends.clear();
            let bytes = std::mem::take(&mut self.bytes);
            if sent > 0 {
                counters.delivered(sent as u64, bytes);
            }
            return sent;
        }
        let (mut frames, mut bytes, mut malformed, mut oversize, mut chains) = (0u64, 0u64, 0u64, 0u64, 0);
        for (place, end) in self.ends.drain(..sent).enumerate() {
            self.spoiled |= refused >> place & 1 != 0;
            if end.frame != 0 {
                match std::mem::take(&mut self.spoiled) {
                    true => malformed += 1,
                    false => {
                        frames += 1;
                        bytes += u64::from(end.frame);
                    }
                }
            }
            malformed += u64::from(end.malformed);
            oversize += u64::from(end.oversize);
            chains += end.chains();
        }
        self.bytes = self.ends.iter().map(|end| u64::from(end.frame)).sum();
        self.odd &= !self.ends.is_empty();
        if frames > 0 {
            counters.delivered(frames, bytes);
        }
        if malformed + oversize > 0 {
            counters.dropped(Cause::Malformed, malformed);
            counters.dropped(Cause::Oversize, oversize);
        }
        chains
    }

    /// Drops the whole burst: what is staged, what is being cut, what is not yet looked at.
    pub(super) fn drop_all(&mut self, cause: Cause, queue: &impl TxQueue, counters: &LaneCounters) -> usize {
        let staged = self.ends.iter().filter(|end| end.frame != 0).count();
        counters.dropped(cause, (staged + self.popped - self.next) as u64);
        for end in &self.ends {
            counters.dropped(Cause::Malformed, end.malformed.into());
            counters.dropped(Cause::Oversize, end.oversize.into());
        }
        let n = self.forget();
        self.retire(n, queue);
        n
    }

    /// Forgets the burst; returns how many of its chains are neither completed nor owed.
    fn forget(&mut self) -> usize {
        self.staged.clear();
        self.ends.clear();
        (self.bytes, self.odd) = (0, false);
        self.cutter.abandon();
        (self.cutting, self.spoiled, self.blocked_since) = (false, false, None);
        (self.popped, self.next) = (0, 0);
        self.ring.in_flight() - self.owed.chains()
    }

    /// Puts back what the VF did not take: its chains are popped again.
    pub(super) fn put_back(&mut self) {
        let n = self.forget();
        self.ring.put_back(n);
    }

    /// Ends its life: what was not taken is put back, what was completed is shown, what is owed (to a VF that was
    /// stopped, or whose ring is quarantined) is given up.
    pub(super) fn close(mut self, counters: &LaneCounters) -> (TxRing, Doorbell) {
        self.forget();
        counters.given_up(self.owed.clear());
        self.ring.rewind();
        self.ring.publish();
        (self.ring, self.doorbell)
    }

    /// Shows completed chains to the guest. The fault, if its call fd blocks.
    pub(super) fn publish(&mut self, turn: &Turn<'_>, counters: &LaneCounters) -> Option<RingFault> {
        if !self.ring.is_staged() {
            return None;
        }
        if !self.ring.publish() {
            counters.kicked(false);
            return None;
        }
        match self.doorbell.call(turn.mark) {
            Ok(sent) => counters.kicked(sent),
            Err(Blocked) => return Some(RingFault::CallBlocks),
        }
        None
    }
}
