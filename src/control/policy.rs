//! What clients may ask for. The socket of a privileged daemon is not a way to open any device or to
//! write files: a client chooses among what the configuration allows.

use std::fmt;
use std::ops::RangeInclusive;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use super::api::Allowed;
use crate::error::{Error, Result};
use crate::session::socket::MAX_PATH;
use crate::vf::{PciAddress, VfSpec};

/// Values of the numeric keys that vdev drivers take without a bound of their own, each queue and ring of
/// which the device thread waits for.
const VDEV_NUMBERS: [(&str, RangeInclusive<u64>); 4] =
    [("qpairs", 1..=32), ("framecnt", 1..=16384), ("framesz", 1..=65536), ("blocksz", 1..=1 << 20)];
/// Drivers whose `iface` is an interface of the kernel.
const ON_INTERFACES: [&str; 3] = ["net_tap", "net_af_packet", "net_af_xdp"];
/// Bytes of its name that count: IFNAMSIZ without the final NUL. The drivers cut off the rest.
const INTERFACE_NAME: usize = 15;
/// Most memory the rings of a vdev may take in one direction, in bytes: it is the kernel's.
const MAX_VDEV_RINGS: u64 = 64 << 20;

/// How a claim of an interface begins.
pub(super) const INTERFACE_CLAIM: &str = "interface ";

/// The configured bounds.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Vdev drivers.
    pub vdevs: Vec<VdevRule>,
    /// PCI devices.
    pub pci: Vec<PciRule>,
    /// Where sockets may be.
    pub socket_dirs: Vec<SocketDir>,
    /// What stands in for absent PCI devices.
    pub stand_ins: Vec<StandIn>,
    /// Most bytes of a guest's memory that are mapped.
    pub guest_memory: u64,
    /// The daemon's own socket: no port's.
    pub control_socket: PathBuf,
    /// Usually `/sys`.
    pub sysfs: PathBuf,
}

/// A vdev driver with the argument keys that may be given. Text form: `net_tap:iface,mac`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VdevRule {
    /// Name without number.
    pub driver: String,
    /// Allowed keys.
    pub keys: Vec<String>,
}

/// Which PCI devices may be given. Text form: `vfs`, `any`, or an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PciRule {
    /// SR-IOV virtual functions: those with a `physfn` in sysfs.
    Vfs,
    /// Whatever DPDK can drive.
    Any,
    /// This one.
    Address(PciAddress),
}

/// A directory in which ports' sockets may be, not below.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketDir {
    named: PathBuf,
    real: PathBuf,
}

/// What is used instead of a PCI device that does not exist. Text form: `0000:5e:02.1=vdev:net_tap3,iface=vf3`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StandIn {
    /// The absent device.
    pub pci: PciAddress,
    /// What stands in.
    pub vf: VfSpec,
}

/// A socket path that was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SocketPath {
    /// As the client gave it.
    pub path: PathBuf,
    /// Without symbolic links on the way: two names of one socket have this in common.
    pub real: PathBuf,
}

impl Policy {
    /// Vdev drivers allowed by default. No key here names a file, takes over another device's traffic, is a
    /// memory address (`net_ring`'s `internal`), or makes frames longer than the buffers they are put into
    /// (`net_null`'s `size` and `copy`).
    pub fn default_vdevs() -> Vec<VdevRule> {
        [
            "net_null:no-rx",
            "net_ring",
            "net_tap:iface,mac",
            "net_af_packet:iface,qpairs,blocksz,framesz,framecnt,qdisc_bypass",
        ]
        .map(|rule| rule.parse().expect("the default rules are well formed"))
        .to_vec()
    }

    /// Socket directories allowed by default: our own, Open vSwitch's and vRouter's.
    pub const DEFAULT_SOCKET_DIRS: [&str; 3] = ["/run/virtio-forwarder", "/var/run/openvswitch", "/var/run/vrouter"];

    /// May a client name this VF? What depends on the device's presence is asked again by [`Self::resolve`].
    pub(super) fn check_vf(&self, vf: &VfSpec) -> Result<()> {
        match vf {
            VfSpec::SoftNull | VfSpec::SoftLoop => Ok(()),
            VfSpec::Pci(address) => self.check_pci(*address),
            VfSpec::Vdev { args, .. } => {
                let driver = vf.vdev_driver().unwrap_or_default();
                let rule = self.vdevs.iter().find(|rule| rule.driver == driver);
                let rule = rule.ok_or_else(|| {
                    let drivers: Vec<_> = self.vdevs.iter().map(|rule| &rule.driver).collect();
                    Error::NotAllowed(format!(
                        "vdev driver {driver:?} is not allowed: use one of {drivers:?}, or start the daemon with --allow-vdev {driver}"
                    ))
                })?;
                args.iter().try_for_each(|(key, value)| rule.check(key, value))?;
                rule.check_rings(args)
            }
        }
    }

    fn check_pci(&self, address: PciAddress) -> Result<()> {
        let device = self.device(address);
        let allowed = self.pci.iter().any(|rule| match rule {
            PciRule::Any => true,
            PciRule::Address(one) => *one == address,
            // What is not there cannot be refused for what it is.
            PciRule::Vfs => !device.exists() || device.join("physfn").exists(),
        });
        if allowed || (self.stand_in(address).is_some() && !device.exists()) {
            return Ok(());
        }
        let hint = format!("start the daemon with --allow-pci {address}");
        Err(Error::NotAllowed(if self.pci.contains(&PciRule::Vfs) {
            format!("PCI device {address} is not an SR-IOV VF (it has no physfn): name a VF, or {hint}")
        } else {
            format!("PCI device {address} is not allowed: {hint}")
        }))
    }

    /// Which device to probe for `vf` now, and whether it is a stand-in.
    pub(super) fn resolve(&self, vf: &VfSpec) -> Result<(VfSpec, bool)> {
        self.check_vf(vf)?;
        match vf {
            VfSpec::Pci(address) if !self.device(*address).exists() => Ok(match self.stand_in(*address) {
                Some(stand_in) => (stand_in.clone(), true),
                None => (vf.clone(), false),
            }),
            _ => Ok((vf.clone(), false)),
        }
    }

    /// What a port that names `vf` holds, so that no other port may: its device, the kernel's interface it is
    /// on, and what may stand in for it. Soft VFs are as many as are asked for.
    pub(super) fn claims(&self, vf: &VfSpec) -> Vec<String> {
        match vf {
            VfSpec::SoftNull | VfSpec::SoftLoop => vec![],
            VfSpec::Vdev { name, args } => {
                let on_interface = vf.vdev_driver().is_some_and(|driver| ON_INTERFACES.contains(&driver));
                let interface = args.iter().filter(|(key, _)| on_interface && key == "iface");
                let interface = interface.map(|(_, value)| {
                    let known: String = value.chars().take(INTERFACE_NAME).collect();
                    format!("{INTERFACE_CLAIM}{known}")
                });
                [format!("vdev:{name}")].into_iter().chain(interface).collect()
            }
            VfSpec::Pci(address) => {
                let mut claims = vec![address.to_string()];
                claims.extend(self.stand_in(*address).iter().flat_map(|vf| self.claims(vf)));
                claims
            }
        }
    }

    fn stand_in(&self, address: PciAddress) -> Option<&VfSpec> {
        let mut all = self.stand_ins.iter();
        all.find(|one| one.pci == address).map(|one| &one.vf)
    }

    fn device(&self, address: PciAddress) -> PathBuf {
        self.sysfs.join("bus/pci/devices").join(address.to_string())
    }

    /// Checks a socket path: absolute, short enough, directly in an allowed directory.
    pub(super) fn socket(&self, text: &str) -> Result<SocketPath> {
        let invalid = |what: String| Error::Invalid(format!("socket path {text:?} {what}"));
        if text.len() > MAX_PATH {
            let what = format!("has {} bytes: at most {MAX_PATH} are possible", text.len());
            return Err(invalid(what));
        }
        if text.chars().any(char::is_control) {
            return Err(invalid("contains control characters: leave them out".into()));
        }
        let path = Path::new(text);
        let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        if !path.is_absolute() || !plain {
            return Err(invalid("has to be absolute, without \"..\"".into()));
        }
        let directory = text.ends_with('/') || text.ends_with("/.");
        let (Some(parent), Some(name), false) = (path.parent(), path.file_name(), directory) else {
            return Err(invalid("has to end with the name of a file".into()));
        };
        let dir = self
            .socket_dirs
            .iter()
            .find(|dir| dir.named == parent || dir.real == parent)
            .ok_or_else(|| {
                let dirs: Vec<_> = self.socket_dirs.iter().map(|dir| &dir.named).collect();
                Error::NotAllowed(format!(
                    "socket path {text:?} is not directly in an allowed directory: use one of {dirs:?}, or start the daemon with --socket-dir {}",
                    parent.display()
                ))
            })?;
        if real_path(&dir.real) != dir.real {
            return Err(Error::NotAllowed(format!(
                "socket path {text:?} is in a directory that was replaced by a symbolic link: put the directory \
                 back, or restart the daemon"
            )));
        }
        let real = dir.real.join(name);
        if real.as_os_str().len() > MAX_PATH {
            return Err(invalid(format!("is {real:?}, which is longer than {MAX_PATH} bytes")));
        }
        if real == real_path(&self.control_socket) {
            return Err(invalid("is the daemon's control socket: choose another name".into()));
        }
        let path = parent.components().collect::<PathBuf>().join(name);
        Ok(SocketPath { path, real })
    }

    /// For `info`.
    pub(super) fn view(&self) -> Allowed {
        fn texts(all: &[impl ToString]) -> Vec<String> {
            all.iter().map(ToString::to_string).collect()
        }
        Allowed {
            vdevs: texts(&self.vdevs),
            pci: texts(&self.pci),
            socket_dirs: texts(&self.socket_dirs),
            stand_ins: texts(&self.stand_ins),
        }
    }
}

impl VdevRule {
    fn check(&self, key: &str, value: &str) -> Result<()> {
        let Self { driver, keys } = self;
        if !keys.iter().any(|allowed| allowed == key) {
            // The option replaces the driver's rule, so it names what is allowed now, too.
            let all: Vec<_> = keys.iter().map(String::as_str).chain([key]).collect();
            return Err(Error::NotAllowed(format!(
                "argument {key:?} of {driver} is not allowed: use one of {keys:?}, or start the daemon with \
                 --allow-vdev {driver}:{}",
                all.join(",")
            )));
        }
        // None of the default keys takes one, and an allowed key must not turn out to name a file.
        if value.contains('/') || value.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return Err(Error::NotAllowed(format!(
                "argument {key}={value:?} of {driver} contains a slash, white space or a control character: leave it out"
            )));
        }
        if let Some((_, range)) = VDEV_NUMBERS.iter().find(|(number, _)| *number == key)
            && !decimal(value).is_some_and(|number| range.contains(&number))
        {
            let (low, high) = (range.start(), range.end());
            return Err(Error::Invalid(format!(
                "argument {key}={value:?} of {driver} is out of range: use a decimal number, {low} to {high}"
            )));
        }
        Ok(())
    }

    /// Each of the numbers may be large, not all of them.
    fn check_rings(&self, args: &[(String, String)]) -> Result<()> {
        // Defaults are net_af_packet's.
        let number = |key: &str, default: u64| {
            args.iter().find(|(name, _)| name == key).and_then(|(_, value)| decimal(value)).unwrap_or(default)
        };
        let (pairs, frames, size) = (number("qpairs", 1), number("framecnt", 512), number("framesz", 2048));
        // Cannot overflow: each is at most what VDEV_NUMBERS says.
        let bytes = pairs * frames * size;
        if bytes > MAX_VDEV_RINGS {
            return Err(Error::Invalid(format!(
                "the rings of this {} would take {bytes} bytes (qpairs {pairs} × framecnt {frames} × framesz {size}): \
                 use at most {MAX_VDEV_RINGS}",
                self.driver
            )));
        }
        Ok(())
    }
}

/// Digits only: drivers would also take a sign, white space, octal and hexadecimal.
fn decimal(text: &str) -> Option<u64> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    text.parse().ok().filter(|_| plain)
}

impl FromStr for VdevRule {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (driver, keys) = text.split_once(':').unwrap_or((text, ""));
        let word = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "_-".contains(c));
        let keys: Vec<_> = keys.split(',').filter(|key| !key.is_empty()).collect();
        if !word(driver) || driver.ends_with(|c: char| c.is_ascii_digit()) || !keys.iter().all(|key| word(key)) {
            return Err(Error::Invalid(format!(
                "vdev rule {text:?} is not DRIVER[:KEY,KEY...]: e.g. net_tap:iface,mac (the driver's name has no number)"
            )));
        }
        Ok(Self { driver: driver.to_owned(), keys: keys.into_iter().map(str::to_owned).collect() })
    }
}

impl fmt::Display for VdevRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.driver)?;
        if !self.keys.is_empty() {
            write!(f, ":{}", self.keys.join(","))?;
        }
        Ok(())
    }
}

impl FromStr for PciRule {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "vfs" => Ok(Self::Vfs),
            "any" => Ok(Self::Any),
            address => address.parse().map(Self::Address).map_err(|_| {
                Error::Invalid(format!("PCI rule {text:?} is none of: vfs, any, or an address such as 0000:05:08.1"))
            }),
        }
    }
}

impl fmt::Display for PciRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vfs => f.write_str("vfs"),
            Self::Any => f.write_str("any"),
            Self::Address(address) => address.fmt(f),
        }
    }
}

impl SocketDir {
    /// An absolute directory without `..`. Its symbolic links are followed once, now: what it points to
    /// later does not matter, and need not exist yet.
    pub fn new(path: &Path) -> Result<Self> {
        let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        if !path.is_absolute() || !plain {
            return Err(Error::Invalid(format!("socket directory {path:?} has to be absolute, without \"..\"")));
        }
        Ok(Self { named: path.components().collect(), real: real_path(path) })
    }
}

impl FromStr for SocketDir {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::new(Path::new(text))
    }
}

impl fmt::Display for SocketDir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.named.display().fmt(f)
    }
}

/// `path` with the symbolic links of its existing part followed.
fn real_path(path: &Path) -> PathBuf {
    for ancestor in path.ancestors() {
        if let (Ok(real), Ok(rest)) = (ancestor.canonicalize(), path.strip_prefix(ancestor)) {
            return real.join(rest).components().collect();
        }
    }
    path.to_owned()
}

impl FromStr for StandIn {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |why: &str| {
            Error::Invalid(format!("stand-in {text:?} {why}: write PCI=VF, e.g. 0000:5e:02.1=vdev:net_tap3,iface=vf3"))
        };
        let (pci, vf) = text.split_once('=').ok_or_else(|| wrong("has no \"=\""))?;
        let pci = pci.parse().map_err(|_| wrong("does not begin with a PCI address"))?;
        match vf.parse()? {
            VfSpec::Pci(_) => Err(wrong("is itself a PCI device, which may be absent too")),
            vf => Ok(Self { pci, vf }),
        }
    }
}

impl fmt::Display for StandIn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.pci, self.vf)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(sysfs: &Path) -> Policy {
        Policy {
            guest_memory: 1 << 40,
            vdevs: Policy::default_vdevs(),
            pci: vec![PciRule::Vfs],
            socket_dirs: vec!["/run/virtio-forwarder".parse().unwrap()],
            stand_ins: vec!["0000:5e:02.1=vdev:net_tap3,iface=vf3".parse().unwrap()],
            control_socket: "/run/virtio-forwarder/control.sock".into(),
            sysfs: sysfs.to_owned(),
        }
    }

    #[test]
    fn vdevs_are_bounded_by_driver_and_key() {
        let policy = policy(Path::new("/nonexistent"));
        for (vf, code) in [
            ("soft:null", None),
            ("soft:loop", None),
            ("vdev:net_null0", None),
            ("vdev:net_null0,no-rx=1", None),
            ("vdev:net_null0,size=9000", Some("not_allowed")),
            ("vdev:net_null0,copy=1", Some("not_allowed")),
            ("vdev:net_tap7,iface=vf7", None),
            ("vdev:net_tap7,remote=eth0", Some("not_allowed")),
            ("vdev:net_tap7,iface=../x", Some("not_allowed")),
            ("vdev:net_ring0,internal=0x7fff", Some("not_allowed")),
            ("vdev:net_pcap0,tx_pcap=/etc/passwd", Some("not_allowed")),
            ("vdev:net_null_file0", Some("not_allowed")),
        ] {
            let got = policy.check_vf(&vf.parse().unwrap()).err().map(|e| e.code());
            assert_eq!(got, code, "{vf}");
        }
    }

    #[test]
    fn numbers_of_vdevs_are_bounded() {
        let policy = policy(Path::new("/nonexistent"));
        let check = |args: &str| policy.check_vf(&format!("vdev:net_af_packet0,iface=lo,{args}").parse().unwrap());
        for args in
            ["qpairs=1", "qpairs=32", "framecnt=16384", "framesz=65536", "blocksz=1048576", "qpairs=32,framecnt=1024"]
        {
            check(args).unwrap_or_else(|error| panic!("{args}: {error}"));
        }
        for (args, parts) in [
            ("qpairs=65535", ["qpairs", "65535", "1 to 32"]),
            ("qpairs=33", ["qpairs", "33", "1 to 32"]),
            ("qpairs=0", ["qpairs", "0", "1 to 32"]),
            ("qpairs=0x10", ["qpairs", "0x10", "decimal"]),
            ("qpairs=010", ["qpairs", "010", "decimal"]),
            ("qpairs=-1", ["qpairs", "-1", "decimal"]),
            ("qpairs=18446744073709551617", ["qpairs", "18446744073709551617", "1 to 32"]),
            ("framecnt=16385", ["framecnt", "16385", "1 to 16384"]),
            ("framesz=65537", ["framesz", "65537", "1 to 65536"]),
            ("blocksz=1048577", ["blocksz", "1048577", "1 to 1048576"]),
            ("qpairs=32,framecnt=16384,framesz=65536", ["34359738368", "framecnt 16384", "at most 67108864"]),
        ] {
            let error = check(args).unwrap_err();
            assert_eq!(error.code(), "invalid", "{args}");
            parts.iter().for_each(|part| assert!(error.to_string().contains(part), "{args}: {error}"));
        }
    }

    #[test]
    fn only_vfs_and_absent_devices_pass_and_stand_ins_only_for_absent_ones() {
        let sysfs = tempfile::tempdir().unwrap();
        let devices = sysfs.path().join("bus/pci/devices");
        let add = |address: &str, vf: bool| {
            std::fs::create_dir_all(devices.join(address)).unwrap();
            if vf {
                std::os::unix::fs::symlink("../x", devices.join(address).join("physfn")).unwrap();
                std::fs::create_dir_all(devices.join("x")).unwrap();
            }
        };
        add("0000:05:00.0", false);
        add("0000:05:08.1", true);
        let mut policy = policy(sysfs.path());
        let resolve = |policy: &Policy, vf: &str| {
            let (vf, stand_in) = policy.resolve(&vf.parse().unwrap()).map_err(|e| e.code())?;
            Ok::<_, &str>((vf.to_string(), stand_in))
        };
        assert_eq!(resolve(&policy, "0000:05:00.0"), Err("not_allowed"));
        assert_eq!(resolve(&policy, "0000:05:08.1"), Ok(("0000:05:08.1".into(), false)));
        assert_eq!(resolve(&policy, "0000:05:08.2"), Ok(("0000:05:08.2".into(), false)));
        let stand_in = "vdev:net_tap3,iface=vf3".to_owned();
        assert_eq!(resolve(&policy, "0000:5e:02.1"), Ok((stand_in, true)));
        add("0000:5e:02.1", false);
        assert_eq!(resolve(&policy, "0000:5e:02.1"), Err("not_allowed"), "it is there, and no VF");
        policy.pci.push("0000:05:00.0".parse().unwrap());
        assert_eq!(resolve(&policy, "0000:05:00.0"), Ok(("0000:05:00.0".into(), false)));
        assert_eq!(policy.claims(&"0000:5e:02.1".parse().unwrap()), ["0000:5e:02.1", "vdev:net_tap3", "interface vf3"]);
    }

    #[test]
    fn socket_paths_stay_directly_in_their_directories() {
        let policy = policy(Path::new("/nonexistent"));
        let long = format!("/run/virtio-forwarder/{}", "x".repeat(86));
        for (path, expected) in [
            ("/run/virtio-forwarder/a.sock", Ok("/run/virtio-forwarder/a.sock")),
            ("/run//virtio-forwarder///a.sock", Ok("/run/virtio-forwarder/a.sock")),
            ("a.sock", Err("invalid")),
            ("", Err("invalid")),
            ("/", Err("invalid")),
            ("/run/virtio-forwarder/", Err("invalid")),
            ("/run/virtio-forwarder/.", Err("invalid")),
            ("/run/virtio-forwarder/..", Err("invalid")),
            ("/run/virtio-forwarder/../x", Err("invalid")),
            ("/run/virtio-forwarder/a\nb", Err("invalid")),
            ("/run/virtio-forwarder/control.sock", Err("invalid")),
            (long.as_str(), Err("invalid")),
            ("/run/virtio-forwarder/below/a.sock", Err("not_allowed")),
            ("/etc/a.sock", Err("not_allowed")),
            ("/run/virtio-forwarder", Err("not_allowed")),
        ] {
            let got = policy.socket(path).map_err(|e| e.code());
            let got = got.as_ref().map(|ok| ok.path.to_str().unwrap());
            assert_eq!(got.map_err(|e| *e), expected, "{path}");
        }
    }

    #[test]
    fn two_names_of_a_directory_are_one() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        std::fs::create_dir(root.join("run")).unwrap();
        std::os::unix::fs::symlink("run", root.join("alias")).unwrap();
        let mut policy = policy(Path::new("/nonexistent"));
        policy.socket_dirs = vec![SocketDir::new(&root.join("alias/ovs")).unwrap()];
        let real = |dir: &str| {
            let path = root.join(dir).join("ovs/vhu1");
            policy.socket(path.to_str().unwrap()).unwrap().real
        };
        assert_eq!(real("alias"), real("run"));
    }

    #[test]
    fn a_link_that_leads_elsewhere_later_is_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        let link = |to: &str, name: &str| std::os::unix::fs::symlink(to, root.join(name)).unwrap();
        std::fs::create_dir(root.join("run")).unwrap();
        std::fs::create_dir(root.join("etc")).unwrap();
        link("run", "alias");
        let mut policy = policy(Path::new("/nonexistent"));
        policy.socket_dirs = ["alias", "run"].map(|dir| SocketDir::new(&root.join(dir)).unwrap()).to_vec();
        let socket = |dir: &str| policy.socket(root.join(dir).join("a").to_str().unwrap());
        let before = socket("alias").unwrap();
        std::fs::remove_file(root.join("alias")).unwrap();
        link("etc", "alias");
        assert_eq!(socket("alias").unwrap(), before, "the same request is the same port");
        assert_eq!(before.real, root.join("run/a"));
        std::fs::rename(root.join("run"), root.join("moved")).unwrap();
        link("etc", "run");
        for dir in ["alias", "run"] {
            assert_eq!(socket(dir).unwrap_err().code(), "not_allowed");
        }
    }
}
