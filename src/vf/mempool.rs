//! Pools of mbufs, most with mempool ops of our own.
//!
//! A **receive pool** is a LIFO of the free mbufs of *one* receive queue, without a per-lcore cache.
//! Ownership rule: it belongs to whoever owns the queue. The driver gets from it inside `rx_burst`
//! and at queue set-up, and puts into it at stop and close; a lane puts into it when it drops a
//! received frame. The lane's core does that while it has the lane; the port thread does while the
//! lane is home. Handing the lane over hands the pool over, and orders the accesses. There is no
//! lock; debug builds panic when two threads are inside at once. Some of its mbufs may point to buffers that the guest
//! has posted: those are handed out first, in order, and get their own buffer back when they are put.
//!
//! A **send pool** is an ordinary `rte_pktmbuf_pool` (ring, per-lcore caches): the driver may
//! free a sent mbuf on any thread. net_ring hands it to whoever polls the other end.
//!
//! A **pool of shells** belongs to one transmit queue whose driver frees what it has sent on the
//! thread that sends, and in time (see [`super::zero_copy`]). It has our ops and the same owner rule as a
//! receive pool. Its mbufs are pointed into guest memory; when one comes back, it is counted: so the driver's put *is*
//! the completion queue. What is copied is in mbufs of the send pool also there: their way is shorter.

use std::ffi::{CString, c_int, c_uint, c_void};
use std::mem;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use arrayvec::ArrayVec;
use dpdk_sys::{rte_mempool, rte_mempool_ops, rte_pktmbuf_pool_private};

use super::eal::errno;
use super::mbuf::{LENT_PRIV, Mbuf};
use crate::error::{Error, Result};
use crate::ring::BURST;

/// One struct for every pool of ours: Debian's plug-ins leave 2 of a process's 16 places free.
const OPS_NAME: &[u8] = b"virtio_forwarder\0";

/// Mbufs of a send pool that a core keeps to itself. Each pool pays 8 KiB × RTE_MAX_LCORE for its caches.
pub(super) const SEND_CACHE: u32 = 64;

/// Registers our ops. After `rte_eal_init`, once.
pub(super) fn register_ops() -> Result<()> {
    let mut ops = rte_mempool_ops {
        alloc: Some(alloc),
        enqueue: Some(put),
        dequeue: Some(get),
        get_count: Some(count),
        ..Default::default()
    };
    for (to, from) in ops.name.iter_mut().zip(OPS_NAME) {
        *to = from.cast_signed();
    }
    // SAFETY: DPDK copies the struct; its functions live as long as the process.
    match unsafe { dpdk_sys::rte_mempool_register_ops(&ops) } {
        rc if rc >= 0 => Ok(()),
        rc if rc == -libc::ENOSPC => Err(Error::Exhausted(
            "all of DPDK's mempool ops places are taken; let EAL load fewer plug-ins (--eal-arg=-d)".into(),
        )),
        rc => Err(Error::Dpdk {
            call: "rte_mempool_register_ops",
            subject: "the receive pools".into(),
            errno: -rc,
            hint: "this is a defect of virtio-forwarder",
        }),
    }
}

/// The free mbufs of a pool with our ops.
#[derive(Debug)]
pub(super) struct Stack {
    free: Box<[*mut c_void]>,
    len: usize,
    /// Those that did and came back, ever, modulo 2^32.
    returned: u32,
    /// Of a receive pool: mbufs that point to buffers of the guest, oldest first. They are handed out before others;
    /// so many of them were.
    posted: ArrayVec<*mut c_void, { 2 * BURST }>,
    handed: usize,
    /// Mbufs that the driver has, and how many of them are the guest's; modulo 2^32, since not every driver's are counted
    /// when they leave it: see [`Self::received`].
    out: u32,
    out_of_guest: u32,
    /// Debug builds: the thread inside, or 0.
    user: AtomicU64,
}

impl Stack {
    fn new(capacity: usize) -> Self {
        Self {
            free: vec![ptr::null_mut(); capacity].into_boxed_slice(),
            len: 0,
            returned: 0,
            posted: ArrayVec::new(),
            handed: 0,
            out: 0,
            out_of_guest: 0,
            user: AtomicU64::new(0),
        }
    }

    /// Gives one mbuf back.
    ///
    /// # Safety
    /// `stack` is live, the caller owns it by the rule above, and `mbuf` came from its pool, once.
    #[inline]
    pub(super) unsafe fn put_one(stack: NonNull<Self>, mbuf: *mut c_void) {
        // SAFETY: live, and exclusively ours for the duration of the call.
        let stack = unsafe { &mut *stack.as_ptr() };
        stack.exclusively(|stack| {
            // The bound is checked in release builds too: beyond it lies a double free.
            stack.free[stack.len] = mbuf;
            stack.len += 1;
        });
    }

    /// Takes one mbuf, as it was put: with one segment, no next, and one reference.
    ///
    /// # Safety
    /// As [`Self::put_one`].
    #[inline]
    pub(super) unsafe fn get_one(stack: NonNull<Self>) -> Option<NonNull<c_void>> {
        // SAFETY: live, and exclusively ours for the duration of the call.
        let stack = unsafe { &mut *stack.as_ptr() };
        stack.exclusively(|stack| {
            stack.len = stack.len.checked_sub(1)?;
            NonNull::new(stack.free[stack.len])
        })
    }

    /// Lent mbufs that came back, ever, modulo 2^32.
    ///
    /// # Safety
    /// As [`Self::put_one`].
    #[inline]
    pub(super) unsafe fn returned(stack: NonNull<Self>) -> u32 {
        // SAFETY: live, and the caller owns it.
        unsafe { (*stack.as_ptr()).returned }
    }

    /// Points a free mbuf to the `len` bytes at `data`, behind a headroom that is not there, and hands it out next, after
    /// those posted before. `false`: too many are, or none is free.
    ///
    /// # Safety
    /// As [`Self::put_one`], of a pool with [`LENT_PRIV`]; the memory stays until the mbuf is back or withdrawn.
    #[inline]
    pub(super) unsafe fn post(stack: NonNull<Self>, data: *mut u8, len: usize) -> bool {
        // SAFETY: live, and exclusively ours for the duration of the call.
        let stack = unsafe { &mut *stack.as_ptr() };
        stack.exclusively(|stack| {
            if stack.posted.is_full() {
                stack.posted.drain(..std::mem::take(&mut stack.handed));
            }
            if stack.len == 0 || stack.posted.is_full() {
                return false;
            }
            stack.len -= 1;
            let mbuf = stack.free[stack.len];
            // SAFETY: free, so ours alone.
            unsafe { Mbuf::new(mbuf.cast()).place(data, len) };
            stack.posted.push(mbuf);
            true
        })
    }

    /// Takes the posted mbufs back. How many.
    ///
    /// # Safety
    /// As [`Self::post`].
    pub(super) unsafe fn withdraw(stack: NonNull<Self>) -> usize {
        // SAFETY: live, and exclusively ours for the duration of the call.
        let stack = unsafe { &mut *stack.as_ptr() };
        stack.exclusively(|stack| {
            let handed = std::mem::take(&mut stack.handed);
            let before = stack.len;
            for mbuf in stack.posted.drain(..).skip(handed) {
                // SAFETY: not handed out, so ours alone.
                unsafe { Mbuf::new(mbuf.cast()).restore() };
                stack.free[stack.len] = mbuf;
                stack.len += 1;
            }
            stack.len - before
        })
    }

    /// Posted mbufs that were not handed out.
    ///
    /// # Safety
    /// As [`Self::put_one`].
    #[inline]
    pub(super) unsafe fn waiting(stack: NonNull<Self>) -> usize {
        // SAFETY: live, and the caller owns it.
        unsafe { (*stack.as_ptr()).posted.len() - (*stack.as_ptr()).handed }
    }

    /// The driver has handed over frames in so many mbufs, some of them of the guest.
    ///
    /// # Safety
    /// As [`Self::put_one`].
    #[inline]
    pub(super) unsafe fn received(stack: NonNull<Self>, mbufs: usize, of_guest: usize) {
        // SAFETY: live, and exclusively ours for the duration of the call.
        let stack = unsafe { &mut *stack.as_ptr() };
        stack.out = stack.out.wrapping_sub(mbufs as u32);
        stack.out_of_guest = stack.out_of_guest.wrapping_sub(of_guest as u32);
    }

    /// What the driver has, and how many of these are the guest's, if [`Self::received`] was told of all that it handed over.
    ///
    /// # Safety
    /// As [`Self::put_one`].
    #[inline]
    pub(super) unsafe fn out(stack: NonNull<Self>) -> (usize, usize) {
        // SAFETY: live, and the caller owns it.
        unsafe { ((*stack.as_ptr()).out as usize, (*stack.as_ptr()).out_of_guest as usize) }
    }

    fn put_all(&mut self, mbufs: &[*mut c_void]) {
        self.exclusively(|stack| {
            let before = stack.returned;
            for &mbuf in mbufs {
                // SAFETY: free, so ours alone.
                stack.returned = stack.returned.wrapping_add(unsafe { Mbuf::new(mbuf.cast()).restore() }.into());
            }
            stack.out = stack.out.wrapping_sub(mbufs.len() as u32);
            stack.out_of_guest = stack.out_of_guest.wrapping_sub(stack.returned.wrapping_sub(before));
            match mbufs {
                [one] => stack.free[stack.len] = *one,
                all => stack.free[stack.len..][..all.len()].copy_from_slice(all),
            }
            stack.len += mbufs.len();
        });
    }

    /// Takes all of `into.len()` or none. The one place that decides what a receive queue is given.
    fn get_all(&mut self, into: &mut [*mut c_void]) -> bool {
        self.exclusively(|stack| {
            let posted = (stack.posted.len() - stack.handed).min(into.len());
            let Some(left) = stack.len.checked_sub(into.len() - posted) else {
                return false;
            };
            stack.out = stack.out.wrapping_add(into.len() as u32);
            let (first, others) = into.split_at_mut(posted);
            first.copy_from_slice(&stack.posted[stack.handed..][..posted]);
            stack.handed += posted;
            stack.out_of_guest = stack.out_of_guest.wrapping_add(posted as u32);
            if stack.handed == stack.posted.len() {
                stack.posted.clear();
                stack.handed = 0;
            }
            others.copy_from_slice(&stack.free[left..stack.len]);
            stack.len = left;
            true
        })
    }

    #[inline]
    fn exclusively<T>(&mut self, act: impl FnOnce(&mut Self) -> T) -> T {
        if cfg!(debug_assertions) {
            let me = thread();
            let other = self.user.swap(me, Ordering::Relaxed);
            assert_eq!(other, 0, "threads {me} and {other} are in one receive pool");
        }
        let result = act(self);
        if cfg!(debug_assertions) {
            self.user.store(0, Ordering::Relaxed);
        }
        result
    }
}

fn thread() -> u64 {
    thread_local!(static ME: u64 = rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned().into());
    ME.with(|me| *me)
}

unsafe extern "C" fn alloc(pool: *mut rte_mempool) -> c_int {
    // SAFETY: DPDK passes a live pool; the config is the stack that `Pool::receive` set.
    unsafe { (*pool).__bindgen_anon_1.pool_data = (*pool).pool_config };
    0
}

unsafe fn stack_of<'a>(pool: *const rte_mempool) -> &'a mut Stack {
    // SAFETY: a pool with our ops has a stack, which lives as long as the pool; by the ownership
    // rule nobody else is using it.
    unsafe { &mut *(*pool).__bindgen_anon_1.pool_data.cast::<Stack>() }
}

unsafe extern "C" fn put(pool: *mut rte_mempool, mbufs: *const *mut c_void, n: c_uint) -> c_int {
    // SAFETY: DPDK passes n mbufs of this pool.
    unsafe { stack_of(pool).put_all(std::slice::from_raw_parts(mbufs, n as usize)) };
    0
}

unsafe extern "C" fn get(pool: *mut rte_mempool, mbufs: *mut *mut c_void, n: c_uint) -> c_int {
    // SAFETY: DPDK passes room for n pointers; they are written before they are read, and pointers
    // have no invalid values.
    let got = unsafe { stack_of(pool).get_all(std::slice::from_raw_parts_mut(mbufs, n as usize)) };
    if got { 0 } else { -libc::ENOENT }
}

unsafe extern "C" fn count(pool: *const rte_mempool) -> c_uint {
    // SAFETY: as above.
    unsafe { stack_of(pool).len as c_uint }
}

/// A pool. When it is dropped with an mbuf still out (a ring between two vdevs may hold some), its memory
/// stays until [`Pool::reap`] finds it whole: freeing it under a device would be worse than keeping it.
#[derive(Debug)]
pub(super) struct Pool {
    raw: NonNull<rte_mempool>,
    /// Of a pool with our ops; a `Box` taken apart.
    stack: Option<NonNull<Stack>>,
    size: u32,
}

// SAFETY: DPDK's pool functions may be called from any thread. The stack is reached only through DPDK
// or by the owner of the queue.
unsafe impl Send for Pool {}
// SAFETY: as above; `&Pool` offers nothing that touches the stack but `is_whole`, for quiet pools.
unsafe impl Sync for Pool {}

/// Pools that were not whole when they were dropped.
static STRAGGLERS: Mutex<Vec<Pool>> = Mutex::new(Vec::new());

impl Pool {
    /// A receive pool of `size` mbufs with `room` bytes each behind the headroom.
    pub(super) fn receive(size: u32, room: u16, node: c_int) -> Result<Self> {
        let pool = Self::own(size, room, node)?;
        pool.remember_buffers();
        Ok(pool)
    }

    /// A pool of `size` shells: mbufs without room of their own.
    pub(super) fn shells(size: u32, node: c_int) -> Result<Self> {
        Self::receive(size, 0, node)
    }

    /// Of a fresh pool with our ops: lets each mbuf know its own buffer.
    fn remember_buffers(&self) {
        if let Some(stack) = self.stack {
            // SAFETY: nobody else knows the pool yet. All its objects are home: mbufs, initialised, with LENT_PRIV bytes.
            unsafe {
                let stack = stack.as_ptr();
                for &mbuf in &(&(*stack).free)[..self.size as usize] {
                    Mbuf::new(mbuf.cast()).remember_buffer();
                }
                // They were put when they were no mbufs yet.
                ((*stack).returned, (*stack).out, (*stack).out_of_guest) = (0, 0, 0);
            }
        }
    }

    /// A pool with our ops.
    fn own(size: u32, room: u16, node: c_int) -> Result<Self> {
        let stack = NonNull::from(Box::leak(Box::new(Stack::new(size as usize))));
        let made = on_node(node, |node| {
            // SAFETY: `stack` outlives the pool: both are freed together, in `drop`.
            unsafe { create(size, room, node, stack) }
        });
        match made {
            Ok(raw) => Ok(Self { raw, stack: Some(stack), size }),
            Err((call, errno)) => {
                // SAFETY: the pool that knew it is gone.
                drop(unsafe { Box::from_raw(stack.as_ptr()) });
                Err(no_pool(call, size, room, errno))
            }
        }
    }

    /// A send pool of `size` mbufs with `room` bytes each behind the headroom.
    pub(super) fn send(size: u32, room: u16, node: c_int) -> Result<Self> {
        let raw = on_node(node, |node| {
            // SAFETY: plain values and a NUL-terminated name.
            let pool = unsafe {
                dpdk_sys::rte_pktmbuf_pool_create(name("send").as_ptr(), size, SEND_CACHE, 0, headroom() + room, node)
            };
            NonNull::new(pool).ok_or_else(errno)
        })
        .map_err(|errno| no_pool("rte_pktmbuf_pool_create", size, room, errno))?;
        Ok(Self { raw, stack: None, size })
    }

    /// The DPDK pool.
    pub(super) fn raw(&self) -> *mut rte_mempool {
        self.raw.as_ptr()
    }

    /// The stack of a pool with our ops.
    pub(super) fn stack(&self) -> Option<NonNull<Stack>> {
        self.stack
    }

    /// Every mbuf is back. Exact when nobody uses the pool.
    pub(super) fn is_whole(&self) -> bool {
        // SAFETY: the pool is live.
        unsafe { dpdk_sys::rte_mempool_avail_count(self.raw.as_ptr()) == self.size }
    }

    /// Frees what became whole since it was dropped.
    pub(super) fn reap() {
        let waiting = mem::take(&mut *STRAGGLERS.lock().unwrap_or_else(PoisonError::into_inner));
        // Those that are still not whole put themselves back.
        drop(waiting);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if !self.is_whole() {
            tracing::debug!(pool = ?self.raw, "buffers are still out; their memory stays until they are back");
            let again = Self { ..*self };
            STRAGGLERS.lock().unwrap_or_else(PoisonError::into_inner).push(again);
            return;
        }
        if let Some(stack) = self.stack
            && cfg!(debug_assertions)
        {
            // SAFETY: nobody uses a whole pool whose device is gone.
            let mut mbufs = unsafe { (*stack.as_ptr()).free.clone() };
            mbufs.sort_unstable();
            let twice = mbufs.windows(2).any(|pair| pair[0] == pair[1]);
            assert!(!twice, "an mbuf came back twice");
        }
        // SAFETY: every mbuf is home, so no device and no lane refers to it.
        unsafe { dpdk_sys::rte_mempool_free(self.raw.as_ptr()) };
        if let Some(stack) = self.stack {
            // SAFETY: made by Box::leak; the pool that knew it is gone.
            drop(unsafe { Box::from_raw(stack.as_ptr()) });
        }
    }
}

/// The pool, or what failed with which errno.
///
/// # Safety
/// `stack` holds `size` mbufs and outlives the pool.
unsafe fn create(
    size: u32,
    room: u16,
    node: c_int,
    stack: NonNull<Stack>,
) -> Result<NonNull<rte_mempool>, (&'static str, c_int)> {
    let mut layout = rte_pktmbuf_pool_private {
        mbuf_data_room_size: headroom() + room,
        mbuf_priv_size: LENT_PRIV,
        ..Default::default()
    };
    // SAFETY: the sequence that rte_pktmbuf_pool_create does, with our ops and without a cache.
    unsafe {
        // A retry on another node finds what the failed try left behind empty.
        (*stack.as_ptr()).len = 0;
        let pool = NonNull::new(dpdk_sys::rte_mempool_create_empty(
            name("own").as_ptr(),
            size,
            dpdk_sys::SHIM_MBUF_SIZE + u32::from(LENT_PRIV) + u32::from(headroom()) + u32::from(room),
            0,
            size_of::<rte_pktmbuf_pool_private>() as c_uint,
            node,
            0,
        ))
        .ok_or_else(|| ("rte_mempool_create_empty", errno()))?;
        let raw = pool.as_ptr();
        let ops = OPS_NAME.as_ptr().cast();
        let set = dpdk_sys::rte_mempool_set_ops_byname(raw, ops, stack.as_ptr().cast());
        if set != 0 {
            dpdk_sys::rte_mempool_free(raw);
            return Err(("rte_mempool_set_ops_byname", -set));
        }
        dpdk_sys::rte_pktmbuf_pool_init(raw, ptr::from_mut(&mut layout).cast());
        let filled = dpdk_sys::rte_mempool_populate_default(raw);
        if filled != size.cast_signed() {
            dpdk_sys::rte_mempool_free(raw);
            // Its own errno, or not as many as asked for: rte_errno is of no use, later calls have set it.
            return Err(("rte_mempool_populate_default", if filled < 0 { -filled } else { libc::ENOMEM }));
        }
        dpdk_sys::rte_mempool_obj_iter(raw, Some(dpdk_sys::rte_pktmbuf_init), ptr::null_mut());
        Ok(pool)
    }
}

/// Tries the device's NUMA node, then any.
fn on_node<T, E>(node: c_int, mut make: impl FnMut(c_int) -> Result<T, E>) -> Result<T, E> {
    const ANY: c_int = -1;
    make(node).or_else(|error| if node == ANY { Err(error) } else { make(ANY) })
}

/// A name no other pool of the process has.
fn name(kind: &str) -> CString {
    static SERIAL: AtomicU64 = AtomicU64::new(0);
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    CString::new(format!("vf_{kind}_{serial}")).expect("no NUL in it")
}

fn headroom() -> u16 {
    dpdk_sys::SHIM_HEADROOM as u16
}

/// DPDK's memory is used up.
pub(super) fn no_memory(what: &str) -> Error {
    // SAFETY: EAL is initialised.
    let more = match unsafe { dpdk_sys::rte_eal_has_hugepages() } {
        0 => "start the daemon with more --memory",
        _ => "reserve more hugepages (vm.nr_hugepages)",
    };
    Error::Exhausted(format!("no DPDK memory for {what}; {more}, or ask for fewer queues or a smaller MTU"))
}

fn no_pool(call: &'static str, size: u32, room: u16, errno: i32) -> Error {
    match errno {
        libc::ENOMEM | libc::ENOBUFS => no_memory(&format!("{size} buffers of {room} bytes")),
        errno => Error::Dpdk {
            call,
            subject: format!("{size} buffers of {room} bytes"),
            errno,
            hint: "raise --log-level to see why",
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mbufs of a pool of ours, without a pool.
    fn mbufs<const N: usize>() -> [*mut c_void; N] {
        std::array::from_fn(|_| {
            let words = Box::leak(Box::new([0_u64; 64]));
            let own =
                words.as_mut_ptr().cast::<u8>().wrapping_add(dpdk_sys::SHIM_MBUF_SIZE as usize + LENT_PRIV as usize);
            words[dpdk_sys::SHIM_MBUF_BUF_ADDR as usize / 8] = own.expose_provenance() as u64;
            words.as_mut_ptr().cast()
        })
    }

    #[test]
    fn a_stack_gives_last_in_first_and_all_or_nothing() {
        let [one, two, three] = mbufs();
        let mut stack = Stack::new(4);
        stack.put_all(&[one, two, three]);
        let mut four = [ptr::null_mut(); 4];
        assert!(!stack.get_all(&mut four));
        assert_eq!(stack.len, 3);
        let mut last = [ptr::null_mut(); 2];
        assert!(stack.get_all(&mut last));
        assert_eq!(last, [two, three]);
        // SAFETY: the stack is ours.
        unsafe { Stack::put_one(NonNull::from(&mut stack), two) };
        assert_eq!(stack.len, 2);
        assert_eq!((stack.free[1], stack.returned), (two, 0));
    }

    #[test]
    #[should_panic(expected = "out of bounds")]
    fn an_mbuf_too_many_is_a_double_free() {
        let [mbuf] = mbufs();
        let mut stack = Stack::new(1);
        stack.put_all(&[mbuf]);
        // SAFETY: the stack is ours.
        unsafe { Stack::put_one(NonNull::from(&mut stack), mbuf) };
    }

    #[test]
    #[should_panic(expected = "in one receive pool")]
    fn two_threads_inside_are_noticed() {
        let mut stack = Stack::new(1);
        stack.user.store(1, Ordering::Relaxed);
        stack.put_all(&mbufs::<1>());
    }

    #[test]
    fn posted_mbufs_come_first_and_in_order_and_get_their_buffers_back() {
        let [one, two, three] = mbufs();
        let mut stack = Stack::new(3);
        stack.put_all(&[one, two, three]);
        let mut stack = NonNull::from(&mut stack);
        let mut guest = [0_u8; 256];
        let is_elsewhere = |mbuf: *mut c_void| {
            // SAFETY: an mbuf of ours.
            unsafe { Mbuf::new(mbuf.cast()).restore() }
        };
        // SAFETY: the stack is ours; the memory outlives it.
        unsafe {
            assert!(Stack::post(stack, guest.as_mut_ptr(), 100));
            assert!(Stack::post(stack, guest.as_mut_ptr().add(128), 100));
            let mut got = [ptr::null_mut(); 3];
            assert!(stack.as_mut().get_all(&mut got[..1]));
            assert_eq!(got[0], three);
            assert!(is_elsewhere(three) && !is_elsewhere(three));
            // One of the guest's, and one of ours.
            assert!(stack.as_mut().get_all(&mut got[..2]));
            assert_eq!(got[..2], [two, one]);
            stack.as_mut().put_all(&[two, one]);
            assert_eq!(Stack::returned(stack), 1);
            assert!(Stack::post(stack, guest.as_mut_ptr(), 100));
            Stack::withdraw(stack);
            assert!(!is_elsewhere(one) && !is_elsewhere(two));
            assert!(stack.as_mut().get_all(&mut got[..2]));
            assert!(!Stack::post(stack, guest.as_mut_ptr(), 100), "none is free");
        }
    }

    #[test]
    fn a_stack_knows_what_the_driver_has() {
        let [one, two, three, four] = mbufs();
        let mut stack = Stack::new(4);
        stack.put_all(&[one, two, three, four]);
        (stack.out, stack.returned) = (0, 0);
        let mut stack = NonNull::from(&mut stack);
        let mut guest = [0_u8; 256];
        let mut got = [ptr::null_mut(); 3];
        // SAFETY: the stack is ours; the memory outlives it.
        unsafe {
            assert!(Stack::post(stack, guest.as_mut_ptr(), 100) && Stack::post(stack, guest.as_mut_ptr(), 100));
            assert!(stack.as_mut().get_all(&mut got[..1]));
            assert_eq!((Stack::out(stack), Stack::waiting(stack)), ((1, 1), 1));
            assert_eq!(Stack::withdraw(stack), 1);
            assert!(stack.as_mut().get_all(&mut got[1..]));
            assert_eq!((Stack::out(stack), Stack::waiting(stack)), ((3, 1), 0));
            // One came with a frame, in the guest's buffer; the driver gives the others back.
            Stack::received(stack, 1, 1);
            assert_eq!(Stack::out(stack), (2, 0));
            Mbuf::new(got[0].cast()).restore();
            Stack::put_one(stack, got[0]);
            stack.as_mut().put_all(&got[1..]);
            assert_eq!((Stack::out(stack), Stack::returned(stack)), ((0, 0), 0));
            // A burst at a time is posted while some of the last wait: those that were handed out make room.
            assert!(Stack::post(stack, guest.as_mut_ptr(), 100));
            for _ in 0..5 * BURST {
                assert!(Stack::post(stack, guest.as_mut_ptr(), 100) && stack.as_mut().get_all(&mut got[..1]));
                stack.as_mut().put_all(&got[..1]);
            }
            assert_eq!((Stack::out(stack), Stack::returned(stack)), ((0, 0), 5 * BURST as u32));
            assert_eq!(Stack::withdraw(stack), 1);
        }
    }
}
