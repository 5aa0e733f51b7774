//! Owning handles over `rte_mbuf`: the only file that touches its fields.
//!
//! They are read and written at offsets that the shim takes from the installed headers.

use std::ptr::NonNull;

use dpdk_sys::rte_mbuf;

use super::mempool::Stack;
use super::{RxPacket, TxOffload, TxPacket};
use crate::guest::{GuestSink, HostRange};
use crate::ring::Gather;

/// Private bytes of each mbuf of a pool with our ops: the address of its own buffer for the device. A cache line, so
/// that the buffer stays aligned as it would be without.
pub(super) const LENT_PRIV: u16 = 64;

/// Behind it, the buffer's length.
const OWN_LEN: u32 = 8;

/// A pointer to a live mbuf that whoever holds this may use alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct Mbuf(NonNull<rte_mbuf>);

impl Mbuf {
    /// # Safety
    /// `raw` is a live mbuf, not null, and ours alone.
    pub(super) unsafe fn new(raw: *mut rte_mbuf) -> Self {
        // SAFETY: as promised.
        Self(unsafe { NonNull::new_unchecked(raw) })
    }

    pub(super) fn raw(self) -> *mut rte_mbuf {
        self.0.as_ptr()
    }

    /// # Safety
    /// A field of type `T` is at `offset`.
    #[inline(always)]
    unsafe fn get<T: Copy>(self, offset: u32) -> T {
        // SAFETY: inside a live mbuf, which is aligned to a cache line, its fields to their size.
        unsafe { self.0.as_ptr().byte_add(offset as usize).cast::<T>().read() }
    }

    /// # Safety
    /// As [`Self::get`].
    #[inline(always)]
    unsafe fn set<T: Copy>(self, offset: u32, value: T) {
        // SAFETY: as in `get`.
        unsafe { self.0.as_ptr().byte_add(offset as usize).cast::<T>().write(value) }
    }

    fn data_len(self) -> u16 {
        // SAFETY: rte_mbuf.data_len is 16 bits.
        unsafe { self.get(dpdk_sys::SHIM_MBUF_DATA_LEN) }
    }

    fn pkt_len(self) -> u32 {
        // SAFETY: rte_mbuf.pkt_len is 32 bits.
        unsafe { self.get(dpdk_sys::SHIM_MBUF_PKT_LEN) }
    }

    pub(super) fn flags(self) -> u64 {
        // SAFETY: rte_mbuf.ol_flags is 64 bits.
        unsafe { self.get(dpdk_sys::SHIM_MBUF_OL_FLAGS) }
    }

    fn segments(self) -> u16 {
        // SAFETY: rte_mbuf.nb_segs is 16 bits.
        unsafe { self.get(dpdk_sys::SHIM_MBUF_NB_SEGS) }
    }

    fn refcnt(self) -> u16 {
        // SAFETY: rte_mbuf.refcnt is 16 bits; nobody else changes it while the mbuf is ours alone.
        unsafe { self.get(dpdk_sys::SHIM_MBUF_REFCNT) }
    }

    fn pool(self) -> *mut dpdk_sys::rte_mempool {
        // SAFETY: rte_mbuf.pool is a pointer.
        unsafe { self.get(dpdk_sys::SHIM_MBUF_POOL) }
    }

    fn next(self) -> Option<Self> {
        // SAFETY: rte_mbuf.next is a pointer, null at the end.
        let next: *mut rte_mbuf = unsafe { self.get(dpdk_sys::SHIM_MBUF_NEXT) };
        NonNull::new(next).map(Self)
    }

    /// Where the data begins in the buffer.
    fn offset(self) -> u16 {
        // SAFETY: rte_mbuf.data_off is 16 bits.
        unsafe { self.get(dpdk_sys::SHIM_MBUF_DATA_OFF) }
    }

    fn data(self) -> *mut u8 {
        // SAFETY: buf_addr is a pointer, and data_off inside the buffer.
        unsafe {
            let buffer: *mut u8 = self.get(dpdk_sys::SHIM_MBUF_BUF_ADDR);
            buffer.add(self.offset().into())
        }
    }

    /// Bytes from the start of the data to the end of the buffer.
    fn room(self) -> usize {
        // SAFETY: rte_mbuf.buf_len is 16 bits.
        let buffer: u16 = unsafe { self.get(dpdk_sys::SHIM_MBUF_BUF_LEN) };
        (buffer - self.offset()).into()
    }

    /// Copies the next `len` bytes of `source` into this empty segment, and zeros up to `padded`.
    ///
    /// # Safety
    /// It has room for `padded` bytes, and `len <= padded`.
    #[inline]
    unsafe fn fill(self, source: &mut impl Gather, len: usize, padded: usize) {
        debug_assert!(len <= padded && padded <= self.room());
        // SAFETY: in the buffer, as promised, which is ours alone; DPDK's memory is initialised.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.data(), padded) };
        source.copy_next(&mut bytes[..len]);
        if len < padded {
            bytes[len..].fill(0);
        }
        // SAFETY: rte_mbuf.data_len is 16 bits, and the room was.
        unsafe { self.set(dpdk_sys::SHIM_MBUF_DATA_LEN, padded as u16) };
    }

    /// Sets what the last user of a free mbuf may have left, as rte_pktmbuf_reset does; the lengths are set by whoever
    /// fills it.
    ///
    /// # Safety
    /// A free mbuf: one segment, no next, one reference, its own buffer.
    #[inline]
    pub(super) unsafe fn fresh(self) -> Self {
        // SAFETY: data_off is 16 bits, ol_flags 64; tx_offload and the VLAN tag count only with flags.
        unsafe {
            self.set(dpdk_sys::SHIM_MBUF_DATA_OFF, dpdk_sys::SHIM_HEADROOM as u16);
            self.set(dpdk_sys::SHIM_MBUF_OL_FLAGS, 0_u64);
        }
        self
    }

    /// The buffer that was allocated with it, of a pool with [`LENT_PRIV`].
    #[inline]
    fn own_buffer(self) -> *mut u8 {
        let before = dpdk_sys::SHIM_MBUF_SIZE as usize + usize::from(LENT_PRIV);
        self.0.as_ptr().cast::<u8>().wrapping_add(before)
    }

    /// Of a pool with [`LENT_PRIV`]: it points to memory that is not its own.
    #[inline]
    fn is_elsewhere(self) -> bool {
        // SAFETY: rte_mbuf.buf_addr is a pointer.
        let buffer: *mut u8 = unsafe { self.get(dpdk_sys::SHIM_MBUF_BUF_ADDR) };
        buffer != self.own_buffer()
    }

    /// Notes where the device finds its own buffer, and its length.
    ///
    /// # Safety
    /// A fresh mbuf of a pool with [`LENT_PRIV`] private bytes.
    pub(super) unsafe fn remember_buffer(self) {
        if dpdk_sys::SHIM_MBUF_BUF_IOVA != 0 {
            // SAFETY: buf_iova is 64 bits; there are private bytes right behind the header.
            unsafe { self.set(dpdk_sys::SHIM_MBUF_SIZE, self.get::<u64>(dpdk_sys::SHIM_MBUF_BUF_IOVA)) };
        }
        // SAFETY: buf_len is 16 bits; as above.
        unsafe { self.set(dpdk_sys::SHIM_MBUF_SIZE + OWN_LEN, self.get::<u16>(dpdk_sys::SHIM_MBUF_BUF_LEN)) };
    }

    /// Points it to the `len` bytes at `data`, without headroom: a driver that writes its header in front of the
    /// data would write into the guest's memory. IOVA = VA.
    ///
    /// # Safety
    /// As [`Self::remember_buffer`], which was called; the memory stays until the mbuf is back.
    #[inline]
    unsafe fn lend(self, data: *mut u8, len: u16) {
        // SAFETY: each field has the width that it is written with.
        unsafe {
            self.set(dpdk_sys::SHIM_MBUF_BUF_ADDR, data);
            if dpdk_sys::SHIM_MBUF_BUF_IOVA != 0 {
                self.set(dpdk_sys::SHIM_MBUF_BUF_IOVA, data.addr() as u64);
            }
            self.set(dpdk_sys::SHIM_MBUF_BUF_LEN, len);
            self.set(dpdk_sys::SHIM_MBUF_DATA_OFF, 0_u16);
            self.set(dpdk_sys::SHIM_MBUF_DATA_LEN, len);
            self.set(dpdk_sys::SHIM_MBUF_PKT_LEN, u32::from(len));
        }
    }

    /// Points it to the `len` bytes at `data` such that a driver's usual headroom ends there.
    ///
    /// # Safety
    /// As [`Self::lend`].
    #[inline]
    pub(super) unsafe fn place(self, data: *mut u8, len: usize) {
        let headroom = dpdk_sys::SHIM_HEADROOM as usize;
        // Nobody goes there: a driver's first byte is behind the headroom.
        let buffer = data.wrapping_sub(headroom);
        // SAFETY: each field has the width that it is written with.
        unsafe {
            self.set(dpdk_sys::SHIM_MBUF_BUF_ADDR, buffer);
            if dpdk_sys::SHIM_MBUF_BUF_IOVA != 0 {
                self.set(dpdk_sys::SHIM_MBUF_BUF_IOVA, buffer.addr() as u64);
            }
            self.set(dpdk_sys::SHIM_MBUF_BUF_LEN, (headroom + len).min(u16::MAX.into()) as u16);
        }
    }

    /// Gives it its own buffer back. Whether it pointed elsewhere.
    ///
    /// # Safety
    /// An mbuf of a pool with [`LENT_PRIV`].
    #[inline]
    pub(super) unsafe fn restore(self) -> bool {
        let lent = self.is_elsewhere();
        if lent {
            // SAFETY: as in `lend` and `remember_buffer`; the buffer's length is what the pool's layout says.
            unsafe {
                self.set(dpdk_sys::SHIM_MBUF_BUF_ADDR, self.own_buffer());
                if dpdk_sys::SHIM_MBUF_BUF_IOVA != 0 {
                    self.set(dpdk_sys::SHIM_MBUF_BUF_IOVA, self.get::<u64>(dpdk_sys::SHIM_MBUF_SIZE));
                }
                self.set(dpdk_sys::SHIM_MBUF_BUF_LEN, self.get::<u16>(dpdk_sys::SHIM_MBUF_SIZE + OWN_LEN));
            }
        }
        lent
    }

    fn free(self) {
        // SAFETY: ours alone, and not used afterwards.
        unsafe { dpdk_sys::shim_pktmbuf_free(self.raw()) };
    }
}

/// A frame of our own on its way to an ethdev. Same layout as `*mut rte_mbuf`.
#[derive(Debug)]
#[repr(transparent)]
pub struct TxMbuf(Mbuf);

// SAFETY: the mbuf is ours alone and its pool may be used from any thread.
unsafe impl Send for TxMbuf {}

impl TxMbuf {
    /// Copies the rest of `source` (at most `u32::MAX` bytes) into as many mbufs as it needs, and pads the
    /// frame with zeros to `min`, which fits one mbuf. `alloc` gives mbufs as the pool resets them, of
    /// `room` bytes.
    #[inline]
    pub(super) fn copy(
        source: &mut impl Gather,
        room: usize,
        min: usize,
        mut alloc: impl FnMut() -> Option<Mbuf>,
    ) -> Option<Self> {
        let len = source.remaining();
        // Owned at once, so that a dry pool in the middle gives back what was taken.
        let frame = Self(alloc()?);
        let first = len.min(room);
        let padded = first.max(min);
        assert!(padded <= room);
        // SAFETY: `room` bytes by this function's contract.
        unsafe { frame.0.fill(source, first, padded) };
        let (mut last, mut left, mut segments) = (frame.0, len - first, 1u16);
        while left > 0 {
            let segment = alloc()?;
            // SAFETY: rte_mbuf.next is a pointer, nb_segs 16 bits.
            unsafe {
                last.set(dpdk_sys::SHIM_MBUF_NEXT, segment.raw());
                segments += 1;
                frame.0.set(dpdk_sys::SHIM_MBUF_NB_SEGS, segments);
            }
            let n = left.min(room);
            // SAFETY: at most `room` bytes.
            unsafe { segment.fill(source, n, n) };
            (last, left) = (segment, left - n);
        }
        // SAFETY: rte_mbuf.pkt_len is 32 bits.
        unsafe { frame.0.set(dpdk_sys::SHIM_MBUF_PKT_LEN, len.max(min) as u32) };
        Some(frame)
    }

    /// A copy of the rest of `source` in one mbuf.
    ///
    /// # Safety
    /// `fresh` is a fresh mbuf of a send pool, with room for all of it.
    #[inline]
    pub(super) unsafe fn whole(fresh: Mbuf, source: &mut impl Gather) -> Self {
        let len = source.remaining();
        // SAFETY: as promised; rte_mbuf.pkt_len is 32 bits.
        unsafe {
            fresh.fill(source, len, len);
            fresh.set(dpdk_sys::SHIM_MBUF_PKT_LEN, len as u32);
        }
        Self(fresh)
    }

    /// A frame that stays where it is: `fresh` is pointed to it.
    ///
    /// # Safety
    /// `fresh` is a fresh shell; the range stays mapped until the mbuf is back.
    pub(super) unsafe fn over(fresh: Mbuf, frame: HostRange) -> Self {
        // SAFETY: as promised.
        unsafe { fresh.lend(frame.as_ptr(), frame.len() as u16) };
        Self(fresh)
    }

    /// A frame of which all but a copy of its head stays where it is: `fresh` is pointed there.
    ///
    /// # Safety
    /// As [`Self::over`]; `first` is a fresh mbuf of our own, with room for `head`.
    pub(super) unsafe fn behind(first: Mbuf, mut head: &[u8], fresh: Mbuf, rest: HostRange) -> Self {
        let len = head.len();
        // SAFETY: as promised; each field has the width that it is written with.
        unsafe {
            first.fill(&mut head, len, len);
            fresh.lend(rest.as_ptr(), rest.len() as u16);
            first.set(dpdk_sys::SHIM_MBUF_NEXT, fresh.raw());
            first.set(dpdk_sys::SHIM_MBUF_NB_SEGS, 2_u16);
            first.set(dpdk_sys::SHIM_MBUF_PKT_LEN, (len + rest.len()) as u32);
        }
        Self(first)
    }

    /// What points into guest memory, if anything does: the first of its mbufs, or the second. All others have headroom.
    #[inline]
    fn shell(&self) -> Option<Mbuf> {
        match (self.0.offset(), self.0.segments()) {
            (0, _) => Some(self.0),
            (_, 1) => None,
            (..) => self.0.next().filter(|next| next.offset() == 0),
        }
    }

    /// Bytes of it are in guest memory.
    #[inline]
    pub(super) fn is_lent(&self) -> bool {
        self.shell().is_some()
    }

    /// In several mbufs.
    #[inline]
    pub(super) fn is_chained(&self) -> bool {
        self.0.segments() > 1
    }

    /// It asks for an offload, so the driver's tx_prepare has to see it.
    pub(super) fn flags(&self) -> u64 {
        self.0.flags()
    }
}

impl Drop for TxMbuf {
    /// Without having been sent: not among those that came back.
    fn drop(&mut self) {
        if let Some(shell) = self.shell() {
            // SAFETY: only shells are lent.
            unsafe { shell.restore() };
        }
        self.0.free();
    }
}

impl TxPacket for TxMbuf {
    fn len(&self) -> usize {
        self.0.pkt_len() as usize
    }

    fn head(&self) -> &[u8] {
        if self.0.offset() == 0 {
            return &[];
        }
        // SAFETY: data_len bytes of the first segment were written; the mbuf is ours while `self` lives.
        unsafe { std::slice::from_raw_parts(self.0.data(), self.0.data_len().into()) }
    }

    fn head_mut(&mut self) -> &mut [u8] {
        if self.0.offset() == 0 {
            return &mut [];
        }
        // SAFETY: as in `head`, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.0.data(), self.0.data_len().into()) }
    }

    /// For a checksum alone, the L4 checksum field holds the sum of the pseudo header already: virtio
    /// demands it of the guest (1.3, 5.1.6.2), and it is what DPDK asks for. For segmentation DPDK wants it
    /// without the length, and the IPv4 checksum as zero. Drivers that differ see to it in tx_prepare.
    fn set_offload(&mut self, offload: &TxOffload) {
        let mut flags = if offload.ipv6 { dpdk_sys::SHIM_TX_IPV6 } else { dpdk_sys::SHIM_TX_IPV4 };
        if offload.segment != 0 {
            flags |= dpdk_sys::SHIM_TX_TCP_SEG;
            if !offload.ipv6 {
                flags |= dpdk_sys::SHIM_TX_IP_CKSUM;
            }
            prepare_segmentation(self.head_mut(), offload);
        } else if offload.checksum && offload.udp {
            flags |= dpdk_sys::SHIM_TX_UDP_CKSUM;
        } else if offload.checksum {
            flags |= dpdk_sys::SHIM_TX_TCP_CKSUM;
        } else {
            return;
        }
        debug_assert!(
            offload.l2_len < 1 << 7 && offload.l3_len < 1 << 9,
            "header lengths beyond what an mbuf can say: {offload:?}"
        );
        let lengths = u64::from(offload.l2_len & 0x7f) << dpdk_sys::SHIM_L2_LEN_SHIFT
            | u64::from(offload.l3_len & 0x1ff) << dpdk_sys::SHIM_L3_LEN_SHIFT
            | u64::from(offload.l4_len) << dpdk_sys::SHIM_L4_LEN_SHIFT
            | u64::from(offload.segment) << dpdk_sys::SHIM_TSO_SEGSZ_SHIFT;
        // SAFETY: both are 64 bits; the other parts of tx_offload are for tunnels, zero here.
        unsafe {
            self.0.set(dpdk_sys::SHIM_MBUF_OL_FLAGS, flags);
            self.0.set(dpdk_sys::SHIM_MBUF_TX_OFFLOAD, lengths);
        }
    }
}

/// Sets the TCP checksum to the sum of the pseudo header without length, the IPv4 checksum to zero.
/// Offsets outside of `frame` change nothing: such a frame is the caller's mistake, and stays wrong.
fn prepare_segmentation(frame: &mut [u8], offload: &TxOffload) {
    const TCP: u32 = 6;
    let l3 = usize::from(offload.l2_len);
    let l4 = l3 + usize::from(offload.l3_len);
    let addresses = if offload.ipv6 { l3 + 8..l3 + 40 } else { l3 + 12..l3 + 20 };
    let (Some(addresses), Some(_)) = (frame.get(addresses), frame.get(l4 + 16..l4 + 18)) else {
        debug_assert!(false, "headers outside of the frame's first piece: {offload:?}");
        return;
    };
    let mut sum =
        TCP + addresses.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum::<u32>();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    frame[l4 + 16..l4 + 18].copy_from_slice(&(sum as u16).to_be_bytes());
    if !offload.ipv6 {
        frame[l3 + 10..l3 + 12].fill(0);
    }
}

/// A received frame. It stays with the lane that owns its receive queue (see `super::mempool`).
#[derive(Debug)]
pub struct RxMbuf {
    mbuf: Mbuf,
    /// Its data is in a buffer of the guest's.
    placed: bool,
    pool: *mut dpdk_sys::rte_mempool,
    stack: NonNull<Stack>,
}

// SAFETY: moves with its lane, whose hand-over orders the accesses to the stack.
unsafe impl Send for RxMbuf {}

impl RxMbuf {
    /// # Safety
    /// `mbuf` was just received from the queue whose pool is `pool`, with the free mbufs in `stack`; `posted`: some
    /// may point to buffers posted to it.
    #[inline]
    pub(super) unsafe fn new(
        mbuf: Mbuf,
        pool: *mut dpdk_sys::rte_mempool,
        stack: NonNull<Stack>,
        posted: bool,
    ) -> Self {
        // Mbufs of other pools never do.
        let placed = posted && mbuf.pool() == pool && mbuf.is_elsewhere();
        Self { mbuf, placed, pool, stack }
    }
}

impl Drop for RxMbuf {
    /// The usual case, an mbuf of the queue's own pool, stays in Rust. Everything else (net_ring hands us what
    /// another pool sent, chains, shared buffers) takes DPDK's way.
    #[inline]
    fn drop(&mut self) {
        let odd = dpdk_sys::SHIM_MBUF_INDIRECT | dpdk_sys::SHIM_MBUF_EXTERNAL;
        let mbuf = self.mbuf;
        if mbuf.pool() == self.pool && mbuf.segments() == 1 && mbuf.refcnt() == 1 && mbuf.flags() & odd == 0 {
            // SAFETY: the pool has LENT_PRIV.
            unsafe { mbuf.restore() };
            // A free mbuf has refcnt 1, one segment and no next (rte_mbuf_raw_free): it has.
            // SAFETY: the mbuf is of this pool and ours alone; the lane owns the pool.
            unsafe { Stack::put_one(self.stack, mbuf.raw().cast()) };
        } else {
            mbuf.free();
        }
    }
}

impl RxPacket for RxMbuf {
    fn len(&self) -> usize {
        self.mbuf.pkt_len() as usize
    }

    fn head(&self) -> &[u8] {
        if self.placed {
            return &[];
        }
        // SAFETY: the driver wrote data_len bytes; the mbuf is ours while `self` lives.
        unsafe { std::slice::from_raw_parts(self.mbuf.data(), self.mbuf.data_len().into()) }
    }

    fn gather(&self) -> impl Gather + '_ {
        Segments {
            rest: self.head(),
            next: (self.mbuf.segments() > 1).then(|| self.mbuf.next()).flatten(),
            remaining: self.len(),
            _frame: self,
        }
    }

    #[inline]
    fn placed_at(&self) -> Option<usize> {
        self.placed.then(|| self.mbuf.data().addr())
    }

    fn checksum_good(&self) -> bool {
        self.mbuf.flags() & dpdk_sys::SHIM_RX_L4_CKSUM_MASK == dpdk_sys::SHIM_RX_L4_CKSUM_GOOD
    }
}

/// The bytes of a chain of mbufs.
struct Segments<'a> {
    rest: &'a [u8],
    next: Option<Mbuf>,
    remaining: usize,
    _frame: &'a RxMbuf,
}

impl Gather for Segments<'_> {
    fn remaining(&self) -> usize {
        self.remaining
    }

    fn copy_next(&mut self, mut into: &mut [u8]) {
        while !into.is_empty() {
            let piece = self.piece(into.len());
            let (now, later) = into.split_at_mut(piece.len());
            now.copy_from_slice(piece);
            into = later;
        }
    }

    #[inline]
    fn store_next(&mut self, into: &mut GuestSink<'_>) {
        while into.room() > 0 {
            into.write(self.piece(into.room()));
        }
    }
}

impl<'a> Segments<'a> {
    /// Takes the next contiguous bytes: at least one, at most `limit`, which is not 0.
    #[inline]
    fn piece(&mut self, limit: usize) -> &'a [u8] {
        while self.rest.is_empty() {
            let segment = self.next.expect("pkt_len is the sum of the segments");
            // SAFETY: a segment of the frame that `_frame` borrows.
            self.rest = unsafe { std::slice::from_raw_parts(segment.data(), segment.data_len().into()) };
            self.next = segment.next();
        }
        let (piece, rest) = self.rest.split_at(limit.min(self.rest.len()));
        self.rest = rest;
        self.remaining -= piece.len();
        piece
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segmentation_gets_the_pseudo_header_without_length() {
        // Ethernet + IPv4 (10.0.0.1 -> 10.0.0.2) + TCP, checksum fields full of ones.
        let mut frame = vec![0u8; 54];
        frame[26..30].copy_from_slice(&[10, 0, 0, 1]);
        frame[30..34].copy_from_slice(&[10, 0, 0, 2]);
        frame[24..26].fill(0xff);
        frame[50..52].fill(0xff);
        let offload = TxOffload { segment: 1448, l2_len: 14, l3_len: 20, l4_len: 20, ..TxOffload::default() };
        prepare_segmentation(&mut frame, &offload);
        // 0x0a00 + 0x0001 + 0x0a00 + 0x0002 + 6
        assert_eq!(frame[50..52], [0x14, 0x09]);
        assert_eq!(frame[24..26], [0, 0]);
    }

    #[test]
    fn segmentation_of_ipv6_sums_carries_around() {
        let mut frame = vec![0u8; 74];
        frame[22..54].fill(0xff);
        let offload =
            TxOffload { segment: 1428, ipv6: true, l2_len: 14, l3_len: 40, l4_len: 20, ..TxOffload::default() };
        prepare_segmentation(&mut frame, &offload);
        // 16 words of 0xffff are a zero in ones' complement; 6 remains.
        assert_eq!(frame[70..72], [0, 6]);
        assert_eq!(frame[22..54], [0xff; 32]);
    }
}
