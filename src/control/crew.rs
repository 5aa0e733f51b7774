//! What control asks of other threads, and what they tell it.

use super::PortId;
use super::placement::Cores;
use crate::error::{Error, Result};
use crate::session::Offer;
use crate::session::port::{PortPlan, PortStatus, SocketPlan, VfStatus, ZeroCopy};
use crate::vf::{Mac, VfCaps, VfConfig, VfSpec};

/// The threads that do what control decides. Every method returns at once (it queues a message); the
/// answer is an [`Event`]. Implemented over the device thread and the port threads; by a recorder in
/// tests.
///
/// Control keeps to this protocol, so that events need no generation numbers:
/// * per port at most one of `probe`/`remove` is unanswered, one `open`, one `give_vf`, one `change`, one `close`;
/// * `give_vf`, `change` and `close` only after `Opened(Ok)`, nothing to the port's thread after `close`,
///   and no new `open` before `Closed`;
/// * a VF is in one place: with the device thread (until `Probed`, after `remove`), with control, or with
///   the port thread (from `give_vf` until `VfFailed { vf: Some }` or `Closed { vf: Some }`).
pub trait Crew {
    /// A probed VF. Control only carries it from one thread to another; it calls nothing on it.
    type Vf: Send;

    /// Device thread: find or create the VF. Answer: [`Event::Probed`].
    fn probe(&mut self, port: &PortId, vf: &VfSpec);

    /// Device thread: close and remove the VF. Answer: [`Event::Removed`].
    fn remove(&mut self, port: &PortId, vf: Self::Vf);

    /// Starts the port's thread. Answer: [`Event::Opened`]. On failure the thread is gone and nothing is
    /// left of its socket.
    fn open(&mut self, plan: PortPlan);

    /// Port thread: configure and start the VF, which was probed as `spec`, then forward. Answer:
    /// [`Event::VfReady`] or [`Event::VfFailed`].
    fn give_vf(&mut self, port: &PortId, spec: VfSpec, vf: Self::Vf, config: VfConfig);

    /// Port thread: change attributes. Answer: [`Event::Changed`].
    fn change(&mut self, port: &PortId, change: PortChange);

    /// Port thread: drain, stop the VF, remove the socket, end. Answer: [`Event::Closed`], the last event
    /// of this thread (an unanswered `give_vf` is answered before it; a `change` may stay unanswered).
    fn close(&mut self, port: &PortId);
}

/// Attributes of an open port that change. What is `None` stays.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortChange {
    /// Now: cores of its lanes, by number.
    pub cores: Option<Cores>,
    /// Now: whether frames may be moved without a copy.
    pub zero_copy: Option<ZeroCopy>,
    /// Now, of the VF in place (without one there is nothing to do).
    pub mac: Option<Mac>,
    /// Now: owner, group and mode of a listening socket; path and role are those it has.
    pub socket: Option<SocketPlan>,
    /// As soon as no guest is connected, and before the next one is: what guests are offered and how the VF
    /// is configured. Replaces an earlier one that still waits. A VF is configured once in its life:
    /// the one in place comes back as [`Event::VfFailed`], to be probed afresh and given again.
    pub next_connection: Option<(Offer, VfConfig)>,
}

/// What the crew tells control. `V` is [`Crew::Vf`].
#[derive(Debug)]
pub enum Event<V> {
    /// Answer to [`Crew::probe`].
    Probed {
        /// Whose.
        port: PortId,
        /// [`Error::VfAbsent`]: not there yet, control asks again in a second.
        result: Result<(V, VfCaps)>,
    },
    /// Answer to [`Crew::remove`].
    Removed {
        /// Whose.
        port: PortId,
        /// A VF that could not be removed is lost to this daemon; control logs it.
        result: Result<()>,
    },
    /// Answer to [`Crew::open`]: the server socket listens with its final owner and mode, or the client has
    /// begun to try.
    Opened {
        /// Whose.
        port: PortId,
        /// Why not.
        result: Result<()>,
    },
    /// Answer to [`Crew::give_vf`]: the VF forwards. Sent again whenever it was looked at (link, xstats).
    VfReady {
        /// Whose.
        port: PortId,
        /// The VF.
        status: VfStatus,
    },
    /// Answer to [`Crew::give_vf`], or at any time later: the VF does not forward (any more).
    VfFailed {
        /// Whose.
        port: PortId,
        /// Why.
        error: Error,
        /// The VF, stopped; `None` if it no longer exists.
        vf: Option<V>,
    },
    /// Answer to [`Crew::change`].
    Changed {
        /// Whose.
        port: PortId,
        /// Why not; what the port had stays.
        result: Result<()>,
    },
    /// The port thread's view has changed.
    Status {
        /// Whose.
        port: PortId,
        /// All of it.
        status: PortStatus,
    },
    /// Answer to [`Crew::close`]: thread and socket are gone.
    Closed {
        /// Whose.
        port: PortId,
        /// The VF, stopped, if the thread had one.
        vf: Option<V>,
    },
    /// The daemon ends: take every port down, refuse new ones.
    Stop,
}
