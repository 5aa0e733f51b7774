//! A VFIO container: the addresses at which a device finds memory (linux/vfio.h), IOVA = VA. And another file to a
//! device, to read its registers.
//!
//! DPDK would map through a container, too (`rte_vfio_container_dma_map`), but it keeps a list of at most 256 maps,
//! which outlives the container, and does not say why a map failed.
#![cfg_attr(not(feature = "dpdk"), allow(dead_code))]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::Arc;

use super::PciAddress;

const CHECK_EXTENSION: libc::c_ulong = 0x3b65;
const SET_IOMMU: libc::c_ulong = 0x3b66;
const GROUP_SET_CONTAINER: libc::c_ulong = 0x3b68;
const GROUP_GET_DEVICE_FD: libc::c_ulong = 0x3b6a;
const DEVICE_GET_REGION_INFO: libc::c_ulong = 0x3b6c;
const MAP_DMA: libc::c_ulong = 0x3b71;
const UNMAP_DMA: libc::c_ulong = 0x3b72;

/// What is mapped by one call is unmapped by one call, and no map is ever cut in two.
const TYPE1V2_IOMMU: libc::c_ulong = 3;

const READ: u32 = 1;
const WRITE: u32 = 2;

/// `struct vfio_iommu_type1_dma_map`
#[repr(C)]
struct Map {
    argsz: u32,
    flags: u32,
    vaddr: u64,
    iova: u64,
    size: u64,
}

/// `struct vfio_iommu_type1_dma_unmap`
#[repr(C)]
struct Unmap {
    argsz: u32,
    flags: u32,
    iova: u64,
    size: u64,
}

/// `struct vfio_region_info`
#[repr(C)]
#[derive(Default)]
struct RegionInfo {
    argsz: u32,
    flags: u32,
    index: u32,
    cap_offset: u32,
    size: u64,
    offset: u64,
}

const _: () = assert!(size_of::<Map>() == 32 && size_of::<Unmap>() == 24 && size_of::<RegionInfo>() == 32);

/// A container's fd. It is DPDK's, which closes it when nobody holds this any more.
#[derive(Debug)]
pub(super) struct Container(RawFd);

impl Container {
    /// Over a fresh container: the IOMMU group of this fd is put into it, and an IOMMU under it. Now it takes maps.
    pub(super) fn over(fd: RawFd, group: RawFd) -> io::Result<Self> {
        let container = Self(fd);
        if container.ask(CHECK_EXTENSION, TYPE1V2_IOMMU)? != 1 {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        // SAFETY: the kernel reads an int.
        answer(unsafe { libc::ioctl(group, GROUP_SET_CONTAINER, &raw const container.0) })?;
        container.ask(SET_IOMMU, TYPE1V2_IOMMU)?;
        Ok(container)
    }

    pub(super) fn fd(&self) -> RawFd {
        self.0
    }

    fn ask(&self, request: libc::c_ulong, number: libc::c_ulong) -> io::Result<i32> {
        // SAFETY: the request takes a number.
        answer(unsafe { libc::ioctl(self.0, request, number) })
    }

    /// Lets the device read these whole pages, and write them, too.
    pub(super) fn map(&self, pages: Range<usize>, writable: bool) -> io::Result<()> {
        let (start, size) = (pages.start as u64, pages.len() as u64);
        let flags = if writable { READ | WRITE } else { READ };
        let map = Map { argsz: size_of::<Map>() as u32, flags, vaddr: start, iova: start, size };
        // SAFETY: the kernel reads a struct of that layout. A device reaches the pages from now on: those that are not
        // EAL's are a guest's, of which we have no references.
        answer(unsafe { libc::ioctl(self.0, MAP_DMA, &raw const map) }).map(|_| ())
    }

    /// The reverse, for whole maps.
    pub(super) fn unmap(&self, pages: Range<usize>) -> io::Result<()> {
        let (iova, size) = (pages.start as u64, pages.len() as u64);
        let mut unmap = Unmap { argsz: size_of::<Unmap>() as u32, flags: 0, iova, size };
        // SAFETY: the kernel reads and writes a struct of that layout.
        answer(unsafe { libc::ioctl(self.0, UNMAP_DMA, &raw mut unmap) })?;
        if unmap.size == size { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ENOENT)) }
    }
}

/// Another file to a device that is open already. It is to be closed before DPDK closes its own: the kernel resets a device
/// and lets its group go when the last one is closed.
pub(super) fn device(group: RawFd, address: PciAddress) -> io::Result<File> {
    let name = CString::new(address.to_string()).expect("no NUL in it");
    // SAFETY: the kernel reads a NUL-terminated string.
    let fd = answer(unsafe { libc::ioctl(group, GROUP_GET_DEVICE_FD, name.as_ptr()) })?;
    // SAFETY: the kernel made it just now, for us.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Where in such a file BAR 0 begins.
pub(super) fn first_region(device: &File) -> io::Result<u64> {
    let mut info = RegionInfo { argsz: size_of::<RegionInfo>() as u32, ..RegionInfo::default() };
    // SAFETY: the kernel reads and writes a struct of that layout.
    answer(unsafe { libc::ioctl(device.as_raw_fd(), DEVICE_GET_REGION_INFO, &raw mut info) })?;
    Ok(info.offset)
}

fn answer(rc: i32) -> io::Result<i32> {
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(rc) }
}

/// Memory of a guest that a device may read, and write if asked for, as long as this lives. Whoever drops it knows that nothing is in flight
/// there, as for unmapping it; and does so before it is unmapped.
#[derive(Debug)]
pub struct DmaMap {
    container: Arc<Container>,
    pages: Range<usize>,
}

impl DmaMap {
    pub(super) fn new(container: &Arc<Container>, pages: Range<usize>, writable: bool) -> io::Result<Self> {
        container.map(pages.clone(), writable)?;
        Ok(Self { container: Arc::clone(container), pages })
    }

    /// Where.
    pub fn pages(&self) -> &Range<usize> {
        &self.pages
    }
}

impl Drop for DmaMap {
    fn drop(&mut self) {
        // It has gone already if the device was removed before: its group's last one takes all maps along.
        if let Err(error) = self.container.unmap(self.pages.clone()) {
            tracing::debug!(pages = ?self.pages, %error, "a DMA map of guest memory is gone already");
        }
    }
}
