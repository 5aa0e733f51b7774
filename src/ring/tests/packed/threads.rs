//! A driver and a device that run at once.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::*;
use crate::ring::testing::packed::{Receiver, Sender};
use crate::ring::testing::{number, numbered};

#[test]
fn driver_and_device_on_two_threads() {
    const FRAMES: u64 = 20_000;
    /// Or fewer, where two threads that wait for each other get few turns.
    const LONG_ENOUGH: Duration = Duration::from_secs(3);
    let late = Instant::now() + Duration::from_secs(60);
    for (size, in_order) in [(1, false), (3, true), (33, false), (128, true)] {
        let mut rig = Rig::new(size, Place { index: size - 1, wrap: false });
        if in_order {
            rig = rig.in_order();
        }
        let room = (rig.driver.buffers().start + 512 * usize::from(size)).next_multiple_of(4096);
        let other = rig.driver.beside(room, size, Place::FIRST);
        let mut tx = rig.tx();
        let config = RingConfig { addresses: addresses(&other), base: Place::FIRST.encode(), ..rig.config };
        let mut rx = RxRing::new(mapped(&rig.driver), &config).unwrap();
        let at = rig.driver.buffers().start;
        let mut sender = Sender::new(rig.driver, at, 512);
        let at = other.buffers().start;
        let mut receiver = Receiver::new(other, at, 512);
        let frames = Arc::new(AtomicU64::new(FRAMES));
        let all = frames.clone();
        let device = std::thread::spawn(move || {
            let mut moved = 0;
            while moved < all.load(Relaxed) {
                assert!(Instant::now() < late, "{moved} frames moved");
                let n = tx.pop(BURST).unwrap();
                for i in 0..n {
                    loop {
                        match rx.push(&HEADER, &mut tx.frame(i).unwrap()) {
                            Ok(()) => break,
                            Err(PushError::Empty) if Instant::now() < late => rx.publish(),
                            other => panic!("{other:?}"),
                        };
                        std::thread::yield_now();
                    }
                }
                tx.complete(n);
                tx.publish();
                rx.publish();
                moved += n as u64;
                if n == 0 {
                    std::thread::yield_now();
                }
            }
        });
        let (mut sent, mut received) = (0, 0);
        let end = Instant::now() + LONG_ENOUGH;
        while received < frames.load(Relaxed) {
            if Instant::now() > end {
                frames.store(sent, Relaxed);
            }
            assert!(Instant::now() < late, "{received} of {sent} frames received");
            receiver.post(usize::from(size));
            while sent < frames.load(Relaxed) && sender.room() > 0 {
                sender.send(&[0; 12], &numbered(1, sent, 60 + sent as usize % 400));
                sent += 1;
            }
            sender.ring.publish();
            sender.reclaim();
            let before = received;
            while let Some(frame) = receiver.receive() {
                assert_eq!(number(&frame), (1, received), "size {size}");
                received += 1;
            }
            if received == before {
                std::thread::yield_now();
            }
        }
        device.join().unwrap();
    }
}
