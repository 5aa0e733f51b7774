//! Guest memory that comes and goes while traffic runs.

use crate::support::frontend::{mem_reg, request};
use crate::support::guest::{Flows, Guest, Plan};
use crate::support::memory::{Region, RegionEntry};
use crate::support::until;
use crate::{Port, all_counted};

/// Puts `n` frames on their way and does not wait for them.
fn launch(guest: &mut Guest, flows: &mut Flows, n: usize) {
    for _ in 0..n {
        let bytes = flows.next(0, 700).bytes();
        assert!(guest.pairs[0].tx.send(&bytes));
    }
    guest.pairs[0].tx.flush();
}

fn land(guest: &mut Guest, flows: &mut Flows) {
    until("all frames are back", || {
        while let Some(received) = guest.pairs[0].rx.receive() {
            flows.came_back(&received.frame);
        }
        flows.total_received() == flows.total_sent()
    });
    until("all sent chains are back", || {
        guest.pairs[0].tx.reap();
        guest.pairs[0].tx.queue.outstanding() == 0
    });
}

#[test]
fn the_same_table_again_under_traffic() {
    let port = Port::new("soft:loop", 1);
    let mut guest = port.guest(&Plan::default());
    let mut flows = Flows::new(1);
    let before = port.daemon.census();
    for _ in 0..200 {
        launch(&mut guest, &mut flows, 24);
        guest.set_mem_table();
        land(&mut guest, &mut flows);
    }
    all_counted(&port.lanes(), &flows);
    // A table that stays costs nothing.
    port.daemon.until_census(&before);
    port.goodbye(guest);
    port.daemon.stop();
}

#[test]
fn a_region_is_added_used_and_removed_under_traffic() {
    let port = Port::new("soft:loop", 1);
    let mut guest = port.guest(&Plan::default());
    let mut flows = Flows::new(1);
    flows.exchange(&mut guest, &[0], 50, 700);
    let before = port.daemon.census();
    for round in 0..100_u64 {
        let region = Region::new((1 << 32) + (round << 24), 1 << 20);
        launch(&mut guest, &mut flows, 24);
        guest.front.must(request::ADD_MEM_REG, &mem_reg(&region.entry()), &[region.fd()]);
        land(&mut guest, &mut flows);

        let frame = flows.next(0, 700).bytes();
        let at = region.alloc(2048, 64);
        region.write(at, &[0; 12]);
        region.write(at + 12, &frame);
        let queue = &mut guest.pairs[0].tx.queue;
        assert!(queue.add(&[(at, 12 + frame.len() as u32)], false).is_some());
        queue.notify();
        land(&mut guest, &mut flows);

        launch(&mut guest, &mut flows, 24);
        // Its address in the front end identifies it; the offset need not be repeated.
        let entry = RegionEntry { offset: 0, ..region.entry() };
        guest.front.must(request::REM_MEM_REG, &mem_reg(&entry), &[]);
        land(&mut guest, &mut flows);
    }
    all_counted(&port.lanes(), &flows);
    // A removed region leaves nothing behind.
    port.daemon.until_census(&before);
    port.goodbye(guest);
    port.daemon.stop();
}

#[test]
fn tables_grow_and_shrink_under_traffic() {
    let port = Port::new("soft:loop", 1);
    let mut guest = port.guest(&Plan::default());
    let mut flows = Flows::new(1);
    flows.exchange(&mut guest, &[0], 50, 700);
    let before = port.daemon.census();
    for round in 0..60_u64 {
        launch(&mut guest, &mut flows, 24);
        guest.regions.truncate(1);
        for i in 0..round % 4 {
            guest.regions.push(Region::new((1 << 32) + (i << 24), 1 << 20));
        }
        guest.set_mem_table();
        land(&mut guest, &mut flows);
    }
    guest.regions.truncate(1);
    guest.set_mem_table();
    all_counted(&port.lanes(), &flows);
    // Removed regions leave nothing behind.
    port.daemon.until_census(&before);
    port.goodbye(guest);
    port.daemon.stop();
}

#[test]
fn the_file_descriptor_of_guest_memory_may_be_closed() {
    // A front end need not keep the fds it has passed.
    let port = Port::new("soft:loop", 1);
    let mut guest = port.guest(&Plan::default());
    let mut flows = Flows::new(1);
    let call = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).expect("eventfd");
    {
        use std::os::fd::AsFd;
        let fds = [call.as_fd()];
        for ring in [0_u64, 1] {
            guest.front.must(request::SET_VRING_CALL, &ring.to_ne_bytes(), &fds);
        }
    }
    drop(call);
    flows.exchange(&mut guest, &[0], 500, 700);
    all_counted(&port.lanes(), &flows);
    port.goodbye(guest);
    port.daemon.stop();
}
