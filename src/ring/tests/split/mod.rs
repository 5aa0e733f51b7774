//! Split rings.

mod events;
mod positions;
mod rx;
mod trust;
mod tx;

use super::*;
use crate::ring::testing::{Driver, Sender};

impl Side for Driver {
    const PACKED: bool = false;

    fn size(&self) -> u16 {
        self.size
    }

    fn areas(&self) -> [usize; 3] {
        [self.desc_at(), self.avail_at(), self.used_at()]
    }

    fn buffers(&self) -> Range<usize> {
        self.buffers()
    }
}

type Rig = super::Rig<Driver>;

impl Rig {
    fn new(size: u16, start: u16) -> Self {
        Self::over(Driver::new(LEN, size, start), start)
    }

    fn post(&mut self, heads: impl IntoIterator<Item = u16>) {
        heads.into_iter().for_each(|head| self.driver.offer(head));
        self.driver.publish();
    }
}

/// Pops one chain that the driver described at 0, and completes it.
fn pop_one(rig: &mut Rig, ring: &mut TxRing) -> Result<(NetHeader, Vec<u8>), ChainFault> {
    rig.post([0]);
    assert_eq!(ring.pop(BURST), Ok(1));
    let found = ring.frame(0).map(|mut f| (f.header(), bytes(&mut f)));
    ring.complete(1);
    ring.publish();
    assert_eq!(rig.driver.take_used(), Some((0, 0)));
    found
}
