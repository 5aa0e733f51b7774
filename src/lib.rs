//! # virtio-forwarder
//!
//! One daemon per compute node. For each **port** it serves one vhost-user socket to a VM and owns an SR-IOV
//! **VF**; it moves packets between the guest's virtio rings and the VF, 1:1, in user space, on pinned cores.
//! A guest keeps its plain virtio-net driver and gets the NIC's hardware datapath.
//!
//! ```text
//!     VM (QEMU)                    virtio-forwarder                          NIC
//!  ┌─────────────┐   shared   ┌───────────────────────────┐   DMA    ┌──────────────┐
//!  │ virtio-net  │   memory   │ ring/     relay/     vf/  │          │      VF      │
//!  │   TX ring ──┼───────────▶│ TxRing ─▶ GuestToVf ─▶ TxQueue ─────▶│              │
//!  │   RX ring ◀─┼────────────│ RxRing ◀─ VfToGuest ◀─ RxQueue ◀─────│              │
//!  └──────┬──────┘            └─────────────▲─────────────┘          └──────────────┘
//!         │ vhost-user socket               │ lanes, by value
//!         └──────────────▶ session/ (a thread a port) ◀── control/ (one thread) ◀── vfctl, os-vif
//! ```
//!
//! ## Two planes
//!
//! The **control plane** may block, allocate, log and return [`Error`]s. The **data plane** is a few poll cores
//! that do none of that: a guest's lies are counted there ([`ring::ChainFault`], [`ring::RingFault`]), not reported.
//!
//! | thread | owns | code |
//! |---|---|---|
//! | main | signals, the watchdog, the order of exit | `main.rs` |
//! | control | which ports there are and what may be asked; it decides and never waits | [`control`] |
//! | device | probe and removal of VFs, which the EAL serialises anyway | [`control`] |
//! | port (one each) | the vhost-user conversation, the VF's start and stop, the lanes while they are home | [`session`] |
//! | poll core | the lanes it was given | [`relay`] |
//!
//! ## Lanes
//!
//! A [`relay::Lane`] is the unit of work and of scheduling: one direction of one port, with the rings and VF
//! queues of that direction, or its share of them where a port has several queue pairs and cores. Each ring and each
//! queue has exactly one owner at any time. A lane moves by value,
//! as a `Box`, through the core's [`relay::Mailbox`]: *holding the box is the right to touch what is in it*. So
//! the core needs no lock, and the port's thread knows that nobody looks when it has its lanes home:
//!
//! - *paused*: the lanes are home, what is in flight stays. Enough for a new call eventfd, another core, a grown memory table.
//! - *drained*: nothing of the guest's memory is in flight either. Unmapping takes a [`guest::Drained`] as its argument.
//!
//! ## Vocabulary
//!
//! **Ring**: a virtqueue, device side. **Queue**: a VF's. **Pair**: the RX and TX ring (or queue) of the same number.
//! **Chain**: the descriptors of one buffer. **Burst**: up to [`ring::BURST`] packets. **Turn**: what a lane does
//! each time its core comes by. Directions are `guest_to_vf` and `vf_to_guest`; "rx" and "tx" are for rings and queues only.
//!
//! ## Where to read on
//!
//! 1. [`relay::lane`]: the way of a packet, both directions, on one screen.
//! 2. [`ring`]: what `pop`, `complete` and `push` do; `ring/split.rs` and `ring/packed.rs` have the two protocols
//!    with the guest.
//! 3. [`guest`]: why an address from a guest cannot lead anywhere else.
//! 4. [`session`]: how QEMU's messages become rings in lanes.
//! 5. [`control`]: how `vfctl attach` becomes a port.
//!
//! Imports go one way: `guest`, `ring`, `vf` ← `relay` ← `session` ← `control` ← `main`. `unsafe` is allowed in
//! `guest`, `ring` and `vf` only, where guest memory and C are.

#![deny(unsafe_code)]

pub mod config;
pub mod control;
pub mod error;
pub mod ethernet;
pub mod event;
#[allow(unsafe_code)]
pub mod guest;
pub mod relay;
#[allow(unsafe_code)]
pub mod ring;
pub mod session;
#[allow(unsafe_code)]
pub mod vf;

pub use error::{Error, Result};
