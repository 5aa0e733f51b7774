//! The daemon under test, and its control socket.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;
use virtio_forwarder::relay::LaneSnapshot;

use super::census::Census;
use super::{PATIENCE, until};

/// Two daemons would fight for the poll core: the tests of one binary take turns.
static TURN: Mutex<()> = Mutex::new(());

/// How to start it.
#[derive(Clone, Debug, Default)]
pub struct Options {
    pub args: Vec<String>,
    pub env: Vec<(String, String)>,
    /// With huge pages (`--no-huge` otherwise).
    pub huge: bool,
    /// Its poll cores; core 1 otherwise.
    pub cores: Option<&'static str>,
}

#[derive(Debug)]
pub struct Daemon {
    child: Child,
    dir: TempDir,
    connection: RefCell<Option<Control>>,
    log: PathBuf,
    options: Options,
    _turn: MutexGuard<'static, ()>,
}

/// A JSON-RPC error.
#[derive(Clone, Debug, PartialEq)]
pub struct RpcError {
    pub code: i64,
    pub message: String,
    pub data: Value,
}

/// A port to attach.
#[derive(Clone, Debug)]
pub struct Attach {
    pub id: String,
    pub socket: PathBuf,
    pub client: bool,
    pub vf: String,
    pub queues: usize,
    pub mtu: Option<u16>,
}

impl Attach {
    pub fn params(&self) -> Value {
        let mut params = json!({
            "id": self.id,
            "socket": {
                "path": self.socket,
                "role": if self.client { "client" } else { "server" },
            },
            "vfs": [self.vf],
            "queue_pairs": self.queues,
        });
        if let Some(mtu) = self.mtu {
            params["mtu"] = mtu.into();
        }
        params
    }
}

/// Both lanes of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lanes {
    pub guest_to_vf: LaneSnapshot,
    pub vf_to_guest: LaneSnapshot,
}

impl Daemon {
    pub fn start() -> Self {
        Self::with(Options::default())
    }

    pub fn with(options: Options) -> Self {
        // A failed test poisons the lock; the next one starts its own daemon all the same.
        let turn = TURN.lock().unwrap_or_else(|poison| poison.into_inner());
        let dir = tempfile::Builder::new().prefix("vf-test-").tempdir().expect("temporary directory");
        fs::create_dir(dir.path().join("sockets")).expect("socket directory");
        let log = dir.path().join("log");
        let child = launch(dir.path(), &log, &options);
        let daemon = Self { child, dir, connection: RefCell::new(None), log, options, _turn: turn };
        daemon.wait_ready();
        daemon
    }

    fn wait_ready(&self) {
        let start = Instant::now();
        loop {
            if let Ok(control) = Control::connect(&self.control_socket()) {
                *self.connection.borrow_mut() = Some(control);
                break;
            }
            assert!(start.elapsed() < PATIENCE && self.runs(), "the daemon did not get ready:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
        self.call("info", json!({})).expect("info");
    }

    pub fn runs(&self) -> bool {
        fs::read_to_string(format!("/proc/{}/stat", self.pid())).is_ok_and(|stat| !stat.contains(") Z "))
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn control_socket(&self) -> PathBuf {
        self.dir.path().join("control.sock")
    }

    /// Path of a port's socket, in the directory the daemon's configuration allows.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.dir.path().join("sockets").join(name)
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// What the daemon holds once it is at rest: the thread of a port that was just detached is awaited, and what
    /// is just changing is not counted.
    #[track_caller]
    pub fn census(&self) -> Census {
        let start = Instant::now();
        let mut last = Census::of(self.pid());
        loop {
            std::thread::sleep(Duration::from_millis(20));
            let (ports, now) = (self.ports().len(), Census::of(self.pid()));
            if now == last && now.port_threads() == ports {
                return now;
            }
            assert!(start.elapsed() < PATIENCE, "{ports} ports, but no rest: {now:?}");
            last = now;
        }
    }

    /// A control connection of one's own, for another thread.
    pub fn control(&self) -> Control {
        Control::connect(&self.control_socket()).expect("control socket")
    }

    pub fn call(&self, method: &str, params: Value) -> Result<Value, RpcError> {
        self.connection.borrow_mut().as_mut().expect("connected").call(method, params)
    }

    /// Attaches a server port; its socket listens when this returns.
    #[track_caller]
    pub fn attach(&self, id: &str, vf: &str, queues: usize) -> PathBuf {
        let socket = self.socket(&format!("{id}.sock"));
        self.attach_as(&Attach {
            id: id.to_owned(),
            socket: socket.clone(),
            client: false,
            vf: vf.to_owned(),
            queues,
            mtu: None,
        });
        socket
    }

    #[track_caller]
    pub fn attach_as(&self, attach: &Attach) -> Value {
        self.call("port.attach", attach.params()).unwrap_or_else(|error| panic!("attach {}: {error:?}", attach.id))
    }

    #[track_caller]
    pub fn detach(&self, id: &str) -> Value {
        self.call("port.detach", json!({"id": id})).unwrap_or_else(|error| panic!("detach {id}: {error:?}"))
    }

    /// Ids of all ports, sorted.
    pub fn ports(&self) -> Vec<String> {
        let list = self.call("port.list", json!({})).expect("port.list");
        let ports = list["ports"].as_array().expect("a list of ports");
        let id = |port: &Value| port["id"].as_str().expect("an id").to_owned();
        let mut ids: Vec<String> = ports.iter().map(id).collect();
        ids.sort();
        ids
    }

    pub fn show(&self, id: &str) -> Value {
        self.call("port.show", json!({"id": id})).unwrap_or_else(|error| panic!("show {id}: {error:?}"))
    }

    /// Counters of a port.
    #[track_caller]
    pub fn lanes(&self, id: &str) -> Lanes {
        let stats = self.call("stats", json!({"id": id})).expect("stats");
        let port = &stats["ports"][0];
        assert_eq!(port["id"], id, "{stats}");
        let lane = |name: &str| {
            serde_json::from_value(port[name].clone()).unwrap_or_else(|error| panic!("{name}: {error} in {stats}"))
        };
        Lanes { guest_to_vf: lane("guest_to_vf"), vf_to_guest: lane("vf_to_guest") }
    }

    /// Waits until a port's front end is, or is not, connected.
    #[track_caller]
    pub fn until_guest(&self, id: &str, connected: bool) {
        until(&format!("{id}: guest connected = {connected}"), || self.show(id)["guest"]["guest"] == connected);
    }

    /// Waits until the daemon holds what it held `before`; the difference is the failure.
    #[track_caller]
    pub fn until_census(&self, before: &Census) {
        let start = Instant::now();
        loop {
            let now = self.census();
            if now == *before {
                return;
            }
            if start.elapsed() > PATIENCE {
                assert_eq!(now, *before, "left behind (now, before)");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.pid() as i32).expect("a pid");
        kill_process(pid, signal).expect("signal our own child");
    }

    /// SIGTERM: has to exit with 0, and leave nothing behind. How long it took: the tests of signals look at that,
    /// in several tries. Every test comes here, so for all the others there is room for a busy machine.
    #[track_caller]
    pub fn stop(mut self) -> Duration {
        let start = Instant::now();
        self.signal(Signal::TERM);
        let status = self.wait(Duration::from_secs(10));
        let took = start.elapsed();
        assert!(status.success(), "{status} after SIGTERM:\n{}", self.log());
        let left: Vec<_> = fs::read_dir(self.dir.path().join("sockets"))
            .expect("socket directory")
            .map(|entry| entry.expect("entry").path())
            .collect();
        assert_eq!(left, Vec::<PathBuf>::new(), "socket files left behind");
        assert!(!self.control_socket().exists(), "the control socket was left behind");
        took
    }

    /// SIGKILL, and nothing cleaned up after it.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.wait(PATIENCE);
        *self.connection.borrow_mut() = None;
    }

    /// Starts it again, in the same place, after [`Self::kill`].
    pub fn restart(&mut self) {
        self.child = launch(self.dir.path(), &self.log, &self.options);
        self.wait_ready();
    }

    /// Waits until it has ended.
    #[track_caller]
    pub fn wait(&mut self, timeout: Duration) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("wait") {
                return status;
            }
            assert!(start.elapsed() < timeout, "still runs:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.log();
            let tail = log.len().saturating_sub(8000);
            let tail = (tail..).find(|&i| log.is_char_boundary(i)).unwrap_or(0);
            eprintln!("--- the daemon's log:\n{}\n---", &log[tail..]);
        }
    }
}

/// A connection to the control socket.
#[derive(Debug)]
pub struct Control(BufReader<UnixStream>);

impl Control {
    pub fn connect(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Sends one line, reads one line.
    pub fn raw_call(&mut self, line: &str) -> String {
        self.0.get_mut().write_all(format!("{line}\n").as_bytes()).expect("request");
        let mut answer = String::new();
        self.0.read_line(&mut answer).expect("answer");
        answer
    }

    pub fn call(&mut self, method: &str, params: Value) -> Result<Value, RpcError> {
        let request = json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params});
        let answer = self.raw_call(&request.to_string());
        let mut answer: Value = serde_json::from_str(&answer).unwrap_or_else(|e| panic!("{e} in {answer:?}"));
        assert_eq!(answer["jsonrpc"], "2.0", "{answer}");
        assert_eq!(answer["id"], 1, "{answer}");
        match answer.get_mut("error") {
            Some(error) => Err(RpcError {
                code: error["code"].as_i64().expect("numeric error code"),
                message: error["message"].as_str().unwrap_or_default().to_owned(),
                data: error["data"].take(),
            }),
            None => Ok(answer["result"].take()),
        }
    }
}

fn launch(dir: &Path, log: &Path, options: &Options) -> Child {
    let config = dir.join("config.toml");
    let sockets = dir.join("sockets");
    fs::write(&config, format!("socket_dirs = [{sockets:?}]\n")).expect("config");
    let log = File::options().create(true).append(true).open(log).expect("log file");
    let mut command = Command::new(env!("CARGO_BIN_EXE_virtio-forwarder"));
    command
        .arg("--config")
        .arg(&config)
        .arg("--control-socket")
        .arg(dir.join("control.sock"))
        .args(["--cores", options.cores.unwrap_or("1")])
        .args((!options.huge).then_some("--no-huge"))
        .args(&options.args)
        .envs(options.env.iter().map(|(k, v)| (k, v)))
        .env("STATE_DIRECTORY", dir)
        .env("NO_COLOR", "1")
        // Else the memory of a port depends, by MiBs, on which of the allocator's arenas its threads came upon.
        .env("MALLOC_ARENA_MAX", "1")
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("dup"))
        .stderr(log);
    command.spawn().expect("start the daemon")
}
