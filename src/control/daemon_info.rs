//! What clients hear about the daemon itself.

use std::time::Instant;

use super::api::{Allowed, CoreView, Info, Limits};
use super::server::MAX_CLIENTS;
use crate::ethernet::MAX_MTU;
use crate::session::Offer;

/// Facts about the daemon that do not change, for clients.
#[derive(Clone, Debug)]
pub struct DaemonInfo {
    /// Of libdpdk; `None`: built without.
    pub dpdk_version: Option<String>,
    /// Ethdevs that libdpdk can hold.
    pub max_ethdevs: Option<u32>,
    /// CPU of each poll core, by index.
    pub cpus: Vec<usize>,
    /// Cores never sleep.
    pub poll: bool,
    /// When it started.
    pub started: Instant,
}

impl DaemonInfo {
    /// With what does change: the lanes on each core, by index, and the number of ports.
    pub(super) fn view(&self, now: Instant, lanes: &[usize], ports: usize, allowed: Allowed) -> Info {
        Info {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            dpdk_version: self.dpdk_version.clone(),
            pid: std::process::id(),
            uptime_seconds: now.duration_since(self.started).as_secs(),
            cores: self.cpus.iter().zip(lanes).map(|(&cpu, &lanes)| CoreView { cpu, lanes }).collect(),
            poll: self.poll,
            limits: Limits {
                ethdevs: self.max_ethdevs,
                queue_pairs: Offer::MAX_QUEUE_PAIRS,
                mtu: MAX_MTU,
                clients: MAX_CLIENTS,
            },
            ports,
            allowed,
        }
    }
}
