//! What a port thread is told, and what it tells: plain values.

use std::path::PathBuf;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::Offer;
use crate::relay::DirectionCounters;
use crate::vf::{VfCaps, VfLink, VfSpec};

/// Who listens on the port's socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The daemon listens, the front end connects.
    #[default]
    Server,
    /// The daemon connects, and tries again and again; each 50 ms, unless its front end misbehaves.
    Client,
}

/// Whether frames are moved without copying them, where the VF's driver is known to be good for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ZeroCopy {
    /// Where nothing takes memory from under the device by itself: on hugepages.
    #[default]
    Auto,
    /// The operator's word that nothing discards guest memory (balloon, free page reporting, virtio-mem, postcopy,
    /// KSM): a device would go on using the old pages.
    On,
    /// Never.
    Off,
}

impl std::fmt::Display for ZeroCopy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::On => "on",
            Self::Off => "off",
        })
    }
}

/// A port's socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketPlan {
    /// Absolute path, in a directory the configuration allows.
    pub path: PathBuf,
    /// Who listens.
    pub role: Role,
    /// Owner of a server socket; `None`: ours.
    pub uid: Option<u32>,
    /// Group of a server socket; `None`: ours.
    pub gid: Option<u32>,
    /// Permission bits of a server socket.
    pub mode: u32,
}

/// What a port thread is started with, resolved by control. What changes later comes as a command.
#[derive(Clone, Debug)]
pub struct PortPlan {
    /// Port id.
    pub id: String,
    /// Its socket.
    pub socket: SocketPlan,
    /// What guests are offered.
    pub offer: Offer,
    /// Cores of the lanes, by number: (guest→VF, VF→guest), as indices into the daemon's poll cores. So many lanes
    /// there are in each direction at most; at least one.
    pub cores: Vec<(usize, usize)>,
    /// Whether frames may be moved without a copy.
    pub zero_copy: ZeroCopy,
    /// Most bytes of a guest's memory that are mapped.
    pub guest_memory: u64,
    /// What both directions count into.
    pub counters: PortCounters,
}

/// Counters of a port's lanes; they live as long as the port, over all connections.
#[derive(Clone, Debug, Default)]
pub struct PortCounters {
    /// guest→VF.
    pub guest_to_vf: DirectionCounters,
    /// VF→guest.
    pub vf_to_guest: DirectionCounters,
}

impl PortCounters {
    /// Of at most so many lanes in each direction.
    pub fn new(lanes: usize) -> Self {
        Self { guest_to_vf: DirectionCounters::new(lanes), vf_to_guest: DirectionCounters::new(lanes) }
    }
}

/// A live view of a port, sent to control whenever it changes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortStatus {
    /// A front end is connected.
    pub guest: bool,
    /// Connections since attach.
    pub connections: u64,
    /// Features the guest acknowledged.
    pub features: Option<u64>,
    /// Per ring: running, enabled, size; and why not, if it was quarantined or could not be built.
    pub rings: Vec<RingStatus>,
    /// Bytes of guest memory mapped.
    pub guest_memory: u64,
    /// Why the VF does not reach all of the guest's memory by itself, though its driver could.
    #[serde(default)]
    pub copies: Option<String>,
    /// Why the last connection ended or failed, if it did by an error.
    pub last_error: Option<String>,
}

/// A live view of one ring.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingStatus {
    /// Queue size; 0 before it is set.
    pub size: u16,
    /// Started by the front end.
    pub started: bool,
    /// Enabled by the front end.
    pub enabled: bool,
    /// In a lane.
    pub running: bool,
    /// CPU of the lane.
    #[serde(default)]
    pub cpu: Option<usize>,
    /// Why it is not, though it should.
    pub fault: Option<String>,
}

/// A view of the VF in place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VfStatus {
    /// Which.
    pub spec: VfSpec,
    /// What it can do.
    pub caps: VfCaps,
    /// Queue pairs in use.
    pub queues: u16,
    /// Lanes over them, in each direction.
    pub lanes: usize,
    /// Link.
    pub link: VfLink,
    /// The driver's extended statistics.
    pub xstats: Vec<(String, u64)>,
    /// When all of it was read.
    pub read: Instant,
}
