//! A vhost-user guest made for measuring and checking back ends: its driver recycles buffers and leaves frames as
//! they are, so that the back end is the bottleneck. Each window and result is one line of JSON on stdout.
//!
//! ```text
//! cargo run --release --example load-guest -- SOCKET --direction rx --size 64 --format packed --in-order
//! ```

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};

mod connection;
mod driver;
#[allow(dead_code)]
#[path = "../../tests/support/frontend.rs"]
mod frontend;
mod guest;
mod latency;
mod number;
mod rate;
mod verify;

/// What `frontend` takes from the module it is in.
mod memory {
    pub use super::connection::RegionEntry;
}
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(20);

use connection::{IN_ORDER, Outcome, RING_PACKED};
use driver::{Packed, Split};
use frontend::feature;
use guest::FCS;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Frames a second
    Rate,
    /// One frame at a time
    Latency,
    /// Every frame numbered and checked
    Verify,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Direction {
    /// Guest to VF
    Tx,
    /// VF to guest
    Rx,
    Both,
}

impl Direction {
    fn sends(self) -> bool {
        self != Self::Rx
    }

    fn receives(self) -> bool {
        self != Self::Tx
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Split,
    Packed,
}

/// A vhost-user guest that measures and checks back ends
#[derive(Debug, Parser)]
#[command(name = "load-guest")]
pub(crate) struct Args {
    /// The back end's socket
    socket: PathBuf,
    /// Listen on the socket: the back end connects
    #[arg(long)]
    listen: bool,
    #[arg(long, value_enum, default_value = "rate")]
    mode: Mode,
    #[arg(long, value_enum, default_value = "tx")]
    direction: Direction,
    /// Bytes on the wire, of which the last 4 (FCS) never reach memory; or imix: 7 of 64, 4 of 594, 1 of 1518
    #[arg(long, default_value = "64", value_parser = size)]
    size: Size,
    #[arg(long, value_enum, default_value = "split")]
    format: Format,
    /// Negotiate IN_ORDER
    #[arg(long)]
    in_order: bool,
    /// Put descriptors into tables of their own
    #[arg(long)]
    indirect: bool,
    /// Descriptors a buffer: 1, or a power of two, the first for the virtio-net header alone
    #[arg(long, default_value_t = 1)]
    pieces: u16,
    /// Negotiate MRG_RXBUF
    #[arg(long)]
    mergeable: bool,
    /// Negotiate EVENT_IDX
    #[arg(long)]
    event_idx: bool,
    /// Bytes of a receive buffer, with the virtio-net header; by default a frame fits
    #[arg(long)]
    rx_buffer: Option<usize>,
    /// Pairs of rings, all on one core
    #[arg(long, default_value_t = 1)]
    pairs: u32,
    /// Entries of a ring
    #[arg(long, default_value_t = 1024)]
    ring: u16,
    /// Do what a driver for strangers' buffers does, too: write descriptors, headers and a word of each frame sent,
    /// read header and frame of what is received
    #[arg(long)]
    touch: bool,
    /// Guest memory of huge pages
    #[arg(long)]
    huge: bool,
    /// Run on this core
    #[arg(long)]
    core: Option<usize>,
    /// Length of a window, or of a check
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    #[arg(long, default_value_t = 1)]
    windows: usize,
    /// Before the first window or sample, in seconds
    #[arg(long, default_value_t = 0.1)]
    warm_up: f64,
    /// Of latency
    #[arg(long, default_value_t = 100_000)]
    samples: usize,
}

#[derive(Clone, Copy, Debug)]
enum Size {
    Fixed(usize),
    Imix,
}

fn size(text: &str) -> Result<Size, String> {
    match text.parse() {
        _ if text == "imix" => Ok(Size::Imix),
        Ok(bytes @ 64..=9022) => Ok(Size::Fixed(bytes)),
        _ => Err("a frame has 64 to 9022 bytes, or write imix".into()),
    }
}

impl Args {
    fn check(&self) -> Outcome<()> {
        if !self.ring.is_power_of_two() || self.ring > 4096 {
            return Err(format!("--ring {}: use a power of two up to 4096", self.ring).into());
        }
        if !self.pieces.is_power_of_two() || self.pieces > self.ring.min(8) {
            return Err(format!("--pieces {}: use 1, 2, 4 or 8, not more than the ring has", self.pieces).into());
        }
        if self.rx_buffer.is_some_and(|len| !(128..=65_536).contains(&len)) {
            return Err("--rx-buffer: use 128 to 65536 bytes".into());
        }
        if self.pairs == 0 || self.samples == 0 || self.windows == 0 {
            return Err("--pairs, --samples and --windows count from 1".into());
        }
        Ok(())
    }

    /// Virtio features beyond VERSION_1.
    fn features(&self) -> u64 {
        [
            (self.format == Format::Packed, RING_PACKED),
            (self.in_order, IN_ORDER),
            (self.indirect, feature::INDIRECT),
            (self.mergeable, feature::MRG_RXBUF),
            (self.event_idx, feature::EVENT_IDX),
        ]
        .iter()
        .filter(|(wanted, _)| *wanted)
        .fold(0, |features, (_, bit)| features | bit)
    }

    /// Lengths in memory of the frames to send, in turns.
    fn frames(&self) -> Vec<usize> {
        match self.size {
            Size::Fixed(bytes) => vec![bytes - FCS],
            Size::Imix => {
                [64, 594, 64, 64, 594, 64, 1518, 64, 594, 64, 594, 64].iter().map(|bytes| bytes - FCS).collect()
            }
        }
    }
}

fn print(line: &serde_json::Value) {
    println!("{line}");
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The result, as it is printed.
pub(crate) fn run(args: &Args) -> Outcome<serde_json::Value> {
    args.check()?;
    if let Some(id) = args.core
        && !core_affinity::set_for_current(core_affinity::CoreId { id })
    {
        return Err(format!("--core {id}: this process may not run there").into());
    }
    match (args.mode, args.format) {
        (Mode::Rate, Format::Split) => rate::run::<Split>(args),
        (Mode::Rate, Format::Packed) => rate::run::<Packed>(args),
        (Mode::Latency, Format::Split) => latency::run::<Split>(args),
        (Mode::Latency, Format::Packed) => latency::run::<Packed>(args),
        (Mode::Verify, Format::Split) => verify::run::<Split>(args),
        (Mode::Verify, Format::Packed) => verify::run::<Packed>(args),
    }
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(result) => {
            print(&result);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("load-guest: {error}");
            ExitCode::FAILURE
        }
    }
}
