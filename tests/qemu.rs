//! A Linux guest in QEMU on a port whose VF is a kernel interface: the host's own network stack is the
//! other end of the wire.
#![cfg(feature = "dpdk")]

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use support::daemon::{Attach, Daemon, Options};
use support::until;
use support::vm::{Listens, Qemu, Vm, VmConfig};

/// From the range for benchmarks (RFC 2544): in nobody's way.
const HOST: &str = "198.18.7.1";
const GUEST: &str = "198.18.7.2";

const TRANSFER_BYTES: usize = 100 << 20;
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(240);

/// A daemon with one port.
struct Lab {
    daemon: Daemon,
    attach: Attach,
    /// The host's end of the wire.
    interface: String,
    /// Ours to delete; a tap goes with its daemon.
    veth: bool,
}

impl Lab {
    /// A port on a tap. `None`, after the reason was printed, where none can be made.
    fn new(queues: usize, client: bool) -> Option<Lab> {
        Lab::of(Options::default(), queues, client)
    }

    fn of(options: Options, queues: usize, client: bool) -> Option<Lab> {
        let tap = format!("vfq{}", std::process::id());
        let vf = format!("vdev:net_tap0,iface={tap}");
        let attach = Attach { id: "qemu".into(), socket: "".into(), client, vf, queues, mtu: None };
        Lab::with(options, attach, tap, false)
    }

    /// A port on one end of a veth pair, for what DPDK's tap driver cannot: frames beyond 1518 bytes.
    fn jumbo(mtu: u16) -> Option<Lab> {
        let (near, far) = (format!("vfq{}", std::process::id()), format!("vfp{}", std::process::id()));
        if rustix::process::geteuid().is_root() {
            host(&format!("ip link add {near} mtu {mtu} type veth peer name {far} mtu {mtu}"));
            host(&format!("ip link set {far} up"));
        }
        let vf = format!("vdev:net_af_packet0,iface={far},framesz=10240,blocksz=40960,framecnt=256");
        let attach = Attach { id: "qemu".into(), socket: "".into(), client: false, vf, queues: 1, mtu: Some(mtu) };
        Lab::with(Options::default(), attach, near, true)
    }

    fn with(options: Options, mut attach: Attach, interface: String, veth: bool) -> Option<Lab> {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED qemu: needs root, for network interfaces");
            return None;
        }
        let daemon = Daemon::with(options);
        attach.socket = daemon.socket("qemu.sock");
        let lab = Lab { daemon, attach, interface, veth };
        lab.attach();
        Some(lab)
    }

    fn attach(&self) {
        self.daemon.attach_as(&self.attach);
        let interface = &self.interface;
        until("the VF's interface", || Path::new("/sys/class/net").join(interface).exists());
        // Exact counts below: no router solicitations of the host among them.
        if Path::new("/proc/sys/net/ipv6").exists() {
            let switch = format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6");
            until("IPv6 has heard of it", || fs::write(&switch, "1").is_ok());
        }
        host(&format!("ip addr add {HOST}/24 dev {interface}"));
        host(&format!("ip link set {interface} up"));
    }

    fn config(&self) -> VmConfig {
        VmConfig {
            address: Some(format!("{GUEST}/24")),
            queues: self.attach.queues as u16,
            mtu: self.attach.mtu,
            listens: if self.attach.client { Listens::Qemu } else { Listens::Daemon },
            ..VmConfig::new(&self.attach.socket)
        }
    }

    fn boot(&self) -> Vm {
        Vm::boot(self.config()).unwrap_or_else(|error| panic!("{error}\n{}", self.daemon.log()))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.veth {
            let _ = Command::new("ip").args(["link", "del", &self.interface]).status();
        }
    }
}

/// Runs a command line of the host; what it printed.
#[track_caller]
fn host(line: &str) -> String {
    let words: Vec<&str> = line.split(' ').collect();
    let done = Command::new(words[0]).args(&words[1..]).output().expect("the program starts");
    let output = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success(), "{line}: {output}{}", String::from_utf8_lossy(&done.stderr));
    output
}

/// Ten echo requests each way with `payload` bytes, all answered: once both know each other's address and see the
/// link, which after a start takes its time.
#[track_caller]
fn ping_both_ways(vm: &mut Vm, payload: usize) {
    until("an answer of the guest", || {
        let once = Command::new("ping").args(["-q", "-c", "1", "-W", "1", GUEST]).stdout(Stdio::null()).status();
        once.expect("ping starts").success()
    });
    until("an answer to the guest", || vm.run(&format!("ping -q -c 1 -W 1 {HOST}")).is_ok_and(|ping| ping.success()));
    let output = host(&format!("ping -q -c 10 -i 0.02 -W 5 -M do -s {payload} {GUEST}"));
    assert!(output.contains("10 received, 0% packet loss"), "{output}");
    let output = vm.must(&format!("ping -q -c 10 -A -W 5 -s {payload} {HOST}"));
    assert!(output.contains("10 packets received, 0% packet loss"), "{output}");
}

/// Bytes that do not repeat within a transfer: a lost, doubled or misplaced piece changes the sum.
fn noise() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(TRANSFER_BYTES);
    while bytes.len() < TRANSFER_BYTES {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes
}

fn sha256(bytes: &[u8]) -> String {
    let mut child = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("sha256sum");
    child.stdin.take().expect("piped").write_all(bytes).expect("sha256sum reads");
    let output = child.wait_with_output().expect("sha256sum ends");
    String::from_utf8_lossy(&output.stdout)[..64].to_owned()
}

/// Moves [`TRANSFER_BYTES`] to the guest, and what it got back to the host.
fn transfer_both_ways(vm: &mut Vm) {
    let sent = noise();
    let sum = sha256(&sent);
    let listener = TcpListener::bind((HOST, 0)).expect("listen");
    let port = listener.local_addr().expect("bound").port();
    let server = thread::spawn(move || {
        let (mut to_guest, _) = listener.accept().expect("the guest connects");
        to_guest.write_all(&sent).expect("send to the guest");
        drop(to_guest);
        let (mut from_guest, _) = listener.accept().expect("the guest connects again");
        let mut back = Vec::with_capacity(TRANSFER_BYTES);
        from_guest.read_to_end(&mut back).expect("receive from the guest");
        back == sent
    });
    let received = vm.run_within(TRANSFER_TIMEOUT, &format!("nc {HOST} {port} >/tmp/noise && sha256sum /tmp/noise"));
    let received = received.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(received.output.get(..64), Some(&sum[..]), "host to guest: {}", received.output);
    let sent_back = vm.run_within(TRANSFER_TIMEOUT, &format!("nc {HOST} {port} </tmp/noise"));
    assert!(sent_back.unwrap_or_else(|error| panic!("{error}")).success());
    assert!(server.join().expect("the server does not panic"), "guest to host: other bytes arrived");
}

/// Every `DIRECTION_queue_N_packets` of the guest's driver, by queue.
fn packets_by_queue(vm: &mut Vm, direction: &str) -> Vec<u64> {
    let statistics = vm.must("ethtool -S eth0");
    let value = |queue: usize| {
        let name = format!("{direction}_queue_{queue}_packets:");
        let line = statistics.lines().find_map(|line| line.trim().strip_prefix(&name))?;
        Some(line.trim().parse().expect("a count"))
    };
    (0..).map_while(value).collect()
}

/// Whether the guest's driver took a feature, by its bit.
fn negotiated(vm: &mut Vm, bit: usize) -> bool {
    vm.must("cat /sys/class/net/eth0/device/features").as_bytes()[bit] == b'1'
}

/// VIRTIO_F_RING_PACKED.
const RING_PACKED: usize = 34;

fn packed() -> Vec<String> {
    vec!["packed=on".into()]
}

fn without_offloads() -> Vec<String> {
    let off =
        ["csum", "gso", "guest_csum", "guest_tso4", "guest_tso6", "guest_ufo", "host_tso4", "host_tso6", "host_ufo"];
    off.map(|name| format!("{name}=off")).into()
}

fn pings_reboots(qemu: Qemu, device: Vec<String>) {
    let Some(lab) = Lab::new(1, false) else { return };
    let is_packed = device == packed();
    let mut vm = Vm::boot(VmConfig { qemu, device, ..lab.config() }).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(negotiated(&mut vm, RING_PACKED), is_packed);
    ping_both_ways(&mut vm, 56);
    ping_both_ways(&mut vm, 1472);
    let connected = lab.daemon.census();
    for _ in 0..2 {
        vm.reboot().unwrap_or_else(|error| panic!("{error}\n{}", lab.daemon.log()));
        ping_both_ways(&mut vm, 56);
    }
    lab.daemon.until_census(&connected);
    drop(vm);
    lab.daemon.until_guest("qemu", false);
}

#[test]
fn qemu_7_2_pings_and_reboots_in_place() {
    pings_reboots(Qemu::V7_2, vec![]);
}

#[test]
fn qemu_10_0_pings_and_reboots_in_place() {
    pings_reboots(Qemu::V10_0, vec![]);
}

#[test]
fn qemu_7_2_pings_and_reboots_in_place_on_packed_rings() {
    pings_reboots(Qemu::V7_2, packed());
}

#[test]
fn qemu_10_0_pings_and_reboots_in_place_on_packed_rings() {
    pings_reboots(Qemu::V10_0, packed());
}

#[test]
fn hundred_megabytes_each_way_on_packed_rings() {
    let Some(lab) = Lab::new(1, false) else { return };
    let device = [packed(), vec!["rx_queue_size=1024".into(), "tx_queue_size=1024".into()]].concat();
    let config = VmConfig { memory_mib: 512, device, ..lab.config() };
    let mut vm = Vm::boot(config).unwrap_or_else(|error| panic!("{error}"));
    assert!(negotiated(&mut vm, RING_PACKED));
    transfer_both_ways(&mut vm);
    // A link that goes down and up: the driver keeps its rings, whichever round they are in.
    vm.must("ip link set eth0 down && ip link set eth0 up");
    transfer_both_ways(&mut vm);
}

#[test]
fn hundred_megabytes_each_way_with_and_without_offloads() {
    let Some(lab) = Lab::new(1, false) else { return };
    let config = VmConfig { memory_mib: 512, ..lab.config() };
    let mut vm = Vm::boot(config).unwrap_or_else(|error| panic!("{error}"));
    let offered = vm.must("ethtool -k eth0");
    assert!(offered.contains("tx-checksumming: on"), "{offered}");
    transfer_both_ways(&mut vm);
    vm.must("ethtool -K eth0 tx off tso off gso off gro off");
    let off = vm.must("ethtool -k eth0");
    assert!(off.contains("tx-checksumming: off") && off.contains("tcp-segmentation-offload: off"), "{off}");
    transfer_both_ways(&mut vm);
}

/// Pages that the guest gives back are gone from its memory, and others are there when it takes them again. Who reads them
/// by the CPU sees those.
#[test]
fn a_balloon_goes_down_and_up_under_traffic() {
    let Some(lab) = Lab::new(1, false) else { return };
    // Frames as the VF takes them: most of them are not copied.
    let config = VmConfig { memory_mib: 512, balloon: true, device: without_offloads(), ..lab.config() };
    let mut vm = Vm::boot(config).unwrap_or_else(|error| panic!("{error}"));
    let mut balloon = vm.balloon().unwrap_or_else(|error| panic!("{error}"));
    let over = Arc::new(AtomicBool::new(false));
    let done = over.clone();
    let work = thread::spawn(move || {
        let mut rounds = 0;
        while !done.load(Ordering::Relaxed) {
            balloon.leave(512).expect("the balloon is emptied");
            let before = balloon.present().expect("fstat");
            balloon.leave(288).expect("the balloon is filled");
            let after = balloon.present().expect("fstat");
            assert!(after <= 288 << 20, "{before} bytes of memory, then {after}: nothing was discarded");
            rounds += 1;
        }
        rounds
    });
    transfer_both_ways(&mut vm);
    over.store(true, Ordering::Relaxed);
    let rounds = work.join().expect("the balloon works");
    assert!(rounds >= 2, "{rounds} rounds of the balloon only");
    ping_both_ways(&mut vm, 1472);
    let counted = lab.daemon.lanes("qemu");
    println!("{rounds} rounds of the balloon; {:?}", counted.guest_to_vf);
    assert!(counted.guest_to_vf.zero_copied > 10_000, "{:?}", counted.guest_to_vf);
    assert_eq!(lab.daemon.show("qemu")["zero_copy"], "auto");
    let copies = lab.daemon.show("qemu")["copies"]["vf_to_guest"].to_string();
    assert!(copies.contains("net_tap is not known to use buffers in order"), "{copies}");
}

#[test]
fn guest_without_any_offload_negotiated_transfers_too() {
    let Some(lab) = Lab::new(1, false) else { return };
    let device = [without_offloads(), vec!["mrg_rxbuf=off".into()]].concat();
    let config = VmConfig { memory_mib: 512, device, ..lab.config() };
    let mut vm = Vm::boot(config).unwrap_or_else(|error| panic!("{error}"));
    transfer_both_ways(&mut vm);
}

#[test]
fn jumbo_frames() {
    let Some(lab) = Lab::jumbo(9000) else { return };
    let mut vm = lab.boot();
    assert_eq!(vm.must("cat /sys/class/net/eth0/mtu").trim(), "9000");
    // 9000 bytes less the headers of IPv4 and ICMP.
    ping_both_ways(&mut vm, 8972);
    ping_both_ways(&mut vm, 56);
}

#[test]
fn four_queue_pairs_in_use() {
    four_queue_pairs(Options::default(), vec![]);
}

/// Two of them on each.
#[test]
fn four_queue_pairs_in_use_on_two_cores() {
    four_queue_pairs(Options { cores: Some("0-1"), ..Options::default() }, vec![]);
}

#[test]
fn four_pairs_of_packed_rings_in_use() {
    four_queue_pairs(Options::default(), packed());
}

fn four_queue_pairs(options: Options, device: Vec<String>) {
    const FLOWS: u16 = 64;
    const PER_FLOW: u16 = 4;
    const PER_CPU: u64 = 16;
    let lanes = if options.cores.is_some() { 2 } else { 1 };
    let Some(lab) = Lab::of(options, 4, false) else { return };
    let is_packed = device == packed();
    let mut vm = Vm::boot(VmConfig { vcpus: 4, device, ..lab.config() }).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(negotiated(&mut vm, RING_PACKED), is_packed);
    assert_eq!(packets_by_queue(&mut vm, "rx").len(), 4);

    ping_both_ways(&mut vm, 56); // both know each other's address now

    // Guest to host: a CPU sends on its own queue.
    let before = packets_by_queue(&mut vm, "tx");
    for cpu in 0..4 {
        let output = vm.must(&format!("taskset -c {cpu} ping -q -c {PER_CPU} -A -W 5 {HOST}"));
        assert!(output.contains(&format!("{PER_CPU} packets received, 0% packet loss")), "{output}");
    }
    let used: Vec<u64> = packets_by_queue(&mut vm, "tx").iter().zip(&before).map(|(now, was)| now - was).collect();
    assert!(used.iter().all(|&packets| packets >= PER_CPU), "tx queues: {used:?}");

    // Host to guest: flows spread over the VF's queues. Nobody listens, and the guest counts exactly that.
    let unheard = "awk '/^Udp: [0-9]/ {print $3}' /proc/net/snmp";
    let count = |vm: &mut Vm| -> u64 { vm.must(unheard).trim().parse().expect("a count") };
    let (unheard_before, before) = (count(&mut vm), packets_by_queue(&mut vm, "rx"));
    for _ in 0..PER_FLOW {
        for flow in 0..FLOWS {
            // Below those that the kernel gives to others.
            let source = UdpSocket::bind((HOST, 20_000 + flow)).expect("a port of its own");
            let target: SocketAddr = format!("{GUEST}:50000").parse().expect("an address");
            source.send_to(b"flow", target).expect("send");
        }
        // A pause per round: the guest may be slower than the rings are long.
        thread::sleep(Duration::from_millis(100));
    }
    let expected = u64::from(FLOWS) * u64::from(PER_FLOW);
    until("all datagrams in the guest", || count(&mut vm) - unheard_before >= expected);
    assert_eq!(count(&mut vm) - unheard_before, expected);
    let used: Vec<u64> = packets_by_queue(&mut vm, "rx").iter().zip(&before).map(|(now, was)| now - was).collect();
    assert!(used.iter().all(|&packets| packets > 0), "rx queues: {used:?}");
    let stats = lab.daemon.call("stats", serde_json::json!({"id": "qemu"})).expect("stats");
    for direction in ["guest_to_vf", "vf_to_guest"] {
        let each = stats["ports"][0]["lanes"][direction].as_array().expect("lanes");
        let packets: Vec<_> = each.iter().map(|lane| lane["packets"].as_u64().expect("a number")).collect();
        assert!(packets.len() == lanes && packets.iter().all(|packets| *packets > 0), "{direction}: {packets:?}");
    }
}

#[test]
fn qemu_is_killed_in_a_transfer_and_the_next_guest_works() {
    let Some(lab) = Lab::new(1, false) else { return };
    let idle = lab.daemon.census();
    for _ in 0..2 {
        let mut vm = lab.boot();
        let listener = TcpListener::bind((HOST, 0)).expect("listen");
        let port = listener.local_addr().expect("bound").port();
        vm.must(&format!("nc {HOST} {port} </dev/zero >/dev/null 2>&1 &"));
        let (mut stream, _) = listener.accept().expect("the guest connects");
        let mut some = vec![0; 1 << 20];
        stream.read_exact(&mut some).expect("the transfer runs");
        vm.kill().expect("QEMU is ours");
        lab.daemon.until_guest("qemu", false);
        lab.daemon.until_census(&idle);
    }
    ping_both_ways(&mut lab.boot(), 56);
}

#[test]
fn client_daemon_restarts_and_the_guest_carries_on() {
    let Some(mut lab) = Lab::new(1, true) else { return };
    let mut vm = lab.boot();
    ping_both_ways(&mut vm, 56);
    let booted = vm.must("cat /proc/sys/kernel/random/boot_id");
    for _ in 0..3 {
        lab.daemon.kill();
        lab.daemon.restart();
        lab.attach();
        lab.daemon.until_guest("qemu", true);
        ping_both_ways(&mut vm, 56);
    }
    assert_eq!(vm.must("cat /proc/sys/kernel/random/boot_id"), booted);
}

/// QEMU does not know where the daemon was in a packed ring: it starts again from the base it last knew. That is
/// said, and over when the guest starts its device anew.
#[test]
fn packed_rings_and_a_daemon_that_restarts() {
    let Some(mut lab) = Lab::new(1, true) else { return };
    let mut vm = Vm::boot(VmConfig { device: packed(), ..lab.config() }).unwrap_or_else(|error| panic!("{error}"));
    ping_both_ways(&mut vm, 56);
    lab.daemon.kill();
    lab.daemon.restart();
    lab.attach();
    let fault = |lab: &Lab| lab.daemon.show("qemu")["guest"]["rings"][1]["fault"].as_str().map(str::to_owned);
    until("the send ring shows a fault", || fault(&lab).is_some());
    assert!(fault(&lab).is_some_and(|fault| fault.contains("Reset the guest's network device")));
    let device = vm.must("basename $(readlink /sys/class/net/eth0/device)").trim().to_owned();
    vm.must(&format!("cd /sys/bus/virtio/drivers/virtio_net && echo {device} >unbind && echo {device} >bind"));
    vm.must(&format!("ip addr add {GUEST}/24 dev eth0; ip link set eth0 up"));
    until("both rings run", || {
        let show = lab.daemon.show("qemu");
        (0..2).all(|ring| show["guest"]["rings"][ring]["running"] == true)
    });
    ping_both_ways(&mut vm, 56);
}
