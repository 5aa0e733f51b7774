//! Our rings against other ones: two drivers do the same to two memories, one is served by our ring, the
//! other by an oracle. What the device sides return, and the memories, must stay equal.
//!
//! For split rings the oracle is rust-vmm's `virtio-queue`; for packed ones, of which there is none in Rust,
//! a model written from the specification for this purpose.

mod packed;
mod split;

use std::sync::Arc;

use proptest::prelude::*;
use virtio_forwarder::guest::{Gpa, GuestMemory, RegionSpec, UserAddr};
use virtio_forwarder::ring::{Frame, Gather, Gso, NetHeader, PushError, TxRing};

#[path = "../../src/ring/testing.rs"]
mod testing;
use testing::{Descriptor, GPA, INDIRECT, Memory, NEXT, USER, WRITE};

/// Two adjacent regions; nothing behind them.
const LEN: usize = 1 << 17;
const HALF: usize = LEN / 2;
const MAX_FRAME: usize = 1518;

/// What drivers and devices do.
#[derive(Clone, Debug)]
enum Act {
    /// A well-formed chain of these (offset, length), offered; of a split ring from this descriptor on, of a
    /// packed ring with this id.
    Chain(u16, Vec<(u16, u16)>),
    /// The same through an indirect table.
    Indirect(u16, Vec<(u16, u16)>),
    /// Anything in a descriptor.
    Describe(u16, Descriptor),
    /// Any head.
    Offer(u16),
    Publish,
    /// When the driver wants to hear: so far from where the device is.
    UsedEvent(u16),
    /// Or always, or never.
    NoInterrupt(bool),
    Pop(usize),
    /// So many frames, at once as far as their buffers are usual ones; the longest is so long.
    Push(usize, usize),
    Complete(usize),
    Rewind,
    Used,
    Kicks(bool),
    /// What is in flight is put back, and another ring goes on from there.
    Restart,
}

fn buffers() -> impl Strategy<Value = Vec<(u16, u16)>> {
    // Often around the regions' border, and of any small length, 0 too.
    let offset = prop_oneof![0..3000_u16, (HALF / 2 - 2000) as u16..(HALF / 2) as u16];
    prop::collection::vec((offset, prop_oneof![0..64_u16, 0..1600_u16]), 1..5)
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let address = prop_oneof![
        8 => (0..LEN as u64 / 2).prop_map(|at| GPA + HALF as u64 / 2 + at),
        1 => (LEN as u64 - 100..LEN as u64 + 100).prop_map(|at| GPA + at),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![8 => 0..2000_u32, 1 => any::<u32>()];
    let flags = prop_oneof![Just(0), Just(NEXT), Just(WRITE), Just(NEXT | WRITE), Just(INDIRECT)];
    let descriptor = (address, len, flags, 0..70_u16);
    let descriptor = descriptor.prop_map(|(addr, len, flags, next)| Descriptor::new(addr, len, flags, next));
    let act = prop_oneof![
        6 => (any::<u16>(), buffers()).prop_map(|(at, b)| Act::Chain(at, b)),
        2 => (any::<u16>(), buffers()).prop_map(|(at, b)| Act::Indirect(at, b)),
        2 => (any::<u16>(), descriptor).prop_map(|(at, d)| Act::Describe(at, d)),
        3 => any::<u16>().prop_map(Act::Offer),
        5 => Just(Act::Publish),
        1 => any::<u16>().prop_map(|behind| Act::UsedEvent(behind % 8)),
        1 => any::<bool>().prop_map(Act::NoInterrupt),
        6 => (0..40_usize).prop_map(Act::Pop),
        6 => (1..6_usize, 14..MAX_FRAME).prop_map(|(n, len)| Act::Push(n, len)),
        6 => (0..40_usize).prop_map(Act::Complete),
        1 => Just(Act::Rewind),
        4 => Just(Act::Used),
        1 => any::<bool>().prop_map(Act::Kicks),
        1 => Just(Act::Restart),
    ];
    prop::collection::vec(act, 1..120)
}

/// Guest address of the `offset` of a well-formed chain's buffer.
fn buffer_at(offset: u16) -> u64 {
    GPA + HALF as u64 / 2 + u64::from(offset)
}

/// Fills all that is behind rings.
fn pattern(memory: &Memory) {
    let pattern: Vec<u8> = (0..LEN - HALF / 2).map(|i| (i ^ (i >> 8)) as u8).collect();
    memory.put(HALF / 2, &pattern);
}

/// A memory as our rings see it.
fn ours(memory: &Memory) -> Arc<GuestMemory> {
    let region = |at: usize| {
        let spec = RegionSpec { gpa: Gpa(GPA + at as u64), size: HALF as u64, user: user(at), offset: at as u64 };
        (spec, memory.file.try_clone().unwrap())
    };
    GuestMemory::empty().replaced(vec![region(0), region(HALF)]).unwrap()
}

fn user(at: usize) -> UserAddr {
    UserAddr(USER + at as u64)
}

/// Header and frame, as far as the header is looked at.
fn contents(mut frame: Frame<'_>) -> Vec<u8> {
    let mut bytes = frame.header().encode(0)[..10].to_vec();
    bytes.resize(10 + frame.len(), 0);
    frame.copy_next(&mut bytes[10..]);
    bytes
}

/// The same of a chain that was popped, `None` if it is malformed. Where the ring says that it is a usual frame, it is.
fn frame_at(ring: &TxRing, i: usize) -> Option<Vec<u8>> {
    let all = ring.frame(i).ok().map(contents);
    if let Some(mut plain) = ring.plain_frames(i).next() {
        let (header, frame) = all.as_deref().expect("not malformed").split_at(10);
        let header = NetHeader::decode(header.try_into().unwrap());
        assert!(!header.needs_csum && header.gso == Gso::None, "{header:?} asks for something");
        let mut bytes = vec![0; plain.remaining()];
        plain.copy_next(&mut bytes);
        assert_eq!(bytes, frame);
    }
    all
}

/// The same of a chain's bytes.
fn decoded(mut bytes: Vec<u8>) -> Vec<u8> {
    let first = bytes[..10].try_into().unwrap();
    let header = NetHeader::decode(&first).encode(0);
    bytes.splice(..12, header[..10].iter().copied());
    bytes
}

/// A frame to be pushed.
fn frame(number: u8, len: usize) -> (NetHeader, Vec<u8>) {
    let header = NetHeader { hdr_len: number.into(), ..NetHeader::default() };
    (header, (0..len).map(|i| number ^ i as u8).collect())
}

/// The frames of a push, each with its header.
fn frames(number: &mut u8, n: usize, longest: usize) -> Vec<(NetHeader, Vec<u8>)> {
    let next = |i: usize| {
        *number = number.wrapping_add(1);
        frame(*number, (longest / (1 + i)).max(14))
    };
    (0..n).map(next).collect()
}

/// The oracles' word for an error.
fn word(error: PushError) -> &'static str {
    match error {
        PushError::Empty => "empty",
        PushError::Oversize => "oversize",
        PushError::Chain(_) => "malformed",
        PushError::Ring(_) => "broken",
    }
}
