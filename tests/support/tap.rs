//! The kernel's end of a `net_tap` VF: a real network stack as the peer of a guest.

use std::net::UdpSocket;
use std::process::Command;

use super::frame::{GUEST_MAC, fold, sum};
use super::{program, until};

const HOST: [u8; 4] = [10, 231, 77, 1];
const GUEST: [u8; 4] = [10, 231, 77, 2];
const PORT: u16 = 4789;

/// The interface exists as long as the VF does.
#[derive(Debug)]
pub struct Tap {
    mac: [u8; 6],
    pub socket: UdpSocket,
}

/// A name no other test uses at the same time.
pub fn interface_name() -> String {
    format!("vft{}", std::process::id())
}

/// Whether this machine lets us have one; the reason if not.
pub fn available() -> Result<(), &'static str> {
    if !rustix::process::geteuid().is_root() {
        return Err("not root");
    }
    if !std::path::Path::new("/dev/net/tun").exists() {
        return Err("no /dev/net/tun");
    }
    program("ip").map(|_| ()).ok_or("no iproute2")
}

pub fn ip(args: &[&str]) {
    let output = Command::new("ip").args(args).output().expect("ip");
    assert!(output.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Tap {
    /// Gives the interface of a started VF an address, and makes the guest its neighbour.
    pub fn set_up(name: &str) -> Self {
        let file = format!("/sys/class/net/{name}/address");
        until("the tap interface exists", || std::path::Path::new(&file).exists());
        let dotted = |ip: [u8; 4]| format!("{}.{}.{}.{}", ip[0], ip[1], ip[2], ip[3]);
        ip(&["addr", "add", &format!("{}/24", dotted(HOST)), "dev", name]);
        ip(&["link", "set", name, "up"]);
        let guest_mac = GUEST_MAC.map(|byte| format!("{byte:02x}")).join(":");
        ip(&["neigh", "replace", &dotted(GUEST), "lladdr", &guest_mac, "dev", name]);
        let text = std::fs::read_to_string(&file).expect("address");
        let bytes = text.trim().split(':').map(|part| u8::from_str_radix(part, 16).expect("hexadecimal"));
        let mac: Vec<u8> = bytes.collect();
        let socket = UdpSocket::bind((std::net::Ipv4Addr::from(HOST), PORT)).expect("bind");
        socket.connect((std::net::Ipv4Addr::from(GUEST), PORT)).expect("connect");
        socket.set_read_timeout(Some(super::PATIENCE)).expect("timeout");
        Self { mac: mac.try_into().expect("six bytes"), socket }
    }

    /// A datagram from the guest to the kernel's socket, as a frame.
    pub fn frame(&self, payload: &[u8]) -> Vec<u8> {
        let len = payload.len() as u16;
        let mut frame = Vec::new();
        frame.extend(self.mac);
        frame.extend(GUEST_MAC);
        frame.extend([0x08, 0, 0x45, 0]);
        frame.extend((28 + len).to_be_bytes());
        frame.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
        frame.extend(GUEST);
        frame.extend(HOST);
        let check = !fold(sum(&frame[14..34]));
        frame[24..26].copy_from_slice(&check.to_be_bytes());
        for word in [PORT, PORT, 8 + len, 0] {
            frame.extend(word.to_be_bytes());
        }
        frame.extend(payload);
        frame
    }

    /// The payload of a datagram from the kernel's socket; `None` for other frames (the kernel's own
    /// neighbour discovery and multicast).
    pub fn payload<'a>(&self, frame: &'a [u8]) -> Option<&'a [u8]> {
        let ours = frame.len() >= 42 && frame[12..14] == [8, 0] && frame[23] == 17 && frame[30..34] == GUEST;
        let len = || usize::from(u16::from_be_bytes([frame[38], frame[39]]));
        ours.then(|| &frame[42..34 + len()])
    }
}
