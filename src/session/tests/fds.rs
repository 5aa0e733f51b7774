//! Fds: the right number, the right kind, and none left behind.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::{FdFlags, fcntl_getfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::pipe::pipe;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::*;
use crate::session::wire::{Connection, Received};

/// Between fork and exec a child holds a copy of every fd of ours. Tests in which it matters that an fd
/// is closed, or a listener gone, hold this for reading.
static FORKS: RwLock<()> = RwLock::new(());

/// No test starts a process while this is held.
pub(in crate::session) fn no_forks() -> RwLockReadGuard<'static, ()> {
    FORKS.read().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a test in a process of its own: other tests open and close fds in this one.
pub(super) fn alone(name: &str, body: impl FnOnce()) {
    const MARK: &str = "SESSION_TEST_ALONE";
    if std::env::var_os(MARK).is_some() {
        return body();
    }
    let child = {
        let _forking = FORKS.write().unwrap_or_else(PoisonError::into_inner);
        Command::new(std::env::current_exe().unwrap())
            .args([&format!("session::tests::{name}"), "--exact", "--test-threads=1"])
            .env(MARK, "1")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let status = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&status.stdout);
    assert!(status.status.success() && text.contains("1 passed"), "{text}{}", String::from_utf8_lossy(&status.stderr));
}

pub(super) fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn send(peer: &UnixStream, code: u32, body: &[u8], fds: &[OwnedFd]) {
    let mut message: Vec<u8> = [code, 1, body.len() as u32].into_iter().flat_map(u32::to_ne_bytes).collect();
    message.extend(body);
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    }
    sendmsg(peer, &[IoSlice::new(&message)], &mut control, SendFlags::empty()).unwrap();
}

/// A correct body for each message served, that needs `count` fds.
fn body(code: u32, count: usize) -> Vec<u8> {
    let region = |i: u64| [GPA + i * 4096, 4096, USER + i * 4096, 0].into_iter().flat_map(u64::to_ne_bytes);
    match code {
        2 | 16 | 39 => vec![0; 8],
        5 => {
            let mut body = (count as u64).to_ne_bytes().to_vec();
            body.extend((0..count as u64).flat_map(region));
            body
        }
        8 => Reply::ring_state(0, 0, 256).body.to_vec(),
        9 => addresses(0, 0).body,
        10..=14 | 18 => vec![0; 8],
        20 => 1500_u64.to_ne_bytes().to_vec(),
        37 | 38 => [0; 8].into_iter().chain(region(0)).collect(),
        _ => Vec::new(),
    }
}

#[test]
fn fd_count_matrix() {
    alone("fds::fd_count_matrix", || {
        let memory = memfd(SIZE);
        let start = open_fds();
        for code in (0..=45_u32).chain([255, u32::MAX]) {
            for count in [0, 1, 2, 3, 8, 32, 33, 253] {
                // Regions for SET_MEM_TABLE: as many as fds, except beyond the limit.
                let body = body(code, count.min(32));
                let fds: Vec<_> = match code {
                    5 | 37 => (0..count).map(|_| memory.try_clone().unwrap()).collect(),
                    _ => (0..count).map(|_| new_eventfd()).collect(),
                };
                let mut talk = Talk::negotiated(1);
                if code == 38 {
                    talk.ok(mem_region(Req::ADD_MEM_REG, [GPA, 4096, USER, 0], Some(&memory)));
                }
                let (peer, ours) = UnixStream::pair().unwrap();
                let mut connection = Connection::new(ours).unwrap();
                send(&peer, code, &body, &fds);
                drop(fds);
                let before = open_fds();

                let accepted = match connection.poll_request() {
                    Ok(Received::Request(request)) => {
                        assert!(count <= 32);
                        talk.send(request).is_ok()
                    }
                    Err(error) => {
                        assert!(count > 32, "{error}");
                        drop(connection);
                        assert_eq!(open_fds(), before - 1, "message {code} with {count} fds");
                        continue;
                    }
                    other => panic!("{other:?}"),
                };
                let right: &[usize] = match code {
                    5 => &[0, 1, 2, 3, 8, 32],
                    12..=14 | 37 => &[1],
                    38 => &[0, 1],
                    1..=4 | 8..=11 | 15..=18 | 20 | 34 | 36 | 39 | 40 => &[0],
                    _ => &[],
                };
                assert_eq!(accepted, right.contains(&count), "message {code} with {count} fds");
                if !accepted {
                    assert_eq!(open_fds(), before, "message {code} with {count} fds");
                }
            }
        }
        assert_eq!(open_fds(), start);
    });
}

/// NOFD says that there is none.
#[test]
fn an_fd_where_none_was_announced_is_refused() {
    for code in [Req::SET_VRING_KICK, Req::SET_VRING_CALL, Req::SET_VRING_ERR] {
        let mut talk = Talk::negotiated(1);
        talk.refused(message(code, &(1_u64 << 8).to_ne_bytes(), vec![new_eventfd()]));
        talk.refused(u64_message(code, 0));
        talk.ok(no_fd_message(code, 0));
    }
}

#[test]
fn only_eventfds_are_taken_and_made_non_blocking() {
    let strangers: [(&str, OwnedFd); 6] = [
        ("pipe", pipe().unwrap().1),
        ("memfd", memfd(4096)),
        ("file", tempfile::tempfile().unwrap().into()),
        ("directory", std::fs::File::open("/tmp").unwrap().into()),
        ("socket", UnixStream::pair().unwrap().0.into()),
        ("epoll", rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap()),
    ];
    for code in [Req::SET_VRING_KICK, Req::SET_VRING_CALL, Req::SET_VRING_ERR] {
        let mut talk = Talk::negotiated(1);
        for (kind, fd) in &strangers {
            let error = talk.refused(message(code, &[0; 8], vec![fd.try_clone().unwrap()]));
            assert!(error.contains("eventfd"), "{kind}: {error}");
        }
        let ours = new_eventfd();
        assert!(!fcntl_getfl(&ours).unwrap().contains(OFlags::NONBLOCK));
        talk.ok(message(code, &[0; 8], vec![ours.try_clone().unwrap()]));
        assert!(fcntl_getfl(&ours).unwrap().contains(OFlags::NONBLOCK));
    }
}

#[test]
fn received_fds_are_close_on_exec() {
    let (peer, ours) = UnixStream::pair().unwrap();
    let mut connection = Connection::new(ours).unwrap();
    send(&peer, 12, &[0; 8], &[new_eventfd()]);
    let Ok(Received::Request(request)) = connection.poll_request() else { panic!() };
    assert_eq!(fcntl_getfd(&request.fds[0]).unwrap(), FdFlags::CLOEXEC);
}

/// Fds may come with any part of a message, even each byte its own.
#[test]
fn fds_spread_over_a_message_are_limited_as_a_whole() {
    for (per_byte, complete) in [(1, true), (2, false)] {
        let (peer, ours) = UnixStream::pair().unwrap();
        let mut connection = Connection::new(ours).unwrap();
        let mut bytes: Vec<u8> = [5_u32, 1, 8].into_iter().flat_map(u32::to_ne_bytes).collect();
        bytes.extend([0; 8]);
        let mut count = 0;
        let mut ended = false;
        for byte in &bytes {
            let fds: Vec<_> = (0..per_byte).map(|_| new_eventfd()).collect();
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
            sendmsg(&peer, &[IoSlice::new(&[*byte])], &mut control, SendFlags::empty()).unwrap();
            count += per_byte;
            match connection.poll_request() {
                Ok(Received::Pending) => {}
                Ok(Received::Request(request)) => {
                    assert!(complete);
                    assert_eq!(request.fds.len(), bytes.len());
                    ended = true;
                }
                Err(_) => {
                    assert!(!complete && count > 32);
                    ended = true;
                    break;
                }
                Ok(Received::Closed) => panic!(),
            }
        }
        assert!(ended);
    }
}

/// With no fd numbers left the kernel drops fds and says so: the message must not be taken for whole.
#[test]
fn fds_lost_for_want_of_numbers_close_the_connection() {
    alone("fds::fds_lost_for_want_of_numbers_close_the_connection", || {
        let memory = memfd(SIZE);
        let (peer, ours) = UnixStream::pair().unwrap();
        let mut connection = Connection::new(ours).unwrap();
        let fds: Vec<_> = (0..8).map(|_| memory.try_clone().unwrap()).collect();
        send(&peer, 5, &body(5, 8), &fds);
        drop(fds);
        let before = open_fds();
        let limit = getrlimit(Resource::Nofile);
        // Numbers are given out from the bottom: `before` counts the directory being read as well.
        let few = Rlimit { current: Some(before as u64 + 2), ..limit };
        setrlimit(Resource::Nofile, few).unwrap();
        let result = connection.poll_request();
        setrlimit(Resource::Nofile, limit).unwrap();
        assert_eq!(result.unwrap_err().code(), "protocol");
        drop(connection);
        assert_eq!(open_fds(), before - 1);
    });
}
