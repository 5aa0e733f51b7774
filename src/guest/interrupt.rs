//! Interrupting a thread that is stuck in a system call on an fd the front end controls.

use std::sync::Once;

/// The signal used. Its handler does nothing: being delivered is what ends the call.
const SIGNAL: i32 = libc::SIGURG;

/// A thread that can be interrupted.
#[derive(Clone, Copy, Debug)]
pub struct Interrupt {
    thread: libc::pid_t,
}

impl Interrupt {
    /// The calling thread.
    pub fn of_this_thread() -> Self {
        static INSTALLED: Once = Once::new();
        INSTALLED.call_once(install);
        // SAFETY: takes no argument, touches no memory.
        let thread = unsafe { libc::gettid() };
        Self { thread }
    }

    /// Makes the system call the thread is in return EINTR. Harmless if it is in none, or has ended.
    pub fn fire(&self) {
        // SAFETY: tgkill takes three integers; a thread that no longer exists is ESRCH. It is limited to our
        // own process, so a recycled thread id is at worst another of our threads, which retries.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.thread, SIGNAL) };
    }
}

fn install() {
    extern "C" fn nothing(_: libc::c_int) {}
    let handler: extern "C" fn(libc::c_int) = nothing;
    // SAFETY: a zeroed sigaction is a valid one (no flags, empty mask); without SA_RESTART an interrupted call
    // returns EINTR. The handler is async-signal-safe: it does nothing.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as libc::sighandler_t;
        libc::sigaction(SIGNAL, &action, std::ptr::null_mut());
    }
}
