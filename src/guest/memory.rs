//! The table of mapped regions, and the look-up that every guest address goes through.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use super::region::{Identity, Region, base_page};
use super::{Gpa, HostRange, RegionSpec, UserAddr};
use crate::error::{Error, Result};

/// Proof that nothing of a guest's memory is in flight: no lane is out, no device holds a buffer.
/// Unmapping takes it by reference, so nothing else can unmap.
#[derive(Debug)]
pub struct Drained(());

impl Drained {
    /// To be called by whoever holds every lane of the port, drained.
    pub(crate) fn attest() -> Self {
        Self(())
    }
}

/// What a look-up needs to know of a region.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    gpa: u64,
    size: u64,
    host: *mut u8,
}

// SAFETY: as for `HostRange`: an address, not an access.
unsafe impl Send for Span {}
// SAFETY: as above.
unsafe impl Sync for Span {}

impl Span {
    /// Contains no address.
    pub(super) const NONE: Self = Self { gpa: 0, size: 0, host: std::ptr::null_mut() };

    /// The part of `gpa..gpa + len` from `gpa` to the end of the region.
    #[inline]
    pub(super) fn clip(&self, gpa: Gpa, len: u64) -> Option<HostRange> {
        let offset = gpa.0.wrapping_sub(self.gpa);
        if offset >= self.size {
            return None;
        }
        // Both fit: size is that of a mapping.
        let len = len.min(self.size - offset) as usize;
        let host = self.host.wrapping_add(offset as usize);
        Some(HostRange::new(host, len))
    }

    /// `gpa..gpa + len`, if the region has all of it.
    #[inline(always)]
    pub(super) fn whole(&self, gpa: Gpa, len: u64) -> Option<HostRange> {
        let offset = gpa.0.wrapping_sub(self.gpa);
        if offset >= self.size || len > self.size - offset {
            return None;
        }
        Some(HostRange::new(self.host.wrapping_add(offset as usize), len as usize))
    }
}

/// An immutable table of mapped regions. A changed table is a new `GuestMemory` that shares the
/// mappings of the regions that stay.
#[derive(Debug)]
pub struct GuestMemory {
    /// By guest physical address, in the order of `regions`.
    spans: Box<[Span]>,
    regions: Vec<Arc<Region>>,
    /// Most bytes of all regions together, in this table and in those made from it.
    limit: u64,
}

impl GuestMemory {
    /// Most bytes of a table, unless somebody says otherwise: 1 TiB.
    pub const DEFAULT_LIMIT: u64 = 1 << 40;

    /// A table without regions.
    pub fn empty() -> Arc<Self> {
        Self::limited(Self::DEFAULT_LIMIT)
    }

    /// A table without regions, that may grow to so many bytes: mapping costs a front end nothing (its file may
    /// be one big hole), and takes addresses from all others.
    pub fn limited(limit: u64) -> Arc<Self> {
        Arc::new(Self { spans: Box::default(), regions: Vec::new(), limit })
    }

    /// The table after SET_MEM_TABLE. A region equal to one of ours (same inode, offset, length and
    /// addresses) keeps our mapping and its new fd is closed.
    ///
    /// # Errors
    /// [`Error::Memory`] if a region is empty, wraps, overlaps another, is not a regular file, is
    /// longer than its file, is not aligned to the file's page size, or cannot be mapped, or if all
    /// together are more than the limit. Nothing has changed then.
    pub fn replaced<F: Into<Arc<File>>>(&self, regions: Vec<(RegionSpec, F)>) -> Result<Arc<Self>> {
        self.allow(regions.iter().map(|(spec, _)| spec.size))?;
        let regions =
            regions.into_iter().map(|(spec, file)| self.keep_or_map(spec, file.into())).collect::<Result<Vec<_>>>()?;
        self.table(regions)
    }

    /// The table after ADD_MEM_REG.
    ///
    /// # Errors
    /// As [`Self::replaced`].
    pub fn with<F: Into<Arc<File>>>(&self, region: RegionSpec, file: F) -> Result<Arc<Self>> {
        let ours = self.regions.iter().map(|ours| ours.identity().spec.size);
        self.allow(ours.chain([region.size]))?;
        // Not `keep_or_map`: adding the same region twice is an overlap.
        let added = Arc::new(Region::map(region, file.into())?);
        let mut regions = self.regions.clone();
        regions.push(added);
        self.table(regions)
    }

    /// The table after REM_MEM_REG (matched by gpa, user address and size).
    ///
    /// # Errors
    /// [`Error::Memory`] if there is no such region.
    pub fn without(&self, region: &RegionSpec) -> Result<Arc<Self>> {
        let found = self.regions.iter().position(|ours| {
            let ours = &ours.identity().spec;
            (ours.gpa, ours.user, ours.size) == (region.gpa, region.user, region.size)
        });
        let Some(found) = found else {
            return Err(Error::Memory(format!(
                "no region at {:?}, {:?} with {:#x} bytes to remove",
                region.gpa, region.user, region.size
            )));
        };
        let mut regions = self.regions.clone();
        regions.remove(found);
        self.table(regions)
    }

    /// Whether `newer` lacks a region of ours: then switching to it needs [`Drained`], else paused
    /// lanes are enough.
    pub fn loses_regions_in(&self, newer: &Self) -> bool {
        // Both are in the order of their addresses.
        let mut newer = newer.regions.iter();
        !self.regions.iter().all(|ours| newer.any(|new| Arc::ptr_eq(ours, new)))
    }

    /// Gives the table back. Regions no other table shares are unmapped.
    pub fn release(self: Arc<Self>, _proof: &Drained) {
        drop(self);
    }

    /// The mapped piece that starts at `gpa`, clipped to `len` and to the end of its region;
    /// `None` if `gpa` is in no region. The caller checks the returned length.
    pub fn translate(&self, gpa: Gpa, len: u64) -> Option<HostRange> {
        self.span(gpa)?.clip(gpa, len)
    }

    /// As [`Self::translate`], for the front end's addresses, and only if all of `len` is contiguous.
    pub fn translate_user(&self, user: UserAddr, len: u64) -> Option<HostRange> {
        self.regions.iter().find_map(|region| {
            let spec = &region.identity().spec;
            let offset = user.0.checked_sub(spec.user.0)?;
            let fits = offset < spec.size && len <= spec.size - offset;
            fits.then(|| region.host().after(offset as usize).first(len as usize))
        })
    }

    /// The whole pages of its regions, or of those on hugepages only, in pieces of at most `most` bytes (whole pages,
    /// too): what a device may be given.
    pub fn pieces(&self, huge_only: bool, most: usize) -> Vec<Range<usize>> {
        let page = base_page() as usize;
        let given = self.regions.iter().filter(|region| region.is_huge() || !huge_only);
        given
            .flat_map(|region| {
                let (start, len) = (region.host().as_ptr().addr(), region.host().len() / page * page);
                (0..len).step_by(most).map(move |at| start + at..start + len.min(at + most))
            })
            .collect()
    }

    /// Whether a region's file was truncated under us (see the SIGBUS handler). One relaxed load a region.
    pub fn is_dead(&self) -> bool {
        self.regions.iter().any(|region| region.is_dead())
    }

    /// The regions, as the front end described them.
    pub fn regions(&self) -> Vec<RegionSpec> {
        let spec = |region: &Arc<Region>| region.identity().spec;
        self.regions.iter().map(spec).collect()
    }

    /// The region that contains `gpa`.
    pub(super) fn span(&self, gpa: Gpa) -> Option<Span> {
        let behind = self.spans.partition_point(|span| span.gpa <= gpa.0);
        let span = self.spans[..behind].last()?;
        (gpa.0 - span.gpa < span.size).then_some(*span)
    }

    /// Before anything is mapped.
    fn allow(&self, sizes: impl Iterator<Item = u64>) -> Result<()> {
        let sum = sizes.fold(0, u64::saturating_add);
        if sum > self.limit {
            return Err(Error::Memory(format!(
                "the regions have {sum} bytes together; at most {} are mapped for one guest (--guest-memory)",
                self.limit
            )));
        }
        Ok(())
    }

    fn keep_or_map(&self, spec: RegionSpec, file: Arc<File>) -> Result<Arc<Region>> {
        let identity = Identity::of(spec, &file)?;
        let kept = self.regions.iter().find(|ours| {
            // A dead region is not worth keeping: its file may have been repaired.
            *ours.identity() == identity && !ours.is_dead()
        });
        match kept {
            Some(region) => Ok(region.clone()),
            None => Ok(Arc::new(Region::map(spec, file)?)),
        }
    }

    fn table(&self, mut regions: Vec<Arc<Region>>) -> Result<Arc<Self>> {
        let overlap = |regions: &[Arc<Region>], start: fn(&RegionSpec) -> u64, space| {
            let specs = regions.windows(2).map(|pair| {
                let [a, b] = pair else { unreachable!() };
                (a.identity().spec, b.identity().spec)
            });
            // Ends cannot wrap: checked when the region was mapped.
            match { specs }.find(|(a, b)| start(a) + a.size > start(b)) {
                Some((a, b)) => Err(Error::Memory(format!("regions {a:x?} and {b:x?} overlap in {space} addresses"))),
                None => Ok(()),
            }
        };
        let user = |spec: &RegionSpec| spec.user.0;
        regions.sort_by_key(|region| user(&region.identity().spec));
        overlap(&regions, user, "front-end")?;
        let gpa = |spec: &RegionSpec| spec.gpa.0;
        regions.sort_by_key(|region| gpa(&region.identity().spec));
        overlap(&regions, gpa, "guest physical")?;

        let span = |region: &Arc<Region>| Span {
            gpa: region.identity().spec.gpa.0,
            size: region.identity().spec.size,
            host: region.host().as_ptr(),
        };
        Ok(Arc::new(Self { spans: regions.iter().map(span).collect(), regions, limit: self.limit }))
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;
    use crate::guest::{GuestStore, View, install_sigbus_handler};

    const PAGE: u64 = 4096;

    fn memfd(len: u64) -> File {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, len).unwrap();
        file
    }

    fn spec(gpa: u64, size: u64, offset: u64) -> RegionSpec {
        RegionSpec { gpa: Gpa(gpa), size, user: UserAddr(0x7000_0000_0000 + gpa), offset }
    }

    fn refused(spec: RegionSpec, file: File) -> String {
        match GuestMemory::empty().with(spec, file) {
            Err(error) => error.to_string(),
            Ok(memory) => panic!("{spec:x?} was mapped: {memory:?}"),
        }
    }

    #[test]
    fn look_ups_end_where_regions_end() {
        let file = Arc::new(memfd(8 * PAGE));
        let regions = vec![
            (spec(0x10_0000, 4 * PAGE, 4 * PAGE), file.clone()),
            (spec(0, 2 * PAGE, 0), file.clone()),
            (spec(2 * PAGE, PAGE, 2 * PAGE), file),
        ];
        let memory = GuestMemory::empty().replaced(regions).unwrap();
        let mut view = View::new(memory.clone());
        let cases = [
            (0, 1, Some(1)),
            (0, u64::MAX, Some(2 * PAGE)),
            (2 * PAGE - 1, 2, Some(1)),
            (2 * PAGE, 2, Some(2)),
            (3 * PAGE - 1, 9, Some(1)),
            (3 * PAGE, 1, None),
            (0x10_0000 - 1, 1, None),
            (0x10_0000, 16, Some(16)),
            (0x10_0000 + 4 * PAGE, 0, None),
            (u64::MAX, 1, None),
            (u64::MAX, u64::MAX, None),
        ];
        for (gpa, len, expected) in cases {
            let found = memory.translate(Gpa(gpa), len).map(|r| r.len() as u64);
            assert_eq!(found, expected, "{gpa:#x}, {len:#x}");
            let viewed = view.translate(Gpa(gpa), len);
            assert_eq!(viewed.map(|r| r.len() as u64), expected, "{gpa:#x}, {len:#x}");
            assert_eq!(viewed.map(|r| r.as_ptr()), memory.translate(Gpa(gpa), len).map(|r| r.as_ptr()));
        }
        let user = |gpa: u64, len| memory.translate_user(UserAddr(0x7000_0000_0000 + gpa), len);
        assert_eq!(user(PAGE, PAGE).map(|r| r.as_ptr()), memory.translate(Gpa(PAGE), PAGE).map(|r| r.as_ptr()));
        assert!(user(PAGE, PAGE + 1).is_none(), "spans regions");
        assert!(user(3 * PAGE, 1).is_none());
        assert!(memory.translate_user(UserAddr(0), 1).is_none());
        assert!(GuestMemory::empty().translate(Gpa(0), 1).is_none());
    }

    #[test]
    fn tables_share_the_regions_that_stay() {
        let file = memfd(8 * PAGE);
        let again = |file: &File| file.try_clone().unwrap();
        let (low, high) = (spec(0, PAGE, 0), spec(PAGE, PAGE, PAGE));
        let first = GuestMemory::empty().with(low, again(&file)).unwrap();
        let second = first.replaced(vec![(low, again(&file)), (high, again(&file))]).unwrap();
        assert!(!first.loses_regions_in(&second));
        assert!(second.loses_regions_in(&first));
        let ptr = |memory: &GuestMemory| memory.translate(Gpa(0), 1).unwrap().as_ptr();
        assert_eq!(ptr(&first), ptr(&second));

        // The same numbers over another file are other memory.
        let other = first.replaced(vec![(low, memfd(PAGE))]).unwrap();
        assert!(first.loses_regions_in(&other));
        assert_ne!(ptr(&first), ptr(&other));

        let third = second.without(&low).unwrap();
        assert_eq!(third.regions(), [high]);
        assert!(second.loses_regions_in(&third));
        assert!(third.without(&low).is_err());
        assert!(second.with(low, again(&file)).is_err(), "twice");

        first.release(&Drained::attest());
        assert_eq!(ptr(&second), second.translate(Gpa(0), 1).unwrap().as_ptr());
        assert!(second.translate(Gpa(0), PAGE).is_some());
    }

    #[test]
    fn a_device_is_given_whole_pages_and_by_default_no_ordinary_ones() {
        let file = memfd(8 * PAGE);
        let again = || file.try_clone().unwrap();
        let odd = RegionSpec { size: PAGE + 5, ..spec(16 * PAGE, PAGE, 5 * PAGE) };
        let memory = GuestMemory::empty().replaced(vec![(spec(0, 5 * PAGE, 0), again()), (odd, again())]).unwrap();
        let at = |gpa: u64| memory.translate(Gpa(gpa), 1).unwrap().as_ptr().addr();
        let page = PAGE as usize;
        let (low, high) = (at(0), at(16 * PAGE));
        let starts = [(low, 2), (low + 2 * page, 2), (low + 4 * page, 1), (high, 1)];
        assert_eq!(memory.pieces(false, 2 * page), starts.map(|(start, pages)| start..start + pages * page));
        assert!(memory.pieces(true, 2 * page).is_empty());
    }

    #[test]
    fn bad_regions_are_refused() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let pipe = File::from(std::os::fd::OwnedFd::from(reader));
        assert!(refused(spec(0, PAGE, 0), pipe).contains("not a regular file"));
        let directory = File::open("/tmp").unwrap();
        assert!(refused(spec(0, PAGE, 0), directory).contains("not a regular file"));
        let zero = File::open("/dev/zero").unwrap();
        assert!(refused(spec(0, PAGE, 0), zero).contains("not a regular file"));
        assert!(refused(spec(0, 0, 0), memfd(PAGE)).contains("no bytes"));
        assert!(refused(spec(0, 2 * PAGE, 0), memfd(PAGE)).contains("ends at 0x2000"));
        assert!(refused(spec(0, PAGE, PAGE), memfd(PAGE)).contains("ends at 0x2000"));
        assert!(refused(spec(0, PAGE, 512), memfd(2 * PAGE)).contains("page size 0x1000"));
        assert!(refused(spec(0, PAGE, u64::MAX), memfd(PAGE)).contains("wraps"));
        let top = RegionSpec { gpa: Gpa(u64::MAX), ..spec(0, PAGE, 0) };
        assert!(refused(top, memfd(PAGE)).contains("wraps"));
        let read_only = File::open("/proc/self/exe").unwrap();
        assert!(refused(spec(0, PAGE, 0), read_only).contains("read-write"));

        let file = memfd(8 * PAGE);
        let table = |a: RegionSpec, b: RegionSpec| {
            let file = || file.try_clone().unwrap();
            GuestMemory::empty().replaced(vec![(a, file()), (b, file())])
        };
        let low = spec(0, 2 * PAGE, 0);
        let gpa_overlap = RegionSpec { user: UserAddr(0), ..spec(PAGE, PAGE, 0) };
        assert!(table(low, gpa_overlap).unwrap_err().to_string().contains("guest physical"));
        let user_overlap = RegionSpec { gpa: Gpa(0x10_0000), ..spec(PAGE, PAGE, 0) };
        assert!(table(low, user_overlap).unwrap_err().to_string().contains("front-end"));
    }

    #[test]
    fn a_table_is_no_longer_than_its_limit() {
        let file = memfd(8 * PAGE);
        let again = || file.try_clone().unwrap();
        let at = |page: u64| spec(page * PAGE, PAGE, page * PAGE);
        let empty = GuestMemory::limited(3 * PAGE);
        let two = empty.replaced(vec![(at(0), again()), (at(1), again())]).unwrap();
        let three = two.with(at(2), again()).unwrap();
        assert!(three.with(at(3), again()).unwrap_err().to_string().contains("at most 12288"));
        let four = (0..4).map(|page| (at(page), again())).collect();
        assert!(three.replaced(four).unwrap_err().to_string().contains("16384 bytes together"));
        // What is gone makes room.
        assert!(three.without(&at(0)).unwrap().with(at(3), again()).is_ok());
        assert!(three.replaced(vec![(spec(0, 3 * PAGE, 0), again())]).is_ok());
        // Sums that wrap are no way around it.
        let huge = |gpa| (RegionSpec { gpa: Gpa(gpa), ..spec(0, 1 << 63, 0) }, again());
        assert!(empty.replaced(vec![huge(0), huge(1)]).unwrap_err().to_string().contains("together"));
    }

    #[test]
    fn a_truncated_file_kills_its_region_and_nothing_else() {
        install_sigbus_handler();
        install_sigbus_handler();
        let (file, other) = (memfd(4 * PAGE), memfd(PAGE));
        let memory = GuestMemory::empty().with(spec(0, 4 * PAGE, 0), file.try_clone().unwrap()).unwrap();
        let healthy = GuestMemory::empty().with(spec(0, PAGE, 0), other).unwrap();
        let (mut view, mut healthy_view) = (View::new(memory.clone()), View::new(healthy.clone()));

        let range = memory.translate(Gpa(0), u64::MAX).unwrap();
        let [first, third] = [0, 2 * PAGE as usize];
        let read = |at: usize| {
            let mut bytes = [0xff; 8];
            // SAFETY: `memory` is alive, and `at + 8` within the region.
            unsafe { range.read_into(at, &mut bytes) };
            bytes
        };
        // SAFETY: as above.
        let write = |at: usize| unsafe { GuestStore.bytes(&range, at, b"abcdefgh") };
        write(first);
        write(third);
        assert_eq!(read(third), *b"abcdefgh");
        assert!(!view.is_dead() && !memory.is_dead());

        ftruncate(&file, PAGE).unwrap();
        assert_eq!(read(third), [0; 8]);
        assert!(view.is_dead() && memory.is_dead());
        assert!(!healthy_view.is_dead() && !healthy.is_dead());
        // Backwards, so that each access meets its own fault; what is still in the file stays.
        write(PAGE as usize);
        assert_eq!(read(PAGE as usize), *b"abcdefgh");
        assert_eq!(read(first), *b"abcdefgh");
        assert!(view.is_dead());

        // Mapped anew when the front end sends it again.
        ftruncate(&file, 4 * PAGE).unwrap();
        let anew = memory.replaced(vec![(spec(0, 4 * PAGE, 0), file)]).unwrap();
        assert!(!anew.is_dead() && memory.loses_regions_in(&anew));
    }
}
