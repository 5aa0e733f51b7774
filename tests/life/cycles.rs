//! Attach and detach, again and again.

use std::fs;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::Traffic;
use crate::support::daemon::{Attach, Daemon};
use crate::support::guest::{Flows, Guest, Plan};
use crate::support::{census, percentile, tries};

const WARM_UP: usize = 150;
const CYCLES: usize = 100;
/// A leak of 2 KiB per cycle.
const LEAK_KIB: u64 = 2 * CYCLES as u64;

/// VFs to cycle through.
const VFS: &[&str] = &[
    "soft:loop",
    #[cfg(feature = "dpdk")]
    "vdev:net_ring7",
];

#[test]
fn attach_and_detach_under_traffic_leave_nothing_behind() {
    let daemon = Daemon::start();
    let steady = daemon.attach("steady", "soft:loop", 1);
    let traffic = Traffic::on(&steady);
    let (mut attach, mut detach) = (Vec::new(), Vec::new());
    let mut cycle = |i: usize| {
        let vf = VFS[i % VFS.len()];
        // A new id each time, as a cloud makes them: what is kept by id would pile up.
        let id = format!("cycled-{i}");
        let start = Instant::now();
        let socket = daemon.attach(&id, vf, 2);
        attach.push(start.elapsed());
        let mut guest = Guest::connect(&socket, &Plan::pairs(2));
        Flows::new(8).exchange(&mut guest, &[0, 1], 40, 600);
        // Full rings, both ways, while it is taken away.
        for _ in 0..100 {
            guest.pairs[i % 2].tx.send(&[0x42; 600]);
        }
        guest.pairs[i % 2].tx.flush();
        let start = Instant::now();
        daemon.detach(&id);
        detach.push(start.elapsed());
        assert!(!socket.exists(), "cycle {i}: the socket file was left behind");
        // Its guest learns of it at once.
        assert!(guest.front.ask(1, &[]).is_err(), "cycle {i}: the connection lives on");
    };
    // Measured with a port attached, which fills what the others left free in the heap: a leak would hide there.
    let memory = || {
        daemon.attach("measured", VFS[0], 2);
        let memory = census::anonymous_kib(daemon.pid());
        daemon.detach("measured");
        memory
    };
    // For what is set up once: memory is level after some 150 cycles.
    let mut cycles = 0..;
    cycles.by_ref().take(WARM_UP).for_each(&mut cycle);
    let before = daemon.census();
    census::memory_stays_level(memory, LEAK_KIB, || cycles.by_ref().take(CYCLES).for_each(&mut cycle));
    daemon.until_census(&before);
    assert_eq!(daemon.ports(), ["steady"]);
    let frames = traffic.end();
    let lanes = daemon.lanes("steady");
    assert_eq!(lanes.guest_to_vf.packets, frames, "{lanes:?}");
    assert_eq!(lanes.vf_to_guest.packets, frames, "{lanes:?}");
    println!(
        "attach: median {:?}, detach under traffic: median {:?}; {frames} frames beside",
        percentile(&mut attach, 50),
        percentile(&mut detach, 50)
    );
    daemon.stop();
}

#[test]
fn attach_and_detach_are_idempotent() {
    let daemon = Daemon::start();
    let request = Attach {
        id: "port".into(),
        socket: daemon.socket("port.sock"),
        client: false,
        vf: "soft:loop".into(),
        queues: 1,
        mtu: None,
    };
    assert_eq!(daemon.attach_as(&request)["changed"], true);
    let mut guest = Guest::connect(&request.socket, &Plan::default());
    Flows::new(1).exchange(&mut guest, &[0], 100, 600);
    assert_eq!(daemon.attach_as(&request)["changed"], false);
    Flows::new(1).exchange(&mut guest, &[0], 100, 600);
    assert_eq!(daemon.detach("port")["changed"], true);
    assert_eq!(daemon.detach("port")["changed"], false);
    daemon.stop();
}

#[test]
fn socket_files_of_others_are_left_alone() {
    let daemon = Daemon::start();
    let before = daemon.census();
    let file = daemon.socket("file.sock");
    fs::write(&file, "not yours").expect("a file");
    let live = daemon.socket("live.sock");
    let listener = UnixListener::bind(&live).expect("a live socket");
    for (id, socket) in [("file", &file), ("live", &live)] {
        let params = json!({"id": id, "socket": {"path": socket}, "vfs": ["soft:loop"]});
        let error = daemon.call("port.attach", params).expect_err("somebody else's socket");
        assert!(!error.message.is_empty(), "{error:?}");
    }
    assert_eq!(fs::read_to_string(&file).expect("still there"), "not yours");
    assert!(live.exists());
    drop(listener);
    fs::remove_file(&file).expect("ours");
    fs::remove_file(&live).expect("ours");
    assert_eq!(daemon.ports(), Vec::<String>::new(), "a refused port is not half there");
    daemon.until_census(&before);
    daemon.stop();
}

#[test]
fn requests_beyond_what_is_allowed_leave_nothing_behind() {
    let daemon = Daemon::start();
    let socket = daemon.socket("port.sock");
    let outside = daemon.dir().join("outside.sock");
    let good = json!({"id": "port", "socket": {"path": socket}, "vfs": ["soft:loop"]});
    let before = daemon.census();
    for (member, value) in [
        ("id", json!("")),
        ("id", json!("a/b\n")),
        ("id", json!("x".repeat(65))),
        ("socket", json!({"path": outside})),
        ("socket", json!({"path": daemon.socket("../outside.sock")})),
        ("socket", json!({"path": "relative.sock"})),
        ("vfs", json!([])),
        ("vfs", json!(["vdev:net_pcap0,rx_pcap=/etc/passwd"])),
        ("vfs", json!(["soft:everything"])),
        ("vfs", json!(["0000:00:00.0"])),
        ("queue_pairs", json!(0)),
        ("queue_pairs", json!(33)),
        ("mtu", json!(67)),
        ("mtu", json!(65536)),
        ("mac", json!("01:00:5e:00:00:01")),
        ("cores", json!([4095])),
    ] {
        let mut params = good.clone();
        params[member] = value.clone();
        let error = daemon.call("port.attach", params).expect_err(&format!("{member} = {value}"));
        assert!(error.message.len() > 10, "{member} = {value}: {error:?}");
        assert_eq!(daemon.ports(), Vec::<String>::new(), "{member} = {value}");
    }
    daemon.until_census(&before);
    assert!(!socket.exists() && !outside.exists());
    daemon.stop();
}

/// What anything of the other port may take beside a VF that starts for half a second.
#[cfg(debug_assertions)]
const USUAL: Duration = Duration::from_millis(10);
/// A core may be taken away from any one of them; who waits for the VF waits longer.
#[cfg(debug_assertions)]
const LONGEST: Duration = Duration::from_millis(200);

/// Release builds of the daemon have no delay to ask for.
#[cfg(debug_assertions)]
#[test]
fn a_slow_vf_delays_nobody_else() {
    use crate::support::daemon::Options;
    let delay = ("VIRTIO_FORWARDER_TEST_VF_START_DELAY_MS".into(), "slow:500".into());
    let daemon = Daemon::with(Options { env: vec![delay], ..Options::default() });
    let other = daemon.attach("other", "soft:loop", 1);
    let mut guest = Guest::connect(&other, &Plan::default());
    tries::once_of_several(|| {
        let (lists, bases) = rounds_beside_a_slow_vf(&daemon, &mut guest);
        daemon.detach("slow");
        if lists.len() < 4 {
            return Err(format!("the other port crept: {} rounds", lists.len()));
        }
        for (what, mut times) in [("port.list", lists), ("two GET_VRING_BASE", bases)] {
            let [median, longest] = [50, 100].map(|percent| percentile(&mut times, percent));
            println!("beside a slow VF: {what} {median:?}, at most {longest:?}");
            tries::quicker(what, median, USUAL)?;
            tries::quicker(what, longest, LONGEST)?;
        }
        Ok(())
    });
    drop(guest);
    daemon.stop();
}

/// While the VF of another port starts, for half a second: what each `port.list` takes, and each stop of the
/// guest's rings.
#[cfg(debug_assertions)]
fn rounds_beside_a_slow_vf(daemon: &Daemon, guest: &mut Guest) -> (Vec<Duration>, Vec<Duration>) {
    let mut control = daemon.control();
    let slow = json!({"id": "slow", "socket": {"path": daemon.socket("slow.sock")}, "vfs": ["soft:loop"]});
    let start = Instant::now();
    let attaching = std::thread::spawn(move || control.call("port.attach", slow).expect("attach"));
    let (mut lists, mut bases) = (Vec::new(), Vec::new());
    while start.elapsed() < Duration::from_millis(400) {
        Flows::new(1).exchange(guest, &[0], 10, 100);
        let began = Instant::now();
        daemon.ports();
        lists.push(began.elapsed());
        let began = Instant::now();
        guest.stop();
        bases.push(began.elapsed());
        for pair in &guest.pairs {
            pair.rx.queue.start(&guest.front);
            pair.tx.queue.start(&guest.front);
        }
    }
    attaching.join().expect("attach thread");
    assert!(start.elapsed() >= Duration::from_millis(500), "the VF was not slow");
    (lists, bases)
}
