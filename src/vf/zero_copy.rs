//! Which drivers may read a guest's memory instead of a copy, each with its evidence.
//!
//! A frame that is sent from where it lies is the guest's again only when the driver frees its mbuf. So a driver
//! is good for it if it frees what it has sent on the thread that sends, each mbuf once, in the order of sending,
//! within bounded time; and if it never writes to a frame. What is not on the list is copied.

use super::VfSpec;

/// How sent mbufs come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Returns {
    /// Before tx_burst returns.
    AtOnce,
}

/// `None`: not known to be good.
pub(super) fn returns(spec: &VfSpec, driver: &str) -> Option<Returns> {
    match driver {
        // Frees the burst it was given. (22.11; seen with copy=0 and copy=1)
        "net_null" => Some(Returns::AtOnce),
        // Writes the frame to the tap, then frees it. Checksums are made in a copy of the headers. (22.11; frames
        // compared at the far end)
        "net_tap" => Some(Returns::AtOnce),
        // Copies the frame into the kernel's ring, then frees it. With qdisc_bypass as well. (22.11; as above)
        "net_af_packet" => Some(Returns::AtOnce),
        // net_ring: the other end frees it, whenever that is. net_memif: the same with zero-copy. Bonding: whatever its
        // members do.
        _ => {
            tracing::debug!(vf = %spec, driver, "not on the list of drivers that send without a copy");
            None
        }
    }
}
