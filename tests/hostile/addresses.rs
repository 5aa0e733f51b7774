//! SET_VRING_ADDR: areas that are not memory, or not as they should be.

use std::os::fd::AsFd;

use crate::support::frontend::{pair, request, vring_addr};
use crate::support::memory::{Region, USER_OFFSET};
use crate::{Kept, Target, attacks};

const BASE: u64 = 0x10_0000;
const SIZE: u64 = 1 << 20;
const END: u64 = BASE + SIZE + USER_OFFSET;
const START: u64 = BASE + USER_OFFSET;

attacks! {
    descriptors_outside_memory: |t| no_ring(t, END + 4096, START, START + 4096);
    used_ring_outside_memory: |t| no_ring(t, START, END, START + 4096);
    available_ring_outside_memory: |t| no_ring(t, START, START + 4096, START - 4096);
    // CVE-2018-1059: only the start is looked up.
    descriptors_across_the_end: |t| no_ring(t, END - 16, START, START + 4096);
    used_ring_across_the_end: |t| no_ring(t, START, END - 4, START + 8192);
    available_ring_across_the_end: |t| no_ring(t, START, START + 8192, END - 2);
    addresses_that_wrap: |t| no_ring(t, u64::MAX - 15, u64::MAX - 3, u64::MAX - 1);
    addresses_of_zero: |t| no_ring(t, 0, 0, 0);
    guest_physical_ring_addresses: |t| no_ring(t, BASE, BASE + 4096, BASE + 8192);
    misaligned_descriptors: |t| no_ring(t, START + 8, START + 8192, START + 16384);
    misaligned_used_ring: |t| no_ring(t, START, START + 8194, START + 16384);
    misaligned_available_ring: |t| no_ring(t, START, START + 8192, START + 16385);
    all_areas_in_one_place: |t| {
        // Odd, but inside memory: whatever it reads there, the daemon has to cope with it.
        let front = t.front();
        let region = Region::new(BASE, SIZE);
        front.set_mem_table(&[(region.entry(), region.fd())]);
        let noise: Vec<u8> = (0..16384_u32).map(|i| (i * 7 % 251) as u8).collect();
        region.write(BASE, &noise);
        let queue = crate::support::queue::Queue::new(&region, 1, 256, false);
        front.must(request::SET_VRING_NUM, &pair(1, 256), &[]);
        let _ = front.tell(request::SET_VRING_ADDR, &vring_addr(1, START, START, START), &[]);
        let _ = front.tell(request::SET_VRING_KICK, &1u64.to_ne_bytes(), &[queue.kick.as_fd()]);
        let _ = front.tell(request::SET_VRING_ENABLE, &pair(1, 1), &[]);
        std::thread::sleep(std::time::Duration::from_millis(20));
        Box::new((front, region, queue))
    };
}

/// Sets a ring up with these areas; it must not run.
fn no_ring(target: &Target<'_>, desc: u64, used: u64, avail: u64) -> Kept {
    let front = target.front();
    let region = Region::new(BASE, SIZE);
    front.set_mem_table(&[(region.entry(), region.fd())]);
    let queue = crate::support::queue::Queue::new(&region, 1, 256, false);
    front.must(request::SET_VRING_NUM, &pair(1, 256), &[]);
    let addresses = vring_addr(1, desc, used, avail);
    // Refused here or at the start of the ring, as the daemon likes.
    let _ = front.tell(request::SET_VRING_ADDR, &addresses, &[]);
    let _ = front.tell(request::SET_VRING_KICK, &1u64.to_ne_bytes(), &[queue.kick.as_fd()]);
    let _ = front.tell(request::SET_VRING_ENABLE, &pair(1, 1), &[]);
    let show = target.daemon.show("target");
    assert_ne!(show["guest"]["rings"][1]["running"], true, "{show}");
    Box::new((front, region, queue))
}
