//! Every rule about attaching and detaching, one test each.

use std::time::Duration;

use serde_json::{Value, json};

use super::recorder::{Desk, request, with};
use crate::control::Event;
use crate::error::Error;

const TAP: &str = "vdev:net_tap0,iface=vf0";
const OTHER_TAP: &str = "vdev:net_tap1,iface=vf1";
const SECOND: Duration = Duration::from_secs(1);

/// Class of the error of an answer.
fn class(answer: Result<Value, crate::control::rpc::RpcError>) -> String {
    answer.expect_err("is refused").class().to_owned()
}

#[test]
fn an_attach_is_answered_when_the_socket_listens_and_the_vf_forwards() {
    let mut desk = Desk::new();
    let token = desk.ask("port.attach", request("a", TAP, "a"));
    for next in ["probe a", "open a", "give a"] {
        assert_eq!(desk.asked(), [next]);
        assert_eq!(desk.answer(token), None);
        assert_eq!(desk.show_state("a"), "attaching");
        desk.done(next);
    }
    let answer = desk.answer(token).unwrap().unwrap();
    assert_eq!(answer["changed"], true);
    assert_eq!(answer["port"]["state"], "ready");
    assert_eq!(answer["port"]["vf"]["spec"], TAP);
    assert_eq!(answer["port"]["socket"]["mode"], "0660");
    desk.guest("a", true);
    assert_eq!(desk.show_state("a"), "connected");
}

#[test]
fn other_requests_are_answered_while_one_waits() {
    let mut desk = Desk::new();
    let slow = desk.ask("port.attach", request("slow", TAP, "slow"));
    desk.done("probe slow");
    let list = desk.ask("port.list", json!({}));
    assert_eq!(desk.answer(list).unwrap().unwrap()["ports"][0]["id"], "slow");
    let quick = desk.ask("port.attach", request("quick", "soft:null", "quick"));
    for next in ["probe quick", "open quick", "give quick"] {
        desk.done(next);
    }
    assert!(desk.answer(quick).unwrap().is_ok());
    assert_eq!(desk.answer(slow), None);
}

#[test]
fn the_same_attach_again_changes_nothing() {
    let mut desk = Desk::new();
    desk.attach("a", TAP, "a").unwrap();
    desk.log();
    for again in [
        request("a", TAP, "a"),
        // Defaults spelled out are the same request.
        with(request("a", TAP, "a"), json!({"mtu": 1500, "queue_pairs": 1, "offloads": "auto", "takeover": true})),
    ] {
        let answer = desk.call("port.attach", again).unwrap();
        assert_eq!(answer["changed"], false);
        assert_eq!(answer["pending"], json!([]));
    }
    assert!(desk.log().is_empty());
}

#[test]
fn the_same_attach_twice_at_once_is_one_port() {
    let mut desk = Desk::new();
    let first = desk.ask("port.attach", request("a", TAP, "a"));
    let second = desk.ask("port.attach", request("a", TAP, "a"));
    desk.settle();
    assert_eq!(desk.answer(first).unwrap().unwrap()["changed"], true);
    assert_eq!(desk.answer(second).unwrap().unwrap()["changed"], false);
    assert_eq!(desk.log(), ["probe a", "open a", "give a"]);
}

#[test]
fn attributes_change_live_or_are_pending_until_the_guest_leaves() {
    let mut desk = Desk::new();
    desk.attach("a", TAP, "a").unwrap();
    desk.guest("a", true);
    let wanted =
        with(request("a", TAP, "a"), json!({"mtu": 9000, "queue_pairs": 4, "mac": "52:54:00:00:00:01", "cores": [2]}));
    let token = desk.ask("port.attach", wanted.clone());
    let change = desk.change_asked();
    assert_eq!((change.cores, change.mac), (Some(vec![(1, 1)]), Some("52:54:00:00:00:01".parse().unwrap())));
    assert_eq!(change.socket, None, "owner and mode stay");
    let (offer, config) = change.next_connection.unwrap();
    assert_eq!((offer.mtu, offer.queue_pairs, config.mtu, config.queues), (9000, 4, 9000, 4));
    desk.settle();
    let answer = desk.answer(token).unwrap().unwrap();
    assert_eq!(answer["changed"], true);
    assert_eq!(answer["pending"], json!(["queue_pairs", "mtu"]), "MAC and cores change at once");
    assert_eq!(answer["port"]["cores"], json!([2, 2]));
    assert_eq!(answer["port"]["mtu"], 9000);
    let again = desk.call("port.attach", wanted.clone()).unwrap();
    assert_eq!((&again["changed"], &again["pending"]), (&json!(false), &json!(["queue_pairs", "mtu"])));
    desk.guest("a", false);
    assert_eq!(desk.show("a")["pending"], json!([]));

    // Without a guest nothing is pending.
    let answer = desk.call("port.attach", with(wanted, json!({"mtu": 1500}))).unwrap();
    assert_eq!((&answer["changed"], &answer["pending"]), (&json!(true), &json!([])));
}

#[test]
fn a_change_that_needs_the_vf_set_up_anew_is_answered_when_it_is() {
    let mut desk = Desk::new();
    // The VF was looked for just now: that is no reason to wait.
    desk.attach("a", TAP, "a").unwrap();
    desk.log();
    let token = desk.ask("port.attach", with(request("a", TAP, "a"), json!({"mtu": 9000})));
    desk.vf_breaks("a");
    for next in ["change a", "remove a", "probe a", "give a"] {
        assert_eq!(desk.answer(token), None, "before {next}");
        desk.done(next);
    }
    let answer = desk.answer(token).unwrap().unwrap();
    assert_eq!((&answer["port"]["state"], &answer["port"]["reason"]), (&json!("ready"), &Value::Null));
    desk.log();
    desk.vf_breaks("a");
    desk.settle();
    assert_eq!(desk.log(), ["remove a"], "a failure is");
}

#[test]
fn a_vf_that_is_back_before_its_change_is_done_waits_for_it() {
    let mut desk = Desk::new();
    desk.attach("a", TAP, "a").unwrap();
    let token = desk.ask("port.attach", with(request("a", TAP, "a"), json!({"mtu": 9000})));
    desk.vf_breaks("a");
    desk.done("remove a");
    desk.done("probe a");
    assert_eq!(desk.asked(), ["change a"]);
    desk.done("change a");
    assert_eq!(desk.config_asked().mtu, 9000);
    desk.settle();
    assert_eq!(desk.answer(token).unwrap().unwrap()["port"]["state"], "ready");
}

#[test]
fn what_was_pending_is_set_up_as_soon_as_the_guest_leaves() {
    let mut desk = Desk::new();
    desk.attach("a", TAP, "a").unwrap();
    desk.guest("a", true);
    desk.call("port.attach", with(request("a", TAP, "a"), json!({"mtu": 9000}))).unwrap();
    desk.log();
    desk.guest("a", false);
    desk.vf_breaks("a");
    desk.settle();
    assert_eq!(desk.log(), ["remove a", "probe a", "give a"]);
}

#[test]
fn a_pending_attribute_that_is_taken_back_is_no_longer_pending() {
    let mut desk = Desk::new();
    desk.attach("a", TAP, "a").unwrap();
    desk.guest("a", true);
    let jumbo = with(request("a", TAP, "a"), json!({"mtu": 9000}));
    assert_eq!(desk.call("port.attach", jumbo).unwrap()["pending"], json!(["mtu"]));
    desk.log();
    let answer = desk.attach("a", TAP, "a").unwrap();
    assert_eq!((&answer["changed"], &answer["pending"]), (&json!(true), &json!([])));
    assert_eq!(desk.log(), ["change a"], "the thread is told that the old values stay");
}

#[test]
fn a_change_that_fails_leaves_the_port_as_it_was() {
    let mut desk = Desk::new();
    desk.attach("a", TAP, "a").unwrap();
    let token = desk.ask("port.attach", with(request("a", TAP, "a"), json!({"mac": "52:54:00:00:00:01"})));
    desk.fails("change a", Error::Exhausted("the VF takes no MAC".into()));
    assert_eq!(class(desk.answer(token).unwrap()), "exhausted");
    assert_eq!(desk.show("a")["mac"], Value::Null);
}

#[test]
fn what_guests_are_offered_stays_when_only_the_mtu_changes() {
    let mut desk = Desk::new();
    let token = desk.ask("port.attach", request("a", "0000:05:08.1", "a"));
    desk.fails("probe a", Error::VfAbsent("not there".into()));
    desk.done("open a");
    assert_eq!(desk.answer(token).unwrap().unwrap()["port"]["offered"], json!(["checksum"]));
    desk.wait(SECOND);
    desk.settle();
    let answer = desk.call("port.attach", with(request("a", "0000:05:08.1", "a"), json!({"mtu": 9000}))).unwrap();
    assert_eq!(answer["port"]["offered"], json!(["checksum"]), "the VF is known now, the offer was made before");
}

#[test]
fn another_identity_replaces_the_port_if_no_guest_is_connected() {
    for (name, other) in [
        ("vfs", request("a", OTHER_TAP, "a")),
        ("socket.path", request("a", TAP, "b")),
        ("socket.role", json!({"id": "a", "vfs": [TAP], "socket": {"path": "/run/vf-test/a", "role": "client"}})),
    ] {
        let mut desk = Desk::new();
        desk.attach("a", TAP, "a").unwrap();
        desk.guest("a", true);
        let before = desk.show("a");
        let error = desk.call("port.attach", with(other.clone(), json!({"takeover": true}))).unwrap_err();
        assert_eq!(error.class(), "conflict");
        assert_eq!(error.data["differs"], json!([name]), "{}", error.message);
        assert_eq!(desk.show("a"), before);

        desk.guest("a", false);
        desk.log();
        let answer = desk.call("port.attach", other).unwrap();
        assert_eq!(answer["changed"], true);
        assert_eq!(desk.log(), ["close a", "remove a", "probe a", "open a", "give a"]);
        assert_eq!(desk.vfs(), 1);
    }
}

#[test]
fn what_another_port_holds_is_refused_and_its_holder_named() {
    let mut desk = Desk::new();
    desk.attach("a", TAP, "a").unwrap();
    for (asked, held) in [
        (request("b", TAP, "b"), "vdev:net_tap0"),
        // Another iface is still the same device.
        (request("b", "vdev:net_tap0,iface=x", "b"), "vdev:net_tap0"),
        (json!({"id": "b", "vfs": [OTHER_TAP, TAP], "socket": {"path": "/run/vf-test/b"}}), "vdev:net_tap0"),
        (request("b", OTHER_TAP, "a"), "socket /run/vf-test/a"),
    ] {
        let error = desk.call("port.attach", asked).unwrap_err();
        assert_eq!(error.class(), "conflict");
        assert_eq!((&error.data["holder"], &error.data["held"]), (&json!("a"), &json!(held)));
    }
    desk.attach("c", "soft:null", "c").unwrap();
    desk.attach("d", "soft:null", "d").unwrap();
}

#[test]
fn an_interface_is_held_whichever_vdev_is_on_it() {
    let mut desk = Desk::new();
    desk.attach("a", "vdev:net_tap0,iface=abcdefghijklmno", "a").unwrap();
    for vf in [
        "vdev:net_tap1,iface=abcdefghijklmno",
        "vdev:net_tap1,iface=abcdefghijklmnopq",
        "vdev:net_af_packet0,iface=abcdefghijklmno",
    ] {
        let error = desk.attach("b", vf, "b").unwrap_err();
        assert_eq!(error.class(), "conflict", "{vf}");
        assert_eq!((&error.data["holder"], &error.data["held"]), (&json!("a"), &json!("interface abcdefghijklmno")));
    }
    let twice = json!({"vfs": ["vdev:net_tap1,iface=x", "vdev:net_tap2,iface=x"]});
    assert_eq!(class(desk.call("port.attach", with(request("b", TAP, "b"), twice))), "invalid");
    let takes = with(request("b", "vdev:net_tap1,iface=abcdefghijklmno", "b"), json!({"takeover": true}));
    let answer = desk.call("port.attach", takes).unwrap();
    assert_eq!(answer["taken_from"], json!(["a"]));
    assert_eq!(desk.ids(), ["b"]);
}

#[test]
fn takeover_takes_from_a_port_without_a_guest_and_names_it() {
    let mut desk = Desk::new();
    desk.attach("a", TAP, "a").unwrap();
    desk.attach("b", OTHER_TAP, "b").unwrap();
    let both = with(request("c", TAP, "b"), json!({"takeover": true}));
    desk.guest("b", true);
    let error = desk.call("port.attach", both.clone()).unwrap_err();
    assert_eq!((error.class(), &error.data["holder"], &error.data["guest"]), ("conflict", &json!("b"), &json!(true)));
    assert_eq!(desk.show_state("a"), "ready", "nothing is taken unless all of it can be");

    desk.guest("b", false);
    let answer = desk.call("port.attach", both).unwrap();
    assert_eq!(answer["taken_from"], json!(["a", "b"]));
    assert_eq!(desk.ids(), ["c"]);
    assert_eq!((desk.vfs(), desk.threads()), (1, 1));
}

#[test]
fn a_held_vf_is_refused_before_the_own_port_is_replaced() {
    let mut desk = Desk::new();
    desk.attach("a", TAP, "a").unwrap();
    desk.attach("b", OTHER_TAP, "b").unwrap();
    desk.log();
    assert_eq!(class(desk.attach("a", OTHER_TAP, "a")), "conflict");
    assert_eq!(desk.show_state("a"), "ready");
    assert!(desk.log().is_empty());
}

#[test]
fn a_half_done_attach_rolls_back_and_is_answered_then() {
    for (fails, undone) in
        [("probe a", &[][..]), ("open a", &["remove a"][..]), ("give a", &["remove a", "close a"][..])]
    {
        let mut desk = Desk::new();
        let token = desk.ask("port.attach", request("a", TAP, "a"));
        while desk.asked() != [fails] {
            desk.reply_at(0, None);
        }
        desk.fails(fails, Error::Exhausted("no hugepages".into()));
        assert_eq!(desk.asked(), undone, "{fails}");
        assert_eq!(desk.answer(token).is_some(), undone.is_empty(), "{fails}");
        desk.settle();
        if !undone.is_empty() {
            assert_eq!(class(desk.answer(token).unwrap()), "exhausted");
        }
        assert_eq!((desk.ids().len(), desk.vfs(), desk.threads()), (0, 0, 0), "{fails}");
        desk.attach("a", TAP, "a").unwrap();
    }
}

#[test]
fn a_port_whose_vf_is_absent_waits_and_starts_by_itself() {
    let mut desk = Desk::new();
    let token = desk.ask("port.attach", request("a", "0000:05:08.1", "a"));
    desk.fails("probe a", Error::VfAbsent("0000:05:08.1 is not there".into()));
    desk.done("open a");
    let answer = desk.answer(token).unwrap().unwrap();
    assert_eq!(answer["port"]["state"], "waiting");
    assert_eq!(answer["port"]["reason"], "0000:05:08.1 is not there");
    desk.wait(SECOND - Duration::from_millis(1));
    assert!(desk.asked().is_empty());
    desk.wait(Duration::from_millis(1));
    assert_eq!(desk.asked(), ["probe a"]);
    desk.fails("probe a", Error::Exhausted("no slot".into()));
    assert_eq!(desk.show("a")["reason"], "no slot");
    desk.wait(SECOND);
    desk.settle();
    let port = desk.show("a");
    assert_eq!((&port["state"], &port["reason"]), (&json!("ready"), &Value::Null));
}

#[test]
fn a_vf_that_fails_is_removed_and_probed_again() {
    let mut desk = Desk::new();
    desk.attach("a", TAP, "a").unwrap();
    desk.guest("a", true);
    desk.log();
    desk.vf_breaks("a");
    let port = desk.show("a");
    assert_eq!((&port["state"], &port["guest"]["guest"]), (&json!("waiting"), &json!(true)));
    desk.settle();
    assert_eq!((desk.vfs(), desk.log()), (0, vec!["remove a".to_owned()]), "not more often than each second");
    desk.wait(SECOND);
    desk.settle();
    assert_eq!(desk.log(), ["probe a", "give a"]);
    assert_eq!(desk.show_state("a"), "connected");
    desk.wait(SECOND);
    desk.vf_breaks("a");
    desk.settle();
    assert_eq!(desk.log(), ["remove a", "probe a", "give a"], "it worked for a while: at once");
}

#[test]
fn a_vf_that_comes_back_under_a_guest_is_what_the_guest_was_offered() {
    let mut desk = Desk::new();
    desk.attach("a", TAP, "a").unwrap();
    desk.guest("a", true);
    let wanted = with(request("a", TAP, "a"), json!({"mtu": 9000, "queue_pairs": 4, "mac": "52:54:00:00:00:01"}));
    assert_eq!(desk.call("port.attach", wanted).unwrap()["pending"], json!(["queue_pairs", "mtu"]));
    let again = |desk: &mut Desk| {
        desk.wait(SECOND);
        desk.vf_breaks("a");
        desk.done("remove a");
        desk.done("probe a");
        let config = desk.config_asked();
        desk.done("give a");
        (config.mtu, config.queues, config.mac)
    };
    let mac = Some("52:54:00:00:00:01".parse().unwrap());
    assert_eq!(again(&mut desk), (1500, 1, mac), "what changes at once is in force");
    assert_eq!(desk.show("a")["pending"], json!(["queue_pairs", "mtu"]));
    desk.guest("a", false);
    assert_eq!(again(&mut desk), (9000, 4, mac));
}

#[test]
fn a_stand_in_is_used_for_an_absent_device_and_shown() {
    let mut desk = Desk::new();
    let answer = desk.attach("a", "0000:0e:00.0", "a").unwrap();
    assert_eq!(answer["port"]["stand_in"], "vdev:net_tap9,iface=vf9");
    assert_eq!(answer["port"]["vf"]["spec"], "vdev:net_tap9,iface=vf9");
    assert_eq!(answer["port"]["vfs"], json!(["0000:0e:00.0"]));
    assert_eq!(class(desk.attach("b", "vdev:net_tap9", "b")), "conflict", "a stand-in is held too");
    assert_eq!(desk.attach("a", "0000:0e:00.0", "a").unwrap()["changed"], false);
}

#[test]
fn detach_finds_a_port_by_id_socket_or_vf_and_answers_when_it_is_gone() {
    for selector in [json!({"id": "a"}), json!({"socket": "/run/vf-test/a"}), json!({"vf": TAP})] {
        let mut desk = Desk::new();
        desk.attach("a", TAP, "a").unwrap();
        desk.guest("a", true);
        let token = desk.ask("port.detach", selector.clone());
        assert_eq!(desk.asked(), ["close a"]);
        assert_eq!(desk.show_state("a"), "detaching");
        desk.done("close a");
        assert_eq!(desk.answer(token), None);
        desk.done("remove a");
        assert_eq!(desk.answer(token).unwrap().unwrap(), json!({"changed": true, "id": "a"}));
        let again = desk.call("port.detach", selector).unwrap();
        assert_eq!(again, json!({"changed": false, "id": null}));
    }
}

#[test]
fn a_detach_that_matches_several_ports_touches_none() {
    let mut desk = Desk::new();
    for id in ["a", "b"] {
        desk.attach(id, "soft:null", id).unwrap();
    }
    let error = desk.call("port.detach", json!({"vf": "soft:null"}));
    assert_eq!(class(error), "conflict");
    assert_eq!(desk.asked(), Vec::<String>::new());
    assert_eq!(desk.call("port.detach", json!({"vf": "soft:loop"})).unwrap()["changed"], false);
}

#[test]
fn a_detach_calls_off_an_attach_under_way() {
    for steps in 0..3 {
        let mut desk = Desk::new();
        let attach = desk.ask("port.attach", request("a", TAP, "a"));
        (0..steps).for_each(|_| desk.reply_at(0, None));
        let detach = desk.ask("port.detach", json!({"id": "a"}));
        desk.settle();
        let error = desk.answer(attach).unwrap().unwrap_err();
        assert_eq!((error.class(), &error.data["superseded"]), ("conflict", &json!(true)));
        assert_eq!(desk.answer(detach).unwrap().unwrap()["changed"], true);
        assert_eq!((desk.vfs(), desk.threads()), (0, 0));
    }
}

#[test]
fn an_attach_waits_for_what_is_being_detached() {
    let mut desk = Desk::new();
    desk.attach("a", TAP, "a").unwrap();
    let detach = desk.ask("port.detach", json!({"id": "a"}));
    let attach = desk.ask("port.attach", request("b", TAP, "a"));
    assert_eq!(desk.asked(), ["close a"]);
    desk.settle();
    assert!(desk.answer(detach).unwrap().is_ok());
    let answer = desk.answer(attach).unwrap().unwrap();
    assert_eq!((&answer["changed"], &answer["taken_from"]), (&json!(true), &json!([])));
    assert_eq!(desk.ids(), ["b"]);
}

#[test]
fn a_later_attach_does_not_overtake_one_that_waits() {
    let mut desk = Desk::new();
    desk.attach("a", TAP, "a").unwrap();
    desk.ask("port.detach", json!({"id": "a"}));
    let first = desk.ask("port.attach", request("b", TAP, "b"));
    let second = desk.ask("port.attach", request("c", OTHER_TAP, "b"));
    desk.settle();
    assert!(desk.answer(first).unwrap().is_ok());
    assert_eq!(class(desk.answer(second).unwrap()), "conflict");
}

#[test]
fn sync_lists_and_removes_on_request() {
    let mut desk = Desk::new();
    for (id, vf) in [("a", TAP), ("b", OTHER_TAP), ("c", "soft:null")] {
        desk.attach(id, vf, id).unwrap();
    }
    desk.guest("b", true);
    let answer = desk.call("port.sync", json!({"ids": ["a", "z"]})).unwrap();
    assert_eq!(answer, json!({"surplus": ["b", "c"], "missing": ["z"], "removed": false}));
    assert_eq!(desk.ids(), ["a", "b", "c"]);
    let token = desk.ask("port.sync", json!({"ids": ["a", "z"], "remove": true}));
    assert_eq!(desk.answer(token), None);
    desk.settle();
    assert_eq!(desk.answer(token).unwrap().unwrap()["removed"], true);
    assert_eq!(desk.ids(), ["a"]);
    assert_eq!((desk.vfs(), desk.threads()), (1, 1));
}

#[test]
fn sync_counts_a_port_that_goes_as_gone() {
    let mut desk = Desk::new();
    desk.attach("a", TAP, "a").unwrap();
    desk.attach("b", OTHER_TAP, "b").unwrap();
    let detach = desk.ask("port.detach", json!({"id": "a"}));
    let sync = desk.ask("port.sync", json!({"ids": ["a", "b"]}));
    assert_eq!(desk.answer(sync).unwrap().unwrap(), json!({"surplus": [], "missing": ["a"], "removed": false}));
    let sync = desk.ask("port.sync", json!({"ids": ["b"]}));
    assert_eq!(desk.answer(sync).unwrap().unwrap(), json!({"surplus": [], "missing": [], "removed": false}));
    let sync = desk.ask("port.sync", json!({"ids": ["b"], "remove": true}));
    assert_eq!(desk.answer(sync), None, "what is not in the set is gone when it is answered");
    desk.settle();
    assert_eq!(desk.answer(sync).unwrap().unwrap(), json!({"surplus": [], "missing": [], "removed": true}));
    assert!(desk.answer(detach).unwrap().is_ok());
    assert_eq!(desk.ids(), ["b"]);
}

#[test]
fn wrong_requests_are_refused_and_touch_nothing() {
    let mut desk = Desk::new();
    let good = || request("a", TAP, "a");
    for (wrong, code) in [
        (with(good(), json!({"vfs": []})), "invalid"),
        (with(good(), json!({"vfs": [TAP, "vdev:net_tap0"]})), "invalid"),
        (with(good(), json!({"vfs": ["vdev:net_pcap0,rx_pcap=/etc/shadow"]})), "not_allowed"),
        (with(good(), json!({"queue_pairs": 0})), "invalid"),
        (with(good(), json!({"queue_pairs": 33})), "invalid"),
        (with(good(), json!({"mtu": 67})), "invalid"),
        (with(good(), json!({"mtu": 9217})), "invalid"),
        (with(good(), json!({"cores": [7]})), "invalid"),
        (with(good(), json!({"cores": [1, 2, 1]})), "invalid"),
        (with(good(), json!({"cores": [1, 2, 1, 2]})), "invalid"),
        (with(good(), json!({"mac": "01:00:00:00:00:01"})), "invalid_params"),
        (with(good(), json!({"socket": {"path": "/etc/a"}})), "not_allowed"),
        (with(good(), json!({"socket": {"path": "/run/vf-test/control.sock"}})), "invalid"),
        (with(good(), json!({"socket": {"path": "/run/vf-test/a", "owner": "nobody-of-that-name"}})), "invalid"),
        (with(good(), json!({"socket": {"path": "/run/vf-test/a", "role": "client", "mode": "0600"}})), "invalid"),
    ] {
        assert_eq!(class(desk.call("port.attach", wrong.clone())), code, "{wrong}");
    }
    assert!(desk.log().is_empty());
    assert_eq!(class(desk.call("port.show", json!({"id": "a"}))), "not_found");
    assert_eq!(class(desk.call("stats", json!({"id": "a"}))), "not_found");
}

#[test]
fn ports_spread_over_the_cores() {
    let mut desk = Desk::new();
    let cores = |answer: Value| answer["port"]["cores"].clone();
    assert_eq!(cores(desk.attach("a", "soft:null", "a").unwrap()), json!([1, 1]));
    assert_eq!(cores(desk.attach("b", "soft:null", "b").unwrap()), json!([2, 2]));
    let split = with(request("c", "soft:null", "c"), json!({"cores": [2, 1]}));
    assert_eq!(cores(desk.call("port.attach", split).unwrap()), json!([2, 1]));
    let info = desk.call("info", json!({})).unwrap();
    assert_eq!(info["cores"], json!([{"cpu": 1, "lanes": 3}, {"cpu": 2, "lanes": 3}]));
    assert_eq!((&info["ports"], &info["limits"]["ethdevs"]), (&json!(3), &json!(32)));
}

#[test]
fn a_port_has_a_lane_on_as_many_cores_as_it_has_queue_pairs() {
    let mut desk = Desk::new();
    let lanes = |answer: &Value| {
        let lanes = &answer["port"]["lanes"];
        (lanes["guest_to_vf"].clone(), lanes["vf_to_guest"].clone())
    };
    let first = desk.call("port.attach", with(request("a", TAP, "a"), json!({"queue_pairs": 4}))).unwrap();
    assert_eq!(lanes(&first), (json!([1, 2]), json!([1, 2])));
    assert_eq!(first["port"]["cores"], json!([1, 1]), "those of the first lanes");
    // The first lane of the next port is elsewhere: that is the one which most guests use.
    let second = desk.call("port.attach", with(request("b", "soft:null", "b"), json!({"queue_pairs": 2}))).unwrap();
    assert_eq!(lanes(&second), (json!([2, 1]), json!([2, 1])));
    let asked = with(request("c", "soft:null", "c"), json!({"queue_pairs": 2, "cores": [1, 2, 2, 1]}));
    assert_eq!(lanes(&desk.call("port.attach", asked.clone()).unwrap()), (json!([1, 2]), json!([2, 1])));
    assert_eq!(desk.call("port.attach", asked).unwrap()["changed"], false);
    let info = desk.call("info", json!({})).unwrap();
    assert_eq!(info["cores"], json!([{"cpu": 1, "lanes": 6}, {"cpu": 2, "lanes": 6}]));
    let stats = desk.call("stats", json!({"id": "c"})).unwrap();
    let cpus = |direction: &str| {
        let lanes = stats["ports"][0]["lanes"][direction].as_array().unwrap().iter();
        lanes.map(|lane| lane["cpu"].clone()).collect::<Vec<_>>()
    };
    assert_eq!((cpus("guest_to_vf"), cpus("vf_to_guest")), (vec![json!(1), json!(2)], vec![json!(2), json!(1)]));

    // Without cores they stay where they are. With more queue pairs there are more of them, with fewer fewer.
    let one = with(request("d", "soft:null", "d"), json!({"cores": [2]}));
    assert_eq!(lanes(&desk.call("port.attach", one).unwrap()), (json!([2]), json!([2])));
    let mut cores = |pairs: u16| {
        let token = desk.ask("port.attach", with(request("d", "soft:null", "d"), json!({"queue_pairs": pairs})));
        let change = desk.change_asked().cores;
        desk.settle();
        desk.answer(token).unwrap().unwrap();
        change
    };
    assert_eq!(cores(8), Some(vec![(1, 1), (0, 0)]));
    assert_eq!(cores(3), None);
    assert_eq!(cores(1), Some(vec![(1, 1)]));
}

#[test]
fn stats_show_lanes_and_the_vf() {
    let mut desk = Desk::new();
    desk.attach("a", TAP, "a").unwrap();
    desk.attach("b", "soft:null", "b").unwrap();
    let stats = desk.call("stats", json!({"id": "a"})).unwrap();
    assert_eq!(stats["ports"].as_array().unwrap().len(), 1);
    let port = &stats["ports"][0];
    assert_eq!(port["guest_to_vf"]["packets"], 0);
    assert_eq!(port["vf_to_guest"]["dropped"]["guest_ring_empty"], 0);
    assert_eq!((&port["vf"]["link_up"], &port["xstats"]["rx_good"]), (&json!(true), &json!(7)));
    assert_eq!(port["xstats_age_ms"], 0);
    desk.wait(Duration::from_millis(300));
    let stats = desk.call("stats", json!({"id": "a"})).unwrap();
    assert_eq!(stats["ports"][0]["xstats_age_ms"], 300, "they are of then");
    assert_eq!(desk.call("stats", json!({})).unwrap()["ports"].as_array().unwrap().len(), 2);
}

#[test]
fn stop_takes_everything_down_and_refuses_what_comes() {
    let mut desk = Desk::new();
    desk.attach("a", TAP, "a").unwrap();
    let attaching = desk.ask("port.attach", request("b", OTHER_TAP, "b"));
    desk.event(Event::Stop);
    let late = desk.ask("port.attach", request("c", "soft:null", "c"));
    assert_eq!(class(desk.answer(late).unwrap()), "exhausted");
    assert!(!desk.ports.finished());
    desk.settle();
    assert_eq!(class(desk.answer(attaching).unwrap()), "exhausted");
    assert!(desk.ports.finished());
    assert_eq!((desk.vfs(), desk.threads()), (0, 0));
}

#[test]
fn stop_does_not_wait_for_ever_for_ports_and_drivers() {
    let mut desk = Desk::new();
    desk.attach("stuck", "soft:null", "stuck").unwrap();
    desk.attach("removing", OTHER_TAP, "removing").unwrap();
    let probing = desk.ask("port.attach", request("probing", TAP, "probing"));
    desk.event(Event::Stop);
    desk.done("close removing");
    assert_eq!(desk.asked(), ["probe probing", "close stuck", "remove removing"]);

    // A port's thread is given up first.
    let due = desk.ports.due().expect("the end is near");
    assert_eq!(due - desk.now, Duration::from_millis(500));
    desk.wait(due - desk.now);
    assert_eq!(desk.ids(), ["probing", "removing"]);

    // Then drivers, each of which may take its time.
    let due = desk.ports.due().expect("so is theirs");
    desk.wait(due - desk.now - Duration::from_millis(1));
    assert!(!desk.ports.finished());
    desk.fails("probe probing", Error::VfAbsent("it is not there".into()));
    assert_eq!(class(desk.answer(probing).unwrap()), "exhausted");
    desk.wait(5 * SECOND - Duration::from_millis(1));
    assert!(!desk.ports.finished());
    let due = desk.ports.due().expect("and again");
    desk.wait(due - desk.now);
    assert!(desk.ports.finished());
    assert_eq!(desk.ports.due(), None);
}

impl Desk {
    fn show_state(&mut self, id: &str) -> String {
        // Without settling: what is under way stays so.
        let token = self.ask("port.show", json!({ "id": id }));
        let port = self.answer(token).unwrap().unwrap();
        port["state"].as_str().unwrap().to_owned()
    }

    fn ids(&mut self) -> Vec<String> {
        let token = self.ask("port.list", json!({}));
        let list = self.answer(token).unwrap().unwrap();
        let ids = list["ports"].as_array().unwrap().iter();
        ids.map(|port| port["id"].as_str().unwrap().to_owned()).collect()
    }
}
