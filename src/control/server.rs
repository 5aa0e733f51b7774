//! The control thread's loop: bytes of clients in, events of the crew in, answers out.
//!
//! What a client can make us keep is bounded: [`MAX_LINE`] of unread input, [`MAX_IN_FLIGHT`] unanswered
//! requests, and about [`MAX_OUTPUT`] of answers it does not read; [`MAX_CLIENTS`] of them. What it can make
//! us do before the others have their turn is bounded by [`LINES_PER_TURN`].

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde_json::Value;
use tracing::{debug, warn};

use super::rpc::{self, INVALID_REQUEST, Request, RpcError};
use super::{Crew, Inbox, Ports, Token};
use crate::error::{Error, Result};
use crate::session::socket::ServerSocket;

/// Longest line a client may send, in bytes, with its end.
pub const MAX_LINE: usize = 64 << 10;
/// Clients at a time; more are told so and disconnected.
pub(super) const MAX_CLIENTS: usize = 64;
/// Requests of one client that are not answered yet; with more it is not read from.
const MAX_IN_FLIGHT: usize = 32;
/// With this much unread output a client is not read from, in bytes.
const ENOUGH_OUTPUT: usize = 64 << 10;
/// With this much unread output a client is disconnected when the next answer comes, in bytes.
const MAX_OUTPUT: usize = 4 << 20;
/// Lines of one client, blank ones too, taken in before the other clients and events are looked at again.
const LINES_PER_TURN: usize = 16;
/// How long what failed for want of file descriptors is left alone, instead of spinning on it.
const NAP: Duration = Duration::from_millis(100);
/// Events taken in before clients are looked at again.
const EVENTS_PER_TURN: usize = 256;

/// The control thread.
pub struct Server<C: Crew> {
    socket: ServerSocket,
    inbox: Inbox<C::Vf>,
    ports: Ports<C>,
    clients: HashMap<u64, Connection>,
    /// Which client asked, and under which id it is answered (`None`: a notification).
    asked: HashMap<Token, (u64, Option<Value>)>,
    next_client: u64,
    next_token: Token,
    /// Until then nobody is accepted.
    accept_after: Option<Instant>,
}

/// One client.
struct Connection {
    stream: UnixStream,
    input: Vec<u8>,
    /// Of `input`, in lines that were taken; they go at the end of the turn.
    taken: usize,
    /// Of `input`, in which no further line ends; at least `taken`.
    scanned: usize,
    output: Vec<u8>,
    in_flight: usize,
    /// It has sent its last byte, or its last we want: answer what is there, then close.
    ended: bool,
    /// It is of no use any more.
    dead: bool,
}

impl<C: Crew> Server<C> {
    /// Nothing happens before [`Self::run`].
    pub fn new(socket: ServerSocket, inbox: Inbox<C::Vf>, ports: Ports<C>) -> Self {
        Self {
            socket,
            inbox,
            ports,
            clients: HashMap::new(),
            asked: HashMap::new(),
            next_client: 0,
            next_token: 0,
            accept_after: None,
        }
    }

    /// Serves until an `Event::Stop` was received and every port is gone.
    pub fn run(mut self) -> Result<()> {
        while !self.ports.finished() {
            let ready = self.wait()?;
            if ready.wake {
                self.inbox.hush();
            }
            // Also without the wake-up: more than EVENTS_PER_TURN may be there.
            self.take_events();
            if ready.listener {
                self.accept();
            }
            for key in ready.clients {
                if let Some(client) = self.clients.get_mut(&key) {
                    client.fill();
                }
            }
            let now = Instant::now();
            if self.ports.due().is_some_and(|due| due <= now) {
                self.ports.tick(now);
            }
            self.deliver();
        }
        Ok(())
    }

    fn wait(&self) -> Result<Ready> {
        let keys: Vec<u64> = self.clients.keys().copied().collect();
        let now = Instant::now();
        let accept_in =
            self.accept_after.map(|after| after.saturating_duration_since(now)).filter(|left| !left.is_zero());
        let accepts = if accept_in.is_some() { PollFlags::empty() } else { PollFlags::IN };
        let mut fds = vec![PollFd::new(&self.inbox, PollFlags::IN), PollFd::new(&self.socket, accepts)];
        fds.extend(keys.iter().map(|key| {
            let client = &self.clients[key];
            let mut interest = PollFlags::empty();
            interest.set(PollFlags::IN, client.wants_input());
            interest.set(PollFlags::OUT, !client.output.is_empty());
            PollFd::from_borrowed_fd(client.stream.as_fd(), interest)
        }));
        let left_over = !self.inbox.is_empty() || self.clients.values().any(Connection::has_line);
        let due = self.ports.due().map(|due| due.saturating_duration_since(now));
        let due = due.into_iter().chain(accept_in).min();
        let timeout = if left_over { Some(Default::default()) } else { due };
        // Not before it is due: poll rounds its timeout up.
        let timeout = timeout
            .map(|timeout| Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: timeout.subsec_nanos().into() });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            // RLIMIT_NOFILE was lowered below what we poll, or the kernel has no memory: that may pass.
            Err(errno @ (Errno::INVAL | Errno::NOMEM)) => {
                let count = fds.len();
                warn!(
                    "polling {count} file descriptors: {errno}; clients wait: raise the limit of open files (prlimit)"
                );
                std::thread::sleep(NAP);
            }
            Err(errno) => return Err(Error::io("control: poll")(errno.into())),
        }
        let ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        Ok(Ready {
            wake: ready(&fds[0]),
            listener: ready(&fds[1]),
            clients: keys.into_iter().zip(&fds[2..]).filter(|(_, fd)| ready(fd)).map(|(key, _)| key).collect(),
        })
    }

    fn take_events(&mut self) {
        for _ in 0..EVENTS_PER_TURN {
            match self.inbox.take() {
                Some(event) => self.ports.event(event, Instant::now()),
                None => return,
            }
        }
    }

    fn accept(&mut self) {
        match self.socket.accept() {
            Ok(Some(mut stream)) if self.clients.len() >= MAX_CLIENTS => {
                let message = format!("{MAX_CLIENTS} clients are connected: close one");
                let error = RpcError::from(&Error::Exhausted(message).into());
                // Best effort: the connection ends either way.
                let _ = stream.write(&rpc::answer(&Value::Null, &Err(error)));
            }
            Ok(Some(stream)) => {
                self.clients.insert(self.next_client, Connection::new(stream));
                self.next_client += 1;
            }
            Ok(None) => {}
            // Out of fds: the client stays in the backlog, and the others do not wait with it.
            Err(error) => {
                warn!("control socket: {error}");
                self.accept_after = Some(Instant::now() + NAP);
            }
        }
    }

    /// Starts requests of a client that are complete, as many as it may have in a turn.
    fn start_requests(&mut self, key: u64) {
        for _ in 0..LINES_PER_TURN {
            let Some(client) = self.clients.get_mut(&key) else { return };
            match client.next_line() {
                None => break,
                Some(Err(error)) => client.push(&rpc::answer(&Value::Null, &Err(error))),
                Some(Ok(line)) if line.trim_ascii().is_empty() => {}
                Some(Ok(line)) => match Request::parse(&line) {
                    Err((id, error)) => client.push(&rpc::answer(&id, &Err(error))),
                    Ok(request) => {
                        client.in_flight += 1;
                        let token = self.next_token;
                        self.next_token += 1;
                        self.asked.insert(token, (key, request.id));
                        self.ports.call(token, &request.method, request.params, Instant::now());
                        self.collect_answers();
                    }
                },
            }
        }
        if let Some(client) = self.clients.get_mut(&key) {
            client.forget_taken();
        }
    }

    fn collect_answers(&mut self) {
        for (token, answer) in self.ports.answers() {
            let Some((key, id)) = self.asked.remove(&token) else {
                continue;
            };
            if let Err(error) = &answer {
                debug!(code = error.code, "request failed: {}", error.message);
            }
            // A client that has left does not hear the answer; what it asked for is done all the same.
            if let Some(client) = self.clients.get_mut(&key) {
                client.in_flight -= 1;
                if let Some(id) = id {
                    client.push(&rpc::answer(&id, &answer));
                }
            }
        }
    }

    /// Starts requests: new ones, and those that had to wait for their turn or for room. Hands out answers.
    fn deliver(&mut self) {
        self.collect_answers();
        let keys: Vec<u64> = self.clients.keys().copied().collect();
        for key in keys {
            self.start_requests(key);
        }
        for client in self.clients.values_mut() {
            client.flush();
        }
        self.clients.retain(|_, client| !client.finished());
    }
}

struct Ready {
    wake: bool,
    listener: bool,
    clients: Vec<u64>,
}

impl Connection {
    fn new(stream: UnixStream) -> Self {
        Self { stream, input: vec![], taken: 0, scanned: 0, output: vec![], in_flight: 0, ended: false, dead: false }
    }

    /// May it ask for more?
    fn has_room(&self) -> bool {
        self.in_flight < MAX_IN_FLIGHT && self.output.len() < ENOUGH_OUTPUT && !self.dead
    }

    fn wants_input(&self) -> bool {
        !self.ended && self.has_room() && self.input.len() < MAX_LINE
    }

    /// One read, so that a busy client does not keep the others waiting.
    fn fill(&mut self) {
        let mut chunk = [0; 16 << 10];
        let room = (MAX_LINE - self.input.len().min(MAX_LINE)).min(chunk.len());
        if !self.wants_input() {
            // Polled for output, or hung up: the next write tells. What it asked for before is done.
            if self.output.is_empty() && !self.has_line() {
                self.dead = self.hung_up();
            }
            return;
        }
        match self.stream.read(&mut chunk[..room]) {
            Ok(0) => self.ended = true,
            Ok(n) => self.input.extend_from_slice(&chunk[..n]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => self.dead = true,
        }
    }

    /// Both directions are closed: nobody hears us.
    fn hung_up(&self) -> bool {
        let mut fd = [PollFd::from_borrowed_fd(self.stream.as_fd(), PollFlags::empty())];
        poll(&mut fd, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    /// The next complete line, without its end. The last one may lack it.
    fn next_line(&mut self) -> Option<Result<Vec<u8>, RpcError>> {
        if !self.has_room() {
            return None;
        }
        if let Some(end) = self.line_end() {
            let line = self.input[self.taken..end].to_vec();
            self.taken = end + 1;
            self.scanned = self.taken;
            return Some(Ok(line));
        }
        self.scanned = self.input.len();
        self.forget_taken();
        if self.input.len() >= MAX_LINE {
            self.ended = true;
            self.take_rest();
            let message = format!("the line is longer than {MAX_LINE} bytes: send shorter ones");
            return Some(Err(RpcError::new(INVALID_REQUEST, message)));
        }
        let last = self.ended && !self.input.is_empty();
        last.then(|| Ok(self.take_rest()))
    }

    /// Can [`Self::next_line`] go on without further input?
    fn has_line(&self) -> bool {
        let rest = self.input.len() - self.taken;
        self.has_room() && (self.line_end().is_some() || rest >= MAX_LINE || (self.ended && rest > 0))
    }

    /// Where the next line ends.
    fn line_end(&self) -> Option<usize> {
        let end = self.input[self.scanned..].iter().position(|&byte| byte == b'\n');
        end.map(|end| self.scanned + end)
    }

    /// Once a turn, not once a line: it moves all that is left.
    fn forget_taken(&mut self) {
        self.input.drain(..self.taken);
        self.scanned -= self.taken;
        self.taken = 0;
    }

    fn take_rest(&mut self) -> Vec<u8> {
        (self.taken, self.scanned) = (0, 0);
        std::mem::take(&mut self.input)
    }

    fn push(&mut self, answer: &[u8]) {
        if self.output.len() >= MAX_OUTPUT {
            debug!("a client does not read its answers: disconnected");
            self.dead = true;
        } else {
            self.output.extend_from_slice(answer);
        }
    }

    fn flush(&mut self) {
        while !self.output.is_empty() && !self.dead {
            match self.stream.write(&self.output) {
                Ok(n) => drop(self.output.drain(..n)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Nobody hears us; what was asked for before is done all the same.
                Err(_) => {
                    self.output.clear();
                    self.dead = !self.has_line();
                }
            }
        }
    }

    fn finished(&self) -> bool {
        let nothing_left = self.in_flight == 0 && self.output.is_empty() && self.input.is_empty();
        self.dead || (self.ended && nothing_left)
    }
}
