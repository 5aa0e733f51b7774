//! Lanes against a driver that behaves and a scripted VF. Time is a parameter of a turn: nothing sleeps here
//! but in [`hand_over`], where lanes are on real cores.

mod from_vf;
mod hand_over;
mod posted;
mod scripted;
mod steering;
mod to_vf;
pub(crate) mod traffic;

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::guest::{Gpa, GuestMemory, RegionSpec, UserAddr};
use crate::ring::testing::{Driver, GPA, Receiver, Sender, USER};
use crate::ring::{RingAddresses, RingConfig};
use crate::vf::Lendable;

/// Bytes of a buffer, and the longest frame.
const BUFFER: usize = 2048;
const MAX_FRAME: usize = 1522;

/// A guest with a TX and an RX ring per queue pair, all in one memory.
struct Guest {
    tx: Vec<Sender>,
    rx: Vec<Receiver>,
    memory: Arc<GuestMemory>,
}

impl Guest {
    fn new(pairs: usize, size: u16) -> Self {
        const RING: usize = 16 * 1024;
        assert!(size <= 512);
        let buffers = usize::from(size) * BUFFER;
        let len = 2 * pairs * (RING + buffers);
        let first = Driver::new(len, size, 0);
        let at = |ring: usize| (ring * RING, 2 * pairs * RING + ring * buffers);
        let ring = |index: usize| (first.beside(at(index).0, size, 0), at(index).1);
        let tx = (0..pairs).map(|pair| ring(2 * pair + 1)).map(|(ring, at)| Sender::new(ring, at, BUFFER));
        let rx = (0..pairs).map(|pair| ring(2 * pair)).map(|(ring, at)| Receiver::new(ring, at, BUFFER));
        let spec = RegionSpec { gpa: Gpa(GPA), size: len as u64, user: UserAddr(USER), offset: 0 };
        let memory = GuestMemory::empty().replaced(vec![(spec, first.file.try_clone().unwrap())]).unwrap();
        Self { tx: tx.collect(), rx: rx.collect(), memory }
    }

    fn plan(&self, ring: &Driver) -> RingPlan {
        let user = |at: usize| UserAddr(USER + at as u64);
        let config = RingConfig {
            packed: false,
            in_order: false,
            size: ring.size,
            addresses: RingAddresses {
                desc: user(ring.desc_at()),
                avail: user(ring.avail_at()),
                used: user(ring.used_at()),
            },
            base: 0,
            indirect: false,
            event_idx: false,
            mergeable: false,
            header_len: 12,
            max_frame: MAX_FRAME,
        };
        RingPlan {
            memory: self.memory.clone(),
            config,
            doorbell: Doorbell::default(),
            enabled: true,
            rules: TxRules { max_wire_frame: MAX_FRAME, ..TxRules::default() },
            lendable: Some(Lendable::all(self.memory.clone())),
            guest_checksum: false,
        }
    }

    /// The front end adds a region.
    fn grow(&mut self) {
        let end = self.memory.regions().iter().map(|region| region.gpa.0 + region.size).max().unwrap();
        let spec = RegionSpec { gpa: Gpa(end), size: 4096, user: UserAddr(USER - GPA + end), offset: 0 };
        self.memory = self.memory.with(spec, Driver::new(8192, 1, 0).file.try_clone().unwrap()).unwrap();
    }

    fn tx_plan(&self, pair: usize) -> RingPlan {
        self.plan(&self.tx[pair].ring)
    }

    fn rx_plan(&self, pair: usize) -> RingPlan {
        self.plan(&self.rx[pair].ring)
    }
}

/// A core's clock, moved by hand.
struct Clock {
    now: Instant,
    mark: NotifyMark,
}

impl Clock {
    fn new() -> Self {
        Self { now: Instant::now(), mark: NotifyMark::default() }
    }

    fn pass(&mut self, micros: u64) {
        self.now += Duration::from_micros(micros);
    }

    fn turn(&self) -> Turn<'_> {
        Turn { now: self.now, mark: &self.mark }
    }
}
