//! How the crew's events reach control: a queue, and a bell.
//!
//! The queue is not bounded, so that nobody waits for control; what is in it is: answers, of which control
//! asks for a few at a time, and of each port's views of itself only the last.

use std::cell::RefCell;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use crossbeam::atomic::AtomicCell;
use crossbeam::channel::{Receiver, Sender, unbounded};

use super::{Event, PortId};
use crate::error::Result;
use crate::event;
use crate::session::port::PortStatus;

/// A status that control has not yet seen. Boxed, so that it is swapped as one word.
type Unseen = Arc<AtomicCell<Option<Box<PortStatus>>>>;

/// What is queued.
enum Queued<V> {
    Event(Event<V>),
    /// Of this port; what is in it is looked up when control gets here.
    Status(PortId, Unseen),
}

/// Where crew threads send their events. Cheap to clone.
pub struct EventSender<V> {
    events: Sender<Queued<V>>,
    wake: Arc<event::Event>,
}

impl<V> Clone for EventSender<V> {
    fn clone(&self) -> Self {
        Self { events: self.events.clone(), wake: Arc::clone(&self.wake) }
    }
}

impl<V> EventSender<V> {
    /// Queues an event and wakes control. Never waits. An event after control has ended is dropped.
    pub fn send(&self, event: Event<V>) {
        self.queue(Queued::Event(event));
    }

    fn queue(&self, queued: Queued<V>) {
        if self.events.send(queued).is_ok() {
            self.wake.signal();
        }
    }

    /// The sender of one port's thread.
    pub fn of_port(&self, port: PortId) -> PortSender<V> {
        PortSender { sender: self.clone(), port, unseen: RefCell::default() }
    }
}

/// Where a port's thread sends its events: a status replaces the one before it if control has not seen that yet.
pub struct PortSender<V> {
    sender: EventSender<V>,
    port: PortId,
    /// Queued if it is not empty, with only statuses of this port behind it.
    unseen: RefCell<Unseen>,
}

impl<V> PortSender<V> {
    /// Queues an event other than a status. It stays between the statuses before and behind it.
    pub fn send(&self, event: Event<V>) {
        self.unseen.take();
        self.sender.send(event);
    }

    /// Tells how the port is now.
    pub fn status(&self, status: PortStatus) {
        let unseen = self.unseen.borrow();
        if unseen.swap(Some(Box::new(status))).is_none() {
            self.sender.queue(Queued::Status(self.port.clone(), unseen.clone()));
        }
    }
}

/// Where control receives them.
pub struct Inbox<V> {
    events: Receiver<Queued<V>>,
    wake: Arc<event::Event>,
}

impl<V> Inbox<V> {
    /// Both ends.
    pub fn new() -> Result<(EventSender<V>, Self)> {
        let wake = Arc::new(event::Event::new("control")?);
        let (sender, events) = unbounded();
        let sender = EventSender { events: sender, wake: Arc::clone(&wake) };
        Ok((sender, Self { events, wake }))
    }

    /// The next event.
    pub(super) fn take(&self) -> Option<Event<V>> {
        loop {
            match self.events.try_recv().ok()? {
                Queued::Event(event) => return Some(event),
                Queued::Status(port, unseen) => {
                    if let Some(status) = unseen.take() {
                        return Some(Event::Status { port, status: *status });
                    }
                }
            }
        }
    }

    /// Nothing is queued.
    pub(super) fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// Hears the bell. Events are taken after this, not before.
    pub(super) fn hush(&self) {
        self.wake.take();
    }
}

impl<V> AsFd for Inbox<V> {
    /// Readable when something was queued.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(connections: u64) -> PortStatus {
        PortStatus { connections, ..PortStatus::default() }
    }

    fn taken(inbox: &Inbox<()>) -> Vec<String> {
        let name = |event: Event<()>| match event {
            Event::Status { port, status } => format!("{port} {}", status.connections),
            Event::Changed { port, .. } => format!("{port} changed"),
            other => panic!("{other:?}"),
        };
        std::iter::from_fn(|| inbox.take()).map(name).collect()
    }

    #[test]
    fn a_storm_of_statuses_is_one() {
        let (sender, inbox) = Inbox::<()>::new().unwrap();
        let (a, b) = (sender.of_port("a".parse().unwrap()), sender.of_port("b".parse().unwrap()));
        for round in [0, 100_000] {
            (1..=50_000).for_each(|i| a.status(status(round + i)));
            b.status(status(round));
            (50_001..=100_000).for_each(|i| a.status(status(round + i)));
            assert_eq!(inbox.events.len(), 2);
            assert_eq!(taken(&inbox), [format!("a {}", round + 100_000), format!("b {round}")]);
        }
        assert!(inbox.is_empty());
    }

    /// Whether a change was made with or without a guest is told by the status before it.
    #[test]
    fn a_status_does_not_overtake_another_event() {
        let (sender, inbox) = Inbox::<()>::new().unwrap();
        let a = sender.of_port("a".parse().unwrap());
        let changed = || Event::Changed { port: "a".parse().unwrap(), result: Ok(()) };
        (1..=3).for_each(|i| a.status(status(i)));
        a.send(changed());
        (4..=6).for_each(|i| a.status(status(i)));
        a.send(changed());
        assert_eq!(taken(&inbox), ["a 3", "a changed", "a 6", "a changed"]);
    }

    #[test]
    fn the_last_status_arrives_whenever_control_looks() {
        let (sender, inbox) = Inbox::<()>::new().unwrap();
        const LAST: u64 = 200_000;
        let teller = std::thread::spawn(move || {
            let a = sender.of_port("a".parse().unwrap());
            (1..=LAST).for_each(|i| a.status(status(i)));
        });
        let mut seen = 0;
        while seen < LAST {
            assert!(inbox.events.len() <= 1);
            if let Some(Event::Status { status, .. }) = inbox.take() {
                assert!(status.connections > seen);
                seen = status.connections;
            } else if teller.is_finished() {
                assert!(!inbox.is_empty(), "the last one, {LAST}, is lost: {seen}");
            }
        }
        teller.join().unwrap();
    }
}
