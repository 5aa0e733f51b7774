//! The daemon's and its ports' life: start, stop, crash, come back, and leave nothing behind.

mod cycles;
mod idle;
mod reconnect;
mod signals;
mod start;
#[path = "../support/mod.rs"]
mod support;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use support::guest::{Flows, Guest, Plan};

/// A guest that exchanges frames for as long as it lives.
struct Traffic {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Traffic {
    /// Frames go round when this returns.
    fn on(socket: &Path) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (socket, stopped) = (socket.to_owned(), stop.clone());
        let (started, first) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let mut guest = Guest::connect(&socket, &Plan::default());
            let mut flows = Flows::new(4);
            while !stopped.load(Ordering::Relaxed) {
                flows.exchange(&mut guest, &[0], 100, 600);
                let _ = started.send(());
                // Leaves the processor to the others now and then: there are two, at best.
                std::thread::yield_now();
            }
            guest.stop();
            flows.total_received()
        });
        first.recv().expect("the first exchange");
        Self { stop, thread }
    }

    /// Frames that went round; every one was checked.
    fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the traffic's own checks")
    }
}
