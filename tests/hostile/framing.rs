//! Messages that are broken as messages.

use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::path::Path;

use crate::support::frontend::{FLAG_NEED_REPLY, FLAG_REPLY, VERSION, Verdict, message, request};
use crate::support::tries::{once_of_several, quicker};
use crate::{Kept, Target, attacks};

attacks! {
    wrong_version: |t| {
        let front = t.raw();
        front.send_bytes(&message(request::GET_FEATURES, 2, 0, &[]), &[]).expect("send");
        front.expect_close();
        Box::new(front)
    };
    reply_flag_in_a_request: |t| refused_header(t, VERSION | FLAG_REPLY, 0);
    largest_size: |t| refused_header(t, VERSION, u32::MAX);
    size_just_over_the_limit: |t| refused_header(t, VERSION, 4097);
    unknown_requests: |t| {
        for number in [0, 44, 200, 1 << 16 | request::GET_FEATURES, u32::MAX] {
            let front = t.front();
            let verdict = front.verdict(number, &[0; 8], &[]);
            assert_ne!(verdict, Verdict::Accepted, "request {number}");
        }
        Box::new(())
    };
    half_a_header_then_close: |t| {
        let front = t.raw();
        front.send_bytes(&[1, 0, 0, 0, 1], &[]).expect("send");
        Box::new(())
    };
    half_a_header_then_silence: |t| {
        let front = t.raw();
        front.send_bytes(&[1, 0, 0, 0, 1], &[]).expect("send");
        Box::new(front)
    };
    half_a_message_then_close: |t| {
        let front = t.front();
        front.send_bytes(&message(request::SET_VRING_NUM, VERSION, 8, &[0; 3]), &[]).expect("send");
        Box::new(())
    };
    half_a_message_then_silence: |t| {
        let front = t.front();
        front.send_bytes(&message(request::SET_VRING_NUM, VERSION, 8, &[0; 3]), &[]).expect("send");
        Box::new(front)
    };
    half_a_message_with_fds_then_close: |t| {
        let front = t.front();
        let file = crate::support::memory::memfd(4096, false).expect("memfd");
        let fd = std::os::fd::AsFd::as_fd(&file);
        let half = message(request::SET_MEM_TABLE, VERSION, 40, &[0; 5]);
        front.send_bytes(&half, &[fd, fd, fd]).expect("send");
        Box::new(())
    };
    one_byte_at_a_time: |t| {
        // Slow, but legal: it has to be served.
        let front = t.raw();
        for byte in message(request::GET_FEATURES, VERSION, 0, &[]) {
            front.send_bytes(&[byte], &[]).expect("send");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert_eq!(front.receive().expect("an answer").request, request::GET_FEATURES);
        Box::new(front)
    };
    answers_nobody_reads: |t| {
        // Fills the daemon's send buffer; the port may wait for us, nobody else may.
        let mut kept = None;
        once_of_several(|| {
            drop(kept.take());
            let front = t.raw();
            front.stream().set_nonblocking(true).expect("non-blocking");
            let ask = message(request::GET_FEATURES, VERSION, 0, &[]);
            while front.send_bytes(&ask, &[]).is_ok() {}
            let start = std::time::Instant::now();
            t.daemon.ports();
            let took = start.elapsed();
            kept = Some(front);
            quicker("port.list", took, std::time::Duration::from_millis(100))
        });
        Box::new(kept)
    };
    half_closed_connection: |t| {
        let front = t.raw();
        front.stream().shutdown(Shutdown::Write).expect("shutdown");
        front.expect_close();
        Box::new(front)
    };
    noise: |t| {
        let mut x = 0x2545_f491_u32;
        for _ in 0..50 {
            let mut bytes = [0; 256];
            for byte in &mut bytes {
                x ^= x << 13;
                x ^= x >> 17;
                x ^= x << 5;
                *byte = x as u8;
            }
            // The daemon may close before it has taken all of it.
            let _ = t.raw().send_bytes(&bytes, &[]);
        }
        Box::new(())
    };
    plausible_noise: |t| {
        // Right headers, any body: reaches further than plain noise.
        let mut x = 0x9e37_79b9_u32;
        let mut next = || {
            x ^= x << 13;
            x ^= x >> 17;
            x ^= x << 5;
            x
        };
        for _ in 0..60 {
            let front = t.raw();
            for _ in 0..20 {
                let body: Vec<u8> = (0..next() % 48).map(|_| (next() % 5) as u8).collect();
                let number = 1 + next() % 43;
                let flags = if next() % 2 == 0 { FLAG_NEED_REPLY } else { 0 };
                if front.send(number, flags, &body, &[]).is_err() {
                    break;
                }
            }
        }
        Box::new(())
    };
    connections_beside_a_guest: |t| {
        let mut guest = t.guest(&crate::Plan::pairs(1));
        // They wait in the socket's queue until it is full, then they are turned away.
        let more: Vec<_> = (0..50).map(|_| knock(&t.socket)).collect();
        crate::Flows::new(1).exchange(&mut guest, &[0], 200, 200);
        Box::new((guest, more))
    };
}

/// A connection attempt that does not wait to be let in.
fn knock(path: &Path) -> OwnedFd {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("socket");
    let _ = connect(&socket, &SocketAddrUnix::new(path).expect("address"));
    socket
}

/// A header that no message may have: the connection is closed, as its length cannot be trusted.
fn refused_header(target: &Target<'_>, flags: u32, size: u32) -> Kept {
    let front = target.raw();
    front.send_bytes(&message(request::GET_FEATURES, flags, size, &[]), &[]).expect("send");
    front.expect_close();
    Box::new(front)
}
