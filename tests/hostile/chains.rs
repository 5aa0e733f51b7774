//! Descriptor chains of the ring a guest sends on. A bad chain is consumed, counted once as malformed
//! and given back with length 0; the next good one is forwarded.

use crate::support::frontend::feature;
use crate::support::guest::{Flows, Guest, Plan};
use crate::support::queue::{Desc, INDIRECT, NEXT, WRITE};
use crate::support::tx::Shape;
use crate::support::until;
use crate::{Kept, Target, attacks};

/// Where the bad descriptors point: good memory, full of zeros.
const FRAME: u32 = 12 + 60;

attacks! {
    head_out_of_the_table: |t| bad(t, |_, ring| ring.head = 256);
    head_of_all_ones: |t| bad(t, |_, ring| ring.head = 0xffff);
    next_out_of_the_table: |t| bad(t, |at, ring| ring.desc(0, at, FRAME, NEXT, 256));
    next_to_itself: |t| bad(t, |at, ring| ring.desc(0, at, 1, NEXT, 0));
    two_that_chase_each_other: |t| bad(t, |at, ring| {
        ring.desc(0, at, 1, NEXT, 1);
        ring.desc(1, at, 1, NEXT, 0);
    });
    every_descriptor_in_one_loop: |t| bad(t, |at, ring| {
        for i in 0..256 {
            ring.desc(i, at, 1, NEXT, (i + 1) % 256);
        }
    });
    address_outside_memory: |t| bad(t, |_, ring| ring.desc(0, 1 << 40, FRAME, 0, 0));
    // CVE-2018-1059.
    address_across_the_end_of_memory: |t| bad(t, |_, ring| ring.desc(0, ring.end - 40, FRAME, 0, 0));
    second_piece_outside_memory: |t| bad(t, |at, ring| {
        ring.desc(0, at, 12, NEXT, 1);
        ring.desc(1, ring.end, 60, 0, 0);
    });
    address_and_length_that_wrap: |t| bad(t, |_, ring| ring.desc(0, u64::MAX - 10, FRAME, 0, 0));
    // CVE-2020-10725.
    no_length_and_no_address: |t| bad(t, |_, ring| ring.desc(0, u64::MAX, 0, 0, 0));
    no_length_at_all: |t| bad(t, |at, ring| ring.desc(0, at, 0, 0, 0));
    writable_in_a_send_ring: |t| bad(t, |at, ring| ring.desc(0, at, FRAME, WRITE, 0));
    writable_behind_readable: |t| bad(t, |at, ring| {
        ring.desc(0, at, 12, NEXT, 1);
        ring.desc(1, at, 60, WRITE, 0);
    });
    // CVE-2022-2132.
    shorter_than_the_header: |t| bad(t, |at, ring| ring.desc(0, at, 11, 0, 0));
    nothing_behind_the_header: |t| bad(t, |at, ring| ring.desc(0, at, 12, 0, 0));
    less_than_an_ethernet_header: |t| bad(t, |at, ring| ring.desc(0, at, 12 + 13, 0, 0));
    indirect_not_negotiated: |t| bad(t, |at, ring| {
        ring.table(at, &[Desc { addr: at + 64, len: FRAME, ..Desc::default() }]);
        ring.desc(0, at, 16, INDIRECT, 0);
    });
    indirect_in_indirect: |t| bad_indirect(t, |at, ring| {
        ring.table(at, &[Desc { addr: at, len: 16, flags: INDIRECT, next: 0 }]);
        ring.desc(0, at, 16, INDIRECT, 0);
    });
    indirect_of_odd_length: |t| bad_indirect(t, |at, ring| {
        ring.table(at, &[Desc { addr: at + 64, len: FRAME, ..Desc::default() }]);
        ring.desc(0, at, 17, INDIRECT, 0);
    });
    indirect_of_no_length: |t| bad_indirect(t, |at, ring| ring.desc(0, at, 0, INDIRECT, 0));
    indirect_and_next: |t| bad_indirect(t, |at, ring| {
        ring.table(at, &[Desc { addr: at + 64, len: FRAME, ..Desc::default() }]);
        ring.desc(0, at, 16, INDIRECT | NEXT, 1);
        ring.desc(1, at + 64, FRAME, 0, 0);
    });
    indirect_outside_memory: |t| bad_indirect(t, |_, ring| ring.desc(0, 1 << 40, 16, INDIRECT, 0));
    // CVE-2018-1059, through the table.
    indirect_across_the_end_of_memory: |t| bad_indirect(t, |at, ring| {
        ring.table(ring.end - 16, &[Desc { addr: at, len: 12, flags: NEXT, next: 1 }]);
        ring.desc(0, ring.end - 16, 32, INDIRECT, 0);
    });
    indirect_of_the_longest_length: |t| bad_indirect(t, |at, ring| ring.desc(0, at, 0xffff_fff0, INDIRECT, 0));
    indirect_that_loops: |t| bad_indirect(t, |at, ring| {
        ring.table(at, &[
            Desc { addr: at + 64, len: 12, flags: NEXT, next: 1 },
            Desc { addr: at + 64, len: 12, flags: NEXT, next: 0 },
        ]);
        ring.desc(0, at, 32, INDIRECT, 0);
    });
    indirect_next_out_of_the_table: |t| bad_indirect(t, |at, ring| {
        ring.table(at, &[Desc { addr: at + 64, len: 12, flags: NEXT, next: 2 }]);
        ring.desc(0, at, 32, INDIRECT, 0);
    });
    frame_of_a_megabyte: |t| too_long(t, 1 << 20);
    longest_length: |t| too_long(t, u32::MAX);
    long_pieces_in_a_loop: |t| too_long_loop(t);
    // Legal, though no driver does it: every byte of the header in a descriptor of its own.
    header_in_many_pieces: |t| {
        let cuts: Vec<usize> = (1..14).collect();
        let plan = Plan { shape: Shape::cut(&cuts), ..Plan::default() };
        let mut guest = t.guest(&plan);
        Flows::new(1).exchange(&mut guest, &[0], 100, 300);
        Box::new(guest)
    };
    available_index_jumps: |t| jump(t, 257);
    available_index_runs_backwards: |t| jump(t, 0xffff);
    nothing_but_lies: |t| {
        // Bad heads without end: the ring is stopped, visibly, instead of feeding the core with work.
        let guest = t.guest(&Plan::default());
        let ring = &guest.pairs[0].tx.queue;
        for position in 0..256 {
            ring.write_head_at(position, 0xffff);
        }
        let start = std::time::Instant::now();
        while t.fault(1).is_none() {
            assert!(start.elapsed() < crate::PATIENCE, "never quarantined");
            ring.write_avail_idx(ring.device_idx().wrapping_add(256));
            ring.kick_now();
        }
        assert_eq!(t.fault(0), None, "the receive ring did nothing wrong");
        Box::new(guest)
    };
}

/// A send ring that is about to lie: what is written here goes into its descriptor table.
struct Lie<'a> {
    guest: &'a Guest,
    head: u16,
    /// First address behind guest memory.
    end: u64,
}

impl Lie<'_> {
    fn desc(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let queue = &self.guest.pairs[0].tx.queue;
        queue.write_desc(index, Desc { addr, len, flags, next });
    }

    fn table(&self, at: u64, descs: &[Desc]) {
        for (i, &desc) in descs.iter().enumerate() {
            let queue = &self.guest.pairs[0].tx.queue;
            queue.write_desc_at(at + 16 * i as u64, desc);
        }
    }
}

fn bad(target: &Target<'_>, lie: impl Fn(u64, &mut Lie<'_>)) -> Kept {
    malformed(target, &Plan::default(), lie)
}

fn bad_indirect(target: &Target<'_>, lie: impl Fn(u64, &mut Lie<'_>)) -> Kept {
    let plan = Plan::default();
    let features = plan.features | feature::INDIRECT;
    malformed(target, &Plan { features, ..plan }, lie)
}

/// One bad chain between good ones: exactly one more malformed, used length 0, and the good arrive.
fn malformed(target: &Target<'_>, plan: &Plan, lie: impl Fn(u64, &mut Lie<'_>)) -> Kept {
    let mut guest = target.guest(plan);
    let mut flows = Flows::new(1);
    flows.exchange(&mut guest, &[0], 10, 300);
    let before = target.lanes();

    let zeros = guest.regions[0].alloc(4096, 64);
    let mut bad = Lie { head: 0, end: guest.regions[0].end(), guest: &guest };
    lie(zeros, &mut bad);
    let head = bad.head;
    let ring = &mut guest.pairs[0].tx.queue;
    let position = ring.avail_idx();
    assert_eq!(ring.device_idx(), position, "all good ones are back");
    ring.write_head(head);
    ring.advance(1);
    ring.kick_now();
    until("the bad chain is given back", || ring.device_idx() == position.wrapping_add(1));
    assert_eq!(ring.take_foreign(), (u32::from(head), 0));

    let after = target.lanes().guest_to_vf;
    assert_eq!(after.dropped.malformed, before.guest_to_vf.dropped.malformed + 1, "{after:?}");
    assert_eq!(after.dropped.total(), before.guest_to_vf.dropped.total() + 1, "{after:?}");
    assert_eq!(after.packets, before.guest_to_vf.packets, "{after:?}");
    assert_eq!(target.fault(1), None, "one bad chain stops no ring");
    flows.exchange(&mut guest, &[0], 10, 300);
    Box::new(guest)
}

/// Longer than any frame may be: dropped once, by either name that fits.
fn too_long(target: &Target<'_>, len: u32) -> Kept {
    dropped_by_length(target, &[Desc { len, ..Desc::default() }])
}

fn too_long_loop(target: &Target<'_>) -> Kept {
    dropped_by_length(target, &[Desc { len: 4000, flags: NEXT, next: 0, addr: 0 }])
}

/// `descs` get the address of good memory.
fn dropped_by_length(target: &Target<'_>, descs: &[Desc]) -> Kept {
    let mut guest = target.guest(&Plan::default());
    let before = target.lanes().guest_to_vf.dropped;
    let at = guest.regions[0].gpa;
    let ring = &mut guest.pairs[0].tx.queue;
    for (i, desc) in descs.iter().enumerate() {
        ring.write_desc(i as u16, Desc { addr: at, ..*desc });
    }
    ring.write_head(0);
    ring.advance(1);
    ring.kick_now();
    until("it is given back", || ring.device_idx() == 1);
    assert_eq!(ring.take_foreign(), (0, 0));
    let after = target.lanes().guest_to_vf.dropped;
    assert_eq!(after.total(), before.total() + 1, "{after:?}");
    assert_eq!(after.malformed + after.oversize, before.malformed + before.oversize + 1, "{after:?}");
    Flows::new(1).exchange(&mut guest, &[0], 10, 300);
    Box::new(guest)
}

/// The available index moves by `by`, more than the ring has: the ring is stopped with a reason,
/// nothing is forwarded, the receive ring goes on.
fn jump(target: &Target<'_>, by: u16) -> Kept {
    let mut guest = target.guest(&Plan::default());
    Flows::new(1).exchange(&mut guest, &[0], 10, 300);
    let before = target.lanes().guest_to_vf;
    let ring = &mut guest.pairs[0].tx.queue;
    ring.write_avail_idx(ring.avail_idx().wrapping_add(by));
    ring.kick_now();
    target.until_fault(1);
    assert_eq!(target.fault(0), None);
    let after = target.lanes().guest_to_vf;
    assert_eq!(after.packets, before.packets, "{after:?}");
    Box::new(guest)
}
