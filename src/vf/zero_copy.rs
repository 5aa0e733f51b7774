//! Which drivers may read a guest's memory instead of a copy, each with its evidence.
//!
//! A frame that is sent from where it lies is the guest's again only when the driver frees its mbuf. So a driver
//! is good for it if it frees what it has sent on the thread that sends, each mbuf once, in the order of sending,
//! within bounded time; and if it never writes to a frame. What is not on the list is copied: net_ring, whose
//! other end frees when it likes; net_memif; bonding, which does as its members do.
//!
//! A frame that is received where the guest wants it needs a buffer of the guest's in time. A driver that fills a
//! ring of buffers in advance holds what the guest posted until a frame comes, through every change of the guest's
//! memory; so only those that do not are on the second list.

/// Those that are good for sending, all of DPDK 22.11. These are done before their tx_burst returns.
const SEND_AT_ONCE: [&str; 3] = [
    // Frees the burst it was given; seen with copy=0 and copy=1.
    "net_null",
    // Writes the frame to the tap, then frees it; makes checksums in a copy of the headers. Frames compared at the
    // far end.
    "net_tap",
    // Copies the frame into the kernel's ring, then frees it. Frames compared at the far end.
    "net_af_packet",
];

/// These are done when they are asked (rte_eth_tx_done_cleanup). By themselves they free a frame only when its place in
/// their ring is used again, a whole ring later: an idle guest would wait for ever.
const SEND_AND_ASK: [&str; 1] = [
    // igb_tx_done_cleanup frees what the device has marked as done, on the calling thread; the order is that of the ring
    // but for the oldest, which it may free last. The device is done in order. Frames compared on the wire, memory
    // mapped read-only, in the VF lab.
    //
    // Where it frees a frame of several mbufs it stops the queue for good: it makes each inner one its own last
    // (`last_id`), whose descriptor the device never marks, and tx_burst waits for that mark (22.11 to 26.11-rc0). See
    // `queue::Asking`.
    "net_e1000_igb_vf",
];

/// Of those that may send from a guest's memory, those that take a frame in two mbufs as well as in one: a copy of its
/// headers, with offloads that were derived from them, and the rest where it lies in the guest's memory. Not
/// net_e1000_igb_vf: see above. net_null and net_af_packet have no offloads.
const TAKE_HEADS: [&str; 1] = [
    // Takes what it changes from the first mbuf, into a copy, sums and writes the others where they are; a sum over mbufs
    // is right only if the first has an even number of bytes behind the IP header. Frames compared at the far end.
    "net_tap",
];

/// Those that take a receive buffer only when a frame is there for it, so that none of a guest's is ever in the device
/// between two bursts, all of DPDK 22.11.
const TAKE_LATE: [&str; 2] = [
    // Takes as many as the burst asks for, and fills all.
    "net_null",
    // Takes one for each frame that is in the kernel's ring, and copies it there, then puts a VLAN tag back in front
    // of it. Neither asks how long the buffer is (see `quirks::most_written`).
    "net_af_packet",
];

/// Whether the driver of this name may receive into a guest's memory.
pub(super) fn places(driver: &str) -> bool {
    TAKE_LATE.contains(&driver)
}

/// Why the driver of this name may not send from a guest's memory, if it may not.
pub(super) fn reason_to_copy(driver: &str) -> Option<String> {
    let known = SEND_AT_ONCE.contains(&driver) || is_to_be_asked(driver);
    (!known).then(|| format!("{driver} is not known to be done with sent frames in time and in order"))
}

/// Whether what it may send from a guest's memory may begin in an mbuf of ours.
pub(super) fn takes_heads(driver: &str) -> bool {
    TAKE_HEADS.contains(&driver)
}

/// Whether it is to be asked what it has sent.
pub(super) fn is_to_be_asked(driver: &str) -> bool {
    SEND_AND_ASK.contains(&driver)
}
