//! Everything a session knows, as one plain value: built by messages, or restored from a saved copy.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::features::{EVENT_IDX, IN_ORDER, INDIRECT_DESC, NET_MRG_RXBUF, RING_PACKED, VERSION_1};
use crate::guest::RegionSpec;
use crate::ring::{NetHeader, RingAddresses, RingConfig};

/// A session's state. Cloning shares the fds.
#[derive(Clone, Debug, Default)]
pub struct SessionState {
    /// SET_OWNER was received.
    pub owned: bool,
    /// Acknowledged virtio features (with VHOST_USER_F_PROTOCOL_FEATURES); `None` before SET_FEATURES.
    pub features: Option<u64>,
    /// Acknowledged protocol features.
    pub protocol_features: u64,
    /// Virtio device status (SET_STATUS).
    pub status: u8,
    /// The memory table, with the files behind it.
    pub regions: Vec<(RegionSpec, Arc<File>)>,
    /// Two per queue pair: RX of pair *n* is 2n, TX is 2n + 1 (virtio 1.3, 5.1.2).
    pub rings: Vec<RingState>,
}

/// One ring's state.
#[derive(Clone, Debug, Default)]
pub struct RingState {
    /// SET_VRING_NUM; 0 before.
    pub size: u16,
    /// SET_VRING_ADDR; `None` before.
    pub addresses: Option<RingAddresses>,
    /// SET_VRING_BASE, or where the ring was stopped. Of a packed ring with the wrap counter in bit 15. The
    /// position of a *running* ring is in its lane.
    pub base: u16,
    /// SET_VRING_KICK was received; ended by GET_VRING_BASE, reset, disconnect.
    pub started: bool,
    /// SET_VRING_ENABLE, remembered while stopped.
    pub enabled: bool,
    /// Eventfds; `None` where the front end passed none (legal: then we poll, or do not signal).
    pub kick: Option<Arc<OwnedFd>>,
    /// Signalled when used buffers are published.
    pub call: Option<Arc<OwnedFd>>,
    /// Signalled when the ring is quarantined.
    pub err: Option<Arc<OwnedFd>>,
}

impl SessionState {
    /// The state of a new connection: `rings` rings, all stopped and disabled.
    pub fn new(rings: usize) -> Self {
        Self { rings: vec![RingState::default(); rings], ..Self::default() }
    }

    /// The configuration of ring `index`, if it is started and complete; `max_frame` as in
    /// [`RingConfig`]. Whether it is enabled is another matter: a disabled ring runs, too. For a ring
    /// that runs already, `base` is stale: its lane knows the position.
    pub fn ring_config(&self, index: usize, max_frame: usize) -> Option<RingConfig> {
        let ring = self.rings.get(index).filter(|ring| ring.started)?;
        let (features, addresses) = (self.features?, ring.addresses?);
        if ring.size == 0 {
            return None;
        }
        let has = |bits: u64| features & bits != 0;
        Some(RingConfig {
            packed: has(RING_PACKED),
            in_order: has(IN_ORDER),
            size: ring.size,
            addresses,
            base: ring.base,
            indirect: has(INDIRECT_DESC),
            event_idx: has(EVENT_IDX),
            mergeable: has(NET_MRG_RXBUF),
            // Virtio 1.3, 5.1.6.1: only a legacy driver without MRG_RXBUF leaves num_buffers out.
            header_len: if has(VERSION_1 | NET_MRG_RXBUF) { NetHeader::LEN } else { NetHeader::LEGACY_LEN },
            max_frame,
        })
    }

    /// Whether ring `index` is started and complete: lanes are reading it.
    pub fn runs(&self, index: usize) -> bool {
        self.ring_config(index, 0).is_some()
    }
}
