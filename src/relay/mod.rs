//! Lanes and poll cores: how packets move. Knows `ring`, `guest` and `vf`, and nothing above.
//!
//! Start with [`lane`].

mod checksum;
mod completions;
mod counters;
mod doorbell;
mod guest_to_vf;
mod headers;
mod interrupt;
pub mod lane;
mod mailbox;
mod offload;
mod owed;
mod poller;
mod segment;
#[cfg(test)]
pub(crate) mod tests;
mod turnover;
mod tx_seat;
mod vf_to_guest;
mod watchdog;

pub use completions::Completions;
pub use counters::{Cause, DirectionCounters, Dropped, LaneCounters, LaneSnapshot, Shortage};
pub use doorbell::{Doorbell, NotifyMark};
pub use guest_to_vf::GuestToVf;
pub use lane::{Lane, LaneId, Moving, RingPlan, Trigger, Turn};
pub use mailbox::{Bell, Mailbox};
pub use offload::TxRules;
pub use poller::{CoreGauge, IdlePolicy, Poller};
pub use vf_to_guest::{MAX_PAIRS, VfToGuest};
pub use watchdog::Watchdog;
