//! The control plane's decisions: which ports there are, what clients may ask for, and the JSON-RPC
//! socket on which they ask.
//!
//! Control is one thread without a mutex. It decides and never waits: everything slow is asked of a
//! [`Crew`], whose answers come back as [`Event`]s. Reading order: [`api`] (what clients say),
//! [`PortSpec`] (a request, checked and resolved), [`Crew`], `port` (one port's life), [`Ports`] (the
//! decisions over all of them), [`Server`] (bytes in, bytes out).

pub mod api;
mod client;
mod control_socket;
mod crew;
mod daemon_info;
mod failure;
mod inbox;
mod json;
mod placement;
mod policy;
mod port;
mod port_id;
mod port_spec;
mod ports;
pub mod rpc;
mod server;
mod stats;
#[cfg(test)]
mod tests;
mod threads;
mod unix_names;

pub use client::{Client, ClientError};
pub use control_socket::ControlSocket;
pub use crew::{Crew, Event, PortChange};
pub use daemon_info::DaemonInfo;
pub use failure::Failure;
pub use inbox::{EventSender, Inbox, PortSender};
pub use placement::{Cores, Placement};
pub use policy::{PciRule, Policy, SocketDir, StandIn, VdevRule};
pub use port_id::PortId;
pub use port_spec::{PortSpec, SocketDefaults};
pub use ports::{Ports, Token};
pub use server::{MAX_LINE, Server};
pub use threads::Threads;
pub use unix_names::{group_id, user_id};
