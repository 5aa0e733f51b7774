//! `dpdk-testpmd`: a virtio-user guest (or, to check our own tools, a vhost back end) that others wrote.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::PATIENCE;

const PROMPT: &str = "testpmd> ";

#[derive(Debug)]
pub struct Testpmd {
    child: Child,
    stdin: ChildStdin,
    output: Arc<Mutex<String>>,
    errors: Arc<Mutex<String>>,
    read: usize,
    serial: usize,
    /// EAL makes it, and leaves it behind.
    dir: PathBuf,
}

/// Port counters of `show port stats`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortStats {
    pub rx_packets: u64,
    pub rx_missed: u64,
    pub rx_bytes: u64,
    pub tx_packets: u64,
    pub tx_bytes: u64,
}

/// A virtio-user device.
#[derive(Clone, Debug)]
pub struct VirtioUser {
    pub queues: usize,
    pub mergeable: bool,
    pub queue_size: u16,
    /// testpmd listens, the daemon connects.
    pub server: bool,
    pub packed: bool,
    pub in_order: bool,
    /// Asks for the driver's vector code, which it takes if the rest allows it (for packed rings: if the
    /// machine has AVX-512).
    pub vectorized: bool,
}

impl Default for VirtioUser {
    fn default() -> Self {
        Self {
            queues: 1,
            mergeable: true,
            queue_size: 1024,
            server: false,
            packed: false,
            in_order: true,
            vectorized: false,
        }
    }
}

impl VirtioUser {
    fn vdev(&self, socket: &Path) -> String {
        format!(
            "net_virtio_user0,path={},queues={},mrg_rxbuf={},queue_size={},server={},packed_vq={},in_order={},vectorized={}",
            socket.display(),
            self.queues,
            u8::from(self.mergeable),
            self.queue_size,
            u8::from(self.server),
            u8::from(self.packed),
            u8::from(self.in_order),
            u8::from(self.vectorized),
        )
    }
}

impl Testpmd {
    /// Starts it interactively, all its lcores on core 0. `None` where there is no dpdk-testpmd.
    pub fn start(vdevs: &[String], args: &[&str]) -> Option<Self> {
        let program = super::program("dpdk-testpmd")?;
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let serial = STARTED.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("vf-test-{}-{serial}", std::process::id());
        // It prints through stdio but echoes past it: without a buffer the two stay in order.
        let mut command = Command::new("stdbuf");
        command.arg("-o0").arg(program);
        command.args(["--lcores", "0@0,1@0", "-n", "1", "-m", "192"]);
        command.args(["--no-huge", "--no-pci", "--no-telemetry", "--no-shconf"]);
        command.args(["--file-prefix", &prefix]);
        for vdev in vdevs {
            command.args(["--vdev", vdev]);
        }
        if vdevs.iter().any(|vdev| vdev.contains("vectorized=1")) {
            command.arg("--force-max-simd-bitwidth=512");
        }
        command.args(["--", "-i", "--nb-cores=1", "--total-num-mbufs=20480"]);
        command.args(["--no-flush-rx"]);
        if vdevs.len() == 1 {
            command.arg("--port-topology=loop");
        }
        command.args(args);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start dpdk-testpmd");
        let output = Arc::new(Mutex::new(String::new()));
        collect(child.stdout.take().expect("piped"), output.clone());
        let errors = Arc::new(Mutex::new(String::new()));
        collect(child.stderr.take().expect("piped"), errors.clone());
        let stdin = child.stdin.take().expect("piped");
        let dir = Path::new("/run/dpdk").join(&prefix);
        let mut testpmd = Self { child, stdin, output, errors, read: 0, serial: 0, dir };
        testpmd.until_printed(PROMPT);
        Some(testpmd)
    }

    /// A guest on `socket`, forwarding not yet started.
    pub fn guest(socket: &Path, device: &VirtioUser, args: &[&str]) -> Option<Self> {
        Self::with_queues(&[device.vdev(socket)], device, args)
    }

    /// As [`Self::guest`], with another device as port 1.
    pub fn guest_beside(socket: &Path, device: &VirtioUser, other: &str, args: &[&str]) -> Option<Self> {
        Self::with_queues(&[device.vdev(socket), other.to_owned()], device, args)
    }

    fn with_queues(vdevs: &[String], device: &VirtioUser, args: &[&str]) -> Option<Self> {
        let (rxq, txq) = (format!("--rxq={}", device.queues), format!("--txq={}", device.queues));
        let (rxd, txd) = (format!("--rxd={}", device.queue_size), format!("--txd={}", device.queue_size));
        let mut all = vec![&rxq[..], &txq, &rxd, &txd];
        all.extend(args);
        Self::start(vdevs, &all)
    }

    /// Runs one command; what it printed.
    #[track_caller]
    pub fn command(&mut self, command: &str) -> String {
        // A prompt does not tell which command has ended: events print it again at any time. The echo of a
        // following word that is no command does.
        self.serial += 1;
        let mark = format!("mark{}", self.serial);
        write!(self.stdin, "{command}\n{mark}\n").expect("testpmd runs");
        self.until_printed(&mark)
    }

    #[track_caller]
    fn until_printed(&mut self, mark: &str) -> String {
        let start = Instant::now();
        loop {
            let output = self.output.lock().expect("output").clone();
            if let Some(at) = output[self.read..].find(mark) {
                let text = output[self.read..self.read + at].to_owned();
                self.read += at + mark.len();
                return text;
            }
            let ended = self.child.try_wait().expect("wait").is_some();
            assert!(!ended && start.elapsed() < PATIENCE, "testpmd does not print {mark:?}:\n{output}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// All it has printed so far.
    pub fn output(&self) -> String {
        let errors = self.errors.lock().expect("errors").clone();
        self.output.lock().expect("output").clone() + &errors
    }

    #[track_caller]
    pub fn port_stats(&mut self, port: usize) -> PortStats {
        let text = self.command(&format!("show port stats {port}"));
        let field = |name: &str| -> u64 {
            let at = text.find(name).unwrap_or_else(|| panic!("no {name} in {text}"));
            let value = text[at + name.len()..].split_whitespace().next();
            value.and_then(|v| v.parse().ok()).expect("a number")
        };
        PortStats {
            rx_packets: field("RX-packets:"),
            rx_missed: field("RX-missed:"),
            rx_bytes: field("RX-bytes:"),
            tx_packets: field("TX-packets:"),
            tx_bytes: field("TX-bytes:"),
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills it mid-burst.
    pub fn kill(mut self) {
        self.child.kill().expect("kill our own child");
        self.child.wait().expect("wait");
    }

    /// Ends it in good order.
    pub fn quit(mut self) {
        let _ = writeln!(self.stdin, "quit");
        let start = Instant::now();
        while self.child.try_wait().expect("wait").is_none() {
            assert!(start.elapsed() < PATIENCE, "quit hangs:\n{}", self.output());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
        if std::thread::panicking() {
            eprintln!("--- testpmd printed:\n{}\n---", self.output());
        }
    }
}

fn collect(mut from: impl Read + Send + 'static, into: Arc<Mutex<String>>) {
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            into.lock().expect("output").push_str(&String::from_utf8_lossy(&buffer[..n]));
        }
    });
}
