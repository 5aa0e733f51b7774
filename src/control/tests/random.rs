//! Requests, crew answers and guests in any order: nothing is held twice, lost, or left unanswered.

use std::collections::BTreeSet;
use std::time::Duration;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::recorder::Desk;
use crate::control::Event;
use crate::error::Error;

#[derive(Clone, Debug)]
enum Op {
    Attach {
        id: u8,
        vfs: Vec<u8>,
        socket: u8,
        client: bool,
        mtu: u16,
        takeover: bool,
    },
    Detach {
        id: u8,
    },
    DetachSocket {
        socket: u8,
    },
    Sync {
        ids: BTreeSet<u8>,
    },
    /// The crew answers one of the things it was asked.
    Reply {
        which: usize,
        fails: u8,
    },
    Guest {
        id: u8,
        there: bool,
    },
    VfBreaks {
        id: u8,
    },
    Wait,
}

fn op() -> impl Strategy<Value = Op> {
    let id = 0..4_u8;
    prop_oneof![
        4 => (id.clone(), prop::collection::btree_set(0..5_u8, 1..3), id.clone(), any::<bool>(), 0..2_u16, any::<bool>())
            .prop_map(|(id, vfs, socket, client, mtu, takeover)| Op::Attach {
                id, vfs: vfs.into_iter().collect(), socket, client, mtu: 1500 + mtu, takeover,
            }),
        2 => id.clone().prop_map(|id| Op::Detach { id }),
        1 => id.clone().prop_map(|socket| Op::DetachSocket { socket }),
        1 => prop::collection::btree_set(id.clone(), 0..4).prop_map(|ids| Op::Sync { ids }),
        12 => (any::<usize>(), 0..8_u8).prop_map(|(which, fails)| Op::Reply { which, fails }),
        2 => (id.clone(), any::<bool>()).prop_map(|(id, there)| Op::Guest { id, there }),
        1 => id.prop_map(|id| Op::VfBreaks { id }),
        1 => Just(Op::Wait),
    ]
}

/// Several of a kind, one with a stand-in, the stand-in itself, one that can be had by many.
fn vf(index: u8) -> &'static str {
    ["vdev:net_tap0", "vdev:net_tap1,iface=x", "0000:0e:00.0", "vdev:net_tap9", "soft:null"][usize::from(index)]
}

fn name(index: u8) -> String {
    format!("p{index}")
}

/// Does it; a request's token is kept.
fn apply(desk: &mut Desk, op: Op, tokens: &mut Vec<u64>) {
    match op {
        Op::Attach { id, vfs, socket, client, mtu, takeover } => {
            let vfs: Vec<_> = vfs.into_iter().map(vf).collect();
            let role = if client { "client" } else { "server" };
            let socket = json!({"path": format!("/run/vf-test/{socket}"), "role": role});
            let params = json!({"id": name(id), "vfs": vfs, "socket": socket, "mtu": mtu, "takeover": takeover});
            tokens.push(desk.ask("port.attach", params));
        }
        Op::Detach { id } => tokens.push(desk.ask("port.detach", json!({ "id": name(id) }))),
        Op::DetachSocket { socket } => {
            tokens.push(desk.ask("port.detach", json!({ "socket": format!("/run/vf-test/{socket}") })));
        }
        Op::Sync { ids } => {
            let ids: Vec<_> = ids.into_iter().map(name).collect();
            tokens.push(desk.ask("port.sync", json!({ "ids": ids, "remove": true })));
        }
        Op::Reply { which, fails } => {
            let count = desk.asked().len();
            if count > 0 {
                let which = which % count;
                // Close cannot fail; a removal that does is logged and forgotten.
                let error = match fails {
                    0 => Some(Error::VfAbsent("absent".into())),
                    1 => Some(Error::Exhausted("full".into())),
                    _ => None,
                };
                desk.reply_at(which, error);
            }
        }
        Op::Guest { id, there } => desk.guest(&name(id), there),
        Op::VfBreaks { id } => desk.vf_breaks(&name(id)),
        Op::Wait => desk.wait(Duration::from_secs(1)),
    }
}

/// No VF and no socket belongs to two ports.
fn check_claims(desk: &mut Desk) {
    let token = desk.ask("port.list", json!({}));
    let list = desk.answer(token).unwrap().unwrap();
    let mut held = BTreeSet::new();
    for port in list["ports"].as_array().unwrap() {
        let socket = port["socket"]["path"].as_str().unwrap().to_owned();
        assert!(held.insert(socket), "{list}");
        for vf in port["vfs"].as_array().unwrap() {
            let device = match vf.as_str().unwrap() {
                "soft:null" => continue,
                "0000:0e:00.0" => "vdev:net_tap9",
                vdev => vdev,
            };
            assert!(held.insert(device.to_owned()), "{list}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_held_twice_lost_or_left_unanswered(ops in prop::collection::vec(op(), 1..80)) {
        let mut desk = Desk::new();
        let mut tokens = vec![];
        for op in ops {
            apply(&mut desk, op, &mut tokens);
            check_claims(&mut desk);
        }
        desk.settle();
        check_claims(&mut desk);
        let answers: Vec<Option<Result<Value, _>>> = tokens.iter().map(|token| desk.answer(*token)).collect();
        prop_assert!(answers.iter().all(Option::is_some), "unanswered: {answers:?}");

        desk.event(Event::Stop);
        desk.settle();
        prop_assert!(desk.ports.finished());
        prop_assert_eq!((desk.vfs(), desk.threads()), (0, 0));
    }
}
