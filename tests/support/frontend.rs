//! The front end's side of a vhost-user connection. Every message can be sent as the specification
//! wants it, or raw: any header, any body, any fds.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};

use super::memory::RegionEntry;

/// Request numbers (vhost-user specification, "Front-end message types").
pub mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SEND_RARP: u32 = 19;
    pub const NET_SET_MTU: u32 = 20;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const IOTLB_MSG: u32 = 22;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
}

/// Virtio and protocol feature bits.
pub mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MTU: u64 = 1 << 3;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const MQ: u64 = 1 << 22;
    pub const LOG_ALL: u64 = 1 << 26;
    pub const INDIRECT: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const PROTOCOL: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
    pub const RING_PACKED: u64 = 1 << 34;
    pub const IN_ORDER: u64 = 1 << 35;

    pub const PROTOCOL_MQ: u64 = 1 << 0;
    pub const PROTOCOL_LOG_SHMFD: u64 = 1 << 1;
    pub const PROTOCOL_REPLY_ACK: u64 = 1 << 3;
    pub const PROTOCOL_NET_MTU: u64 = 1 << 4;
    pub const PROTOCOL_RESET_DEVICE: u64 = 1 << 13;
    pub const PROTOCOL_CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub const PROTOCOL_STATUS: u64 = 1 << 16;
}

pub const VERSION: u32 = 1;
pub const FLAG_REPLY: u32 = 1 << 2;
pub const FLAG_NEED_REPLY: u32 = 1 << 3;
/// In the payload of SET_VRING_KICK, CALL and ERR: no fd comes with it.
pub const NO_FD: u64 = 1 << 8;

/// A message that came from the back end.
#[derive(Debug)]
pub struct Reply {
    pub request: u32,
    pub flags: u32,
    pub body: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Reply {
    pub fn u64(&self) -> u64 {
        u64::from_ne_bytes(self.body[..].try_into().expect("an 8-byte reply"))
    }
}

/// What became of a message.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Acknowledged with 0.
    Accepted,
    /// Acknowledged with something else.
    Refused,
    /// The back end closed the connection.
    Closed,
}

#[derive(Debug)]
pub struct FrontEnd {
    stream: UnixStream,
    /// REPLY_ACK was negotiated.
    pub reply_ack: bool,
    /// RING_PACKED was negotiated.
    pub packed: bool,
}

impl FrontEnd {
    /// Over a connection that somebody made.
    pub fn new(stream: UnixStream) -> Self {
        // Longer than anything a sane back end takes, so that a hang is a failure and not a hang.
        stream.set_read_timeout(Some(super::PATIENCE)).expect("timeout");
        stream.set_write_timeout(Some(super::PATIENCE)).expect("timeout");
        Self { stream, reply_ack: false, packed: false }
    }

    /// Connects to a back end that listens, waiting for its socket to appear.
    pub fn connect(path: &Path) -> Self {
        let start = Instant::now();
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => return Self::new(stream),
                Err(error) => assert!(start.elapsed() < super::PATIENCE, "connect to {path:?}: {error}"),
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits for a back end in client role.
    pub fn accept(listener: &UnixListener) -> Self {
        let fd = listener.as_fd();
        assert!(readable(fd, super::PATIENCE), "no back end connected in time");
        Self::new(listener.accept().expect("accept").0)
    }

    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends bytes as they are.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        // No SIGPIPE: a closed connection is an answer here, not the end of the test.
        let sent = rustix::net::sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
        assert_eq!(sent, bytes.len(), "short send on a Unix socket");
        Ok(())
    }

    /// Sends one message with `flags` besides the version.
    pub fn send(&self, request: u32, flags: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send_bytes(&message(request, VERSION | flags, body.len() as u32, body), fds)
    }

    /// Receives one message. `UnexpectedEof` when the back end closed the connection.
    pub fn receive(&self) -> io::Result<Reply> {
        let mut header = [0; 12];
        let mut fds = Vec::new();
        self.receive_exact(&mut header, &mut fds)?;
        let word = |i: usize| u32::from_ne_bytes(header[i..i + 4].try_into().expect("4 bytes"));
        let size = word(8);
        assert!(size <= 4096, "reply of {size} bytes");
        let mut body = vec![0; size as usize];
        self.receive_exact(&mut body, &mut fds)?;
        Ok(Reply { request: word(0), flags: word(4), body, fds })
    }

    /// As [`Self::receive`], where silence is an answer too.
    pub fn receive_within(&self, timeout: Duration) -> Option<io::Result<Reply>> {
        readable(self.stream.as_fd(), timeout).then(|| self.receive())
    }

    fn receive_exact(&self, mut into: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<()> {
        while !into.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let got = rustix::net::recvmsg(
                &self.stream,
                &mut [IoSliceMut::new(into)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            )?;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    fds.extend(rights);
                }
            }
            if got.bytes == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            into = &mut into[got.bytes..];
        }
        Ok(())
    }

    /// A request the back end answers with data.
    pub fn ask(&self, request: u32, body: &[u8]) -> io::Result<Reply> {
        self.send(request, 0, body, &[])?;
        let reply = self.receive()?;
        assert_eq!(reply.request, request, "the reply is to another request: {reply:?}");
        assert_eq!(reply.flags, VERSION | FLAG_REPLY, "wrong reply flags: {reply:?}");
        Ok(reply)
    }

    /// A request without data in its answer: acknowledged where REPLY_ACK allows it.
    pub fn tell(&self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<Option<u64>> {
        let flags = if self.reply_ack { FLAG_NEED_REPLY } else { 0 };
        self.send(request, flags, body, fds)?;
        if !self.reply_ack {
            return Ok(None);
        }
        let reply = self.receive()?;
        assert_eq!(reply.request, request, "the acknowledgement is to another request: {reply:?}");
        Ok(Some(reply.u64()))
    }

    /// As [`Self::tell`], when nothing but success will do.
    #[track_caller]
    pub fn must(&self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) {
        match self.tell(request, body, fds) {
            Ok(None | Some(0)) => {}
            other => panic!("request {request} refused: {other:?}"),
        }
    }

    /// Sends a request and says what the back end thought of it. Without REPLY_ACK, a following
    /// GET_FEATURES shows whether the connection survived.
    pub fn verdict(&self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> Verdict {
        match self.tell(request, body, fds) {
            Ok(Some(0)) => Verdict::Accepted,
            Ok(Some(_)) => Verdict::Refused,
            Ok(None) => match self.ask(request::GET_FEATURES, &[]) {
                Ok(_) => Verdict::Accepted,
                Err(error) => closed(&error),
            },
            Err(error) => closed(&error),
        }
    }

    /// Whether the back end still answers.
    pub fn alive(&self) -> bool {
        self.ask(request::GET_FEATURES, &[]).is_ok()
    }

    /// Waits for the back end to close the connection.
    #[track_caller]
    pub fn expect_close(&self) {
        match self.receive() {
            Ok(reply) => panic!("a reply where a closed connection was expected: {reply:?}"),
            Err(error) => assert_eq!(closed(&error), Verdict::Closed),
        }
    }

    pub fn features(&self) -> u64 {
        self.ask(request::GET_FEATURES, &[]).expect("GET_FEATURES").u64()
    }

    pub fn protocol_features(&self) -> u64 {
        self.ask(request::GET_PROTOCOL_FEATURES, &[]).expect("GET_PROTOCOL_FEATURES").u64()
    }

    pub fn queue_num(&self) -> u64 {
        self.ask(request::GET_QUEUE_NUM, &[]).expect("GET_QUEUE_NUM").u64()
    }

    /// Stops a ring; its position.
    pub fn get_vring_base(&self, ring: u32) -> io::Result<u16> {
        let reply = self.ask(request::GET_VRING_BASE, &pair(ring, 0))?;
        assert_eq!(reply.body.len(), 8, "{reply:?}");
        assert_eq!(reply.body[..4], ring.to_ne_bytes(), "another ring's position: {reply:?}");
        let base = u32::from_ne_bytes(reply.body[4..].try_into().expect("4 bytes"));
        if self.packed {
            assert_eq!(base >> 16, base & 0xffff, "where it reads and where it writes");
            return Ok(base as u16);
        }
        Ok(u16::try_from(base).expect("a split ring's position has 16 bits"))
    }

    pub fn set_mem_table(&self, regions: &[(RegionEntry, BorrowedFd<'_>)]) {
        let entries: Vec<_> = regions.iter().map(|(entry, _)| *entry).collect();
        let fds: Vec<_> = regions.iter().map(|(_, fd)| *fd).collect();
        self.must(request::SET_MEM_TABLE, &mem_table(&entries), &fds);
    }

    pub fn set_vring_enable(&self, ring: u32, on: bool) {
        self.must(request::SET_VRING_ENABLE, &pair(ring, on.into()), &[]);
    }
}

/// An error of a connection that is gone; anything else (a timeout above all) fails the test.
#[track_caller]
pub fn closed(error: &io::Error) -> Verdict {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    assert!(
        matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof),
        "neither an answer nor a closed connection: {error}"
    );
    Verdict::Closed
}

/// A message as bytes, with any header.
pub fn message(request: u32, flags: u32, size: u32, body: &[u8]) -> Vec<u8> {
    let header = [request, flags, size];
    let mut bytes: Vec<u8> = header.iter().flat_map(|v| v.to_ne_bytes()).collect();
    bytes.extend_from_slice(body);
    bytes
}

/// The body of messages that carry a ring and a number.
pub fn pair(ring: u32, value: u32) -> [u8; 8] {
    (u64::from(value) << 32 | u64::from(ring)).to_ne_bytes()
}

/// The body of SET_VRING_ADDR. Addresses are the front end's own.
pub fn vring_addr(ring: u32, desc: u64, used: u64, avail: u64) -> Vec<u8> {
    let mut body = pair(ring, 0).to_vec();
    body.extend([desc, used, avail, 0].iter().flat_map(|v| v.to_ne_bytes()));
    body
}

/// The body of SET_MEM_TABLE.
pub fn mem_table(regions: &[RegionEntry]) -> Vec<u8> {
    let mut body = pair(regions.len() as u32, 0).to_vec();
    body.extend(regions.iter().flat_map(RegionEntry::encode));
    body
}

/// The body of ADD_MEM_REG and REM_MEM_REG.
pub fn mem_reg(region: &RegionEntry) -> Vec<u8> {
    let mut body = 0u64.to_ne_bytes().to_vec();
    body.extend(region.encode());
    body
}

/// Waits until `fd` is readable; whether it became so.
pub fn readable(fd: BorrowedFd<'_>, timeout: Duration) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let timeout = Timespec::try_from(timeout).expect("a sane timeout");
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    poll(&mut fds, Some(&timeout)).expect("poll") > 0
}
