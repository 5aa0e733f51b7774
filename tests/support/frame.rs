//! Test frames: UDP over IPv4, every byte a function of flow, sequence number and length.

pub const GUEST_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 1];
pub const PEER_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 2];
/// Ethernet, IPv4, UDP headers and our own tag.
pub const MIN_LEN: usize = 14 + 20 + 8 + TAG_LEN;
const TAG_LEN: usize = 10;
const MAGIC: u32 = 0x7646_7731;
const FIRST_PORT: u16 = 20_000;

/// What identifies a test frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Seen by the network as a UDP source port of its own.
    pub flow: u16,
    pub seq: u32,
    /// Bytes, without FCS; at least [`MIN_LEN`].
    pub len: usize,
}

impl Frame {
    pub fn bytes(&self) -> Vec<u8> {
        assert!(self.len >= MIN_LEN);
        let ip_len = (self.len - 14) as u16;
        let mut b = Vec::with_capacity(self.len);
        b.extend(PEER_MAC);
        b.extend(GUEST_MAC);
        b.extend([0x08, 0x00]);
        b.extend([0x45, 0]);
        b.extend(ip_len.to_be_bytes());
        b.extend([0, 0, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        let sum = !fold(sum(&b[14..34]));
        b[24..26].copy_from_slice(&sum.to_be_bytes());
        b.extend((FIRST_PORT + self.flow).to_be_bytes());
        b.extend(9u16.to_be_bytes());
        b.extend((ip_len - 20).to_be_bytes());
        // No UDP checksum: allowed over IPv4, and one thing less to be rewritten.
        b.extend([0, 0]);
        b.extend(MAGIC.to_be_bytes());
        b.extend(self.flow.to_be_bytes());
        b.extend(self.seq.to_be_bytes());
        let mut x = 0x9e37_79b9 ^ self.seq.wrapping_mul(0x85eb_ca6b) ^ u32::from(self.flow) << 16;
        x |= 1;
        while b.len() < self.len {
            x ^= x << 13;
            x ^= x >> 17;
            x ^= x << 5;
            b.push(x as u8);
        }
        b
    }

    /// Recognises a frame; panics unless every byte is as it was sent.
    #[track_caller]
    pub fn parse(bytes: &[u8]) -> Self {
        assert!(
            bytes.len() >= MIN_LEN && bytes[42..46] == MAGIC.to_be_bytes(),
            "not one of our frames ({} bytes): {:02x?}",
            bytes.len(),
            &bytes[..bytes.len().min(64)]
        );
        let frame = Self {
            flow: u16::from_be_bytes([bytes[46], bytes[47]]),
            seq: u32::from_be_bytes(bytes[48..52].try_into().expect("4 bytes")),
            len: bytes.len(),
        };
        let sent = frame.bytes();
        if let Some(at) = (0..sent.len()).find(|&i| sent[i] != bytes[i]) {
            panic!(
                "{frame:?} was changed from byte {at}: {:02x?}, sent {:02x?}",
                &bytes[at..bytes.len().min(at + 16)],
                &sent[at..sent.len().min(at + 16)]
            );
        }
        frame
    }
}

/// Ones-complement sum of big-endian words.
pub fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum()
}

pub fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
