//! The vhost-user conversation of one port: features, messages, session state, reconnect.
//!
//! [`wire`] frames messages, [`message`] decodes them, [`Session`] answers them over one plain value, [`SessionState`], and asks
//! a [`Lanes`] for what a message needs done to the data plane. [`port`] is the thread that joins a
//! session, a VF and their lanes.

mod admission;
mod conversation;
pub mod features;
mod lane_set;
mod lanes;
mod lending;
pub mod message;
mod plan;
pub mod port;
mod port_log;
#[cfg(any(test, fuzzing))]
pub mod recorder;
#[cfg(any(test, fuzzing))]
pub mod script;
pub mod socket;
mod state;
#[cfg(test)]
mod tests;
pub mod wire;

pub use conversation::{Outcome, Session};
pub use features::{Offer, Offloads};
pub use state::{RingState, SessionState};

use std::sync::Arc;

use crate::guest::{Drained, GuestMemory};

/// What a message may need done to a port's lanes. Implemented by the port thread; by a recorder in tests.
pub trait Lanes {
    /// Brings every lane of the port home, paused: what is in flight stays in flight. Idempotent.
    /// The session calls it before it changes anything a lane looks at.
    fn pause(&mut self);

    /// The same for the lane of one ring, which is all that the session changes. Others may come home with it.
    fn pause_ring(&mut self, ring: usize);

    /// Stops one ring: takes it out of its (paused) lane with nothing of it in flight. Returns its used
    /// position, `None` if it was not running.
    fn stop_ring(&mut self, ring: usize) -> Option<u16>;

    /// Takes every ring out of its lane, drained. Positions go into `state.rings[..].base`.
    fn drain(&mut self, state: &mut SessionState) -> Drained;

    /// The state is consistent again: builds the rings that can run now, keeps those whose configuration
    /// did not change, hands the lanes out. A ring that cannot be built stays out and its reason is kept
    /// for `port.show`; that is not an error of the session.
    fn resume(&mut self, state: &SessionState, memory: &Arc<GuestMemory>);
}
