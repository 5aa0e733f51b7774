//! Ethernet, IP and TCP/UDP headers of a frame's private first bytes: where they begin and end.

use crate::ethernet;

/// EtherTypes (IEEE 802 numbers).
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_QINQ: u16 = 0x88a8;

/// IP protocol numbers.
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;

/// Where a frame's layers are. Offsets from the first byte of the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layers {
    /// First byte of the IP header.
    pub l3: usize,
    /// First byte of the transport header.
    pub l4: usize,
    /// IPv6 (else IPv4).
    pub ipv6: bool,
    /// IP protocol of the transport header.
    pub protocol: u8,
    /// A fragment: it has no transport header of its own, or not all of its payload.
    pub fragment: bool,
}

/// A big-endian 16-bit field.
pub(super) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

/// Finds the layers of an IP frame with at most two VLAN tags. `None` if it is no IP, or if its headers
/// do not fit `head`.
pub(super) fn parse(head: &[u8]) -> Option<Layers> {
    let mut l3 = ethernet::HEADER;
    let mut ethertype = be16(head, 12)?;
    for _ in 0..2 {
        if ethertype != ETHERTYPE_VLAN && ethertype != ETHERTYPE_QINQ {
            break;
        }
        ethertype = be16(head, l3 + 2)?;
        l3 += 4;
    }
    match ethertype {
        ETHERTYPE_IPV4 => {
            let version_ihl = *head.get(l3)?;
            let header = usize::from(version_ihl & 0x0f) * 4;
            if version_ihl >> 4 != 4 || header < 20 || l3 + header > head.len() {
                return None;
            }
            // Offset or MF set (RFC 791).
            let fragment = be16(head, l3 + 6)? & 0x3fff != 0;
            Some(Layers { l3, l4: l3 + header, ipv6: false, protocol: head[l3 + 9], fragment })
        }
        ETHERTYPE_IPV6 => {
            if l3 + 40 > head.len() || head[l3] >> 4 != 6 {
                return None;
            }
            let (mut protocol, mut l4, mut fragment) = (head[l3 + 6], l3 + 40, false);
            // Hop-by-hop, routing, destination options: length in 8 bytes beyond the first (RFC 8200);
            // a real frame has few of them.
            for _ in 0..8 {
                match protocol {
                    0 | 43 | 60 => {
                        protocol = *head.get(l4)?;
                        l4 += (usize::from(*head.get(l4 + 1)?) + 1) * 8;
                    }
                    44 => {
                        protocol = *head.get(l4)?;
                        l4 += 8;
                        fragment = true;
                    }
                    _ => break,
                }
            }
            (l4 <= head.len()).then_some(Layers { l3, l4, ipv6: true, protocol, fragment })
        }
        _ => None,
    }
}

/// A hash that is the same for all frames of a flow: addresses, protocol and ports of TCP and UDP;
/// Ethernet addresses for what is no IP. It only has to spread, not to resist an attacker: who
/// sends to one ring on purpose harms the guest it talks to.
pub(super) fn flow_hash(head: &[u8]) -> u32 {
    // Multiplier: 2^64 / golden ratio (Knuth, TAOCP 6.4).
    let mix = |hash: u64, word: u64| (hash.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let words = |mut hash: u64, bytes: &[u8]| {
        for word in bytes.chunks(4) {
            let mut padded = [0; 4];
            padded[..word.len()].copy_from_slice(word);
            hash = mix(hash, u64::from(u32::from_le_bytes(padded)));
        }
        hash
    };
    let hash = match parse(head) {
        Some(layers) => {
            let addresses = if layers.ipv6 { layers.l3 + 8..layers.l3 + 40 } else { layers.l3 + 12..layers.l3 + 20 };
            let hash = words(u64::from(layers.protocol), &head[addresses]);
            match head.get(layers.l4..layers.l4 + 4) {
                Some(ports) if !layers.fragment && matches!(layers.protocol, TCP | UDP) => words(hash, ports),
                _ => hash,
            }
        }
        None => words(0, &head[..head.len().min(12)]),
    };
    (hash >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp4(tags: usize, source_port: u16) -> Vec<u8> {
        let mut frame = vec![2; 12];
        for _ in 0..tags {
            frame.extend([0x81, 0, 0, 5]);
        }
        frame.extend([0x08, 0]);
        let mut ip = [0u8; 20];
        (ip[0], ip[9]) = (0x45, TCP);
        frame.extend(ip);
        frame.extend(source_port.to_be_bytes());
        frame.extend([0; 18]);
        frame
    }

    #[test]
    fn vlan_tags_move_the_ip_header() {
        for tags in 0..=2 {
            let layers = parse(&tcp4(tags, 1)).unwrap();
            assert_eq!((layers.l3, layers.l4), (14 + 4 * tags, 34 + 4 * tags));
        }
        assert_eq!(parse(&tcp4(3, 1)), None);
    }

    #[test]
    fn every_truncation_is_survived() {
        let frame = tcp4(2, 7);
        for end in 0..frame.len() {
            let _ = (parse(&frame[..end]), flow_hash(&frame[..end]));
        }
    }

    #[test]
    fn ipv6_extensions_are_walked() {
        let mut frame = vec![0u8; 12];
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, 0 /* hop by hop */, 64]);
        frame.extend([0; 32]);
        frame.extend([60, 0, 0, 0, 0, 0, 0, 0]); // then destination options
        frame.extend([UDP, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        frame.extend([0; 8]);
        let layers = parse(&frame).unwrap();
        assert_eq!((layers.protocol, layers.l4 - layers.l3), (UDP, 40 + 8 + 16));
    }

    #[test]
    fn flows_spread_over_four_rings() {
        let mut rings = [0; 4];
        for port in 0..4096 {
            rings[flow_hash(&tcp4(0, port)) as usize % 4] += 1;
        }
        assert!(rings.iter().all(|&n| (900..1150).contains(&n)), "{rings:?}");
    }
}
