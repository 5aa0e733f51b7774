//! Chains that are sent.

use super::*;

#[test]
fn chains_come_out_in_order_at_every_size_and_wrap() {
    for (size, wrap) in [1, 2, 3, 7, 16, 33, 255, 256, 1000, 32768].into_iter().flat_map(|s| ROUNDS.map(|w| (s, w))) {
        for in_order in [false, true] {
            let start = Place { index: size - 1, wrap };
            let mut rig = Rig::new(size, start);
            if in_order {
                rig = rig.in_order();
            }
            let mut ring = rig.tx();
            let at = rig.buffer(0);
            let batch = size.min(40);
            let mut number = 0_u16;
            for _ in 0..if size == 32768 { 2000 } else { 20 } {
                for i in 0..batch {
                    let gpa = at + u64::from(i) * 64;
                    rig.write(gpa + 12, &[number.to_le_bytes(), [0; 2]].concat());
                    // Any id will do; it comes back.
                    rig.driver.offer(!number, &[piece(gpa, 64, 0)]);
                    number = number.wrapping_add(1);
                }
                assert_eq!(ring.pop(BURST), Ok(0), "not yet visible");
                rig.driver.publish();
                let mut left = batch;
                while left > 0 {
                    let n = pop_numbered(&mut ring, number, left);
                    ring.complete(n);
                    assert_eq!(rig.driver.take_used(), None, "not yet visible");
                    assert!(ring.publish(), "the driver wants to hear of everything");
                    let first = number.wrapping_sub(left);
                    left -= n as u16;
                    if in_order {
                        let last = number.wrapping_sub(left + 1);
                        assert_eq!(rig.driver.take_used(), Some((!last, 0, n)));
                    } else {
                        for i in 0..n as u16 {
                            assert_eq!(rig.driver.take_used(), Some((!first.wrapping_add(i), 0, 1)));
                        }
                    }
                }
                assert_eq!(rig.driver.take_used(), None);
                assert_eq!(ring.position(), rig.driver.used.encode());
                assert_eq!(rig.driver.used, rig.driver.avail);
                assert!(!ring.publish(), "nothing was completed");
            }
        }
    }
}

#[test]
fn any_layout_of_header_and_frame_is_understood() {
    let mut rig = Rig::new(61, Place::FIRST);
    let mut ring = rig.tx();
    let (header, frame, packet) = packet();
    let mut id = 0;
    // The last place crosses the border of the regions, 7 bytes into the packet.
    for at in [rig.buffer(0), GPA + LEN as u64 / 2 - 7] {
        for lens in LAYOUTS {
            // [1; 56] is the first half of the packet.
            let total: usize = lens.iter().sum();
            rig.write(at, &packet);
            let pieces = pieces(at, lens);
            let expected = Ok((header, frame[..total - 12].to_vec()));
            id += 1;
            rig.driver.chain(id, &pieces, 0);
            rig.driver.publish();
            assert_eq!(pop_one(&mut rig, &mut ring, id), expected, "{lens:?}");

            // As an indirect table, not aligned; of its entries' flags only WRITE counts (2.8.7), and not even that
            // where nothing is written: DPDK sets it. WRITE of the descriptor that refers to the table does not.
            let table = rig.buffer(8192 + 4);
            for (i, (addr, len)) in pieces.iter().enumerate() {
                let flags = if i % 2 == 0 { !0 } else { 0 };
                rig.write(table + 16 * i as u64, &encoded(&Descriptor::new(*addr, *len, flags, 99)));
            }
            rig.post(id, &[piece(table, 16 * pieces.len() as u32, INDIRECT | WRITE)]);
            assert_eq!(pop_one(&mut rig, &mut ring, id), expected, "indirect {lens:?}");
        }
    }
}

#[test]
fn a_header_of_ten_bytes_is_followed_by_the_frame() {
    let mut rig = Rig::new(4, Place::FIRST);
    rig.config.header_len = NetHeader::LEGACY_LEN;
    let mut ring = rig.tx();
    let at = rig.buffer(0);
    rig.write(at, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4]);
    rig.post(3, &[piece(at, 24, 0)]);
    let (_, frame) = pop_one(&mut rig, &mut ring, 3).unwrap();
    assert_eq!((frame.len(), &frame[..4]), (14, &[1, 2, 3, 4][..]));
}
