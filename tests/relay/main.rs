//! Frames between a guest and a VF that sends everything back (`soft:loop`): every byte, every count.

mod counters;
mod isolation;
mod lanes;
mod memory;
mod offload;
mod packed;
mod queues;
mod rings;
#[path = "../support/mod.rs"]
mod support;

use std::path::PathBuf;

use support::daemon::{Daemon, Lanes, Options};
use support::guest::{Flows, Guest, Plan};

/// A daemon with one port.
struct Port {
    daemon: Daemon,
    socket: PathBuf,
}

impl Port {
    fn new(vf: &str, pairs: usize) -> Self {
        Self::of(Daemon::start(), vf, pairs)
    }

    /// Of a daemon with these poll cores.
    fn on_cores(cores: &'static str, vf: &str, pairs: usize) -> Self {
        Self::of(Daemon::with(Options { cores: Some(cores), ..Options::default() }), vf, pairs)
    }

    fn of(daemon: Daemon, vf: &str, pairs: usize) -> Self {
        let socket = daemon.attach("port", vf, pairs);
        Self { daemon, socket }
    }

    fn guest(&self, plan: &Plan) -> Guest {
        Guest::connect(&self.socket, plan)
    }

    /// Ends a guest in good order, and waits until the daemon has seen it go.
    fn goodbye(&self, mut guest: Guest) {
        guest.stop();
        drop(guest);
        self.daemon.until_guest("port", false);
    }

    fn lanes(&self) -> Lanes {
        self.daemon.lanes("port")
    }
}

/// What went round the loop is what both lanes counted, and nothing was dropped.
#[track_caller]
fn all_counted(lanes: &Lanes, flows: &Flows) {
    for lane in [&lanes.guest_to_vf, &lanes.vf_to_guest] {
        assert_eq!(lane.packets, flows.total_sent(), "{lanes:?}");
        assert_eq!(lane.bytes, flows.bytes, "{lanes:?}");
        assert_eq!(lane.dropped.total(), 0, "{lanes:?}");
        assert!((1..=lane.packets).contains(&lane.bursts), "{lanes:?}");
    }
}
