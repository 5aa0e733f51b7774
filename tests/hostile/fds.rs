//! Fds: too many, in the wrong place, or not what they should be.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::OFlags;

use crate::support::frontend::{NO_FD, VERSION, Verdict, message, pair, request};
use crate::support::guest::{Flows, Guest, Pair, Plan};
use crate::{Kept, Target, attacks};

const KICK_CALL_ERR: [u32; 3] = [request::SET_VRING_KICK, request::SET_VRING_CALL, request::SET_VRING_ERR];

attacks! {
    // CVE-2019-14818: fds that come with messages which take none.
    fds_with_messages_that_take_none: |t| {
        let file = null();
        let fds = [file.as_fd(); 3];
        let bodies: [(u32, &[u8]); 7] = [
            (request::SET_OWNER, &[]),
            (request::SET_FEATURES, &[0; 8]),
            (request::SET_VRING_NUM, &pair(0, 256)),
            (request::SET_VRING_BASE, &pair(0, 0)),
            (request::SET_VRING_ENABLE, &pair(0, 1)),
            (request::GET_FEATURES, &[]),
            (request::GET_QUEUE_NUM, &[]),
        ];
        for (number, body) in bodies {
            let front = t.front();
            // Whether it takes the message is its own affair; the fds must not stay.
            let _ = front.send(number, 0, body, &fds);
            let _ = front.receive_within(std::time::Duration::from_millis(20));
        }
        Box::new(())
    };
    forty_fds: |t| many_fds(t, 40);
    as_many_fds_as_a_socket_takes: |t| many_fds(t, 253);
    fds_with_every_byte: |t| {
        let front = t.raw();
        let file = null();
        for byte in message(request::SET_OWNER, VERSION, 0, &[]) {
            if front.send_bytes(&[byte], &[file.as_fd(), file.as_fd()]).is_err() {
                break;
            }
        }
        let _ = front.receive_within(std::time::Duration::from_millis(20));
        Box::new(front)
    };
    fds_with_the_body: |t| {
        // Legal for a stream socket, if odd. The ring may take it or not; it must not leak.
        let front = t.front();
        let fd = eventfd(0, EventfdFlags::empty()).expect("eventfd");
        let bytes = message(request::SET_VRING_CALL, VERSION, 8, &0u64.to_ne_bytes());
        front.send_bytes(&bytes[..12], &[]).expect("header");
        let _ = front.send_bytes(&bytes[12..], &[fd.as_fd()]);
        let _ = front.receive_within(std::time::Duration::from_millis(20));
        Box::new(front)
    };
    two_fds_for_one_ring: |t| {
        let (a, b) = (event(), event());
        for number in KICK_CALL_ERR {
            let front = t.front();
            let verdict = front.verdict(number, &0u64.to_ne_bytes(), &[a.as_fd(), b.as_fd()]);
            assert_ne!(verdict, Verdict::Accepted, "request {number}");
        }
        Box::new(())
    };
    no_fd_where_one_is_promised: |t| {
        for number in KICK_CALL_ERR {
            let front = t.front();
            let verdict = front.verdict(number, &0u64.to_ne_bytes(), &[]);
            assert_ne!(verdict, Verdict::Accepted, "request {number}");
        }
        Box::new(())
    };
    fd_where_none_is_promised: |t| {
        let fd = event();
        for number in KICK_CALL_ERR {
            let front = t.front();
            let _ = front.verdict(number, &NO_FD.to_ne_bytes(), &[fd.as_fd()]);
        }
        Box::new(())
    };
    ring_fd_is_a_regular_file: |t| no_eventfd(t, tempfile::tempfile().expect("file").as_fd());
    ring_fd_is_dev_null: |t| no_eventfd(t, null().as_fd());
    ring_fd_is_guest_memory: |t| {
        no_eventfd(t, crate::support::memory::memfd(4096, false).expect("memfd").as_fd())
    };
    ring_fd_is_the_control_socket: |t| {
        let stream = std::os::unix::net::UnixStream::connect(t.daemon.control_socket()).expect("connect");
        no_eventfd(t, stream.as_fd())
    };
    ring_fd_is_the_vhost_socket: |t| {
        let front = t.front();
        let verdict = front.verdict(request::SET_VRING_CALL, &0u64.to_ne_bytes(), &[front.stream().as_fd()]);
        assert_ne!(verdict, Verdict::Accepted);
        Box::new(front)
    };
    ring_fd_is_a_full_pipe: |t| {
        let (read, write) = rustix::pipe::pipe().expect("pipe");
        let flags = rustix::fs::fcntl_getfl(&write).expect("flags");
        rustix::fs::fcntl_setfl(&write, flags | OFlags::NONBLOCK).expect("flags");
        while rustix::io::write(&write, &[0; 4096]).is_ok() {}
        rustix::fs::fcntl_setfl(&write, flags).expect("flags");
        let kept = no_eventfd(t, write.as_fd());
        Box::new((kept, read))
    };
    call_is_a_blocking_eventfd_at_its_maximum: |t| {
        let call = full_eventfd();
        let mut guest = t.guest(&Plan::default());
        set_calls(&guest, call.as_fd());
        calls_wanted(&guest);
        Flows::new(1).exchange(&mut guest, &[0], 100, 300);
        Box::new((guest, call))
    };
    call_is_made_blocking_again: |t| {
        // The flag belongs to the open file, which the VMM shares: it can take back what we set.
        // The core may be held up until the watchdog looks; the front end then has to go.
        let call = full_eventfd();
        let mut guest = t.guest(&Plan::default());
        set_calls(&guest, call.as_fd());
        let flags = rustix::fs::fcntl_getfl(&call).expect("flags");
        rustix::fs::fcntl_setfl(&call, flags - OFlags::NONBLOCK).expect("flags");
        calls_wanted(&guest);
        for _ in 0..32 {
            guest.pairs[0].tx.send(&[0; 60]);
        }
        guest.pairs[0].tx.flush();
        guest.pairs[0].tx.queue.kick_now();
        let start = std::time::Instant::now();
        while !t.daemon.show("target")["guest"]["last_error"].to_string().contains("eventfd blocks") {
            assert!(start.elapsed() < crate::PATIENCE, "the stuck port is not quarantined");
        }
        Box::new((guest, call))
    };
    kick_is_a_blocking_eventfd: |t| {
        let kick = event();
        let mut guest = t.guest(&Plan::default());
        set_kicks(&mut guest, kick.as_fd());
        let flags = rustix::fs::fcntl_getfl(&kick).expect("flags");
        rustix::fs::fcntl_setfl(&kick, flags - OFlags::NONBLOCK).expect("flags");
        // Asleep by now: woken by the kick, then reading a counter that is already 0 would hang.
        std::thread::sleep(std::time::Duration::from_millis(50));
        rustix::io::write(&kick, &1u64.to_ne_bytes()).expect("kick");
        Flows::new(1).exchange(&mut guest, &[0], 100, 300);
        Box::new((guest, kick))
    };
    kick_and_call_are_one: |t| {
        let one = event();
        let mut guest = t.guest(&Plan::default());
        set_kicks(&mut guest, one.as_fd());
        set_calls(&guest, one.as_fd());
        calls_wanted(&guest);
        Flows::new(1).exchange(&mut guest, &[0], 100, 300);
        Box::new((guest, one))
    };
    semaphore_eventfds: |t| {
        // A read takes 1, not all: a core that waits for "not readable" would never sleep, nor end.
        let semaphore = || eventfd(1_000_000, EventfdFlags::SEMAPHORE).expect("eventfd");
        let (kick, call) = (semaphore(), semaphore());
        let mut guest = t.guest(&Plan::default());
        set_kicks(&mut guest, kick.as_fd());
        set_calls(&guest, call.as_fd());
        calls_wanted(&guest);
        Flows::new(1).exchange(&mut guest, &[0], 100, 300);
        Box::new((guest, kick, call))
    };
    neither_kick_nor_call: |t| {
        // Legal: we poll and do not signal.
        let mut guest = t.guest(&Plan::default());
        for ring in [0_u64, 1] {
            let body = (ring | NO_FD).to_ne_bytes();
            guest.front.must(request::SET_VRING_CALL, &body, &[]);
            guest.front.must(request::SET_VRING_KICK, &body, &[]);
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
        Flows::new(1).exchange(&mut guest, &[0], 100, 300);
        Box::new(guest)
    };
}

fn null() -> File {
    File::options().read(true).write(true).open("/dev/null").expect("/dev/null")
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd")
}

/// A blocking eventfd into which nothing more fits.
fn full_eventfd() -> OwnedFd {
    let fd = event();
    rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).expect("fill");
    fd
}

/// One kick fd for both rings, which the driver uses too.
fn set_kicks(guest: &mut Guest, fd: BorrowedFd<'_>) {
    let Pair { rx, tx } = &mut guest.pairs[0];
    for queue in [&mut rx.queue, &mut tx.queue] {
        queue.kick = fd.try_clone_to_owned().expect("dup");
        queue.kick_off(&guest.front);
    }
}

fn set_calls(guest: &Guest, fd: BorrowedFd<'_>) {
    for ring in [0_u64, 1] {
        let body = ring.to_ne_bytes();
        guest.front.must(request::SET_VRING_CALL, &body, &[fd]);
    }
}

fn calls_wanted(guest: &Guest) {
    guest.pairs[0].rx.queue.request_call();
    guest.pairs[0].tx.queue.request_call();
}

/// Only eventfds are taken for kick, call and err.
fn no_eventfd(target: &Target<'_>, fd: BorrowedFd<'_>) -> Kept {
    for number in KICK_CALL_ERR {
        let front = target.front();
        let verdict = front.verdict(number, &0u64.to_ne_bytes(), &[fd]);
        assert_ne!(verdict, Verdict::Accepted, "request {number}");
    }
    Box::new(())
}

fn many_fds(target: &Target<'_>, count: usize) -> Kept {
    let file = null();
    let fds = vec![file.as_fd(); count];
    for number in [request::GET_FEATURES, request::SET_MEM_TABLE, request::SET_VRING_KICK] {
        let front = target.raw();
        let _ = front.send(number, 0, &[0; 8], &fds);
        let _ = front.receive_within(std::time::Duration::from_millis(20));
    }
    Box::new(())
}
