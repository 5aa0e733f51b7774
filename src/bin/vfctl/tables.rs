//! Results as text.

use std::fmt::Write;

use comfy_table::{CellAlignment, Table, presets::NOTHING};
use virtio_forwarder::control::PortId;
use virtio_forwarder::control::api::{Attached, Copies, Detached, Info, LaneCpus, PortList, PortView, Synced};
use virtio_forwarder::session::port::Role;
use virtio_forwarder::vf::Dma;

/// A table without lines, which tools can read too; the columns at `numbers` are aligned right.
pub fn table<const N: usize>(
    header: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
    numbers: &[usize],
) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(header);
    for row in rows {
        table.add_row(row);
    }
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if numbers.contains(&index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let text = table.to_string();
    text.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

/// `name: value` lines.
fn facts<const N: usize>(facts: [(&str, String); N]) -> String {
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    facts.iter().fold(String::new(), |mut text, (name, value)| {
        let _ = writeln!(text, "{name:<width$}  {value}");
        text
    })
}

fn names(ids: &[PortId]) -> String {
    ids.iter().map(PortId::as_str).collect::<Vec<_>>().join(", ")
}

fn or_dash(text: String) -> String {
    if text.is_empty() { "-".to_owned() } else { text }
}

pub fn attached(result: Attached) -> String {
    let Attached { changed, pending, taken_from, port } = result;
    let verb = if changed { "attached" } else { "unchanged" };
    let mut text = format!("{}: {verb}, {}\n", port.id, port.state);
    if let Some(reason) = &port.reason {
        let _ = writeln!(text, "  waits: {reason}");
    }
    if let Some(stand_in) = &port.stand_in {
        let _ = writeln!(text, "  {stand_in} stands in for its VF, which does not exist");
    }
    if !pending.is_empty() {
        let _ = writeln!(text, "  with the next guest connection: {}", pending.join(", "));
    }
    if !taken_from.is_empty() {
        let _ = writeln!(text, "  taken from: {}", names(&taken_from));
    }
    text
}

pub fn detached(result: Detached) -> String {
    match result.id {
        Some(id) => format!("{id}: detached\n"),
        None => "unchanged: there was no such port\n".to_owned(),
    }
}

pub fn synced(result: Synced) -> String {
    let verb = if result.removed { "detached" } else { "surplus" };
    format!("{verb}: {}\nmissing: {}\n", or_dash(names(&result.surplus)), or_dash(names(&result.missing)))
}

fn vf(port: &PortView) -> String {
    let all: Vec<_> = port.vfs.iter().map(ToString::to_string).collect();
    match &port.stand_in {
        Some(stand_in) => format!("{} (stand-in: {stand_in})", all.join(" ")),
        None => all.join(" "),
    }
}

fn role(port: &PortView) -> &'static str {
    match port.socket.role {
        Role::Server => "server",
        Role::Client => "client",
    }
}

/// The CPU of each lane, by direction.
fn cores(lanes: &LaneCpus) -> [String; 2] {
    [&lanes.guest_to_vf, &lanes.vf_to_guest].map(|cpus| cpus.iter().map(usize::to_string).collect::<Vec<_>>().join("+"))
}

pub fn list(result: PortList) -> String {
    let header = ["PORT", "STATE", "VF", "SOCKET", "ROLE", "QUEUES", "MTU", "CORES"];
    let row = |port: &PortView| {
        [
            port.id.to_string(),
            port.state.to_string(),
            vf(port),
            port.socket.path.clone(),
            role(port).to_owned(),
            port.queue_pairs.to_string(),
            port.mtu.to_string(),
            cores(&port.lanes).join(","),
        ]
    };
    let mut text = table(header, result.ports.iter().map(row), &[5, 6]);
    for port in &result.ports {
        if let Some(reason) = &port.reason {
            let _ = writeln!(text, "{}: {reason}", port.id);
        }
    }
    text
}

pub fn port(port: PortView) -> String {
    let socket = &port.socket;
    let mut owner = String::new();
    for (name, value) in [("owner", &socket.owner), ("group", &socket.group)] {
        if let Some(value) = value {
            let _ = write!(owner, ", {name} {value}");
        }
    }
    if let Some(mode) = socket.mode {
        let _ = write!(owner, ", mode {mode}");
    }
    let in_place = port.vf.as_ref().map(|vf| {
        let link = if vf.link_up { "up" } else { "down" };
        let mac = vf.mac.map(|mac| mac.to_string()).unwrap_or_default();
        let driver = &vf.driver;
        format!(
            "{} ({driver}), link {link}, {} of {} queue pairs, MAC {}",
            vf.spec,
            vf.queues,
            vf.max_queues,
            or_dash(mac)
        )
    });
    let domain = port.vf.as_ref().map(|vf| match (vf.dma, &vf.dma_shared) {
        (Dma::None, _) => "none".to_owned(),
        (Dma::Own, _) => "own".to_owned(),
        (Dma::Shared, why) => format!("shared ({})", why.as_deref().unwrap_or_default()),
    });
    let guest = &port.guest;
    let connected = if guest.guest { "connected" } else { "not connected" };
    let mut text = facts([
        ("port", port.id.to_string()),
        ("state", port.state.to_string()),
        ("waits for", or_dash(port.reason.clone().unwrap_or_default())),
        ("socket", format!("{} ({}{owner})", socket.path, role(&port))),
        ("VF asked for", vf(&port)),
        ("VF in place", or_dash(in_place.unwrap_or_default())),
        ("DMA domain", or_dash(domain.unwrap_or_default())),
        ("queue pairs", port.queue_pairs.to_string()),
        ("MTU", port.mtu.to_string()),
        ("MAC asked for", or_dash(port.mac.map(|mac| mac.to_string()).unwrap_or_default())),
        ("lanes", {
            let [guest_to_vf, vf_to_guest] = cores(&port.lanes);
            format!("on CPU {guest_to_vf} (guest to VF), {vf_to_guest} (VF to guest)")
        }),
        ("offloads", {
            let offered: Vec<_> = port.offered.iter().map(|offload| offload.name()).collect();
            format!("{} (offered: {})", port.offloads, or_dash(offered.join(",")))
        }),
        ("zero-copy", {
            let way = |copies: &Option<String>| copies.as_ref().map_or("yes".to_owned(), |why| format!("no, {why}"));
            let Copies { guest_to_vf, vf_to_guest } = &port.copies;
            format!("{} (guest to VF: {}; VF to guest: {})", port.zero_copy, way(guest_to_vf), way(vf_to_guest))
        }),
        ("pending", or_dash(port.pending.join(", "))),
        ("guest", format!("{connected}, {} connections, {} MiB mapped", guest.connections, guest.guest_memory >> 20)),
        ("features", or_dash(guest.features.map(|bits| format!("{bits:#x}")).unwrap_or_default())),
        ("last error", or_dash(guest.last_error.clone().unwrap_or_default())),
    ]);
    if !guest.rings.is_empty() {
        let rows = guest.rings.iter().enumerate().map(|(index, ring)| {
            let yes = |on: bool| if on { "yes" } else { "no" }.to_owned();
            [
                index.to_string(),
                ring.size.to_string(),
                yes(ring.started),
                yes(ring.enabled),
                yes(ring.running),
                or_dash(ring.cpu.map(|cpu| cpu.to_string()).unwrap_or_default()),
                or_dash(ring.fault.clone().unwrap_or_default()),
            ]
        });
        text.push('\n');
        text += &table(["RING", "SIZE", "STARTED", "ENABLED", "RUNNING", "CPU", "FAULT"], rows, &[0, 1, 5]);
    }
    text
}

pub fn info(info: Info) -> String {
    let cores: Vec<_> = info.cores.iter().map(|core| format!("{} ({} lanes)", core.cpu, core.lanes)).collect();
    let idle = if info.poll { "never sleep" } else { "sleep when idle" };
    let ethdevs = info.limits.ethdevs.map(|most| most.to_string()).unwrap_or_default();
    let allowed = info.allowed;
    facts([
        ("version", info.version),
        ("DPDK", or_dash(info.dpdk_version.unwrap_or_default())),
        ("process", format!("{}, up {} s", info.pid, info.uptime_seconds)),
        ("ports", info.ports.to_string()),
        ("poll cores", format!("{}; they {idle}", cores.join(", "))),
        ("most ethdevs", or_dash(ethdevs)),
        ("vdevs", or_dash(allowed.vdevs.join("  "))),
        ("PCI devices", or_dash(allowed.pci.join("  "))),
        ("socket directories", or_dash(allowed.socket_dirs.join("  "))),
        ("stand-ins", or_dash(allowed.stand_ins.join("  "))),
    ])
}
