//! Descriptors and what they lead to, of both ring formats (virtio 1.3, 2.7.5 and 2.8.5).

use super::{BURST, ChainFault, RingFault};
use crate::guest::{Gpa, HostRange, View};

/// The most descriptors looked at for one burst, and so the most pieces it has. Linux needs up to 19
/// for a frame. It bounds the time that a hostile guest can take from others on the core.
pub(super) const DESCRIPTORS: usize = 1024;

/// So many for a burst are ordinary: four for each packet.
const ORDINARY: usize = 4 * BURST;

/// How many more packets it is worth to have looked at so many descriptors: chains of a thousand empty ones are one
/// packet each, and a turn over them alone would be very long.
#[inline]
pub(super) fn toil(descriptors: usize) -> usize {
    descriptors.saturating_sub(ORDINARY) / 32
}

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// What a descriptor is. Of a chain that is one buffer to be read none of them is set.
pub(super) const SHAPE: u16 = NEXT | WRITE | INDIRECT;

/// Bytes of a descriptor.
pub(super) const DESCRIPTOR_LEN: usize = 16;

/// A private copy of a descriptor.
pub(super) struct Descriptor {
    addr: u64,
    len: u32,
    pub(super) flags: u16,
    /// Split: index of the next one. Packed: buffer id.
    pub(super) link: u16,
}

impl Descriptor {
    /// From its two words, in the split format: address; length, flags, next (2.7.5).
    #[inline]
    fn split(addr: u64, rest: u64) -> Self {
        Self { addr, len: rest as u32, flags: (rest >> 32) as u16, link: (rest >> 48) as u16 }
    }

    /// In the packed format: address; length, id, flags (2.8.5).
    #[inline]
    pub(super) fn packed(addr: u64, rest: u64) -> Self {
        Self { addr, len: rest as u32, link: (rest >> 32) as u16, flags: (rest >> 48) as u16 }
    }
}

impl Descriptor {
    /// Its buffer, if it is a whole chain in one piece.
    #[inline(always)]
    pub(super) fn simple<const WRITABLE: bool>(&self, view: &mut View) -> Option<HostRange> {
        let usual = self.flags & SHAPE == if WRITABLE { WRITE } else { 0 };
        if usual { view.whole(Gpa(self.addr), self.len.into()) } else { None }
    }
}

/// A descriptor table: a split ring's, or an indirect one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table {
    range: HostRange,
    entries: u32,
}

impl Table {
    pub(super) fn new(range: HostRange) -> Self {
        Self { range, entries: (range.len() / DESCRIPTOR_LEN) as u32 }
    }

    /// An entry.
    #[inline(always)]
    pub(super) fn descriptor(&self, index: u16) -> Option<Descriptor> {
        self.read(index.into()).map(|(addr, rest)| Descriptor::split(addr, rest))
    }

    /// The words of an entry.
    #[inline]
    fn read(&self, index: u32) -> Option<(u64, u64)> {
        if index >= self.entries {
            return None;
        }
        // SAFETY: inside the table by the check above; tables do not outlive the ring's guest memory.
        Some(unsafe { self.range.read_u64_pair(index as usize * DESCRIPTOR_LEN) })
    }
}

/// Why a chain was not read to its end.
pub(super) enum Stop {
    /// The chain is malformed.
    Fault(ChainFault),
    /// It has more descriptors or pieces than were left to spend.
    Budget,
    /// `take` has all it wants.
    Enough,
    /// The ring was stopped.
    Ring(RingFault),
}

impl From<ChainFault> for Stop {
    fn from(fault: ChainFault) -> Self {
        Self::Fault(fault)
    }
}

/// A chain being read, or several: what they share.
pub(super) struct Reader<'ring, Take> {
    /// Translates addresses.
    pub(super) view: &'ring mut View,
    /// Indirect tables were negotiated.
    pub(super) indirect: bool,
    /// Descriptors that may still be looked at. `DESCRIPTORS` are enough for any chain we accept.
    pub(super) budget: &'ring mut usize,
    /// Gets each piece, in order.
    pub(super) take: Take,
}

impl<Take: FnMut(HostRange) -> Result<(), Stop>> Reader<'_, Take> {
    /// Reads the chain that starts at `head` of a split ring's table, each descriptor once, until it ends or
    /// `take` stops. `WRITABLE`: for the device to write, else to read. `NESTED`: the table is an indirect one.
    ///
    /// An indirect table may follow direct descriptors (2.7.5.3.2), need not be aligned, and may be longer
    /// than the queue: the spec forbids that to drivers (2.7.5.3.1) but Linux does it on short queues, and
    /// the budget bounds it.
    #[inline]
    pub(super) fn chain<const WRITABLE: bool, const NESTED: bool>(
        &mut self,
        table: &Table,
        head: u16,
    ) -> Result<(), Stop> {
        let mut index = u32::from(head);
        // A chain visits an entry at most once.
        let mut left = table.entries;
        loop {
            let Some((addr, rest)) = table.read(index) else {
                return Err(ChainFault::Index.into());
            };
            if left == 0 {
                return Err(ChainFault::Loop.into());
            }
            left -= 1;
            self.spend()?;
            let descriptor = Descriptor::split(addr, rest);
            if descriptor.flags & INDIRECT != 0 {
                if NESTED {
                    return Err(ChainFault::Indirect.into());
                }
                let table = self.indirect(&descriptor)?;
                return self.chain::<WRITABLE, true>(&table, 0);
            }
            self.buffer::<WRITABLE>(&descriptor)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            index = descriptor.link.into();
        }
    }

    /// One descriptor of a packed ring, with its indirect table if it refers to one. There all entries count,
    /// in order, and WRITE is the only flag (2.8.7).
    #[inline]
    pub(super) fn slot<const WRITABLE: bool>(&mut self, descriptor: &Descriptor) -> Result<(), Stop> {
        self.spend()?;
        if descriptor.flags & INDIRECT == 0 {
            return self.buffer::<WRITABLE>(descriptor);
        }
        let table = self.indirect(descriptor)?;
        for (addr, rest) in (0..).map_while(|index| table.read(index)) {
            self.spend()?;
            let mut entry = Descriptor::packed(addr, rest);
            // DPDK's driver leaves WRITE in the tables of what it sends. It is only read, whatever that says.
            if !WRITABLE {
                entry.flags = 0;
            }
            self.buffer::<WRITABLE>(&entry)?;
        }
        Ok(())
    }

    #[inline]
    fn spend(&mut self) -> Result<(), Stop> {
        *self.budget = self.budget.checked_sub(1).ok_or(Stop::Budget)?;
        Ok(())
    }

    /// Hands over the pieces of a buffer. Empty ones are skipped (drivers for Windows post them); one that
    /// spans adjacent regions is several pieces.
    #[inline]
    fn buffer<const WRITABLE: bool>(&mut self, descriptor: &Descriptor) -> Result<(), Stop> {
        if (descriptor.flags & WRITE != 0) != WRITABLE {
            return Err(ChainFault::Direction.into());
        }
        let mut addr = descriptor.addr;
        let mut len = u64::from(descriptor.len);
        while len > 0 {
            let Some(piece) = self.view.translate(Gpa(addr), len) else {
                return Err(ChainFault::Address.into());
            };
            (self.take)(piece)?;
            len -= piece.len() as u64;
            // Wraps only behind the last region, and there nothing is left or found.
            addr = addr.wrapping_add(piece.len() as u64);
        }
        Ok(())
    }

    /// The table that a descriptor refers to.
    fn indirect(&mut self, descriptor: &Descriptor) -> Result<Table, ChainFault> {
        let legal = self.indirect
            && descriptor.flags & NEXT == 0
            && descriptor.len != 0
            && (descriptor.len as usize).is_multiple_of(DESCRIPTOR_LEN);
        if !legal {
            return Err(ChainFault::Indirect);
        }
        let range = self.view.whole(Gpa(descriptor.addr), descriptor.len.into());
        range.map(Table::new).ok_or(ChainFault::Address)
    }
}
