//! What is offered to a guest: it belongs to the port, is resolved once at attach, and is offered
//! unchanged on every connection.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};

use crate::error::Error;
use crate::vf::VfCaps;

/// VIRTIO_NET_F_CSUM: we complete the checksums of what the guest sends.
pub const NET_CSUM: u64 = 1 << 0;
/// VIRTIO_NET_F_GUEST_CSUM: the guest understands our word on the checksums of what it receives.
pub const NET_GUEST_CSUM: u64 = 1 << 1;
/// VIRTIO_NET_F_MTU.
pub const NET_MTU: u64 = 1 << 3;
/// VIRTIO_NET_F_HOST_TSO4: the guest may send TCP over IPv4 unsegmented.
pub const NET_HOST_TSO4: u64 = 1 << 11;
/// VIRTIO_NET_F_HOST_TSO6: the same over IPv6.
pub const NET_HOST_TSO6: u64 = 1 << 12;
/// VIRTIO_NET_F_HOST_ECN: the same with CWR set.
pub const NET_HOST_ECN: u64 = 1 << 13;
/// VIRTIO_NET_F_MRG_RXBUF.
pub const NET_MRG_RXBUF: u64 = 1 << 15;
/// VIRTIO_NET_F_CTRL_VQ: served by the VMM, never by us.
pub const NET_CTRL_VQ: u64 = 1 << 17;
/// VIRTIO_NET_F_CTRL_RX: the same.
pub const NET_CTRL_RX: u64 = 1 << 18;
/// VIRTIO_NET_F_GUEST_ANNOUNCE: the guest announces itself after a migration.
pub const NET_GUEST_ANNOUNCE: u64 = 1 << 21;
/// VIRTIO_NET_F_MQ.
pub const NET_MQ: u64 = 1 << 22;
/// VIRTIO_F_ANY_LAYOUT: a legacy driver may frame its descriptors as it likes.
pub const ANY_LAYOUT: u64 = 1 << 27;
/// VIRTIO_F_INDIRECT_DESC.
pub const INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX.
pub const EVENT_IDX: u64 = 1 << 29;
/// VHOST_USER_F_PROTOCOL_FEATURES: between VMM and back end only.
pub const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// VIRTIO_F_VERSION_1.
pub const VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_RING_PACKED.
pub const RING_PACKED: u64 = 1 << 34;
/// VIRTIO_F_IN_ORDER: we use buffers in the order in which they were made available.
pub const IN_ORDER: u64 = 1 << 35;

/// What every port serves, whatever its VF and settings.
///
/// The control queue and the announcement are the VMM's work (QEMU takes neither bit from a back
/// end), but front ends that pass our bits on unchanged need them: MQ and GUEST_ANNOUNCE depend on
/// CTRL_VQ (virtio 1.3, 5.1.3.1), and Linux refuses a device that breaks this. DPDK's vhost offers the same.
const ALWAYS: u64 = NET_MTU
    | NET_MRG_RXBUF
    | NET_CTRL_VQ
    | NET_CTRL_RX
    | NET_GUEST_ANNOUNCE
    | ANY_LAYOUT
    | INDIRECT_DESC
    | EVENT_IDX
    | PROTOCOL_FEATURES
    | VERSION_1
    | RING_PACKED
    | IN_ORDER;

/// Names for people, of every bit that can be offered.
const NAMES: [(u64, &str); 19] = [
    (NET_CSUM, "csum"),
    (NET_GUEST_CSUM, "guest_csum"),
    (NET_MTU, "mtu"),
    (NET_HOST_TSO4, "host_tso4"),
    (NET_HOST_TSO6, "host_tso6"),
    (NET_HOST_ECN, "host_ecn"),
    (NET_MRG_RXBUF, "mrg_rxbuf"),
    (NET_CTRL_VQ, "ctrl_vq"),
    (NET_CTRL_RX, "ctrl_rx"),
    (NET_GUEST_ANNOUNCE, "guest_announce"),
    (NET_MQ, "mq"),
    (ANY_LAYOUT, "any_layout"),
    (INDIRECT_DESC, "indirect_desc"),
    (EVENT_IDX, "event_idx"),
    (PROTOCOL_FEATURES, "protocol_features"),
    (VERSION_1, "version_1"),
    (RING_PACKED, "ring_packed"),
    (IN_ORDER, "in_order"),
    (1 << 26, "log_all"),
];

/// The names of the virtio feature bits in `features`, lowest bit first; `bit_N` for one without a name.
pub fn names(features: u64) -> Vec<String> {
    (0..u64::BITS)
        .filter(|bit| features >> bit & 1 == 1)
        .map(|bit| match NAMES.iter().find(|(mask, _)| *mask == 1 << bit) {
            Some((_, name)) => (*name).to_owned(),
            None => format!("bit_{bit}"),
        })
        .collect()
}

/// The inverse of [`names`].
pub fn from_names<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<u64, Error> {
    names.into_iter().try_fold(0, |features, name| {
        let known = NAMES.iter().find(|(_, known)| *known == name);
        let bit = match known {
            Some((mask, _)) => Some(*mask),
            None => name
                .strip_prefix("bit_")
                .and_then(|number| number.parse::<u32>().ok())
                .and_then(|number| 1_u64.checked_shl(number)),
        };
        bit.map(|bit| features | bit).ok_or_else(|| Error::Invalid(format!("no virtio feature is called {name:?}")))
    })
}

/// One offload a guest may be offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Offload {
    /// The guest may leave L4 checksums to us.
    Checksum,
    /// The guest trusts our word on the L4 checksums of what it receives.
    GuestChecksum,
    /// The guest may send TCP over IPv4 unsegmented. Needs `Checksum`.
    Tso4,
    /// The guest may send TCP over IPv6 unsegmented. Needs `Checksum`.
    Tso6,
}

impl Offload {
    const ALL: [Self; 4] = [Self::Checksum, Self::GuestChecksum, Self::Tso4, Self::Tso6];

    /// Its name in requests, configuration and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Checksum => "checksum",
            Self::GuestChecksum => "guest_checksum",
            Self::Tso4 => "tso4",
            Self::Tso6 => "tso6",
        }
    }

    /// The virtio feature it stands for.
    fn feature(self) -> u64 {
        match self {
            Self::Checksum => NET_CSUM,
            Self::GuestChecksum => NET_GUEST_CSUM,
            Self::Tso4 => NET_HOST_TSO4,
            Self::Tso6 => NET_HOST_TSO6,
        }
    }
}

impl FromStr for Offload {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|offload| offload.name() == text).ok_or_else(|| {
            Error::Invalid(format!("no offload is called {text:?}; there are checksum, guest_checksum, tso4, tso6"))
        })
    }
}

/// The offloads asked for a port: `auto`, `none`, or a list of names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "OffloadsText", into = "OffloadsText")]
pub enum Offloads {
    /// What the VF has plus what the lane does in software; checksums only while the VF is unknown.
    #[default]
    Auto,
    /// None.
    None,
    /// These, and no others; never empty, never TSO without checksum.
    List(BTreeSet<Offload>),
}

/// [`Offloads`] in JSON and TOML: a word or an array of words.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum OffloadsText {
    Word(String),
    List(Vec<String>),
}

impl Offloads {
    /// Checks the dependencies (virtio 1.3, 5.1.3.1).
    fn list(offloads: BTreeSet<Offload>) -> Result<Self, Error> {
        for tso in [Offload::Tso4, Offload::Tso6] {
            if offloads.contains(&tso) && !offloads.contains(&Offload::Checksum) {
                return Err(Error::Invalid(format!("offload {} needs checksum: add it to the list", tso.name())));
            }
        }
        Ok(if offloads.is_empty() { Self::None } else { Self::List(offloads) })
    }
}

impl TryFrom<OffloadsText> for Offloads {
    type Error = Error;

    fn try_from(text: OffloadsText) -> Result<Self, Error> {
        match text {
            OffloadsText::Word(word) => word.parse(),
            OffloadsText::List(list) => Self::list(list.iter().map(|name| name.parse()).collect::<Result<_, _>>()?),
        }
    }
}

impl From<Offloads> for OffloadsText {
    fn from(offloads: Offloads) -> Self {
        match offloads {
            Offloads::List(list) => Self::List(list.into_iter().map(|one| one.name().to_owned()).collect()),
            word => Self::Word(word.to_string()),
        }
    }
}

impl fmt::Display for Offloads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::None => f.write_str("none"),
            Self::List(list) => {
                let names: Vec<_> = list.iter().map(|one| one.name()).collect();
                f.write_str(&names.join(","))
            }
        }
    }
}

impl FromStr for Offloads {
    type Err = Error;

    /// `auto`, `none`, or names with commas between.
    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "auto" => Ok(Self::Auto),
            "none" => Ok(Self::None),
            list => Self::list(list.split(',').map(str::parse).collect::<Result<_, _>>()?),
        }
    }
}

/// The offer of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Virtio feature bits, VHOST_USER_F_PROTOCOL_FEATURES included.
    pub features: u64,
    /// Protocol feature bits.
    pub protocol_features: u64,
    /// Queue pairs, 1 to 32.
    pub queue_pairs: u16,
    /// MTU, offered with VIRTIO_NET_F_MTU / NET_MTU.
    pub mtu: u16,
}

impl Offer {
    /// Most queue pairs of a port.
    pub const MAX_QUEUE_PAIRS: u16 = 32;

    /// Protocol features we serve. BACKEND_REQ, INFLIGHT_SHMFD, RARP and the rest have no use here (yet).
    const PROTOCOL: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
        .union(VhostUserProtocolFeatures::REPLY_ACK)
        .union(VhostUserProtocolFeatures::MTU)
        .union(VhostUserProtocolFeatures::STATUS)
        .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
        .union(VhostUserProtocolFeatures::RESET_DEVICE);

    /// Resolves what a port offers. `caps` is `None` while the VF is not there: then `auto` means what
    /// the lane can do for every VF at little cost, checksums. `queue_pairs` is 1 to
    /// [`Self::MAX_QUEUE_PAIRS`] and `mtu` 68 to 65535: the caller has checked both.
    pub fn resolve(offloads: &Offloads, caps: Option<&VfCaps>, queue_pairs: u16, mtu: u16) -> Self {
        let mut features = ALWAYS;
        if queue_pairs > 1 {
            features |= NET_MQ;
        }
        features |= match (offloads, caps) {
            (Offloads::None, _) => 0,
            (Offloads::Auto, None) => NET_CSUM,
            // Checksums and segmentation have a software fallback; nobody but the VF can verify
            // a received checksum for free.
            (Offloads::Auto, Some(caps)) => {
                let software = NET_CSUM | NET_HOST_TSO4 | NET_HOST_TSO6;
                software | if caps.rx_checksum { NET_GUEST_CSUM } else { 0 }
            }
            (Offloads::List(list), _) => list.iter().fold(0, |bits, one| bits | one.feature()),
        };
        // Virtio 1.3, 5.1.3.1: HOST_TSO needs CSUM, HOST_ECN needs HOST_TSO.
        if features & NET_CSUM == 0 {
            features &= !(NET_HOST_TSO4 | NET_HOST_TSO6);
        }
        if features & (NET_HOST_TSO4 | NET_HOST_TSO6) != 0 {
            features |= NET_HOST_ECN;
        }
        Self { features, protocol_features: Self::PROTOCOL.bits(), queue_pairs, mtu }
    }

    /// Rings: two per queue pair.
    pub fn rings(&self) -> usize {
        2 * usize::from(self.queue_pairs)
    }

    /// The offloads in the offer.
    pub fn offloads(&self) -> Vec<Offload> {
        Offload::ALL.into_iter().filter(|one| self.features & one.feature() != 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caps(rx_checksum: bool) -> VfCaps {
        VfCaps { rx_checksum, ..VfCaps::default() }
    }

    #[test]
    fn auto_is_what_the_vf_has_and_software_does() {
        let auto = |caps: Option<&VfCaps>| Offer::resolve(&Offloads::Auto, caps, 1, 1500).offloads();
        assert_eq!(auto(None), [Offload::Checksum]);
        assert_eq!(auto(Some(&caps(false))), [Offload::Checksum, Offload::Tso4, Offload::Tso6]);
        assert_eq!(auto(Some(&caps(true))), Offload::ALL);
    }

    #[test]
    fn none_offers_no_offload() {
        let offer = Offer::resolve(&Offloads::None, Some(&caps(true)), 1, 1500);
        assert_eq!(offer.features, ALWAYS);
        assert!(offer.offloads().is_empty());
    }

    /// Virtio 1.3, 5.1.3.1, over every list that can be written.
    #[test]
    fn feature_dependencies_hold() {
        for subset in 0_u32..16 {
            let list: BTreeSet<_> = (0..4).filter(|bit| subset >> bit & 1 == 1).map(|bit| Offload::ALL[bit]).collect();
            let offer = Offer::resolve(&Offloads::List(list), None, 2, 1500);
            let has = |bit: u64| offer.features & bit != 0;
            assert!(has(NET_CSUM) || !has(NET_HOST_TSO4 | NET_HOST_TSO6));
            assert_eq!(has(NET_HOST_ECN), has(NET_HOST_TSO4 | NET_HOST_TSO6));
            assert!(has(NET_CTRL_VQ), "MQ and GUEST_ANNOUNCE need it");
        }
    }

    #[test]
    fn multiqueue_is_offered_with_several_pairs_only() {
        for (pairs, offered) in [(1, false), (2, true), (32, true)] {
            let offer = Offer::resolve(&Offloads::Auto, None, pairs, 1500);
            assert_eq!(offer.features & NET_MQ != 0, offered);
            assert_eq!(offer.rings(), usize::from(pairs) * 2);
        }
    }

    /// Not before they are served: LOG_ALL, GUEST_TSO, STATUS, MAC.
    #[test]
    fn nothing_is_offered_that_is_not_served() {
        let offer = Offer::resolve(&Offloads::Auto, Some(&caps(true)), 32, 9000);
        for bit in [5, 7, 8, 9, 10, 14, 16, 24, 26, 33, 40] {
            assert_eq!(offer.features >> bit & 1, 0, "bit {bit}");
        }
        assert_eq!(offer.protocol_features, 0x1_a019);
    }

    #[test]
    fn names_make_a_round_trip() {
        for features in [0, ALWAYS, u64::MAX, 1 << 63 | NET_MQ] {
            let names = names(features);
            assert_eq!(names.len(), features.count_ones() as usize);
            assert_eq!(from_names(names.iter().map(String::as_str)).unwrap(), features);
        }
        for bad in ["", "csumm", "bit_64", "bit_-1"] {
            assert_eq!(from_names([bad]).unwrap_err().code(), "invalid", "{bad}");
        }
    }

    #[test]
    fn offloads_text_forms() {
        let list = |names: &[Offload]| Offloads::List(names.iter().copied().collect());
        for (json, offloads) in [
            (r#""auto""#, Offloads::Auto),
            (r#""none""#, Offloads::None),
            (r#"["checksum"]"#, list(&[Offload::Checksum])),
            (r#"["checksum","guest_checksum","tso4","tso6"]"#, list(&Offload::ALL)),
        ] {
            assert_eq!(serde_json::from_str::<Offloads>(json).unwrap(), offloads);
            assert_eq!(serde_json::to_string(&offloads).unwrap(), json);
            assert_eq!(offloads.to_string().parse::<Offloads>().unwrap(), offloads);
        }
        assert_eq!(serde_json::from_str::<Offloads>("[]").unwrap(), Offloads::None);
        assert_eq!("tso4,checksum".parse::<Offloads>().unwrap(), list(&[Offload::Checksum, Offload::Tso4]));
        for bad in [r#""tso4""#, r#"["tso4"]"#, r#"["auto"]"#, r#""""#, "7"] {
            assert!(serde_json::from_str::<Offloads>(bad).is_err(), "{bad}");
        }
    }
}
