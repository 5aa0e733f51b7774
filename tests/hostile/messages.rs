//! Well-framed messages at the wrong time, about things that do not exist, or of impossible content.

use crate::support::frontend::{FrontEnd, NO_FD, Verdict, feature, message, pair, request, vring_addr};
use crate::support::guest::Plan;
use crate::support::memory::{Region, USER_OFFSET};
use crate::{Kept, PAIRS, Target, attacks};

/// Requests that begin with a ring index, and whether they answer with data.
const RING_REQUESTS: [(u32, usize); 8] = [
    (request::SET_VRING_NUM, 8),
    (request::SET_VRING_ADDR, 40),
    (request::SET_VRING_BASE, 8),
    (request::GET_VRING_BASE, 8),
    (request::SET_VRING_KICK, 8),
    (request::SET_VRING_CALL, 8),
    (request::SET_VRING_ERR, 8),
    (request::SET_VRING_ENABLE, 8),
];

attacks! {
    ring_index_just_out_of_range: |t| ring_index(t, 2 * PAIRS as u32);
    // CVE-2020-10723: a check of the low 16 bits only.
    ring_index_of_32_bits: |t| ring_index(t, 1 << 16);
    ring_index_largest: |t| ring_index(t, u32::MAX);
    // CVE-2019-14818: a new allocation for each, and none freed.
    repeated_ring_sizes: |t| {
        let front = t.front();
        for i in 0..5000 {
            front.must(request::SET_VRING_NUM, &pair(0, 1 << (i % 16)), &[]);
        }
        Box::new(front)
    };
    ring_sizes_that_are_none: |t| {
        for size in [0, 3, 100, 65535, 65536, 65536 + 256, u32::MAX] {
            let front = t.front();
            let verdict = front.verdict(request::SET_VRING_NUM, &pair(0, size), &[]);
            assert_ne!(verdict, Verdict::Accepted, "size {size}");
        }
        Box::new(())
    };
    bodies_of_the_wrong_size: |t| {
        let sizes = [
            (request::SET_FEATURES, 8), (request::SET_PROTOCOL_FEATURES, 8),
            (request::SET_MEM_TABLE, 40), (request::ADD_MEM_REG, 40), (request::REM_MEM_REG, 40),
        ];
        for (number, size) in RING_REQUESTS.iter().chain(&sizes) {
            for wrong in [0, 1, size - 1, size + 1, 4000] {
                let front = t.front();
                let verdict = ask_or_tell(&front, *number, &vec![0; wrong]);
                assert_ne!(verdict, Verdict::Accepted, "request {number} of {wrong} bytes");
            }
        }
        Box::new(())
    };
    kick_before_memory: |t| {
        let front = t.front();
        let guest_like = Region::new(0, 1 << 20);
        let queue = crate::support::queue::Queue::new(&guest_like, 1, 256, false);
        front.must(request::SET_VRING_NUM, &pair(1, 256), &[]);
        // Addresses in memory we were never given: now or at the start of the ring, it is an error
        // that must not run the ring.
        let _ = front.tell(request::SET_VRING_ADDR, &queue.addresses(), &[]);
        let _ = front.tell(request::SET_VRING_KICK, &1u64.to_ne_bytes(),
            &[std::os::fd::AsFd::as_fd(&queue.kick)]);
        let _ = front.tell(request::SET_VRING_ENABLE, &pair(1, 1), &[]);
        let show = t.daemon.show("target");
        assert_ne!(show["guest"]["rings"][1]["running"], true, "{show}");
        Box::new(front)
    };
    position_of_a_ring_before_anything: |t| {
        let front = t.raw();
        match front.get_vring_base(0) {
            Ok(base) => assert_eq!(base, 0),
            Err(error) => assert_eq!(crate::support::frontend::closed(&error), Verdict::Closed),
        }
        Box::new(front)
    };
    stopped_twice: |t| {
        let mut guest = t.guest(&Plan::pairs(PAIRS));
        guest.stop();
        guest.stop();
        Box::new(guest)
    };
    ring_base_of_32_bits: |t| {
        let front = t.front();
        let verdict = front.verdict(request::SET_VRING_BASE, &pair(0, 0x1234_5678), &[]);
        assert_ne!(verdict, Verdict::Accepted);
        Box::new(front)
    };
    size_of_a_running_ring: |t| while_running(t, request::SET_VRING_NUM, &pair(1, 1024));
    base_of_a_running_ring: |t| while_running(t, request::SET_VRING_BASE, &pair(1, 7));
    addresses_of_a_running_ring: |t| {
        let elsewhere = 0x10_0000 + USER_OFFSET;
        while_running(t, request::SET_VRING_ADDR,
            &vring_addr(1, elsewhere, elsewhere + 0x4000, elsewhere + 0x8000))
    };
    features_nobody_offered: |t| {
        for bit in [26, 34, 35, 40, 55, 63] {
            let front = t.front();
            let offered = front.features();
            if offered & 1 << bit != 0 {
                continue;
            }
            let bits = feature::VERSION_1 | feature::PROTOCOL | 1 << bit;
            let verdict = front.verdict(request::SET_FEATURES, &u64::to_ne_bytes(bits), &[]);
            assert_ne!(verdict, Verdict::Accepted, "bit {bit}");
        }
        Box::new(())
    };
    protocol_features_nobody_offered: |t| {
        let front = t.front();
        let bits = front.protocol_features() | 1 << 63;
        let verdict = front.verdict(request::SET_PROTOCOL_FEATURES, &bits.to_ne_bytes(), &[]);
        assert_ne!(verdict, Verdict::Accepted);
        Box::new(front)
    };
    other_features_under_traffic: |t| {
        let mut guest = t.guest(&Plan::pairs(1));
        crate::Flows::new(1).exchange(&mut guest, &[0], 100, 100);
        for i in 0..200_u64 {
            let bits = feature::PROTOCOL | feature::VERSION_1 | ((i % 2) * feature::MRG_RXBUF);
            guest.pairs[0].tx.send(&[0; 60]);
            guest.pairs[0].tx.flush();
            let _ = guest.front.tell(request::SET_FEATURES, &bits.to_ne_bytes(), &[]);
        }
        Box::new(guest)
    };
    // CVE-2020-10722: offset + size of the log wraps. A log we do not offer is refused as such.
    dirty_log_that_wraps: |t| {
        let front = t.front();
        let file = crate::support::memory::memfd(4096, false).expect("memfd");
        let body: Vec<u8> = [u64::MAX - 4095, 8192].iter().flat_map(|v: &u64| v.to_ne_bytes()).collect();
        let verdict = front.verdict(request::SET_LOG_BASE, &body, &[std::os::fd::AsFd::as_fd(&file)]);
        assert_ne!(verdict, Verdict::Accepted);
        Box::new(front)
    };
    // CVE-2020-10726, CVE-2021-3839: in-flight buffers are not offered either.
    inflight_buffers: |t| {
        for number in [request::GET_INFLIGHT_FD, request::SET_INFLIGHT_FD] {
            let front = t.front();
            let mut body = vec![0; 16];
            body.extend([0xff; 4]);
            body.extend([0; 4]);
            let file = crate::support::memory::memfd(4096, false).expect("memfd");
            let fds = [std::os::fd::AsFd::as_fd(&file)];
            let fds = if number == request::SET_INFLIGHT_FD { &fds[..] } else { &[] };
            assert_ne!(front.verdict(number, &body, fds), Verdict::Accepted);
        }
        Box::new(())
    };
    mtu_of_the_guests_invention: |t| {
        for mtu in [0_u64, 67, 65536, u64::MAX] {
            let front = t.front();
            let verdict = front.verdict(request::NET_SET_MTU, &mtu.to_ne_bytes(), &[]);
            assert_ne!(verdict, Verdict::Accepted, "mtu {mtu}");
        }
        Box::new(())
    };
    reset_under_traffic: |t| {
        let mut guest = t.guest(&Plan::pairs(1));
        crate::Flows::new(1).exchange(&mut guest, &[0], 100, 100);
        guest.pairs[0].tx.send(&[0; 60]);
        guest.pairs[0].tx.flush();
        for _ in 0..50 {
            guest.front.must(request::RESET_DEVICE, &[], &[]);
        }
        Box::new(guest)
    };
    owner_again_and_again: |t| {
        let front = t.front();
        for _ in 0..100 {
            if front.tell(request::SET_OWNER, &[], &[]).is_err() {
                break;
            }
        }
        let _ = front.tell(request::RESET_OWNER, &[], &[]);
        Box::new(front)
    };
    starting_a_started_ring: |t| {
        let mut guest = t.guest(&Plan::pairs(1));
        for _ in 0..100 {
            guest.pairs[0].tx.queue.kick_off(&guest.front);
            guest.pairs[0].rx.queue.kick_off(&guest.front);
        }
        crate::Flows::new(1).exchange(&mut guest, &[0], 100, 100);
        Box::new(guest)
    };
    enabled_and_disabled_in_a_hurry: |t| {
        let mut guest = t.guest(&Plan::pairs(PAIRS));
        for i in 0..400 {
            guest.enable(i % PAIRS, i % 3 != 0);
        }
        guest.enable(0, true);
        guest.enable(1, true);
        crate::Flows::new(8).exchange(&mut guest, &[0, 1], 200, 100);
        Box::new(guest)
    };
    many_requests_in_one_segment: |t| {
        // A stream has no message boundaries: fifty requests in one write are fifty answers.
        let front = t.raw();
        let one = message(request::GET_FEATURES, 1, 0, &[]);
        front.send_bytes(&one.repeat(50), &[]).expect("send");
        for _ in 0..50 {
            assert_eq!(front.receive().expect("an answer").request, request::GET_FEATURES);
        }
        Box::new(front)
    };
}

fn ask_or_tell(front: &FrontEnd, number: u32, body: &[u8]) -> Verdict {
    if number != request::GET_VRING_BASE {
        return front.verdict(number, body, &[]);
    }
    match front.ask(number, body) {
        Ok(_) => Verdict::Accepted,
        Err(error) => crate::support::frontend::closed(&error),
    }
}

/// Every message about a ring that does not exist is refused, or ends the connection.
fn ring_index(target: &Target<'_>, index: u32) -> Kept {
    for (number, size) in RING_REQUESTS {
        let front = target.front();
        let mut body = vec![0; size];
        // The index of KICK, CALL and ERR has 8 bits, beside the "no fd" bit.
        let index = match number {
            request::SET_VRING_KICK | request::SET_VRING_CALL | request::SET_VRING_ERR => index.min(255) | NO_FD as u32,
            _ => index,
        };
        body[..4].copy_from_slice(&index.to_ne_bytes());
        assert_ne!(ask_or_tell(&front, number, &body), Verdict::Accepted, "request {number}");
    }
    Box::new(())
}

/// What may only change while a ring is stopped: refused, or the connection ends; never half done.
fn while_running(target: &Target<'_>, number: u32, body: &[u8]) -> Kept {
    let mut guest = target.guest(&Plan::pairs(1));
    crate::Flows::new(1).exchange(&mut guest, &[0], 100, 100);
    if guest.front.verdict(number, body, &[]) != Verdict::Closed {
        crate::Flows::new(1).exchange(&mut guest, &[0], 100, 100);
    }
    Box::new(guest)
}
