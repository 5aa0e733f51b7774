//! A file behind guest memory may be truncated under us; see [`install`].
//!
//! A front end can shrink the file of a mapped region at any time, and hugetlb can run out at the
//! first touch of a page. The access that finds out is a load or store anywhere in the daemon, and
//! cannot return an error. So the handler makes it succeed on private zero pages and leaves a note.

use std::mem::MaybeUninit;
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering, fence};

use libc::{c_int, c_void, siginfo_t};

/// One watched address range. Slots are linked once, never unlinked or freed, and used again:
/// the handler may walk the list at any moment.
#[derive(Debug)]
struct Slot {
    taken: AtomicBool,
    /// 0 while the slot says nothing.
    start: AtomicUsize,
    end: AtomicUsize,
    page: AtomicUsize,
    dead: AtomicBool,
    next: AtomicPtr<Slot>,
}

static SLOTS: AtomicPtr<Slot> = AtomicPtr::new(ptr::null_mut());
static DEATHS: AtomicUsize = AtomicUsize::new(0);

/// All slots.
fn slots() -> impl Iterator<Item = &'static Slot> {
    let mut at = &SLOTS;
    std::iter::from_fn(move || {
        // SAFETY: a linked slot was leaked from a Box: valid for ever, never `&mut` again.
        let slot = unsafe { at.load(Ordering::Acquire).as_ref() }?;
        at = &slot.next;
        Some(slot)
    })
}

impl Slot {
    /// A free slot, which is now the caller's.
    fn take() -> &'static Self {
        let free = slots().find(|slot| !slot.taken.swap(true, Ordering::Acquire));
        free.unwrap_or_else(|| {
            let slot: &'static Slot = Box::leak(Box::new(Slot {
                taken: AtomicBool::new(true),
                start: AtomicUsize::new(0),
                end: AtomicUsize::new(0),
                page: AtomicUsize::new(0),
                dead: AtomicBool::new(false),
                next: AtomicPtr::new(ptr::null_mut()),
            }));
            let link = |head: *mut Slot| {
                slot.next.store(head, Ordering::Relaxed);
                Some(ptr::from_ref(slot).cast_mut())
            };
            // Cannot fail: `link` always answers.
            let _ = SLOTS.fetch_update(Ordering::Release, Ordering::Relaxed, link);
            slot
        })
    }

    /// Start, end and page size, if `address` is watched by this slot. Other threads may reuse the slot
    /// meanwhile, unless the address is truly in it: then its region is in use and cannot go away.
    fn covers(&self, address: usize) -> Option<(usize, usize, usize)> {
        let start = self.start.load(Ordering::Acquire);
        let end = self.end.load(Ordering::Relaxed);
        let page = self.page.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let torn = start == 0 || self.start.load(Ordering::Relaxed) != start;
        (!torn && (start..end).contains(&address)).then_some((start, end, page))
    }
}

/// An address range whose faults are survived. Ends with its drop, which comes before the unmapping.
#[derive(Debug)]
pub(super) struct Watch(&'static Slot);

impl Watch {
    /// Watches the mapping `start..start + len` of pages of `page` bytes.
    pub(super) fn over(start: usize, len: usize, page: usize) -> Self {
        let slot = Slot::take();
        slot.dead.store(false, Ordering::Relaxed);
        slot.page.store(page, Ordering::Relaxed);
        slot.end.store(start + len, Ordering::Relaxed);
        slot.start.store(start, Ordering::Release);
        Self(slot)
    }

    /// Whether a fault happened in it.
    pub(super) fn is_dead(&self) -> bool {
        self.0.dead.load(Ordering::Relaxed)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.start.store(0, Ordering::Relaxed);
        // Whoever sees the slot's next values sees that it was empty in between.
        fence(Ordering::Release);
        self.0.taken.store(false, Ordering::Release);
    }
}

/// Free-running count of faults in watched ranges: as long as it stands still, nothing has died.
#[inline]
pub(super) fn deaths() -> usize {
    DEATHS.load(Ordering::Relaxed)
}

/// Installs the SIGBUS handler: a fault inside a *guest* region maps zero pages over the faulting
/// part and marks the region dead; a fault anywhere else takes the default action.
/// Call once, before the first region is mapped. Idempotent.
pub fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let mut action = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: an all-zero sigaction is valid; the handler has the type SA_SIGINFO asks for and
        // only does what is async-signal-safe.
        let failed = unsafe {
            let action = action.assume_init_mut();
            action.sa_sigaction = on_sigbus as extern "C" fn(_, _, _) as usize;
            // On the stack that std gives each thread, so that it works with little stack left, too.
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(libc::SIGBUS, action, ptr::null_mut())
        };
        assert_eq!(failed, 0, "sigaction(SIGBUS) takes any handler");
    });
}

/// Async-signal-safe: atomics, mmap, sigaction and raise only.
extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel passes a valid siginfo with SA_SIGINFO; errno's place is the thread's own.
    let (sent_by_process, address, errno) = unsafe {
        let info = &*info;
        (info.si_code <= 0, info.si_addr() as usize, libc::__errno_location())
    };
    // SAFETY: as above.
    let saved = unsafe { *errno };
    if sent_by_process || !revive(address) {
        // SAFETY: both are async-signal-safe; the raised signal waits until we return, and then kills.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
    }
    // SAFETY: as above.
    unsafe { *errno = saved };
}

/// Makes the memory at `address` usable, if it is a guest's.
fn revive(address: usize) -> bool {
    let Some((slot, (start, end, page))) = slots().find_map(|slot| Some((slot, slot.covers(address)?))) else {
        return false;
    };
    let from = start + (address - start) / page * page;
    // To the end of the region, so that any number of faults makes at most one more mapping
    // (the kernel limits their number); one page if so much cannot be had.
    if !map_zeroes(from, end - from) && !map_zeroes(from, page) {
        return false;
    }
    slot.dead.store(true, Ordering::Relaxed);
    DEATHS.fetch_add(1, Ordering::Relaxed);
    true
}

fn map_zeroes(start: usize, len: usize) -> bool {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: replaces part of a guest's mapping, which is ours and is only accessed by raw pointers
    // that expect its contents to change at any time.
    let mapped = unsafe { libc::mmap(start as *mut c_void, len, prot, flags, -1, 0) };
    mapped != libc::MAP_FAILED
}
