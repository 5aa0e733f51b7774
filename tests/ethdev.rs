//! Ethdevs against the kernel and against themselves. One process has one EAL, so this is one test of several
//! parts. Needs root: it makes taps and veths, named `vft…`, and leaves none.
#![cfg(feature = "dpdk")]

#[path = "support/tries.rs"]
mod tries;
#[allow(dead_code)]
mod wire;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::process;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use virtio_forwarder::error::Error;
use virtio_forwarder::guest::{Gpa, GuestMemory, RegionSpec, UserAddr};
use virtio_forwarder::ring::{BURST, Gather};
use virtio_forwarder::vf::eal::{Eal, EalConfig};
use virtio_forwarder::vf::ethdev::{EthdevRx, EthdevTx, RxMbuf};
use virtio_forwarder::vf::{Lendable, Queues, RxPacket, RxQueue, TxOffload, TxPacket, TxQueue, Vf, VfConfig};

use tries::{once_of_several, quicker};
use wire::{EXPERIMENTAL, IPV4, Wire, frame, ip, readable, resources, up};

const PATIENCE: Duration = Duration::from_secs(60);

/// A VF with its queues, started.
struct Device {
    vf: Vf,
    tx: Vec<EthdevTx>,
    rx: Vec<EthdevRx>,
}

impl Device {
    fn start(spec: &str, queues: u16, mtu: u16) -> Self {
        let mut vf = Vf::probe(&spec.parse().unwrap()).unwrap();
        let config = VfConfig { queues, mtu, mac: None };
        let Queues::Ethdev(tx, rx) = vf.configure(&config).unwrap() else { panic!("an ethdev has ethdev queues") };
        vf.start().unwrap();
        Self { vf, tx, rx }
    }

    /// Stops and removes it; the queues go before, as the contract demands.
    fn remove(mut self) {
        drop((self.tx, self.rx));
        self.vf.stop().unwrap();
        self.vf.remove().unwrap();
    }

    fn send(&mut self, queue: usize, frame: &[u8]) {
        let mut burst = ArrayVec::new();
        burst.push(self.tx[queue].copy(&mut &*frame).unwrap());
        let mut refused = 0;
        assert_eq!(self.tx[queue].send(&mut burst, &mut refused), 1, "{} bytes", frame.len());
        assert_eq!(refused, 0);
    }

    /// The next `n` frames of ours, with their queues.
    fn receive(&mut self, n: usize) -> Vec<(usize, Vec<u8>)> {
        let mut frames = Vec::new();
        let end = Instant::now() + PATIENCE;
        while frames.len() < n && Instant::now() < end {
            for (queue, rx) in self.rx.iter_mut().enumerate() {
                let mut burst = ArrayVec::new();
                let got = rx.receive(&mut burst);
                assert_eq!(got, burst.len());
                frames.extend(burst.iter().map(bytes).filter(|frame| is_ours(frame)).map(|bytes| (queue, bytes)));
            }
        }
        assert_eq!(frames.len(), n);
        frames
    }
}

fn is_ours(frame: &[u8]) -> bool {
    frame[12..14] == EXPERIMENTAL.to_be_bytes()
}

fn bytes(packet: &RxMbuf) -> Vec<u8> {
    let mut gather = packet.gather();
    let mut bytes = vec![0; gather.remaining()];
    assert_eq!(bytes.len(), packet.len());
    // In odd pieces, so that they do not coincide with segments.
    for piece in bytes.chunks_mut(1001) {
        gather.copy_next(piece);
    }
    assert_eq!(gather.remaining(), 0);
    assert!(packet.head().len() >= packet.len().min(256));
    bytes
}

#[test]
fn ethdevs() {
    let config = EalConfig { no_huge: true, ..EalConfig::default() };
    let affinity = rustix::thread::sched_getaffinity(None).unwrap();
    let eal = Arc::new(Eal::start(&config).unwrap());
    assert_eq!(rustix::thread::sched_getaffinity(None).unwrap(), affinity);
    assert!(matches!(Eal::start(&config), Err(Error::Invalid(_))));
    println!("{}, {} ethdevs", eal.version(), eal.max_ethdevs());

    null();
    ring();
    ring_on_another_thread(&eal);
    let tap = format!("vft{}", process::id());
    tap_both_ways(&tap);
    tap_wakes(&tap);
    tap_offloads(&tap);
    af_packet(&process::id().to_string());
    absent_and_held();
    leaves_nothing(&eal, &tap);
    frame_outlives_vf(&eal);
    // After what counts bytes: net_null loses some.
    reset();
    reta();
    lenders();
    queue_outlives_vf();
    slots_run_out(&eal);
    memory_runs_out();
}

/// net_null makes frames of 64 bytes and discards what it is sent.
fn null() {
    let mut device = Device::start("vdev:net_null0", 2, 9000);
    let caps = device.vf.caps().clone();
    assert_eq!(caps.driver, "net_null");
    assert_eq!(caps.max_mtu, 9216);
    assert_eq!((device.tx.len(), device.rx.len()), (2, 2));
    assert!(device.vf.link().up);
    for _ in 0..100 {
        let mut burst = ArrayVec::new();
        assert_eq!(device.rx[1].receive(&mut burst), BURST);
        assert!(burst.iter().all(|packet| packet.len() == 64));
    }
    let mut burst: ArrayVec<_, BURST> = (0..32).map(|i| device.tx[0].copy(&mut &*frame(9014, i)).unwrap()).collect();
    assert_eq!(device.tx[0].send(&mut burst, &mut 0), BURST);
    assert!(burst.is_empty());
    let xstats = device.vf.xstats();
    assert!(xstats.contains(&("tx_good_packets".into(), BURST as u64)), "{xstats:?}");
    device.vf.set_mac("52:54:00:00:00:01".parse().unwrap()).unwrap();
    assert_eq!(device.vf.link().mac.unwrap().to_string(), "52:54:00:00:00:01");

    // Under its queues it is not stopped: it goes on.
    match device.vf.stop() {
        Err(Error::Conflict(text)) => assert!(text.contains("4 of its queues"), "{text}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(device.rx[0].receive(&mut ArrayVec::new()), BURST);
    device.remove();
    println!("net_null: {caps:?}");
}

/// A driver says so when the PF of its VF was reset. net_null never does: that it did is said in its place.
fn reset() {
    unsafe extern "C" {
        static mut rte_eth_devices: [u8; 0];
        fn rte_eth_dev_callback_process(device: *mut u8, event: u32, value: *mut u8) -> i32;
    }
    let mut device = Device::start("vdev:net_null0", 1, 1500);
    assert!(device.vf.link().up && !device.vf.was_reset());
    // SAFETY: the table of ethdevs, of which this is the first and only one; the callback is the VF's own.
    let rc = unsafe {
        assert_eq!(dpdk_sys::rte_eth_dev_count_total(), 1);
        rte_eth_dev_callback_process(
            (&raw mut rte_eth_devices).cast(),
            dpdk_sys::SHIM_EVENT_RESET,
            std::ptr::null_mut(),
        )
    };
    assert_eq!(rc, 0);
    assert!(device.vf.was_reset() && !device.vf.link().up, "frames for it are not ready");
    assert!(!device.vf.revives(), "by a driver of which that is not known");
    device.vf.restart().unwrap();
    assert!(device.vf.link().up && !device.vf.was_reset());
    device.remove();
}

/// Memory that frames were lent from stays as long as it is of use, and never goes on the lane's core: unmapping takes
/// its time.
fn lenders() {
    let mut device = Device::start("vdev:net_null0", 1, 1500);
    let queue = &mut device.tx[0];
    let memory = || {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, 4096).unwrap();
        let region = RegionSpec { gpa: Gpa(0), size: 4096, user: UserAddr(0), offset: 0 };
        Lendable::all(GuestMemory::empty().with(region, file).unwrap())
    };
    let lend = |queue: &mut EthdevTx, memory: &Arc<Lendable>| {
        let Some(frame) = queue.lend(memory.memory().translate(Gpa(0), 1000).unwrap(), memory) else { return false };
        let mut burst = ArrayVec::from_iter([frame]);
        queue.send(&mut burst, &mut 0) == 1
    };
    let alive = |memories: &[Weak<Lendable>]| memories.iter().map(|memory| memory.strong_count()).collect::<Vec<_>>();
    let mut seen = Vec::new();
    for _ in 0..4 {
        let memory = memory();
        assert!(lend(queue, &memory));
        seen.push(Arc::downgrade(&memory));
    }
    assert_eq!(queue.lent(), queue.returned());
    let current = memory();
    assert!(!lend(queue, &current), "too many at a time: it is copied");
    assert_eq!(alive(&seen), [1; 4], "none goes while the lane is on its core");
    assert!(queue.forget_memories(Some(&current)));
    assert_eq!(alive(&seen), [0; 4], "all of their frames are back");
    assert!(lend(queue, &current) && queue.forget_memories(Some(&current)));
    assert_eq!(Arc::strong_count(&current), 2);
    assert!(queue.forget_memories(None));
    assert_eq!(Arc::strong_count(&current), 1);
    device.remove();
}

/// net_null has an RSS table: its entries, in turn, are the queues asked for. net_ring has none.
#[allow(unsafe_code)]
fn reta() {
    let mut device = Device::start("vdev:net_null0", 4, 1500);
    let table = || {
        let mut table = [dpdk_sys::rte_eth_rss_reta_entry64 { mask: u64::MAX, ..Default::default() }; 2];
        // SAFETY: the only device is port 0; room for its 128 entries.
        assert_eq!(unsafe { dpdk_sys::rte_eth_dev_rss_reta_query(0, table.as_mut_ptr(), 128) }, 0);
        table.iter().flat_map(|group| group.reta).collect::<Vec<u16>>()
    };
    for queues in [&[0, 1, 2, 3][..], &[1, 3], &[2], &[0, 1, 2]] {
        assert!(device.vf.point_reta(queues));
        let expected: Vec<u16> = queues.iter().copied().cycle().take(128).collect();
        assert_eq!(table(), expected);
    }
    assert!(!device.vf.point_reta(&[]));
    device.remove();
    // With one queue DPDK has no table to point.
    let mut single = Device::start("vdev:net_null0", 1, 1500);
    assert!(!single.vf.point_reta(&[0]));
    single.remove();
    let mut device = Device::start("vdev:net_ring0", 4, 1500);
    assert!(!device.vf.point_reta(&[0]));
    device.remove();
}

/// net_ring receives on queue i what was sent on queue i: mbufs of the send pool, chains included.
fn ring() {
    let mut device = Device::start("vdev:net_ring0", 4, 9000);
    assert_eq!(device.vf.link().mac, None, "it has none");
    assert!(device.vf.caps().multi_segment);
    let sizes = [14, 60, 61, 1514, 2048, 2049, 9014, 9216, 9217, 40_000, 65_557];
    for queue in 0..4 {
        for (serial, size) in sizes.into_iter().enumerate() {
            device.send(queue, &frame(size, serial as u32 + 100 * queue as u32));
        }
    }
    let mut expected: Vec<_> = (0..4)
        .flat_map(|queue| sizes.into_iter().enumerate().map(move |(serial, size)| (queue, serial, size)))
        .map(|(queue, serial, size)| (queue, frame(size, serial as u32 + 100 * queue as u32)))
        .collect();
    expected.sort_by_key(|(queue, _)| *queue);
    let mut received = device.receive(expected.len());
    received.sort_by_key(|(queue, _)| *queue);
    assert!(received == expected, "each queue has its own frames, whole and in order");
    assert!(device.tx[0].copy(&mut &*vec![0; 65_558]).is_none());

    // A full ring takes a prefix; the rest stays, in order.
    let (mut sent, mut left) = (0, 0);
    while left == 0 {
        let mut burst: ArrayVec<_, BURST> =
            (0..32).map(|i| device.tx[0].copy(&mut &*frame(60, sent + i)).unwrap()).collect();
        sent += device.tx[0].send(&mut burst, &mut 0) as u32;
        left = burst.len();
        if let Some(first) = burst.first() {
            assert_eq!(first.head(), frame(60, sent));
        }
    }
    println!("net_ring: took {sent} of a full ring; {:?}", device.vf.caps());
    // It is stopped with frames in the ring: they are not lost to the pool (see `leaves_nothing`).
    device.remove();
}

/// A lane is built on one thread and runs on another, registered one.
fn ring_on_another_thread(eal: &Arc<Eal>) {
    let mut device = Device::start("vdev:net_ring0", 1, 1500);
    device.send(0, &frame(100, 7));
    let device = std::thread::scope(|scope| {
        let run = move || {
            let _lcore = eal.register_thread().unwrap();
            assert_eq!(device.receive(1), [(0, frame(100, 7))]);
            for serial in 0..10_000 {
                device.send(0, &frame(100, serial));
                assert_eq!(device.receive(1), [(0, frame(100, serial))]);
            }
            device
        };
        scope.spawn(run).join().unwrap()
    });
    device.remove();
}

fn tap_both_ways(tap: &str) {
    let mut device = Device::start(&format!("vdev:net_tap0,iface={tap}"), 2, 1500);
    println!("net_tap: {:?}", device.vf.caps());
    assert_eq!(device.vf.caps().max_queues, 4, "more overrun the stack of its driver");
    up(tap);
    let wire = Wire::open(tap, EXPERIMENTAL);
    for (serial, size) in [14, 60, 61, 128, 1500, 1514].into_iter().enumerate() {
        let frame = frame(size, serial as u32);
        device.send(serial % 2, &frame);
        assert_eq!(wire.receive(PATIENCE).as_ref(), Some(&frame));
        wire.send(&frame);
        assert_eq!(device.receive(1)[0].1, frame);
    }
    for serial in 0..1000 {
        wire.send(&frame(200, serial));
        assert_eq!(device.receive(1)[0].1, frame(200, serial));
    }
    device.vf.set_mac("52:54:00:00:00:02".parse().unwrap()).unwrap();
    assert_eq!(device.vf.link().mac.unwrap().to_string(), "52:54:00:00:00:02");
    device.remove();
    assert!(!std::path::Path::new(&format!("/sys/class/net/{tap}")).exists());
}

/// A sleeper on the tap's interrupt fd wakes at once.
fn tap_wakes(tap: &str) {
    let mut device = Device::start(&format!("vdev:net_tap0,iface={tap}"), 1, 1500);
    up(tap);
    assert!(device.vf.caps().rx_interrupt);
    let fd = device.rx[0].interrupt_fd().expect("net_tap has one").as_raw_fd();
    let wire = Wire::open(tap, EXPERIMENTAL);
    once_of_several(|| {
        let mut waits = tap_wake_ups(&mut device, fd, &wire);
        waits.sort_unstable();
        println!("net_tap wakes: p50 {:?}, p99 {:?}", waits[100], waits[198]);
        quicker("a wake-up by a tap", waits[100], Duration::from_micros(500))
    });
    device.remove();
}

/// From a frame on the wire to its receipt by a sleeper on `fd`, 200 times.
fn tap_wake_ups(device: &mut Device, fd: i32, wire: &Wire) -> Vec<Duration> {
    let mut waits = Vec::new();
    for serial in 0..200 {
        device.rx[0].arm();
        while device.rx[0].receive(&mut ArrayVec::new()) > 0 {}
        assert!(!readable(fd, Duration::from_millis(1)));
        let (send, sent) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(2));
                let now = Instant::now();
                wire.send(&frame(60, serial));
                send.send(now).unwrap();
            });
            assert!(readable(fd, PATIENCE));
            device.rx[0].disarm();
            assert_eq!(device.receive(1)[0].1, frame(60, serial));
            let now = Instant::now();
            waits.push(now - sent.recv().unwrap());
        });
    }
    waits
}

/// IPv4 + TCP or UDP with `payload` bytes; the L4 checksum holds the pseudo header's sum, as a guest leaves it.
fn ipv4(udp: bool, payload: usize) -> Vec<u8> {
    let l4 = if udp { 8 } else { 20 };
    let mut frame = frame(14 + 20 + l4 + payload, 3);
    frame[12..14].copy_from_slice(&IPV4.to_be_bytes());
    let length = (20 + l4 + payload) as u16;
    frame[14..34].copy_from_slice(&[0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 0, 0, 0, 10, 9, 0, 1, 10, 9, 0, 2]);
    frame[16..18].copy_from_slice(&length.to_be_bytes());
    frame[23] = if udp { 17 } else { 6 };
    let header = !sum(&frame[14..34], 0);
    frame[24..26].copy_from_slice(&header.to_be_bytes());
    let pseudo = sum(&frame[26..34], u32::from(frame[23]) + (l4 + payload) as u32);
    if udp {
        frame[34..38].copy_from_slice(&[0x12, 0x34, 0x56, 0x78]);
        frame[38..40].copy_from_slice(&(length - 20).to_be_bytes());
        frame[40..42].copy_from_slice(&pseudo.to_be_bytes());
    } else {
        frame[34..54].copy_from_slice(&[0x12, 0x34, 0x56, 0x78, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x18, 1, 0, 0, 0, 0, 0]);
        frame[50..52].copy_from_slice(&pseudo.to_be_bytes());
    }
    frame
}

fn sum(bytes: &[u8], start: u32) -> u16 {
    let mut sum = start;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    }
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

/// Both checksums of a frame are right.
fn valid(frame: &[u8]) -> bool {
    let l4 = &frame[34..];
    sum(&frame[14..34], 0) == 0xffff
        && sum(l4, u32::from(sum(&frame[26..34], u32::from(frame[23]) + l4.len() as u32))) == 0xffff
}

fn tap_offloads(tap: &str) {
    let mut device = Device::start(&format!("vdev:net_tap0,iface={tap}"), 1, 1500);
    up(tap);
    let wire = Wire::open(tap, IPV4);
    assert!(device.vf.caps().tx_checksum && device.vf.caps().rx_checksum);

    let send = |queue: &mut EthdevTx, frame: &[u8], offload: TxOffload| {
        let mut packet = queue.copy(&mut &*frame).unwrap();
        packet.set_offload(&offload);
        let mut burst = ArrayVec::from_iter([packet]);
        assert_eq!(queue.send(&mut burst, &mut 0), 1);
    };
    for udp in [true, false] {
        let offload = TxOffload { checksum: true, udp, l2_len: 14, l3_len: 20, ..TxOffload::default() };
        let mut sent = ipv4(udp, 777);
        assert!(!valid(&sent));
        send(&mut device.tx[0], &sent, offload);
        let got = wire.receive(PATIENCE).unwrap();
        assert!(valid(&got));
        // Nothing but the checksum changed.
        let at = if udp { 40..42 } else { 50..52 };
        sent[at.clone()].copy_from_slice(&got[at]);
        assert_eq!(got, sent);
    }

    // The same, with all but the first bytes where they lie. What is dropped unsent is not among what came back, and
    // leaves nothing behind: more of them than there are mbufs.
    let udp = ipv4(true, 777);
    let offload = TxOffload { checksum: true, udp: true, l2_len: 14, l3_len: 20, ..TxOffload::default() };
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    file.write_all_at(&udp, 0).unwrap();
    let region = RegionSpec { gpa: Gpa(0), size: 4096, user: UserAddr(0), offset: 0 };
    let memory = GuestMemory::empty().replaced(vec![(region, file)]).unwrap();
    let lendable = Lendable::all(Arc::clone(&memory));
    let rest = memory.translate(Gpa(256), udp.len() as u64 - 256).unwrap();
    let queue = &mut device.tx[0];
    assert!(queue.takes_heads());
    for round in 1..=5000 {
        drop(queue.lend_behind(&udp[..256], rest, &lendable).expect("an mbuf and a shell"));
        if round % 50 == 0 {
            let mut packet = queue.lend_behind(&udp[..256], rest, &lendable).expect("an mbuf and a shell");
            assert_eq!((packet.len(), packet.head().len()), (udp.len(), 256));
            packet.set_offload(&offload);
            let mut burst = ArrayVec::from_iter([packet]);
            assert_eq!(queue.send(&mut burst, &mut 0), 1);
            assert_eq!((queue.lent(), queue.returned()), (round / 50, round / 50));
            let got = wire.receive(PATIENCE).unwrap();
            assert!(valid(&got) && got[42..] == udp[42..]);
        }
    }
    assert!(queue.forget_memories(None));

    // 30 kB in one frame: a chain of mbufs, cut into segments.
    let sent = ipv4(false, 30_000);
    let tso = TxOffload { checksum: true, segment: 1400, l2_len: 14, l3_len: 20, l4_len: 20, ..TxOffload::default() };
    send(&mut device.tx[0], &sent, tso);
    let mut payload = Vec::new();
    let mut segments = 0;
    while payload.len() < 30_000 {
        let segment = wire.receive(PATIENCE).expect("more segments");
        assert!(valid(&segment), "segment {segments}");
        assert_eq!(segment.len(), 54 + (30_000 - payload.len()).min(1400));
        assert_eq!(segment[16..18], (segment.len() as u16 - 14).to_be_bytes());
        assert_eq!(segment[38..42], (1 + payload.len() as u32).to_be_bytes());
        payload.extend_from_slice(&segment[54..]);
        segments += 1;
    }
    assert_eq!(segments, 22);
    assert!(payload == sent[54..]);

    // Of two received frames, the one with the wrong checksum is not called good.
    let mut good = ipv4(true, 100);
    good[40..42].fill(0);
    let check = !sum(&good[34..], u32::from(sum(&good[26..34], 17 + 108)));
    good[40..42].copy_from_slice(&check.to_be_bytes());
    let mut bad = good.clone();
    bad[90] ^= 1;
    for (frame, is_good) in [(good, true), (bad, false)] {
        wire.send(&frame);
        let end = Instant::now() + PATIENCE;
        let packet = loop {
            assert!(Instant::now() < end, "no frame");
            let mut burst = ArrayVec::new();
            device.rx[0].receive(&mut burst);
            if let Some(packet) = burst.into_iter().find(|packet| bytes(packet) == frame) {
                break packet;
            }
        };
        assert_eq!(packet.checksum_good(), is_good);
    }
    device.remove();
}

fn af_packet(suffix: &str) {
    let (ours, theirs) = (format!("vfta{suffix}"), format!("vftb{suffix}"));
    ip(&format!("link add {ours} type veth peer name {theirs}"));
    ip(&format!("link set {theirs} mtu 9000"));
    up(&ours);
    up(&theirs);
    let spec = format!("vdev:net_af_packet0,iface={ours},framesz=10240,blocksz=40960,framecnt=256");
    let mut device = Device::start(&spec, 1, 9000);
    println!("net_af_packet: {:?}", device.vf.caps());
    let wire = Wire::open(&theirs, EXPERIMENTAL);
    for (serial, size) in [60, 1514, 4000, 9014].into_iter().enumerate() {
        let frame = frame(size, serial as u32);
        device.send(0, &frame);
        assert_eq!(wire.receive(PATIENCE).as_ref(), Some(&frame), "{size}");
        wire.send(&frame);
        assert_eq!(device.receive(1)[0].1, frame);
    }
    device.remove();
    ip(&format!("link del {ours}"));
}

fn absent_and_held() {
    match Vf::probe(&"0000:ff:1f.7".parse().unwrap()) {
        Err(Error::VfAbsent(text)) => assert!(text.contains("0000:ff:1f.7"), "{text}"),
        other => panic!("{other:?}"),
    }
    let device = Device::start("vdev:net_null0", 1, 1500);
    assert!(matches!(Vf::probe(&"vdev:net_null0".parse().unwrap()), Err(Error::Conflict(_))));
    device.remove();
    assert!(matches!(Vf::probe(&"vdev:net_nonesuch0".parse().unwrap()), Err(Error::Dpdk { .. })));
    let mut vf = Vf::probe(&"vdev:net_null0".parse().unwrap()).unwrap();
    assert!(matches!(vf.start(), Err(Error::Invalid(_))));
    for (queues, mtu) in [(0, 1500), (1, 67), (1, 9217)] {
        assert!(matches!(vf.configure(&VfConfig { queues, mtu, mac: None }), Err(Error::Invalid(_))));
    }
    vf.remove().unwrap();
}

/// 50 lives of each kind with traffic: DPDK's memory, fds and threads are as before. A receive pool is only
/// freed with all of its mbufs home, each once (asserted where it is freed), so the heap shows a lost one.
fn leaves_nothing(eal: &Eal, tap: &str) {
    for spec in ["vdev:net_null0", "vdev:net_ring0", &format!("vdev:net_tap0,iface={tap}")] {
        let live = || {
            let mut device = Device::start(spec, 2, 1500);
            if spec.contains("tap") {
                up(tap);
            }
            for serial in 0..40 {
                device.send(1, &frame(1000, serial));
            }
            let mut held = ArrayVec::new();
            device.rx[0].receive(&mut held);
            drop(held);
            device.remove();
        };
        // What DPDK sets up once and keeps.
        live();
        let before = (eal.heap_in_use(), resources());
        let start = Instant::now();
        for _ in 0..50 {
            live();
        }
        println!("{spec}: {:?} per attach and detach", start.elapsed() / 50);
        assert_eq!(resources(), before.1, "{spec}");
        // net_null 22.11 itself loses a packet of 192 bytes per queue and direction.
        let lost = if spec.contains("null") { 50 * 2 * 2 * 192 } else { 0 };
        let after = eal.heap_in_use();
        assert!(after == before.0 || after == before.0 + lost, "{spec}: {} bytes, then {after}", before.0);
    }
}

/// A frame that outlives its VF, against the contract, keeps its pool's memory until it is dropped.
fn frame_outlives_vf(eal: &Eal) {
    let before = eal.heap_in_use();
    let mut device = Device::start("vdev:net_ring0", 1, 1500);
    device.send(0, &frame(1000, 5));
    let mut held = ArrayVec::<_, BURST>::new();
    device.rx[0].receive(&mut held);
    device.remove();
    assert_eq!(bytes(&held[0]), frame(1000, 5));
    assert!(eal.heap_in_use() > before + 1_000_000);
    drop(held);
    // The next probe looks after what was left behind.
    Device::start("vdev:net_ring0", 1, 1500).remove();
    assert_eq!(eal.heap_in_use(), before);
}

/// Removing a VF under a queue, against the contract, is refused: the device stays, and the queue works on.
fn queue_outlives_vf() {
    let Device { vf, mut tx, mut rx } = Device::start("vdev:net_ring0", 1, 1500);
    assert!(matches!(vf.remove(), Err(Error::Conflict(_))));
    let mut burst = ArrayVec::from_iter([tx[0].copy(&mut &*frame(100, 9)).unwrap()]);
    assert_eq!(tx[0].send(&mut burst, &mut 0), 1);
    let mut received = ArrayVec::<_, BURST>::new();
    assert_eq!(rx[0].receive(&mut received), 1);
    assert_eq!(bytes(&received[0]), frame(100, 9));
    assert!(matches!(Vf::probe(&"vdev:net_ring0".parse().unwrap()), Err(Error::Conflict(_))));
}

/// Memory that runs out is named as such, whichever step it runs out in.
fn memory_runs_out() {
    let mut errors = Vec::new();
    let mut devices = Vec::new();
    for n in 1..32 {
        let mut vf = Vf::probe(&format!("vdev:net_null{n}").parse().unwrap()).unwrap();
        // In ever smaller steps.
        let config = VfConfig { queues: if n < 20 { 4 } else { 1 }, mtu: if n < 26 { 9000 } else { 1500 }, mac: None };
        match vf.configure(&config) {
            Ok(queues) => devices.push((queues, vf)),
            Err(error) => {
                errors.push(error.to_string());
                assert!(matches!(error, Error::Exhausted(_)), "{error:?}");
                vf.remove().unwrap();
            }
        }
    }
    assert!(!errors.is_empty() && errors.iter().all(|text| text.contains("more --memory")), "{errors:?}");
    for (queues, vf) in devices {
        drop(queues);
        vf.remove().unwrap();
    }
}

fn slots_run_out(eal: &Eal) {
    let probe = |n| Vf::probe(&format!("vdev:net_null{n}").parse().unwrap());
    // One is taken by `queue_outlives_vf`.
    let all: Vec<_> = (1..eal.max_ethdevs()).map(|n| probe(n).unwrap()).collect();
    match probe(eal.max_ethdevs()) {
        Err(Error::Exhausted(text)) => assert!(text.contains(&eal.max_ethdevs().to_string()), "{text}"),
        other => panic!("{other:?}"),
    }
    for vf in all {
        vf.remove().unwrap();
    }
    probe(1).unwrap().remove().unwrap();
}
