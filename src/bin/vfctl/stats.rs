//! Counters and rates.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use signal_hook::consts::{SIGINT, SIGTERM};
use virtio_forwarder::control::ClientError;
use virtio_forwarder::control::api::{LaneStats, PortStats, Stats, StatsQuery};
use virtio_forwarder::relay::{Dropped, LaneSnapshot};

use crate::tables::table;
use crate::{End, Session, on_terminal, print};

/// The lanes of a port, with the names of their directions.
fn lanes(port: &PortStats) -> impl Iterator<Item = (&'static str, &LaneStats)> {
    let guest_to_vf = port.lanes.guest_to_vf.iter().map(|lane| ("guest_to_vf", lane));
    guest_to_vf.chain(port.lanes.vf_to_guest.iter().map(|lane| ("vf_to_guest", lane)))
}

/// Each cause with its number.
fn causes(dropped: &Dropped) -> [(&'static str, u64); 6] {
    [
        ("guest_ring_empty", dropped.guest_ring_empty),
        ("vf_full", dropped.vf_full),
        ("not_ready", dropped.not_ready),
        ("disabled", dropped.disabled),
        ("malformed", dropped.malformed),
        ("oversize", dropped.oversize),
    ]
}

/// Those that happened, `-` for none.
fn dropped_text(causes: impl IntoIterator<Item = (&'static str, u64)>) -> String {
    let named = causes.into_iter().filter(|(_, count)| *count > 0).map(|(cause, count)| format!("{cause} {count}"));
    let text = named.collect::<Vec<_>>().join(", ");
    if text.is_empty() { "-".to_owned() } else { text }
}

/// How long the VF kept what it sent from the guest's memory.
fn completions_text(counters: &LaneSnapshot) -> String {
    let at = |percent| match counters.completions.percentile(percent) {
        Some(0) => "at once".to_owned(),
        Some(us) => format!("< {us} µs"),
        None => "> 262 ms".to_owned(),
    };
    let (frames, most) = (counters.completions.total(), counters.slowest_completion_us);
    let most = if counters.completions.percentile(100) == Some(0) { at(100) } else { format!("{most} µs") };
    format!("{frames} frames sent without a copy were the guest's again: p50 {}, p99 {}, max {most}", at(50), at(99))
}

/// Since each port was attached.
pub fn totals(now: &Stats) -> String {
    let header = ["PORT", "DIRECTION", "CPU", "PACKETS", "BYTES", "BURSTS", "KICKS", "SUPPRESSED", "DROPPED"];
    let rows = now.ports.iter().flat_map(|port| {
        lanes(port).map(|(direction, lane)| {
            let counters = &lane.counters;
            [
                port.id.to_string(),
                direction.to_owned(),
                lane.cpu.to_string(),
                counters.packets.to_string(),
                counters.bytes.to_string(),
                counters.bursts.to_string(),
                counters.kicks_sent.to_string(),
                counters.kicks_suppressed.to_string(),
                dropped_text(causes(&counters.dropped)),
            ]
        })
    });
    let mut text = table(header, rows, &[2, 3, 4, 5, 6, 7]);
    for port in now.ports.iter().filter(|port| !port.guest_to_vf.counters.completions.is_empty()) {
        let _ = writeln!(text, "\n{}: {}", port.id, completions_text(&port.guest_to_vf.counters));
    }
    for port in now.ports.iter().filter(|port| !port.xstats.is_empty()) {
        let age = port.xstats_age_ms.unwrap_or_default();
        let _ = writeln!(text, "\n{}: counters of its VF's driver, {age} ms ago", port.id);
        for (name, value) in port.xstats.iter().filter(|(_, value)| **value > 0) {
            let _ = writeln!(text, "  {name} {value}");
        }
    }
    text
}

/// What the lanes of `port` had counted before; of those that are new nothing.
fn lanes_before(port: &PortStats, before: &PortStats) -> Vec<LaneSnapshot> {
    let directions =
        [(&port.lanes.guest_to_vf, &before.lanes.guest_to_vf), (&port.lanes.vf_to_guest, &before.lanes.vf_to_guest)];
    let counted = |(now, before): (&Vec<LaneStats>, &Vec<LaneStats>)| {
        let counted = |lane| before.get(lane).map(|lane: &LaneStats| lane.counters).unwrap_or_default();
        (0..now.len()).map(counted).collect::<Vec<_>>()
    };
    directions.into_iter().flat_map(counted).collect()
}

/// From one look to the next.
fn rates(before: &Stats, now: &Stats) -> String {
    let seconds = now.time_us.saturating_sub(before.time_us).max(1) as f64 / 1e6;
    let before: HashMap<_, _> = before.ports.iter().map(|port| (&port.id, port)).collect();
    let header = ["PORT", "STATE", "DIRECTION", "CPU", "PACKETS/S", "MBIT/S", "PER BURST", "KICKS/S", "DROPPED/S"];
    let rows = now.ports.iter().filter_map(|port| Some((port, *before.get(&port.id)?))).flat_map(|(port, before)| {
        lanes(port).zip(lanes_before(port, before)).map(move |((direction, lane), old)| {
            let (new, old) = (&lane.counters, &old);
            // A port that was attached anew starts from nothing.
            let delta = |new: u64, old: u64| new.saturating_sub(old);
            let rate = |new, old| delta(new, old) as f64 / seconds;
            let packets = delta(new.packets, old.packets);
            let bursts = delta(new.bursts, old.bursts);
            let dropped = causes(&new.dropped).into_iter().zip(causes(&old.dropped));
            let dropped = dropped.map(|((cause, new), (_, old))| (cause, rate(new, old).ceil() as u64));
            [
                port.id.to_string(),
                port.state.to_string(),
                direction.to_owned(),
                lane.cpu.to_string(),
                format!("{:.0}", packets as f64 / seconds),
                format!("{:.1}", rate(new.bytes, old.bytes) * 8.0 / 1e6),
                format!("{:.1}", packets as f64 / bursts.max(1) as f64),
                format!("{:.0}", rate(new.kicks_sent, old.kicks_sent)),
                dropped_text(dropped),
            ]
        })
    });
    table(header, rows.collect::<Vec<_>>(), &[3, 4, 5, 6, 7])
}

/// Rates each second, until SIGINT or SIGTERM; with `--json` the plain results, one per line.
pub fn watch(session: &mut Session, query: &StatsQuery) -> Result<(), End> {
    let mut signals = signals().map_err(|error| ClientError::Strange(format!("cannot catch signals: {error}")))?;
    let mut before: Stats = session.client.call("stats", query)?;
    loop {
        match signals.read(&mut [0]) {
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            _ => return Ok(()),
        }
        let now: Stats = session.client.call("stats", query)?;
        let text = if session.json {
            format!("{}\n", serde_json::to_string(&now).unwrap_or_default())
        } else if on_terminal() {
            // Home, and clear what is below: flickers less than clearing all.
            format!("\x1b[H\x1b[J{}", rates(&before, &now))
        } else {
            format!("{}\n", rates(&before, &now))
        };
        print(&text)?;
        before = now;
    }
}

/// Readable when a signal has come; a read waits a second for one.
fn signals() -> std::io::Result<UnixStream> {
    let (read, write) = UnixStream::pair()?;
    for signal in [SIGINT, SIGTERM] {
        signal_hook::low_level::pipe::register(signal, write.try_clone()?)?;
    }
    read.set_read_timeout(Some(Duration::from_secs(1)))?;
    Ok(read)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completions_in_words() {
        let mut counters = LaneSnapshot::default();
        let mut text = |bucket: usize, frames, slowest| {
            counters.completions.0[bucket] += frames;
            counters.slowest_completion_us = slowest;
            completions_text(&counters)
        };
        let start = "frames sent without a copy were the guest's again";
        assert_eq!(text(0, 60, 0), format!("60 {start}: p50 at once, p99 at once, max at once"));
        assert_eq!(text(6, 39, 50), format!("99 {start}: p50 at once, p99 < 64 µs, max 50 µs"));
        assert_eq!(text(19, 1, 300_000), format!("100 {start}: p50 at once, p99 < 64 µs, max 300000 µs"));
        assert_eq!(text(19, 1000, 300_000), format!("1100 {start}: p50 > 262 ms, p99 > 262 ms, max 300000 µs"));
    }
}
