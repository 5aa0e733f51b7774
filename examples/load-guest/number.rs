//! Frames with a flow, a number and a checksum over every byte.

use std::hash::Hasher;

const CHECK: usize = 24;
/// No frame is shorter.
pub const MIN: usize = CHECK + 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbered {
    pub flow: u16,
    pub number: u64,
}

impl Numbered {
    pub fn bytes(self, len: usize) -> Vec<u8> {
        assert!(len >= MIN, "a frame of {len} bytes has no room for its number");
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5];
        frame.extend(self.flow.to_le_bytes());
        frame.extend(self.number.to_le_bytes());
        frame.extend([0; 8]);
        let mut fill = self.number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(self.flow);
        while frame.len() < len {
            fill = fill.rotate_left(9).wrapping_mul(0xd6e8_feb8_6659_fd93);
            let bytes = fill.to_le_bytes();
            frame.extend(&bytes[..bytes.len().min(len - frame.len())]);
        }
        let sum = checksum(&frame).to_le_bytes();
        frame[CHECK..MIN].copy_from_slice(&sum);
        frame
    }

    /// `None`: not one of these frames, or not as it was sent.
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let field = |at: usize| frame.get(at..at + 8).map(|b| u64::from_le_bytes(b.try_into().expect("8 bytes")));
        if field(CHECK)? != checksum(frame) {
            return None;
        }
        Some(Self { flow: u16::from_le_bytes([frame[14], frame[15]]), number: field(16)? })
    }
}

/// Of all bytes but the checksum's own.
fn checksum(frame: &[u8]) -> u64 {
    // Without keys, so that two processes agree.
    #[allow(deprecated)]
    let mut hasher = std::hash::SipHasher::new();
    hasher.write(&frame[..CHECK]);
    hasher.write(&frame[MIN..]);
    hasher.finish()
}

#[test]
fn every_changed_byte_is_found() {
    let numbered = Numbered { flow: 3, number: 1 << 40 };
    for len in [MIN, 60, 1514] {
        let frame = numbered.bytes(len);
        assert_eq!(Numbered::parse(&frame), Some(numbered));
        assert_eq!(Numbered::parse(&frame[..len - 1]), None);
        for at in 0..len {
            let mut changed = frame.clone();
            changed[at] ^= 0x40;
            assert_eq!(Numbered::parse(&changed), None, "byte {at} of {len}");
        }
    }
}
