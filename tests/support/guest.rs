//! A well-behaved guest: a front end with rings, memory and frames.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::PATIENCE;
use super::frame::{Frame, MIN_LEN};
use super::frontend::{FrontEnd, feature, request};
use super::memory::Region;
use super::queue::Queue;
use super::rx::RxQueue;
use super::tx::{NetHdr, Shape, TxQueue};

/// What a guest is like.
#[derive(Clone, Debug)]
pub struct Plan {
    pub pairs: usize,
    pub size: u16,
    /// Virtio features it wants; every one of them has to be offered.
    pub features: u64,
    /// Descriptor lengths of one receive buffer.
    pub rx_pieces: Vec<u32>,
    /// Length of a send buffer, header included.
    pub tx_slot: usize,
    pub shape: Shape,
    /// Queue pairs that are enabled at start.
    pub enabled: Vec<usize>,
    /// Post all receive buffers at start.
    pub post: bool,
    /// Where to put rings and buffers; by default a region of our own.
    pub regions: Option<Vec<Arc<Region>>>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            pairs: 1,
            size: 256,
            features: feature::VERSION_1 | feature::MRG_RXBUF,
            rx_pieces: vec![2048],
            tx_slot: 2048,
            shape: Shape::whole(),
            enabled: vec![0],
            post: true,
            regions: None,
        }
    }
}

impl Plan {
    pub fn pairs(pairs: usize) -> Self {
        Self {
            pairs,
            enabled: (0..pairs).collect(),
            features: Self::default().features | if pairs > 1 { feature::MQ } else { 0 },
            ..Self::default()
        }
    }

    fn memory_needed(&self) -> u64 {
        let rx: u32 = self.rx_pieces.iter().sum();
        let slot = (self.tx_slot as u64 + u64::from(rx)).next_multiple_of(64) + 128;
        let tables = 16 * (self.shape.cuts.len() as u64 + 1);
        let pair = u64::from(self.size) * (slot + tables + 64) + 4096;
        (self.pairs as u64 * pair + (1 << 20)).next_multiple_of(2 << 20)
    }
}

#[derive(Debug)]
pub struct Pair {
    pub rx: RxQueue,
    pub tx: TxQueue,
}

#[derive(Debug)]
pub struct Guest {
    pub front: FrontEnd,
    pub regions: Vec<Arc<Region>>,
    pub pairs: Vec<Pair>,
    pub features: u64,
}

impl Guest {
    pub fn connect(socket: &Path, plan: &Plan) -> Self {
        Self::over(FrontEnd::connect(socket), plan)
    }

    /// Negotiates, passes memory, starts all rings, enables the planned ones and posts all buffers.
    pub fn over(mut front: FrontEnd, plan: &Plan) -> Self {
        negotiate(&mut front, plan.features);
        let regions = plan.regions.clone().unwrap_or_else(|| vec![Region::new(0x10_0000, plan.memory_needed())]);
        let table: Vec<_> = regions.iter().map(|r| (r.entry(), r.fd())).collect();
        front.set_mem_table(&table);
        let pairs = (0..plan.pairs).map(|i| build_pair(plan, i, &regions)).collect();
        let mut guest = Self { front, regions, pairs, features: plan.features };
        for Pair { rx, tx } in &mut guest.pairs {
            rx.queue.start(&guest.front);
            tx.queue.start(&guest.front);
            if plan.post {
                rx.post_all();
            }
        }
        for &pair in &plan.enabled {
            guest.enable(pair, true);
        }
        // Without acknowledgements, an answered question proves that all of it was taken in.
        guest.front.features();
        guest
    }

    pub fn enable(&self, pair: usize, on: bool) {
        self.front.set_vring_enable(2 * pair as u32, on);
        self.front.set_vring_enable(2 * pair as u32 + 1, on);
    }

    /// Goes on over a new connection with memory and rings as they are: what a VMM does when its back end
    /// comes back.
    pub fn resume(&mut self) {
        negotiate(&mut self.front, self.features);
        self.set_mem_table();
        for (i, Pair { rx, tx }) in self.pairs.iter().enumerate() {
            rx.queue.start(&self.front);
            tx.queue.start(&self.front);
            self.enable(i, true);
        }
    }

    /// Stops all rings as a VMM does at shutdown; the device has to be where the driver is.
    pub fn stop(&mut self) {
        for Pair { rx, tx } in &mut self.pairs {
            for queue in [&rx.queue, &tx.queue] {
                let base = self.front.get_vring_base(queue.index).expect("base");
                assert_eq!(base, queue.position(), "ring {}", queue.index);
            }
        }
    }

    /// Passes the memory table as it is now.
    pub fn set_mem_table(&self) {
        let table: Vec<_> = self.regions.iter().map(|r| (r.entry(), r.fd())).collect();
        self.front.set_mem_table(&table);
    }
}

/// Features of both kinds, as QEMU does it: what `features` names, and what protocol features we know.
pub fn negotiate(front: &mut FrontEnd, features: u64) {
    let offered = front.features();
    assert_eq!(features & !offered, 0, "not offered: {:#x} of {features:#x}", features & !offered);
    assert_ne!(offered & feature::PROTOCOL, 0, "PROTOCOL_FEATURES missing");
    let known = feature::PROTOCOL_MQ
        | feature::PROTOCOL_REPLY_ACK
        | feature::PROTOCOL_NET_MTU
        | feature::PROTOCOL_RESET_DEVICE
        | feature::PROTOCOL_CONFIGURE_MEM_SLOTS;
    let protocol = front.protocol_features() & known;
    front.must(request::SET_PROTOCOL_FEATURES, &protocol.to_ne_bytes(), &[]);
    front.reply_ack = protocol & feature::PROTOCOL_REPLY_ACK != 0;
    front.packed = features & feature::RING_PACKED != 0;
    front.must(request::SET_OWNER, &[], &[]);
    front.must(request::SET_FEATURES, &(features | feature::PROTOCOL).to_ne_bytes(), &[]);
}

/// Length of the virtio-net header with these features.
pub fn header_len(features: u64) -> usize {
    if features & (feature::VERSION_1 | feature::MRG_RXBUF) != 0 { NetHdr::LEN } else { NetHdr::LEGACY_LEN }
}

fn build_pair(plan: &Plan, index: usize, regions: &[Arc<Region>]) -> Pair {
    // Rings in the first region, buffers in the last: every look-up has a choice to make.
    let (home, buffers) = (&regions[0], &regions[regions.len() - 1]);
    let event_idx = plan.features & feature::EVENT_IDX != 0;
    let mergeable = plan.features & feature::MRG_RXBUF != 0;
    let header_len = header_len(plan.features);
    let queue = |i: usize| {
        if plan.features & feature::RING_PACKED == 0 {
            return Queue::new(home, i as u32, plan.size, event_idx);
        }
        let mut queue = Queue::packed(home, i as u32, plan.size, event_idx);
        queue.packed.as_mut().expect("just made").in_order = plan.features & feature::IN_ORDER != 0;
        queue
    };
    Pair {
        rx: RxQueue::new(queue(2 * index), buffers, &plan.rx_pieces, header_len, mergeable),
        tx: TxQueue::new(queue(2 * index + 1), buffers, plan.tx_slot, header_len, plan.shape.clone()),
    }
}

/// Numbered frames of several flows on their way round a VF that loops, and back in order.
#[derive(Clone, Debug)]
pub struct Flows {
    sent: Vec<u32>,
    received: Vec<u32>,
    /// Bytes sent, without headers.
    pub bytes: u64,
    /// Frames on their way at most: fewer than the guest has buffers, or it would lose some.
    pub window: usize,
}

impl Flows {
    pub fn new(flows: usize) -> Self {
        Self { sent: vec![0; flows], received: vec![0; flows], bytes: 0, window: 64 }
    }

    pub fn window(self, window: usize) -> Self {
        Self { window, ..self }
    }

    pub fn total_sent(&self) -> u64 {
        self.sent.iter().copied().map(u64::from).sum()
    }

    pub fn total_received(&self) -> u64 {
        self.received.iter().copied().map(u64::from).sum()
    }

    fn in_flight(&self) -> usize {
        (self.total_sent() - self.total_received()) as usize
    }

    /// The next frame of a flow, of a length that varies from frame to frame up to `max_len`.
    pub fn next(&mut self, flow: usize, max_len: usize) -> Frame {
        let seq = self.sent[flow];
        self.sent[flow] += 1;
        let spread = max_len - MIN_LEN + 1;
        let len = MIN_LEN + (seq as usize * 97 + flow * 31) % spread;
        self.bytes += len as u64;
        Frame { flow: flow as u16, seq, len }
    }

    /// A frame came back: it has to be the next of its flow, unchanged.
    #[track_caller]
    pub fn came_back(&mut self, bytes: &[u8]) {
        let frame = Frame::parse(bytes);
        let expected = &mut self.received[usize::from(frame.flow)];
        assert_eq!(frame.seq, *expected, "flow {} out of order", frame.flow);
        *expected += 1;
    }

    /// Sends `count` frames over the queue pairs `over`, flow by flow, and waits until all are back.
    #[track_caller]
    pub fn exchange(&mut self, guest: &mut Guest, over: &[usize], count: usize, max_len: usize) {
        let end = self.total_sent() + count as u64;
        let mut last = Instant::now();
        while self.total_sent() < end || self.in_flight() > 0 {
            let before = self.total_received();
            while self.total_sent() < end && self.in_flight() < self.window {
                let flow = (self.total_sent() % self.sent.len() as u64) as usize;
                let tx = &mut guest.pairs[over[flow % over.len()]].tx;
                let saved = self.clone();
                if !tx.send(&self.next(flow, max_len).bytes()) {
                    *self = saved;
                    break;
                }
            }
            for &pair in over {
                let Pair { rx, tx } = &mut guest.pairs[pair];
                tx.flush();
                while let Some(received) = rx.receive() {
                    self.came_back(&received.frame);
                }
            }
            if self.total_received() > before {
                last = Instant::now();
            } else {
                assert!(last.elapsed() < PATIENCE, "frames lost: {self:?}");
                std::thread::yield_now();
            }
        }
        for &pair in over {
            let tx = &mut guest.pairs[pair].tx;
            super::until("all sent chains back", || {
                tx.reap();
                tx.queue.outstanding() == 0
            });
        }
    }

    /// `rounds` bursts of 1 to 24 frames over pair 0, for a driver that sleeps: whenever it has nothing to
    /// do, it asks for a call and waits for it. A call that does not come is a hang.
    #[track_caller]
    pub fn exchange_sleeping(&mut self, guest: &mut Guest, rounds: usize) {
        let Pair { rx, tx } = &mut guest.pairs[0];
        for round in 0..rounds {
            for _ in 0..1 + round % 24 {
                let bytes = self.next(0, 200).bytes();
                while !tx.send(&bytes) {
                    tx.flush();
                    if !tx.queue.request_call() {
                        assert!(tx.queue.wait_call(PATIENCE), "round {round}: no call for sent chains");
                    }
                }
            }
            tx.flush();
            while self.in_flight() > 0 {
                match rx.receive() {
                    Some(received) => self.came_back(&received.frame),
                    None if rx.queue.request_call() => {}
                    None => assert!(rx.queue.wait_call(PATIENCE), "round {round}: no call"),
                }
            }
        }
    }
}
