//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use virtio_forwarder::config::DEFAULT_CONTROL_SOCKET;
use virtio_forwarder::control::PortId;
use virtio_forwarder::control::api::{Attach, FileMode, NameOrNumber, Selector, Socket};
use virtio_forwarder::session::features::Offloads;
use virtio_forwarder::session::port;
use virtio_forwarder::vf::{Mac, VfSpec};

/// Attaches, detaches and shows the ports of a virtio-forwarder.
#[derive(Debug, Parser)]
#[command(
    name = "vfctl",
    version,
    after_help = "Exit codes: 0 done (also when there was nothing to do), 1 failed, 2 wrong command line,\n\
                  3 no daemon answers, 4 no such port, 5 conflict with what is, 6 invalid or not allowed."
)]
pub struct Args {
    /// The daemon's control socket
    #[arg(long, global = true, value_name = "PATH", env = "VFCTL_SOCKET", default_value = DEFAULT_CONTROL_SOCKET)]
    pub control_socket: PathBuf,
    /// Print results as JSON, one object per line; errors too, on stderr
    #[arg(long, global = true)]
    pub json: bool,
    /// Seconds to wait for an answer
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    pub timeout: u64,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Attach a port, or make it as asked for if it is there
    Attach(AttachArgs),
    /// Detach a port; nothing to do if it is not there
    Detach(Which),
    /// All ports
    List,
    /// Everything about a port
    Show {
        /// Name of the port
        id: PortId,
    },
    /// Compare the ports with those that should be
    Sync {
        /// Ports that should be
        #[arg(required_unless_present = "none")]
        ids: Vec<PortId>,
        /// None should be
        #[arg(long, conflicts_with = "ids")]
        none: bool,
        /// Detach the others
        #[arg(long)]
        remove: bool,
    },
    /// Counters
    Stats {
        /// Only this port
        id: Option<PortId>,
        /// Rates, every second, until interrupted
        #[arg(long, short)]
        watch: bool,
    },
    /// About the daemon
    Info,
}

#[derive(Debug, clap::Args)]
pub struct AttachArgs {
    /// Name of the port, up to 64 characters, e.g. a Neutron port UUID
    id: PortId,
    /// Path of the vhost-user socket
    #[arg(long, value_name = "PATH")]
    socket: String,
    /// Who listens on it: the daemon (server) or the VMM (client)
    #[arg(long, default_value = "server")]
    role: Role,
    /// 0000:05:08.1, vdev:net_tap0,iface=vf0, soft:null or soft:loop; the first is used
    #[arg(long, required = true)]
    vf: Vec<VfSpec>,
    /// Queue pairs [default: 1]
    #[arg(long, value_name = "N")]
    queues: Option<u16>,
    /// MTU, 68 to 9216 [default: 1500]
    #[arg(long, value_name = "N")]
    mtu: Option<u16>,
    /// MAC for the VF [default: its own]
    #[arg(long)]
    mac: Option<Mac>,
    /// CPUs: one for everything; or of the lanes guest to VF, then of as many VF to guest [default: the least loaded]
    #[arg(long, value_name = "A[,B...]", value_delimiter = ',', num_args = 1)]
    cores: Vec<usize>,
    /// auto, none, or a list of checksum, guest_checksum, tso4, tso6 [default: auto]
    #[arg(long, value_name = "LIST")]
    offloads: Option<Offloads>,
    /// Move frames without copying them: auto, on or off [default: auto]
    #[arg(long, value_name = "WHEN")]
    zero_copy: Option<When>,
    /// Owner of a listening socket
    #[arg(long, value_name = "USER")]
    owner: Option<String>,
    /// Group of a listening socket
    #[arg(long, value_name = "GROUP")]
    group: Option<String>,
    /// Permission bits of a listening socket, in octal
    #[arg(long, value_name = "MODE")]
    socket_mode: Option<FileMode>,
    /// Take VF and socket from other ports that have no guest
    #[arg(long)]
    takeover: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Role {
    Server,
    Client,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum When {
    Auto,
    On,
    Off,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub struct Which {
    /// Name of the port
    id: Option<PortId>,
    /// The port with this socket
    #[arg(long, value_name = "PATH")]
    socket: Option<String>,
    /// The port that holds this VF, e.g. 0000:05:08.1
    #[arg(long)]
    vf: Option<VfSpec>,
}

impl AttachArgs {
    pub fn request(&self) -> Attach {
        let name = |name: &Option<String>| name.clone().map(NameOrNumber::Name);
        Attach {
            id: self.id.clone(),
            socket: Socket {
                path: self.socket.clone(),
                role: match self.role {
                    Role::Server => port::Role::Server,
                    Role::Client => port::Role::Client,
                },
                owner: name(&self.owner),
                group: name(&self.group),
                mode: self.socket_mode,
            },
            vfs: self.vf.clone(),
            queue_pairs: self.queues,
            mtu: self.mtu,
            mac: self.mac,
            cores: self.cores.clone(),
            offloads: self.offloads.clone(),
            zero_copy: self.zero_copy.map(|when| match when {
                When::Auto => port::ZeroCopy::Auto,
                When::On => port::ZeroCopy::On,
                When::Off => port::ZeroCopy::Off,
            }),
            takeover: self.takeover,
        }
    }
}

impl Which {
    pub fn selector(&self) -> Selector {
        match (&self.id, &self.socket, &self.vf) {
            (Some(id), _, _) => Selector::Id(id.clone()),
            (_, Some(socket), _) => Selector::Socket(socket.clone()),
            (_, _, Some(vf)) => Selector::Vf(vf.clone()),
            _ => unreachable!("clap requires one"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }
}
