//! Lanes that move no packets: they keep what real lanes keep of each ring, and check on every call
//! what real lanes rely on. For tests and the fuzz target.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Lanes, Session, SessionState};
use crate::guest::{Drained, GuestMemory};
use crate::ring::RingConfig;

/// One call of the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// [`Lanes::pause`] or [`Lanes::pause_ring`]
    Pause,
    /// [`Lanes::stop_ring`]
    StopRing(usize),
    /// [`Lanes::drain`]
    Drain,
    /// [`Lanes::resume`]
    Resume,
}

/// A ring in a lane.
#[derive(Debug)]
pub struct Running {
    /// What it was built with.
    pub config: RingConfig,
    /// Its used position.
    pub position: u16,
    /// The table it was built over.
    pub memory: Arc<GuestMemory>,
    /// As the lane was last told.
    pub enabled: bool,
}

/// The recorder.
#[derive(Debug, Default)]
pub struct Recorder {
    /// Calls since the last [`Self::take_calls`].
    pub calls: Vec<Call>,
    /// Rings in lanes.
    pub rings: BTreeMap<usize, Running>,
    out: bool,
    /// The only ring whose lane was brought home, if not all were.
    only: Option<usize>,
}

impl Recorder {
    /// Longest frame, as a port would set it.
    const MAX_FRAME: usize = 1522;

    /// The calls so far; forgets them.
    pub fn take_calls(&mut self) -> Vec<Call> {
        std::mem::take(&mut self.calls)
    }

    /// The rule of ring states: what is in lanes is exactly what is started and complete, as the session
    /// knows it, over the session's memory.
    ///
    /// # Panics
    /// If it is not so.
    pub fn check(&self, session: &Session) {
        let state = session.state();
        for index in 0..state.rings.len() {
            let running = self.rings.get(&index);
            let expected = state.ring_config(index, Self::MAX_FRAME);
            match (running, expected) {
                (None, None) => {}
                (Some(running), Some(expected)) => {
                    assert!(self.out, "ring {index} is not in a lane that is out");
                    assert_eq!(RingConfig { base: 0, ..running.config }, RingConfig { base: 0, ..expected });
                    assert_eq!(running.enabled, state.rings[index].enabled);
                    assert!(Arc::ptr_eq(&running.memory, session.memory()));
                }
                (running, expected) => panic!("ring {index}: in lane {running:?}, expected {expected:?}"),
            }
        }
        assert_eq!(session.memory().regions().len(), state.regions.len());
    }
}

impl Lanes for Recorder {
    fn pause(&mut self) {
        self.calls.push(Call::Pause);
        self.out = false;
        self.only = None;
    }

    fn pause_ring(&mut self, ring: usize) {
        self.pause();
        self.only = Some(ring);
    }

    fn stop_ring(&mut self, ring: usize) -> Option<u16> {
        assert!(!self.out, "a ring is stopped in a lane that is home");
        self.calls.push(Call::StopRing(ring));
        self.rings.remove(&ring).map(|running| running.position)
    }

    fn drain(&mut self, state: &mut SessionState) -> Drained {
        assert!(!self.out, "lanes are drained at home");
        self.calls.push(Call::Drain);
        for (index, running) in std::mem::take(&mut self.rings) {
            state.rings[index].base = running.position;
        }
        Drained::attest()
    }

    fn resume(&mut self, state: &SessionState, memory: &Arc<GuestMemory>) {
        assert!(!self.out || self.rings.is_empty(), "the session changed something under a lane that was out");
        self.calls.push(Call::Resume);
        self.out = true;
        for (&index, running) in self.rings.iter().filter(|(index, _)| self.only.is_some_and(|only| only != **index)) {
            let config = state.ring_config(index, Self::MAX_FRAME).map(|config| RingConfig { base: 0, ..config });
            assert_eq!(config, Some(RingConfig { base: 0, ..running.config }), "ring {index} was not paused");
            assert_eq!(running.enabled, state.rings[index].enabled, "ring {index} was not paused");
            assert!(Arc::ptr_eq(&running.memory, memory), "ring {index} was not paused");
        }
        self.only = None;
        for &index in self.rings.keys() {
            assert!(state.runs(index), "ring {index} must be stopped before it may disappear");
        }
        for index in 0..state.rings.len() {
            if let Some(config) = state.ring_config(index, Self::MAX_FRAME) {
                let position = self.rings.get(&index).map_or(config.base, |running| running.position);
                let (memory, enabled) = (memory.clone(), state.rings[index].enabled);
                self.rings.insert(index, Running { config, position, memory, enabled });
            }
        }
    }
}
