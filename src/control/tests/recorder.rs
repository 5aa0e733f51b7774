//! A crew that records, checks the protocol of [`Crew`], and answers when told to; and a desk to ask at.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::control::rpc::RpcError;
use crate::control::{
    Crew, DaemonInfo, Event, PciRule, Policy, PortChange, PortId, Ports, SocketDefaults, SocketDir, Token,
};
use crate::error::Error;
use crate::session::port::{PortPlan, PortStatus, VfStatus};
use crate::vf::{VfCaps, VfConfig, VfLink, VfSpec};

/// A VF that can be counted.
#[derive(Debug)]
pub struct TestVf {
    spec: VfSpec,
    alive: Arc<AtomicUsize>,
}

impl Drop for TestVf {
    fn drop(&mut self) {
        self.alive.fetch_sub(1, Relaxed);
    }
}

/// What was asked and is not answered yet.
#[derive(Debug)]
pub enum Asked {
    Probe(PortId, VfSpec),
    Remove(PortId, TestVf),
    Open(PortPlan),
    Give(PortId, VfConfig),
    Change(PortId, PortChange),
    Close(PortId),
}

impl Asked {
    pub fn port(&self) -> &str {
        match self {
            Self::Open(plan) => &plan.id,
            Self::Probe(id, _) | Self::Remove(id, _) | Self::Give(id, _) | Self::Change(id, _) | Self::Close(id) => {
                id.as_str()
            }
        }
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Probe(..) => "probe",
            Self::Remove(..) => "remove",
            Self::Open(_) => "open",
            Self::Give(..) => "give",
            Self::Change(..) => "change",
            Self::Close(_) => "close",
        }
    }

    /// `probe a`
    pub fn text(&self) -> String {
        format!("{} {}", self.kind(), self.port())
    }
}

/// A port's thread.
#[derive(Debug, Default)]
struct Thread {
    open: bool,
    closing: bool,
    /// Lanes that it has cores for, in each direction.
    cores: usize,
    vf: Option<TestVf>,
    status: PortStatus,
}

#[derive(Debug, Default)]
pub struct Recorder {
    /// In the order asked.
    pub asked: Vec<Asked>,
    threads: BTreeMap<String, Thread>,
    alive: Arc<AtomicUsize>,
    /// Everything ever asked.
    pub log: Vec<String>,
}

impl Recorder {
    fn ask(&mut self, asked: Asked) {
        let same = |other: &Asked| other.port() == asked.port() && other.kind() == asked.kind();
        assert!(!self.asked.iter().any(same), "asked twice: {asked:?}");
        self.log.push(asked.text());
        self.asked.push(asked);
    }

    fn thread(&mut self, port: &str) -> &mut Thread {
        let thread = self.threads.get_mut(port).expect("the port has a thread");
        assert!(thread.open && !thread.closing, "{port}: asked of a thread that is not open");
        thread
    }
}

impl Crew for Recorder {
    type Vf = TestVf;

    fn probe(&mut self, port: &PortId, vf: &VfSpec) {
        self.ask(Asked::Probe(port.clone(), vf.clone()));
    }
    fn remove(&mut self, port: &PortId, vf: TestVf) {
        self.ask(Asked::Remove(port.clone(), vf));
    }
    fn open(&mut self, plan: PortPlan) {
        let thread = Thread { cores: plan.cores.len(), ..Thread::default() };
        let before = self.threads.insert(plan.id.clone(), thread);
        assert!(before.is_none(), "{} was open", plan.id);
        self.ask(Asked::Open(plan));
    }
    fn give_vf(&mut self, port: &PortId, spec: VfSpec, vf: TestVf, config: VfConfig) {
        assert_eq!(spec, vf.spec, "{port}: a VF under another's name");
        let before = self.thread(port.as_str()).vf.replace(vf);
        assert!(before.is_none(), "{port} has a VF");
        self.ask(Asked::Give(port.clone(), config));
    }
    fn change(&mut self, port: &PortId, change: PortChange) {
        self.thread(port.as_str());
        self.ask(Asked::Change(port.clone(), change));
    }
    fn close(&mut self, port: &PortId) {
        self.thread(port.as_str()).closing = true;
        self.ask(Asked::Close(port.clone()));
    }
}

/// Ports with a recorder, and a client.
pub struct Desk {
    pub ports: Ports<Recorder>,
    pub now: Instant,
    next_token: Token,
    answers: HashMap<Token, Result<Value, RpcError>>,
}

impl Desk {
    /// Poll cores on CPUs 1 and 2. No PCI device exists; 0000:0e:00.0 has a stand-in.
    pub fn new() -> Self {
        let policy = Policy {
            guest_memory: 1 << 40,
            vdevs: Policy::default_vdevs(),
            pci: vec![PciRule::Vfs],
            socket_dirs: vec![SocketDir::new("/run/vf-test".as_ref()).unwrap()],
            stand_ins: vec!["0000:0e:00.0=vdev:net_tap9,iface=vf9".parse().unwrap()],
            control_socket: "/run/vf-test/control.sock".into(),
            sysfs: "/nonexistent".into(),
        };
        let now = Instant::now();
        let info =
            DaemonInfo { dpdk_version: None, max_ethdevs: Some(32), cpus: vec![1, 2], poll: false, started: now };
        Self {
            ports: Ports::new(Recorder::default(), policy, SocketDefaults::default(), info),
            now,
            next_token: 0,
            answers: HashMap::new(),
        }
    }

    /// Starts a request.
    pub fn ask(&mut self, method: &str, params: Value) -> Token {
        let Value::Object(params) = params else { panic!("params are an object") };
        self.next_token += 1;
        self.ports.call(self.next_token, method, params, self.now);
        self.collect();
        self.next_token
    }

    /// The answer of a request, if it was given. Each can be taken once.
    pub fn answer(&mut self, token: Token) -> Option<Result<Value, RpcError>> {
        self.answers.remove(&token)
    }

    fn collect(&mut self) {
        for (token, answer) in self.ports.answers() {
            let twice = self.answers.insert(token, answer);
            assert!(twice.is_none(), "request {token} was answered twice");
        }
    }

    pub fn event(&mut self, event: Event<TestVf>) {
        self.ports.event(event, self.now);
        self.collect();
    }

    /// What the crew has been asked and has not answered.
    pub fn asked(&mut self) -> Vec<String> {
        self.ports.crew().asked.iter().map(Asked::text).collect()
    }

    /// The change that is asked for and not done.
    pub fn change_asked(&mut self) -> PortChange {
        let mut asked = self.ports.crew().asked.iter();
        let change = asked.find_map(|asked| if let Asked::Change(_, change) = asked { Some(change) } else { None });
        change.expect("a change was asked for").clone()
    }

    /// How the VF that is being given is to be configured.
    pub fn config_asked(&mut self) -> VfConfig {
        let mut asked = self.ports.crew().asked.iter();
        let config = asked.find_map(|asked| if let Asked::Give(_, config) = asked { Some(config) } else { None });
        config.expect("a VF is being given").clone()
    }

    /// Answers the oldest request that reads `text`.
    pub fn done(&mut self, text: &str) {
        self.reply(text, None);
    }

    /// The same, with a failure.
    pub fn fails(&mut self, text: &str, error: Error) {
        self.reply(text, Some(error));
    }

    fn reply(&mut self, text: &str, error: Option<Error>) {
        let asked = &self.ports.crew().asked;
        let index = asked.iter().position(|asked| asked.text() == text);
        let index = index.unwrap_or_else(|| panic!("{text} was not asked, but {asked:?}"));
        self.reply_at(index, error);
    }

    /// Answers the request at `index`.
    pub fn reply_at(&mut self, index: usize, error: Option<Error>) {
        let crew = self.ports.crew();
        let event = match crew.asked.remove(index) {
            Asked::Probe(port, spec) => {
                let result = match error {
                    Some(error) => Err(error),
                    None => {
                        crew.alive.fetch_add(1, Relaxed);
                        Ok((TestVf { spec, alive: crew.alive.clone() }, VfCaps::default()))
                    }
                };
                Event::Probed { port, result }
            }
            Asked::Remove(port, vf) => {
                drop(vf);
                Event::Removed { port, result: error.map_or(Ok(()), Err) }
            }
            Asked::Open(plan) => {
                let port = plan.id.parse().unwrap();
                if error.is_some() {
                    crew.threads.remove(&plan.id);
                } else {
                    crew.threads.get_mut(&plan.id).unwrap().open = true;
                }
                Event::Opened { port, result: error.map_or(Ok(()), Err) }
            }
            Asked::Give(port, config) => {
                let thread = crew.threads.get_mut(port.as_str()).unwrap();
                match error {
                    Some(error) => Event::VfFailed { port, error, vf: thread.vf.take() },
                    None => {
                        let spec = thread.vf.as_ref().unwrap().spec.clone();
                        let (caps, link) = (VfCaps::default(), VfLink { up: true, ..VfLink::default() });
                        let xstats = vec![("rx_good".to_owned(), 7)];
                        let status = VfStatus {
                            spec,
                            caps,
                            queues: config.queues,
                            lanes: thread.cores.min(config.queues.into()),
                            link,
                            xstats,
                            read: self.now,
                        };
                        Event::VfReady { port, status }
                    }
                }
            }
            Asked::Change(port, _) => Event::Changed { port, result: error.map_or(Ok(()), Err) },
            Asked::Close(port) => {
                // The thread answers what it was asked before, or not at all.
                crew.asked.retain(|asked| {
                    asked.port() != port.as_str() || !matches!(asked, Asked::Give(..) | Asked::Change(..))
                });
                let vf = crew.threads.remove(port.as_str()).unwrap().vf;
                Event::Closed { port, vf }
            }
        };
        self.event(event);
    }

    /// Answers everything with success, until nothing is asked.
    pub fn settle(&mut self) {
        while !self.ports.crew().asked.is_empty() {
            self.reply_at(0, None);
        }
    }

    /// A request, with everything it needs done. It has to be answered.
    pub fn call(&mut self, method: &str, params: Value) -> Result<Value, RpcError> {
        let token = self.ask(method, params);
        self.settle();
        self.answer(token).unwrap_or_else(|| panic!("{method} was not answered"))
    }

    pub fn attach(&mut self, id: &str, vf: &str, socket: &str) -> Result<Value, RpcError> {
        self.call("port.attach", request(id, vf, socket))
    }

    pub fn show(&mut self, id: &str) -> Value {
        self.call("port.show", json!({ "id": id })).unwrap()
    }

    /// A guest comes or goes.
    pub fn guest(&mut self, id: &str, there: bool) {
        let Some(thread) = self.ports.crew().threads.get_mut(id).filter(|thread| thread.open) else { return };
        thread.status.connections += u64::from(there && !thread.status.guest);
        thread.status.guest = there;
        let status = thread.status.clone();
        self.event(Event::Status { port: id.parse().unwrap(), status });
    }

    /// The VF of a port stops working.
    pub fn vf_breaks(&mut self, id: &str) {
        let crew = self.ports.crew();
        // Not while the thread still has to answer for it.
        if crew.asked.iter().any(|asked| asked.port() == id && matches!(asked, Asked::Give(..))) {
            return;
        }
        let Some(vf) = crew.threads.get_mut(id).and_then(|thread| thread.vf.take()) else { return };
        let error = Error::VfAbsent("it was pulled out".into());
        self.event(Event::VfFailed { port: id.parse().unwrap(), error, vf: Some(vf) });
    }

    pub fn wait(&mut self, time: Duration) {
        self.now += time;
        self.ports.tick(self.now);
        self.collect();
    }

    /// VFs that exist, wherever they are.
    pub fn vfs(&mut self) -> usize {
        self.ports.crew().alive.load(Relaxed)
    }

    pub fn threads(&mut self) -> usize {
        self.ports.crew().threads.len()
    }

    /// Removes and returns what was asked so far.
    pub fn log(&mut self) -> Vec<String> {
        std::mem::take(&mut self.ports.crew().log)
    }
}

/// Parameters of an attach.
pub fn request(id: &str, vf: &str, socket: &str) -> Value {
    json!({ "id": id, "vfs": [vf], "socket": { "path": format!("/run/vf-test/{socket}") } })
}

/// `with(request(..), json!({"mtu": 9000}))`
pub fn with(mut request: Value, more: Value) -> Value {
    for (key, value) in more.as_object().unwrap() {
        request[key] = value.clone();
    }
    request
}
