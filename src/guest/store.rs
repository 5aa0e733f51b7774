//! Every store to guest memory.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use super::HostRange;
use super::range::copy;

/// The one way to write to guest memory. Each store knows the range and so the guest address, which is
/// what a dirty log needs: the logging variant marks pages behind the store, in these methods and
/// nowhere else, and a ring is built with it or without it. This one is the plain store.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct GuestStore;

impl GuestStore {
    /// Stores a little-endian `u16`.
    ///
    /// # Safety
    /// The memory is mapped, `offset + 2 <= to.len()`, and the address is even.
    #[inline]
    pub(crate) unsafe fn u16(&self, to: &HostRange, offset: usize, value: u16) {
        // SAFETY: mapped and aligned by this function's contract; volatile, for the guest may read.
        unsafe { to.at(offset, 2).cast::<u16>().write_volatile(value.to_le()) };
    }

    /// Stores a little-endian `u16` that makes earlier stores visible to the guest, and before any later
    /// sequentially consistent load.
    ///
    /// # Safety
    /// As [`Self::u16`].
    #[inline]
    pub(crate) unsafe fn publish_u16(&self, to: &HostRange, offset: usize, value: u16) {
        // SAFETY: mapped and aligned by this function's contract, and only accessed atomically here.
        let cell = unsafe { AtomicU16::from_ptr(to.at(offset, 2).cast()) };
        cell.store(value.to_le(), Ordering::SeqCst);
    }

    /// Stores a little-endian `u32`.
    ///
    /// # Safety
    /// The memory is mapped, `offset + 4 <= to.len()`, and the address is a multiple of 4.
    #[inline]
    pub(crate) unsafe fn u32(&self, to: &HostRange, offset: usize, value: u32) {
        // SAFETY: mapped and aligned by this function's contract; volatile, for the guest may read.
        unsafe { to.at(offset, 4).cast::<u32>().write_volatile(value.to_le()) };
    }

    /// Stores a little-endian `u64`.
    ///
    /// # Safety
    /// The memory is mapped, `offset + 8 <= to.len()`, and the address is a multiple of 8.
    #[inline]
    pub(crate) unsafe fn u64(&self, to: &HostRange, offset: usize, value: u64) {
        // SAFETY: mapped and aligned by this function's contract; volatile, for the guest may read.
        unsafe { to.at(offset, 8).cast::<u64>().write_volatile(value.to_le()) };
    }

    /// As [`Self::publish_u16`], for a `u64`.
    ///
    /// # Safety
    /// As [`Self::u64`].
    #[inline]
    pub(crate) unsafe fn publish_u64(&self, to: &HostRange, offset: usize, value: u64) {
        // SAFETY: mapped and aligned by this function's contract, and only accessed atomically here.
        let cell = unsafe { AtomicU64::from_ptr(to.at(offset, 8).cast()) };
        cell.store(value.to_le(), Ordering::SeqCst);
    }

    /// Stores bytes.
    ///
    /// # Safety
    /// The memory is mapped and `offset + from.len() <= to.len()`.
    #[inline]
    pub(crate) unsafe fn bytes(&self, to: &HostRange, offset: usize, from: &[u8]) {
        let at = to.at(offset, from.len());
        // SAFETY: both sides are mapped for the length; a private slice cannot overlap guest memory.
        unsafe { copy(from.as_ptr(), at, from.len()) };
    }

    /// Moves `len` bytes from one offset to another; they may overlap.
    ///
    /// # Safety
    /// The memory is mapped, and both offsets with `len` are within the range.
    pub(crate) unsafe fn shift(&self, range: &HostRange, from: usize, to: usize, len: usize) {
        let (from, to) = (range.at(from, len), range.at(to, len));
        // SAFETY: mapped by this function's contract; a raw copy, for the guest may change them meanwhile.
        unsafe { std::ptr::copy(from, to, len) };
    }

    /// As [`Self::bytes`] at offset 0, for a length known to the compiler, unless they are there already: a store would
    /// take their cache line from the guest's core.
    ///
    /// # Safety
    /// The memory is mapped and `N <= to.len()`.
    #[inline]
    unsafe fn array<const N: usize>(&self, to: &HostRange, from: &[u8; N]) {
        // SAFETY: mapped by this function's contract; an array of bytes has alignment 1.
        unsafe {
            if to.read_first::<N>() != *from {
                to.at(0, N).cast::<[u8; N]>().write(*from);
            }
        }
    }

    /// Lets `write` fill a range.
    ///
    /// # Safety
    /// The memory is mapped.
    #[inline]
    pub(crate) unsafe fn fill(&self, to: HostRange, write: impl FnOnce(&mut GuestSink<'_>)) {
        write(&mut GuestSink { left: to, _mapped: PhantomData });
    }
}

/// A range of guest memory that is being filled, front to back, from private memory.
#[derive(Debug)]
pub struct GuestSink<'mapped> {
    left: HostRange,
    _mapped: PhantomData<&'mapped HostRange>,
}

impl GuestSink<'_> {
    /// Bytes that still fit.
    #[inline]
    pub fn room(&self) -> usize {
        self.left.len()
    }

    /// Copies all of `bytes`, of which the guest may have the same already; `false` if they do not fit.
    #[inline]
    pub(crate) fn put<const N: usize>(&mut self, bytes: &[u8; N]) -> bool {
        let fits = self.room() >= N;
        if fits {
            // SAFETY: whoever made the sink vouched for the mapping; they fit.
            unsafe { GuestStore.array(&self.left, bytes) };
            self.left = self.left.after(N);
        }
        fits
    }

    /// Copies `bytes`, as far as they fit.
    #[inline]
    pub fn write(&mut self, bytes: &[u8]) {
        let bytes = &bytes[..bytes.len().min(self.room())];
        // SAFETY: whoever made the sink vouched for the mapping; the length was clipped to it.
        unsafe { GuestStore.bytes(&self.left, 0, bytes) };
        self.left = self.left.after(bytes.len());
    }
}
