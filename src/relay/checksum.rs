//! The internet checksum (RFC 1071), for what a VF cannot do.

use super::headers::Layers;

/// One's complement sum of 16-bit big-endian words, not folded.
pub(super) fn sum(bytes: &[u8]) -> u64 {
    // Sums 32 bits at a time: the one's complement sum does not care where the carries come in (RFC 1071, 2C).
    let mut total = 0u64;
    let mut words = bytes.chunks_exact(4);
    for word in &mut words {
        total += u64::from(u32::from_be_bytes(word.try_into().expect("4 bytes")));
    }
    let mut tail = [0; 4];
    let rest = words.remainder();
    tail[..rest.len()].copy_from_slice(rest);
    total + u64::from(u32::from_be_bytes(tail))
}

/// Folds to 16 bits.
pub(super) fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

/// Sum of the pseudo-header for `length` bytes of transport header and payload (RFC 9293 3.1, RFC 8200 8.1).
pub(super) fn pseudo_header(frame: &[u8], layers: &Layers, length: usize) -> u64 {
    let addresses = if layers.ipv6 { layers.l3 + 8..layers.l3 + 40 } else { layers.l3 + 12..layers.l3 + 20 };
    sum(&frame[addresses]) + u64::from(layers.protocol) + length as u64
}

/// Completes the checksum at `start + offset` over everything from `start`, as NEEDS_CSUM asks
/// (virtio 1.3, 5.1.6.2): the field holds the pseudo-header's sum and is part of the data.
/// The caller has checked `start + offset + 2 <= frame.len()`.
pub(super) fn complete(frame: &mut [u8], start: usize, offset: usize, udp: bool) {
    let checksum = match !fold(sum(&frame[start..])) {
        // For UDP, zero would mean that there is none (RFC 768).
        0 if udp => 0xffff,
        checksum => checksum,
    };
    frame[start + offset..start + offset + 2].copy_from_slice(&checksum.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 1071's definition, word by word.
    fn reference(bytes: &[u8]) -> u16 {
        let mut total = 0u32;
        for word in bytes.chunks(2) {
            total += u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0));
            total = (total & 0xffff) + (total >> 16);
        }
        total as u16
    }

    proptest::proptest! {
        #[test]
        fn agrees_with_the_definition(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..300)) {
            proptest::prop_assert_eq!(fold(sum(&bytes)), reference(&bytes));
        }

        #[test]
        fn a_completed_sum_verifies(mut bytes in proptest::collection::vec(proptest::num::u8::ANY, 8..200), start in 0usize..4) {
            // The field held the pseudo-header's sum; with that and the checksum, the sum is all ones.
            let pseudo = u64::from(u16::from_be_bytes([bytes[start + 2], bytes[start + 3]]));
            complete(&mut bytes, start, 2, false);
            proptest::prop_assert_eq!(fold(sum(&bytes[start..]) + pseudo), 0xffff);
        }
    }
}
