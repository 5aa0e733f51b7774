//! The virtio-net header (virtio 1.3, 5.1.6), always a private, decoded copy.

const F_NEEDS_CSUM: u8 = 1;
const F_DATA_VALID: u8 = 2;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_ECN: u8 = 0x80;

/// What kind of segmentation a header asks for. Low bits of `gso_type`; ECN is kept apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gso {
    /// None: one frame.
    #[default]
    None,
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// Anything else; the value is kept for the message. Nothing of it is offered.
    Other(u8),
}

/// A decoded `virtio_net_hdr`. Offsets count from the first byte of the frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetHeader {
    /// VIRTIO_NET_HDR_F_NEEDS_CSUM: the checksum at `csum_start + csum_offset` is to be completed.
    pub needs_csum: bool,
    /// VIRTIO_NET_HDR_F_DATA_VALID: checksums were verified.
    pub data_valid: bool,
    /// Segmentation asked for.
    pub gso: Gso,
    /// VIRTIO_NET_HDR_GSO_ECN.
    pub ecn: bool,
    /// Length of the headers to copy in front of each segment; a hint that is never trusted.
    pub hdr_len: u16,
    /// Payload bytes a segment.
    pub gso_size: u16,
    /// Where checksumming starts.
    pub csum_start: u16,
    /// Where the checksum goes, from `csum_start`.
    pub csum_offset: u16,
}

impl NetHeader {
    /// Length without the `num_buffers` field (no VERSION_1, no MRG_RXBUF).
    pub const LEGACY_LEN: usize = 10;
    /// Length with it.
    pub const LEN: usize = 12;

    /// Decodes the first ten bytes (all fields little endian, as on every guest we serve).
    #[inline]
    pub fn decode(bytes: &[u8; Self::LEGACY_LEN]) -> Self {
        let field = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let [flags, gso_type, ..] = *bytes;
        Self {
            needs_csum: flags & F_NEEDS_CSUM != 0,
            data_valid: flags & F_DATA_VALID != 0,
            gso: match gso_type & !GSO_ECN {
                GSO_NONE => Gso::None,
                GSO_TCPV4 => Gso::Tcp4,
                GSO_TCPV6 => Gso::Tcp6,
                other => Gso::Other(other),
            },
            ecn: gso_type & GSO_ECN != 0,
            hdr_len: field(2),
            gso_size: field(4),
            csum_start: field(6),
            csum_offset: field(8),
        }
    }

    /// Whether a header that begins with these bytes asks for nothing: neither a checksum nor segmentation.
    #[inline]
    pub(super) fn is_plain([flags, gso_type]: [u8; 2]) -> bool {
        flags & F_NEEDS_CSUM | gso_type & !GSO_ECN == 0
    }

    /// Encodes with `num_buffers`; a ten-byte header is its prefix.
    #[inline]
    pub fn encode(&self, num_buffers: u16) -> [u8; Self::LEN] {
        let mut flags = 0;
        if self.needs_csum {
            flags |= F_NEEDS_CSUM;
        }
        if self.data_valid {
            flags |= F_DATA_VALID;
        }
        let mut gso_type = match self.gso {
            Gso::None => GSO_NONE,
            Gso::Tcp4 => GSO_TCPV4,
            Gso::Tcp6 => GSO_TCPV6,
            Gso::Other(other) => other & !GSO_ECN,
        };
        if self.ecn {
            gso_type |= GSO_ECN;
        }
        // Whole words: a copy that reads wider than it was written would wait for the stores.
        let first = u64::from(flags)
            | u64::from(gso_type) << 8
            | u64::from(self.hdr_len) << 16
            | u64::from(self.gso_size) << 32
            | u64::from(self.csum_start) << 48;
        let second = u32::from(self.csum_offset) | u32::from(num_buffers) << 16;
        let mut bytes = [0; Self::LEN];
        bytes[..8].copy_from_slice(&first.to_le_bytes());
        bytes[8..].copy_from_slice(&second.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_spec_has_them() {
        let bytes = [1, 0x81, 66, 0, 0xb4, 5, 34, 0, 16, 0];
        let header = NetHeader::decode(&bytes);
        let expected = NetHeader {
            needs_csum: true,
            data_valid: false,
            gso: Gso::Tcp4,
            ecn: true,
            hdr_len: 66,
            gso_size: 1460,
            csum_start: 34,
            csum_offset: 16,
        };
        assert_eq!(header, expected);
        assert_eq!(header.encode(0x0102)[..10], bytes);
        assert_eq!(header.encode(0x0102)[10..], [2, 1]);
    }

    #[test]
    fn every_flag_and_type_survives_the_round_trip() {
        for flags in 0..4 {
            for gso_type in 0..=255 {
                let bytes = [flags, gso_type, 1, 2, 3, 4, 5, 6, 7, 8];
                let header = NetHeader::decode(&bytes);
                assert_eq!(header.encode(1)[..10], bytes);
                assert_eq!(NetHeader::is_plain([flags, gso_type]), !header.needs_csum && header.gso == Gso::None);
            }
        }
    }
}
