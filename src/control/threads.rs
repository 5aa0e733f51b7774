//! The threads that do what control decides: the device thread, and one for each port.

use std::collections::HashMap;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Sender, unbounded};
use tracing::{error, warn};

use super::{Crew, Event, EventSender, PortChange, PortId};
use crate::error::{Error, Result};
use crate::relay::Poller;
use crate::session::port::{PortCommand, PortEvent, PortPlan, PortThread};
use crate::vf::{Vf, VfConfig, VfSpec};

/// How long the end of all threads is waited for: a driver may take its time for what nobody wants any more,
/// a port's thread may be stuck, and the process ends.
const END: Duration = Duration::from_millis(300);

/// An order to the device thread.
enum DeviceOrder {
    Probe(PortId, VfSpec),
    Remove(PortId, Vf),
}

/// The running threads. Lives on the control thread.
pub struct Threads {
    pollers: Arc<Vec<Poller>>,
    events: EventSender<Vf>,
    device: Option<Sender<DeviceOrder>>,
    device_thread: Option<JoinHandle<()>>,
    ports: HashMap<PortId, PortThread>,
}

impl Threads {
    /// Starts the device thread. `enter` and what it returns live on it as long as it does, also when it is
    /// left behind at the end.
    pub fn start<G: 'static>(
        pollers: Arc<Vec<Poller>>,
        events: EventSender<Vf>,
        enter: impl Fn() -> G + Send + 'static,
    ) -> Result<Self> {
        let (device, orders) = unbounded();
        let tell = events.clone();
        let device_thread = std::thread::Builder::new()
            .name("device".into())
            .spawn(move || {
                let _guard = enter();
                for order in orders {
                    tell.send(match order {
                        DeviceOrder::Probe(port, spec) => {
                            let result = Vf::probe(&spec).map(|vf| {
                                let caps = vf.caps().clone();
                                (vf, caps)
                            });
                            Event::Probed { port, result }
                        }
                        DeviceOrder::Remove(port, vf) => Event::Removed { port, result: vf.remove() },
                    });
                }
            })
            .map_err(Error::io("cannot start the device thread"))?;
        Ok(Self { pollers, events, device: Some(device), device_thread: Some(device_thread), ports: HashMap::new() })
    }

    fn order(&self, order: DeviceOrder) {
        if let Some(device) = &self.device {
            let _ = device.send(order);
        }
    }

    fn command(&self, port: &PortId, command: PortCommand) {
        if let Some(thread) = self.ports.get(port) {
            thread.send(command);
        }
    }
}

impl Crew for Threads {
    type Vf = Vf;

    fn probe(&mut self, port: &PortId, vf: &VfSpec) {
        self.order(DeviceOrder::Probe(port.clone(), vf.clone()));
    }

    fn remove(&mut self, port: &PortId, vf: Vf) {
        self.order(DeviceOrder::Remove(port.clone(), vf));
    }

    fn open(&mut self, plan: PortPlan) {
        let id: PortId = plan.id.parse().expect("control checked the id");
        // Of ports that were detached, or could not be opened.
        self.ports.retain(|_, thread| !thread.is_over());
        let (events, port) = (self.events.of_port(id.clone()), id.clone());
        let tell = move |event| {
            let port = port.clone();
            events.send(match event {
                PortEvent::Opened(result) => Event::Opened { port, result },
                PortEvent::VfReady(status) => Event::VfReady { port, status },
                PortEvent::VfFailed { error, vf } => Event::VfFailed { port, error, vf },
                PortEvent::Changed(result) => Event::Changed { port, result },
                PortEvent::Status(status) => return events.status(status),
                PortEvent::Closed { vf } => Event::Closed { port, vf },
            });
        };
        match PortThread::start(plan, self.pollers.clone(), tell) {
            Ok(thread) => {
                self.ports.insert(id, thread);
            }
            Err(error) => self.events.send(Event::Opened { port: id, result: Err(error) }),
        }
    }

    fn give_vf(&mut self, port: &PortId, spec: VfSpec, vf: Vf, config: VfConfig) {
        self.command(port, PortCommand::GiveVf { spec, vf, config });
    }

    fn change(&mut self, port: &PortId, change: PortChange) {
        let PortChange { cores, zero_copy, mac, socket, next_connection } = change;
        self.command(port, PortCommand::Change { cores, zero_copy, mac, socket, next_connection });
    }

    fn close(&mut self, port: &PortId) {
        self.command(port, PortCommand::Close);
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        // All at once: each may have a VF to stop.
        self.ports.values().for_each(|thread| thread.send(PortCommand::Close));
        self.device = None;
        let end = Instant::now() + END;
        for (port, thread) in self.ports.drain() {
            if !ends(thread.into_handle(), end) {
                error!(%port, "its thread is stuck: ending without it");
            }
        }
        if let Some(thread) = self.device_thread.take()
            && !ends(thread, end)
        {
            warn!("a driver does not return: ending without it");
        }
    }
}

/// Waits for a thread, at most until `end`. Whether it has ended.
fn ends(thread: JoinHandle<()>, end: Instant) -> bool {
    while !thread.is_finished() {
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let _ = thread.join();
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Inbox;

    #[test]
    fn a_device_thread_that_does_not_return_is_left() {
        let (events, _inbox) = Inbox::new().unwrap();
        let (go, stuck) = crossbeam::channel::bounded::<()>(0);
        let threads = Threads::start(Arc::new(vec![]), events, move || stuck.recv()).unwrap();
        let (done, dropped) = crossbeam::channel::bounded(1);
        let dropping = std::thread::spawn(move || {
            drop(threads);
            done.send(()).unwrap();
        });
        let ended = dropped.recv_timeout(Duration::from_secs(5));
        drop(go);
        dropping.join().unwrap();
        assert!(ended.is_ok(), "the daemon would not end");
    }
}
