//! Framing, over a real socket pair.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use super::fds::no_forks;
use super::*;
use crate::session::wire::{Connection, HEADER_LEN, MAX_BODY, Received};

fn pair() -> (UnixStream, Connection) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (ours, Connection::new(theirs).unwrap())
}

fn header(code: u32, flags: u32, size: u32) -> Vec<u8> {
    [code, flags, size].into_iter().flat_map(u32::to_ne_bytes).collect()
}

#[test]
fn a_message_may_arrive_byte_by_byte() {
    let (mut peer, mut connection) = pair();
    let mut bytes = header(2, 1 | 8, 8);
    bytes.extend(0x0123_4567_89ab_cdef_u64.to_ne_bytes());
    for _ in 0..3 {
        let (last, first) = bytes.split_last().unwrap();
        for byte in first {
            assert!(matches!(connection.poll_request(), Ok(Received::Pending)));
            peer.write_all(&[*byte]).unwrap();
            assert!(matches!(connection.poll_request(), Ok(Received::Pending)));
        }
        peer.write_all(&[*last]).unwrap();
        let Ok(Received::Request(request)) = connection.poll_request() else { panic!() };
        assert_eq!((request.code, request.need_reply), (2, true));
        assert_eq!(request.body, bytes[HEADER_LEN..]);
    }
}

#[test]
fn messages_in_one_write_are_told_apart() {
    let _no_forks = no_forks();
    let (mut peer, mut connection) = pair();
    let mut bytes = header(1, 1, 0);
    bytes.extend(header(8, 1, 8));
    bytes.extend([7; 8]);
    bytes.extend(header(3, 1, 0));
    peer.write_all(&bytes).unwrap();
    drop(peer);
    for (code, len) in [(1, 0), (8, 8), (3, 0)] {
        let Ok(Received::Request(request)) = connection.poll_request() else { panic!() };
        assert_eq!((request.code, request.body.len()), (code, len));
    }
    assert!(matches!(connection.poll_request(), Ok(Received::Closed)));
    assert!(matches!(connection.poll_request(), Ok(Received::Closed)));
}

#[test]
fn an_end_inside_a_message_is_an_error() {
    let _no_forks = no_forks();
    for len in 1..20 {
        let (mut peer, mut connection) = pair();
        let mut bytes = header(2, 1, 8);
        bytes.extend([0; 8]);
        peer.write_all(&bytes[..len]).unwrap();
        drop(peer);
        assert_eq!(connection.poll_request().unwrap_err().code(), "protocol", "{len}");
    }
}

#[test]
fn bad_headers_are_refused_before_anything_is_allocated() {
    for (flags, size) in [(0, 0), (2, 0), (3, 0), (1 | 4, 0), (1, MAX_BODY as u32 + 1), (1, u32::MAX)] {
        let (mut peer, mut connection) = pair();
        peer.write_all(&header(1, flags, size)).unwrap();
        assert_eq!(connection.poll_request().unwrap_err().code(), "protocol", "{flags} {size}");
    }
    // The largest body, and flags that mean nothing yet.
    let (mut peer, mut connection) = pair();
    peer.write_all(&header(5, 1 | 0xffff_fff0, MAX_BODY as u32)).unwrap();
    peer.write_all(&[1; MAX_BODY]).unwrap();
    let Ok(Received::Request(request)) = connection.poll_request() else { panic!() };
    assert_eq!(request.body.len(), MAX_BODY);
}

#[test]
fn replies_have_the_layout_of_the_protocol() {
    let (mut peer, mut connection) = pair();
    connection.send(&Reply::ring_state(11, 3, 0x8001)).unwrap();
    connection.send(&Reply::u64(1, 5)).unwrap();
    let mut bytes = [0; 40];
    peer.read_exact(&mut bytes).unwrap();
    let words: Vec<_> = bytes.chunks(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap())).collect();
    assert_eq!(words[..5], [11, 1 | 4, 8, 3, 0x8001]);
    assert_eq!(words[5..], [1, 1 | 4, 8, 5, 0]);
}

#[test]
fn a_peer_that_reads_no_replies_is_given_up() {
    let (_peer, mut connection) = pair();
    let start = Instant::now();
    let mut sent = 0_u32;
    let error = loop {
        match connection.send(&Reply::u64(1, 0)) {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
    };
    assert!(sent > 100, "{sent} replies fit before it is given up");
    assert!(start.elapsed().as_secs() < 5);
    assert_eq!(error.code(), "io");
}

#[test]
fn a_reply_to_a_peer_that_has_gone_is_an_error() {
    let _no_forks = no_forks();
    let (peer, mut connection) = pair();
    drop(peer);
    assert_eq!(connection.send(&Reply::u64(1, 0)).unwrap_err().code(), "io");
}
