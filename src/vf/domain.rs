//! A DMA domain of a VF's own: what it finds in memory is EAL's, and its own guest's, and no other guest's.
//!
//! The order is VFIO's: IOMMU group → container → maps → probe. DPDK is told of container and group, so that its
//! probe opens the VF there, and finds the container ready: drivers use DMA while they are probed (iavf's mailbox).

use std::ffi::{CString, c_int, c_void};
use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use super::dma::{Container, DmaMap};
use super::{PciAddress, eal, pci};

/// Held by a VF from before its probe until it is removed. Made and given up on the device thread only, as DPDK's
/// table of containers has no lock.
#[derive(Debug)]
pub(super) struct Domain {
    heap: Box<Heap>,
}

/// EAL's memory in a container: EAL tells when it grows and shrinks, in whichever thread asks for memory.
#[derive(Debug)]
struct Heap {
    container: Arc<Container>,
    /// Of the group that is in it; DPDK's.
    group: RawFd,
    /// Of the callback that follows EAL's memory.
    name: CString,
    /// Memory came that could not be mapped.
    short: AtomicBool,
}

impl Domain {
    /// For a VF that is not probed yet. Else why it cannot have one.
    ///
    /// # Errors
    /// [`crate::Error::VfAbsent`] if another process has its IOMMU group.
    pub(super) fn of(address: PciAddress) -> crate::Result<Result<Self, String>> {
        let group = match pci::own_group(address) {
            Ok(group) => group,
            Err(why) => return Ok(Err(why)),
        };
        pci::require_free(address, group)?;
        Ok(Self::over(group, address))
    }

    fn over(group: i32, address: PciAddress) -> Result<Self, String> {
        if !eal::addresses_are_virtual() {
            return Err("EAL uses physical addresses for DMA (--iova-mode=va)".into());
        }
        // SAFETY: takes nothing; on the device thread only.
        let fd = unsafe { dpdk_sys::shim_vfio_container_create() };
        if fd < 0 {
            return Err("DPDK has no VFIO container left, or VFIO none for it; see stderr".into());
        }
        // SAFETY: a container of ours, and a number.
        let bound = unsafe { dpdk_sys::shim_vfio_group_bind(fd, group) };
        let container = match bound {
            0.. => Container::over(fd, bound).map_err(|error| format!("its VFIO container is of no use: {error}")),
            _ => Err(format!("IOMMU group {group} cannot be opened")),
        };
        let made = container.and_then(|container| Self::follow(Arc::new(container), bound, address));
        if made.is_err() {
            close(fd);
        }
        made
    }

    /// Maps what EAL has, and follows what it gets.
    fn follow(container: Arc<Container>, group: RawFd, address: PciAddress) -> Result<Self, String> {
        let name = CString::new(format!("vf_{address}")).expect("no NUL in it");
        let heap = Box::new(Heap { container, group, name, short: AtomicBool::new(false) });
        let arg = heap.as_ref().argument();
        // SAFETY: EAL is initialised. The callback is unregistered before its argument goes. With the lock held nothing
        // comes or goes between walk and registration.
        let (walked, registered) = unsafe {
            dpdk_sys::rte_mcfg_mem_read_lock();
            let walked = dpdk_sys::shim_walk_memory(Some(found), arg);
            let registered = match walked {
                0 => dpdk_sys::rte_mem_event_callback_register(heap.name.as_ptr(), Some(changed), arg),
                _ => 0,
            };
            dpdk_sys::rte_mcfg_mem_read_unlock();
            (walked, registered)
        };
        if walked != 0 {
            return Err("EAL's memory cannot be mapped once more; raise RLIMIT_MEMLOCK".into());
        }
        // Without hugepages it never changes, and EAL says ENOTSUP.
        if registered != 0 && eal::errno() != libc::ENOTSUP {
            return Err(format!("EAL does not tell of its memory: errno {}", eal::errno()));
        }
        Ok(Self { heap })
    }

    /// The file of its IOMMU group.
    pub(super) fn group(&self) -> RawFd {
        self.heap.group
    }

    /// All of EAL's memory is mapped.
    pub(super) fn is_whole(&self) -> bool {
        !self.heap.short.load(Relaxed)
    }

    /// Lets the VF read these pages of its guest, and write them, too.
    pub(super) fn map(&self, pages: Range<usize>, writable: bool) -> std::io::Result<DmaMap> {
        DmaMap::new(&self.heap.container, pages, writable)
    }
}

impl Domain {
    /// The VF is about to be removed: follows EAL's memory no more.
    pub(super) fn end(&mut self) {
        // SAFETY: registered with these, or never, or not any more.
        unsafe { dpdk_sys::rte_mem_event_callback_unregister(self.heap.name.as_ptr(), self.heap.argument()) };
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        self.end();
        match Arc::strong_count(&self.heap.container) {
            1 => close(self.heap.container.fd()),
            // Its number stays taken, so that what unmaps later unmaps nothing of others.
            maps => tracing::error!(maps = maps - 1, "DMA maps of a guest are left in the domain of a VF that is gone"),
        }
    }
}

fn close(fd: c_int) {
    // SAFETY: a container of ours, on the device thread.
    unsafe { dpdk_sys::shim_vfio_container_destroy(fd) };
}

impl Heap {
    fn argument(&self) -> *mut c_void {
        std::ptr::from_ref(self).cast_mut().cast()
    }

    /// A page at a time, as they are given back. Ordinary ones are too many for that, and never given back.
    fn map(&self, piece: Range<usize>, page: usize) -> std::io::Result<()> {
        const HUGE: usize = 2 << 20;
        let step = if page < HUGE { piece.len() } else { page };
        piece.clone().step_by(step).try_for_each(|start| self.container.map(start..start + step, true))
    }
}

/// # Safety
/// `arg` is a [`Heap`] that is alive.
unsafe fn heap_of<'a>(arg: *mut c_void) -> &'a Heap {
    // SAFETY: as promised; it is shared, and changed by atomics only.
    unsafe { &*arg.cast::<Heap>() }
}

fn piece(start: *const c_void, len: usize) -> (Range<usize>, usize) {
    // SAFETY: EAL's own memory, as EAL says.
    let page = unsafe { dpdk_sys::shim_page_size(start) };
    (start.addr()..start.addr() + len, page)
}

unsafe extern "C" fn found(start: *const c_void, len: usize, arg: *mut c_void) -> c_int {
    let (piece, page) = piece(start, len);
    // SAFETY: called from `follow`, with its heap.
    match unsafe { heap_of(arg) }.map(piece, page) {
        Ok(()) => 0,
        Err(error) => {
            tracing::warn!(%error, "EAL's memory cannot be mapped for a VF");
            -1
        }
    }
}

unsafe extern "C" fn changed(what: dpdk_sys::rte_mem_event, start: *const c_void, len: usize, arg: *mut c_void) {
    let (piece, page) = piece(start, len);
    // SAFETY: registered with the heap, and unregistered before it goes.
    let heap = unsafe { heap_of(arg) };
    if what == dpdk_sys::SHIM_MEM_ALLOC {
        if let Err(error) = heap.map(piece, page) {
            tracing::error!(%error, "EAL's new memory cannot be mapped for a VF; raise RLIMIT_MEMLOCK");
            heap.short.store(true, Relaxed);
        }
    } else if let Err(error) = heap.container.unmap(piece) {
        tracing::warn!(%error, "memory that EAL gives back cannot be unmapped for a VF");
    }
}
