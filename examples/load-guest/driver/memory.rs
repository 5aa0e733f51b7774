//! Guest memory of our own, shared with the back end, which may write any of it at any time: every access is
//! atomic or volatile and checked against the mapping. All `unsafe` of the load guest is here.

use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Where the guest sees the first byte.
pub const GPA: u64 = 0x1_0000_0000;
const HUGE: usize = 2 << 20;
const PAGE: usize = 4096;

/// One region, mapped and populated.
#[derive(Debug)]
pub struct Memory {
    pub file: File,
    base: NonNull<u8>,
    pub len: usize,
    next: AtomicUsize,
}

// SAFETY: the mapping is reached through atomic and volatile accesses only.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// At least `len` bytes; of huge pages if asked.
    ///
    /// # Errors
    /// There are not so many huge pages, or not so much memory.
    pub fn new(len: usize, huge: bool) -> io::Result<Arc<Self>> {
        let (kind, page) = match huge {
            true => (MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB, HUGE),
            false => (MemfdFlags::empty(), PAGE),
        };
        let len = len.next_multiple_of(page);
        let file = File::from(memfd_create("load-guest", kind | MemfdFlags::CLOEXEC)?);
        ftruncate(&file, len as u64)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { mmap(std::ptr::null_mut(), len, access, MapFlags::SHARED | MapFlags::POPULATE, &file, 0) }?;
        let base = NonNull::new(base.cast()).expect("mmap never returns null");
        Ok(Arc::new(Self { file, base, len, next: AtomicUsize::new(0) }))
    }

    /// `len` bytes from a page boundary that nobody else was given.
    ///
    /// # Panics
    /// There are not so many left.
    pub fn area(self: &Arc<Self>, len: usize) -> Area {
        let at = self.next.fetch_add(len.next_multiple_of(PAGE), Ordering::Relaxed);
        assert!(at + len <= self.len, "the rings and buffers need more than {} bytes", self.len);
        // SAFETY: inside the mapping, by the check above.
        let start = unsafe { self.base.add(at) };
        Area { memory: self.clone(), start, at, len }
    }

    /// Address of the first byte in this process.
    pub fn user(&self) -> u64 {
        self.base.as_ptr().addr() as u64
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: every area holds an `Arc` of the memory: nobody uses the mapping any more.
        unsafe { munmap(self.base.as_ptr().cast(), self.len) }.expect("unmap our own mapping");
    }
}

/// A part of the memory.
#[derive(Debug)]
pub struct Area {
    memory: Arc<Memory>,
    start: NonNull<u8>,
    at: usize,
    len: usize,
}

// SAFETY: as for `Memory`, which it keeps mapped.
unsafe impl Send for Area {}

macro_rules! accessors {
    ($($load:ident, $store:ident, $int:ty, $atomic:ty;)*) => {$(
        #[allow(dead_code)]
        #[inline]
        pub fn $load(&self, at: usize, order: Ordering) -> $int {
            // SAFETY: checked by `place`; shared memory is accessed by atomics only.
            unsafe { <$atomic>::from_ptr(self.place::<$int>(at)) }.load(order)
        }

        #[inline]
        pub fn $store(&self, at: usize, value: $int, order: Ordering) {
            // SAFETY: as above.
            unsafe { <$atomic>::from_ptr(self.place::<$int>(at)) }.store(value, order);
        }
    )*};
}

impl Area {
    accessors! {
        load_u16, store_u16, u16, AtomicU16;
        load_u32, store_u32, u32, AtomicU32;
        load_u64, store_u64, u64, AtomicU64;
    }

    /// A pointer to a `T` that is inside and aligned.
    #[inline]
    fn place<T>(&self, at: usize) -> *mut T {
        let size = size_of::<T>();
        assert!(size <= self.len && at <= self.len - size && at.is_multiple_of(size));
        // SAFETY: inside the mapping. Areas begin at page boundaries.
        unsafe { self.start.add(at) }.as_ptr().cast()
    }

    pub fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at <= self.len && bytes.len() <= self.len - at);
        // SAFETY: inside the mapping; `bytes` is our own memory.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.add(at).as_ptr(), bytes.len()) };
    }

    pub fn read(&self, at: usize, into: &mut [u8]) {
        assert!(at <= self.len && into.len() <= self.len - at);
        // SAFETY: as above. What the back end writes meanwhile may come out torn, never as a reference.
        unsafe { std::ptr::copy_nonoverlapping(self.start.add(at).as_ptr(), into.as_mut_ptr(), into.len()) };
    }

    /// Guest physical address of a byte.
    pub fn gpa(&self, at: usize) -> u64 {
        GPA + (self.at + at) as u64
    }

    /// Its address in this process.
    pub fn user(&self, at: usize) -> u64 {
        self.memory.user() + (self.at + at) as u64
    }
}
