//! What the daemon costs when there is nothing to do.

use std::time::Duration;

use crate::support::census::cpu_percent;
use crate::support::daemon::{Daemon, Options};
use crate::support::frontend::feature::{EVENT_IDX, RING_PACKED};
use crate::support::guest::{Flows, Guest, Plan};
use crate::support::tries::once_of_several;

/// Of one core.
const LIMIT: f64 = 2.0;
const SPAN: Duration = Duration::from_secs(3);

#[track_caller]
fn cheap(what: &str, daemon: &Daemon) {
    std::thread::sleep(Duration::from_millis(100));
    uses_less_than(LIMIT, what, daemon);
}

/// Beside others a wake-up costs more, and what a hypervisor takes away counts as used: not in every span.
#[track_caller]
fn uses_less_than(limit: f64, what: &str, daemon: &Daemon) {
    once_of_several(|| {
        let percent = cpu_percent(daemon.pid(), SPAN);
        println!("idle {what}: {percent:.1} % of a core");
        if percent < limit { Ok(()) } else { Err(format!("{what}: {percent:.1} % of a core")) }
    });
}

/// Four ports with two queue pairs each, their guests connected and warm, then silent; and they wake again.
fn four_idle_guests(what: &str, features: u64) {
    let daemon = Daemon::start();
    let plan = Plan { features, ..Plan::pairs(2) };
    let connect = |i| Guest::connect(&daemon.attach(&format!("port-{i}"), "soft:loop", 2), &plan);
    let mut guests: Vec<_> = (0..4).map(connect).collect();
    for guest in &mut guests {
        Flows::new(4).exchange(guest, &[0, 1], 500, 600);
    }
    cheap(what, &daemon);
    for guest in &mut guests {
        Flows::new(4).exchange(guest, &[0, 1], 100, 600);
    }
    drop(guests);
    daemon.stop();
}

#[test]
fn without_guests() {
    let daemon = Daemon::start();
    cheap("without ports", &daemon);
    for i in 0..4 {
        daemon.attach(&format!("port-{i}"), "soft:loop", 2);
    }
    cheap("without guests", &daemon);
    daemon.stop();
}

#[test]
fn with_idle_guests_of_soft_vfs() {
    four_idle_guests("with four guests of soft VFs", Plan::pairs(2).features);
}

#[test]
fn with_idle_guests_of_packed_rings() {
    let features = Plan::pairs(2).features | RING_PACKED | EVENT_IDX;
    four_idle_guests("with four guests of packed rings", features);
}

/// A VF that can wake a core: nothing has to be looked at.
#[cfg(feature = "dpdk")]
#[test]
fn with_an_idle_guest_of_a_tap() {
    use crate::support::tap::{Tap, available, interface_name};
    if let Err(reason) = available() {
        crate::support::skip!("with_an_idle_guest_of_a_tap", "{reason}");
    }
    let daemon = Daemon::start();
    let name = interface_name();
    let mut guest = Guest::connect(&daemon.attach("port", &format!("vdev:net_tap0,iface={name}"), 1), &Plan::default());
    let tap = Tap::set_up(&name);
    crate::support::until("the link is up", || daemon.show("port")["vf"]["link_up"] == true);
    let there = |guest: &mut Guest, text: &[u8]| {
        let mut buffer = [0; 64];
        assert!(guest.pairs[0].tx.send(&tap.frame(text)));
        guest.pairs[0].tx.flush();
        let len = tap.socket.recv(&mut buffer).expect("the guest's datagram");
        assert_eq!(&buffer[..len], text);
    };
    there(&mut guest, b"awake");
    // The kernel announces itself on a new interface for a few seconds.
    std::thread::sleep(Duration::from_secs(2));
    cheap("with a guest of a tap", &daemon);
    there(&mut guest, b"still there");
    drop(guest);
    daemon.stop();
}

/// Its interface is deleted: the fd that should wake the core is readable for ever.
#[cfg(feature = "dpdk")]
#[test]
fn with_a_guest_whose_tap_is_gone() {
    use crate::support::tap::{Tap, available, interface_name};
    if let Err(reason) = available() {
        crate::support::skip!("with_a_guest_whose_tap_is_gone", "{reason}");
    }
    let daemon = Daemon::start();
    let name = interface_name();
    let guest = Guest::connect(&daemon.attach("port", &format!("vdev:net_tap0,iface={name}"), 1), &Plan::default());
    let _tap = Tap::set_up(&name);
    let deleted = std::process::Command::new("ip").args(["link", "del", &name]).status().expect("ip");
    assert!(deleted.success());
    std::thread::sleep(Duration::from_secs(1));
    // It naps, and looks: that is a spinning core's opposite, if not sleep.
    uses_less_than(20.0, "with a guest whose tap is gone", &daemon);
    drop(guest);
    daemon.stop();
}

#[test]
fn a_polling_daemon_does_not() {
    let daemon = Daemon::with(Options { args: vec!["--poll".into()], ..Options::default() });
    let socket = daemon.attach("port", "soft:loop", 1);
    let mut guest = Guest::connect(&socket, &Plan::default());
    Flows::new(1).exchange(&mut guest, &[0], 500, 600);
    // The core may have to be shared, with many if need be, but it is never given up: one that sleeps uses 2 %.
    once_of_several(|| {
        let percent = cpu_percent(daemon.pid(), Duration::from_secs(1));
        if percent > 15.0 { Ok(()) } else { Err(format!("{percent:.1} % of a core")) }
    });
    drop(guest);
    daemon.stop();
}
