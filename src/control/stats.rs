//! Counters and VF state as clients see them.

use super::api::{LaneStats, VfView};
use crate::relay::DirectionCounters;
use crate::session::port::VfStatus;

pub(super) fn all_lanes(cpu: usize, counters: &DirectionCounters) -> LaneStats {
    LaneStats { cpu, counters: counters.snapshot() }
}

pub(super) fn each_lane(cpus: &[usize], counters: &DirectionCounters) -> Vec<LaneStats> {
    let lane = |(lane, cpu): (usize, &usize)| LaneStats { cpu: *cpu, counters: counters.lane(lane).snapshot() };
    cpus.iter().enumerate().map(lane).collect()
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
