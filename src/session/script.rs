//! A front end driven by arbitrary bytes, over a real socket: for the fuzz target and the property test.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::features::{NET_MRG_RXBUF, PROTOCOL_FEATURES, VERSION_1};
use super::recorder::Recorder;
use super::wire::{Connection, Received};
use super::{Offer, Offloads, Outcome, Session};

const PAGE: u64 = 4096;
/// Each ring has a page in each region.
const REGION: u64 = 4 * PAGE;

/// Plays a script: one operation is a byte that chooses, and a few that are its parameters. Most
/// messages come out well-formed, so that scripts get far; any part of one can be wrong.
///
/// # Panics
/// If the session breaks a rule of [`Recorder`], or the end leaves a ring in a lane.
pub fn play(script: &[u8]) {
    let mut bytes = script.iter().copied();
    let offer = Offer::resolve(&Offloads::Auto, None, 2, 1500);
    let mut lanes = Recorder::default();
    let files: Vec<OwnedFd> = (0..2).map(|_| memfd()).collect();
    let mut front_end = FrontEnd::new(offer);
    while let Some(operation) = bytes.next() {
        let mut parameter = || bytes.next().unwrap_or(0);
        if operation & 0xc0 == 0xc0 {
            // Traffic: a running ring moves on.
            let ring = usize::from(operation & 3);
            if let Some(running) = lanes.rings.get_mut(&ring) {
                running.position = running.position.wrapping_add(parameter().into());
            }
            continue;
        }
        let code = u32::from(operation & 0x3f);
        let (mut body, mut fds) = well_formed(code, &files, &mut parameter);
        if operation & 0xc0 == 0x80 {
            // Something about it is wrong, perhaps.
            let (what, how) = (parameter(), parameter());
            match what % 4 {
                0 => body.resize(how.into(), how),
                1 => fds.truncate(usize::from(how) % 3),
                2 => fds.extend((0..how % 40).map(|_| new_eventfd())),
                _ => {
                    if let Some(byte) = body.get_mut(usize::from(what / 4)) {
                        *byte ^= how;
                    }
                }
            }
        }
        let flags = 1 | u32::from(operation & 0x40 != 0) << 3;
        if !front_end.say(code, flags, &body, &fds) || !front_end.listen(&mut lanes) {
            // The connection is closed; the front end connects again.
            drop(std::mem::replace(&mut front_end, FrontEnd::new(offer)).session.suspend(&mut lanes));
            assert!(lanes.rings.is_empty());
        }
        lanes.check(&front_end.session);
        lanes.take_calls();
    }
    // And once more from a saved state.
    let running: Vec<_> = lanes.rings.iter().map(|(ring, running)| (*ring, running.position)).collect();
    let saved = front_end.session.suspend(&mut lanes);
    assert!(lanes.rings.is_empty());
    let session = Session::resume(offer, saved, &mut lanes).expect("it ran a moment ago");
    lanes.check(&session);
    let resumed: Vec<_> = lanes.rings.iter().map(|(ring, running)| (*ring, running.position)).collect();
    assert_eq!(running, resumed);
    session.suspend(&mut lanes);
}

struct FrontEnd {
    session: Session,
    peer: UnixStream,
    connection: Connection,
}

impl FrontEnd {
    fn new(offer: Offer) -> Self {
        let (peer, ours) = UnixStream::pair().expect("a socket pair");
        let connection = Connection::new(ours).expect("a connection");
        Self { session: Session::new(offer), peer, connection }
    }

    /// Sends one message. `false`: the kernel would not take it.
    fn say(&self, code: u32, flags: u32, body: &[u8], fds: &[OwnedFd]) -> bool {
        let mut message: Vec<u8> = [code, flags, body.len() as u32].into_iter().flat_map(u32::to_ne_bytes).collect();
        message.extend(body);
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        }
        sendmsg(&self.peer, &[IoSlice::new(&message)], &mut control, SendFlags::empty()).is_ok()
    }

    /// Handles what has come. `false`: the connection is to be closed.
    fn listen(&mut self, lanes: &mut Recorder) -> bool {
        loop {
            let request = match self.connection.poll_request() {
                Ok(Received::Request(request)) => request,
                Ok(Received::Pending) => return true,
                Ok(Received::Closed) => panic!("the front end is there"),
                Err(_) => return false,
            };
            match self.session.handle(request, lanes) {
                // Replies are not sent: nobody would read them.
                Ok(Outcome::Silent | Outcome::Reply(_) | Outcome::Refused(..)) => {}
                Err(_) => return false,
            }
        }
    }
}

fn well_formed(code: u32, files: &[OwnedFd], parameter: &mut impl FnMut() -> u8) -> (Vec<u8>, Vec<OwnedFd>) {
    let u64_body = |value: u64| value.to_ne_bytes().to_vec();
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<_>>();
    let region = |which: u8| {
        let slot = u64::from(which & 3);
        let file = &files[usize::from(which >> 2 & 1)];
        let at = slot * REGION;
        let body: Vec<u8> = [at, REGION, 0x10_0000 + at, at].into_iter().flat_map(u64::to_ne_bytes).collect();
        (body, file.try_clone().expect("an fd"))
    };
    match code {
        2 => {
            let choice = parameter();
            let bits = [(1, PROTOCOL_FEATURES), (2, VERSION_1), (4, NET_MRG_RXBUF), (128, 1 << 34)];
            let chosen = bits.iter().filter(|(bit, _)| choice & bit != 0);
            (u64_body(chosen.fold(0, |all, (_, bit)| all | bit)), Vec::new())
        }
        16 => (u64_body(if parameter() & 1 == 0 { 0x1_a019 } else { 0x1 }), Vec::new()),
        20 | 39 => (u64_body(u64::from(parameter()) << (parameter() % 8)), Vec::new()),
        8 => (words(&[u32::from(parameter() % 5), 1 << (parameter() % 18)]), Vec::new()),
        10 | 11 => (words(&[u32::from(parameter() % 5), u32::from(parameter()) << 8]), Vec::new()),
        18 => (words(&[u32::from(parameter() % 5), u32::from(parameter() % 3)]), Vec::new()),
        9 => {
            let ring = parameter() % 5;
            let at = 0x10_0000 + u64::from(ring) * PAGE + u64::from(parameter() & 3) * REGION;
            let mut body = words(&[ring.into(), 0]);
            body.extend([at, at + 2048, at + 1024, 0].into_iter().flat_map(u64::to_ne_bytes));
            (body, Vec::new())
        }
        12..=14 => match (parameter() % 5, parameter() & 1) {
            (ring, 0) => (u64_body(ring.into()), vec![new_eventfd()]),
            (ring, _) => (u64_body(u64::from(ring) | 1 << 8), Vec::new()),
        },
        5 => {
            let count = parameter() % 5;
            let (mut body, mut fds) = (u64_body(count.into()), Vec::new());
            for _ in 0..count {
                let (bytes, fd) = region(parameter());
                body.extend(bytes);
                fds.push(fd);
            }
            (body, fds)
        }
        37 | 38 => {
            let (bytes, fd) = region(parameter());
            let mut body = vec![0; 8];
            body.extend(bytes);
            (body, if code == 37 { vec![fd] } else { Vec::new() })
        }
        _ => (Vec::new(), Vec::new()),
    }
}

fn new_eventfd() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd")
}

fn memfd() -> OwnedFd {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd");
    ftruncate(&fd, 4 * REGION).expect("its size");
    fd
}
