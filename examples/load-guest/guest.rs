//! A guest: its memory, its pairs of rings, and what is common to all that it can do.

use std::time::{Duration, Instant};

use arrayvec::ArrayVec;

use super::Args;
use super::connection::{Connection, Doorbell, Outcome};
use super::driver::{BURST, Buffers, Driver, HEADER, Memory, Plan, Used};
use super::number::Numbered;

/// Frames on the wire end in 4 bytes that never reach memory.
pub const FCS: usize = 4;
/// For entries, indirect tables and roundings of a ring.
const RING_SPACE: usize = 64 << 10;
/// For a back end that shares its core with others.
const PATIENCE: Duration = Duration::from_secs(5);

/// One ring in use.
pub struct Lane<D> {
    pub driver: D,
    pub buffers: Buffers,
    doorbell: Doorbell,
    /// What the last `reclaim` took back.
    pub used: ArrayVec<Used, BURST>,
    pub slots: u16,
    /// Buffers that the frame in the last one still needs.
    more: u16,
    /// The longest frame needs so many buffers; if several, their number is in each frame's header.
    buffers_a_frame: usize,
    pub packets: u64,
    /// Of frames, without headers and FCS.
    pub bytes: u64,
    pub kicks: u64,
}

impl<D: Driver> Lane<D> {
    #[inline]
    pub fn reclaim(&mut self) -> usize {
        self.used.clear();
        self.driver.reclaim(&mut self.used);
        self.used.len()
    }

    /// Offers what was taken back.
    #[inline]
    pub fn recycle(&mut self) {
        for used in &self.used {
            self.driver.offer(used.slot);
        }
    }

    #[inline]
    pub fn publish(&mut self) {
        if self.driver.publish() {
            self.kicks += 1;
            self.doorbell.kick();
        }
    }

    /// Frames of the longest kind that all slots hold.
    pub fn frames(&self) -> u64 {
        u64::from(self.slots) / self.buffers_a_frame as u64
    }

    pub fn fill(&mut self) {
        (0..self.slots).for_each(|slot| self.driver.offer(slot));
        self.publish();
    }

    /// Counts frames that were sent: those of `used`.
    #[inline]
    pub fn count_sent(&mut self) {
        self.packets += self.used.len() as u64;
        let bytes: u64 = self.used.iter().map(|used| u64::from(self.buffers.len(used.slot))).sum();
        self.bytes += bytes - (HEADER * self.used.len()) as u64;
    }

    /// Counts frames that were received: those of `used`.
    #[inline]
    pub fn count_received(&mut self) {
        for used in &self.used {
            self.bytes += u64::from(used.written);
            if self.more == 0 {
                self.packets += 1;
                self.bytes -= HEADER as u64;
                self.more = if self.buffers_a_frame > 1 { number_of_buffers(&self.buffers, used.slot) } else { 1 };
            }
            self.more -= 1;
        }
    }
}

pub fn number_of_buffers(buffers: &Buffers, slot: u16) -> u16 {
    let at = buffers.header(slot) + HEADER - 2;
    buffers.area.load_u16(at, std::sync::atomic::Ordering::Relaxed).max(1)
}

pub struct Pair<D> {
    pub tx: Lane<D>,
    pub rx: Lane<D>,
}

pub struct Guest<D> {
    pub pairs: Vec<Pair<D>>,
    connection: Connection,
}

impl<D: Driver> Guest<D> {
    /// Connects, with frames ready in all buffers that it sends and nothing offered yet.
    pub fn connect(args: &Args) -> Outcome<Self> {
        let mut connection = Connection::open(&args.socket, args.listen, args.features(), args.pairs)?;
        let plan = |receive| Plan {
            size: args.ring,
            pieces: args.pieces,
            indirect: args.indirect,
            in_order: args.in_order,
            event_idx: args.event_idx,
            rewrite: args.touch,
            receive,
        };
        let frames = args.frames();
        let longest = *frames.iter().max().expect("at least one length");
        let rx_lens = [args.rx_buffer.map_or(longest.max(1522), |len| len - HEADER)];
        let lens = [&rx_lens[..], &frames];
        let needed: usize = lens.iter().map(|lens| Buffers::size(&plan(true), lens) + RING_SPACE).sum();
        let tables = 2 * usize::from(args.ring) * usize::from(args.pieces + 2) * 16;
        let memory = Memory::new(args.pairs as usize * (needed + tables), args.huge)
            .map_err(|e| format!("guest memory{}: {e}", if args.huge { " of huge pages" } else { "" }))?;
        connection.set_memory(&memory);

        let mut lane = |ring: u32, receive: bool| -> Outcome<Lane<D>> {
            let plan = plan(receive);
            let buffers = Buffers::new(&memory, &plan, lens[usize::from(!receive)]);
            let driver = D::new(&memory, plan, &buffers);
            let doorbell = connection.start(ring, &plan, D::BASE, driver.addresses())?;
            Ok(Lane {
                driver,
                buffers,
                doorbell,
                used: ArrayVec::new(),
                slots: plan.slots(),
                more: 0,
                buffers_a_frame: (HEADER + longest).div_ceil(HEADER + if receive { rx_lens[0] } else { longest }),
                packets: 0,
                bytes: 0,
                kicks: 0,
            })
        };
        let pairs = (0..args.pairs)
            .map(|i| Ok(Pair { rx: lane(2 * i, true)?, tx: lane(2 * i + 1, false)? }))
            .collect::<Outcome<Vec<_>>>()?;
        for (flow, pair) in pairs.iter().enumerate() {
            let buffers = &pair.tx.buffers;
            for slot in 0..pair.tx.slots {
                let len = buffers.len(slot) as usize - HEADER;
                let frame = Numbered { flow: flow as u16, number: slot.into() };
                buffers.area.write(buffers.frame(slot), &frame.bytes(len));
            }
        }
        Ok(Self { pairs, connection })
    }

    /// Waits until the device has done with `out` sent frames, stops the rings and counts what came meanwhile.
    /// Afterwards the counters are what the back end's must be. `received` sees each late burst.
    pub fn finish(&mut self, mut out: usize, mut received: impl FnMut(usize, &mut Lane<D>)) -> Outcome<()> {
        let mut progress = Instant::now();
        let mut late = |i: usize, rx: &mut Lane<D>| {
            while rx.reclaim() > 0 {
                rx.count_received();
                received(i, rx);
            }
        };
        while out > 0 {
            for (i, pair) in self.pairs.iter_mut().enumerate() {
                let back = pair.tx.reclaim();
                pair.tx.count_sent();
                late(i, &mut pair.rx);
                if back > 0 {
                    out -= back;
                    progress = Instant::now();
                }
            }
            if progress.elapsed() > PATIENCE {
                return Err(format!("the back end kept the last {out} sent frames for {PATIENCE:?}").into());
            }
        }
        self.connection.stop()?;
        for (i, pair) in self.pairs.iter_mut().enumerate() {
            late(i, &mut pair.rx);
        }
        Ok(())
    }

    pub fn sum(&self, of: impl Fn(&Pair<D>) -> u64) -> u64 {
        self.pairs.iter().map(of).sum()
    }
}
