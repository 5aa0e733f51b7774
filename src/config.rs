//! The daemon's configuration: flags, environment and a TOML file, checked, in one value.
//!
//! A flag wins over its environment variable, that over the file, that over the default. Everything in
//! the file has a flag and the other way round. An unknown key or an impossible value is refused, with
//! the place it came from.

mod source;

use std::path::PathBuf;

use clap::Parser;
use rustix::thread::CpuSet;
use serde::Deserialize;
use toml::Spanned;
use tracing_subscriber::EnvFilter;

use self::source::{Origin, Source, Sourced, list};
use crate::control::api::{FileMode, NameOrNumber};
use crate::control::{ControlSocket, PciRule, Policy, SocketDefaults, SocketDir, StandIn, VdevRule, group_id, user_id};
use crate::error::{Error, Result};
use crate::guest::GuestMemory;

/// Where the control socket is by default.
pub const DEFAULT_CONTROL_SOCKET: &str = "/run/virtio-forwarder/control.sock";
/// MiB of memory without hugepages, by default: room for a dozen ports.
const DEFAULT_MEMORY: u32 = 512;
const GIB: u64 = 1 << 30;

/// Forwards packets between virtio-net guests (vhost-user) and SR-IOV VFs, on pinned poll cores.
///
/// Ports are attached and detached with vfctl, on the control socket. The daemon is ready when that answers.
#[derive(Clone, Debug, Default, Parser)]
#[command(name = "virtio-forwarder", version)]
pub struct Args {
    /// TOML file; its keys are named like these flags
    #[arg(long, value_name = "FILE", env = "VIRTIO_FORWARDER_CONFIG")]
    config: Option<PathBuf>,
    /// Where clients ask [default: /run/virtio-forwarder/control.sock]
    #[arg(long, value_name = "PATH", env = "VIRTIO_FORWARDER_CONTROL_SOCKET")]
    control_socket: Option<PathBuf>,
    /// Group of the control socket, by name or number [default: the daemon's]
    #[arg(long, value_name = "GROUP", env = "VIRTIO_FORWARDER_CONTROL_GROUP")]
    control_group: Option<String>,
    /// Permission bits of the control socket [default: 0660]
    #[arg(long, value_name = "OCTAL", env = "VIRTIO_FORWARDER_CONTROL_MODE")]
    control_mode: Option<String>,
    /// CPUs that poll, e.g. 1,2 or 1-3 [default: the last CPU the daemon may run on]
    #[arg(long, value_name = "CPUS", env = "VIRTIO_FORWARDER_CORES")]
    cores: Option<String>,
    /// Never sleep: poll also when there is nothing to do
    #[arg(long)]
    poll: bool,
    /// Run without hugepages
    #[arg(long)]
    no_huge: bool,
    /// MiB of memory with --no-huge, which cannot grow [default: 512]
    #[arg(long, value_name = "MIB", env = "VIRTIO_FORWARDER_MEMORY")]
    memory: Option<u32>,
    /// GiB of memory one guest may have: more is not mapped [default: 1024]
    #[arg(long, value_name = "GIB", env = "VIRTIO_FORWARDER_GUEST_MEMORY")]
    guest_memory: Option<u64>,
    /// One more argument for DPDK's EAL, as it is; may be repeated
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    eal_arg: Vec<String>,
    /// error, warn, info, debug, trace, or a filter such as info,virtio_forwarder::session=debug [default: info]
    #[arg(long, value_name = "LEVEL", env = "VIRTIO_FORWARDER_LOG")]
    log: Option<String>,
    /// A directory in which ports' sockets may be; may be repeated [default: /run/virtio-forwarder,
    /// /var/run/openvswitch, /var/run/vrouter]
    #[arg(long, value_name = "DIR")]
    socket_dir: Vec<String>,
    /// Owner of listening sockets for which clients name none [default: the daemon's user]
    #[arg(long, value_name = "USER", env = "VIRTIO_FORWARDER_SOCKET_OWNER")]
    socket_owner: Option<String>,
    /// Group of listening sockets for which clients name none [default: the daemon's]
    #[arg(long, value_name = "GROUP", env = "VIRTIO_FORWARDER_SOCKET_GROUP")]
    socket_group: Option<String>,
    /// Permission bits of listening sockets for which clients name none [default: 0660]
    #[arg(long, value_name = "OCTAL", env = "VIRTIO_FORWARDER_SOCKET_MODE")]
    socket_mode: Option<String>,
    /// A vdev driver clients may use, with all argument keys they may use; may be repeated, added to the default
    /// (net_null, net_ring, net_tap, net_af_packet with harmless keys), or instead of its rule for this driver
    #[arg(long, value_name = "DRIVER[:KEY,..]")]
    allow_vdev: Vec<String>,
    /// PCI devices clients may use: vfs, any, or an address; may be repeated, added to the default (vfs)
    #[arg(long, value_name = "RULE")]
    allow_pci: Vec<String>,
    /// What is used instead of a PCI device that does not exist; may be repeated
    #[arg(long, value_name = "PCI=VF")]
    stand_in: Vec<String>,
}

/// The file. Its keys are the flags', with underscores; a list is written as a list.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    control_socket: Option<Spanned<PathBuf>>,
    control_group: Option<Spanned<NameOrNumber>>,
    control_mode: Option<Spanned<String>>,
    cores: Option<Spanned<CoresText>>,
    poll: Option<bool>,
    no_huge: Option<bool>,
    memory: Option<Spanned<u32>>,
    guest_memory: Option<Spanned<u64>>,
    #[serde(default)]
    eal_args: Vec<String>,
    log: Option<Spanned<String>>,
    #[serde(default)]
    socket_dirs: Vec<Spanned<String>>,
    socket_owner: Option<Spanned<NameOrNumber>>,
    socket_group: Option<Spanned<NameOrNumber>>,
    socket_mode: Option<Spanned<String>>,
    #[serde(default)]
    allow_vdevs: Vec<Spanned<String>>,
    #[serde(default)]
    allow_pci: Vec<Spanned<String>>,
    #[serde(default)]
    stand_ins: Vec<Spanned<String>>,
}

/// Keys of [`File`], for suggestions.
const KEYS: [&str; 17] = [
    "control_socket",
    "control_group",
    "control_mode",
    "cores",
    "poll",
    "no_huge",
    "memory",
    "guest_memory",
    "eal_args",
    "log",
    "socket_dirs",
    "socket_owner",
    "socket_group",
    "socket_mode",
    "allow_vdevs",
    "allow_pci",
    "stand_ins",
];

/// `"1-3,5"` or `[1, 2, 3, 5]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum CoresText {
    Text(String),
    List(Vec<usize>),
}

/// The configuration, checked: every value can be used.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where clients ask.
    pub control_socket: ControlSocket,
    /// CPUs of the poll cores, at least one, each once, all of them usable by this process.
    pub cores: Vec<usize>,
    /// Poll cores never sleep.
    pub poll: bool,
    /// Run without hugepages.
    pub no_huge: bool,
    /// MiB of memory then.
    pub memory: u32,
    /// More arguments for the EAL.
    pub eal_args: Vec<String>,
    /// A filter for `tracing_subscriber::EnvFilter`.
    pub log: String,
    /// What sockets get when a client does not say.
    pub socket_defaults: SocketDefaults,
    /// What clients may ask for.
    pub policy: Policy,
}

impl Source<'_> {
    fn parse(&self) -> Result<File> {
        toml::from_str(self.text).map_err(|error| {
            let origin = self.origin(error.span().unwrap_or(0..0));
            let message = error.message();
            let unknown = message.strip_prefix("unknown field `").and_then(|rest| rest.split('`').next());
            Error::Invalid(match unknown {
                Some(key) => format!("{origin}: there is no key {key:?}{}", suggestion(key)),
                None => format!("{origin}: {message}"),
            })
        })
    }
}

/// The key that was meant, or all of them.
fn suggestion(key: &str) -> String {
    let close = KEYS.iter().map(|known| (strsim::damerau_levenshtein(key, known), known)).min();
    match close {
        Some((distance, known)) if distance <= 2 || known.starts_with(key) => format!(": did you mean {known:?}?"),
        _ => format!(": there are {}", KEYS.join(", ")),
    }
}

impl Config {
    /// Reads the file, if one is named, and checks everything.
    pub fn new(args: Args) -> Result<Self> {
        let text = match &args.config {
            Some(path) => std::fs::read_to_string(path)
                .map_err(Error::io(format!("reading configuration file {}", path.display())))?,
            None => String::new(),
        };
        Self::merge(args, &text, &affinity()?)
    }

    /// `usable` holds the CPUs this process may run on, ascending.
    fn merge(args: Args, text: &str, usable: &[usize]) -> Result<Self> {
        let path = args.config.clone().unwrap_or_default();
        let source = Source { path: &path, text };
        let file = source.parse()?;

        let text_of = |flag: &'static str, value: Option<String>, in_file: Option<Spanned<String>>| {
            value.map(|value| Sourced(value, Origin::Flag(flag))).or(in_file.map(|value| source.value(value)))
        };
        let name_of = |flag: &'static str, value: Option<String>, in_file: Option<Spanned<NameOrNumber>>| {
            let value = value.map(|value| Sourced(NameOrNumber::Name(value), Origin::Flag(flag)));
            value.or(in_file.map(|value| source.value(value)))
        };
        let mode_of =
            |value: Option<Sourced<String>>| value.map_or(Ok(FileMode(0o660)), |mode| mode.check(|m| m.parse()));

        let control_socket = match args.control_socket {
            Some(path) => Sourced(path, Origin::Flag("control-socket")),
            None => file
                .control_socket
                .map_or(Sourced(DEFAULT_CONTROL_SOCKET.into(), Origin::Default), |path| source.value(path)),
        };
        let control_socket =
            control_socket.check(|path| std::path::absolute(&path).map_err(Error::io("absolute path")))?;
        let control_gid = name_of("control-group", args.control_group, file.control_group)
            .map(|group| group.check(|group| group_id(&group.to_string())))
            .transpose()?;
        let control_mode = mode_of(text_of("control-mode", args.control_mode, file.control_mode))?;

        let cores = match args.cores {
            Some(text) => Sourced(CoresText::Text(text), Origin::Flag("cores")).check(|text| text.resolve(usable))?,
            None => match file.cores {
                Some(text) => source.value(text).check(|text| text.resolve(usable))?,
                // The first CPUs get the interrupts and the housekeeping.
                None => usable.last().copied().into_iter().collect(),
            },
        };

        let memory = match args.memory {
            Some(memory) => Sourced(memory, Origin::Flag("memory")),
            None => file.memory.map_or(Sourced(DEFAULT_MEMORY, Origin::Default), |memory| source.value(memory)),
        };
        let memory = memory.check(|memory| match memory {
            64..=1_048_576 => Ok(memory),
            _ => Err(Error::Invalid(format!("{memory} MiB of memory: use 64 to 1048576"))),
        })?;
        let guest_memory = match args.guest_memory {
            Some(gib) => Sourced(gib, Origin::Flag("guest-memory")),
            None => file
                .guest_memory
                .map_or(Sourced(GuestMemory::DEFAULT_LIMIT / GIB, Origin::Default), |gib| source.value(gib)),
        };
        let guest_memory = guest_memory.check(|gib| match gib {
            1..=32768 => Ok(gib * GIB),
            _ => Err(Error::Invalid(format!("{gib} GiB of memory for a guest: use 1 to 32768"))),
        })?;
        let log = match text_of("log", args.log, file.log) {
            Some(log) => log.check(log_filter)?,
            None => "info".to_owned(),
        };

        let socket_owner = name_of("socket-owner", args.socket_owner, file.socket_owner);
        let socket_group = name_of("socket-group", args.socket_group, file.socket_group);
        let socket_defaults = SocketDefaults {
            owner: socket_owner.map(|owner| owner.check(known(user_id))).transpose()?,
            group: socket_group.map(|group| group.check(known(group_id))).transpose()?,
            mode: mode_of(text_of("socket-mode", args.socket_mode, file.socket_mode))?,
        };

        let mut socket_dirs: Vec<SocketDir> = list("socket-dir", args.socket_dir, file.socket_dirs, &source)?;
        if socket_dirs.is_empty() {
            socket_dirs = Policy::DEFAULT_SOCKET_DIRS.iter().map(|dir| dir.parse()).collect::<Result<_>>()?;
        }
        // A rule of ours for a driver takes the place of the default one.
        let mut vdevs: Vec<VdevRule> = list("allow-vdev", args.allow_vdev, file.allow_vdevs, &source)?;
        for rule in Policy::default_vdevs() {
            if !vdevs.iter().any(|ours| ours.driver == rule.driver) {
                vdevs.push(rule);
            }
        }
        let mut pci: Vec<PciRule> = list("allow-pci", args.allow_pci, file.allow_pci, &source)?;
        pci.insert(0, PciRule::Vfs);
        let stand_ins: Vec<StandIn> = list("stand-in", args.stand_in, file.stand_ins, &source)?;

        Ok(Self {
            cores,
            poll: args.poll || file.poll.unwrap_or(false),
            no_huge: args.no_huge || file.no_huge.unwrap_or(false),
            memory,
            eal_args: if args.eal_arg.is_empty() { file.eal_args } else { args.eal_arg },
            log,
            socket_defaults,
            policy: Policy {
                vdevs,
                pci,
                socket_dirs,
                stand_ins,
                guest_memory,
                control_socket: control_socket.clone(),
                sysfs: "/sys".into(),
            },
            control_socket: ControlSocket { path: control_socket, mode: control_mode.0, gid: control_gid },
        })
    }
}

/// A user or group that exists now; kept by name.
fn known(resolve: fn(&str) -> Result<u32>) -> impl FnOnce(NameOrNumber) -> Result<NameOrNumber> {
    move |name| resolve(&name.to_string()).map(|_| name)
}

fn log_filter(text: String) -> Result<String> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    // A single word is a level; EnvFilter would take any word for a module of that name.
    let word = text.chars().all(|c| c.is_ascii_alphanumeric());
    let known = !word || LEVELS.contains(&text.to_ascii_lowercase().as_str());
    match EnvFilter::try_new(&text) {
        Ok(_) if known => Ok(text),
        _ => Err(Error::Invalid(format!(
            "log filter {text:?} is not understood: use one of {LEVELS:?}, or e.g. info,virtio_forwarder::session=debug"
        ))),
    }
}

impl CoresText {
    /// The CPUs, in order; each has to be in `usable`.
    fn resolve(self, usable: &[usize]) -> Result<Vec<usize>> {
        let cores = match self {
            Self::List(list) => list,
            Self::Text(text) => parse_cores(&text)?,
        };
        if cores.is_empty() {
            return Err(Error::Invalid("no CPU is named: name at least one to poll on".into()));
        }
        for (index, cpu) in cores.iter().enumerate() {
            if !usable.contains(cpu) {
                return Err(Error::Invalid(format!(
                    "CPU {cpu} cannot be used by this process: choose among {usable:?}"
                )));
            }
            if cores[..index].contains(cpu) {
                return Err(Error::Invalid(format!("CPU {cpu} is named twice: name it once")));
            }
        }
        Ok(cores)
    }
}

fn parse_cores(text: &str) -> Result<Vec<usize>> {
    let wrong = || Error::Invalid(format!("{text:?} is not a list of CPUs: write e.g. 1,2 or 1-3"));
    let number = |text: &str| text.trim().parse::<usize>().ok().filter(|cpu| *cpu < CpuSet::MAX_CPU);
    let mut cores = vec![];
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = number(first).zip(number(last)).ok_or_else(wrong)?;
        if first > last {
            return Err(wrong());
        }
        cores.extend(first..=last);
    }
    Ok(cores)
}

/// CPUs this process may run on, ascending.
fn affinity() -> Result<Vec<usize>> {
    let set = rustix::thread::sched_getaffinity(None).map_err(|errno| Error::io("sched_getaffinity")(errno.into()))?;
    Ok((0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn config(flags: &[&str], text: &str) -> Result<Config, String> {
        let mut argv = vec!["virtio-forwarder", "--config", "vf.toml"];
        argv.extend(flags);
        let args = Args::try_parse_from(argv).map_err(|error| error.to_string())?;
        Config::merge(args, text, &[0, 1, 2, 3]).map_err(|error| error.to_string())
    }

    #[test]
    fn defaults() {
        let config = config(&[], "").unwrap();
        assert_eq!(config.control_socket.path, Path::new("/run/virtio-forwarder/control.sock"));
        assert_eq!((config.control_socket.mode, config.control_socket.gid), (0o660, None));
        assert_eq!(config.cores, [3]);
        assert!(!config.poll && !config.no_huge);
        assert_eq!((config.memory, config.log.as_str()), (512, "info"));
        assert_eq!(config.policy.guest_memory, 1 << 40);
        assert_eq!(config.policy.vdevs, Policy::default_vdevs());
        assert_eq!(config.policy.pci, [PciRule::Vfs]);
        assert_eq!(config.policy.socket_dirs.len(), 3);
    }

    #[test]
    fn a_flag_wins_over_the_file() {
        let text = r#"
            control_socket = "/run/x.sock"
            control_group = 0
            control_mode = "0600"
            cores = [1, 2]
            poll = true
            memory = 256
            guest_memory = 64
            eal_args = ["--log-level=8"]
            socket_dirs = ["/run/a"]
            socket_owner = "root"
            allow_vdevs = ["net_memif:id", "net_tap:iface"]
            allow_pci = ["0000:05:00.0"]
            stand_ins = ["0000:5e:02.1=vdev:net_tap3,iface=vf3"]
        "#;
        let from_file = config(&[], text).unwrap();
        assert_eq!(from_file.control_socket.path, Path::new("/run/x.sock"));
        assert_eq!((from_file.control_socket.mode, from_file.control_socket.gid), (0o600, Some(0)));
        assert_eq!(from_file.cores, [1, 2]);
        assert!(from_file.poll);
        assert_eq!(from_file.policy.guest_memory, 64 << 30);
        assert_eq!(from_file.eal_args, ["--log-level=8"]);
        assert_eq!(from_file.socket_defaults.owner, Some(NameOrNumber::Name("root".into())));
        let vdevs: Vec<_> = from_file.policy.vdevs.iter().map(ToString::to_string).collect();
        assert_eq!(vdevs[..2], ["net_memif:id", "net_tap:iface"]);
        assert_eq!(vdevs.len(), 5, "the other defaults stay, net_tap's is replaced: {vdevs:?}");
        assert_eq!(from_file.policy.pci.len(), 2);
        assert_eq!(from_file.policy.stand_ins[0].to_string(), "0000:5e:02.1=vdev:net_tap3,iface=vf3");

        let flags = ["--cores", "0-1,3", "--memory", "1024", "--socket-dir", "/run/b", "--eal-arg", "-v"];
        let both = config(&flags, text).unwrap();
        assert_eq!(both.cores, [0, 1, 3]);
        assert_eq!((both.memory, both.control_socket.mode), (1024, 0o600));
        assert_eq!(both.eal_args, ["-v"]);
        assert_eq!(both.policy.socket_dirs, [SocketDir::new(Path::new("/run/b")).unwrap()]);
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_place() {
        for (flags, text, parts) in [
            (&[][..], "poll = true\ncorse = 1", &["vf.toml:2:1", "did you mean \"cores\"?"][..]),
            (&[], "frobnicate = 1", &["vf.toml:1:1", "there are control_socket, "]),
            (&[], "\n poll = 3", &["vf.toml:2:9", "boolean"]),
            (&[], "cores = [1", &["vf.toml:1:"]),
            (&[], "cores = [1, 9]", &["vf.toml:1:9", "CPU 9", "[0, 1, 2, 3]"]),
            (&[], "cores = []", &["vf.toml:1:9", "at least one"]),
            (&[], "cores = \"1,1\"", &["vf.toml:1:9", "twice"]),
            (&[], "poll = true\nsocket_dirs = [\"/run/a\",\n  \"b\"]", &["vf.toml:3:3", "absolute"]),
            (&[], "control_mode = \"888\"", &["vf.toml:1:16", "octal"]),
            (&[], "socket_owner = \"nobody-of-that-name\"", &["vf.toml:1:16", "/etc/passwd"]),
            (&[], "memory = 1", &["vf.toml:1:10", "64"]),
            (&[], "guest_memory = 0", &["vf.toml:1:16", "32768"]),
            (&["--guest-memory", "99999999"], "", &["--guest-memory", "32768"]),
            (&[], "log = \"loud\"", &["vf.toml:1:7", "loud", "debug"]),
            (&["--cores", "3-1"], "", &["--cores", "1-3"]),
            (&["--cores", "x"], "", &["--cores", "1-3"]),
            (&["--cores", "1-99999999999"], "", &["--cores"]),
            (&["--cores", "7"], "", &["--cores", "CPU 7"]),
            (&["--stand-in", "net_tap0"], "", &["--stand-in", "PCI=VF"]),
            (&["--stand-in", "0000:5e:02.1=0000:5e:02.2"], "", &["--stand-in", "absent too"]),
            (&["--allow-vdev", "net_tap0"], "", &["--allow-vdev", "no number"]),
            (&["--allow-pci", "all"], "", &["--allow-pci", "vfs, any"]),
            (&["--control-group", "no-such-group"], "", &["--control-group", "/etc/group"]),
            (&["--log", "loud"], "", &["--log"]),
        ] {
            let error = config(flags, text).unwrap_err();
            for part in parts {
                assert!(error.contains(part), "{flags:?} {text:?}: {error}");
            }
        }
    }

    #[test]
    fn the_known_keys_are_the_files_keys() {
        for key in KEYS {
            // A table fits no key: the error is about the value, not about the key.
            let error = config(&[], &format!("[{key}]")).unwrap_err();
            assert!(!error.contains("there is no key"), "{error}");
        }
    }
}
