//! Has two VFs receive into the memory of one guest, which is mapped for the first of them only: for `scripts/vf-lab`, which
//! sends frames to both, also longer ones than a buffer holds. In what the first gets nothing changes but the frames;
//! the other one finds nothing there (its IOMMU faults).
//!
//! `posted_buffers PCI-ADDRESS PCI-ADDRESS`

#[cfg(not(feature = "dpdk"))]
fn main() {
    eprintln!("built without DPDK");
}

#[cfg(feature = "dpdk")]
fn main() {
    dpdk::main();
}

#[cfg(feature = "dpdk")]
mod dpdk {
    use std::fs::File;
    use std::ops::Range;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use arrayvec::ArrayVec;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use virtio_forwarder::guest::{Gpa, GuestMemory, RegionSpec, UserAddr};
    use virtio_forwarder::vf::eal::{Eal, EalConfig};
    use virtio_forwarder::vf::ethdev::EthdevRx;
    use virtio_forwarder::vf::{Dma, Lendable, Queues, RxPacket, RxQueue, Vf, VfConfig, VfSpec};

    const BUFFERS: usize = 32;
    /// From one buffer to the next; what is between them belongs to nobody.
    const STRIDE: usize = 4096;
    const HEADER: usize = 12;
    const FILL: u8 = 0x5a;
    const PATIENCE: Duration = Duration::from_secs(60);

    /// Posts buffers of the least length from `from` on, and receives until all of them have come. Where frames came, and
    /// the longest.
    fn receive(queue: &mut EthdevRx, lendable: &Arc<Lendable>, from: usize) -> (Vec<Range<usize>>, usize) {
        let least = queue.takes_buffers().expect("the driver is on the list");
        let base = lendable.memory().translate(Gpa(0), 1).expect("it lies there").as_ptr().addr();
        for place in 0..BUFFERS {
            let at = Gpa((from + place * STRIDE) as u64);
            let short = lendable.memory().translate(at, (HEADER + least - 1) as u64).expect("it lies there");
            assert!(!queue.post(short, HEADER, lendable), "a buffer that the VF may write beyond");
            let buffer = lendable.memory().translate(at, (HEADER + least) as u64).expect("it lies there");
            assert!(queue.post(buffer, HEADER, lendable));
        }
        let (mut came, mut longest) = (Vec::new(), 0);
        let start = Instant::now();
        while came.len() < BUFFERS {
            assert!(start.elapsed() < PATIENCE, "only {} frames came to posted buffers", came.len());
            let mut burst = ArrayVec::new();
            queue.receive(&mut burst);
            for frame in &burst {
                if let Some(at) = frame.placed_at() {
                    came.push(at - base..at - base + frame.len());
                    longest = longest.max(frame.len());
                }
            }
        }
        assert_eq!(queue.withdraw(), 0, "the VF has none left");
        (came, longest)
    }

    pub fn main() {
        let eal = Eal::start(&EalConfig::default()).expect("EAL starts");
        let mut vfs: Vec<_> = std::env::args()
            .skip(1)
            .map(|address| {
                let spec: VfSpec = address.parse().expect("a PCI address");
                let mut vf = Vf::probe(&spec).expect("the VF is there, and bound to vfio-pci");
                assert_eq!(vf.caps().dma, Dma::Own, "{:?}", vf.caps().dma_shared);
                let Ok(Queues::Ethdev(tx, rx)) = vf.configure(&VfConfig { queues: 1, mtu: 1500, mac: None }) else {
                    panic!("{spec} cannot be configured");
                };
                vf.start().expect("it starts");
                (vf, tx, rx)
            })
            .collect();
        let [(owner, _, owners_rx), (_, _, strangers_rx)] = &mut vfs[..] else { panic!("two VFs") };

        // As a guest's: hugepages of somebody's.
        let file = File::from(memfd_create("guest", MemfdFlags::HUGETLB).expect("a memfd"));
        let size = 2_usize << 20;
        ftruncate(&file, size as u64).expect("hugepages");
        let spec = RegionSpec { gpa: Gpa(0), size: size as u64, user: UserAddr(0), offset: 0 };
        let memory = GuestMemory::empty().with(spec, file).expect("it is mapped");
        let all = memory.translate(Gpa(0), size as u64).expect("it lies there");
        // SAFETY: mapped so far, and nobody else's; no buffer is posted.
        unsafe { all.as_ptr().write_bytes(FILL, size) };
        let pages = memory.pieces(true, size).remove(0);
        let map = Arc::new(owner.map(pages).expect("it is mapped for its own VF"));

        let lendable = Lendable::mapped(memory.clone(), vec![map]);
        let (came, longest) = receive(&mut owners_rx[0], &lendable, 0);
        // The lie: for this VF nothing is mapped.
        receive(&mut strangers_rx[0], &Lendable::all(memory.clone()), size / 2);
        // SAFETY: mapped so far, and both VFs have given all buffers back.
        let bytes = unsafe { std::slice::from_raw_parts(all.as_ptr(), size) };
        let inside = |at: usize| came.iter().any(|frame| frame.contains(&at));
        let changed = (0..size).filter(|&at| bytes[at] != FILL && !inside(at)).collect::<Vec<_>>();
        let written = came.iter().filter(|frame| bytes[(*frame).clone()].iter().any(|byte| *byte != FILL)).count();
        println!("{written} frames of up to {longest} bytes, {} bytes changed beside them", changed.len());
        assert!(changed.is_empty(), "{changed:x?}");

        drop(lendable);
        for (mut vf, tx, rx) in vfs {
            drop((tx, rx));
            vf.stop().expect("it stops");
            vf.remove().expect("it goes");
        }
        drop(eal);
    }
}
