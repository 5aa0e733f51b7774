//! Guest memory: regions of shared memory that the front end passes to the back end.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::MemfdFlags;
use vm_memory::mmap::MmapRegion;
use vm_memory::{AtomicAccess, Bytes, FileOffset, VolatileMemory};

/// The front end's own addresses of guest memory are `gpa + USER_OFFSET`: different from both guest
/// physical addresses and the back end's mapping, so that mixing them up cannot work by accident.
pub const USER_OFFSET: u64 = 0x7e00_0000_0000;

/// Size of a huge page here.
pub const HUGE: u64 = 2 << 20;

/// One region. Every access is by guest physical address, through volatile or atomic loads and stores.
#[derive(Debug)]
pub struct Region {
    pub gpa: u64,
    pub size: u64,
    /// Offset of the region in its file.
    pub offset: u64,
    file: File,
    mapping: MmapRegion,
    next: AtomicU64,
}

/// A region as messages describe it; a hostile one need not be true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionEntry {
    pub gpa: u64,
    pub size: u64,
    pub user: u64,
    pub offset: u64,
}

impl RegionEntry {
    pub fn encode(&self) -> Vec<u8> {
        [self.gpa, self.size, self.user, self.offset].iter().flat_map(|v| v.to_ne_bytes()).collect()
    }
}

/// An anonymous file of `size` bytes, of huge pages if asked.
pub fn memfd(size: u64, huge: bool) -> std::io::Result<File> {
    let kind = if huge { MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB } else { MemfdFlags::empty() };
    let file = File::from(rustix::fs::memfd_create("guest", kind | MemfdFlags::CLOEXEC)?);
    file.set_len(size)?;
    Ok(file)
}

impl Region {
    pub fn new(gpa: u64, size: u64) -> Arc<Self> {
        let file = memfd(size, false).expect("memfd");
        Self::of_file(gpa, size, 0, file)
    }

    /// As [`Self::new`], of huge pages; `None` when the machine has too few free ones.
    pub fn huge(gpa: u64, size: u64) -> Option<Arc<Self>> {
        if super::census::free_hugepages() * HUGE < size {
            return None;
        }
        Some(Self::of_file(gpa, size, 0, memfd(size, true).ok()?))
    }

    /// `size` bytes of `file` from `offset`.
    pub fn of_file(gpa: u64, size: u64, offset: u64, file: File) -> Arc<Self> {
        let place = FileOffset::new(file.try_clone().expect("dup"), offset);
        let mapping = MmapRegion::from_file(place, size as usize).expect("map guest memory");
        Arc::new(Self { gpa, size, offset, file, mapping, next: AtomicU64::new(0) })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    pub fn entry(&self) -> RegionEntry {
        RegionEntry { gpa: self.gpa, size: self.size, user: self.gpa + USER_OFFSET, offset: self.offset }
    }

    pub fn end(&self) -> u64 {
        self.gpa + self.size
    }

    /// Takes `len` bytes nobody else was given; never given back.
    pub fn alloc(&self, len: u64, align: u64) -> u64 {
        let mut at = 0;
        self.next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| {
                at = next.next_multiple_of(align);
                (at + len <= self.size).then_some(at + len)
            })
            .unwrap_or_else(|next| panic!("{next} of {} bytes used, {len} wanted", self.size));
        self.gpa + at
    }

    fn at(&self, gpa: u64) -> usize {
        gpa.checked_sub(self.gpa).expect("below the region") as usize
    }

    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        let slice = self.mapping.as_volatile_slice();
        slice.write_slice(bytes, self.at(gpa)).expect("inside the region");
    }

    pub fn read(&self, gpa: u64, into: &mut [u8]) {
        let slice = self.mapping.as_volatile_slice();
        slice.read_slice(into, self.at(gpa)).expect("inside the region");
    }

    pub fn store<T: AtomicAccess>(&self, gpa: u64, value: T, order: Ordering) {
        let slice = self.mapping.as_volatile_slice();
        slice.store(value, self.at(gpa), order).expect("aligned, inside the region");
    }

    pub fn load<T: AtomicAccess>(&self, gpa: u64, order: Ordering) -> T {
        let slice = self.mapping.as_volatile_slice();
        slice.load(self.at(gpa), order).expect("aligned, inside the region")
    }
}
