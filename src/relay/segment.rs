//! TCP segmentation in software, for VFs that cannot (or not for this frame).

use super::checksum;
use super::headers::{Layers, be16};

/// TCP flag bits in the 14th byte of its header (RFC 9293, 3.1; CWR: RFC 3168).
const FIN_PSH: u8 = 0x09;
const CWR: u8 = 0x80;

/// A large TCP frame that is cut into segments, one at a time, so that a full VF can be waited for in between.
#[derive(Debug)]
pub(super) struct Segmenter {
    /// The frame: a private copy.
    frame: Vec<u8>,
    layers: Layers,
    /// Headers in front of each segment, in bytes.
    headers: usize,
    /// Payload of a segment, in bytes.
    size: usize,
    /// First payload byte not yet sent.
    next: usize,
    /// Segments made.
    made: u32,
    /// The segment being made: headers and payload.
    segment: Vec<u8>,
}

impl Segmenter {
    /// A segmenter with room for the largest frame and segment; it allocates only here.
    pub(super) fn with_capacity(max_frame: usize, max_segment: usize) -> Self {
        Self {
            frame: Vec::with_capacity(max_frame),
            layers: Layers { l3: 0, l4: 0, ipv6: false, protocol: 0, fragment: false },
            headers: 0,
            size: 0,
            next: 0,
            made: 0,
            segment: Vec::with_capacity(max_segment),
        }
    }

    /// The buffer to copy a frame into, `len` bytes long (at most the capacity).
    pub(super) fn load(&mut self, len: usize) -> &mut [u8] {
        self.next = usize::MAX;
        self.frame.resize(len, 0);
        &mut self.frame
    }

    /// The loaded frame.
    pub(super) fn frame(&mut self) -> &mut [u8] {
        &mut self.frame
    }

    /// Starts on the loaded frame. The caller has checked that `headers <= frame.len()`, that they end in
    /// a whole TCP header, and that `headers + size` fits a segment.
    pub(super) fn start(&mut self, layers: Layers, headers: usize, size: usize) {
        (self.layers, self.headers, self.size) = (layers, headers, size);
        (self.next, self.made) = (headers, 0);
    }

    /// Whether the frame has been sent whole.
    pub(super) fn is_done(&self) -> bool {
        self.next >= self.frame.len()
    }

    /// Forgets the rest.
    pub(super) fn abandon(&mut self) {
        self.next = usize::MAX;
    }

    /// Makes the next segment, complete with lengths, sequence number, flags and checksums. Calling it again
    /// without [`Self::advance`] makes the same one. Not to be called when done.
    pub(super) fn segment(&mut self) -> &[u8] {
        let Layers { l3, l4, ipv6, .. } = self.layers;
        let end = (self.next + self.size).min(self.frame.len());
        let out = &mut self.segment;
        out.clear();
        out.extend_from_slice(&self.frame[..self.headers]);
        out.extend_from_slice(&self.frame[self.next..end]);

        if ipv6 {
            let length = (out.len() - l3 - 40) as u16;
            out[l3 + 4..l3 + 6].copy_from_slice(&length.to_be_bytes());
        } else {
            let length = (out.len() - l3) as u16;
            out[l3 + 2..l3 + 4].copy_from_slice(&length.to_be_bytes());
            // Each segment is a datagram of its own.
            let id = be16(out, l3 + 4).unwrap_or(0).wrapping_add(self.made as u16);
            out[l3 + 4..l3 + 6].copy_from_slice(&id.to_be_bytes());
            out[l3 + 10..l3 + 12].fill(0);
            let sum = !checksum::fold(checksum::sum(&out[l3..l4]));
            out[l3 + 10..l3 + 12].copy_from_slice(&sum.to_be_bytes());
        }

        let sequence = u32::from_be_bytes([out[l4 + 4], out[l4 + 5], out[l4 + 6], out[l4 + 7]])
            .wrapping_add((self.next - self.headers) as u32);
        out[l4 + 4..l4 + 8].copy_from_slice(&sequence.to_be_bytes());
        if end < self.frame.len() {
            out[l4 + 13] &= !FIN_PSH;
        }
        if self.made > 0 {
            // Only the first segment says that the window was reduced (RFC 3168, 6.1.2).
            out[l4 + 13] &= !CWR;
        }
        let pseudo = checksum::pseudo_header(out, &self.layers, out.len() - l4);
        out[l4 + 16..l4 + 18].copy_from_slice(&checksum::fold(pseudo).to_be_bytes());
        checksum::complete(out, l4, 16, false);
        out
    }

    /// The segment was taken: go on to the next. Returns whether it was the last.
    pub(super) fn advance(&mut self) -> bool {
        self.next = self.next.saturating_add(self.size);
        self.made += 1;
        self.is_done()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::headers::{self, TCP};

    fn frame(ipv6: bool, payload: usize) -> Vec<u8> {
        let mut f = vec![2u8; 12];
        if ipv6 {
            f.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, TCP, 64]);
            f.extend((0..32).collect::<Vec<u8>>());
        } else {
            f.extend([0x08, 0, 0x45, 0, 0, 0, 0xff, 0xff, 0, 0, 64, TCP, 0, 0]);
            f.extend([10, 0, 0, 1, 10, 0, 0, 2]);
        }
        f.extend([0, 80, 0, 90, 0xff, 0xff, 0xff, 0, 0, 0, 0, 1, 0x60, 0x80 | 0x18 | 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1]);
        f.extend((0..payload).map(|i| i as u8));
        f
    }

    #[test]
    fn segments_reassemble_and_verify() {
        for ipv6 in [false, true] {
            for (payload, size) in [(1, 1000), (1000, 1000), (1001, 1000), (64_000, 1448), (100, 1)] {
                let original = frame(ipv6, payload);
                let layers = headers::parse(&original).unwrap();
                let start = layers.l4 + 24;
                let mut cutter = Segmenter::with_capacity(70_000, 9_000);
                cutter.load(original.len()).copy_from_slice(&original);
                cutter.start(layers, start, size);
                let (mut joined, mut n) = (Vec::new(), 0u32);
                while !cutter.is_done() {
                    let segment = cutter.segment().to_vec();
                    assert_eq!(segment, cutter.segment(), "made again, it is the same");
                    let here = headers::parse(&segment).unwrap();
                    assert_eq!(here, layers);
                    let tcp = &segment[here.l4..];
                    let sequence = u32::from_be_bytes(tcp[4..8].try_into().unwrap());
                    assert_eq!(sequence, 0xffff_ff00u32.wrapping_add(joined.len() as u32));
                    let last = joined.len() + segment.len() - start == payload;
                    assert_eq!(tcp[13] & FIN_PSH == FIN_PSH, last);
                    assert_eq!(tcp[13] & CWR != 0, n == 0);
                    let total = checksum::pseudo_header(&segment, &here, tcp.len()) + checksum::sum(tcp);
                    assert_eq!(checksum::fold(total), 0xffff, "TCP checksum");
                    if ipv6 {
                        assert_eq!(be16(&segment, here.l3 + 4).unwrap() as usize, segment.len() - here.l3 - 40);
                    } else {
                        assert_eq!(checksum::fold(checksum::sum(&segment[here.l3..here.l4])), 0xffff, "IP checksum");
                        assert_eq!(be16(&segment, here.l3 + 2).unwrap() as usize, segment.len() - here.l3);
                        assert_eq!(be16(&segment, here.l3 + 4).unwrap(), 0xffffu16.wrapping_add(n as u16));
                    }
                    joined.extend_from_slice(&segment[start..]);
                    n += 1;
                    assert_eq!(cutter.advance(), last);
                }
                assert_eq!(joined, original[start..]);
                assert_eq!(n as usize, payload.div_ceil(size));
            }
        }
    }
}
