//! A guest that sends numbered frames into a loop, and wants each back, once, in order.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::ring::testing::{HEADER, Receiver, Sender, number, numbered};

/// Frames that are under way at most: fewer than the guest has receive buffers, so that none is dropped.
const WINDOW: u64 = 100;

/// How long anything may take on a busy machine.
pub const LONG: Duration = Duration::from_secs(60);

/// The driver of one queue pair.
pub struct Traffic {
    pub tx: Sender,
    pub rx: Receiver,
    pub kick: Arc<OwnedFd>,
    pub event_idx: bool,
    pub sent: u64,
    pub received: u64,
}

impl Traffic {
    /// Sends up to `n` frames, as far as the window allows. Kicks only if it is asked to.
    pub fn send(&mut self, n: u64) {
        self.tx.reclaim();
        let old = self.tx.ring.avail;
        for _ in 0..n {
            if self.sent - self.received >= WINDOW || self.tx.room() == 0 {
                break;
            }
            let len = 60 + (self.sent * 97 % 1400) as usize;
            self.tx.send(&[0; HEADER], &numbered(1, self.sent, len));
            self.sent += 1;
        }
        if self.tx.ring.avail != old {
            self.tx.ring.publish();
            if self.tx.ring.kick_wanted(old, self.event_idx) {
                rustix::io::write(&self.kick, &1u64.to_ne_bytes()).unwrap();
            }
        }
    }

    /// Takes what came back.
    pub fn receive(&mut self) {
        while let Some(frame) = self.rx.receive() {
            assert_eq!(number(&frame), (1, self.received), "each frame once, in order");
            self.received += 1;
        }
        self.rx.post(usize::MAX);
    }
}

/// A [`Traffic`] on a thread of its own.
pub struct Running {
    thread: JoinHandle<Traffic>,
    stop: Arc<AtomicBool>,
    hold: Arc<AtomicBool>,
    /// The thread has seen `hold`.
    held: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    received: Arc<AtomicU64>,
}

impl Running {
    pub fn start(mut traffic: Traffic) -> Self {
        let (stop, hold) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (sent, received) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        traffic.receive();
        let held = Arc::new(AtomicBool::new(false));
        let theirs = (stop.clone(), hold.clone(), held.clone(), sent.clone(), received.clone());
        let thread = std::thread::spawn(move || {
            let (stop, hold, held, sent, received) = theirs;
            for round in 0u64.. {
                let holding = hold.load(SeqCst);
                held.store(holding, SeqCst);
                if !holding {
                    traffic.send(1 + round % 23);
                }
                traffic.receive();
                sent.store(traffic.sent, SeqCst);
                received.store(traffic.received, SeqCst);
                if stop.load(SeqCst) {
                    break;
                }
                // Now and then so long that the core falls asleep.
                match round % 64 {
                    0 => std::thread::sleep(Duration::from_micros(600)),
                    _ => std::thread::yield_now(),
                }
            }
            let deadline = Instant::now() + LONG;
            while traffic.received < traffic.sent {
                traffic.receive();
                assert!(Instant::now() < deadline, "{} of {} came back", traffic.received, traffic.sent);
                std::thread::yield_now();
            }
            traffic
        });
        Self { thread, stop, hold, held, sent, received }
    }

    /// Waits until `n` frames more have come back.
    pub fn flows(&self, n: u64) {
        let goal = self.received.load(SeqCst) + n;
        self.wait(|| self.received.load(SeqCst) >= goal);
    }

    /// Stops sending and waits until all has come back.
    pub fn hold(&self) {
        self.hold.store(true, SeqCst);
        self.wait(|| self.held.load(SeqCst));
        self.wait(|| self.received.load(SeqCst) == self.sent.load(SeqCst));
    }

    /// Sends again; returns when there is something in the ring.
    pub fn go_on(&self) {
        let sent = self.sent.load(SeqCst);
        self.hold.store(false, SeqCst);
        self.wait(|| self.sent.load(SeqCst) > sent);
    }

    fn wait(&self, mut done: impl FnMut() -> bool) {
        let deadline = Instant::now() + LONG;
        while !done() {
            let (sent, received) = (self.sent.load(SeqCst), self.received.load(SeqCst));
            assert!(!self.thread.is_finished(), "the driver found something wrong");
            assert!(Instant::now() < deadline, "traffic stands still: {received} of {sent} came back");
            std::thread::yield_now();
        }
    }

    /// Ends when every frame has come back.
    pub fn finish(self) -> Traffic {
        self.stop.store(true, SeqCst);
        self.thread.join().unwrap()
    }
}
