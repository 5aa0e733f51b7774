//! TCP and UDP frames with their checksums, written against the RFCs and not against the code under test.

use super::frame::{GUEST_MAC, PEER_MAC, fold, sum};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ip {
    V4,
    V6,
}

/// One TCP segment, however long; also sent as UDP with the same payload.
#[derive(Clone, Debug)]
pub struct Tcp {
    pub ip: Ip,
    pub seq: u32,
    /// FIN and PSH belong to the last segment only.
    pub last_flags: u8,
    pub payload: Vec<u8>,
}

impl Tcp {
    pub const FIN: u8 = 1;
    pub const PSH: u8 = 8;
    pub const ACK: u8 = 16;
    /// With a timestamp option: 12 bytes.
    const HEADER: usize = 32;
    const UDP_HEADER: usize = 8;

    pub fn l4_start(&self) -> usize {
        14 + match self.ip {
            Ip::V4 => 20,
            Ip::V6 => 40,
        }
    }

    pub fn header_len(&self) -> usize {
        self.l4_start() + Self::HEADER
    }

    /// As a guest with CSUM sends it: the checksum field holds the sum of the pseudo header.
    pub fn partial(&self) -> Vec<u8> {
        let mut l4 = Vec::new();
        l4.extend(5001_u16.to_be_bytes());
        l4.extend(5002_u16.to_be_bytes());
        l4.extend(self.seq.to_be_bytes());
        l4.extend(0x0102_0304_u32.to_be_bytes());
        l4.extend([(Self::HEADER as u8 / 4) << 4, self.last_flags]);
        l4.extend([0x20, 0, 0, 0, 0, 0]);
        l4.extend([1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8]);
        l4.extend(&self.payload);
        self.finish(l4, 6, 16)
    }

    pub fn udp_partial(&self) -> Vec<u8> {
        let mut l4 = Vec::new();
        l4.extend(5001_u16.to_be_bytes());
        l4.extend(5002_u16.to_be_bytes());
        l4.extend(((Self::UDP_HEADER + self.payload.len()) as u16).to_be_bytes());
        l4.extend([0, 0]);
        l4.extend(&self.payload);
        self.finish(l4, 17, 6)
    }

    /// The UDP checksum before 0 is replaced by 0xffff.
    pub fn udp_sum(&self) -> u16 {
        !fold(sum(&self.udp_partial()[self.l4_start()..]))
    }

    fn finish(&self, mut l4: Vec<u8>, protocol: u8, checksum_at: usize) -> Vec<u8> {
        let ip = self.ip_header(l4.len(), protocol);
        let pseudo = fold(pseudo_sum(&ip, l4.len(), protocol));
        l4[checksum_at..checksum_at + 2].copy_from_slice(&pseudo.to_be_bytes());
        let mut frame = Vec::with_capacity(14 + ip.len() + l4.len());
        frame.extend(PEER_MAC);
        frame.extend(GUEST_MAC);
        frame.extend(match self.ip {
            Ip::V4 => [0x08, 0x00],
            Ip::V6 => [0x86, 0xdd],
        });
        frame.extend(ip);
        frame.extend(l4);
        frame
    }

    fn ip_header(&self, l4_len: usize, protocol: u8) -> Vec<u8> {
        match self.ip {
            Ip::V4 => {
                let mut ip = vec![0x45, 0];
                // A guest leaves the length of what it wants segmented as it is, at most 65535.
                ip.extend(((20 + l4_len).min(65535) as u16).to_be_bytes());
                ip.extend([0x12, 0x34, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
                let check = !fold(sum(&ip));
                ip[10..12].copy_from_slice(&check.to_be_bytes());
                ip
            }
            Ip::V6 => {
                let mut ip = vec![0x60, 0, 0, 0];
                ip.extend((l4_len.min(65535) as u16).to_be_bytes());
                ip.extend([protocol, 64]);
                for last in [1, 2] {
                    ip.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
                }
                ip
            }
        }
    }

    /// `segments` are this frame, cut into pieces of `size` payload bytes (RFC 9293, RFC 791).
    #[track_caller]
    pub fn assert_segments(&self, segments: &[Vec<u8>], size: usize) {
        let whole = self.partial();
        let (start, header) = (self.l4_start(), self.header_len());
        let pieces: Vec<&[u8]> = self.payload.chunks(size).collect();
        assert_eq!(segments.len(), pieces.len());
        for (i, (segment, piece)) in segments.iter().zip(&pieces).enumerate() {
            let last = i + 1 == pieces.len();
            assert_eq!(&segment[header..], *piece, "payload of segment {i}");
            assert_eq!(segment[..14], whole[..14], "Ethernet header of segment {i}");
            let seq = self.seq.wrapping_add((i * size) as u32);
            assert_eq!(segment[start + 4..start + 8], seq.to_be_bytes(), "sequence number of segment {i}");
            let flags = if last { self.last_flags } else { self.last_flags & !(Self::FIN | Self::PSH) };
            assert_eq!(segment[start + 13], flags, "flags of segment {i}");
            // Ports, acknowledgement, window, options.
            for same in [0..4, 8..13, 14..16, 18..32] {
                let same = start + same.start..start + same.end;
                assert_eq!(segment[same.clone()], whole[same], "TCP header of segment {i}");
            }
            self.assert_ip(segment, &whole, i);
            assert!(l4_sum_good(segment), "TCP checksum of segment {i}");
        }
    }

    #[track_caller]
    fn assert_ip(&self, segment: &[u8], whole: &[u8], i: usize) {
        let length = |at: usize| usize::from(u16::from_be_bytes([segment[at], segment[at + 1]]));
        match self.ip {
            Ip::V4 => {
                assert_eq!(length(16), segment.len() - 14, "IP length of segment {i}");
                assert_eq!(length(18), 0x1234 + i, "IP identification of segment {i}");
                assert_eq!(fold(sum(&segment[14..34])), 0xffff, "IP checksum of segment {i}");
                assert_eq!(segment[20..24], whole[20..24], "IP header of segment {i}");
                assert_eq!(segment[26..34], whole[26..34], "IP addresses of segment {i}");
            }
            Ip::V6 => {
                assert_eq!(length(18), segment.len() - 54, "IP length of segment {i}");
                assert_eq!(segment[20..54], whole[20..54], "IP header of segment {i}");
            }
        }
    }
}

fn pseudo_sum(ip: &[u8], l4_len: usize, protocol: u8) -> u32 {
    let addresses = if ip[0] >> 4 == 4 { &ip[12..20] } else { &ip[8..40] };
    sum(addresses) + l4_len as u32 + u32::from(protocol)
}

/// Whether the TCP or UDP checksum of a frame is right.
pub fn l4_sum_good(frame: &[u8]) -> bool {
    let (start, protocol) = if frame[12..14] == [0x08, 0x00] { (34, frame[23]) } else { (54, frame[20]) };
    let l4 = &frame[start..];
    fold(pseudo_sum(&frame[14..start], l4.len(), protocol) + sum(l4)) == 0xffff
}
