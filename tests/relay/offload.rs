//! Offloads a guest asks for come out of a VF without any (`soft:loop`) as correct frames: done in software.

use crate::Port;
use crate::support::checksum::{Ip, Tcp, l4_sum_good};
use crate::support::frontend::feature::{CSUM, HOST_TSO4, HOST_TSO6, MRG_RXBUF, VERSION_1};
use crate::support::guest::{Guest, Plan};
use crate::support::tx::{NetHdr, Shape};
use crate::support::until;

fn guest(port: &Port, shape: Shape) -> Guest {
    port.guest(&Plan {
        features: VERSION_1 | MRG_RXBUF | CSUM | HOST_TSO4 | HOST_TSO6,
        tx_slot: 65536 + 128,
        size: 128,
        shape,
        ..Plan::default()
    })
}

/// Sends one, receives `n`.
fn through(guest: &mut Guest, header: &NetHdr, frame: &[u8], n: usize) -> Vec<Vec<u8>> {
    let tx = &mut guest.pairs[0].tx;
    assert!(tx.send_with(header, frame));
    tx.flush();
    let mut frames = Vec::new();
    until("all segments are back", || {
        while let Some(received) = guest.pairs[0].rx.receive() {
            assert_eq!(received.header.gso_type, 0, "the guest takes no TSO: {received:?}");
            assert_eq!(received.header.flags & NetHdr::NEEDS_CSUM, 0, "nor partial checksums");
            frames.push(received.frame);
        }
        frames.len() >= n
    });
    std::thread::sleep(std::time::Duration::from_millis(2));
    assert!(guest.pairs[0].rx.receive().is_none(), "more than {n} frames");
    frames
}

fn payload(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * i / 7 + i) as u8).collect()
}

#[test]
fn checksums_are_completed() {
    let port = Port::new("soft:loop", 1);
    let mut guest = guest(&port, Shape::whole());
    let mut n = 0;
    for ip in [Ip::V4, Ip::V6] {
        for len in [0, 1, 2, 33, 1000, 1401] {
            let tcp = Tcp { ip, seq: 7, last_flags: Tcp::ACK, payload: payload(len) };
            for (frame, offset) in [(tcp.partial(), 16), (tcp.udp_partial(), 6)] {
                let header = NetHdr {
                    flags: NetHdr::NEEDS_CSUM,
                    csum_start: tcp.l4_start() as u16,
                    csum_offset: offset,
                    ..NetHdr::default()
                };
                let back = through(&mut guest, &header, &frame, 1).remove(0);
                assert!(l4_sum_good(&back), "{ip:?}, {len} bytes, offset {offset}");
                let at = tcp.l4_start() + usize::from(offset);
                let mut same = back.clone();
                same[at..at + 2].copy_from_slice(&frame[at..at + 2]);
                assert_eq!(same, frame, "something else than the checksum changed");
                n += 1;
            }
        }
    }
    let lanes = port.lanes();
    assert_eq!(lanes.guest_to_vf.packets, n);
    assert_eq!(lanes.guest_to_vf.dropped.total(), 0, "{lanes:?}");
    port.goodbye(guest);
    port.daemon.stop();
}

/// A UDP checksum that comes out as 0 is sent as 0xffff: 0 would mean "none" (RFC 768).
#[test]
fn udp_checksum_of_zero_is_sent_as_ones() {
    let port = Port::new("soft:loop", 1);
    let mut guest = guest(&port, Shape::whole());
    let mut tcp = Tcp { ip: Ip::V4, seq: 0, last_flags: 0, payload: vec![0; 4] };
    // Find a payload whose sum is all ones.
    let word = (0..=u16::MAX).find(|word| {
        tcp.payload[..2].copy_from_slice(&word.to_be_bytes());
        tcp.udp_sum() == 0
    });
    assert!(word.is_some(), "no such payload");
    let header =
        NetHdr { flags: NetHdr::NEEDS_CSUM, csum_start: tcp.l4_start() as u16, csum_offset: 6, ..NetHdr::default() };
    let back = through(&mut guest, &header, &tcp.udp_partial(), 1).remove(0);
    let at = tcp.l4_start() + 6;
    assert_eq!(back[at..at + 2], [0xff, 0xff]);
    port.goodbye(guest);
    port.daemon.stop();
}

fn segments(ip: Ip, gso_type: u8, shape: Shape) {
    let port = Port::new("soft:loop", 1);
    let mut guest = guest(&port, shape);
    let (mut sent, mut expected) = (0, 0);
    for (len, size) in [(1, 1000), (1000, 1000), (1001, 1000), (2000, 1000), (30_000, 1400), (64_000, 1428), (999, 100)]
    {
        let tcp = Tcp { ip, seq: 0xffff_f000, last_flags: Tcp::ACK | Tcp::PSH | Tcp::FIN, payload: payload(len) };
        let header = NetHdr {
            flags: NetHdr::NEEDS_CSUM,
            gso_type,
            hdr_len: tcp.header_len() as u16,
            gso_size: size as u16,
            csum_start: tcp.l4_start() as u16,
            csum_offset: 16,
            num_buffers: 0,
        };
        let n = len.div_ceil(size);
        let back = through(&mut guest, &header, &tcp.partial(), n);
        tcp.assert_segments(&back, size);
        sent += 1;
        expected += n as u64;
    }
    let lanes = port.lanes();
    assert_eq!(lanes.vf_to_guest.packets, expected, "{lanes:?}");
    // Counted as what the guest sent, not as what became of it.
    assert_eq!(lanes.guest_to_vf.packets, sent, "{lanes:?}");
    assert_eq!(lanes.guest_to_vf.dropped.total(), 0, "{lanes:?}");
    port.goodbye(guest);
    port.daemon.stop();
}

#[test]
fn tcp_over_ipv4_is_segmented() {
    segments(Ip::V4, NetHdr::GSO_TCPV4, Shape::whole());
}

#[test]
fn tcp_over_ipv6_is_segmented() {
    segments(Ip::V6, NetHdr::GSO_TCPV6, Shape::whole());
}

#[test]
fn segments_from_scattered_memory() {
    // As Linux does it: header, linear part, and pages.
    let cuts = [12, 140, 4236, 8332, 12_428, 30_000];
    segments(Ip::V4, NetHdr::GSO_TCPV4, Shape::cut(&cuts));
}
