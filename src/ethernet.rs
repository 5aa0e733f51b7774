//! Lengths of Ethernet frames, without FCS.

/// Header without tags.
pub const HEADER: usize = 14;

/// The longest header that is taken: with two VLAN tags.
pub const TAGGED_HEADER: usize = HEADER + 2 * 4;

/// The smallest MTU there can be (RFC 791, and virtio 1.3, 5.1.4.1).
pub const MIN_MTU: u16 = 68;

/// Largest MTU a port can have: jumbo frames, and what 9216-byte switches carry.
pub const MAX_MTU: u16 = 9216;

/// Longest frame that is segmented: 64 KiB of IP.
pub const MAX_TSO_FRAME: usize = TAGGED_HEADER + u16::MAX as usize;
