//! The vhost-user conversation of a front end that knows what it wants: features only out of what is offered.

use std::error::Error;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use rustix::event::{EventfdFlags, eventfd};

use super::driver::memory::{GPA, Memory};
use super::driver::{Addresses, Plan};
use super::frontend::{FrontEnd, feature, mem_table, pair, request, vring_addr};

pub type Outcome<T> = Result<T, Box<dyn Error>>;

pub const RING_PACKED: u64 = 1 << 34;
pub const IN_ORDER: u64 = 1 << 35;

const NAMES: [(u64, &str); 7] = [
    (feature::VERSION_1, "VERSION_1"),
    (feature::MRG_RXBUF, "MRG_RXBUF"),
    (feature::MQ, "MQ"),
    (feature::INDIRECT, "INDIRECT_DESC"),
    (feature::EVENT_IDX, "EVENT_IDX"),
    (RING_PACKED, "RING_PACKED"),
    (IN_ORDER, "IN_ORDER"),
];

/// A region as SET_MEM_TABLE describes it.
#[derive(Clone, Copy)]
pub struct RegionEntry([u64; 4]);

impl RegionEntry {
    pub fn encode(&self) -> Vec<u8> {
        self.0.iter().flat_map(|v| v.to_ne_bytes()).collect()
    }
}

/// A connection with features agreed on.
pub struct Connection {
    front_end: FrontEnd,
    started: Vec<u32>,
}

/// A started ring's eventfds; the device never needs `call`, the driver polls.
pub struct Doorbell {
    kick: OwnedFd,
    _call: OwnedFd,
}

impl Doorbell {
    pub fn kick(&self) {
        // It cannot fail short of 2^64 kicks that nobody reads.
        rustix::io::write(&self.kick, &1u64.to_ne_bytes()).expect("kick");
    }
}

impl Connection {
    /// Connects, or with `listen` waits to be connected to, and negotiates `wanted`, for so many pairs of rings.
    ///
    /// # Errors
    /// Something wanted is not offered.
    pub fn open(socket: &Path, listen: bool, wanted: u64, pairs: u32) -> Outcome<Self> {
        let mut front_end = if listen {
            let listener = UnixListener::bind(socket).map_err(|e| format!("listen on {}: {e}", socket.display()))?;
            let front_end = FrontEnd::accept(&listener);
            std::fs::remove_file(socket)?;
            front_end
        } else {
            FrontEnd::new(UnixStream::connect(socket).map_err(|e| format!("connect to {}: {e}", socket.display()))?)
        };
        let wanted = wanted | feature::VERSION_1 | if pairs > 1 { feature::MQ } else { 0 };
        let offered = front_end.features();
        let missing: Vec<_> =
            NAMES.iter().filter(|(bit, _)| wanted & !offered & bit != 0).map(|(_, name)| *name).collect();
        if !missing.is_empty() {
            return Err(format!("the back end does not offer {} (it offers {offered:#x})", missing.join(", ")).into());
        }
        front_end.must(request::SET_OWNER, &[], &[]);
        if offered & feature::PROTOCOL != 0 {
            let known = feature::PROTOCOL_MQ | feature::PROTOCOL_REPLY_ACK;
            let protocol = front_end.protocol_features() & known;
            front_end.must(request::SET_PROTOCOL_FEATURES, &protocol.to_ne_bytes(), &[]);
            front_end.reply_ack = protocol & feature::PROTOCOL_REPLY_ACK != 0;
            if pairs > 1 && (protocol & feature::PROTOCOL_MQ == 0 || front_end.queue_num() < pairs.into()) {
                return Err(format!("the back end has fewer than {pairs} pairs of rings").into());
            }
        }
        let features = wanted | offered & feature::PROTOCOL;
        front_end.must(request::SET_FEATURES, &features.to_ne_bytes(), &[]);
        Ok(Self { front_end, started: vec![] })
    }

    pub fn set_memory(&self, memory: &Memory) {
        let region = RegionEntry([GPA, memory.len as u64, memory.user(), 0]);
        self.front_end.must(request::SET_MEM_TABLE, &mem_table(&[region]), &[memory.file.as_fd()]);
    }

    /// Starts and enables a ring.
    pub fn start(&mut self, ring: u32, plan: &Plan, base: u32, at: Addresses) -> Outcome<Doorbell> {
        let fd = || eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC);
        let doorbell = Doorbell { kick: fd()?, _call: fd()? };
        let front_end = &self.front_end;
        front_end.must(request::SET_VRING_NUM, &pair(ring, plan.size.into()), &[]);
        front_end.must(request::SET_VRING_BASE, &pair(ring, base), &[]);
        front_end.must(request::SET_VRING_ADDR, &vring_addr(ring, at.descriptors, at.device, at.driver), &[]);
        let body = u64::from(ring).to_ne_bytes();
        front_end.must(request::SET_VRING_CALL, &body, &[doorbell._call.as_fd()]);
        front_end.must(request::SET_VRING_KICK, &body, &[doorbell.kick.as_fd()]);
        front_end.must(request::SET_VRING_ENABLE, &pair(ring, 1), &[]);
        self.started.push(ring);
        Ok(doorbell)
    }

    /// Stops all rings; then the device has shown all it ever will.
    pub fn stop(&mut self) -> Outcome<()> {
        for ring in self.started.drain(..) {
            self.front_end.ask(request::GET_VRING_BASE, &pair(ring, 0))?;
        }
        Ok(())
    }
}
