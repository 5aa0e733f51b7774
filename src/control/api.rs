//! What clients say and hear: the parameters and results of every method. Shared by the daemon, `vfctl`
//! and tests; names in it are never changed, members are only added.
//!
//! | method | parameters | result |
//! |---|---|---|
//! | `port.attach` | [`Attach`] | [`Attached`] |
//! | `port.detach` | [`Selector`] | [`Detached`] |
//! | `port.list` | none | [`PortList`] |
//! | `port.show` | [`Selector`] | [`PortView`] |
//! | `port.sync` | [`Sync`] | [`Synced`] |
//! | `stats` | [`StatsQuery`] | [`Stats`] |
//! | `info` | none | [`Info`] |

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::PortId;
use super::rpc::{INVALID_PARAMS, METHOD_NOT_FOUND, RpcError};
use crate::error::Error;
use crate::relay::LaneSnapshot;
use crate::session::features::{Offload, Offloads};
use crate::session::port::{PortStatus, Role, ZeroCopy};
use crate::vf::{Dma, Mac, VfSpec};

/// A request, by method, with its parameters.
#[derive(Clone, Debug)]
#[allow(missing_docs)] // documented in the table above and at the parameters
pub enum Method {
    Attach(Attach),
    Detach(Selector),
    List,
    Show(Selector),
    Sync(Sync),
    Stats(StatsQuery),
    Info,
}

impl Method {
    /// Names of all methods.
    pub const NAMES: [&str; 7] = ["port.attach", "port.detach", "port.list", "port.show", "port.sync", "stats", "info"];

    /// Reads the parameters of `method`. Unknown members are errors: they are typing mistakes.
    pub fn parse(method: &str, params: Map<String, Value>) -> Result<Self, RpcError> {
        Ok(match method {
            "port.attach" => Self::Attach(read(params)?),
            "port.detach" => Self::Detach(read(params)?),
            "port.list" => read::<Nothing>(params).map(|_| Self::List)?,
            "port.show" => Self::Show(read(params)?),
            "port.sync" => Self::Sync(read(params)?),
            "stats" => Self::Stats(read(params)?),
            "info" => read::<Nothing>(params).map(|_| Self::Info)?,
            other => {
                let message = format!("no method {other:?}: use one of {:?}", Self::NAMES);
                return Err(RpcError::new(METHOD_NOT_FOUND, message));
            }
        })
    }
}

fn read<T: DeserializeOwned>(params: Map<String, Value>) -> Result<T, RpcError> {
    serde_path_to_error::deserialize(Value::Object(params)).map_err(|error| {
        let path = error.path().to_string();
        let place = if path == "." { "params" } else { &path };
        RpcError::new(INVALID_PARAMS, format!("{place}: {}", error.inner()))
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

/// Parameters of `port.attach`. VFs, socket path and role are the port's identity, all else attributes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attach {
    /// 1 to 64 characters.
    pub id: PortId,
    /// Where guest and daemon meet.
    pub socket: Socket,
    /// At least one; the first is used, all are held.
    pub vfs: Vec<VfSpec>,
    /// 1 to 32; default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_pairs: Option<u16>,
    /// 68 to 9216 bytes; default 1500.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Given to the VF; default: the VF's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
    /// CPUs: one for everything, or those of the lanes guest→VF and, behind them, of as many VF→guest; default: a lane of
    /// each direction on as many as there are queue pairs, the least loaded first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cores: Vec<usize>,
    /// What guests are offered; default `auto`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offloads: Option<Offloads>,
    /// Whether frames may be moved without a copy; default `auto`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zero_copy: Option<ZeroCopy>,
    /// Take VFs and socket from other ports without a connected guest.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub takeover: bool,
}

/// A port's socket.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Socket {
    /// Absolute, at most 107 bytes, directly in an allowed directory.
    pub path: String,
    /// Who listens; default `server`: the daemon.
    #[serde(default)]
    pub role: Role,
    /// Owner of a listening socket: a name or a number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<NameOrNumber>,
    /// Its group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<NameOrNumber>,
    /// Its permission bits, in octal: `"0660"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<FileMode>,
}

/// A user or group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
#[allow(missing_docs)]
pub enum NameOrNumber {
    Number(u32),
    Name(String),
}

impl fmt::Display for NameOrNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

/// Permission bits, 0 to 0o777, as octal text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FileMode(pub u32);

impl FromStr for FileMode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        u32::from_str_radix(text, 8)
            .ok()
            .filter(|mode| *mode <= 0o777 && text.bytes().all(|b| b.is_ascii_digit()))
            .map(Self)
            .ok_or_else(|| {
                Error::Invalid(format!("mode {text:?} is not a file mode: give three octal digits, e.g. \"0660\""))
            })
    }
}

impl fmt::Display for FileMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

impl TryFrom<String> for FileMode {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<FileMode> for String {
    fn from(mode: FileMode) -> Self {
        mode.to_string()
    }
}

/// Names one port: by its id, by the path of its socket, or by a VF it holds. Exactly one is given.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum Selector {
    /// Its id.
    Id(PortId),
    /// Path of its socket.
    Socket(String),
    /// A VF it holds.
    Vf(VfSpec),
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => write!(f, "port {id}"),
            Self::Socket(path) => write!(f, "a port with socket {path}"),
            Self::Vf(vf) => write!(f, "a port with VF {vf}"),
        }
    }
}

/// Parameters of `port.sync`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sync {
    /// The ports that should be.
    pub ids: BTreeSet<PortId>,
    /// Detach the others, guests or not.
    #[serde(default)]
    pub remove: bool,
}

/// Parameters of `stats`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StatsQuery {
    /// Only this port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<PortId>,
}

/// Result of `port.attach`. By then a server socket listens with its final owner and mode or a client
/// has begun to try, and the VF forwards or is waited for (`state`: `waiting`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Attached {
    /// `false`: the port was there already, as asked for.
    pub changed: bool,
    /// Attributes that take effect when the guest of the moment has disconnected.
    pub pending: Vec<String>,
    /// Ports that were taken down because they held the VF or the socket (`takeover`).
    pub taken_from: Vec<PortId>,
    /// The port.
    pub port: PortView,
}

/// Result of `port.detach`. By then thread, socket and VF of the port are gone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Detached {
    /// `false`: there was no such port.
    pub changed: bool,
    /// What was detached.
    pub id: Option<PortId>,
}

/// Result of `port.list`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PortList {
    /// By id.
    pub ports: Vec<PortView>,
}

/// Result of `port.sync`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Synced {
    /// Ports that are not in the set.
    pub surplus: Vec<PortId>,
    /// Ids in the set that are not attached.
    pub missing: Vec<PortId>,
    /// The surplus was detached.
    pub removed: bool,
}

/// Where a port is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Its socket or VF is being set up; the request is not answered yet.
    Attaching,
    /// Without a VF: it is tried again every second, and why is in `reason`.
    Waiting,
    /// The VF is being started.
    Starting,
    /// The VF forwards; no guest is connected.
    Ready,
    /// VF and guest are there.
    Connected,
    /// It is being taken down.
    Detaching,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Attaching => "attaching",
            Self::Waiting => "waiting",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Connected => "connected",
            Self::Detaching => "detaching",
        })
    }
}

/// A port as clients see it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PortView {
    /// Its id.
    pub id: PortId,
    /// Where it is in its life.
    pub state: State,
    /// Why it is not further.
    pub reason: Option<String>,
    /// As asked for, defaults filled in.
    pub socket: Socket,
    /// As asked for.
    pub vfs: Vec<VfSpec>,
    /// The VF in place.
    pub vf: Option<VfView>,
    /// The vdev that stands in for a PCI address that does not exist.
    pub stand_in: Option<VfSpec>,
    /// As asked for.
    pub queue_pairs: u16,
    /// As asked for.
    pub mtu: u16,
    /// As asked for.
    pub mac: Option<Mac>,
    /// CPUs of the first lanes of (guest→VF, VF→guest).
    pub cores: (usize, usize),
    /// CPUs of all its lanes, by number: lane *l* of *n* has the queue pairs that are *l* modulo *n*.
    #[serde(default)]
    pub lanes: LaneCpus,
    /// As asked for.
    pub offloads: Offloads,
    /// What of them guests are offered.
    pub offered: Vec<Offload>,
    /// As asked for.
    #[serde(default)]
    pub zero_copy: ZeroCopy,
    /// Why frames are copied nevertheless.
    #[serde(default)]
    pub copies: Copies,
    /// Attributes that take effect when the guest of the moment has disconnected.
    pub pending: Vec<String>,
    /// The guest's side.
    pub guest: PortStatus,
}

/// The CPU of each lane of a direction.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // the directions are what they are everywhere
pub struct LaneCpus {
    pub guest_to_vf: Vec<usize>,
    pub vf_to_guest: Vec<usize>,
}

/// Why the frames of a direction are copied; `None`: those for which it is worth it are not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // the directions are what they are everywhere
pub struct Copies {
    pub guest_to_vf: Option<String>,
    pub vf_to_guest: Option<String>,
}

/// The VF in place, as clients see it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VfView {
    /// Which.
    pub spec: VfSpec,
    /// DPDK's driver.
    pub driver: String,
    /// Queue pairs in use.
    pub queues: u16,
    /// Most it has.
    pub max_queues: u16,
    /// Carrier.
    pub link_up: bool,
    /// Mb/s; 0: unknown.
    pub speed: u32,
    /// MAC in force.
    pub mac: Option<Mac>,
    /// What it finds in memory by DMA: of `own`, its own guest's only.
    #[serde(default)]
    pub dma: Dma,
    /// Why that is shared with other VFs.
    #[serde(default)]
    pub dma_shared: Option<String>,
}

/// Result of `stats`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// When, in µs of a clock that only goes forward: two answers make a rate.
    pub time_us: u64,
    /// By id.
    pub ports: Vec<PortStats>,
}

/// Counters of a port since it was attached.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PortStats {
    /// Which.
    pub id: PortId,
    /// Where it is in its life.
    pub state: State,
    /// guest→VF, all lanes together.
    pub guest_to_vf: LaneStats,
    /// VF→guest, all lanes together.
    pub vf_to_guest: LaneStats,
    /// Of each lane.
    #[serde(default)]
    pub lanes: LanesStats,
    /// The VF in place.
    pub vf: Option<VfView>,
    /// Its driver's own counters. Those of the lanes are of now; these were read a while ago.
    pub xstats: BTreeMap<String, u64>,
    /// How long ago, in milliseconds: a second at most, while the VF is in place.
    #[serde(default)]
    pub xstats_age_ms: Option<u64>,
}

/// Counters of each lane, by number. What lanes counted that there are no longer is in the sums only.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)] // the directions are what they are everywhere
pub struct LanesStats {
    pub guest_to_vf: Vec<LaneStats>,
    pub vf_to_guest: Vec<LaneStats>,
}

/// Counters of a lane, or of all of a direction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LaneStats {
    /// CPU it runs on; of several lanes the first one's.
    pub cpu: usize,
    /// The counters.
    #[serde(flatten)]
    pub counters: LaneSnapshot,
}

/// Result of `info`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Info {
    /// Of the daemon.
    pub version: String,
    /// Of libdpdk; `None`: built without.
    pub dpdk_version: Option<String>,
    /// Process id.
    pub pid: u32,
    /// Since start.
    pub uptime_seconds: u64,
    /// Poll cores.
    pub cores: Vec<CoreView>,
    /// Cores never sleep.
    pub poll: bool,
    /// What there is at most.
    pub limits: Limits,
    /// What there is now.
    pub ports: usize,
    /// What clients may ask for.
    pub allowed: Allowed,
}

/// A poll core.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CoreView {
    /// Its CPU.
    pub cpu: usize,
    /// Lanes placed on it.
    pub lanes: usize,
}

/// Limits of this daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Ethdevs that libdpdk can hold (RTE_MAX_ETHPORTS).
    pub ethdevs: Option<u32>,
    /// Queue pairs of a port.
    pub queue_pairs: u16,
    /// MTU of a port.
    pub mtu: u16,
    /// Control clients at a time.
    pub clients: usize,
}

/// What the configuration lets clients ask for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Allowed {
    /// Vdev drivers with their argument keys.
    pub vdevs: Vec<String>,
    /// Rules for PCI addresses.
    pub pci: Vec<String>,
    /// Directories of sockets.
    pub socket_dirs: Vec<String>,
    /// PCI address = what stands in for it.
    pub stand_ins: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(method: &str, params: Value) -> Result<Method, RpcError> {
        let Value::Object(params) = params else { panic!("params are an object") };
        Method::parse(method, params)
    }

    #[test]
    fn a_wrong_parameter_is_named_with_its_place() {
        for (method, params, code, part) in [
            ("port.attach", json!({}), INVALID_PARAMS, "id"),
            ("port.attach", json!({"id": "a b"}), INVALID_PARAMS, "white space"),
            ("port.attach", json!({"id": "a", "socket": {"path": 3}}), INVALID_PARAMS, "socket.path"),
            ("port.attach", json!({"id": "a", "sockets": {}}), INVALID_PARAMS, "sockets"),
            ("port.attach", json!({"id": "a", "socket": {"path": "/x", "mode": "999"}}), INVALID_PARAMS, "octal"),
            (
                "port.attach",
                json!({"id": "a", "socket": {"path": "/x", "role": "both"}}),
                INVALID_PARAMS,
                "socket.role",
            ),
            (
                "port.attach",
                json!({"id": "a", "socket": {"path": "/x"}, "vfs": ["soft:null"], "queue_pairs": -1}),
                INVALID_PARAMS,
                "queue_pairs",
            ),
            (
                "port.attach",
                json!({"id": "a", "socket": {"path": "/x"}, "vfs": ["soft:null"], "offloads": "tso9"}),
                INVALID_PARAMS,
                "tso9",
            ),
            ("port.detach", json!({}), INVALID_PARAMS, "params"),
            ("port.detach", json!({"id": "a", "socket": "/x"}), INVALID_PARAMS, "params"),
            ("port.list", json!({"id": "a"}), INVALID_PARAMS, "id"),
            ("port.frobnicate", json!({}), METHOD_NOT_FOUND, "port.attach"),
        ] {
            let error = parse(method, params.clone()).unwrap_err();
            assert_eq!(error.code, code, "{method} {params}");
            assert!(error.message.contains(part), "{method} {params}: {}", error.message);
        }
    }

    #[test]
    fn a_file_mode_is_octal_text() {
        assert_eq!("660".parse::<FileMode>().unwrap().to_string(), "0660");
        for bad in ["", "+7", "1000", "-1", "8", "0o660"] {
            assert!(bad.parse::<FileMode>().is_err(), "{bad}");
        }
    }
}
