//! Bounds on time, on a machine that has other work.

use std::time::Duration;

/// Enough that a machine which is busy in all of them is no good for anything.
const TRIES: usize = 5;

/// Tries until it is right once. A core that is taken away for a moment costs a try or two; what is too slow for a
/// reason of its own is so in every try.
#[track_caller]
pub fn once_of_several(mut attempt: impl FnMut() -> Result<(), String>) {
    for left in (0..TRIES).rev() {
        let Err(why) = attempt() else { return };
        println!("{why}");
        assert!(left > 0, "{why}, and no better in {TRIES} tries");
    }
}

/// Whether it was quicker than that, for [`once_of_several`].
pub fn quicker(what: &str, took: Duration, limit: Duration) -> Result<(), String> {
    if took < limit { Ok(()) } else { Err(format!("{what} took {took:?}, not below {limit:?}")) }
}
