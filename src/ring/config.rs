//! All that is needed to run a ring, as a session negotiated it.

use crate::guest::UserAddr;

/// Where a ring's three areas are, in the front end's address space (SET_VRING_ADDR).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingAddresses {
    /// Split: descriptor table. Packed: descriptor ring. 16-byte aligned.
    pub desc: UserAddr,
    /// Split: available ring, 2-byte aligned. Packed: driver event suppression, 4-byte aligned.
    pub avail: UserAddr,
    /// Split: used ring. Packed: device event suppression. 4-byte aligned.
    pub used: UserAddr,
}

/// Chosen once, at negotiation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingConfig {
    /// VIRTIO_F_RING_PACKED was negotiated.
    pub packed: bool,
    /// VIRTIO_F_IN_ORDER was negotiated.
    pub in_order: bool,
    /// Queue size, 1 to 32768; of a split ring a power of two (virtio 1.3, 2.7 and 2.8).
    pub size: u16,
    /// Where its areas are.
    pub addresses: RingAddresses,
    /// SET_VRING_BASE. Packed: the next descriptor to use and to take, with the wrap counter in bit 15. A
    /// split ring knows better: it goes on from used.idx.
    pub base: u16,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// VIRTIO_NET_F_MRG_RXBUF was negotiated.
    pub mergeable: bool,
    /// Length of the virtio-net header: 12 with VERSION_1 or MRG_RXBUF, else 10.
    pub header_len: usize,
    /// Longest frame taken from the guest, without the header, in bytes.
    pub max_frame: usize,
}
