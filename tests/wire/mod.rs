//! The kernel's end of a tap or veth: an AF_PACKET socket, and what ethdev tests count of the process.

use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::time::Duration;

/// An EtherType that nothing else uses (IEEE 802, local experimental 1).
pub const EXPERIMENTAL: u16 = 0x88b5;
/// IPv4.
pub const IPV4: u16 = 0x0800;

/// A packet socket on an interface, for frames of one EtherType that come in to the kernel.
pub struct Wire(OwnedFd);

impl Wire {
    pub fn open(interface: &str, ethertype: u16) -> Self {
        // SAFETY: plain system calls; the address is ours.
        unsafe {
            let protocol = ethertype.to_be();
            let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol.into());
            assert!(fd >= 0, "packet socket: {}", std::io::Error::last_os_error());
            let wire = Self(OwnedFd::from_raw_fd(fd));
            let name = std::ffi::CString::new(interface).unwrap();
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = protocol;
            address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
            assert_ne!(address.sll_ifindex, 0, "{interface}");
            let size = size_of_val(&address) as u32;
            assert_eq!(libc::bind(fd, (&raw const address).cast(), size), 0);
            let size = 8 << 20;
            let rc = libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, (&raw const size).cast(), 4);
            assert_eq!(rc, 0);
            wire
        }
    }

    pub fn send(&self, frame: &[u8]) {
        // SAFETY: the buffer is ours.
        let n = unsafe { libc::send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        assert_eq!(n, frame.len() as isize, "{}", std::io::Error::last_os_error());
    }

    /// The next frame, or `None` after `timeout`.
    pub fn receive(&self, timeout: Duration) -> Option<Vec<u8>> {
        if !readable(self.0.as_raw_fd(), timeout) {
            return None;
        }
        let mut frame = vec![0; 1 << 16];
        // SAFETY: the buffer is ours.
        let n = unsafe { libc::recv(self.0.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len(), 0) };
        frame.truncate(usize::try_from(n).expect("a frame"));
        Some(frame)
    }
}

/// Waits until `fd` is readable. Signals (net_tap sends itself some) do not end the wait.
pub fn readable(fd: i32, timeout: Duration) -> bool {
    let end = std::time::Instant::now() + timeout;
    loop {
        let left = end.saturating_duration_since(std::time::Instant::now());
        let left = libc::timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd of ours.
        match unsafe { libc::ppoll(&mut poll, 1, &left, std::ptr::null()) } {
            1 => return true,
            0 => return false,
            _ => {}
        }
    }
}

/// Runs `ip` with these words.
pub fn ip(words: &str) {
    let output = Command::new("ip").args(words.split(' ')).output().expect("ip");
    assert!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr));
}

/// An interface without IPv6, whose noise would be counted; up.
pub fn up(interface: &str) {
    let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"), "1");
    ip(&format!("link set {interface} up"));
}

/// A frame of `len` bytes that no other is equal to.
pub fn frame(len: usize, serial: u32) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..len as u32).map(|i| (i * 7 + serial * 13 + i / 256) as u8).collect();
    frame[..12].copy_from_slice(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 9]);
    frame[12..14].copy_from_slice(&EXPERIMENTAL.to_be_bytes());
    if let Some(mark) = frame.get_mut(14..18) {
        mark.copy_from_slice(&serial.to_be_bytes());
    }
    frame
}

/// Open fds, threads.
pub fn resources() -> (usize, usize) {
    let count = |path| fs::read_dir(path).unwrap().count();
    (count("/proc/self/fd"), count("/proc/self/task"))
}
