//! Which drivers may read a guest's memory instead of a copy, each with its evidence.
//!
//! A frame that is sent from where it lies is the guest's again only when the driver frees its mbuf. So a driver
//! is good for it if it frees what it has sent on the thread that sends, each mbuf once, in the order of sending,
//! within bounded time; and if it never writes to a frame. What is not on the list is copied: net_ring, whose
//! other end frees when it likes; net_memif; bonding, which does as its members do.
//!
//! A frame that is received where the guest wants it needs a buffer of the guest's in time. Most simply so where the
//! driver takes one for each frame that is there. A driver that fills a ring of buffers in advance holds what the guest
//! posted until a frame comes, or until it is stopped; and frames that come in buffers of ours which it took before have to
//! keep their places among the guest's. So it has to use buffers in the order in which it takes them, to take one for each
//! frame, and to give all back when it is stopped.

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
    // but for the oldest, which it may free last. The device is done in order. Frames compared on the wire in the VF
    // lab.
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

/// Those that fill a ring of buffers in advance, and are good all the same.
const TAKE_EARLY: [&str; 1] = [
    // 22.11: eth_igb_recv_pkts takes one buffer from the pool for each frame, puts it where the frame's was in the ring, and
    // returns that one, in ring order; it drops nothing. The start takes one for each descriptor, in ring order, the stop
    // frees all of them. It would take several for a frame if a frame of the MTU with two more tags did not fit one: the
    // pool's buffers hold that. The device writes as many bytes to a buffer as SRRCTL says, in KiB: those of the pool's
    // buffers. (The longest frame, RLPML, is no bound: the PF keeps it, and may have refused it, or still have an earlier
    // one.) Frames compared on the wire and in the guest, in the VF lab.
    "net_e1000_igb_vf",
];

/// Descriptors of a receive queue that takes buffers early: each needs a place in a guest's ring, which most often has 256,
/// and the guest has to be able to give some meanwhile.
pub(super) const EARLY_DESCRIPTORS: u16 = 128;

/// Why the driver of this name may not receive into a guest's memory, if it may not.
pub(super) fn reason_to_copy_received(driver: &str) -> Option<Box<str>> {
    let known = TAKE_LATE.contains(&driver) || takes_early(driver);
    (!known).then(|| format!("{driver} is not known to use buffers in order and to give them back").into())
}

/// Whether it takes buffers before there are frames for them.
pub(super) fn takes_early(driver: &str) -> bool {
    TAKE_EARLY.contains(&driver)
}

/// Why the driver of this name may not send from a guest's memory, if it may not.
pub(super) fn reason_to_copy(driver: &str) -> Option<Box<str>> {
    let known = SEND_AT_ONCE.contains(&driver) || is_to_be_asked(driver);
    (!known).then(|| format!("{driver} is not known to be done with sent frames in time and in order").into())
}

/// Whether what it may send from a guest's memory may begin in an mbuf of ours.
pub(super) fn takes_heads(driver: &str) -> bool {
    TAKE_HEADS.contains(&driver)
}

/// Whether it is to be asked what it has sent.
pub(super) fn is_to_be_asked(driver: &str) -> bool {
    SEND_AND_ASK.contains(&driver)
}
