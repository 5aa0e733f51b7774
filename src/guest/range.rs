//! A contiguous piece of guest memory, and the loads on it.

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

/// A contiguous, mapped piece of guest memory in our address space. Only a look-up makes one; it is
/// valid while the `GuestMemory` that made it lives, which is why rings own an `Arc` of theirs.
///
/// The loads are unsafe for that one reason; each checks its own bounds in debug builds.
#[derive(Clone, Copy, Debug)]
pub struct HostRange {
    ptr: *mut u8,
    len: usize,
}

// SAFETY: a range is an address, not an access; every access through it is an unsafe operation that
// asks for the mapping to be alive, on whichever thread.
unsafe impl Send for HostRange {}
// SAFETY: as above.
unsafe impl Sync for HostRange {}

/// Eight bytes at any address. Its reads are one volatile 64-bit load, aligned or not.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Unaligned(u64);

impl HostRange {
    /// Nothing, nowhere.
    pub(crate) const NONE: Self = Self { ptr: std::ptr::null_mut(), len: 0 };

    /// `ptr..ptr + len` is mapped.
    pub(super) fn new(ptr: *mut u8, len: usize) -> Self {
        Self { ptr, len }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it is mapped. For devices and device drivers; packets are copied by the methods below.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// The first `n` bytes, or all if there are fewer.
    #[inline]
    pub(crate) fn first(self, n: usize) -> Self {
        Self { len: n.min(self.len), ..self }
    }

    /// What is left behind the first `n` bytes.
    #[inline]
    pub(crate) fn after(self, n: usize) -> Self {
        let n = n.min(self.len);
        Self { ptr: self.ptr.wrapping_add(n), len: self.len - n }
    }

    /// Pointer to `size` bytes at `offset`.
    #[inline]
    pub(super) fn at(&self, offset: usize, size: usize) -> *mut u8 {
        debug_assert!(offset <= self.len && size <= self.len - offset);
        self.ptr.wrapping_add(offset)
    }

    /// Asks for the cache line at `offset`, which may lie outside: it is to be read.
    #[inline(always)]
    pub(crate) fn prefetch(&self, offset: usize) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: a prefetch has no effect but on caches, wherever it points.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(self.ptr.wrapping_add(offset).cast()) };
        }
    }

    /// The same: it is to be written.
    #[inline(always)]
    pub(crate) fn prefetch_write(&self, offset: usize) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
            // SAFETY: as above.
            unsafe { _mm_prefetch::<_MM_HINT_ET0>(self.ptr.wrapping_add(offset).cast()) };
        }
    }

    /// All of it. A look-up in `memory` found it.
    #[cfg(test)]
    pub(crate) fn contents(&self, _memory: &super::GuestMemory) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        // SAFETY: it lies in the memory, which is alive.
        unsafe { self.read_into(0, &mut bytes) };
        bytes
    }

    /// Writes to its start, as a device does. A look-up in `memory` found it.
    #[cfg(test)]
    pub(crate) fn overwrite(&self, _memory: &super::GuestMemory, bytes: &[u8]) {
        assert!(bytes.len() <= self.len);
        // SAFETY: it lies in the memory, which is alive.
        unsafe { super::GuestStore.bytes(self, 0, bytes) };
    }

    /// Reads a little-endian `u16` once.
    ///
    /// # Safety
    /// The memory is mapped, `offset + 2 <= len`, and the address is even.
    #[inline]
    pub(crate) unsafe fn read_u16(&self, offset: usize) -> u16 {
        // SAFETY: mapped and aligned by this function's contract; volatile, for the guest may write.
        u16::from_le(unsafe { self.at(offset, 2).cast::<u16>().read_volatile() })
    }

    /// Reads a little-endian `u16` that says how much of other memory the guest has written.
    ///
    /// # Safety
    /// As [`Self::read_u16`].
    #[inline]
    pub(crate) unsafe fn acquire_u16(&self, offset: usize) -> u16 {
        // SAFETY: mapped and aligned by this function's contract, and only accessed atomically here.
        let cell = unsafe { AtomicU16::from_ptr(self.at(offset, 2).cast()) };
        u16::from_le(cell.load(Ordering::Acquire))
    }

    /// Reads a little-endian `u16`, not before an earlier `GuestStore::publish_u16`.
    ///
    /// # Safety
    /// As [`Self::read_u16`].
    #[inline]
    pub(crate) unsafe fn ordered_u16(&self, offset: usize) -> u16 {
        // SAFETY: mapped and aligned by this function's contract, and only accessed atomically here.
        let cell = unsafe { AtomicU16::from_ptr(self.at(offset, 2).cast()) };
        u16::from_le(cell.load(Ordering::SeqCst))
    }

    /// Reads a little-endian `u32`, not before an earlier `GuestStore::publish_u64`.
    ///
    /// # Safety
    /// The memory is mapped, `offset + 4 <= len`, and the address is a multiple of 4.
    #[inline]
    pub(crate) unsafe fn ordered_u32(&self, offset: usize) -> u32 {
        // SAFETY: mapped and aligned by this function's contract, and only accessed atomically here.
        let cell = unsafe { AtomicU32::from_ptr(self.at(offset, 4).cast()) };
        u32::from_le(cell.load(Ordering::SeqCst))
    }

    /// Reads a little-endian `u64` once.
    ///
    /// # Safety
    /// The memory is mapped, `offset + 8 <= len`, and the address is a multiple of 8.
    #[inline]
    pub(crate) unsafe fn read_u64(&self, offset: usize) -> u64 {
        // SAFETY: mapped and aligned by this function's contract; volatile, for the guest may write.
        u64::from_le(unsafe { self.at(offset, 8).cast::<u64>().read_volatile() })
    }

    /// Reads a little-endian `u64` that says how much of other memory the guest has written.
    ///
    /// # Safety
    /// As [`Self::read_u64`].
    #[inline]
    pub(crate) unsafe fn acquire_u64(&self, offset: usize) -> u64 {
        // SAFETY: mapped and aligned by this function's contract, and only accessed atomically here.
        let cell = unsafe { AtomicU64::from_ptr(self.at(offset, 8).cast()) };
        u64::from_le(cell.load(Ordering::Acquire))
    }

    /// Reads 16 bytes once, as two words; the address may have any alignment.
    ///
    /// # Safety
    /// The memory is mapped and `offset + 16 <= len`.
    #[inline]
    pub(crate) unsafe fn read_u64_pair(&self, offset: usize) -> (u64, u64) {
        let at = self.at(offset, 16).cast::<Unaligned>();
        // SAFETY: mapped by this function's contract; `Unaligned` has alignment 1.
        let (low, high) = unsafe { (at.read_volatile().0, at.wrapping_add(1).read_volatile().0) };
        (u64::from_le(low), u64::from_le(high))
    }

    /// As [`Self::read_into`], for a length known to the compiler.
    ///
    /// # Safety
    /// The memory is mapped and `N <= len`.
    #[inline]
    pub(crate) unsafe fn read_first<const N: usize>(&self) -> [u8; N] {
        let from = self.at(0, N).cast::<[u8; N]>();
        // SAFETY: mapped by this function's contract; an array of bytes has alignment 1.
        unsafe { from.read() }
    }

    /// Copies from `offset` into private memory. Bytes that the guest changes meanwhile arrive old or new.
    ///
    /// # Safety
    /// The memory is mapped and `offset + into.len() <= len`.
    #[inline]
    pub(crate) unsafe fn read_into(&self, offset: usize, into: &mut [u8]) {
        let from = self.at(offset, into.len());
        // SAFETY: both sides are mapped for the length; a private slice cannot overlap guest memory.
        unsafe { copy(from, into.as_mut_ptr(), into.len()) };
    }
}

/// `memcpy` that does not call a function for the lengths of headers and short frames.
///
/// # Safety
/// As `copy_nonoverlapping`; either side may be guest memory.
#[inline]
pub(super) unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    /// The first and the last `N` bytes, which may overlap.
    #[inline(always)]
    unsafe fn ends<const N: usize>(from: *const u8, to: *mut u8, len: usize) {
        let (head, tail) = (from.cast::<[u8; N]>(), from.wrapping_add(len - N));
        // SAFETY: `copy`'s contract, and `N <= len`; arrays of bytes have alignment 1.
        unsafe {
            let (head, tail) = (head.read(), tail.cast::<[u8; N]>().read());
            to.cast::<[u8; N]>().write(head);
            to.add(len - N).cast::<[u8; N]>().write(tail);
        }
    }
    // SAFETY: by this function's contract; the lengths are as `ends` needs them.
    unsafe {
        // Frames of 60 bytes first.
        match len {
            33..=64 => ends::<32>(from, to, len),
            65..=128 => ends::<64>(from, to, len),
            17..=32 => ends::<16>(from, to, len),
            8..=16 => ends::<8>(from, to, len),
            _ => from.copy_to_nonoverlapping(to, len),
        }
    }
}
