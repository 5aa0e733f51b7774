//! A control server on a socket of its own, without cores, VFs or guests.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use virtio_forwarder::Error;
use virtio_forwarder::control::{
    ControlSocket, Crew, DaemonInfo, Event, EventSender, Inbox, PciRule, Policy, PortChange, PortId, Ports, Server,
    SocketDefaults, SocketDir,
};
use virtio_forwarder::session::port::{PortPlan, PortStatus, VfStatus};
use virtio_forwarder::vf::{VfCaps, VfConfig, VfLink, VfSpec};

/// The VF that takes [`SLOW`] to start.
pub const SLOW_VF: &str = "vdev:net_null7";
pub const SLOW: Duration = Duration::from_millis(500);
/// The VF that does not start.
pub const BROKEN_VF: &str = "vdev:net_null8";
/// The port that has a guest as soon as it is open.
pub const BUSY_PORT: &str = "busy";

/// Answers at once, except as the constants say. A VF is its name.
struct Pretender {
    events: EventSender<VfSpec>,
    /// VFs given to port threads.
    given: Vec<(PortId, VfSpec)>,
}

impl Crew for Pretender {
    type Vf = VfSpec;

    fn probe(&mut self, port: &PortId, vf: &VfSpec) {
        let result = match vf {
            VfSpec::Pci(address) => Err(Error::VfAbsent(format!("{address} is not there: create the VF"))),
            vf => Ok((vf.clone(), VfCaps { driver: "pretended".into(), max_queues: 4, ..VfCaps::default() })),
        };
        self.events.send(Event::Probed { port: port.clone(), result });
    }

    fn remove(&mut self, port: &PortId, _vf: VfSpec) {
        self.events.send(Event::Removed { port: port.clone(), result: Ok(()) });
    }

    fn open(&mut self, plan: PortPlan) {
        let port: PortId = plan.id.parse().unwrap();
        self.events.send(Event::Opened { port: port.clone(), result: Ok(()) });
        if plan.id == BUSY_PORT {
            let status = PortStatus { guest: true, connections: 1, ..PortStatus::default() };
            self.events.send(Event::Status { port, status });
        }
        plan.counters.guest_to_vf.lane(0).delivered(3, 180);
    }

    fn give_vf(&mut self, port: &PortId, _spec: VfSpec, vf: VfSpec, config: VfConfig) {
        let (port, events, name) = (port.clone(), self.events.clone(), vf.to_string());
        if name == BROKEN_VF {
            let error = Error::Exhausted("no hugepages are left: reserve more".into());
            return events.send(Event::VfFailed { port, error, vf: Some(vf) });
        }
        self.given.push((port.clone(), vf.clone()));
        let link = VfLink { up: true, ..VfLink::default() };
        let caps = VfCaps { driver: "pretended".into(), max_queues: 4, ..VfCaps::default() };
        let status = VfStatus {
            spec: vf,
            caps,
            queues: config.queues.min(4),
            lanes: 1,
            link,
            xstats: vec![],
            read: Instant::now(),
        };
        let ready = Event::VfReady { port, status };
        if name == SLOW_VF {
            std::thread::spawn(move || {
                std::thread::sleep(SLOW);
                events.send(ready);
            });
        } else {
            events.send(ready);
        }
    }

    fn change(&mut self, port: &PortId, _change: PortChange) {
        self.events.send(Event::Changed { port: port.clone(), result: Ok(()) });
    }

    fn close(&mut self, port: &PortId) {
        let given = self.given.iter().position(|(of, _)| of == port);
        let vf = given.map(|index| self.given.remove(index).1);
        self.events.send(Event::Closed { port: port.clone(), vf });
    }
}

/// A running server. Dropping it stops it.
pub struct Daemon {
    pub dir: TempDir,
    events: EventSender<VfSpec>,
    thread: Option<JoinHandle<virtio_forwarder::Result<()>>>,
}

impl Daemon {
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let socket = ControlSocket { path: path.clone(), mode: 0o600, gid: None }.listen().unwrap();
        let (events, inbox) = Inbox::new().unwrap();
        let policy = Policy {
            guest_memory: 1 << 40,
            vdevs: Policy::default_vdevs(),
            pci: vec![PciRule::Vfs],
            socket_dirs: vec![SocketDir::new(dir.path()).unwrap()],
            stand_ins: vec![],
            control_socket: path,
            sysfs: "/nonexistent".into(),
        };
        let info = DaemonInfo {
            dpdk_version: Some("DPDK of the test".into()),
            max_ethdevs: Some(32),
            cpus: vec![1, 2],
            poll: false,
            started: Instant::now(),
        };
        let crew = Pretender { events: events.clone(), given: vec![] };
        let ports = Ports::new(crew, policy, SocketDefaults::default(), info);
        let server = Server::new(socket, inbox, ports);
        let thread = std::thread::spawn(move || server.run());
        Self { dir, events, thread: Some(thread) }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("control.sock")
    }

    /// A path for a port's socket.
    pub fn port_socket(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    pub fn connect(&self) -> RawClient {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        RawClient(BufReader::new(stream))
    }

    /// Stops it; it has to end by itself.
    pub fn stop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.events.send(Event::Stop);
            thread.join().unwrap().unwrap();
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.stop();
        }
    }
}

/// A client that can misbehave.
pub struct RawClient(pub BufReader<UnixStream>);

impl RawClient {
    pub fn send(&mut self, line: impl AsRef<[u8]>) {
        self.0.get_mut().write_all(line.as_ref()).unwrap();
    }

    /// The next answer; `None` at the end.
    pub fn receive(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.0.read_line(&mut line).unwrap() {
            0 => None,
            _ => Some(serde_json::from_str(&line).unwrap()),
        }
    }

    pub fn ask(&mut self, line: &str) -> Value {
        self.send(format!("{line}\n"));
        self.receive().expect("an answer")
    }
}
