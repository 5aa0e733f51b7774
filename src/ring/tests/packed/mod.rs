//! Packed rings.

mod events;
mod positions;
mod rx;
mod threads;
mod trust;
mod tx;

use super::*;
use crate::ring::testing::packed::{DESC, DISABLE, Driver, ENABLE, Place, bytes as encoded};

impl Side for Driver {
    const PACKED: bool = true;

    fn size(&self) -> u16 {
        self.size
    }

    fn areas(&self) -> [usize; 3] {
        [self.ring_at(), self.driver_at(), self.device_at()]
    }

    fn buffers(&self) -> Range<usize> {
        self.buffers()
    }
}

type Rig = super::Rig<Driver>;

impl Rig {
    fn new(size: u16, start: Place) -> Self {
        Self::over(Driver::new(LEN, size, start), start.encode())
    }

    fn in_order(mut self) -> Self {
        self.config.in_order = true;
        self.driver.in_order = true;
        self
    }

    /// A chain that is visible at once.
    fn post(&mut self, id: u16, chain: &[Descriptor]) {
        self.driver.offer(id, chain);
        self.driver.publish();
    }
}

/// A readable (or with WRITE writable) descriptor.
fn piece(addr: u64, len: u32, flags: u16) -> Descriptor {
    Descriptor::new(addr, len, flags, 0)
}

/// Pops the one chain that was posted, and completes it.
fn pop_one(rig: &mut Rig, ring: &mut TxRing, id: u16) -> Result<(NetHeader, Vec<u8>), ChainFault> {
    assert_eq!(ring.pop(BURST), Ok(1));
    let found = ring.frame(0).map(|mut f| (f.header(), bytes(&mut f)));
    ring.complete(1);
    ring.publish();
    assert_eq!(rig.driver.take_used(), Some((id, 0, 1)));
    found
}

const ROUNDS: [bool; 2] = [true, false];
