//! Tests of the conversation, without sockets unless they are about sockets.

pub(super) mod fds;
mod front_ends;
mod lanes;
mod memory;
mod offloads;
mod replies;
mod ring_states;
mod sequences;
mod steering;
mod traffic;
mod wire;

use std::os::fd::OwnedFd;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::message::FrontendReq as Req;

use super::features::{PROTOCOL_FEATURES, VERSION_1};
use super::recorder::{Call, Recorder};
use super::wire::{Reply, Request};
use super::{Offer, Offloads, Outcome, Session};
use crate::error::Result;

/// The memory of our guests: 1 MiB at these addresses.
pub(super) const GPA: u64 = 0x10_0000;
pub(super) const USER: u64 = 0x7f00_0000_0000;
pub(super) const SIZE: u64 = 0x10_0000;

pub(super) fn offer(queue_pairs: u16) -> Offer {
    Offer::resolve(&Offloads::Auto, None, queue_pairs, 1500)
}

/// A session in conversation.
pub(super) struct Talk {
    pub session: Session,
    pub lanes: Recorder,
}

impl Talk {
    pub fn new(queue_pairs: u16) -> Self {
        Self { session: Session::new(offer(queue_pairs)), lanes: Recorder::default() }
    }

    /// As [`Self::new`], with everything negotiated that is offered.
    pub fn negotiated(queue_pairs: u16) -> Self {
        let mut talk = Self::new(queue_pairs);
        talk.ok(u64_message(Req::SET_PROTOCOL_FEATURES, offer(1).protocol_features));
        talk.ok(u64_message(Req::SET_FEATURES, PROTOCOL_FEATURES | VERSION_1));
        talk
    }

    /// Hands over one message, and checks the rule of ring states behind it.
    pub fn send(&mut self, request: Request) -> Result<Outcome> {
        let outcome = self.session.handle(request, &mut self.lanes);
        self.lanes.check(&self.session);
        outcome
    }

    /// A message that must be accepted without a reply.
    #[track_caller]
    pub fn ok(&mut self, request: Request) {
        let name = request.name();
        match self.send(request) {
            Ok(Outcome::Silent) => {}
            other => panic!("{name}: {other:?}"),
        }
    }

    /// A message that must be answered.
    #[track_caller]
    pub fn ask(&mut self, request: Request) -> u64 {
        let (name, code) = (request.name(), request.code);
        match self.send(request) {
            Ok(Outcome::Reply(reply)) if reply.code == code => u64::from_ne_bytes(reply.body),
            other => panic!("{name}: {other:?}"),
        }
    }

    /// A message that must be refused, leaving everything as it was.
    #[track_caller]
    pub fn refused(&mut self, request: Request) -> String {
        let name = request.name();
        let before = format!("{:?}", self.session);
        self.lanes.take_calls();
        let error = match self.send(request) {
            Err(error) | Ok(Outcome::Refused(_, error)) => error,
            other => panic!("{name}: {other:?}"),
        };
        assert_eq!(self.lanes.take_calls(), [], "{name}");
        assert_eq!(format!("{:?}", self.session), before, "{name}");
        error.to_string()
    }

    /// GET_VRING_BASE: the position.
    #[track_caller]
    pub fn base(&mut self, ring: u32) -> u32 {
        let request = ring_message(Req::GET_VRING_BASE, ring, 0);
        let expected = Reply::ring_state(request.code, ring, 0).body;
        let body = self.ask(request).to_ne_bytes();
        assert_eq!(body[..4], expected[..4], "the index comes back");
        u32::from_ne_bytes(body[4..].try_into().unwrap())
    }

    /// Sets up and starts ring `ring`, 256 entries, at a place of its own.
    #[track_caller]
    pub fn start(&mut self, ring: u32) {
        self.ok(ring_message(Req::SET_VRING_NUM, ring, 256));
        self.ok(ring_message(Req::SET_VRING_BASE, ring, 0));
        self.ok(addresses(ring, 0));
        self.ok(eventfd_message(Req::SET_VRING_KICK, ring));
    }

    pub fn ring(&self, index: usize) -> &super::RingState {
        &self.session.state().rings[index]
    }
}

pub(super) fn message(code: Req, body: &[u8], fds: Vec<OwnedFd>) -> Request {
    Request { code: code.into(), need_reply: false, body: body.to_vec(), fds }
}

pub(super) fn empty(code: Req) -> Request {
    message(code, &[], Vec::new())
}

pub(super) fn u64_message(code: Req, value: u64) -> Request {
    message(code, &value.to_ne_bytes(), Vec::new())
}

pub(super) fn ring_message(code: Req, ring: u32, number: u32) -> Request {
    message(code, &Reply::ring_state(0, ring, number).body, Vec::new())
}

pub(super) fn new_eventfd() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

pub(super) fn eventfd_message(code: Req, ring: u32) -> Request {
    message(code, &u64::from(ring).to_ne_bytes(), vec![new_eventfd()])
}

/// The same without an fd.
pub(super) fn no_fd_message(code: Req, ring: u32) -> Request {
    u64_message(code, u64::from(ring) | 1 << 8)
}

/// SET_VRING_ADDR: each ring has 64 KiB of its own; `variant` moves it by a page.
pub(super) fn addresses(ring: u32, variant: u64) -> Request {
    let at = USER + u64::from(ring) * 0x1_0000 + variant * 0x1000;
    let mut body = Reply::ring_state(0, ring, 0).body.to_vec();
    for address in [at, at + 0x8000, at + 0x4000, 0] {
        body.extend(address.to_ne_bytes());
    }
    message(Req::SET_VRING_ADDR, &body, Vec::new())
}

pub(super) fn memfd(size: u64) -> OwnedFd {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, size).unwrap();
    fd
}

/// Guest address, size, user address, offset: as a message carries them.
pub(super) type Region = [u64; 4];
pub(super) const REGION: Region = [GPA, SIZE, USER, 0];

pub(super) fn mem_table(regions: &[(Region, &OwnedFd)]) -> Request {
    let mut body = (regions.len() as u64).to_ne_bytes().to_vec();
    body.extend(regions.iter().flat_map(|(region, _)| *region).flat_map(u64::to_ne_bytes));
    let fds = regions.iter().map(|(_, fd)| fd.try_clone().unwrap()).collect();
    message(Req::SET_MEM_TABLE, &body, fds)
}

pub(super) fn mem_region(code: Req, region: Region, fd: Option<&OwnedFd>) -> Request {
    let mut body = vec![0; 8];
    body.extend(region.into_iter().flat_map(u64::to_ne_bytes));
    message(code, &body, fd.iter().map(|fd| fd.try_clone().unwrap()).collect())
}

pub(super) fn need_reply(request: Request) -> Request {
    Request { need_reply: true, ..request }
}

/// Whether the lanes were drained, or only paused, or not touched.
pub(super) fn depth(calls: &[Call]) -> &'static str {
    match calls {
        [] => "untouched",
        [Call::Pause, Call::Resume] => "paused",
        [Call::Pause, Call::StopRing(_), Call::Resume] => "ring stopped",
        [Call::Pause, Call::Drain, Call::Resume] => "drained",
        other => panic!("odd calls {other:?}"),
    }
}
