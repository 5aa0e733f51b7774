//! Counters and VF state as clients see them.

use super::api::{LaneStats, VfView};
use crate::relay::LaneCounters;
use crate::session::port::VfStatus;

pub(super) fn lane(cpu: usize, counters: &LaneCounters) -> LaneStats {
    LaneStats { cpu, counters: counters.snapshot() }
}

pub(super) fn vf_view(status: &VfStatus) -> VfView {
    VfView {
        spec: status.spec.clone(),
        driver: status.caps.driver.clone(),
        queues: status.queues,
        max_queues: status.caps.max_queues,
        link_up: status.link.up,
        speed: status.link.speed,
        mac: status.link.mac,
        dma: status.caps.dma,
        dma_shared: status.caps.dma_shared.clone().map(Into::into),
    }
}
