//! Which drivers may read a guest's memory instead of a copy, each with its evidence.
//!
//! A frame that is sent from where it lies is the guest's again only when the driver frees its mbuf. So a driver
//! is good for it if it frees what it has sent on the thread that sends, each mbuf once, in the order of sending,
//! within bounded time; and if it never writes to a frame. What is not on the list is copied: net_ring, whose
//! other end frees when it likes; net_memif; bonding, which does as its members do.

/// Those that are, all of DPDK 22.11 and all before their tx_burst returns.
const DRIVERS: [&str; 3] = [
    // Frees the burst it was given; seen with copy=0 and copy=1.
    "net_null",
    // Writes the frame to the tap, then frees it; makes checksums in a copy of the headers. Frames compared at the
    // far end.
    "net_tap",
    // Copies the frame into the kernel's ring, then frees it. Frames compared at the far end.
    "net_af_packet",
];

/// Whether the driver of this name is on the list.
pub(super) fn lends(driver: &str) -> bool {
    DRIVERS.contains(&driver)
}
