//! One mapped region of a guest's memory.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use rustix::fs::fstatfs;
use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, VolatileMemory};

use super::sigbus::Watch;
use super::{Gpa, HostRange, UserAddr};
use crate::error::{Error, Result};

/// One region as SET_MEM_TABLE / ADD_MEM_REG describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionSpec {
    /// Where the guest sees it.
    pub gpa: Gpa,
    /// Length in bytes.
    pub size: u64,
    /// Where the front end sees it.
    pub user: UserAddr,
    /// Offset of its first byte in the file.
    pub offset: u64,
}

/// What makes two descriptions the same memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) spec: RegionSpec,
    dev: u64,
    ino: u64,
}

impl Identity {
    pub(super) fn of(spec: RegionSpec, file: &File) -> Result<Self> {
        let stat = file.metadata().map_err(Error::io(format!("fstat of the file behind {:?}", spec.gpa)))?;
        Ok(Self { spec, dev: stat.dev(), ino: stat.ino() })
    }
}

/// Most bytes mapped for all guests together: half of what a process can address, so that there is room for our
/// own threads, heaps and devices whatever front ends ask for.
const MAPPED_LIMIT: u64 = 1 << 46;

static MAPPED: AtomicU64 = AtomicU64::new(0);

/// A share of [`MAPPED_LIMIT`].
#[derive(Debug)]
struct Share(u64);

impl Share {
    fn take(bytes: u64) -> Option<Self> {
        let add = |mapped: u64| mapped.checked_add(bytes).filter(|sum| *sum <= MAPPED_LIMIT);
        MAPPED.fetch_update(Relaxed, Relaxed, add).ok().map(|_| Self(bytes))
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        MAPPED.fetch_sub(self.0, Relaxed);
    }
}

/// A mapped region. Dropping it unmaps, so it is dropped only by whoever holds [`super::Drained`].
#[derive(Debug)]
pub(super) struct Region {
    identity: Identity,
    // Before `map`: the SIGBUS handler must have forgotten the addresses when they become free.
    watch: Watch,
    map: MmapRegion,
    /// On hugepages of its own: nothing discards them but their owner, by truncating the file or punching holes.
    huge: bool,
    // Behind `map`: given back when the addresses are free.
    _share: Share,
}

impl Region {
    /// Maps `spec` of `file`, shared, for reading and writing.
    pub(super) fn map(spec: RegionSpec, file: Arc<File>) -> Result<Self> {
        let identity = Identity::of(spec, &file)?;
        let error = |why: String| Error::Memory(format!("region {spec:x?}: {why}"));
        let refuse = |why: String| Err(error(why));

        let stat = file.metadata().map_err(Error::io(format!("fstat of the file behind {:?}", spec.gpa)))?;
        if !stat.file_type().is_file() {
            return refuse("its fd is not a regular file (use memfd or a memory backend file)".into());
        }
        if spec.size == 0 {
            return refuse("it has no bytes".into());
        }
        let ends = [spec.gpa.0, spec.user.0, spec.offset].map(|start| start.checked_add(spec.size));
        let [Some(_), Some(_), Some(end)] = ends else {
            return refuse("an address or the offset wraps around 2^64".into());
        };
        if end > stat.size() {
            return refuse(format!(
                "it ends at {end:#x} of a file of {:#x} bytes: accesses behind that would fault",
                stat.size()
            ));
        }
        let page = page_size(&file, stat.blksize());
        if !spec.offset.is_multiple_of(page) {
            return refuse(format!("its offset is not a multiple of the file's page size {page:#x}"));
        }
        // munmap of hugetlb wants whole hugepages, so map whole ones (their files have no part of one).
        let mapped = spec.size.checked_next_multiple_of(page).filter(|_| page > base_page());
        let Ok(len) = usize::try_from(mapped.unwrap_or(spec.size)) else {
            return refuse("it does not fit into our address space".into());
        };

        let Some(share) = Share::take(len as u64) else {
            return refuse(format!("all guests together would have more than {MAPPED_LIMIT:#x} bytes mapped"));
        };
        let map = MmapRegion::from_file(FileOffset::from_arc(file, spec.offset), len)
            .map_err(|source| error(format!("cannot be mapped read-write: {source}")))?;
        let watch = Watch::over(map.as_ptr() as usize, map.len(), page as usize);
        Ok(Self { identity, watch, map, huge: page > base_page(), _share: share })
    }

    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// All of it.
    pub(super) fn host(&self) -> HostRange {
        let spec = &self.identity.spec;
        HostRange::new(self.map.as_ptr(), spec.size as usize)
    }

    pub(super) fn is_huge(&self) -> bool {
        self.huge
    }

    pub(super) fn is_dead(&self) -> bool {
        self.watch.is_dead()
    }
}

/// Granularity of ordinary mappings.
pub(super) fn base_page() -> u64 {
    // SAFETY: no preconditions. Linux always has an answer.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as u64 }
}

/// The granularity a file is mapped with. Only hugetlbfs has its own: other file systems report
/// a transfer size in st_blksize (tmpfs that of a transparent hugepage).
fn page_size(file: &File, blksize: u64) -> u64 {
    const HUGETLBFS_MAGIC: i64 = 0x958458f6;
    match fstatfs(file) {
        #[allow(clippy::unnecessary_cast)] // f_type differs between libc flavours
        Ok(stat) if stat.f_type as i64 == HUGETLBFS_MAGIC && blksize.is_power_of_two() => blksize,
        _ => base_page(),
    }
}
