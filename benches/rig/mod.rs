//! A driver's ring as the device side takes it.

#![allow(dead_code)]

use std::sync::Arc;

use virtio_forwarder::guest::{Gpa, GuestMemory, RegionSpec, UserAddr};
use virtio_forwarder::relay::{Doorbell, RingPlan, TxRules};
use virtio_forwarder::ring::{RingAddresses, RingConfig};
use virtio_forwarder::vf::Lendable;

#[path = "../../src/ring/testing.rs"]
mod testing;
pub use testing::*;

pub const MAX_FRAME: usize = 1522;

/// The first `regions` × `len` bytes of the driver's memory.
pub fn memory(driver: &Driver, regions: usize, len: usize) -> Arc<GuestMemory> {
    let region = |i: usize| {
        let offset = (i * len) as u64;
        let spec = RegionSpec { gpa: Gpa(GPA + offset), size: len as u64, user: UserAddr(USER + offset), offset };
        (spec, driver.file.try_clone().unwrap())
    };
    GuestMemory::empty().replaced((0..regions).map(region).collect()).unwrap()
}

pub fn config(driver: &Driver) -> RingConfig {
    let user = |at: usize| UserAddr(USER + at as u64);
    RingConfig {
        packed: false,
        in_order: false,
        size: driver.size,
        addresses: RingAddresses {
            desc: user(driver.desc_at()),
            avail: user(driver.avail_at()),
            used: user(driver.used_at()),
        },
        base: 0,
        indirect: true,
        event_idx: true,
        mergeable: true,
        header_len: HEADER,
        max_frame: MAX_FRAME,
    }
}

/// The ring of a lane, without eventfds; the memory is `len` bytes.
pub fn plan(driver: &Driver, len: usize) -> RingPlan {
    let memory = memory(driver, 1, len);
    RingPlan {
        lendable: Some(Lendable::all(memory.clone())),
        memory,
        config: config(driver),
        doorbell: Doorbell::default(),
        enabled: true,
        rules: TxRules { max_wire_frame: MAX_FRAME, ..TxRules::default() },
        guest_checksum: false,
    }
}
