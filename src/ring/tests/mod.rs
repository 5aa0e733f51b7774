//! Rings against a driver that behaves, and one that does not.

mod packed;
mod split;

use std::ops::Range;
use std::sync::Arc;

use super::testing::{Descriptor, GPA, INDIRECT, Memory, NEXT, USER, WRITE};
use super::*;
use crate::guest::{Gpa, GuestMemory, HostRange, RegionSpec, UserAddr, install_sigbus_handler};

const LEN: usize = 1 << 21;

/// A driver, and the ring's view of it.
struct Rig<D> {
    driver: D,
    config: RingConfig,
}

/// What drivers of both kinds have.
trait Side: std::ops::Deref<Target = Memory> {
    const PACKED: bool;

    fn size(&self) -> u16;

    /// Where the descriptors are, what the driver writes beside them, and what the device writes.
    fn areas(&self) -> [usize; 3];

    fn buffers(&self) -> Range<usize>;
}

fn addresses(driver: &impl Side) -> RingAddresses {
    let [desc, avail, used] = driver.areas().map(|at| UserAddr(USER + at as u64));
    RingAddresses { desc, avail, used }
}

impl<D: Side> Rig<D> {
    /// A ring that goes on from `base`.
    fn over(driver: D, base: u16) -> Self {
        let config = RingConfig {
            packed: D::PACKED,
            in_order: false,
            size: driver.size(),
            addresses: addresses(&driver),
            base,
            indirect: true,
            event_idx: false,
            mergeable: false,
            header_len: NetHeader::LEN,
            max_frame: 1518,
        };
        Self { driver, config }
    }

    fn tx(&self) -> TxRing {
        TxRing::new(mapped(&self.driver), &self.config).unwrap()
    }

    fn rx(&self) -> RxRing {
        RxRing::new(mapped(&self.driver), &self.config).unwrap()
    }

    /// Why no ring can be had with such a configuration.
    fn refused(&self, config: RingConfig) -> String {
        TxRing::new(mapped(&self.driver), &config).unwrap_err().to_string()
    }

    /// Why none can be had with another address in it.
    fn refused_at(&self, field: fn(&mut RingAddresses, UserAddr), user: u64) -> String {
        let mut config = self.config;
        field(&mut config.addresses, UserAddr(user));
        self.refused(config)
    }

    /// Guest address `at` bytes behind the ring.
    fn buffer(&self, at: usize) -> u64 {
        self.driver.gpa(self.driver.buffers().start + at)
    }

    fn write(&self, gpa: u64, bytes: &[u8]) {
        self.driver.put((gpa - GPA) as usize, bytes);
    }

    fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        self.driver.get((gpa - GPA) as usize, len)
    }

    /// A frame is in three buffers of 100, 1400 and at least 12 bytes, which are zeroed again.
    fn assert_spread(&self, frame: &[u8]) {
        let parts = [(0, 100), (4096, 1400), (8192, 12)];
        let written = parts.map(|(at, len)| self.read(self.buffer(at), len)).concat();
        assert_eq!(written[..12], HEADER.encode(3));
        assert_eq!(written[12..], *frame);
        for (at, len) in parts {
            self.write(self.buffer(at), &vec![0; len]);
        }
    }
}

/// Two adjacent regions with a border at `LEN / 2`.
fn mapped(memory: &Memory) -> Arc<GuestMemory> {
    let region = |half: u64| {
        let at = half * LEN as u64 / 2;
        let spec = RegionSpec { gpa: Gpa(GPA + at), size: LEN as u64 / 2, user: UserAddr(USER + at), offset: at };
        (spec, memory.file.try_clone().unwrap())
    };
    GuestMemory::empty().replaced(vec![region(0), region(1)]).unwrap()
}

fn bytes(frame: &mut Frame<'_>) -> Vec<u8> {
    let mut into = vec![0; frame.remaining()];
    frame.copy_next(&mut into);
    into
}

/// Pops a burst of frames that begin with their numbers, of which `left` are left before `number`.
fn pop_numbered(ring: &mut TxRing, number: u16, left: u16) -> usize {
    let n = ring.pop(BURST).unwrap();
    assert_eq!(n, BURST.min(left.into()));
    assert_eq!(ring.in_flight(), n);
    for i in 0..n {
        let frame = bytes(&mut ring.frame(i).unwrap());
        assert_eq!(frame[..2], number.wrapping_sub(left - i as u16).to_le_bytes());
    }
    n
}

/// Pops 2000 chains, each of which is posted first, or fewer: how many, and the fault that ended it.
fn pop_one_by_one(ring: &mut TxRing, mut post: impl FnMut(usize)) -> (usize, Result<usize, RingFault>) {
    let mut popped = 0;
    while popped < 2000 {
        post(popped);
        match ring.pop(1) {
            Ok(n) => popped += n,
            fault => return (popped, fault),
        }
        ring.complete(1);
        ring.publish();
    }
    (popped, Ok(0))
}

/// How a packet of 112 bytes, or its first half, may be cut into buffers.
const LAYOUTS: [&[usize]; 7] =
    [&[112], &[12, 100], &[11, 101], &[5, 5, 2, 100], &[1; 56], &[0, 12, 0, 0, 100, 0], &[13, 98, 1]];

/// A header, a frame, and both behind each other.
fn packet() -> (NetHeader, Vec<u8>, Vec<u8>) {
    let header = NetHeader { needs_csum: true, csum_start: 34, csum_offset: 16, ..NetHeader::default() };
    let frame: Vec<u8> = (0..100).collect();
    let packet = [&header.encode(0)[..], &frame].concat();
    (header, frame, packet)
}

/// Address and length of each piece, from `at` on.
fn pieces(mut at: u64, lens: &[usize]) -> Vec<(u64, u32)> {
    let mut piece = |len: usize| {
        at += len as u64;
        (at - len as u64, len as u32)
    };
    lens.iter().map(|len| piece(*len)).collect()
}

/// Reserves what can be had for frames of so many bytes, header included: the buffers' guest addresses.
fn reserve(ring: &mut RxRing, room: usize) -> Vec<u64> {
    let mut posted = Vec::new();
    let (most, memory) = (BURST - ring.reserved(), ring.memory().clone());
    let result = ring.reserve(0, most, room, |buffer| {
        posted.push(gpa(buffer, &memory));
        true
    });
    assert!(result.is_ok(), "{result:?}");
    posted
}

/// Where the guest sees it.
fn gpa(buffer: HostRange, memory: &GuestMemory) -> u64 {
    let half = LEN as u64 / 2;
    let offset = |start| {
        let region = memory.translate(Gpa(start), half).unwrap();
        (buffer.as_ptr().addr() as u64).checked_sub(region.as_ptr().addr() as u64).filter(|offset| *offset < half)
    };
    [GPA, GPA + half].into_iter().find_map(|start| Some(start + offset(start)?)).unwrap()
}

/// Where a VF would put the frame that comes into a buffer.
fn place(ring: &RxRing, gpa: u64) -> usize {
    ring.memory().translate(Gpa(gpa), 1).unwrap().as_ptr().addr() + NetHeader::LEN
}

const HEADER: NetHeader = NetHeader {
    needs_csum: false,
    data_valid: true,
    gso: Gso::None,
    ecn: false,
    hdr_len: 0,
    gso_size: 0,
    csum_start: 0,
    csum_offset: 0,
};

/// A frame whose source does not know guest memory: it goes through the bounce buffer.
struct Foreign<'a>(&'a [u8]);

impl Gather for Foreign<'_> {
    fn remaining(&self) -> usize {
        self.0.remaining()
    }
    fn copy_next(&mut self, into: &mut [u8]) {
        self.0.copy_next(into);
    }
}
