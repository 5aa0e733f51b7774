//! virtio-net headers that ask for the impossible.

use crate::support::frontend::feature;
use crate::support::guest::{Guest, Plan};
use crate::support::tx::NetHdr;
use crate::support::until;
use crate::{Kept, Target, attacks};

const GOOD: NetHdr = NetHdr {
    flags: NetHdr::NEEDS_CSUM,
    gso_type: 0,
    hdr_len: 54,
    gso_size: 0,
    csum_start: 34,
    csum_offset: 16,
    num_buffers: 0,
};

const GOOD_GSO: NetHdr = NetHdr { gso_type: NetHdr::GSO_TCPV4, gso_size: 1000, ..GOOD };

/// A TCP frame over IPv4 of `len` bytes; nothing in it is hostile.
fn tcp4(len: usize) -> Vec<u8> {
    let mut frame = vec![0; len];
    frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0]);
    frame[14] = 0x45;
    frame[16..18].copy_from_slice(&(len as u16).wrapping_sub(14).to_be_bytes());
    frame[22..24].copy_from_slice(&[64, 6]);
    frame[26..34].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
    frame[46] = 5 << 4;
    frame
}

fn changed(mut frame: Vec<u8>, change: &[(usize, u8)]) -> Vec<u8> {
    for &(at, value) in change {
        frame[at] = value;
    }
    frame
}

attacks! {
    // CVE-2024-11614.
    checksum_beyond_the_frame: |t| malformed(t, NetHdr { csum_start: 2000, ..GOOD }, &tcp4(1000));
    checksum_at_the_very_end: |t| malformed(t, NetHdr { csum_start: 983, ..GOOD }, &tcp4(1000));
    checksum_start_largest: |t| malformed(t, NetHdr { csum_start: 0xffff, ..GOOD }, &tcp4(1000));
    checksum_offset_largest: |t| malformed(t, NetHdr { csum_offset: 0xffff, ..GOOD }, &tcp4(1000));
    checksum_of_a_frame_without_ip: |t| accounted(t, GOOD, &[0; 60]);
    checksum_over_the_ethernet_header: |t| accounted(t, NetHdr { csum_start: 0, csum_offset: 0, ..GOOD }, &tcp4(100));
    segments_of_no_size: |t| malformed(t, NetHdr { gso_size: 0, ..GOOD_GSO }, &tcp4(3000));
    segmentation_nobody_knows: |t| malformed(t, NetHdr { gso_type: 0x7f, ..GOOD_GSO }, &tcp4(3000));
    segmentation_of_udp: |t| malformed(t, NetHdr { gso_type: 3, ..GOOD_GSO }, &tcp4(3000));
    segmentation_of_the_other_ip: |t| malformed(t, NetHdr { gso_type: NetHdr::GSO_TCPV6, ..GOOD_GSO }, &tcp4(3000));
    segmentation_of_noise: |t| malformed(t, GOOD_GSO, &[0xff; 3000]);
    segmentation_behind_a_short_ip_header: |t| malformed(t, GOOD_GSO, &changed(tcp4(3000), &[(14, 0x41)]));
    segmentation_behind_a_long_ip_header: |t| accounted(t, GOOD_GSO, &changed(tcp4(3000), &[(14, 0x4f)]));
    segmentation_behind_a_short_tcp_header: |t| malformed(t, GOOD_GSO, &changed(tcp4(3000), &[(46, 0)]));
    segmentation_of_headers_alone: |t| accounted(t, GOOD_GSO, &tcp4(54));
    segmentation_of_half_a_header: |t| malformed(t, GOOD_GSO, &tcp4(60)[..40]);
    // A 64 KiB frame in segments of one byte: 65000 frames for one descriptor.
    segments_of_one_byte: |t| accounted(t, NetHdr { gso_size: 1, ..GOOD_GSO }, &tcp4(60_000));
    header_length_largest: |t| accounted(t, NetHdr { hdr_len: 0xffff, ..GOOD_GSO }, &tcp4(3000));
    segmentation_not_negotiated: |t| {
        let mut guest = t.guest(&Plan { tx_slot: 8192, ..Plan::default() });
        one(t, &mut guest, GOOD_GSO, &tcp4(3000));
        Box::new(guest)
    };
}

fn guest(target: &Target<'_>) -> Guest {
    let plan = Plan::default();
    target.guest(&Plan {
        features: plan.features | feature::CSUM | feature::HOST_TSO4 | feature::HOST_TSO6,
        tx_slot: 65536,
        size: 64,
        ..plan
    })
}

/// Sends it, and waits for the buffer to come back.
fn one(target: &Target<'_>, guest: &mut Guest, header: NetHdr, frame: &[u8]) {
    let before = target.lanes().guest_to_vf;
    let tx = &mut guest.pairs[0].tx;
    assert!(tx.send_with(&header, frame));
    tx.flush();
    until("the buffer is given back", || {
        tx.reap();
        tx.queue.outstanding() == 0
    });
    let after = target.lanes().guest_to_vf;
    let fate = after.packets + after.dropped.total() - before.packets - before.dropped.total();
    assert!(fate >= 1, "neither forwarded nor dropped: {after:?}");
    assert_eq!(target.fault(1), None, "one bad header stops no ring");
}

/// Forwarded or dropped, as the daemon sees fit; but it is in the books.
fn accounted(target: &Target<'_>, header: NetHdr, frame: &[u8]) -> Kept {
    let mut guest = guest(target);
    one(target, &mut guest, header, frame);
    Box::new(guest)
}

/// Dropped as malformed, exactly once.
fn malformed(target: &Target<'_>, header: NetHdr, frame: &[u8]) -> Kept {
    let before = target.lanes().guest_to_vf;
    let mut guest = guest(target);
    one(target, &mut guest, header, frame);
    let after = target.lanes().guest_to_vf;
    assert_eq!(after.dropped.malformed, before.dropped.malformed + 1, "{after:?}");
    assert_eq!(after.packets, before.packets, "{after:?}");
    Box::new(guest)
}
