//! A VF is replaced under a session: what the guest was offered stays, whoever does the work.

use std::time::Instant;

use super::traffic::{CONFIG, core, end, negotiate, port};
use super::*;
use crate::relay::tests::traffic::LONG;
use crate::ring::testing::{Driver, HEADER, Sender};
use crate::session::features::{NET_CSUM, NET_HOST_TSO4, NET_HOST_TSO6};
use crate::session::lanes::PortLanes;
use crate::vf::soft::SoftVf;
use crate::vf::{TxOffload, Vf, VfCaps, VfSpec};

const MSS: usize = 1400;
/// Ethernet, IP, TCP without options.
const L2: usize = 14;
const TCP: usize = 20;

fn vf(offloads: bool) -> Vf {
    let caps = VfCaps { tx_checksum: offloads, tso: offloads, multi_segment: offloads, ..VfCaps::default() };
    Vf::Soft(SoftVf::for_test(caps).unwrap())
}

/// What the guest sends: TCP with the checksum field as CSUM wants it.
struct Sent {
    ipv6: bool,
    header: [u8; HEADER],
    frame: Vec<u8>,
}

fn l4_of(ipv6: bool) -> usize {
    L2 + if ipv6 { 40 } else { 20 }
}

/// One's complement sum, by the definition (RFC 1071).
fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks(2).fold(0, |sum, word| {
        let sum = sum + u32::from(u16::from_be_bytes([word[0], *word.get(1).unwrap_or(&0)]));
        (sum & 0xffff) + (sum >> 16)
    })
}

fn addresses(frame: &[u8], ipv6: bool) -> &[u8] {
    if ipv6 { &frame[L2 + 8..L2 + 40] } else { &frame[L2 + 12..L2 + 20] }
}

/// Frame `number`: its payload is from a stream of its own, at that TCP port.
fn sent(number: u16) -> Sent {
    let ipv6 = number % 2 == 1;
    let payload = match number % 5 {
        0 => 100,
        1 => MSS,
        2 => MSS + 1,
        _ => 3000 * usize::from(number % 20) + 2000,
    };
    let l4 = l4_of(ipv6);
    let mut frame = vec![2; 12];
    if ipv6 {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend(((TCP + payload) as u16).to_be_bytes());
        frame.extend([6, 64]);
        frame.extend(1..=32);
    } else {
        frame.extend([0x08, 0, 0x45, 0]);
        frame.extend(((20 + TCP + payload) as u16).to_be_bytes());
        frame.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        let checksum = !(sum(&frame[L2..L2 + 20]) as u16);
        frame[L2 + 10..L2 + 12].copy_from_slice(&checksum.to_be_bytes());
    }
    let pseudo = sum(addresses(&frame, ipv6)) + 6 + (TCP + payload) as u32;
    let pseudo = ((pseudo & 0xffff) + (pseudo >> 16)) as u16;
    frame.extend(number.to_be_bytes());
    frame.extend([0, 80, 0xff, 0xff, 0xff, 0, 0, 0, 0, 1, 0x50, 0x18, 1, 0]);
    frame.extend(pseudo.to_be_bytes());
    frame.extend([0, 0]);
    frame.extend((0..payload).map(|i| (i * 7 + usize::from(number)) as u8));
    // virtio 1.3, 5.1.6: NEEDS_CSUM; TCPV4 or TCPV6; hdr_len, gso_size, csum_start, csum_offset.
    let mut header = [0; HEADER];
    header[0] = 1;
    if payload > MSS {
        header[1] = if ipv6 { 4 } else { 1 };
        header[2..4].copy_from_slice(&((l4 + TCP) as u16).to_le_bytes());
        header[4..6].copy_from_slice(&(MSS as u16).to_le_bytes());
    }
    header[6..8].copy_from_slice(&(l4 as u16).to_le_bytes());
    header[8..10].copy_from_slice(&16_u16.to_le_bytes());
    Sent { ipv6, header, frame }
}

impl Sent {
    fn is_large(&self) -> bool {
        self.header[1] != 0
    }

    /// A VF with offloads got it as the guest made it, and was told what to do.
    fn check_offload(&self, out: &mut impl Iterator<Item = (Vec<u8>, TxOffload)>) {
        let (frame, offload) = out.next().expect("a frame");
        assert_eq!(frame, self.frame);
        let (segment, l4_len) = if self.is_large() { (MSS as u16, TCP as u8) } else { (0, 0) };
        let l3_len = (l4_of(self.ipv6) - L2) as u16;
        let expected =
            TxOffload { checksum: true, segment, udp: false, ipv6: self.ipv6, l2_len: L2 as u8, l3_len, l4_len };
        assert_eq!(offload, expected);
    }

    /// A VF without got segments that are right as they are, and together its payload.
    fn check_segments(&self, out: &mut impl Iterator<Item = (Vec<u8>, TxOffload)>) {
        let start = l4_of(self.ipv6) + TCP;
        let payload = &self.frame[start..];
        let mut joined = Vec::new();
        while joined.len() < payload.len() {
            let (frame, offload) = out.next().expect("a segment");
            assert_eq!(offload, TxOffload::default());
            assert!(frame.len() <= start + MSS);
            let l4 = &frame[start - TCP..];
            let length = if self.ipv6 {
                usize::from(u16::from_be_bytes([frame[L2 + 4], frame[L2 + 5]])) + 40
            } else {
                assert_eq!(sum(&frame[L2..L2 + 20]), 0xffff, "IPv4 checksum");
                usize::from(u16::from_be_bytes([frame[L2 + 2], frame[L2 + 3]]))
            };
            assert_eq!(length, frame.len() - L2);
            let pseudo = sum(addresses(&frame, self.ipv6)) + 6 + l4.len() as u32 + sum(l4);
            assert_eq!((pseudo & 0xffff) + (pseudo >> 16), 0xffff, "TCP checksum");
            let sequence = u32::from_be_bytes(l4[4..8].try_into().unwrap());
            assert_eq!(sequence, 0xffff_ff00_u32.wrapping_add(joined.len() as u32));
            assert_eq!(l4[..4], self.frame[start - TCP..start - TCP + 4], "ports");
            joined.extend_from_slice(&frame[start..]);
            // PSH on the last one only.
            assert_eq!(l4[13] & 8 != 0, joined.len() == payload.len());
        }
        assert_eq!(joined, payload);
    }
}

struct Rig {
    lanes: PortLanes,
    session: Session,
    tx: Sender,
    kick: std::os::fd::OwnedFd,
    next: u16,
    used: u16,
}

impl Rig {
    fn send(&mut self, n: u16) {
        for _ in 0..n {
            let Sent { header, frame, .. } = sent(self.next);
            self.tx.send(&header, &frame);
            self.next += 1;
        }
        self.tx.ring.publish();
        rustix::io::write(&self.kick, &1_u64.to_ne_bytes()).unwrap();
    }

    /// Waits until all is used; what the VF was given.
    fn collect(&mut self) -> Vec<(Vec<u8>, TxOffload)> {
        let deadline = Instant::now() + LONG;
        let mut out = Vec::new();
        while self.used < self.next {
            assert!(Instant::now() < deadline, "{} of {} were used", self.used, self.next);
            // It is full from time to time: then the lane waits.
            out.extend(self.taken());
            self.used += self.tx.reclaim() as u16;
            std::thread::yield_now();
        }
        out.extend(self.taken());
        out
    }

    fn taken(&mut self) -> Vec<(Vec<u8>, TxOffload)> {
        match self.lanes.vf_mut() {
            Some(Vf::Soft(vf)) => vf.take_sent(),
            _ => panic!("a soft VF"),
        }
    }

    /// As the port does it: what the guest sends meanwhile waits in its ring.
    fn replace(&mut self, offloads: bool) {
        self.session.drain(&mut self.lanes);
        assert!(self.lanes.take_vf().is_some());
        self.send(4);
        self.lanes.give_vf(VfSpec::SoftNull, vf(offloads), &CONFIG).unwrap();
        self.session.hand_out(&mut self.lanes);
    }
}

#[test]
fn tso_that_was_negotiated_works_over_a_vf_without_it_and_back() {
    const RING: u16 = 64;
    const BUFFER: usize = 66_000;
    const AT: usize = 64 * 1024;
    let core = core();
    let first = vf(true);
    let offer = Offer::resolve(&Offloads::Auto, Some(first.caps()), 1, 1500);
    let (mut lanes, counters) = port(&core, first);
    let len = (AT + usize::from(RING) * BUFFER).next_multiple_of(4096);
    let rx = Driver::new(len, RING, 0);
    let tx = rx.beside(AT / 2, RING, 0);
    let features = NET_CSUM | NET_HOST_TSO4 | NET_HOST_TSO6;
    assert_eq!(offer.features & features, features);
    let mut session = Session::new(offer);
    let kick = negotiate(&mut session, &mut lanes, features, len as u64, [&rx, &tx]);
    let mut rig = Rig { lanes, session, tx: Sender::new(tx, AT, BUFFER), kick, next: 0, used: 0 };

    let mut checked = 0;
    for offloads in [true, false, true, false] {
        if checked > 0 {
            rig.replace(offloads);
        }
        rig.send(36);
        let mut out = rig.collect().into_iter();
        for number in checked..rig.next {
            match offloads {
                true => sent(number).check_offload(&mut out),
                false => sent(number).check_segments(&mut out),
            }
        }
        assert_eq!(out.next(), None, "and nothing else");
        checked = rig.next;
    }
    let counted = counters.guest_to_vf.snapshot();
    let bytes: u64 = (0..checked).map(|number| sent(number).frame.len() as u64).sum();
    assert_eq!((counted.packets, counted.bytes, counted.dropped.total()), (checked.into(), bytes, 0));

    // Without any VF frames are consumed, by name; with one again they go out.
    rig.session.drain(&mut rig.lanes);
    rig.lanes.take_vf();
    rig.session.hand_out(&mut rig.lanes);
    rig.send(8);
    let deadline = Instant::now() + LONG;
    while rig.used < rig.next {
        assert!(Instant::now() < deadline);
        rig.used += rig.tx.reclaim() as u16;
    }
    assert_eq!(counters.guest_to_vf.snapshot().dropped.not_ready, 8);
    rig.session.drain(&mut rig.lanes);
    rig.lanes.give_vf(VfSpec::SoftNull, vf(true), &CONFIG).unwrap();
    rig.session.hand_out(&mut rig.lanes);
    rig.send(1);
    sent(rig.next - 1).check_offload(&mut rig.collect().into_iter());

    let Rig { session, mut lanes, .. } = rig;
    drop(session.suspend(&mut lanes));
    drop(lanes);
    end(core);
}
