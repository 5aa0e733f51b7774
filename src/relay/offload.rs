//! What a guest's virtio-net header asks for, checked against the frame's private bytes, and who does it:
//! the VF, or the lane.

use std::ops::RangeInclusive;

use super::counters::Cause;
use super::headers::{self, Layers, TCP, UDP};
use crate::ethernet;
use crate::ring::{Gso, NetHeader};
use crate::vf::{TxOffload, VfCaps};

/// TCP segments left to a VF, in bytes of payload; the lane cuts others. Intel's VFs take anything else for
/// malicious and may be disabled for it. iavf's range is the narrowest (IAVF_MIN_TSO_MSS and IAVF_MAX_TSO_MSS in
/// DPDK's iavf_rxtx.h): i40e and ice go further at one end or at both.
const VF_MSS: RangeInclusive<u16> = 256..=9668;

/// Offsets of the checksum field in the TCP and UDP header.
const TCP_CHECKSUM: u16 = 16;
const UDP_CHECKSUM: u16 = 6;

/// What was negotiated with the guest and what the VF in place can do. Fixed while a ring is in a lane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TxRules {
    /// VIRTIO_NET_F_CSUM was negotiated.
    pub checksum: bool,
    /// VIRTIO_NET_F_HOST_TSO4.
    pub tso4: bool,
    /// VIRTIO_NET_F_HOST_TSO6.
    pub tso6: bool,
    /// Longest frame on the wire, in bytes, without FCS.
    pub max_wire_frame: usize,
    /// The VF completes L4 checksums.
    pub vf_checksum: bool,
    /// The VF segments TCP, and takes frames of several buffers.
    pub vf_tso: bool,
}

impl TxRules {
    /// Takes over what the VF can do.
    pub fn for_vf(self, caps: &VfCaps) -> Self {
        Self { vf_checksum: caps.tx_checksum, vf_tso: caps.tso && caps.multi_segment && caps.tx_checksum, ..self }
    }

    /// Whether the guest may ask for this segmentation at all.
    pub(super) fn permits(&self, gso: Gso) -> bool {
        match gso {
            Gso::None => true,
            Gso::Tcp4 => self.tso4,
            Gso::Tcp6 => self.tso6,
            Gso::Other(_) => false,
        }
    }

    /// Whether a frame of `len` bytes with this header has to be segmented by the lane.
    pub(super) fn segments(&self, header: &NetHeader, len: usize) -> bool {
        header.gso != Gso::None && !(self.vf_tso && VF_MSS.contains(&header.gso_size) && len <= ethernet::MAX_TSO_FRAME)
    }
}

/// What is to be done to a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Treatment {
    /// Nothing.
    Plain,
    /// By the VF.
    Vf(TxOffload),
    /// Complete the checksum at `start + offset` in software.
    Checksum { start: usize, offset: usize, udp: bool },
    /// Cut into segments in software.
    Segment { layers: Layers, headers: usize, size: usize },
}

/// Judges a frame of `len` bytes that begins with `head` (private: all of it, or at least 256 bytes).
pub(super) fn judge(header: &NetHeader, head: &[u8], len: usize, rules: &TxRules) -> Result<Treatment, Cause> {
    if header.gso != Gso::None {
        return judge_segmentation(header, head, len, rules);
    }
    if len > rules.max_wire_frame {
        return Err(Cause::Oversize);
    }
    if !header.needs_csum {
        return Ok(Treatment::Plain);
    }
    let (start, offset) = (usize::from(header.csum_start), usize::from(header.csum_offset));
    if !rules.checksum || start < ethernet::HEADER || start + offset + 2 > len {
        return Err(Cause::Malformed);
    }
    let layers = headers::parse(head).filter(|layers| layers.l4 == start && !layers.fragment);
    let l4 = layers.map(|layers| (layers, layers.protocol, header.csum_offset));
    let udp = matches!(l4, Some((_, UDP, UDP_CHECKSUM)));
    match l4 {
        Some((layers, TCP, TCP_CHECKSUM) | (layers, UDP, UDP_CHECKSUM)) if rules.vf_checksum && fits_mbuf(&layers) => {
            Ok(Treatment::Vf(TxOffload {
                checksum: true,
                udp,
                ipv6: layers.ipv6,
                l2_len: layers.l3 as u8,
                l3_len: (layers.l4 - layers.l3) as u16,
                ..TxOffload::default()
            }))
        }
        // Anything else a guest may ask for is a plain sum.
        _ => Ok(Treatment::Checksum { start, offset, udp }),
    }
}

/// An mbuf says where the IP header ends in 9 bits; no driver sends a longer one,
/// with half a KiB of IPv6 extensions, to be segmented; its checksum is the lane's work.
fn fits_mbuf(layers: &Layers) -> bool {
    layers.l4 - layers.l3 < 1 << 9
}

fn judge_segmentation(header: &NetHeader, head: &[u8], len: usize, rules: &TxRules) -> Result<Treatment, Cause> {
    let ipv6 = match header.gso {
        Gso::Tcp4 if rules.tso4 => false,
        Gso::Tcp6 if rules.tso6 => true,
        _ => return Err(Cause::Malformed),
    };
    let layers = headers::parse(head).ok_or(Cause::Malformed)?;
    let headers = match head.get(layers.l4 + 12) {
        Some(offset) if offset >> 4 >= 5 => layers.l4 + usize::from(offset >> 4) * 4,
        _ => return Err(Cause::Malformed),
    };
    // A segmented frame is a TCP one with a partial checksum (virtio 1.3, 5.1.6.2: GSO requires NEEDS_CSUM).
    // The guest's hdr_len is a hint; ours is parsed.
    let is_tcp = fits_mbuf(&layers) && layers.protocol == TCP && layers.ipv6 == ipv6 && !layers.fragment;
    let sums_tcp =
        header.needs_csum && usize::from(header.csum_start) == layers.l4 && header.csum_offset == TCP_CHECKSUM;
    if !is_tcp || !sums_tcp || header.gso_size == 0 || headers >= len || headers > head.len() {
        return Err(Cause::Malformed);
    }
    let size = usize::from(header.gso_size);
    if headers + size.min(len - headers) > rules.max_wire_frame {
        return Err(Cause::Oversize);
    }
    if rules.segments(header, len) {
        return Ok(Treatment::Segment { layers, headers, size });
    }
    Ok(Treatment::Vf(TxOffload {
        checksum: true,
        segment: header.gso_size,
        udp: false,
        ipv6,
        l2_len: layers.l3 as u8,
        l3_len: (layers.l4 - layers.l3) as u16,
        l4_len: (headers - layers.l4) as u8,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp4(len: usize) -> Vec<u8> {
        let mut f = vec![2u8; 12];
        f.extend([0x08, 0, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, TCP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        f.extend([0, 80, 0, 90, 0, 0, 0, 0, 0, 0, 0, 1, 0x50, 0x18, 1, 0, 0, 0, 0, 0]);
        f.resize(len, 0);
        f
    }

    const ALL: TxRules =
        TxRules { checksum: true, tso4: true, tso6: true, max_wire_frame: 1522, vf_checksum: true, vf_tso: true };
    const GSO: NetHeader = NetHeader {
        needs_csum: true,
        data_valid: false,
        gso: Gso::Tcp4,
        ecn: false,
        hdr_len: 54,
        gso_size: 1448,
        csum_start: 34,
        csum_offset: 16,
    };

    #[test]
    fn the_vf_does_what_it_can() {
        let offload =
            TxOffload { checksum: true, segment: 1448, udp: false, ipv6: false, l2_len: 14, l3_len: 20, l4_len: 20 };
        assert_eq!(judge(&GSO, &tcp4(5000), 5000, &ALL), Ok(Treatment::Vf(offload)));
        let checksum = NetHeader { gso: Gso::None, ..GSO };
        let offload = TxOffload { segment: 0, l4_len: 0, ..offload };
        assert_eq!(judge(&checksum, &tcp4(1000), 1000, &ALL), Ok(Treatment::Vf(offload)));
    }

    const LONG: TxRules = TxRules { max_wire_frame: 9238, ..ALL };

    #[test]
    fn a_vf_is_asked_for_segments_of_the_sizes_it_takes() {
        for (gso_size, by_vf) in [(255, false), (256, true), (9668, true), (9669, false), (u16::MAX, false)] {
            let treatment = judge(&NetHeader { gso_size, ..GSO }, &tcp4(5000), 5000, &LONG).unwrap();
            assert_eq!(matches!(treatment, Treatment::Vf(_)), by_vf, "{gso_size}: {treatment:?}");
        }
    }

    #[test]
    fn the_lane_does_the_rest() {
        let without = TxRules { vf_checksum: false, vf_tso: false, ..ALL };
        let mss = |gso_size| NetHeader { gso_size, ..GSO };
        // A size beyond any frame makes one segment.
        for (header, rules) in [(GSO, without), (mss(255), ALL), (mss(9669), LONG), (mss(u16::MAX), LONG)] {
            let treatment = judge(&header, &tcp4(5000), 5000, &rules);
            assert!(matches!(treatment, Ok(Treatment::Segment { headers: 54, .. })), "{treatment:?}");
        }
        let checksum = NetHeader { gso: Gso::None, ..GSO };
        let sum = Ok(Treatment::Checksum { start: 34, offset: 16, udp: false });
        assert_eq!(judge(&checksum, &tcp4(1000), 1000, &without), sum);
    }

    #[test]
    fn lies_are_refused() {
        use Cause::{Malformed, Oversize};
        let plain = NetHeader { gso: Gso::None, ..GSO };
        let table: &[(&str, NetHeader, TxRules, usize, Cause)] = &[
            (
                "checksum beyond the frame (CVE-2024-11614)",
                NetHeader { csum_start: 2000, ..plain },
                ALL,
                1000,
                Malformed,
            ),
            ("checksum field half inside", NetHeader { csum_start: 983, ..plain }, ALL, 1000, Malformed),
            ("checksum in the Ethernet header", NetHeader { csum_start: 2, ..plain }, ALL, 1000, Malformed),
            ("checksum not negotiated", plain, TxRules { checksum: false, ..ALL }, 1000, Malformed),
            ("segmentation not negotiated", GSO, TxRules { tso4: false, ..ALL }, 5000, Malformed),
            ("no segment size", NetHeader { gso_size: 0, ..GSO }, ALL, 5000, Malformed),
            ("UFO was never offered", NetHeader { gso: Gso::Other(3), ..GSO }, ALL, 5000, Malformed),
            ("IPv6 asked for, IPv4 sent", NetHeader { gso: Gso::Tcp6, ..GSO }, ALL, 5000, Malformed),
            ("no partial checksum", NetHeader { needs_csum: false, ..GSO }, ALL, 5000, Malformed),
            ("another checksum start", NetHeader { csum_start: 33, ..GSO }, ALL, 5000, Malformed),
            ("headers only", GSO, ALL, 54, Malformed),
            ("segments over the MTU", NetHeader { gso_size: 1480, ..GSO }, ALL, 5000, Oversize),
            ("plain and over the MTU", NetHeader::default(), ALL, 1523, Oversize),
        ];
        for (what, header, rules, len, cause) in table {
            for rules in [*rules, TxRules { vf_checksum: false, vf_tso: false, ..*rules }] {
                assert_eq!(judge(header, &tcp4(*len), *len, &rules), Err(*cause), "{what}");
            }
        }
    }

    proptest::proptest! {
        #[test]
        fn no_header_breaks_it(
            frame in proptest::collection::vec(proptest::num::u8::ANY, 14..300),
            (gso, gso_size, csum_start, csum_offset, needs_csum) in proptest::arbitrary::any::<(u8, u16, u16, u16, bool)>(),
        ) {
            let gso = [Gso::None, Gso::Tcp4, Gso::Tcp6, Gso::Other(9)][usize::from(gso) % 4];
            let header = NetHeader { needs_csum, gso, gso_size, csum_start, csum_offset, ..NetHeader::default() };
            if let Ok(Treatment::Checksum { start, offset, .. }) = judge(&header, &frame, frame.len(), &ALL) {
                proptest::prop_assert!(start + offset + 2 <= frame.len());
            }
        }
    }
}
