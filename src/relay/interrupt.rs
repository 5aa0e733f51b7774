//! Interrupting a thread that is stuck in a system call on an fd the front end controls.

use std::ffi::{c_int, c_void};
use std::thread::JoinHandle;

use vmm_sys_util::signal::{Killable, register_signal_handler};

use crate::error::{Error, Result};

/// The signal used. Its handler does nothing: being delivered is what ends the call, since calls are not
/// restarted after it.
const SIGNAL: c_int = libc::SIGURG;

extern "C" fn nothing(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {}

/// From now on threads can be interrupted: before, the signal would be lost.
pub(super) fn prepare() -> Result<()> {
    register_signal_handler(SIGNAL, nothing)
        .map_err(|errno| Error::io("cannot set the handler of the watchdog's signal")(errno.into()))
}

/// Makes the system call the thread is in return EINTR. Harmless if it is in none, or has ended.
pub(super) fn interrupt(thread: &JoinHandle<()>) {
    let _ = thread.kill(SIGNAL);
}
