//! How orders reach a poll core: a bounded queue, a flag that costs a relaxed load to look at, and a bell
//! that is rung only when the core sleeps.
//!
//! The sleep protocol, which `loom` checks below: the core says that it is going to sleep, *then* looks at
//! the queue once more; the sender queues, *then* looks whether the core sleeps. With a sequentially
//! consistent fence between the two steps on each side, one of them sees the other.

#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, Ordering, fence};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool, Ordering, fence};

/// Wakes a sleeping core.
pub trait Bell {
    /// Makes the core's sleep end, or the next one if it is not yet asleep.
    fn ring(&self);
}

/// A core's mailbox. Any thread sends; only the core receives and sleeps.
#[derive(Debug)]
pub struct Mailbox<T, B> {
    orders: Orders<T>,
    pending: AtomicBool,
    asleep: AtomicBool,
    bell: B,
}

impl<T, B: Bell> Mailbox<T, B> {
    /// A mailbox for at most `capacity` orders not yet taken.
    pub fn new(capacity: usize, bell: B) -> Self {
        Self { orders: Orders::new(capacity), pending: AtomicBool::new(false), asleep: AtomicBool::new(false), bell }
    }

    /// Sends an order; gives it back if the mailbox is full.
    pub fn send(&self, order: T) -> Result<(), T> {
        self.orders.push(order)?;
        self.pending.store(true, Ordering::Release);
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) {
            self.bell.ring();
        }
        Ok(())
    }

    /// Whether to look at [`Self::take`]: one relaxed load a turn.
    pub fn has_orders(&self) -> bool {
        self.pending.load(Ordering::Relaxed)
    }

    /// The next order. Core only.
    pub fn take(&self) -> Option<T> {
        // Cleared first: an order queued after this is announced again.
        self.pending.swap(false, Ordering::Acquire);
        let order = self.orders.pop();
        if order.is_some() {
            self.pending.store(true, Ordering::Relaxed);
        }
        order
    }

    /// The core is about to sleep: `true` if it may, `false` if there is an order (and it is awake).
    pub fn doze(&self) -> bool {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if self.pending.load(Ordering::Acquire) {
            self.wake();
            return false;
        }
        true
    }

    /// The core is awake again.
    pub fn wake(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }

    /// The bell, for the core to wait on.
    pub fn bell(&self) -> &B {
        &self.bell
    }
}

#[cfg(not(loom))]
#[derive(Debug)]
struct Orders<T>(crossbeam::queue::ArrayQueue<T>);

#[cfg(not(loom))]
impl<T> Orders<T> {
    fn new(capacity: usize) -> Self {
        Self(crossbeam::queue::ArrayQueue::new(capacity))
    }

    fn push(&self, order: T) -> Result<(), T> {
        self.0.push(order)
    }

    fn pop(&self) -> Option<T> {
        self.0.pop()
    }
}

/// crossbeam's queue is not built on loom's atomics; under loom a mutex stands in for it.
#[cfg(loom)]
#[derive(Debug)]
struct Orders<T>(loom::sync::Mutex<std::collections::VecDeque<T>>, usize);

#[cfg(loom)]
impl<T> Orders<T> {
    fn new(capacity: usize) -> Self {
        Self(loom::sync::Mutex::new(std::collections::VecDeque::new()), capacity)
    }

    fn push(&self, order: T) -> Result<(), T> {
        let mut orders = self.0.lock().unwrap();
        if orders.len() == self.1 {
            return Err(order);
        }
        orders.push_back(order);
        Ok(())
    }

    fn pop(&self) -> Option<T> {
        self.0.lock().unwrap().pop_front()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::cell::Cell;

    struct Count(Cell<u32>);

    impl Bell for Count {
        fn ring(&self) {
            self.0.set(self.0.get() + 1);
        }
    }

    #[test]
    fn orders_come_in_order_and_ring_only_a_sleeper() {
        let mailbox = Mailbox::new(2, Count(Cell::new(0)));
        assert!(!mailbox.has_orders());
        assert_eq!((mailbox.send(1), mailbox.send(2), mailbox.send(3)), (Ok(()), Ok(()), Err(3)));
        assert!(!mailbox.doze(), "orders wait");
        assert_eq!((mailbox.take(), mailbox.take(), mailbox.take()), (Some(1), Some(2), None));
        assert!(!mailbox.has_orders());
        assert_eq!(mailbox.bell.0.get(), 0);
        assert!(mailbox.doze());
        mailbox.send(4).unwrap();
        assert_eq!(mailbox.bell.0.get(), 1);
        mailbox.wake();
        assert_eq!(mailbox.take(), Some(4));
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::{Arc, Condvar, Mutex};
    use loom::thread;

    /// An eventfd: a count that a sleeper waits for.
    #[derive(Default)]
    struct Event(Mutex<bool>, Condvar);

    impl Bell for Event {
        fn ring(&self) {
            *self.0.lock().unwrap() = true;
            self.1.notify_one();
        }
    }

    impl Event {
        fn wait(&self) {
            let mut rung = self.0.lock().unwrap();
            while !*rung {
                rung = self.1.wait(rung).unwrap();
            }
            *rung = false;
        }
    }

    /// loom reports a deadlock if a wake-up can be lost, whatever the interleaving.
    fn core_takes(orders: usize, senders: usize) {
        loom::model(move || {
            let mailbox = Arc::new(Mailbox::new(4, Event::default()));
            let threads: Vec<_> = (0..senders)
                .map(|sender| {
                    let mailbox = mailbox.clone();
                    thread::spawn(move || {
                        for order in 0..orders {
                            mailbox.send((sender, order)).unwrap();
                        }
                    })
                })
                .collect();
            let mut next = vec![0; senders];
            while next.iter().sum::<usize>() < orders * senders {
                if mailbox.has_orders() {
                    while let Some((sender, order)) = mailbox.take() {
                        assert_eq!(order, next[sender], "a sender's orders stay in order");
                        next[sender] += 1;
                    }
                } else if mailbox.doze() {
                    mailbox.bell().wait();
                    mailbox.wake();
                }
            }
            for thread in threads {
                thread.join().unwrap();
            }
        });
    }

    #[test]
    fn no_wake_up_is_lost_with_one_sender() {
        core_takes(2, 1);
    }

    #[test]
    fn no_wake_up_is_lost_with_two_senders() {
        core_takes(1, 2);
    }
}
