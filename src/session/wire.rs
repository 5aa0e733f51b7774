//! Framing: one message with its fds in, one reply out.
//!
//! Nothing here blocks: a message is collected over as many [`Connection::poll_request`] as it takes, so a
//! front end that stops in the middle of one holds up nobody. Exactly one message is read at a time,
//! never into the next, so the fds of a message are those that came with its own bytes.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendFlags, recvmsg, sendmsg,
};
use vhost::vhost_user::message::{FrontendReq, MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE};

use crate::error::{Error, Result};

/// Request, flags, size: three u32 in host byte order.
pub const HEADER_LEN: usize = 12;
/// Longest body taken, in bytes.
pub const MAX_BODY: usize = MAX_MSG_SIZE;
/// Most fds taken with one message.
pub const MAX_FDS: usize = MAX_ATTACHED_FD_ENTRIES;

/// Protocol version 1 in bits 0 and 1 of the flags.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 0b11;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;

/// How long a reply may wait for room in the socket. A front end that leaves hundreds of replies
/// unread is broken; waiting for it would hold up detach.
const REPLY_TIMEOUT: Duration = Duration::from_millis(200);

/// One message of the front end, undecoded.
#[derive(Debug)]
pub struct Request {
    /// Message number.
    pub code: u32,
    /// The need_reply flag; it counts only where REPLY_ACK is negotiated.
    pub need_reply: bool,
    /// Body, at most [`MAX_BODY`] bytes.
    pub body: Vec<u8>,
    /// Fds, at most [`MAX_FDS`], close-on-exec.
    pub fds: Vec<OwnedFd>,
}

impl Request {
    /// The name of the message, for people.
    pub fn name(&self) -> String {
        message_name(self.code)
    }
}

/// The name of message `code`, for people.
pub fn message_name(code: u32) -> String {
    match FrontendReq::try_from(code) {
        Ok(request) => format!("{request:?}"),
        Err(_) => format!("message {code}"),
    }
}

/// A reply. Every reply we give has a body of eight bytes: a u64, or the index and number of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The message it answers.
    pub code: u32,
    /// Its body, in host byte order.
    pub body: [u8; 8],
}

impl Reply {
    /// A reply that carries a u64.
    pub fn u64(code: u32, value: u64) -> Self {
        Self { code, body: value.to_ne_bytes() }
    }

    /// A reply that carries the state of a ring.
    pub fn ring_state(code: u32, index: u32, number: u32) -> Self {
        let mut body = [0; 8];
        body[..4].copy_from_slice(&index.to_ne_bytes());
        body[4..].copy_from_slice(&number.to_ne_bytes());
        Self { code, body }
    }

    /// The whole message.
    pub fn to_bytes(self) -> [u8; HEADER_LEN + 8] {
        let mut bytes = [0; HEADER_LEN + 8];
        bytes[..4].copy_from_slice(&self.code.to_ne_bytes());
        bytes[4..8].copy_from_slice(&(VERSION | FLAG_REPLY).to_ne_bytes());
        bytes[8..12].copy_from_slice(&8_u32.to_ne_bytes());
        bytes[12..].copy_from_slice(&self.body);
        bytes
    }
}

/// What a look at the socket gave.
#[derive(Debug)]
pub enum Received {
    /// A whole message.
    Request(Request),
    /// No whole message yet: wait until the socket is readable.
    Pending,
    /// The front end has gone, between two messages.
    Closed,
}

/// A connected front end.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    header: [u8; HEADER_LEN],
    /// Bytes of header and body received so far.
    filled: usize,
    /// The body, at its full length as soon as the header is known.
    body: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Connection {
    /// Takes over a connected stream and makes it non-blocking.
    pub fn new(stream: UnixStream) -> Result<Self> {
        stream.set_nonblocking(true).map_err(Error::io("making the vhost-user connection non-blocking"))?;
        Ok(Self { stream, header: [0; HEADER_LEN], filled: 0, body: Vec::new(), fds: Vec::new() })
    }

    /// Reads on, without waiting. After an error the connection is out of step and must be dropped;
    /// every fd received is closed with it.
    pub fn poll_request(&mut self) -> Result<Received> {
        loop {
            if self.filled >= HEADER_LEN {
                let missing = HEADER_LEN + self.body.len() - self.filled;
                if missing == 0 {
                    return Ok(Received::Request(self.take_request()));
                }
            }
            match self.read_some() {
                Ok(0) | Err(Errno::CONNRESET | Errno::PIPE) if self.filled == 0 => {
                    return Ok(Received::Closed);
                }
                Ok(0) => {
                    return Err(Error::Protocol(format!(
                        "the front end closed the connection after {} bytes of a message",
                        self.filled
                    )));
                }
                Ok(count) => {
                    let had_header = self.filled >= HEADER_LEN;
                    self.filled += count;
                    if !had_header && self.filled == HEADER_LEN {
                        self.start_body()?;
                    }
                }
                Err(Errno::AGAIN) => return Ok(Received::Pending),
                Err(Errno::INTR) => {}
                Err(Errno::MSGSIZE) => {
                    return Err(Error::Protocol(format!(
                        "more than {MAX_FDS} fds with one message, or no fd numbers left here"
                    )));
                }
                Err(errno) => {
                    return Err(Error::io("receiving a vhost-user message")(errno.into()));
                }
            }
        }
    }

    /// Sends a reply. Waits at most `REPLY_TIMEOUT`; after an error the connection must be dropped.
    pub fn send(&mut self, reply: &Reply) -> Result<()> {
        let failed = |errno: Errno| {
            let what = format!("replying to {}", message_name(reply.code));
            Error::io(what)(io::Error::from(errno))
        };
        let bytes = reply.to_bytes();
        let deadline = Instant::now() + REPLY_TIMEOUT;
        let mut sent = 0;
        while sent < bytes.len() {
            let mut control = SendAncillaryBuffer::default();
            let iov = [IoSlice::new(&bytes[sent..])];
            match sendmsg(&self.stream, &iov, &mut control, SendFlags::NOSIGNAL) {
                Ok(count) => sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(failed(Errno::TIMEDOUT));
                    }
                    let left = Timespec { tv_sec: 0, tv_nsec: left.subsec_nanos().into() };
                    let mut poll_fds = [PollFd::new(&self.stream, PollFlags::OUT)];
                    match poll(&mut poll_fds, Some(&left)) {
                        Ok(_) | Err(Errno::INTR) => {}
                        Err(errno) => return Err(failed(errno)),
                    }
                }
                Err(errno) => return Err(failed(errno)),
            }
        }
        Ok(())
    }

    /// Reads up to the end of the header, or of the message. MSGSIZE stands for fds that were lost.
    fn read_some(&mut self) -> Result<usize, Errno> {
        let target = if self.filled < HEADER_LEN {
            &mut self.header[self.filled..]
        } else {
            &mut self.body[self.filled - HEADER_LEN..]
        };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            &self.stream,
            &mut [IoSliceMut::new(target)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
        )?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        // Alignment may leave room for more than we asked for, and a message may come in pieces.
        if received.flags.contains(ReturnFlags::CTRUNC) || self.fds.len() > MAX_FDS {
            return Err(Errno::MSGSIZE);
        }
        Ok(received.bytes)
    }

    fn header_field(&self, index: usize) -> u32 {
        let bytes = &self.header[4 * index..][..4];
        u32::from_ne_bytes(bytes.try_into().expect("four bytes"))
    }

    fn start_body(&mut self) -> Result<()> {
        let (code, flags, size) = (self.header_field(0), self.header_field(1), self.header_field(2));
        let name = message_name(code);
        if flags & VERSION_MASK != VERSION {
            return Err(Error::Protocol(format!(
                "{name} of protocol version {}; only version 1 exists",
                flags & VERSION_MASK
            )));
        }
        if flags & FLAG_REPLY != 0 {
            return Err(Error::Protocol(format!("{name} is marked as a reply, but nothing was asked")));
        }
        if size as usize > MAX_BODY {
            return Err(Error::Protocol(format!("{name} has a body of {size} bytes; at most {MAX_BODY} are taken")));
        }
        self.body = vec![0; size as usize];
        Ok(())
    }

    fn take_request(&mut self) -> Request {
        self.filled = 0;
        Request {
            code: self.header_field(0),
            need_reply: self.header_field(1) & FLAG_NEED_REPLY != 0,
            body: std::mem::take(&mut self.body),
            fds: std::mem::take(&mut self.fds),
        }
    }
}
