//! What an ethdev says of itself.

use dpdk_sys::rte_eth_dev_info;

use super::ethdev::{DEFECT, check, text};
use super::{Dma, VfCaps, VfSpec, quirks, zero_copy};
use crate::error::Result;
use crate::ethernet::{HEADER, MAX_MTU};

/// DPDK's own struct, with what is read out of it.
pub(super) struct DeviceInfo(pub(super) rte_eth_dev_info);

impl DeviceInfo {
    /// Of the ethdev at `port`.
    pub(super) fn of(port: u16, spec: &VfSpec) -> Result<Self> {
        let mut info = rte_eth_dev_info::default();
        // SAFETY: the struct is ours.
        let rc = unsafe { dpdk_sys::rte_eth_dev_info_get(port, &mut info) };
        check("rte_eth_dev_info_get", || spec.to_string(), rc, DEFECT)?;
        Ok(Self(info))
    }

    /// What is made use of, of what it can do to sent frames.
    pub(super) fn tx_offloads(&self) -> u64 {
        let has = |wanted: u64| self.0.tx_offload_capa & wanted == wanted;
        let checksums = dpdk_sys::SHIM_TX_OFFLOAD_TCP_CKSUM | dpdk_sys::SHIM_TX_OFFLOAD_UDP_CKSUM;
        // DPDK's TSO sets the IPv4 checksum of each segment, and its frames come in several mbufs.
        let segmentation = dpdk_sys::SHIM_TX_OFFLOAD_TCP_TSO
            | dpdk_sys::SHIM_TX_OFFLOAD_IPV4_CKSUM
            | dpdk_sys::SHIM_TX_OFFLOAD_MULTI_SEGS
            | checksums;
        [dpdk_sys::SHIM_TX_OFFLOAD_MULTI_SEGS, checksums, segmentation]
            .into_iter()
            .filter(|&wanted| has(wanted))
            .fold(0, |all, wanted| all | wanted)
    }

    /// The same, of received ones.
    pub(super) fn rx_offloads(&self) -> u64 {
        let checksums = dpdk_sys::SHIM_RX_OFFLOAD_TCP_CKSUM | dpdk_sys::SHIM_RX_OFFLOAD_UDP_CKSUM;
        if self.0.rx_offload_capa & checksums == checksums { checksums } else { 0 }
    }

    /// Whether it segments TCP.
    pub(super) fn segments(&self) -> bool {
        self.tx_offloads() & dpdk_sys::SHIM_TX_OFFLOAD_TCP_TSO != 0
    }

    /// What the VF can do.
    pub(super) fn caps(&self, spec: &VfSpec) -> VfCaps {
        // SAFETY: DPDK sets the driver's name; it lives as long as the driver.
        let driver = unsafe { text(self.0.driver_name) };
        let (rx, tx) = (self.rx_offloads(), self.tx_offloads());
        VfCaps {
            max_queues: self.0.max_rx_queues.min(self.0.max_tx_queues).min(quirks::max_queues(&driver)),
            max_mtu: quirks::max_mtu(spec).unwrap_or_else(|| self.max_mtu()),
            tx_checksum: tx & dpdk_sys::SHIM_TX_OFFLOAD_TCP_CKSUM != 0,
            tso: tx & dpdk_sys::SHIM_TX_OFFLOAD_TCP_TSO != 0 && quirks::segments_soundly(&driver),
            rx_checksum: rx != 0,
            multi_segment: tx & dpdk_sys::SHIM_TX_OFFLOAD_MULTI_SEGS != 0,
            copies: zero_copy::reason_to_copy(&driver),
            copies_received: zero_copy::reason_to_copy_received(&driver),
            rx_interrupt: false,
            dma: Dma::None,
            dma_shared: None,
            driver,
        }
    }

    /// What `rte_eth_dev_configure` accepts: the MTU limit, and the frame limit less the driver's overhead.
    pub(super) fn max_mtu(&self) -> u16 {
        let most = u32::from(self.0.max_mtu);
        let overhead = match self.0.max_rx_pktlen.checked_sub(most) {
            Some(overhead) if self.0.max_mtu != u16::MAX => overhead,
            _ => HEADER as u32 + 4,
        };
        let most = most.min(self.0.max_rx_pktlen.saturating_sub(overhead));
        most.min(MAX_MTU.into()) as u16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mtu_is_limited_by_the_longest_frame() {
        let max = |max_mtu, max_rx_pktlen| {
            DeviceInfo(rte_eth_dev_info { max_mtu, max_rx_pktlen, ..Default::default() }).max_mtu()
        };
        assert_eq!(max(u16::MAX, 1522), 1504);
        assert_eq!(max(u16::MAX, u32::MAX), MAX_MTU);
        assert_eq!(max(9706, 9728), MAX_MTU);
        assert_eq!(max(2000, 2022), 2000);
    }
}
