//! Memory tables: regions that are not what the message says, or stop being it.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use crate::support::census::free_hugepages;
use crate::support::daemon::{Daemon, Options};
use crate::support::frontend::{FrontEnd, Verdict, mem_reg, mem_table, request};
use crate::support::guest::{Flows, Guest, Plan};
use crate::support::memory::{HUGE, Region, RegionEntry, USER_OFFSET, memfd};
use crate::support::queue::Desc;
use crate::{Kept, Target, attacks};

const MIB: u64 = 1 << 20;

/// A true region of a MiB; the attacks change one thing of it.
const GOOD: RegionEntry = RegionEntry { gpa: 0, size: MIB, user: USER_OFFSET, offset: 0 };

attacks! {
    region_of_no_size: |t| refused(t, &[RegionEntry { size: 0, ..GOOD }]);
    region_longer_than_its_file: |t| refused(t, &[RegionEntry { size: 2 * MIB, ..GOOD }]);
    region_beyond_its_file: |t| refused(t, &[RegionEntry { offset: MIB, ..GOOD }]);
    region_half_beyond_its_file: |t| refused(t, &[RegionEntry { offset: MIB / 2, ..GOOD }]);
    offset_and_size_that_wrap: |t| refused(t, &[RegionEntry { offset: u64::MAX - MIB + 1, ..GOOD }]);
    largest_region: |t| refused(t, &[RegionEntry { size: !4095, ..GOOD }]);
    guest_address_that_wraps: |t| refused(t, &[RegionEntry { gpa: u64::MAX - 4095, ..GOOD }]);
    user_address_that_wraps: |t| refused(t, &[RegionEntry { user: u64::MAX - 4095, ..GOOD }]);
    regions_that_overlap: |t| refused(t, &[
        GOOD,
        RegionEntry { gpa: MIB / 2, user: USER_OFFSET + 4 * MIB, ..GOOD },
    ]);
    the_same_region_twice: |t| refused(t, &[GOOD, GOOD]);
    last_region_bad: |t| refused(t, &[
        GOOD,
        RegionEntry { gpa: MIB, user: USER_OFFSET + MIB, ..GOOD },
        RegionEntry { gpa: 2 * MIB, user: USER_OFFSET + 2 * MIB, size: 0, ..GOOD },
    ]);
    more_regions_than_the_message_has: |t| {
        for count in [2_u32, 9, 33, 4096, u32::MAX] {
            let front = t.front();
            let file = memfd(MIB, false).expect("memfd");
            let mut body = mem_table(&[GOOD]);
            body[..4].copy_from_slice(&count.to_ne_bytes());
            let verdict = front.verdict(request::SET_MEM_TABLE, &body, &[file.as_fd()]);
            assert_ne!(verdict, Verdict::Accepted, "count {count}");
        }
        Box::new(())
    };
    fewer_fds_than_regions: |t| fds_for_one_region(t, 0);
    more_fds_than_regions: |t| fds_for_one_region(t, 2);
    many_more_fds_than_regions: |t| fds_for_one_region(t, 32);
    region_of_dev_null: |t| no_memory(t, File::open("/dev/null").expect("open").as_fd());
    region_of_a_directory: |t| no_memory(t, File::open("/").expect("open").as_fd());
    region_of_a_pipe: |t| no_memory(t, rustix::pipe::pipe().expect("pipe").0.as_fd());
    region_of_a_socket: |t| no_memory(t, std::os::unix::net::UnixStream::pair().expect("pair").0.as_fd());
    region_that_is_read_only: |t| {
        let file = memfd(MIB, false).expect("memfd");
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        no_memory(t, File::open(path).expect("open read-only").as_fd())
    };
    huge_pages_that_do_not_exist: |t| {
        // The file may be as long as it likes; the pages are not there. Refused at once, or the ring
        // that touches them is stopped.
        // More than any machine has, so that nobody can make them exist in the meantime.
        let pages = free_hugepages() + (1 << 20);
        let Ok(file) = memfd(pages * HUGE, true) else {
            return Box::new(());
        };
        let region = Region::new(0x10_0000, 4 * MIB);
        let huge = RegionEntry {
            gpa: 1 << 32,
            size: pages * HUGE,
            user: USER_OFFSET + (1 << 32),
            offset: 0,
        };
        let front = t.front();
        let verdict = front.verdict(
            request::SET_MEM_TABLE,
            &mem_table(&[region.entry(), huge]),
            &[region.fd(), file.as_fd()],
        );
        if verdict != Verdict::Accepted {
            return Box::new(front);
        }
        drop(front);
        t.daemon.until_guest("target", false);
        let plan = Plan { regions: Some(vec![region]), ..Plan::default() };
        let mut guest = t.guest(&plan);
        guest.front.must(request::ADD_MEM_REG, &mem_reg(&huge), &[file.as_fd()]);
        // Every page in turn: there is one that cannot be had.
        for page in 0..pages {
            let ring = &mut guest.pairs[0].tx.queue;
            ring.write_desc(0, Desc { addr: huge.gpa + page * HUGE, len: 72, flags: 0, next: 0 });
            ring.write_head(0);
            ring.advance(1);
            ring.kick_now();
            if t.fault(1).is_some() {
                break;
            }
        }
        t.until_fault(1);
        Box::new(guest)
    };
    buffers_truncated_under_traffic: |t| {
        let (mut guest, buffers) = two_regions(t);
        buffers.file().set_len(0).expect("truncate");
        // From here on, touching the buffers would kill us as well: only the rings are written.
        for i in 0..64 {
            let ring = &mut guest.pairs[0].tx.queue;
            ring.write_desc(i, Desc { addr: buffers.gpa + 4096 * u64::from(i), len: 72, flags: 0, next: 0 });
            ring.write_head(i);
            ring.advance(1);
            ring.kick_now();
        }
        t.until_fault(1);
        Box::new(guest)
    };
    rings_truncated_under_traffic: |t| {
        let (guest, _) = two_regions(t);
        guest.regions[0].file().set_len(0).expect("truncate");
        guest.pairs[0].tx.queue.kick_now();
        guest.pairs[0].rx.queue.kick_now();
        t.until_fault(1);
        Box::new(guest.front)
    };
    truncated_before_the_rings_start: |t| {
        let front = t.front();
        let region = Region::new(0, MIB);
        front.set_mem_table(&[(region.entry(), region.fd())]);
        region.file().set_len(0).expect("truncate");
        let file = memfd(MIB, false).expect("memfd");
        let _ = front.verdict(request::SET_VRING_NUM, &crate::support::frontend::pair(1, 256), &[]);
        let at = USER_OFFSET;
        let areas = crate::support::frontend::vring_addr(1, at, at + 8192, at + 4096);
        let _ = front.tell(request::SET_VRING_ADDR, &areas, &[]);
        let kick = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).expect("eventfd");
        let _ = front.tell(request::SET_VRING_KICK, &1u64.to_ne_bytes(), &[kick.as_fd()]);
        let _ = front.tell(request::SET_VRING_ENABLE, &crate::support::frontend::pair(1, 1), &[]);
        std::thread::sleep(std::time::Duration::from_millis(20));
        Box::new((front, file))
    };
    holes_under_traffic: |t| {
        // Legal: freed pages read as zeros and come back when written.
        let (mut guest, buffers) = two_regions(t);
        for _ in 0..50 {
            rustix::fs::fallocate(
                buffers.file(),
                rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
                0,
                buffers.size,
            ).expect("punch a hole");
            Flows::new(1).exchange(&mut guest, &[0], 20, 300);
        }
        Box::new(guest)
    };
    table_without_the_rings_memory: |t| {
        // The rings lose the ground they stand on: they stop, and nothing is touched any more.
        let (guest, _) = two_regions(t);
        let other = Region::new(1 << 40, MIB);
        let verdict = guest.front.verdict(
            request::SET_MEM_TABLE, &mem_table(&[other.entry()]), &[other.fd()]);
        if verdict == Verdict::Accepted {
            let show = t.daemon.show("target");
            assert_ne!(show["guest"]["rings"][1]["running"], true, "{show}");
        }
        Box::new(guest)
    };
    region_removed_under_its_rings: |t| {
        let (guest, _) = two_regions(t);
        let body = mem_reg(&guest.regions[0].entry());
        if guest.front.verdict(request::REM_MEM_REG, &body, &[]) == Verdict::Accepted {
            let show = t.daemon.show("target");
            assert_ne!(show["guest"]["rings"][1]["running"], true, "{show}");
        }
        Box::new(guest)
    };
    buffers_removed_under_traffic: |t| {
        let (mut guest, buffers) = two_regions(t);
        guest.front.must(request::REM_MEM_REG, &mem_reg(&buffers.entry()), &[]);
        let before = t.lanes().guest_to_vf.dropped.malformed;
        guest.pairs[0].tx.send(&[0; 60]);
        guest.pairs[0].tx.flush();
        t.until_counted("malformed", before + 1, |l| l.guest_to_vf.dropped.malformed);
        Box::new(guest)
    };
    regions_that_were_never_added: |t| {
        let front = t.front();
        let body = mem_reg(&GOOD);
        assert_ne!(front.verdict(request::REM_MEM_REG, &body, &[]), Verdict::Accepted);
        Box::new(front)
    };
    region_added_over_another: |t| {
        let front = t.front();
        let file = memfd(MIB, false).expect("memfd");
        front.must(request::ADD_MEM_REG, &mem_reg(&GOOD), &[file.as_fd()]);
        let over = RegionEntry { gpa: 4096, user: USER_OFFSET + 2 * MIB, ..GOOD };
        assert_ne!(front.verdict(request::ADD_MEM_REG, &mem_reg(&over), &[file.as_fd()]), Verdict::Accepted);
        Box::new(front)
    };
    more_regions_than_slots: |t| {
        let front = t.front();
        let slots = front.ask(request::GET_MAX_MEM_SLOTS, &[]).expect("slots").u64();
        assert!((1..=4096).contains(&slots), "{slots} slots");
        let file = memfd(4096, false).expect("memfd");
        let region = |i: u64| mem_reg(&RegionEntry {
            gpa: i << 20, size: 4096, user: USER_OFFSET + (i << 20), offset: 0,
        });
        for i in 0..slots {
            front.must(request::ADD_MEM_REG, &region(i), &[file.as_fd()]);
        }
        let verdict = front.verdict(request::ADD_MEM_REG, &region(slots), &[file.as_fd()]);
        assert_ne!(verdict, Verdict::Accepted);
        Box::new(front)
    };
    more_memory_than_a_guest_may_have: |t| {
        let front = t.front();
        assert_eq!(add_until_refused(&front, 256 << 30), 4, "1 TiB is the default");
        // Nor at once.
        let file = memfd(1 << 41, false).expect("memfd");
        let region = RegionEntry { size: 1 << 41, ..GOOD };
        let verdict = front.verdict(request::SET_MEM_TABLE, &mem_table(&[region]), &[file.as_fd()]);
        assert_ne!(verdict, Verdict::Accepted);
        Box::new(front)
    };
}

/// Adds regions of so many bytes, all of one file that takes no memory, until no more are taken. How many were.
fn add_until_refused(front: &FrontEnd, size: u64) -> u64 {
    let file = memfd(size, false).expect("memfd");
    let add = |i: &u64| {
        let region = RegionEntry { gpa: i * size, size, user: USER_OFFSET + i * size, offset: 0 };
        front.verdict(request::ADD_MEM_REG, &mem_reg(&region), &[file.as_fd()]) == Verdict::Accepted
    };
    (0..600).take_while(add).count() as u64
}

/// While front ends have mapped all they may, others come and go.
fn leaves_room(limit_gib: u64, greedy: usize) {
    let options = Options { args: vec![format!("--guest-memory={limit_gib}")], ..Options::default() };
    let daemon = Daemon::with(options);
    let bystander = daemon.attach("bystander", "soft:loop", 1);
    drop(Guest::connect(&bystander, &Plan::default()));
    let size = limit_gib << 26;
    let fronts: Vec<_> = (0..greedy)
        .map(|i| {
            let socket = daemon.attach(&format!("greedy-{i}"), "soft:loop", 1);
            let front = Target { socket, daemon: &daemon }.front();
            let added = add_until_refused(&front, size);
            (front, added)
        })
        .collect();
    let mapped: u64 = fronts.iter().map(|(_, added)| added * size).sum();
    // Half of what a process can address.
    assert!(mapped <= 1 << 46, "{mapped:#x} bytes are mapped");
    assert!(fronts.iter().all(|(_, added)| *added <= 16), "{fronts:?}");
    let mut guest = Guest::connect(&bystander, &Plan::default());
    Flows::new(1).exchange(&mut guest, &[0], 100, 300);
    let mut guest = Guest::connect(&daemon.attach("newcomer", "soft:loop", 1), &Plan::default());
    Flows::new(1).exchange(&mut guest, &[0], 100, 300);
    drop(fronts);
    daemon.stop();
}

#[test]
fn one_that_maps_all_it_may() {
    leaves_room(1024, 1);
}

#[test]
fn several_that_map_more_than_a_process_can_have() {
    // Regions that leave a part of the whole over: the others have to fit into it.
    leaves_room(20_000, 4);
}

/// A table with these regions, each of its own MiB, is refused, and nothing of it stays mapped.
fn refused(target: &Target<'_>, regions: &[RegionEntry]) -> Kept {
    let front = target.front();
    let files: Vec<File> = regions.iter().map(|_| memfd(MIB, false).expect("memfd")).collect();
    let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let verdict = front.verdict(request::SET_MEM_TABLE, &mem_table(regions), &fds);
    assert_ne!(verdict, Verdict::Accepted, "{regions:?}");
    assert_eq!(target.daemon.census().guest_mappings, BYSTANDERS_MAPPINGS);
    Box::new(front)
}

/// The other port's guest has one region.
const BYSTANDERS_MAPPINGS: usize = 1;

fn fds_for_one_region(target: &Target<'_>, count: usize) -> Kept {
    let front = target.front();
    let file = memfd(MIB, false).expect("memfd");
    let fds = vec![file.as_fd(); count];
    let verdict = front.verdict(request::SET_MEM_TABLE, &mem_table(&[GOOD]), &fds);
    assert_ne!(verdict, Verdict::Accepted, "{count} fds");
    Box::new(front)
}

/// Neither message takes an fd that is no shared memory we may write to.
fn no_memory(target: &Target<'_>, fd: BorrowedFd<'_>) -> Kept {
    for (number, body) in [(request::SET_MEM_TABLE, mem_table(&[GOOD])), (request::ADD_MEM_REG, mem_reg(&GOOD))] {
        let front = target.front();
        let verdict = front.verdict(number, &body, &[fd]);
        assert_ne!(verdict, Verdict::Accepted, "request {number}");
    }
    Box::new(())
}

/// A running guest with rings in one region and buffers in another, which is returned too.
fn two_regions(target: &Target<'_>) -> (Guest, Arc<Region>) {
    let (rings, buffers) = (Region::new(0x10_0000, 4 * MIB), Region::new(1 << 32, 4 * MIB));
    let plan = Plan { regions: Some(vec![rings, buffers.clone()]), ..Plan::default() };
    let mut guest = target.guest(&plan);
    Flows::new(1).exchange(&mut guest, &[0], 100, 300);
    (guest, buffers)
}
