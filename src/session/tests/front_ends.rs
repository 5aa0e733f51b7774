//! What real front ends send, message by message, in their order.

use super::*;

/// One step: the message, and what comes back.
enum Step {
    /// Silence.
    Silent(Request),
    /// This value.
    Reply(Request, u64),
    /// A reply whose value does not matter here.
    Any(Request),
}
use Step::{Any, Reply as Answer, Silent};

fn play(talk: &mut Talk, steps: Vec<Step>) {
    for step in steps {
        match step {
            Silent(request) => talk.ok(request),
            Answer(request, value) => assert_eq!(talk.ask(request), value),
            Any(request) => drop(talk.ask(request)),
        }
    }
}

/// QEMU 10.0 with `queues=2`, from connecting to a guest that uses both pairs.
/// (hw/virtio/vhost-user.c, hw/virtio/vhost.c, net/vhost-user.c)
fn qemu(memory: &OwnedFd) -> Vec<Step> {
    let offered = offer(2);
    let protocol = offered.protocol_features;
    let features = offered.features & !(1 << 26);
    let mut steps = Vec::new();
    // vhost_user_start: vhost_dev_init, once per queue pair.
    for pair in 0..2 {
        steps.extend([
            Answer(empty(Req::GET_FEATURES), offered.features),
            Answer(empty(Req::GET_PROTOCOL_FEATURES), protocol),
            Silent(u64_message(Req::SET_PROTOCOL_FEATURES, protocol)),
            Answer(empty(Req::GET_QUEUE_NUM), 2),
            Answer(empty(Req::GET_MAX_MEM_SLOTS), 509),
        ]);
        if pair == 0 {
            steps.push(Silent(empty(Req::SET_OWNER)));
        }
        steps.push(Answer(empty(Req::GET_FEATURES), offered.features));
        for ring in [2 * pair, 2 * pair + 1] {
            steps.push(Silent(eventfd_message(Req::SET_VRING_CALL, ring)));
            steps.push(Silent(eventfd_message(Req::SET_VRING_ERR, ring)));
        }
    }
    // virtio-net is realized: the first pair is enabled, long before SET_FEATURES.
    steps.push(Answer(need_reply(u64_message(Req::NET_SET_MTU, 1500)), 0));
    for ring in 0..2 {
        steps.push(Answer(need_reply(ring_message(Req::SET_VRING_ENABLE, ring, 1)), 0));
    }
    // DRIVER_OK. Guest notifiers are unmasked; then each pair is enabled and started in turn.
    for ring in 0..4 {
        steps.push(Silent(eventfd_message(Req::SET_VRING_CALL, ring)));
    }
    for pair in 0..2 {
        for ring in [2 * pair, 2 * pair + 1] {
            steps.push(Answer(need_reply(ring_message(Req::SET_VRING_ENABLE, ring, 1)), 0));
        }
        steps.push(Silent(u64_message(Req::SET_FEATURES, features)));
        steps.push(Any(empty(Req::GET_STATUS)));
        steps.push(Silent(u64_message(Req::SET_STATUS, 8)));
        if pair == 0 {
            steps.push(Answer(need_reply(mem_region(Req::ADD_MEM_REG, REGION, Some(memory))), 0));
        }
        for ring in [2 * pair, 2 * pair + 1] {
            steps.extend([
                Silent(ring_message(Req::SET_VRING_NUM, ring, 256)),
                Silent(ring_message(Req::SET_VRING_BASE, ring, 0)),
                Silent(addresses(ring, 0)),
                Silent(eventfd_message(Req::SET_VRING_KICK, ring)),
            ]);
        }
    }
    steps.push(Answer(empty(Req::GET_STATUS), 8));
    steps.push(Silent(u64_message(Req::SET_STATUS, 0xf)));
    steps
}

/// The guest reboots: every ring is stopped, the status is reset, and all begins again behind the realize.
fn qemu_stops() -> Vec<Step> {
    let mut steps = Vec::new();
    for ring in 0..4 {
        steps.push(Any(ring_message(Req::GET_VRING_BASE, ring, 0)));
    }
    steps.push(Silent(u64_message(Req::SET_STATUS, 0)));
    steps.push(Silent(empty(Req::RESET_DEVICE)));
    steps
}

#[test]
fn qemu_starts_reboots_and_starts_again() {
    let mut talk = Talk::new(2);
    let memory = memfd(SIZE);
    play(&mut talk, qemu(&memory));
    let started = |talk: &Talk| {
        assert_eq!(talk.lanes.rings.keys().copied().collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert!(talk.session.state().rings.iter().all(|ring| ring.enabled && ring.call.is_some()));
        assert_eq!(talk.session.state().status, 0xf);
    };
    started(&talk);
    for ring in 0..4_u16 {
        talk.lanes.rings.get_mut(&ring.into()).unwrap().position = 100 + ring;
    }
    play(&mut talk, qemu_stops());
    assert!(talk.lanes.rings.is_empty());
    // The memory table is not sent again: QEMU sends differences only.
    assert_eq!(talk.session.state().regions.len(), 1);
    let again = qemu(&memory).into_iter().skip_while(|step| !is(step, Req::SET_FEATURES));
    let again = again.filter(|step| !is(step, Req::ADD_MEM_REG)).collect();
    for ring in 0..4 {
        talk.ask(need_reply(ring_message(Req::SET_VRING_ENABLE, ring, 1)));
    }
    play(&mut talk, again);
    started(&talk);
}

fn is(step: &Step, code: Req) -> bool {
    let (Silent(request) | Answer(request, _) | Any(request)) = step;
    request.code == u32::from(code)
}

/// The second pair is set up while the first is in use: that must not cost the first anything but pauses.
#[test]
fn qemu_pairs_do_not_drain_each_other() {
    let mut talk = Talk::new(2);
    play(&mut talk, qemu(&memfd(SIZE)));
    let calls = talk.lanes.take_calls();
    assert!(!calls.iter().any(|call| matches!(call, Call::Drain | Call::StopRing(_))), "{calls:?}");
}

/// DPDK 22.11 to 26.07, net_virtio_user as client, `queues=2`: probe, start, a memory event, stop, start.
/// (drivers/net/virtio/virtio_user/virtio_user_dev.c, vhost_user.c)
#[test]
fn virtio_user_starts_grows_stops_and_starts_again() {
    let offered = offer(2);
    // Its own: MQ, REPLY_ACK, STATUS.
    let protocol = offered.protocol_features & 0x1_0009;
    let features = offered.features & !(1 << 17 | 1 << 18 | 1 << 21);
    let memory = memfd(SIZE);
    let mut talk = Talk::new(2);
    let mut probe = vec![
        Silent(empty(Req::SET_OWNER)),
        Answer(empty(Req::GET_FEATURES), offered.features),
        Answer(empty(Req::GET_PROTOCOL_FEATURES), offered.protocol_features),
        Silent(u64_message(Req::SET_PROTOCOL_FEATURES, protocol)),
    ];
    // FEATURES_OK: call fds of every ring, whether it will be used or not, come before the features.
    probe.extend((0..4).map(|ring| Silent(eventfd_message(Req::SET_VRING_CALL, ring))));
    probe.extend([
        Silent(u64_message(Req::SET_FEATURES, features)),
        Answer(need_reply(u64_message(Req::SET_STATUS, 0xb)), 0),
        Answer(empty(Req::GET_STATUS), 0xb),
    ]);
    play(&mut talk, probe);

    let start = || {
        let mut steps = vec![Answer(need_reply(mem_table(&[(REGION, &memory)])), 0)];
        for ring in 0..4 {
            steps.extend([
                Silent(ring_message(Req::SET_VRING_NUM, ring, 256)),
                Silent(ring_message(Req::SET_VRING_BASE, ring, 0)),
                Silent(addresses(ring, 0)),
                Silent(eventfd_message(Req::SET_VRING_KICK, ring)),
            ]);
        }
        steps.extend((0..2).map(|ring| Silent(ring_message(Req::SET_VRING_ENABLE, ring, 1))));
        steps.push(Answer(need_reply(u64_message(Req::SET_STATUS, 0xf)), 0));
        steps.extend((2..4).map(|ring| Silent(ring_message(Req::SET_VRING_ENABLE, ring, 1))));
        steps
    };
    play(&mut talk, start());
    assert_eq!(talk.lanes.rings.len(), 4);
    assert!(talk.lanes.rings.values().all(|ring| ring.enabled));

    // Its memory grows: queues off, the whole table again with one region more, queues on.
    talk.lanes.rings.get_mut(&3).unwrap().position = 77;
    let more = memfd(SIZE);
    let mut grow: Vec<_> = (0..4).map(|ring| Silent(ring_message(Req::SET_VRING_ENABLE, ring, 0))).collect();
    let table = mem_table(&[(REGION, &memory), ([GPA + SIZE, SIZE, USER + SIZE, 0], &more)]);
    grow.push(Answer(need_reply(table), 0));
    grow.extend((0..4).map(|ring| Silent(ring_message(Req::SET_VRING_ENABLE, ring, 1))));
    talk.lanes.take_calls();
    play(&mut talk, grow);
    let calls = talk.lanes.take_calls();
    assert!(!calls.contains(&Call::Drain), "{calls:?}");
    assert_eq!(talk.lanes.rings[&3].position, 77);

    // Stop: disabled, then stopped one by one; start again with base 0.
    let mut stop: Vec<_> = (0..4).map(|ring| Silent(ring_message(Req::SET_VRING_ENABLE, ring, 0))).collect();
    stop.extend((0..4).map(|ring| Any(ring_message(Req::GET_VRING_BASE, ring, 0))));
    stop.push(Answer(need_reply(u64_message(Req::SET_STATUS, 0)), 0));
    play(&mut talk, stop);
    assert!(talk.lanes.rings.is_empty());
    play(&mut talk, start());
    assert_eq!(talk.lanes.rings.len(), 4);
}

/// A front end from before protocol features: no SET_VRING_ENABLE, rings are enabled from the start.
#[test]
fn a_front_end_without_protocol_features_gets_enabled_rings() {
    let mut talk = Talk::new(1);
    talk.ok(empty(Req::SET_OWNER));
    talk.ok(u64_message(Req::SET_FEATURES, VERSION_1));
    talk.ok(mem_table(&[(REGION, &memfd(SIZE))]));
    talk.start(0);
    talk.start(1);
    assert!(talk.lanes.rings.values().all(|ring| ring.enabled));
    assert_eq!(talk.lanes.rings.len(), 2);
}

/// Cloud Hypervisor and Firecracker send the addresses before the base, and err, call, kick behind it.
#[test]
fn the_order_of_the_ring_messages_does_not_matter() {
    let set_up: [fn() -> Request; 6] = [
        || ring_message(Req::SET_VRING_NUM, 0, 256),
        || addresses(0, 0),
        || ring_message(Req::SET_VRING_BASE, 0, 5),
        || eventfd_message(Req::SET_VRING_CALL, 0),
        || eventfd_message(Req::SET_VRING_KICK, 0),
        || ring_message(Req::SET_VRING_ENABLE, 0, 1),
    ];
    // Heap's algorithm over all 720 orders.
    let (mut order, mut counters, mut i, mut orders) = ([0, 1, 2, 3, 4, 5], [0; 6], 0, 0);
    loop {
        let mut talk = Talk::negotiated(1);
        let position = |what: usize| order.iter().position(|&at| at == what);
        // The base must be there when the ring becomes complete; else it is refused, as it runs already.
        let complete = [0, 1, 4].into_iter().map(position).max();
        for &at in &order {
            if at == 2 && position(2) > complete.unwrap_or(None) {
                talk.refused(set_up[at]());
            } else {
                talk.ok(set_up[at]());
            }
        }
        assert!(talk.lanes.rings[&0].enabled);
        orders += 1;
        while i < 6 && counters[i] >= i {
            counters[i] = 0;
            i += 1;
        }
        if i == 6 {
            break;
        }
        order.swap(if i % 2 == 0 { 0 } else { counters[i] }, i);
        counters[i] += 1;
        i = 1;
    }
    assert_eq!(orders, 720);
}
