//! Packed rings that lie. What is wrong with one chain costs the guest that chain, as in [`super::chains`];
//! what makes it unknowable where the next one begins costs it the ring.

use crate::support::frontend::{Verdict, feature, pair, request};
use crate::support::guest::{Flows, Guest, Plan};
use crate::support::packed::{AVAIL, USED};
use crate::support::queue::{Desc, INDIRECT, NEXT, WRITE};
use crate::support::until;
use crate::{Kept, Target, attacks};

const FRAME: u32 = 12 + 60;

attacks! {
    address_outside_memory: |t| bad(t, |_, _| vec![desc(1 << 40, FRAME, 0)]);
    address_across_the_end_of_memory: |t| bad(t, |_, end| vec![desc(end - 40, FRAME, 0)]);
    address_and_length_that_wrap: |t| bad(t, |_, _| vec![desc(u64::MAX - 10, FRAME, 0)]);
    second_piece_outside_memory: |t| bad(t, |at, end| vec![desc(at, 12, NEXT), desc(end, 60, 0)]);
    first_piece_outside_memory: |t| bad(t, |at, end| vec![desc(end, 12, NEXT), desc(at, 60, 0)]);
    no_length_at_all: |t| bad(t, |at, _| vec![desc(at, 0, 0)]);
    a_whole_ring_of_no_length: |t| bad(t, |at, _| [vec![desc(at, 0, NEXT); 255], vec![desc(at, 0, 0)]].concat());
    writable_in_a_send_ring: |t| bad(t, |at, _| vec![desc(at, FRAME, WRITE)]);
    writable_behind_readable: |t| bad(t, |at, _| vec![desc(at, 12, NEXT), desc(at, 60, WRITE)]);
    shorter_than_the_header: |t| bad(t, |at, _| vec![desc(at, 11, 0)]);
    indirect_not_negotiated: |t| bad(t, |at, _| vec![desc(at, 16, INDIRECT)]);
    indirect_and_next: |t| bad_indirect(t, |at, _| vec![desc(at, 16, INDIRECT | NEXT), desc(at, FRAME, 0)]);
    indirect_behind_direct_outside_memory: |t| bad_indirect(t, |at, end| vec![desc(at, 12, NEXT), desc(end, 16, INDIRECT)]);
    indirect_of_odd_length: |t| bad_indirect(t, |at, _| vec![desc(at, 17, INDIRECT)]);
    indirect_of_no_length: |t| bad_indirect(t, |at, _| vec![desc(at, 0, INDIRECT)]);
    indirect_outside_memory: |t| bad_indirect(t, |_, _| vec![desc(1 << 40, 16, INDIRECT)]);
    indirect_across_the_end_of_memory: |t| bad_indirect(t, |_, end| vec![desc(end - 16, 32, INDIRECT)]);
    indirect_of_the_longest_length: |t| bad_indirect(t, |at, _| vec![desc(at, 0xffff_fff0, INDIRECT)]);
    // A table of zeros: entries of no length, without end but for the length of the table.
    indirect_of_more_entries_than_anyone_needs: |t| bad_indirect(t, |at, _| vec![desc(at, 4096 * 16, INDIRECT)]);

    a_chain_without_end: |t| endless(t, 256, |guest, at| {
        guest.pairs[0].tx.queue.add_descs(&[desc(at, 1, NEXT); 256]);
        guest.pairs[0].tx.queue.notify();
    });
    a_chain_without_end_in_the_longest_ring: |t| endless(t, 32768, |guest, at| {
        guest.pairs[0].tx.queue.add_descs(&[desc(at, 1, NEXT); 32768]);
        guest.pairs[0].tx.queue.notify();
    });
    every_slot_available_and_going_on: |t| endless(t, 256, |guest, at| everything(guest, at, NEXT));
    // Each is a frame: 256 of them, and then the device waits for the driver.
    every_slot_available: |t| {
        let mut guest = t.guest(&plan(256));
        Flows::new(1).exchange(&mut guest, &[0], 10, 300);
        let before = t.lanes().guest_to_vf;
        let at = guest.regions[0].alloc(4096, 64);
        everything(&mut guest, at, 0);
        t.until_counted("all of the ring", before.packets + 256, |lanes| lanes.guest_to_vf.packets);
        // In the next round it has used what it has not seen since.
        std::thread::sleep(std::time::Duration::from_millis(20));
        let after = t.lanes().guest_to_vf;
        assert_eq!((after.packets, after.dropped.total()), (before.packets + 256, before.dropped.total()));
        assert_eq!(t.fault(1), None);
        Box::new(guest)
    };
    // The driver overwrites, in a loop, what the device has, with both rounds' flags.
    flags_of_both_rounds_while_it_reads: |t| {
        let guest = t.guest(&plan(64));
        let at = guest.regions[0].alloc(4096, 64);
        let end = std::time::Instant::now() + std::time::Duration::from_millis(100);
        let ring = &guest.pairs[0].tx.queue;
        let packed = ring.packed.as_ref().expect("a packed ring");
        let mut i = 0_u16;
        while std::time::Instant::now() < end {
            let flags = if (i / 64).is_multiple_of(2) { AVAIL } else { USED };
            packed.write_slot(i % 64, desc(at, FRAME, flags | if i.is_multiple_of(5) { NEXT } else { 0 }));
            i = i.wrapping_add(1);
        }
        // Whatever it made of that: the receive ring has done nothing wrong.
        assert_eq!(t.fault(0), None);
        guest.pairs[0].tx.queue.kick_now();
        Box::new(guest)
    };
    nothing_but_lies: |t| {
        let mut guest = t.guest(&plan(256));
        let start = std::time::Instant::now();
        while t.fault(1).is_none() {
            assert!(start.elapsed() < crate::PATIENCE, "never quarantined");
            let ring = &mut guest.pairs[0].tx.queue;
            while ring.pop().is_some() {}
            while ring.free() > 0 {
                ring.add_descs(&[desc(1 << 40, FRAME, 0)]);
            }
            ring.notify();
        }
        assert_eq!(t.fault(0), None, "the receive ring did nothing wrong");
        Box::new(guest)
    };
    a_receive_ring_without_end: |t| {
        let mut guest = t.guest(&Plan { post: false, ..plan(256) });
        let at = guest.regions[0].alloc(4096, 64);
        let rx = &mut guest.pairs[0].rx;
        rx.queue.add_descs(&[desc(at, 1, NEXT | WRITE); 256]);
        rx.queue.notify();
        // It is looked at when there is something to receive.
        let tx = &mut guest.pairs[0].tx;
        assert!(tx.send(&Flows::new(1).next(0, 300).bytes()));
        tx.flush();
        t.until_fault(0);
        assert_eq!(t.fault(1), None);
        Box::new(guest)
    };
    bases_out_of_range: |t| {
        let mut front = t.raw();
        crate::negotiate(&mut front, feature::VERSION_1 | feature::MRG_RXBUF | feature::RING_PACKED);
        front.must(request::SET_VRING_NUM, &pair(0, 100), &[]);
        for base in [100, 0x8000 | 100, 0x7fff, 0xffff, 0x8000_ffff, u32::MAX] {
            assert_eq!(front.verdict(request::SET_VRING_BASE, &pair(0, base), &[]), Verdict::Refused, "{base:#x}");
        }
        for base in [0, 0x8000, 0x8000_8000, 99, 0x8000 | 99, 0xffff_0000] {
            assert_eq!(front.verdict(request::SET_VRING_BASE, &pair(0, base), &[]), Verdict::Accepted, "{base:#x}");
        }
        for size in [0, 32769, 65536, u32::MAX] {
            assert_eq!(front.verdict(request::SET_VRING_NUM, &pair(0, size), &[]), Verdict::Refused, "{size}");
        }
        Box::new(front)
    };
    // Its index was right for a size that was then made smaller.
    a_base_behind_the_end_of_a_ring: |t| {
        let guest = t.guest(&plan(256));
        let ring = &guest.pairs[0].tx.queue;
        let index = ring.index;
        guest.front.get_vring_base(index).expect("base");
        guest.front.must(request::SET_VRING_BASE, &pair(index, 0x8000 | 200), &[]);
        guest.front.must(request::SET_VRING_NUM, &pair(index, 100), &[]);
        ring.kick_off(&guest.front);
        t.until_fault(1);
        assert!(t.fault(1).expect("a fault").contains("not below its size 100"));
        Box::new(guest)
    };
    // Features change under running rings: what was a place in a packed ring is none in a split one.
    packed_and_split_in_turns: |t| {
        let guest = t.guest(&plan(100));
        for round in 0..10 {
            let packed = if round % 2 == 0 { 0 } else { feature::RING_PACKED };
            let features = feature::VERSION_1 | feature::MRG_RXBUF | feature::PROTOCOL | packed;
            guest.front.must(request::SET_FEATURES, &features.to_ne_bytes(), &[]);
            guest.pairs[0].tx.queue.kick_now();
        }
        Box::new(guest)
    };
}

fn desc(addr: u64, len: u32, flags: u16) -> Desc {
    Desc { addr, len, flags, next: 0 }
}

fn plan(size: u16) -> Plan {
    Plan { size, features: feature::VERSION_1 | feature::MRG_RXBUF | feature::RING_PACKED, ..Plan::default() }
}

/// All slots of the send ring available in the device's round, at once.
fn everything(guest: &mut Guest, at: u64, flags: u16) {
    let ring = &guest.pairs[0].tx.queue;
    let packed = ring.packed.as_ref().expect("a packed ring");
    // Ten slots were used: from there on this round's flags, in front of it the next one's.
    for slot in (0..ring.size).rev() {
        let available = if slot < ring.used_idx() { USED } else { AVAIL };
        packed.write_slot(slot, desc(at, FRAME, flags | available));
    }
    ring.kick_now();
}

fn bad(target: &Target<'_>, lie: impl Fn(u64, u64) -> Vec<Desc>) -> Kept {
    malformed(target, &plan(256), lie)
}

fn bad_indirect(target: &Target<'_>, lie: impl Fn(u64, u64) -> Vec<Desc>) -> Kept {
    let plan = plan(256);
    malformed(target, &Plan { features: plan.features | feature::INDIRECT, ..plan }, lie)
}

/// One bad chain between good ones: exactly one more malformed, used length 0, and the good arrive. `lie` gets
/// the address of good memory, full of zeros, and of the end of memory.
fn malformed(target: &Target<'_>, plan: &Plan, lie: impl Fn(u64, u64) -> Vec<Desc>) -> Kept {
    let mut guest = target.guest(plan);
    let mut flows = Flows::new(1);
    flows.exchange(&mut guest, &[0], 10, 300);
    let before = target.lanes();

    let zeros = guest.regions[0].alloc(4096 * 16, 64);
    let descs = lie(zeros, guest.regions[0].end());
    let ring = &mut guest.pairs[0].tx.queue;
    let id = ring.add_descs(&descs);
    ring.notify();
    ring.kick_now();
    until("the bad chain is given back", || ring.outstanding() == 1 && ring.device_idx() != ring.used_idx());
    assert_eq!(ring.pop(), Some((id, 0)));

    let after = target.lanes().guest_to_vf;
    // Too long is too long, by either name.
    let (dropped, earlier) = (after.dropped, before.guest_to_vf.dropped);
    assert_eq!(dropped.malformed + dropped.oversize, earlier.malformed + earlier.oversize + 1, "{after:?}");
    assert_eq!(after.dropped.total(), before.guest_to_vf.dropped.total() + 1, "{after:?}");
    assert_eq!(after.packets, before.guest_to_vf.packets, "{after:?}");
    assert_eq!(target.fault(1), None, "one bad chain stops no ring");
    flows.exchange(&mut guest, &[0], 10, 300);
    Box::new(guest)
}

/// The send ring is stopped with its reason visible, nothing is forwarded, the receive ring goes on.
fn endless(target: &Target<'_>, size: u16, lie: impl Fn(&mut Guest, u64)) -> Kept {
    let mut guest = target.guest(&plan(size));
    if size == 256 {
        Flows::new(1).exchange(&mut guest, &[0], 10, 300);
    }
    let before = target.lanes().guest_to_vf;
    let at = guest.regions[0].alloc(4096, 64);
    lie(&mut guest, at);
    guest.pairs[0].tx.queue.kick_now();
    target.until_fault(1);
    assert_eq!(target.fault(1).as_deref(), Some("descriptor chain does not end"));
    assert_eq!(target.fault(0), None);
    let after = target.lanes().guest_to_vf;
    assert_eq!(after.packets, before.packets, "{after:?}");
    Box::new(guest)
}
