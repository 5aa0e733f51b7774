//! Chains that are sent.

use super::*;

#[test]
fn chains_come_out_in_order_at_every_size_and_wrap() {
    for size in [1, 2, 16, 256, 32768_u16] {
        let start = u16::MAX - 3;
        let mut rig = Rig::new(size, start);
        let mut ring = rig.tx();
        let at = rig.buffer(0);
        let batch = size.min(40);
        let mut number = 0_u16;
        for _ in 0..if size == 32768 { 2000 } else { 20 } {
            for i in 0..batch {
                // Heads backwards, so that heads and positions differ.
                let head = size - 1 - i;
                let gpa = at + u64::from(i) * 64;
                rig.write(gpa + 12, &[number.to_le_bytes(), [0; 2]].concat());
                rig.driver.describe(head, Descriptor::new(gpa, 64, 0, 0));
                rig.driver.offer(head);
                number = number.wrapping_add(1);
            }
            rig.driver.publish();
            let mut left = batch;
            while left > 0 {
                let n = pop_numbered(&mut ring, number, left);
                ring.complete(n);
                assert!(ring.publish(), "NO_INTERRUPT is not set");
                left -= n as u16;
            }
            for i in 0..batch {
                assert_eq!(rig.driver.take_used(), Some((u32::from(size - 1 - i), 0)));
            }
            assert_eq!(rig.driver.take_used(), None);
            assert_eq!(ring.position(), rig.driver.used_idx());
            assert!(!ring.publish(), "nothing was completed");
        }
    }
}

#[test]
fn any_layout_of_header_and_frame_is_understood() {
    let mut rig = Rig::new(64, 0);
    let mut ring = rig.tx();
    let (header, frame, packet) = packet();
    // The last place crosses the border of the regions, 7 bytes into the packet.
    for at in [rig.buffer(0), GPA + LEN as u64 / 2 - 7] {
        for lens in LAYOUTS {
            // [1; 56] is the first half of the packet.
            let total: usize = lens.iter().sum();
            rig.write(at, &packet);
            let buffers = pieces(at, lens);
            rig.driver.chain(0, &buffers, 0);
            let expected = Ok((header, frame[..total - 12].to_vec()));
            assert_eq!(pop_one(&mut rig, &mut ring), expected, "{lens:?}");

            // The same as an indirect table, alone and behind a direct descriptor; it need not be aligned.
            let table = rig.buffer(8192 + 4);
            for direct in 0..2.min(lens.len()) {
                let (first, rest) = buffers.split_at(direct);
                for (i, (addr, len)) in rest.iter().enumerate() {
                    let more = if i + 1 < rest.len() { NEXT } else { 0 };
                    let next = i as u16 + 1;
                    let entry = Descriptor::new(*addr, *len, more, next).bytes();
                    rig.write(table + 16 * i as u64, &entry);
                }
                if let [(addr, len)] = first {
                    rig.driver.describe(0, Descriptor::new(*addr, *len, NEXT, 9));
                }
                let last = if direct == 1 { 9 } else { 0 };
                if rest.is_empty() {
                    continue;
                }
                let len = 16 * rest.len() as u32;
                // WRITE of a descriptor that refers to a table is to be ignored (2.7.5.3.2).
                let refer = Descriptor::new(table, len, INDIRECT | WRITE, 0);
                rig.driver.describe(last, refer);
                let found = pop_one(&mut rig, &mut ring);
                assert_eq!(found, expected, "indirect {lens:?}");
            }
        }
    }
}

#[test]
fn a_frame_in_one_piece_for_which_nothing_is_asked_is_plain() {
    let plain = NetHeader { data_valid: true, hdr_len: 7, ecn: true, ..NetHeader::default() };
    let checksum = NetHeader { needs_csum: true, ..plain };
    let segments = NetHeader { gso: Gso::Tcp4, ..plain };
    let unknown = NetHeader { gso: Gso::Other(3), ..plain };
    for (header, lens, is_plain) in [
        (plain, &[112][..], true),
        // A header of its own, as most of Linux' drivers send it.
        (plain, &[12, 100], true),
        (plain, &[5, 7, 0, 100], true),
        (plain, &[12, 50, 50], false),
        (plain, &[13, 99], false),
        (checksum, &[112], false),
        (segments, &[112], false),
        (unknown, &[112], false),
    ] {
        let mut rig = Rig::new(8, 0);
        let mut ring = rig.tx();
        let at = rig.buffer(0);
        rig.write(at, &[&header.encode(0)[..], &[5; 100]].concat());
        rig.driver.chain(0, &pieces(at, lens), 0);
        rig.driver.offer(0);
        rig.driver.publish();
        assert_eq!(ring.pop(BURST), Ok(1));
        let found = ring.plain_frames(0).next().map(|frame| frame.place().contents(ring.memory()));
        assert_eq!(found, is_plain.then(|| vec![5; 100]), "{header:?} {lens:?}");
        assert!(ring.plain_frames(1).next().is_none(), "there is one");
    }
}

#[test]
fn a_header_of_ten_bytes_is_followed_by_the_frame() {
    let mut rig = Rig::new(4, 0);
    rig.config.header_len = NetHeader::LEGACY_LEN;
    let mut ring = rig.tx();
    let at = rig.buffer(0);
    rig.write(at, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4]);
    rig.driver.describe(0, Descriptor::new(at, 24, 0, 0));
    let (_, frame) = pop_one(&mut rig, &mut ring).unwrap();
    assert_eq!((frame.len(), &frame[..4]), (14, &[1, 2, 3, 4][..]));
}

#[test]
fn in_order_one_used_element_stands_for_a_batch() {
    for size in [1, 4, 64] {
        let mut rig = Rig::new(size, 65530);
        rig.config.in_order = true;
        let mut ring = rig.tx();
        let at = rig.driver.buffers().start;
        let mut sender = Sender::new(rig.driver, at, 128);
        sender.in_order = true;
        let mut sent = 0;
        for batch in [1, 3, 2, 33, 64, 5].into_iter().cycle().take(100) {
            let n = sender.room().min(batch);
            (0..n).for_each(|_| sender.send(&[0; 12], &[7; 60]));
            sender.ring.publish();
            let mut left = n;
            while left > 0 {
                let popped = ring.pop(BURST).unwrap();
                let first = popped / 3;
                ring.complete(first);
                ring.complete(popped - first);
                assert!(ring.publish());
                assert_eq!(sender.reclaim(), popped);
                left -= popped;
            }
            sent += n;
            assert_eq!(usize::from(ring.position()), (65530 + sent) % 65536);
        }
    }
}
