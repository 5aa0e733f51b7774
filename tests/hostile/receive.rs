//! Buffers of the ring a guest receives on. A bad one comes back with length 0; every frame is either
//! delivered into a good one or dropped by name.

use crate::support::frame::Frame;
use crate::support::frontend::feature;
use crate::support::guest::{Guest, Plan};
use crate::support::queue::{Desc, INDIRECT, NEXT, WRITE};
use crate::support::until;
use crate::{Kept, Target, attacks};

const FRAMES: u64 = 8;
const LEN: usize = 500;

attacks! {
    read_only_in_a_receive_ring: |t| bad(t, |at| vec![desc(at, 2048, 0, 0)]);
    buffer_outside_memory: |t| bad(t, |_| vec![desc(1 << 40, 2048, WRITE, 0)]);
    // CVE-2018-1059.
    buffer_across_the_end_of_memory: |t| partly_bad(t, |at| vec![desc(at, 1 << 28, WRITE, 0)]);
    buffer_that_begins_at_the_end_of_memory: |t| {
        let mut guest = without_buffers(t);
        let end = guest.regions[0].end();
        guest.pairs[0].rx.queue.write_desc(FIRST, desc(end - 100, 2048, WRITE, 0));
        lie(&mut guest, FIRST);
        deliver(t, guest, FIRST)
    };
    buffer_that_wraps: |t| bad(t, |_| vec![desc(u64::MAX - 100, 2048, WRITE, 0)]);
    buffer_of_no_length: |t| bad(t, |at| vec![desc(at, 0, WRITE, 0)]);
    buffer_of_no_length_and_no_address: |t| bad(t, |_| vec![desc(u64::MAX, 0, WRITE, 0)]);
    buffer_shorter_than_the_header: |t| bad(t, |at| vec![desc(at, 11, WRITE, 0)]);
    buffer_chain_that_loops: |t| partly_bad(t, |at| vec![
        desc(at, 20, WRITE | NEXT, FIRST + 1),
        desc(at, 20, WRITE | NEXT, FIRST),
    ]);
    buffer_chain_out_of_the_table: |t| bad(t, |at| vec![desc(at, 20, WRITE | NEXT, 256)]);
    readable_behind_writable: |t| bad(t, |at| vec![
        desc(at, 20, WRITE | NEXT, FIRST + 1),
        desc(at, 2000, 0, 0),
    ]);
    indirect_buffer_not_negotiated: |t| bad(t, |at| vec![desc(at, 16, INDIRECT, 0)]);
    head_of_a_buffer_out_of_the_table: |t| {
        let mut guest = without_buffers(t);
        lie(&mut guest, 0xffff);
        deliver(t, guest, 0xffff)
    };
    receive_index_jumps: |t| {
        let mut guest = without_buffers(t);
        let queue = &mut guest.pairs[0].rx.queue;
        queue.write_avail_idx(257);
        queue.kick_now();
        send(&mut guest);
        t.until_fault(0);
        assert_eq!(t.fault(1), None, "the send ring did nothing wrong");
        Box::new(guest)
    };
    buffers_over_the_rings_themselves: |t| {
        // The guest has the daemon write frames over the ring's own areas, while it uses them.
        let plan = Plan { post: false, ..Plan::default() };
        let mut guest = t.guest(&plan);
        let queue = &mut guest.pairs[0].rx.queue;
        let areas = [queue.desc, queue.avail & !7, queue.used & !7];
        for i in 0..256 {
            let at = areas[usize::from(i) % 3];
            queue.write_desc(i, desc(at, 2048, WRITE, 0));
            queue.write_head_at(i, i);
        }
        queue.advance(256);
        queue.kick_now();
        for _ in 0..32 {
            let tx = &mut guest.pairs[0].tx;
            tx.send(&[0xff; 1000]);
            tx.flush();
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        Box::new(guest)
    };
}

/// Descriptors of bad buffers begin here; the driver's good ones are below.
const FIRST: u16 = 200;

fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc { addr, len, flags, next }
}

fn without_buffers(target: &Target<'_>) -> Guest {
    target.guest(&Plan { features: feature::VERSION_1, post: false, ..Plan::default() })
}

/// Makes `head` available, then good buffers for all frames.
fn lie(guest: &mut Guest, head: u16) {
    let rx = &mut guest.pairs[0].rx;
    rx.queue.write_head(head);
    rx.queue.advance(1);
    for _ in 0..FRAMES {
        assert!(rx.post());
    }
    rx.flush();
}

fn send(guest: &mut Guest) {
    let tx = &mut guest.pairs[0].tx;
    for seq in 0..FRAMES as u32 {
        let frame = Frame { flow: 0, seq, len: LEN };
        assert!(tx.send(&frame.bytes()));
    }
    tx.flush();
}

fn bad_buffer(target: &Target<'_>, buffer: impl Fn(u64) -> Vec<Desc>) -> Guest {
    let mut guest = without_buffers(target);
    let at = guest.regions[0].alloc(4096, 4096);
    for (i, desc) in buffer(at).into_iter().enumerate() {
        guest.pairs[0].rx.queue.write_desc(FIRST + i as u16, desc);
    }
    lie(&mut guest, FIRST);
    guest
}

fn bad(target: &Target<'_>, buffer: impl Fn(u64) -> Vec<Desc>) -> Kept {
    deliver(target, bad_buffer(target, buffer), FIRST)
}

/// A buffer whose first part is good memory, enough for the frame: it may be used, or refused.
fn partly_bad(target: &Target<'_>, buffer: impl Fn(u64) -> Vec<Desc>) -> Kept {
    deliver_to(target, bad_buffer(target, buffer), FIRST, &[0, 12 + LEN as u32])
}

/// Sends frames round the loop towards a bad buffer, behind which there are good ones.
fn deliver(target: &Target<'_>, guest: Guest, bad: u16) -> Kept {
    deliver_to(target, guest, bad, &[0])
}

/// As [`deliver`]; `lengths` may be used of the bad buffer.
fn deliver_to(target: &Target<'_>, mut guest: Guest, bad: u16, lengths: &[u32]) -> Kept {
    let before = target.lanes().vf_to_guest;
    send(&mut guest);
    let settled = || {
        let now = target.lanes().vf_to_guest;
        now.packets + now.dropped.total() == before.packets + before.dropped.total() + FRAMES
    };
    until("every frame is delivered or dropped by name", settled);
    let rx = &mut guest.pairs[0].rx;
    let (id, len) = rx.queue.take_foreign();
    assert_eq!(id, u32::from(bad));
    assert!(lengths.contains(&len), "{len} bytes used of the bad buffer");
    let delivered = target.lanes().vf_to_guest.packets - before.packets;
    let into_good = if len == 0 { delivered } else { delivered - 1 };
    for _ in 0..into_good {
        let received = rx.take().expect("a frame that was counted as delivered");
        Frame::parse(&received.frame);
    }
    assert!(rx.take().is_none(), "a frame that was not counted");
    assert!(delivered + 1 >= FRAMES, "one bad buffer cost {} frames", FRAMES - delivered);
    assert_eq!(target.fault(0), None, "one bad buffer stops no ring");
    Box::new(guest)
}
