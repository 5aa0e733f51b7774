//! What the integration tests share: our own vhost-user front end and driver (well-behaved or hostile),
//! the daemon under test, and `dpdk-testpmd` as somebody else's guest.

// Every test binary uses its own part of this.
#![allow(dead_code, unused_imports, unused_macros, missing_docs)]

pub mod census;
pub mod checksum;
pub mod daemon;
pub mod frame;
pub mod frontend;
pub mod guest;
pub mod memory;
pub mod packed;
pub mod queue;
pub mod rx;
pub mod tap;
pub mod testpmd;
pub mod tries;
pub mod tx;
pub mod vm;

use std::path::Path;
use std::time::{Duration, Instant};

/// How long anything may take on a busy machine before a test calls it stuck.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Ends the test with a visible reason when the machine lacks something. `scripts/test` counts these lines.
macro_rules! skip {
    ($name:expr, $($reason:tt)*) => {{
        println!("SKIPPED {}: {}", $name, format!($($reason)*));
        return;
    }};
}
pub(crate) use skip;

/// Polls `condition` until it holds; panics with `what` after [`PATIENCE`].
#[track_caller]
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain for: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Finds a program as the shell would.
pub fn program(name: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file: &std::path::PathBuf| Path::is_file(file))
}

/// The value at `percent` of the sorted samples.
pub fn percentile(samples: &mut [Duration], percent: usize) -> Duration {
    samples.sort_unstable();
    samples[(samples.len() - 1) * percent / 100]
}
