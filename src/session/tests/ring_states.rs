//! Ring states: every state × every message, as DESIGN's "Ring states" and the vhost-user
//! specification's section of that name have it.

use super::*;
use crate::session::features::RING_PACKED;
use S::{Incomplete, Running, Stopped};

/// A ring's state, apart from enabled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum S {
    /// Complete, but not started.
    Stopped,
    /// Started, but without addresses.
    Incomplete,
    /// Started and complete.
    Running,
}

/// What SET_VRING_ENABLE's state becomes.
#[derive(Clone, Copy, Debug)]
enum Enabled {
    Keep,
    Becomes(bool),
}

/// What a message does in one state: the lanes' part, and the state behind it. `None`: refused.
type Effect = Option<(&'static str, S)>;

const UNTOUCHED: [Effect; 3] =
    [Some(("untouched", Stopped)), Some(("untouched", Incomplete)), Some(("untouched", Running))];
const PAUSED: [Effect; 3] = [Some(("paused", Stopped)), Some(("paused", Incomplete)), Some(("paused", Running))];
/// Something that lanes look at, of one ring or of started rings only.
const PAUSED_IF_STARTED: [Effect; 3] =
    [Some(("untouched", Stopped)), Some(("paused", Incomplete)), Some(("paused", Running))];
const REFUSED: [Effect; 3] = [None; 3];

type Row = (&'static str, fn(&Fixture) -> Request, [Effect; 3], Enabled);

/// Columns: in Stopped, in Incomplete, in Running.
#[rustfmt::skip]
const TABLE: &[Row] = &[
    ("GET_FEATURES", |_| empty(Req::GET_FEATURES), UNTOUCHED, Enabled::Keep),
    ("SET_FEATURES, the same", |_| u64_message(Req::SET_FEATURES, PROTOCOL_FEATURES | VERSION_1), UNTOUCHED, Enabled::Keep),
    ("SET_FEATURES, others", |_| u64_message(Req::SET_FEATURES, PROTOCOL_FEATURES), PAUSED, Enabled::Keep),
    ("SET_FEATURES without PROTOCOL_FEATURES", |_| u64_message(Req::SET_FEATURES, VERSION_1), PAUSED, Enabled::Becomes(true)),
    ("SET_FEATURES not offered", |_| u64_message(Req::SET_FEATURES, 1 << 33), REFUSED, Enabled::Keep),
    ("SET_OWNER", |_| empty(Req::SET_OWNER), UNTOUCHED, Enabled::Keep),
    ("RESET_OWNER", |_| empty(Req::RESET_OWNER), [Some(("drained", Stopped)); 3], Enabled::Becomes(false)),
    ("SET_MEM_TABLE, the same", |f| mem_table(&[(REGION, &f.memory)]), PAUSED, Enabled::Keep),
    ("SET_MEM_TABLE, another", |_| mem_table(&[(REGION, &memfd(SIZE))]),
        [Some(("drained", Stopped)), Some(("drained", Incomplete)), Some(("drained", Running))], Enabled::Keep),
    ("SET_LOG_BASE", |_| message(Req::SET_LOG_BASE, &[0; 16], Vec::new()), REFUSED, Enabled::Keep),
    ("SET_LOG_FD", |_| empty(Req::SET_LOG_FD), REFUSED, Enabled::Keep),
    ("SET_VRING_NUM", |_| ring_message(Req::SET_VRING_NUM, 0, 512), [Some(("untouched", Stopped)), Some(("paused", Incomplete)), None], Enabled::Keep),
    ("SET_VRING_ADDR, the same", |_| addresses(0, 0), [Some(("untouched", Stopped)), Some(("paused", Running)), Some(("untouched", Running))], Enabled::Keep),
    ("SET_VRING_ADDR, another", |_| addresses(0, 1), [Some(("untouched", Stopped)), Some(("paused", Running)), None], Enabled::Keep),
    ("SET_VRING_BASE", |_| ring_message(Req::SET_VRING_BASE, 0, 7), [Some(("untouched", Stopped)), Some(("untouched", Incomplete)), None], Enabled::Keep),
    ("SET_VRING_KICK", |_| eventfd_message(Req::SET_VRING_KICK, 0), [Some(("paused", Running)), Some(("paused", Incomplete)), Some(("paused", Running))], Enabled::Keep),
    ("SET_VRING_KICK without fd", |_| no_fd_message(Req::SET_VRING_KICK, 0), [Some(("paused", Running)), Some(("paused", Incomplete)), Some(("paused", Running))], Enabled::Keep),
    ("SET_VRING_CALL", |_| eventfd_message(Req::SET_VRING_CALL, 0), PAUSED_IF_STARTED, Enabled::Keep),
    ("SET_VRING_CALL without fd", |_| no_fd_message(Req::SET_VRING_CALL, 0), PAUSED_IF_STARTED, Enabled::Keep),
    ("SET_VRING_ERR", |_| eventfd_message(Req::SET_VRING_ERR, 0), PAUSED_IF_STARTED, Enabled::Keep),
    ("SET_VRING_ERR without fd", |_| no_fd_message(Req::SET_VRING_ERR, 0), PAUSED_IF_STARTED, Enabled::Keep),
    ("GET_PROTOCOL_FEATURES", |_| empty(Req::GET_PROTOCOL_FEATURES), UNTOUCHED, Enabled::Keep),
    ("SET_PROTOCOL_FEATURES", |_| u64_message(Req::SET_PROTOCOL_FEATURES, 1), UNTOUCHED, Enabled::Keep),
    ("GET_QUEUE_NUM", |_| empty(Req::GET_QUEUE_NUM), UNTOUCHED, Enabled::Keep),
    ("SET_VRING_ENABLE 1", |_| ring_message(Req::SET_VRING_ENABLE, 0, 1), PAUSED_IF_STARTED, Enabled::Becomes(true)),
    ("SET_VRING_ENABLE 0", |_| ring_message(Req::SET_VRING_ENABLE, 0, 0), PAUSED_IF_STARTED, Enabled::Becomes(false)),
    ("SEND_RARP", |_| u64_message(Req::SEND_RARP, 0), REFUSED, Enabled::Keep),
    ("NET_SET_MTU", |_| u64_message(Req::NET_SET_MTU, 1500), UNTOUCHED, Enabled::Keep),
    ("NET_SET_MTU, too large", |_| u64_message(Req::NET_SET_MTU, 1501), REFUSED, Enabled::Keep),
    ("NET_SET_MTU, too small", |_| u64_message(Req::NET_SET_MTU, 67), REFUSED, Enabled::Keep),
    ("RESET_DEVICE", |_| empty(Req::RESET_DEVICE), [Some(("drained", Stopped)); 3], Enabled::Becomes(false)),
    ("GET_MAX_MEM_SLOTS", |_| empty(Req::GET_MAX_MEM_SLOTS), UNTOUCHED, Enabled::Keep),
    ("ADD_MEM_REG", |_| mem_region(Req::ADD_MEM_REG, [GPA + SIZE, SIZE, USER + SIZE, 0], Some(&memfd(SIZE))), PAUSED, Enabled::Keep),
    ("REM_MEM_REG", |_| mem_region(Req::REM_MEM_REG, REGION, None),
        [Some(("drained", Stopped)), Some(("drained", Incomplete)), Some(("drained", Running))], Enabled::Keep),
    ("SET_STATUS", |_| u64_message(Req::SET_STATUS, 0xf), UNTOUCHED, Enabled::Keep),
    ("SET_STATUS 0", |_| u64_message(Req::SET_STATUS, 0), [Some(("drained", Stopped)); 3], Enabled::Keep),
    ("GET_STATUS", |_| empty(Req::GET_STATUS), UNTOUCHED, Enabled::Keep),
    ("GET_VRING_BASE", |_| ring_message(Req::GET_VRING_BASE, 0, 0),
        [Some(("untouched", Stopped)), Some(("ring stopped", Stopped)), Some(("ring stopped", Stopped))], Enabled::Keep),
];

/// Ring 0 in a given state, with ring 1 running beside it.
struct Fixture {
    talk: Talk,
    memory: OwnedFd,
}

impl Fixture {
    fn new(state: S, enabled: bool) -> Self {
        let mut talk = Talk::negotiated(2);
        let memory = memfd(SIZE);
        talk.ok(mem_table(&[(REGION, &memory)]));
        talk.start(1);
        talk.lanes.rings.get_mut(&1).unwrap().position = 0x1111;
        match state {
            Stopped => {
                talk.start(0);
                assert_eq!(talk.base(0), 0);
            }
            Incomplete => {
                talk.ok(ring_message(Req::SET_VRING_NUM, 0, 256));
                talk.ok(eventfd_message(Req::SET_VRING_KICK, 0));
            }
            Running => {
                talk.start(0);
                talk.lanes.rings.get_mut(&0).unwrap().position = 0xfffe;
            }
        }
        talk.ok(ring_message(Req::SET_VRING_ENABLE, 0, enabled.into()));
        talk.lanes.take_calls();
        Self { talk, memory }
    }

    fn state(&self) -> S {
        match (self.talk.ring(0).started, self.talk.lanes.rings.contains_key(&0)) {
            (false, false) => Stopped,
            (true, false) => Incomplete,
            (true, true) => Running,
            (false, true) => panic!("ring 0 runs without having been started"),
        }
    }
}

#[test]
fn every_state_meets_every_message() {
    let mut steps = 0;
    for (name, request, effects, becomes) in TABLE {
        for (state, effect) in [Stopped, Incomplete, Running].into_iter().zip(effects) {
            for enabled in [false, true] {
                let context = format!("{name} in {state:?}, enabled {enabled}");
                let mut fixture = Fixture::new(state, enabled);
                let request = request(&fixture);
                let expected_enabled = match becomes {
                    Enabled::Becomes(becomes) if effect.is_some() => *becomes,
                    _ => enabled,
                };
                match effect {
                    None => {
                        fixture.talk.refused(request);
                        assert_eq!(fixture.state(), state, "{context}");
                    }
                    Some((lanes, next)) => {
                        let result = fixture.talk.send(request);
                        assert!(matches!(result, Ok(Outcome::Silent | Outcome::Reply(_))), "{context}: {result:?}");
                        assert_eq!(fixture.state(), *next, "{context}");
                        // Enabling what is enabled disturbs nobody.
                        let idle = name.starts_with("SET_VRING_ENABLE") && enabled == expected_enabled;
                        let lanes = if idle { "untouched" } else { lanes };
                        assert_eq!(depth(&fixture.talk.lanes.take_calls()), lanes, "{context}");
                    }
                }
                assert_eq!(fixture.talk.ring(0).enabled, expected_enabled, "{context}");
                check_neighbour(&fixture.talk, name, &context);
                steps += 1;
            }
        }
    }
    assert_eq!(steps, TABLE.len() * 6);
}

/// Ring 1 runs on, where it was, whatever happens to ring 0; except in a reset of the device.
fn check_neighbour(talk: &Talk, name: &str, context: &str) {
    let neighbour = talk.lanes.rings.get(&1);
    if ["RESET_OWNER", "RESET_DEVICE", "SET_STATUS 0"].contains(&name) {
        assert!(neighbour.is_none(), "{context}");
    } else {
        assert_eq!(neighbour.map(|ring| ring.position), Some(0x1111), "{context}");
    }
}

#[test]
fn a_disconnect_stops_every_state_and_a_resume_brings_it_back() {
    for state in [Stopped, Incomplete, Running] {
        for enabled in [false, true] {
            let Fixture { talk, memory: _ } = Fixture::new(state, enabled);
            let Talk { session, mut lanes } = talk;
            let saved = session.suspend(&mut lanes);
            assert!(lanes.rings.is_empty());
            assert_eq!(lanes.take_calls(), [Call::Pause, Call::Drain]);

            let session = Session::resume(offer(2), saved, &mut lanes).unwrap();
            lanes.check(&session);
            assert_eq!(lanes.rings.contains_key(&0), state == Running);
            assert_eq!(lanes.rings[&1].position, 0x1111);
            if state == Running {
                assert_eq!(lanes.rings[&0].position, 0xfffe);
            }
            assert_eq!(session.state().rings[0].enabled, enabled);
        }
    }
}

#[test]
fn a_saved_state_must_fit_the_offer() {
    let saved = || {
        let Talk { session, mut lanes } = Talk::negotiated(2);
        session.suspend(&mut lanes)
    };
    let mut lanes = Recorder::default();
    assert_eq!(Session::resume(offer(1), saved(), &mut lanes).unwrap_err().code(), "invalid");
    let narrower = Offer { features: PROTOCOL_FEATURES, ..offer(2) };
    assert_eq!(Session::resume(narrower, saved(), &mut lanes).unwrap_err().code(), "invalid");
    assert!(Session::resume(offer(2), saved(), &mut lanes).is_ok());
}

#[test]
fn the_answer_to_get_vring_base_is_the_used_position() {
    let mut talk = Talk::negotiated(1);
    // Before there is memory, or anything at all.
    assert_eq!(talk.base(0), 0);
    talk.ok(ring_message(Req::SET_VRING_BASE, 1, 0xffff));
    assert_eq!(talk.base(1), 0xffff);
    talk.ok(mem_table(&[(REGION, &memfd(SIZE))]));
    talk.start(0);
    talk.lanes.rings.get_mut(&0).unwrap().position = 0x8001;
    assert_eq!(talk.base(0), 0x8001);
    assert_eq!(talk.base(0), 0x8001, "and again");
    // Started again without SET_VRING_BASE, it goes on from there.
    talk.ok(no_fd_message(Req::SET_VRING_KICK, 0));
    assert_eq!(talk.lanes.rings[&0].position, 0x8001);
    assert!(talk.ring(0).kick.is_none());
}

#[test]
fn call_and_err_survive_a_stop_and_a_reset_but_kick_does_not() {
    let mut talk = Talk::negotiated(1);
    for code in [Req::SET_VRING_KICK, Req::SET_VRING_CALL, Req::SET_VRING_ERR] {
        talk.ok(eventfd_message(code, 0));
    }
    talk.base(0);
    let ring = talk.ring(0);
    assert!(ring.kick.is_none() && ring.call.is_some() && ring.err.is_some());
    talk.ok(empty(Req::RESET_DEVICE));
    let ring = talk.ring(0);
    assert!(ring.call.is_some() && ring.err.is_some());
    assert_eq!((ring.size, ring.addresses), (0, None));
    assert_eq!(talk.session.state().features, None);
}

#[test]
fn ring_configuration_follows_the_features() {
    use crate::session::features::{EVENT_IDX, IN_ORDER, INDIRECT_DESC, NET_MRG_RXBUF};
    let mut talk = Talk::negotiated(1);
    talk.start(0);
    for (features, header_len) in [
        (0, 10),
        (INDIRECT_DESC | EVENT_IDX, 10),
        (NET_MRG_RXBUF, 12),
        (VERSION_1, 12),
        (VERSION_1 | NET_MRG_RXBUF | INDIRECT_DESC | EVENT_IDX, 12),
        (VERSION_1 | RING_PACKED, 12),
        (VERSION_1 | IN_ORDER, 12),
        (VERSION_1 | RING_PACKED | IN_ORDER | NET_MRG_RXBUF | INDIRECT_DESC | EVENT_IDX, 12),
    ] {
        talk.ok(u64_message(Req::SET_FEATURES, PROTOCOL_FEATURES | features));
        let config = talk.session.state().ring_config(0, 1522).unwrap();
        assert_eq!(config.header_len, header_len);
        assert_eq!(config.indirect, features & INDIRECT_DESC != 0);
        assert_eq!(config.event_idx, features & EVENT_IDX != 0);
        assert_eq!(config.mergeable, features & NET_MRG_RXBUF != 0);
        assert_eq!(config.packed, features & RING_PACKED != 0);
        assert_eq!(config.in_order, features & IN_ORDER != 0);
        assert_eq!((config.size, config.max_frame), (256, 1522));
    }
    assert_eq!(talk.session.state().ring_config(1, 1522), None, "not started");
    assert_eq!(talk.session.state().ring_config(2, 1522), None, "not there");
}

#[test]
fn ring_sizes_bases_and_alignment() {
    let mut talk = Talk::negotiated(1);
    for power in 0..16 {
        talk.ok(ring_message(Req::SET_VRING_NUM, 0, 1 << power));
    }
    for size in [0, 3, 255, 257, 32767, 32769, 65536, 1 << 31, u32::MAX] {
        talk.refused(ring_message(Req::SET_VRING_NUM, 0, size));
    }
    for base in [0x1_0000, 0x8000_0000, 0x8000_8000, u32::MAX] {
        talk.refused(ring_message(Req::SET_VRING_BASE, 0, base));
    }
    talk.refused(ring_message(Req::SET_VRING_ENABLE, 0, 2));
    // flags, then the address of desc, used, avail in the body of SET_VRING_ADDR
    for (field, value) in [(4, 1), (8, 8), (16, 2), (24, 1)] {
        let mut request = addresses(0, 0);
        request.body[field] |= value;
        talk.refused(request);
    }
}

/// A conversation in which packed rings were negotiated.
fn packed() -> Talk {
    let mut talk = Talk::negotiated(1);
    talk.ok(u64_message(Req::SET_FEATURES, PROTOCOL_FEATURES | VERSION_1 | RING_PACKED));
    talk
}

#[test]
fn packed_rings_have_other_sizes_bases_and_alignment() {
    let mut talk = packed();
    for size in [1, 2, 3, 255, 257, 1000, 32767, 32768] {
        talk.ok(ring_message(Req::SET_VRING_NUM, 0, size));
    }
    for size in [0, 32769, 65536, 0x8000_0000, u32::MAX] {
        talk.refused(ring_message(Req::SET_VRING_NUM, 0, size));
    }
    // Before there is a size any index may be right; it is held against the size when the ring is built.
    talk.ok(ring_message(Req::SET_VRING_BASE, 1, 0x7fff));
    talk.ok(ring_message(Req::SET_VRING_NUM, 0, 300));
    for (sent, position) in [
        (0x8000, Some(0x8000)),      // virtio-user's first
        (0x8000_8000, Some(0x8000)), // QEMU's first
        (0, Some(0)),
        (299, Some(299)),
        (0x8000 | 299, Some(0x812b)),
        // The upper half is where to go on writing: for us the same, whatever it says.
        (0x0005_8007, Some(0x8007)),
        (0xffff_0007, Some(7)),
        (300, None),
        (0x8000 | 300, None),
        (0x8000_7fff, None),
        (u32::MAX, None),
    ] {
        match position {
            Some(position) => {
                talk.ok(ring_message(Req::SET_VRING_BASE, 0, sent));
                assert_eq!(talk.base(0), position << 16 | position, "{sent:#x}");
            }
            None => assert!(talk.refused(ring_message(Req::SET_VRING_BASE, 0, sent)).contains("of 300"), "{sent:#x}"),
        }
    }
    // Both event suppression structures are aligned to 4 bytes (virtio 1.3, 2.8.10.1).
    for (field, value) in [(8, 8), (16, 2), (24, 2)] {
        let mut request = addresses(0, 0);
        request.body[field] |= value;
        talk.refused(request);
    }
}

#[test]
fn a_packed_ring_is_stopped_and_goes_on_where_it_was() {
    let mut talk = packed();
    talk.ok(mem_table(&[(REGION, &memfd(SIZE))]));
    talk.start(0);
    assert_eq!(talk.lanes.rings[&0].position, 0);
    for position in [0x8005, 0x00ff, 0x80ff, 0x0000] {
        talk.lanes.rings.get_mut(&0).unwrap().position = position;
        let answer = talk.base(0);
        assert_eq!(answer, u32::from(position) << 16 | u32::from(position));
        // With the answer as SET_VRING_BASE, or without any.
        if position == 0x8005 {
            talk.ok(ring_message(Req::SET_VRING_BASE, 0, answer));
        }
        talk.ok(no_fd_message(Req::SET_VRING_KICK, 0));
        assert_eq!(talk.lanes.rings[&0].position, position);
        assert!(talk.lanes.rings[&0].config.packed);
    }
}

#[test]
fn a_size_of_a_packed_ring_is_none_of_a_split_one() {
    let mut talk = packed();
    talk.ok(ring_message(Req::SET_VRING_NUM, 0, 300));
    talk.ok(u64_message(Req::SET_FEATURES, PROTOCOL_FEATURES | VERSION_1));
    talk.refused(ring_message(Req::SET_VRING_NUM, 0, 300));
    talk.refused(ring_message(Req::SET_VRING_BASE, 0, 0x8000_8000));
}
