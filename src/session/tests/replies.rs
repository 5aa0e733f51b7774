//! Who is answered with what: REPLY_ACK, sizes, indices.

use super::*;
use crate::session::Outcome::{Refused, Silent};

type RingMessage = (Req, fn(u32) -> Request);

/// Every ring message and how an index goes into it.
const RING_MESSAGES: [RingMessage; 8] = [
    (Req::SET_VRING_NUM, |ring| ring_message(Req::SET_VRING_NUM, ring, 256)),
    (Req::SET_VRING_BASE, |ring| ring_message(Req::SET_VRING_BASE, ring, 0)),
    (Req::GET_VRING_BASE, |ring| ring_message(Req::GET_VRING_BASE, ring, 0)),
    (Req::SET_VRING_ENABLE, |ring| ring_message(Req::SET_VRING_ENABLE, ring, 1)),
    (Req::SET_VRING_ADDR, |ring| {
        let mut request = addresses(0, 0);
        request.body[..4].copy_from_slice(&ring.to_ne_bytes());
        request
    }),
    (Req::SET_VRING_KICK, |ring| eventfd_message(Req::SET_VRING_KICK, ring)),
    (Req::SET_VRING_CALL, |ring| eventfd_message(Req::SET_VRING_CALL, ring)),
    (Req::SET_VRING_ERR, |ring| eventfd_message(Req::SET_VRING_ERR, ring)),
];

#[test]
fn reply_ack_matrix() {
    type Case = (&'static str, fn() -> Request, bool, bool);
    // message, what it is, is it right, has it a reply of its own
    const CASES: [Case; 6] = [
        ("right", || u64_message(Req::SET_FEATURES, 0), true, false),
        ("wrong", || u64_message(Req::SET_FEATURES, u64::MAX), false, false),
        ("right, own reply", || empty(Req::GET_FEATURES), true, true),
        ("wrong, own reply", || ring_message(Req::GET_VRING_BASE, 9, 0), false, true),
        ("not served", || u64_message(Req::SEND_RARP, 0), false, false),
        ("does not exist", || Request { code: 77, ..empty(Req::SET_OWNER) }, false, false),
    ];
    for (name, request, right, own_reply) in CASES {
        for negotiated in [false, true] {
            for wanted in [false, true] {
                let mut talk = if negotiated { Talk::negotiated(1) } else { Talk::new(1) };
                let request = Request { need_reply: wanted, ..request() };
                let code = request.code;
                let outcome = talk.send(request);
                let context = format!("{name}, negotiated {negotiated}, wanted {wanted}: {outcome:?}");
                let acknowledged = negotiated && wanted;
                match outcome {
                    // Exactly one reply, and its own.
                    Ok(Outcome::Reply(reply)) if own_reply => {
                        assert!(right, "{context}");
                        assert_eq!(reply, Reply::u64(code, offer(1).features), "{context}");
                    }
                    Ok(Outcome::Reply(reply)) => {
                        assert!(right && acknowledged, "{context}");
                        assert_eq!(reply, Reply::u64(code, 0), "{context}");
                    }
                    Ok(Silent) => assert!(right && !acknowledged && !own_reply, "{context}"),
                    Ok(Refused(reply, _)) => {
                        assert!(!right && acknowledged && !own_reply, "{context}");
                        assert_eq!(reply, Reply::u64(code, 1), "{context}");
                        // The session goes on.
                        assert_eq!(talk.ask(empty(Req::GET_FEATURES)), offer(1).features);
                    }
                    Err(_) => assert!(!right && (own_reply || !acknowledged), "{context}"),
                }
            }
        }
    }
}

#[test]
fn set_protocol_features_that_negotiates_reply_ack_is_acknowledged() {
    let mut talk = Talk::new(1);
    let all = offer(1).protocol_features;
    assert_eq!(talk.ask(need_reply(u64_message(Req::SET_PROTOCOL_FEATURES, all))), 0);
    talk.refused(u64_message(Req::SET_PROTOCOL_FEATURES, all | 1 << 12));
    // And one that takes it back is not.
    talk.ok(need_reply(u64_message(Req::SET_PROTOCOL_FEATURES, 1)));
}

#[test]
fn a_message_of_a_feature_not_negotiated_is_refused() {
    let mut talk = Talk::new(1);
    talk.refused(empty(Req::GET_MAX_MEM_SLOTS));
    talk.refused(mem_region(Req::ADD_MEM_REG, REGION, Some(&memfd(SIZE))));
    talk.refused(mem_region(Req::REM_MEM_REG, REGION, None));
    talk.refused(u64_message(Req::NET_SET_MTU, 1500));
    talk.refused(u64_message(Req::SET_STATUS, 1));
    talk.refused(empty(Req::GET_STATUS));
    talk.refused(empty(Req::RESET_DEVICE));
}

#[test]
fn values_of_the_get_messages() {
    let mut talk = Talk::negotiated(3);
    assert_eq!(talk.ask(empty(Req::GET_FEATURES)), offer(3).features);
    assert_eq!(talk.ask(empty(Req::GET_PROTOCOL_FEATURES)), offer(3).protocol_features);
    assert_eq!(talk.ask(empty(Req::GET_QUEUE_NUM)), 3);
    assert_eq!(talk.ask(empty(Req::GET_MAX_MEM_SLOTS)), 509);
    talk.ok(u64_message(Req::SET_STATUS, 0xf));
    assert_eq!(talk.ask(empty(Req::GET_STATUS)), 0xf);
    talk.refused(u64_message(Req::SET_STATUS, 0x100));
}

/// Virtio 1.3, 3.1.1: the driver reads FEATURES_OK back.
#[test]
fn features_ok_stays_off_without_features() {
    let mut talk = Talk::new(1);
    talk.ok(u64_message(Req::SET_PROTOCOL_FEATURES, offer(1).protocol_features));
    talk.ok(u64_message(Req::SET_STATUS, 0xb));
    assert_eq!(talk.ask(empty(Req::GET_STATUS)), 0x3);
    talk.ok(u64_message(Req::SET_FEATURES, VERSION_1));
    talk.ok(u64_message(Req::SET_STATUS, 0xb));
    assert_eq!(talk.ask(empty(Req::GET_STATUS)), 0xb);
}

/// CVE-2020-10723: an index must be judged before it is narrowed.
#[test]
fn ring_indices_beyond_the_queue_count_are_refused() {
    for (code, request) in RING_MESSAGES {
        let mut talk = Talk::negotiated(1);
        for ring in [2, 3, 255, 256, 512, 0x1_0000, 0x1_0001, 0x8000_0000, 0xffff_0000, u32::MAX] {
            let error = talk.refused(request(ring));
            assert!(error.contains(&format!("{code:?}")), "{error}");
        }
        for ring in [0, 1] {
            assert!(talk.send(request(ring)).is_ok(), "{code:?} {ring}");
        }
    }
    // Bits 9 to 63 of the eventfd messages.
    let mut talk = Talk::negotiated(1);
    for bit in 9..64 {
        let mut request = eventfd_message(Req::SET_VRING_KICK, 0);
        request.body = (1_u64 << bit).to_ne_bytes().to_vec();
        talk.refused(request);
    }
}

/// Every message with every body length: only the right one is taken.
#[test]
fn bodies_of_the_wrong_size_are_refused() {
    for code in 0..=45_u32 {
        let mut accepted = Vec::new();
        for len in (0..=96).chain([4095, 4096]) {
            let mut talk = Talk::negotiated(1);
            let need_eventfd = (12..=14).contains(&code);
            let fds = match code {
                _ if need_eventfd => vec![new_eventfd()],
                37 => vec![memfd(SIZE)],
                _ => Vec::new(),
            };
            let mut body = vec![0; len];
            if len >= 8 && code == u32::from(Req::SET_VRING_NUM) {
                body[4] = 1;
            }
            if len >= 8 && code == u32::from(Req::NET_SET_MTU) {
                body[..8].copy_from_slice(&1500_u64.to_ne_bytes());
            }
            if len >= 40 && code == u32::from(Req::ADD_MEM_REG) {
                body[16..24].copy_from_slice(&SIZE.to_ne_bytes());
            }
            let request = Request { code, need_reply: false, body, fds };
            if talk.send(request).is_ok() {
                accepted.push(len);
            }
        }
        let expected: &[usize] = match code {
            1 | 3 | 4 | 15 | 17 | 34 | 36 | 40 => &[0],
            2 | 5 | 8 | 10..=14 | 16 | 18 | 20 | 39 => &[8],
            9 | 37 => &[40],
            _ => &[],
        };
        assert_eq!(accepted, expected, "message {code}");
    }
}
