//! A DPDK Ethernet device as a VF: its life from probe to removal.

use std::ffi::{CStr, CString, c_int};
use std::ops::Range;
use std::sync::Arc;

use arrayvec::ArrayVec;
use dpdk_sys::{rte_eth_conf, rte_eth_dev_info};

use super::device_info::DeviceInfo;
use super::domain::Domain;
use super::lease::Leases;
pub use super::mbuf::{RxMbuf, TxMbuf};
use super::mempool::{Pool, no_memory};
use super::queue::Asking;
pub use super::queue::{EthdevRx, EthdevTx};
use super::reset_watch::ResetWatch;
use super::wake::Wake;
use super::{Dma, DmaMap, Mac, Queues, VfCaps, VfConfig, VfLink, VfSpec, eal, pci, quirks, zero_copy};
use crate::error::{Error, Result};
use crate::ethernet::{MAX_TSO_FRAME, MIN_MTU, TAGGED_HEADER};
use crate::ring::BURST;

/// Descriptors of each queue, where the driver has no other limits.
const DESCRIPTORS: u16 = 512;

/// As DPDK counts.
const TSO_FRAME: u32 = MAX_TSO_FRAME as u32;

/// Receive mbufs beyond the descriptors: those a lane holds, and those a driver refills ahead.
const RX_SPARE: u32 = 256;

/// Frames per receive queue that `stop` takes out of a device before it stops it.
const DRAIN: usize = 4096;

/// A probed ethdev.
#[derive(Debug)]
pub struct EthdevVf {
    spec: VfSpec,
    name: CString,
    port: u16,
    /// Number of the kernel's interface that it is on; 0: on none.
    interface: u32,
    caps: VfCaps,
    configured: Option<Configured>,
    started: bool,
    leases: Leases,
    /// Given up before the device is removed.
    resets: Option<Box<ResetWatch>>,
    /// Given up after the device is removed.
    domain: Option<Domain>,
}

#[derive(Debug)]
struct Configured {
    queues: u16,
    /// Held until the device is closed: until then it has mbufs of theirs.
    _pools: Vec<Arc<Pool>>,
    wakes: Vec<Arc<Wake>>,
}

impl EthdevVf {
    /// See [`super::Vf::probe`].
    ///
    /// A PCI VF has a DMA domain of its own, where that is possible; else it is in EAL's default one with the others.
    pub(super) fn probe(spec: &VfSpec) -> Result<Self> {
        eal::running()?;
        let bus = bus_of(spec);
        let (name, args) = match spec {
            VfSpec::Pci(address) => {
                pci::require_usable(*address)?;
                (address.to_string(), String::new())
            }
            VfSpec::Vdev { name, args } => {
                let args: Vec<_> = args.iter().map(|(k, v)| format!("{k}={v}")).collect();
                (name.clone(), args.join(","))
            }
            VfSpec::SoftNull | VfSpec::SoftLoop => {
                return Err(Error::Invalid(format!("{spec} is not a DPDK device")));
            }
        };
        quirks::require_interface(spec)?;
        let text = |text| CString::new(text).map_err(|e| Error::Invalid(format!("{spec} contains a NUL: {e}")));
        let (name, args) = (text(name)?, text(args)?);
        // Memory of VFs that left frames in a ring between vdevs may be free by now.
        Pool::reap();
        if port_of(&name).is_some() {
            return Err(Error::Conflict(format!("{spec} is attached already")));
        }
        // SAFETY: takes nothing.
        let present = unsafe { dpdk_sys::rte_eth_dev_count_total() };
        if u32::from(present) >= dpdk_sys::RTE_MAX_ETHPORTS {
            return Err(Error::Exhausted(format!(
                "no ethdev slot for {spec}: this libdpdk holds {} (RTE_MAX_ETHPORTS), all in use; \
                 detach a port, or use a libdpdk built with more",
                dpdk_sys::RTE_MAX_ETHPORTS
            )));
        }
        let (domain, shared) = match spec {
            VfSpec::Pci(address) => match Domain::of(*address)? {
                Ok(domain) => (Some(domain), None),
                Err(why) => {
                    tracing::info!(vf = %spec, why, "the VF is in the DMA domain of EAL, with others");
                    (None, Some(why))
                }
            },
            _ => (None, None),
        };
        // SAFETY: NUL-terminated strings; called on the device thread only.
        let rc = unsafe { dpdk_sys::rte_eal_hotplug_add(bus.as_ptr(), name.as_ptr(), args.as_ptr()) };
        let subject = || spec.to_string();
        check(
            "rte_eal_hotplug_add",
            subject,
            rc,
            "see the lines on stderr; check the arguments and permissions; vfio-pci is to be loaded before the daemon starts",
        )?;
        let vf = port_of(&name).ok_or_else(|| Error::Dpdk {
            call: "rte_eal_hotplug_add",
            subject: subject(),
            errno: libc::ENODEV,
            hint: "the driver made no Ethernet device; use a network device",
        });
        let made = vf.and_then(|port| {
            let info = DeviceInfo::of(port, spec)?;
            let mut caps = info.caps(spec);
            caps.dma = match (&domain, &shared) {
                (Some(_), _) => Dma::Own,
                (None, Some(_)) => Dma::Shared,
                (None, None) => Dma::None,
            };
            if let Some(why) = &shared {
                let shares = || format!("the VF shares its DMA domain with others: {why}").into();
                caps.copies.get_or_insert_with(shares);
                caps.copies_received.get_or_insert_with(shares);
            }
            caps.dma_shared = shared.map(Into::into);
            let mut resets = ResetWatch::over(port);
            if let (Some(domain), VfSpec::Pci(address)) = (&domain, spec)
                && quirks::has_deaf_mailbox(&caps.driver)
            {
                resets.look_into_mailbox(domain.group(), *address);
            }
            Ok(Self {
                caps,
                resets: Some(resets),
                interface: info.0.if_index,
                spec: spec.clone(),
                name: name.clone(),
                port,
                configured: None,
                started: false,
                leases: Leases::default(),
                domain: None,
            })
        });
        if made.is_err() {
            // SAFETY: undoes the probe.
            let rc = unsafe { dpdk_sys::rte_eal_hotplug_remove(bus.as_ptr(), name.as_ptr()) };
            if rc < 0 {
                tracing::error!(vf = %spec, rc, "a VF that is of no use cannot be removed either; {DEFECT}");
                keep(domain);
                return made;
            }
        }
        made.map(|vf| Self { domain, ..vf })
    }

    pub(super) fn caps(&self) -> &VfCaps {
        &self.caps
    }

    /// See [`super::Vf::configure`]. Once.
    pub(super) fn configure(&mut self, config: &VfConfig) -> Result<Queues> {
        if self.configured.is_some() {
            return Err(Error::Invalid(format!("{} is configured already", self.spec)));
        }
        if config.queues == 0 || config.mtu < MIN_MTU || config.mtu > self.caps.max_mtu {
            return Err(Error::Invalid(format!(
                "{} queue pairs with MTU {}: {} takes at least one pair and an MTU of {MIN_MTU} to {}",
                config.queues, config.mtu, self.spec, self.caps.max_mtu
            )));
        }
        let info = DeviceInfo::of(self.port, &self.spec)?;
        let queues = config.queues.min(self.caps.max_queues);
        let asked = self.caps.copies.is_none() && zero_copy::is_to_be_asked(&self.caps.driver);
        if asked && queues < config.queues {
            self.caps.copies = Some(
                format!(
                    "{} has one queue for several rings, and can be asked what it has sent only where each has its own",
                    self.caps.driver
                )
                .into(),
            );
        }
        let early = zero_copy::takes_early(&self.caps.driver);
        if early && queues < config.queues {
            self.caps.copies_received.get_or_insert_with(|| {
                format!("{} has fewer queues than the guest has rings, so that they share them", self.caps.driver)
                    .into()
            });
        }
        self.configure_device(&info, queues, config.mtu)?;
        self.set_device_mtu(&info, config.mtu)?;
        if let Some(mac) = config.mac {
            self.configure_mac(mac)?;
        }

        let mut rx_descriptors = if early { zero_copy::EARLY_DESCRIPTORS } else { DESCRIPTORS };
        let mut tx_descriptors = DESCRIPTORS;
        // SAFETY: two integers of ours.
        let rc =
            unsafe { dpdk_sys::rte_eth_dev_adjust_nb_rx_tx_desc(self.port, &mut rx_descriptors, &mut tx_descriptors) };
        self.check("rte_eth_dev_adjust_nb_rx_tx_desc", rc, DEFECT)?;

        // SAFETY: takes a port number.
        let node = unsafe { dpdk_sys::rte_eth_dev_socket_id(self.port) };
        let room = data_room(config.mtu).max(quirks::least_data_room(&self.spec));
        let most_written = (!early).then(|| quirks::most_written(&self.spec));
        let (tx_room, tx_max) = self.tx_sizes(&info, room);
        let per_queue = u32::from(tx_descriptors) + if info.segments() { 1536 } else { 512 };
        let send = Arc::new(Pool::send(u32::from(queues) * per_queue - 1, tx_room, node)?);
        let (mut tx, mut rx) = (Vec::new(), Vec::new());
        let mut pools = vec![Arc::clone(&send)];
        for queue in 0..queues {
            // SAFETY: the default configuration of the driver (null).
            let rc = unsafe {
                dpdk_sys::rte_eth_tx_queue_setup(
                    self.port,
                    queue,
                    tx_descriptors,
                    node.cast_unsigned(),
                    std::ptr::null(),
                )
            };
            self.check("rte_eth_tx_queue_setup", rc, QUEUE_SETUP)?;
            let shells = match self.caps.copies {
                None => Some(Arc::new(Pool::shells(per_queue, node)?)),
                Some(_) => None,
            };
            pools.extend(shells.clone());
            tx.push(EthdevTx {
                port: self.port,
                queue,
                pool: Arc::clone(&send),
                stash: ArrayVec::new(),
                shells,
                room: tx_room.into(),
                min: self.min_frame(),
                max: tx_max as usize,
                lent: 0,
                staged: 0,
                lenders: ArrayVec::new(),
                heads: self.caps.copies.is_none()
                    && self.caps.multi_segment
                    && zero_copy::takes_heads(&self.caps.driver),
                asking: (asked && self.caps.copies.is_none()).then(|| Asking::new(tx_descriptors)),
                _lease: self.leases.lease(),
            });

            let pool = Arc::new(Pool::receive(u32::from(rx_descriptors) + RX_SPARE, room, node)?);
            // Into what holds it until the device is closed, before the driver takes mbufs of it.
            pools.push(Arc::clone(&pool));
            // SAFETY: the pool outlives the queue: it is dropped after the device is closed.
            let rc = unsafe {
                dpdk_sys::rte_eth_rx_queue_setup(
                    self.port,
                    queue,
                    rx_descriptors,
                    node.cast_unsigned(),
                    std::ptr::null(),
                    pool.raw(),
                )
            };
            if rc < 0 {
                // What the driver took stays with it until it is closed.
                self.keep(queues, pools);
                return Err(self.check("rte_eth_rx_queue_setup", rc, QUEUE_SETUP).unwrap_err());
            }
            rx.push(EthdevRx {
                port: self.port,
                queue,
                pool,
                wake: Wake::none(),
                places: self.caps.copies_received.is_none().then(|| most_written.unwrap_or(room.into())),
                early,
                placed: 0,
                lenders: ArrayVec::new(),
                _lease: self.leases.lease(),
            });
        }
        self.keep(queues, pools);
        if let Some(configured) = &mut self.configured {
            configured.wakes = rx.iter().map(|rx| Arc::clone(&rx.wake)).collect();
        }
        if self.domain.as_ref().is_some_and(|domain| !domain.is_whole()) {
            return Err(Error::Exhausted(format!(
                "the daemon's memory has grown, and cannot be mapped for {}; raise RLIMIT_MEMLOCK, or reserve more \
                 hugepages",
                self.spec
            )));
        }
        Ok(Queues::Ethdev(tx, rx))
    }

    fn keep(&mut self, queues: u16, pools: Vec<Arc<Pool>>) {
        self.configured = Some(Configured { queues, _pools: pools, wakes: Vec::new() });
    }

    /// `rte_eth_dev_configure`, with receive interrupts where the driver takes them.
    fn configure_device(&self, info: &DeviceInfo, queues: u16, mtu: u16) -> Result<()> {
        let mut conf = rte_eth_conf::default();
        conf.rxmode.mtu = u32::from(mtu.min(info.max_mtu()));
        conf.rxmode.offloads = info.rx_offloads();
        conf.txmode.offloads = info.tx_offloads();
        let hashed =
            info.0.flow_type_rss_offloads & (dpdk_sys::SHIM_RSS_IP | dpdk_sys::SHIM_RSS_TCP | dpdk_sys::SHIM_RSS_UDP);
        if queues > 1 && hashed != 0 {
            conf.rxmode.mq_mode = dpdk_sys::SHIM_MQ_RX_RSS;
            conf.rx_adv_conf.rss_conf.rss_hf = hashed;
        }
        let mut configure = |interrupts| {
            // SAFETY: `conf` is ours, zero where not set.
            unsafe {
                dpdk_sys::shim_conf_rx_interrupts(&mut conf, interrupts);
                dpdk_sys::rte_eth_dev_configure(self.port, queues, queues, &conf)
            }
        };
        let rc = match configure(1) {
            0 => 0,
            _ => configure(0),
        };
        self.check("rte_eth_dev_configure", rc, "raise --log-level to see why")
    }

    /// Sets the device's own MTU. Drivers that know no MTU (net_ring) take any frame.
    fn set_device_mtu(&self, info: &DeviceInfo, mtu: u16) -> Result<()> {
        if mtu > info.max_mtu() {
            return quirks::set_mtu_beyond_claim(&self.spec, mtu);
        }
        // SAFETY: takes numbers.
        match unsafe { dpdk_sys::rte_eth_dev_set_mtu(self.port, mtu) } {
            rc if rc == -libc::ENOTSUP => Ok(()),
            rc => self.check("rte_eth_dev_set_mtu", rc, "raise the PF's MTU first, or ask for a smaller one"),
        }
    }

    /// A vdev that has no address filter needs no address: it keeps its own, which `link` shows. A VF
    /// that keeps another address would deliver nothing, so there a refusal is an error.
    fn configure_mac(&self, mac: Mac) -> Result<()> {
        match self.set_mac(mac) {
            Err(Error::Dpdk { errno, .. }) if self.is_vdev() => {
                tracing::warn!(vf = %self.spec, %mac, errno, "the device keeps its own MAC");
                Ok(())
            }
            other => other,
        }
    }

    fn is_vdev(&self) -> bool {
        matches!(self.spec, VfSpec::Vdev { .. })
    }

    /// Intel VFs take a frame under 17 bytes for malicious, and their PF disables them.
    fn min_frame(&self) -> usize {
        if self.is_vdev() { 0 } else { 17 }
    }

    /// Bytes per mbuf and per frame to send: with segmentation, 64 KiB in no more mbufs than the device takes.
    fn tx_sizes(&self, info: &DeviceInfo, room: u16) -> (u16, u32) {
        if !self.caps.multi_segment {
            return (room, room.into());
        }
        let most = match info.0.tx_desc_lim.nb_seg_max {
            0 => u32::from(u16::MAX),
            most => u32::from(most),
        };
        let wanted = if info.segments() { TSO_FRAME.div_ceil(most) } else { 0 };
        // A data room is 16 bits, headroom included.
        let room = wanted.max(room.into()).next_multiple_of(64).min(65024);
        (room as u16, TSO_FRAME.min(room.saturating_mul(most)))
    }

    pub(super) fn start(&mut self) -> Result<()> {
        if self.configured.is_none() {
            return Err(Error::Invalid(format!("{} is not configured", self.spec)));
        }
        if self.started {
            return Ok(());
        }
        if let Some(resets) = &self.resets {
            resets.starts();
        }
        // SAFETY: takes a port number.
        let rc = unsafe { dpdk_sys::rte_eth_dev_start(self.port) };
        self.check("rte_eth_dev_start", rc, "raise --log-level to see why")?;
        self.started = true;
        // VFs are commonly not trusted with these; they then get what is addressed to them.
        // SAFETY: each takes a port number.
        unsafe {
            dpdk_sys::rte_eth_promiscuous_enable(self.port);
            dpdk_sys::rte_eth_allmulticast_enable(self.port);
            dpdk_sys::rte_eth_dev_set_link_up(self.port);
        }
        if let Some(resets) = &self.resets {
            resets.started();
        }
        self.caps.rx_interrupt = !quirks::has_no_interrupts(&self.caps.driver)
            && self.wakes().iter().zip(0..).fold(true, |all, (wake, queue)| wake.find(self.port, queue) && all);
        Ok(())
    }

    fn wakes(&self) -> &[Arc<Wake>] {
        self.configured.as_ref().map_or(&[], |c| &c.wakes)
    }

    /// See [`super::Vf::stop`]. What waits in the receive queues is taken out and dropped first: net_ring would
    /// keep it in its rings, and free the rings with it.
    ///
    /// net_tap and net_virtio keep the buffers they posted until they are removed; the others give all back.
    pub(super) fn stop(&mut self) -> Result<()> {
        self.leases.require_none(&self.spec)?;
        if !self.started {
            return Ok(());
        }
        for queue in 0..self.configured.as_ref().map_or(0, |c| c.queues) {
            self.drain(queue);
        }
        self.halt()
    }

    /// See [`super::Vf::restart`].
    pub(super) fn restart(&mut self) -> Result<()> {
        if !self.started {
            return Ok(());
        }
        self.halt()?;
        self.start()
    }

    /// See [`super::Vf::was_reset`].
    pub(super) fn was_reset(&self) -> bool {
        self.started && self.resets.as_ref().is_some_and(|resets| resets.was_reset())
    }

    fn is_lost(&self) -> bool {
        self.started && self.resets.as_ref().is_some_and(|resets| resets.is_lost())
    }

    /// See [`super::Vf::revives`].
    pub(super) fn revives(&self) -> bool {
        quirks::revives(&self.caps.driver)
    }

    fn halt(&mut self) -> Result<()> {
        // SAFETY: takes a port number.
        let rc = unsafe { dpdk_sys::rte_eth_dev_stop(self.port) };
        self.check("rte_eth_dev_stop", rc, "detach the VF")?;
        self.started = false;
        for wake in self.wakes() {
            wake.lose();
        }
        Ok(())
    }

    /// See [`super::Vf::map`].
    pub(super) fn map(&self, pages: Range<usize>) -> Result<DmaMap> {
        let what = || format!("cannot map {} MiB of guest memory for {}", pages.len() >> 20, self.spec);
        match &self.domain {
            Some(domain) => domain.map(pages.clone(), self.caps.copies_received.is_none()).map_err(Error::io(what())),
            None => Err(Error::Invalid(format!("{}: it has no DMA domain of its own", what()))),
        }
    }

    fn drain(&self, queue: u16) {
        let mut mbufs = [std::ptr::null_mut(); BURST];
        for _ in 0..DRAIN / BURST {
            // SAFETY: the queues are home (see `stop`); room for BURST; what comes is ours.
            unsafe {
                let n = dpdk_sys::shim_rx_burst(self.port, queue, mbufs.as_mut_ptr(), BURST as u16);
                dpdk_sys::rte_pktmbuf_free_bulk(mbufs.as_mut_ptr(), n.into());
                if n == 0 {
                    break;
                }
            }
        }
    }

    pub(super) fn set_mac(&self, mac: Mac) -> Result<()> {
        if self.link().mac == Some(mac) {
            return Ok(());
        }
        let mut address = dpdk_sys::rte_ether_addr { addr_bytes: mac.0 };
        // SAFETY: DPDK copies the address.
        let rc = unsafe { dpdk_sys::rte_eth_dev_default_mac_addr_set(self.port, &mut address) };
        self.check(
            "rte_eth_dev_default_mac_addr_set",
            rc,
            "set the address from the PF: ip link set PF vf N mac ADDRESS",
        )
    }

    pub(super) fn point_reta(&mut self, queues: &[u16]) -> bool {
        let Ok(info) = DeviceInfo::of(self.port, &self.spec) else {
            return false;
        };
        let size = usize::from(info.0.reta_size);
        let spreads = self.configured.as_ref().is_some_and(|configured| configured.queues > 1);
        if size == 0 || queues.is_empty() || !spreads {
            return false;
        }
        let group = dpdk_sys::SHIM_RETA_GROUP as usize;
        let mut table = vec![dpdk_sys::rte_eth_rss_reta_entry64::default(); size.div_ceil(group)];
        for (entry, queue) in (0..size).zip(queues.iter().cycle()) {
            table[entry / group].mask |= 1 << (entry % group);
            table[entry / group].reta[entry % group] = *queue;
        }
        // SAFETY: the table covers `reta_size` entries.
        unsafe { dpdk_sys::rte_eth_dev_rss_reta_update(self.port, table.as_mut_ptr(), info.0.reta_size) == 0 }
    }

    pub(super) fn link(&self) -> VfLink {
        let mut link = dpdk_sys::rte_eth_link::default();
        let mut address = dpdk_sys::rte_ether_addr::default();
        // SAFETY: structs of ours.
        unsafe {
            let known = dpdk_sys::rte_eth_link_get_nowait(self.port, &mut link) == 0;
            let addressed = dpdk_sys::rte_eth_macaddr_get(self.port, &mut address) == 0;
            VfLink {
                up: known && dpdk_sys::shim_link_is_up(&link) != 0 && !self.is_lost(),
                // "Unknown" is all ones.
                speed: if link.link_speed == u32::MAX { 0 } else { link.link_speed },
                // Drivers that know no addresses (net_ring) say it is all zeros.
                mac: (addressed && address.addr_bytes != [0; 6]).then_some(Mac(address.addr_bytes)),
            }
        }
    }

    /// See [`super::Vf::require_present`].
    pub(super) fn require_present(&self) -> Result<()> {
        match &self.spec {
            _ if self.configured.is_some() && !self.started => {
                Err(Error::VfAbsent(format!("{} was stopped, and did not start again; it is set up anew", self.spec)))
            }
            VfSpec::Pci(_) if self.link().up => Ok(()),
            VfSpec::Pci(address) => pci::require_usable(*address),
            // Some of them are always up (net_af_packet).
            _ if self.interface != 0 && !interface_exists(self.interface) => Err(Error::VfAbsent(format!(
                "the interface of {} was deleted while it was in use; it is looked for again each second",
                self.spec
            ))),
            _ => Ok(()),
        }
    }

    pub(super) fn xstats(&self) -> Vec<(String, u64)> {
        // SAFETY: asks for the number.
        let n = unsafe { dpdk_sys::rte_eth_xstats_get(self.port, std::ptr::null_mut(), 0) };
        let n = usize::try_from(n).unwrap_or(0);
        let mut names = vec![dpdk_sys::rte_eth_xstat_name { name: [0; 64] }; n];
        let mut values = vec![dpdk_sys::rte_eth_xstat::default(); n];
        // SAFETY: room for n of each; only entries that were written are read.
        let written = unsafe {
            let named = dpdk_sys::rte_eth_xstats_get_names(self.port, names.as_mut_ptr(), n as u32);
            let got = dpdk_sys::rte_eth_xstats_get(self.port, values.as_mut_ptr(), n as u32);
            named.min(got)
        };
        let written = usize::try_from(written).unwrap_or(0).min(n);
        values[..written]
            .iter()
            .filter_map(|stat| Some((names.get(usize::try_from(stat.id).ok()?)?, stat.value)))
            // SAFETY: DPDK terminates the names.
            .map(|(name, value)| (unsafe { text(name.name.as_ptr()) }, value))
            .collect()
    }

    /// See [`super::Vf::remove`].
    pub(super) fn remove(mut self) -> Result<()> {
        if let Err(error) = self.leases.require_none(&self.spec) {
            // The device goes on, with its pools.
            std::mem::forget(self);
            return Err(error);
        }
        let stopped = self.stop();
        self.resets = None;
        // SAFETY: nobody uses the port: its queues were dropped.
        let closed = unsafe { dpdk_sys::rte_eth_dev_close(self.port) };
        if let Some(domain) = &mut self.domain {
            // The device uses no memory any more, and the next moment there is no IOMMU to map what comes.
            domain.end();
        }
        // SAFETY: as above; called on the device thread only.
        let removed = unsafe { dpdk_sys::rte_eal_hotplug_remove(bus_of(&self.spec).as_ptr(), self.name.as_ptr()) };
        quirks::after_close(&self.spec);
        match removed {
            // Before memory goes, which it would follow: the IOMMU went with the device.
            0.. => self.domain = None,
            _ => keep(self.domain.take()),
        }
        // Only now: closing gave back the mbufs that the device held.
        self.configured = None;
        Pool::reap();
        stopped?;
        self.check("rte_eth_dev_close", closed, DEFECT)?;
        self.check("rte_eal_hotplug_remove", removed, DEFECT)
    }

    fn check(&self, call: &'static str, rc: c_int, hint: &'static str) -> Result<()> {
        check(call, || self.spec.to_string(), rc, hint)
    }
}

/// Of a device that could not be removed, which may still be open there.
fn keep(domain: Option<Domain>) {
    std::mem::forget(domain);
}

fn bus_of(spec: &VfSpec) -> &'static CStr {
    if matches!(spec, VfSpec::Pci(_)) { c"pci" } else { c"vdev" }
}

/// Whether the kernel has an interface of this number.
fn interface_exists(index: u32) -> bool {
    let mut name = [0; libc::IF_NAMESIZE];
    // SAFETY: room for a name.
    unsafe { !libc::if_indextoname(index, name.as_mut_ptr()).is_null() }
}

/// Some drivers (net_tap) do not say that it was memory.
const QUEUE_SETUP: &str =
    "see the lines on stderr; give DPDK more memory (hugepages, --memory), or ask for fewer queues or a smaller MTU";
pub(super) const DEFECT: &str = "restart the daemon, and report this";

pub(super) fn check(call: &'static str, subject: impl FnOnce() -> String, rc: c_int, hint: &'static str) -> Result<()> {
    if rc >= 0 {
        return Ok(());
    }
    match -rc {
        libc::ENOMEM => Err(no_memory(&format!("{} ({call})", subject()))),
        errno => Err(Error::Dpdk { call, subject: subject(), errno, hint }),
    }
}

/// The ethdev of a device. Its own name may differ from the device's, so the device is compared.
fn port_of(name: &CStr) -> Option<u16> {
    (0..dpdk_sys::RTE_MAX_ETHPORTS as u16).find(|&port| {
        let mut info = rte_eth_dev_info::default();
        // SAFETY: DPDK checks the port; a device has a name.
        unsafe {
            dpdk_sys::rte_eth_dev_is_valid_port(port) != 0
                && dpdk_sys::rte_eth_dev_info_get(port, &mut info) == 0
                && !info.device.is_null()
                && CStr::from_ptr(dpdk_sys::rte_dev_name(info.device)) == name
        }
    })
}

/// Bytes of an mbuf behind its headroom, such that a received frame is one segment: igb and ixgbe round the size down
/// to a KiB, the others to less, and igb wants to see room for the frame's CRC and another tag.
fn data_room(mtu: u16) -> u16 {
    let frame = u32::from(mtu) + TAGGED_HEADER as u32 + 8;
    frame.max(2048).next_multiple_of(1024) as u16
}

/// # Safety
/// A NUL-terminated string, or null.
pub(super) unsafe fn text(raw: *const std::ffi::c_char) -> String {
    if raw.is_null() {
        return String::new();
    }
    // SAFETY: as promised.
    unsafe { CStr::from_ptr(raw) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ethernet::MAX_MTU;

    #[test]
    fn a_received_frame_fits_one_mbuf_also_where_the_driver_rounds_down() {
        for mtu in MIN_MTU..=MAX_MTU {
            let room = u32::from(data_room(mtu));
            assert!(room / 1024 * 1024 >= u32::from(mtu) + TAGGED_HEADER as u32 + 8);
        }
        assert_eq!(data_room(1500), 2048);
        assert_eq!(data_room(9000), 9216);
    }
}
