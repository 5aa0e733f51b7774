//! A guest of scripts/vf-lab's, on hugepages, whose every byte is known; and who knows them on the wire.
//!
//! ```text
//! lab_guest changes SOCKET MAC   sends while its memory table changes, and says how many frames it sent
//! lab_guest lone SOCKET MAC      sends frames one by one, and says how long each was with the device
//! lab_guest check RECORDING MAC  says how many of its frames a recording of the wire has, all of them right
//! ```

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

#[allow(dead_code)]
#[path = "../tests/support/census.rs"]
mod census;
#[allow(dead_code)]
#[path = "../tests/support/frontend.rs"]
mod frontend;
#[allow(dead_code)]
#[path = "../tests/support/memory.rs"]
mod memory;
#[allow(dead_code)]
#[path = "../tests/support/packed.rs"]
mod packed;
#[allow(dead_code)]
#[path = "../tests/support/queue.rs"]
mod queue;

use frontend::{FrontEnd, feature, mem_reg, request};
use memory::{HUGE, Region};
use queue::Queue;

/// Longer than anything takes.
const PATIENCE: Duration = Duration::from_secs(60);

const RING: u16 = 256;
const HEADER: u64 = 12;
const SLOT: u64 = 2048;
/// Of local experiments (IEEE 802).
const ETHERTYPE: [u8; 2] = [0x88, 0xb6];
/// Times that each change is made.
const ROUNDS: u64 = 40;
const LONE_FRAMES: usize = 100;

/// Frame `number`, of some length from 300 to 1514 bytes.
fn frame(mac: [u8; 6], number: u64) -> Vec<u8> {
    let mut frame = [&[2, 0, 0, 0, 0, 0], &mac[..], &ETHERTYPE].concat();
    frame.extend(number.to_be_bytes());
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    frame.resize_with(300 + (number as usize * 37) % 1215, || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    });
    frame
}

struct Guest {
    front: FrontEnd,
    mac: [u8; 6],
    ring: Queue,
    /// Ring and half of the buffers; the others; none, but it is there at times.
    regions: [Arc<Region>; 3],
    /// Of the first and the second.
    buffers: [u64; 2],
    sent: u64,
}

impl Guest {
    fn connect(socket: &Path, mac: [u8; 6]) -> Self {
        let mut front = FrontEnd::connect(socket);
        let protocol = feature::PROTOCOL_REPLY_ACK | feature::PROTOCOL_CONFIGURE_MEM_SLOTS;
        front.must(request::SET_PROTOCOL_FEATURES, &protocol.to_ne_bytes(), &[]);
        front.reply_ack = true;
        front.must(request::SET_OWNER, &[], &[]);
        front.must(request::SET_FEATURES, &(feature::VERSION_1 | feature::PROTOCOL).to_ne_bytes(), &[]);
        let region = |gpa| Region::huge(gpa, HUGE).expect("hugepages");
        let regions = [region(0x100_0000), region(0x200_0000), region(0x300_0000)];
        let ring = Queue::new(&regions[0], 1, RING, false);
        let buffers = [0, 1].map(|region: usize| regions[region].alloc(u64::from(RING) * SLOT, 64));
        let guest = Self { front, mac, ring, regions, buffers, sent: 0 };
        guest.set_table(&[0, 1]);
        guest.ring.start(&guest.front);
        guest.front.set_vring_enable(1, true);
        guest
    }

    fn set_table(&self, regions: &[usize]) {
        let table: Vec<_> = regions.iter().map(|&region| &self.regions[region]).map(|r| (r.entry(), r.fd())).collect();
        self.front.set_mem_table(&table);
    }

    fn add(&self, region: usize) {
        let region = &self.regions[region];
        self.front.must(request::ADD_MEM_REG, &mem_reg(&region.entry()), &[region.fd()]);
    }

    fn remove(&self, region: usize) {
        self.front.must(request::REM_MEM_REG, &mem_reg(&self.regions[region].entry()), &[]);
    }

    /// Offers a frame in a buffer of this region; `false`: the ring is full.
    fn offer(&mut self, region: usize) -> bool {
        while self.ring.pop().is_some() {}
        let Some(head) = self.ring.next_head(1) else { return false };
        let at = self.buffers[region] + u64::from(head) * SLOT;
        let frame = frame(self.mac, self.sent);
        self.regions[region].write(at, &[0; HEADER as usize]);
        self.regions[region].write(at + HEADER, &frame);
        self.ring.add(&[(at, (HEADER as usize + frame.len()) as u32)], false);
        self.sent += 1;
        true
    }

    /// Offers frames, in turn from the first regions, and gives the device the time to take, but not to send them.
    fn burst(&mut self, regions: usize) {
        for turn in 0..60 {
            while !self.offer(turn % regions) {
                std::thread::yield_now();
            }
            if turn % 10 == 9 {
                self.ring.notify();
            }
        }
        let start = Instant::now();
        while self.outstanding() > 20 && start.elapsed() < Duration::from_millis(20) {
            std::thread::yield_now();
        }
    }

    fn outstanding(&mut self) -> u64 {
        while self.ring.pop().is_some() {}
        self.ring.outstanding().into()
    }

    fn settle(&mut self) {
        let start = Instant::now();
        while self.outstanding() > 0 {
            assert!(start.elapsed() < PATIENCE, "{} frames do not come back", self.outstanding());
            std::thread::yield_now();
        }
    }

    /// The second region is not the device's any more: whatever of it were still to be sent would be damaged.
    fn spoil(&self) {
        self.regions[1].write(self.buffers[1], &vec![0xee; (u64::from(RING) * SLOT) as usize]);
    }
}

/// All that keeps the regions in use, in between what does not.
fn changes(guest: &mut Guest) {
    // Not back yet when a region with such frames went.
    let mut out = 0;
    for _ in 0..ROUNDS {
        guest.burst(2);
        guest.set_table(&[0, 1]);
        guest.burst(2);
        guest.add(2);
        guest.burst(2);
        let ring = u64::from(guest.ring.index).to_ne_bytes();
        guest.front.must(request::SET_VRING_CALL, &ring, &[guest.ring.call.as_fd()]);
        guest.burst(2);
        // Not in use.
        guest.remove(2);
        guest.burst(2);
        // In use, with frames in it: what the device has not looked at by then is malformed.
        out += guest.outstanding();
        guest.remove(1);
        guest.spoil();
        guest.burst(1);
        guest.add(1);
        guest.burst(2);
        out += guest.outstanding();
        guest.set_table(&[0]);
        guest.spoil();
        guest.burst(1);
        guest.set_table(&[0, 1]);
    }
    guest.settle();
    println!("{} {out}", guest.sent);
    // For as long as it takes to look at the port.
    std::io::stdin().read_line(&mut String::new()).expect("stdin");
}

/// With nothing behind a frame that would have the driver look for it.
fn lone(guest: &mut Guest) {
    for _ in 0..3 {
        let mut times: Vec<_> = (0..LONE_FRAMES)
            .map(|_| {
                std::thread::sleep(Duration::from_millis(5));
                assert!(guest.offer(0));
                guest.ring.notify();
                let start = Instant::now();
                guest.settle();
                start.elapsed()
            })
            .collect();
        times.sort_unstable();
        println!("{} {}", times[LONE_FRAMES / 2].as_micros(), times[LONE_FRAMES - 1].as_micros());
    }
}

/// The frames in a recording of tcpdump's, each once at most, in order, byte by byte as it was sent.
fn check(recording: &[u8], mac: [u8; 6]) {
    const FILE_HEADER: usize = 24;
    const RECORD_HEADER: usize = 16;
    let (mut rest, mut right, mut wrong, mut next) = (&recording[FILE_HEADER..], 0u64, 0u64, 0);
    while rest.len() >= RECORD_HEADER {
        let len = u32::from_le_bytes(rest[8..12].try_into().expect("4 bytes")) as usize;
        let Some(bytes) = rest.get(RECORD_HEADER..RECORD_HEADER + len) else { break };
        rest = &rest[RECORD_HEADER + len..];
        if bytes.len() < 22 || bytes[6..12] != mac || bytes[12..14] != ETHERTYPE {
            continue;
        }
        let number = u64::from_be_bytes(bytes[14..22].try_into().expect("8 bytes"));
        match number >= next && bytes == frame(mac, number) {
            true => (right, next) = (right + 1, number + 1),
            false => wrong += 1,
        }
    }
    println!("{right} {wrong}");
}

fn main() {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [what, path, mac] = &arguments[..] else { panic!("lab_guest changes|lone|check PATH MAC") };
    let octets: Vec<_> = mac.split(':').map(|octet| u8::from_str_radix(octet, 16).expect("hexadecimal")).collect();
    let mac = octets.try_into().expect("a MAC");
    let connect = || Guest::connect(Path::new(path), mac);
    match what.as_str() {
        "changes" => changes(&mut connect()),
        "lone" => {
            let mut guest = connect();
            // The port is to have mapped its memory.
            std::io::stdin().read_line(&mut String::new()).expect("stdin");
            lone(&mut guest);
        }
        "check" => check(&std::fs::read(path).expect("a recording"), mac),
        other => panic!("{other}: changes, lone or check"),
    }
}
