//! A virtual machine: a real Linux guest in QEMU, driven from a test.
//!
//! ```no_run
//! let mut vm = Vm::boot(VmConfig::new("/tmp/port.sock"))?;
//! let ping = vm.run("ping -c 1 192.0.2.1")?;
//! assert!(ping.success(), "{}", ping.output);
//! ```
//!
//! The guest is what `scripts/guest-image` builds; `scripts/guest/init` tells how it is spoken to.
//! Everything a guest leaves on the host is its temporary directory and its process, both gone when
//! the [`Vm`] is dropped.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// From the start of QEMU to the guest's shell. Two to three seconds on an idle machine without KVM;
/// poll cores that share its CPUs slow it down.
const BOOT_TIMEOUT: Duration = Duration::from_secs(240);

/// A command in the guest, unless [`Vm::run_within`] says otherwise.
const RUN_TIMEOUT: Duration = Duration::from_secs(120);

/// The QEMU releases that `scripts/setup` unpacks below `build/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Qemu {
    V7_2,
    V10_0,
}

impl Qemu {
    pub const ALL: [Qemu; 2] = [Qemu::V7_2, Qemu::V10_0];

    fn program(self) -> PathBuf {
        let version = match self {
            Qemu::V7_2 => "7.2",
            Qemu::V10_0 => "10.0",
        };
        build_dir().join("qemu").join(version).join("qemu-system-x86_64")
    }
}

/// Who listens on the vhost-user socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listens {
    /// The daemon does (its role is `server`), QEMU connects.
    Daemon,
    /// QEMU does (the daemon's role is `client`), and waits for the daemon before it starts the guest.
    Qemu,
}

/// What to boot. Start from [`VmConfig::new`] and change what the test is about.
#[derive(Clone, Debug)]
pub struct VmConfig {
    pub qemu: Qemu,
    /// The vhost-user socket of the port.
    pub socket: PathBuf,
    pub listens: Listens,
    /// Queue pairs of the device, 1 to 32; the guest uses all of them.
    pub queues: u16,
    pub vcpus: u16,
    pub memory_mib: u32,
    pub mac: String,
    /// Address and prefix length of `eth0`, if it is to have one.
    pub address: Option<String>,
    /// MTU of `eth0` in bytes; also told to the device (`host_mtu`), so at most what the port offers.
    pub mtu: Option<u16>,
    /// Further properties of the virtio-net-pci device, such as `mrg_rxbuf=off` or `tx_queue_size=1024`.
    pub device: Vec<String>,
    /// Further words on the kernel's command line.
    pub kernel: Vec<String>,
    /// A memory balloon, for [`Vm::balloon`].
    pub balloon: bool,
}

impl VmConfig {
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        VmConfig {
            qemu: Qemu::V10_0,
            socket: socket.into(),
            listens: Listens::Daemon,
            queues: 1,
            vcpus: 1,
            memory_mib: 256,
            mac: "02:00:5e:00:53:02".into(),
            address: Some("192.0.2.2/24".into()),
            mtu: None,
            device: Vec::new(),
            kernel: Vec::new(),
            balloon: false,
        }
    }

    fn arguments(&self, dir: &Path) -> Vec<OsString> {
        let accelerator = fs::read_to_string(build_dir().join("guest/accelerator")).expect("the guest image is built");
        let accelerator = accelerator.trim();
        let (memory, queues) = (self.memory_mib, self.queues);
        let mut kernel =
            format!("console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check guest.queues={queues}");
        if let Some(address) = &self.address {
            kernel += &format!(" guest.address={address}");
        }
        if let Some(mtu) = self.mtu {
            kernel += &format!(" guest.mtu={mtu}");
        }
        for word in &self.kernel {
            kernel += &format!(" {word}");
        }
        let mut device = format!("virtio-net-pci,netdev=net,mac={}", self.mac);
        // One vector per ring, one for configuration changes, one for the control ring. QEMU 7.2 without
        // KVM crashes when the guest unmasks a vector of a vhost-user device (it takes the irqfd that only
        // KVM has; mended in later releases): it gets none, and interrupts by pin.
        let vectors = if self.qemu == Qemu::V7_2 && accelerator == "tcg" { 0 } else { 2 * queues + 2 };
        device += &format!(",vectors={vectors}");
        if queues > 1 {
            device += ",mq=on";
        }
        if let Some(mtu) = self.mtu {
            device += &format!(",host_mtu={mtu}");
        }
        for property in &self.device {
            device += &format!(",{property}");
        }
        let socket = match self.listens {
            Listens::Daemon => {
                format!("socket,id=vhost,path={}", self.socket.display())
            }
            Listens::Qemu => format!("socket,id=vhost,path={},server=on,wait=off", self.socket.display()),
        };
        let dir = dir.display();
        let guest = build_dir().join("guest");
        let guest = guest.display();
        let arguments = [
            "-nodefaults -no-user-config -display none".to_string(),
            format!("-M pc,memory-backend=ram -accel {accelerator}"),
            format!("-cpu {}", if accelerator == "kvm" { "host" } else { "max" }),
            format!("-m {memory} -smp {}", self.vcpus),
            format!("-object memory-backend-memfd,id=ram,size={memory}M,share=on"),
            format!("-kernel {guest}/vmlinux -initrd {guest}/initramfs"),
            format!(
                "-serial file:{dir}/console.log -chardev socket,id=shell,path={dir}/shell.sock -serial chardev:shell"
            ),
            format!("-chardev {socket} -netdev vhost-user,id=net,chardev=vhost,queues={queues} -device {device}"),
        ];
        let mut arguments: Vec<OsString> =
            arguments.iter().flat_map(|line| line.split(' ')).map(OsString::from).collect();
        if self.balloon {
            let qmp = format!("unix:{dir}/qmp.sock,server=on,wait=off");
            arguments.extend(["-device", "virtio-balloon-pci", "-qmp", &qmp].map(OsString::from));
        }
        arguments.push("-append".into());
        arguments.push(kernel.into());
        arguments
    }
}

/// What a command in the guest left.
#[derive(Clone, Debug)]
pub struct Finished {
    pub status: i32,
    /// Both output streams, in the order written.
    pub output: String,
}

impl Finished {
    pub fn success(&self) -> bool {
        self.status == 0
    }
}

/// A running guest. Dropping it kills QEMU.
#[derive(Debug)]
pub struct Vm {
    qemu: Child,
    shell: BufReader<UnixStream>,
    /// The start of a line that is not complete yet.
    partial: Vec<u8>,
    turn: u64,
    boot_id: String,
    dir: tempfile::TempDir,
}

impl Vm {
    /// Starts QEMU and waits until the guest's shell answers.
    pub fn boot(config: VmConfig) -> io::Result<Vm> {
        Vm::start(config)?.ready()
    }

    /// Starts QEMU only; [`Starting::ready`] waits for the guest. For tests in which the other side of
    /// the socket has still to come.
    pub fn start(config: VmConfig) -> io::Result<Starting> {
        build_image();
        let dir = tempfile::Builder::new().prefix("virtio-forwarder-guest-").tempdir()?;
        let log = File::create(dir.path().join("qemu.log"))?;
        let shell = UnixListener::bind(dir.path().join("shell.sock"))?;
        shell.set_nonblocking(true)?;
        let qemu = Command::new(config.qemu.program())
            .args(config.arguments(dir.path()))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        Ok(Starting { qemu: Some(qemu), shell, dir: Some(dir) })
    }

    /// Runs one line of shell in the guest.
    pub fn run(&mut self, command: &str) -> io::Result<Finished> {
        self.run_within(RUN_TIMEOUT, command)
    }

    /// Runs one line of shell in the guest. After a timeout the guest is still busy with it: kill it.
    pub fn run_within(&mut self, timeout: Duration, command: &str) -> io::Result<Finished> {
        assert!(!command.contains('\n'), "a command for the guest is one line: {command:?}");
        self.turn += 1;
        let turn = self.turn;
        writeln!(self.shell.get_mut(), "{turn} {command}")?;
        let mark = format!("@@end {turn} ");
        let (mut output, status) = self
            .read_until_mark(&mark, timeout)
            .map_err(|error| io::Error::new(error.kind(), format!("`{command}` in the guest: {error}")))?;
        // The mark starts a line of its own; the line break before it is the protocol's.
        output.pop();
        let status = status.parse().map_err(|_| io::Error::other(format!("`{mark}{status}` ends in no status")))?;
        Ok(Finished { status, output })
    }

    /// Like [`Vm::run`], for a command that has to succeed: its output.
    ///
    /// # Panics
    /// When it did not.
    pub fn must(&mut self, command: &str) -> String {
        let done = self.run(command).unwrap_or_else(|error| panic!("{error}"));
        assert!(done.success(), "`{command}` in the guest ended with {}: {}", done.status, done.output);
        done.output
    }

    /// Reboots the guest in place, QEMU and its vhost-user connection stay, and waits for its shell.
    pub fn reboot(&mut self) -> io::Result<()> {
        let before = self.boot_id.clone();
        self.turn += 1;
        writeln!(self.shell.get_mut(), "{} reboot -f", self.turn)?;
        self.wait_for_shell()?;
        if self.boot_id == before {
            return Err(io::Error::other("the guest's shell came back without a reboot"));
        }
        Ok(())
    }

    /// Its memory balloon ([`VmConfig::balloon`]), to be worked beside everything else.
    pub fn balloon(&self) -> io::Result<Balloon> {
        let qmp = BufReader::new(UnixStream::connect(self.dir.path().join("qmp.sock"))?);
        qmp.get_ref().set_read_timeout(Some(RUN_TIMEOUT))?;
        let mut balloon = Balloon { qmp, memory: self.memory()? };
        balloon.ask("{\"execute\": \"qmp_capabilities\"}")?;
        Ok(balloon)
    }

    /// The file that the guest's memory is in.
    fn memory(&self) -> io::Result<File> {
        let fds = fs::read_dir(format!("/proc/{}/fd", self.pid()))?.filter_map(Result::ok).map(|fd| fd.path());
        let is_memory = |fd: &PathBuf| fs::read_link(fd).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:"));
        let largest = fds.filter(is_memory).max_by_key(|fd| fs::metadata(fd).map_or(0, |file| file.len()));
        File::open(largest.ok_or_else(|| io::Error::other("QEMU has no memfd"))?)
    }

    /// Kills QEMU on the spot, as a crash would (SIGKILL).
    pub fn kill(mut self) -> io::Result<()> {
        self.qemu.kill()?;
        self.qemu.wait().map(drop)
    }

    /// QEMU's process id.
    pub fn pid(&self) -> u32 {
        self.qemu.id()
    }

    /// What the guest's kernel and QEMU had to say, for a failing test.
    pub fn logs(&self) -> String {
        logs(self.dir.path())
    }

    fn wait_for_shell(&mut self) -> io::Result<()> {
        let (_, boot_id) = self.read_until_mark("@@ready ", BOOT_TIMEOUT)?;
        self.boot_id = boot_id;
        Ok(())
    }

    /// Reads lines up to one that starts with `mark`: what came before it, and the rest of that line.
    fn read_until_mark(&mut self, mark: &str, timeout: Duration) -> io::Result<(String, String)> {
        let deadline = Instant::now() + timeout;
        let mut before = String::new();
        loop {
            match self.shell.read_until(b'\n', &mut self.partial) {
                Ok(0) => {
                    let status = self.qemu.wait()?;
                    return Err(self.failure(&format!("QEMU ended with {status}")));
                }
                Ok(_) if self.partial.ends_with(b"\n") => {
                    let line = String::from_utf8_lossy(&self.partial).into_owned();
                    self.partial.clear();
                    match line.strip_prefix(mark) {
                        Some(rest) => return Ok((before, rest.trim_end().to_string())),
                        None => before += &line,
                    }
                }
                Ok(_) => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => return Err(error),
            }
            if Instant::now() > deadline {
                let message = format!("no `{}` from the guest within {timeout:?}, but: {before}", mark.trim_end());
                return Err(self.failure(&message));
            }
        }
    }

    fn failure(&self, what: &str) -> io::Error {
        io::Error::other(format!("{what}\n{}", self.logs()))
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Both fail only for a process that is already gone.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// A guest's memory balloon.
#[derive(Debug)]
pub struct Balloon {
    qmp: BufReader<UnixStream>,
    memory: File,
}

impl Balloon {
    /// Leaves the guest so many MiB, and waits until it has no more, or has got them back.
    pub fn leave(&mut self, mib: u64) -> io::Result<()> {
        let bytes = mib << 20;
        self.ask(&format!("{{\"execute\": \"balloon\", \"arguments\": {{\"value\": {bytes}}}}}"))?;
        let deadline = Instant::now() + RUN_TIMEOUT;
        while self.ask("{\"execute\": \"query-balloon\"}")?["actual"] != bytes {
            if Instant::now() > deadline {
                return Err(io::Error::other(format!("the balloon does not leave {mib} MiB")));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Bytes of the guest's memory that are there.
    pub fn present(&self) -> io::Result<u64> {
        Ok(self.memory.metadata()?.blocks() * 512)
    }

    fn ask(&mut self, command: &str) -> io::Result<serde_json::Value> {
        writeln!(self.qmp.get_mut(), "{command}")?;
        loop {
            let mut line = String::new();
            if self.qmp.read_line(&mut line)? == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
            }
            let mut answer: serde_json::Value = serde_json::from_str(&line)?;
            if let Some(error) = answer.get("error") {
                return Err(io::Error::other(format!("{command}: {error}")));
            }
            // Not the greeting, nor an event.
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }
}

/// A QEMU that runs, with a guest whose shell was not heard of yet.
#[derive(Debug)]
pub struct Starting {
    /// `None` once it belongs to a [`Vm`].
    qemu: Option<Child>,
    shell: UnixListener,
    dir: Option<tempfile::TempDir>,
}

impl Starting {
    /// Waits for the guest's shell.
    pub fn ready(mut self) -> io::Result<Vm> {
        let stream = self.accept()?;
        // Short: it bounds how late a deadline is noticed.
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(Duration::from_millis(200)))?;
        let mut vm = Vm {
            qemu: self.qemu.take().expect("set by start, taken once"),
            shell: BufReader::new(stream),
            partial: Vec::new(),
            turn: 0,
            boot_id: String::new(),
            dir: self.dir.take().expect("set by start, taken once"),
        };
        vm.wait_for_shell()?;
        Ok(vm)
    }

    /// QEMU connects to its character devices before it looks at the network.
    fn accept(&mut self) -> io::Result<UnixStream> {
        let deadline = Instant::now() + BOOT_TIMEOUT;
        loop {
            match self.shell.accept() {
                Ok((stream, _)) => return Ok(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            let ended = self.qemu.as_mut().expect("not taken yet").try_wait()?;
            if ended.is_some() || Instant::now() > deadline {
                let dir = self.dir.as_ref().expect("not taken yet").path();
                let what = ended.map_or("QEMU hangs".to_string(), |status| format!("QEMU ended with {status}"));
                return Err(io::Error::other(format!("{what} before it started the guest\n{}", logs(dir))));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(qemu) = &mut self.qemu {
            let _ = qemu.kill();
            let _ = qemu.wait();
        }
    }
}

fn build_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("build")
}

/// The guest image, built once per test binary if it is missing or old.
fn build_image() {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/guest-image");
        let built = Command::new(&script).stdin(Stdio::null()).output().expect("scripts/guest-image starts");
        assert!(
            built.status.success(),
            "{} failed; scripts/setup installs what it needs:\n{}{}",
            script.display(),
            String::from_utf8_lossy(&built.stdout),
            String::from_utf8_lossy(&built.stderr),
        );
    });
}

fn logs(dir: &Path) -> String {
    let mut text = String::new();
    for name in ["qemu.log", "console.log"] {
        let bytes = fs::read(dir.join(name)).unwrap_or_default();
        let shown = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(4096)..]).into_owned();
        text += &format!("--- {name}\n{shown}\n");
    }
    text
}
