//! What single drivers do differently from what DPDK says, each with the release it was seen in.

use std::ffi::CString;

use super::VfSpec;
use crate::error::{Error, Result};
use crate::ethernet::{MAX_MTU, TAGGED_HEADER};

const AF_PACKET: &str = "net_af_packet";
const IGB_VF: &str = "net_e1000_igb_vf";

/// net_af_packet carries what a frame of its ring holds (`framesz`) behind the kernel's headers, but up to 25.11 it
/// claims 1500 whatever the size. `None` for other drivers.
pub(super) fn max_mtu(spec: &VfSpec) -> Option<u16> {
    /// Up to the Ethernet header: TPACKET2_HDRLEN + 16, aligned to 16, less the header (packet(7)).
    const KERNEL_HEADERS: u32 = 66;
    let most = af_packet_frame(spec)?.saturating_sub(KERNEL_HEADERS + TAGGED_HEADER as u32);
    Some(most.min(MAX_MTU.into()) as u16)
}

/// Sets an MTU that the driver carries but does not claim: what its mtu_set would do.
pub(super) fn set_mtu_beyond_claim(spec: &VfSpec, mtu: u16) -> Result<()> {
    let interface = argument(spec, "iface").unwrap_or_default();
    let path = format!("/sys/class/net/{interface}/mtu");
    std::fs::write(&path, mtu.to_string()).map_err(Error::io(format!("cannot set MTU {mtu} of {spec} through {path}")))
}

/// net_af_packet refuses mbufs smaller than a frame of its ring, whatever the MTU.
pub(super) fn least_data_room(spec: &VfSpec) -> u16 {
    /// A pool's data room is 16 bits, headroom included.
    const MOST: u32 = 65024;
    af_packet_frame(spec).map_or(0, |frame| frame.min(MOST) as u16)
}

/// Most bytes that a driver writes to a receive buffer: those that write there at once ask for no length but that of
/// the pool's buffers when the queue is set up. Frames may be longer than any MTU allows (a veth carries what its peer
/// has not segmented).
pub(super) fn most_written(spec: &VfSpec) -> usize {
    /// TPACKET2_HDRLEN: a frame never begins before that in its place in the ring.
    const LEAST_KERNEL_HEADERS: usize = 52;
    match spec.vdev_driver() {
        Some(AF_PACKET) => {
            af_packet_frame(spec).map_or(usize::MAX, |frame| (frame as usize).saturating_sub(LEAST_KERNEL_HEADERS))
        }
        // All its frames have that length.
        Some("net_null") => argument(spec, "size").map_or(Some(64), |size| size.parse().ok()).unwrap_or(usize::MAX),
        _ => usize::MAX,
    }
}

/// Whether the message of a VF's PF, that it was reset, is to be looked for: see [`super::reset_watch`].
pub(super) fn has_deaf_mailbox(driver: &str) -> bool {
    driver == IGB_VF
}

/// Drivers whose start sets up all of a VF whose PF was reset, reset included (22.11). Of others it is known that they
/// do not (net_iavf tells its PF of its queues when it is probed or reset only), or nothing.
pub(super) fn revives(driver: &str) -> bool {
    driver == IGB_VF
}

/// net_af_packet and net_af_xdp are on an interface that is there already. Without it they fail with no more than an
/// errno, and lines on stderr.
pub(super) fn require_interface(spec: &VfSpec) -> Result<()> {
    if !matches!(spec.vdev_driver(), Some(AF_PACKET | "net_af_xdp")) {
        return Ok(());
    }
    let Some(interface) = argument(spec, "iface") else {
        return Err(Error::Invalid(format!("{spec} names no interface; add one: {spec},iface=NAME")));
    };
    let exists = CString::new(interface).is_ok_and(|name| {
        // SAFETY: a NUL-terminated string.
        unsafe { libc::if_nametoindex(name.as_ptr()) != 0 }
    });
    if exists {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "there is no interface {interface:?} for {spec}; create it (ip link add) or correct iface"
    )))
}

fn af_packet_frame(spec: &VfSpec) -> Option<u32> {
    (spec.vdev_driver() == Some(AF_PACKET))
        .then(|| argument(spec, "framesz").map_or(Some(2048), |size| size.parse().ok()))
        .flatten()
}

/// net_tap (22.11 to 26.07) cuts no segment whose frame is longer than the *MTU*, so none of full size, and no frame
/// into more than 64; and a frame that it does not take blocks its queue for good.
pub(super) fn segments_soundly(driver: &str) -> bool {
    driver != "net_tap"
}

/// net_tap (22.11) sends the fds of all queues to secondary processes, 2 a queue pair, from an array for 8 on its
/// stack, and overruns it: attaching more than 4 pairs aborted the daemon.
pub(super) fn max_queues(driver: &str) -> u16 {
    if driver == "net_tap" { 4 } else { u16::MAX }
}

/// net_ring (22.11 to 26.07) creates 16 rings and frees those of the configured queues; the next device of
/// that name could not create them again.
pub(super) fn after_close(spec: &VfSpec) {
    const RINGS: u16 = 16;
    let (VfSpec::Vdev { name, args }, Some("net_ring")) = (spec, spec.vdev_driver()) else {
        return;
    };
    if !args.is_empty() {
        // Rings of other devices (nodeaction): not ours to free.
        return;
    }
    for ring in (0..RINGS).filter_map(|ring| CString::new(format!("ETH_RXTX{ring}_{name}")).ok()) {
        // SAFETY: the device was the only user of its rings, and is closed; freeing null does nothing.
        unsafe { dpdk_sys::rte_ring_free(dpdk_sys::rte_ring_lookup(ring.as_ptr())) };
    }
}

/// Drivers without receive interrupts. Asking them is an error line in the log.
pub(super) fn has_no_interrupts(driver: &str) -> bool {
    ["net_null", "net_ring", "net_af_packet"].contains(&driver)
}

fn argument<'a>(spec: &'a VfSpec, wanted: &str) -> Option<&'a str> {
    let VfSpec::Vdev { args, .. } = spec else { return None };
    args.iter().find(|(key, _)| key == wanted).map(|(_, value)| value.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_interface_is_named() {
        let error = |text: &str| require_interface(&text.parse().unwrap()).unwrap_err().to_string();
        assert!(error("vdev:net_af_packet0,iface=none-such").contains("\"none-such\""));
        assert!(error("vdev:net_af_packet0").contains("vdev:net_af_packet0,iface=NAME"));
        require_interface(&"vdev:net_af_packet0,iface=lo".parse().unwrap()).unwrap();
        // net_tap makes its own.
        require_interface(&"vdev:net_tap0,iface=none-such".parse().unwrap()).unwrap();
    }

    #[test]
    fn af_packet_carries_what_its_ring_holds() {
        let max = |text: &str| max_mtu(&text.parse().unwrap());
        assert_eq!(max("vdev:net_tap0,iface=vf0"), None);
        assert_eq!(max("vdev:net_af_packet0,iface=vf0"), Some(1960));
        assert_eq!(max("vdev:net_af_packet0,iface=vf0,framesz=10240"), Some(9216));
        assert_eq!(least_data_room(&"vdev:net_af_packet0,iface=vf0,framesz=10240".parse().unwrap()), 10240);
    }

    #[test]
    fn buffers_hold_what_a_driver_writes() {
        let most = |text: &str| most_written(&text.parse().unwrap());
        assert_eq!(most("vdev:net_af_packet0,iface=vf0"), 1996);
        assert_eq!(most("vdev:net_af_packet0,iface=vf0,framesz=10240"), 10188);
        assert_eq!(most("vdev:net_null0"), 64);
        assert_eq!(most("vdev:net_null0,size=9000"), 9000);
        assert_eq!(most("vdev:net_null0,size=0x100"), usize::MAX);
        assert_eq!(most("vdev:net_tap0,iface=vf0"), usize::MAX);
    }
}
