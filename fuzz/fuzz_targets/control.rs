//! Control lines, and the crew's answers in between: no line may panic, each request is answered exactly
//! once, and in the end no VF and no port thread is left.
//!
//! A line is a request, or, if it is one or two bytes long, an order to the crew: `+` or `-` and an optional
//! letter for which of the things it was asked it does, or fails to do; `^` and `v`: a guest comes, goes.

#![no_main]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use virtio_forwarder::Error;
use virtio_forwarder::control::rpc::{self, Request};
use virtio_forwarder::control::{
    Crew, DaemonInfo, Event, PciRule, Policy, PortChange, PortId, Ports, SocketDefaults, SocketDir,
};
use virtio_forwarder::session::port::{PortPlan, PortStatus, VfStatus};
use virtio_forwarder::vf::{VfCaps, VfConfig, VfLink, VfSpec};

enum Asked {
    Probe(PortId, VfSpec),
    Remove(PortId),
    Open(PortId),
    Give(PortId),
    Change(PortId),
    Close(PortId),
}

/// Per port: its thread's VF.
#[derive(Default)]
struct Pretended {
    asked: Vec<Asked>,
    threads: BTreeMap<PortId, Option<VfSpec>>,
    vfs: isize,
}

#[derive(Clone, Default)]
struct Pretender(Rc<RefCell<Pretended>>);

impl Pretender {
    fn ask(&self, asked: Asked) {
        self.0.borrow_mut().asked.push(asked);
    }

    /// Does, or fails to do, one of the things it was asked.
    fn reply(&self, which: usize, fail: bool) -> Option<Event<VfSpec>> {
        let mut all = self.0.borrow_mut();
        if all.asked.is_empty() {
            return None;
        }
        let which = which % all.asked.len();
        let failure = || Error::Exhausted("pretended".into());
        let result = || if fail { Err(failure()) } else { Ok(()) };
        Some(match all.asked.remove(which) {
            Asked::Probe(port, _) if fail => Event::Probed { port, result: Err(Error::VfAbsent("pretended".into())) },
            Asked::Probe(port, vf) => {
                all.vfs += 1;
                Event::Probed { port, result: Ok((vf, VfCaps::default())) }
            }
            Asked::Remove(port) => Event::Removed { port, result: result() },
            Asked::Open(port) => {
                if !fail {
                    all.threads.insert(port.clone(), None);
                }
                Event::Opened { port, result: result() }
            }
            Asked::Give(port) if fail => {
                let vf = all.threads.get_mut(&port).unwrap().take();
                Event::VfFailed { port, error: failure(), vf }
            }
            Asked::Give(port) => {
                let spec = all.threads[&port].clone().unwrap();
                let (caps, link) = (VfCaps::default(), VfLink::default());
                Event::VfReady {
                    port,
                    status: VfStatus { spec, caps, queues: 1, lanes: 1, link, xstats: vec![], read: Instant::now() },
                }
            }
            Asked::Change(port) => Event::Changed { port, result: result() },
            Asked::Close(port) => {
                all.asked.retain(|asked| !matches!(asked, Asked::Give(of) | Asked::Change(of) if *of == port));
                let vf = all.threads.remove(&port).unwrap();
                Event::Closed { port, vf }
            }
        })
    }

    fn guest(&self, there: bool) -> Option<Event<VfSpec>> {
        let all = self.0.borrow();
        let port = all.threads.keys().next()?.clone();
        Some(Event::Status { port, status: PortStatus { guest: there, ..PortStatus::default() } })
    }
}

impl Crew for Pretender {
    type Vf = VfSpec;

    fn probe(&mut self, port: &PortId, vf: &VfSpec) {
        self.ask(Asked::Probe(port.clone(), vf.clone()));
    }
    fn remove(&mut self, port: &PortId, _vf: VfSpec) {
        self.0.borrow_mut().vfs -= 1;
        self.ask(Asked::Remove(port.clone()));
    }
    fn open(&mut self, plan: PortPlan) {
        self.ask(Asked::Open(plan.id.parse().unwrap()));
    }
    fn give_vf(&mut self, port: &PortId, _spec: VfSpec, vf: VfSpec, _config: VfConfig) {
        let before = self.0.borrow_mut().threads.get_mut(port).unwrap().replace(vf);
        assert!(before.is_none());
        self.ask(Asked::Give(port.clone()));
    }
    fn change(&mut self, port: &PortId, _change: PortChange) {
        assert!(self.0.borrow().threads.contains_key(port));
        self.ask(Asked::Change(port.clone()));
    }
    fn close(&mut self, port: &PortId) {
        assert!(self.0.borrow().threads.contains_key(port));
        self.ask(Asked::Close(port.clone()));
    }
}

fuzz_target!(|lines: &[u8]| {
    let crew = Pretender::default();
    let mut now = Instant::now();
    let policy = Policy {
        guest_memory: 1 << 40,
        vdevs: Policy::default_vdevs(),
        pci: vec![PciRule::Vfs],
        socket_dirs: vec![SocketDir::new("/run/f".as_ref()).unwrap()],
        stand_ins: vec!["0000:0e:00.0=vdev:net_tap9".parse().unwrap()],
        control_socket: "/run/f/c".into(),
        sysfs: "/nonexistent".into(),
    };
    let info = DaemonInfo { dpdk_version: None, max_ethdevs: None, cpus: vec![1, 2], poll: false, started: now };
    let mut ports = Ports::new(crew.clone(), policy, SocketDefaults::default(), info);
    let mut open = BTreeSet::new();
    let mut token = 0;
    let collect = |ports: &mut Ports<Pretender>, open: &mut BTreeSet<u64>| {
        for (token, answer) in ports.answers() {
            assert!(open.remove(&token), "answered twice, or never asked");
            let line = rpc::answer(&Value::from(token), &answer);
            assert_eq!(line.iter().position(|&byte| byte == b'\n'), Some(line.len() - 1));
        }
    };
    for line in lines.split(|&byte| byte == b'\n') {
        let which = line.get(1).copied().unwrap_or(0).into();
        let event = match line {
            [b'+'] | [b'+', _] => crew.reply(which, false),
            [b'-'] | [b'-', _] => crew.reply(which, true),
            [b'^'] | [b'v'] => crew.guest(line == b"^"),
            _ => {
                if let Ok(request) = Request::parse(line) {
                    token += 1;
                    open.insert(token);
                    ports.call(token, &request.method, request.params, now);
                }
                None
            }
        };
        if let Some(event) = event {
            ports.event(event, now);
        }
        now += Duration::from_millis(300);
        ports.tick(now);
        collect(&mut ports, &mut open);
    }
    // An order of its own, so that the borrow of the crew has ended when the event is taken in.
    let settle = |ports: &mut Ports<Pretender>| {
        while let Some(event) = crew.reply(0, false) {
            ports.event(event, now);
        }
    };
    settle(&mut ports);
    collect(&mut ports, &mut open);
    assert!(open.is_empty(), "unanswered: {open:?}");
    ports.event(Event::Stop, now);
    settle(&mut ports);
    assert!(ports.finished());
    let left = crew.0.borrow();
    assert!(left.threads.is_empty() && left.vfs == 0);
});
