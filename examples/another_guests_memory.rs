//! Has a VF send from memory that is mapped for another VF only, then that one: the negative control of `scripts/vf-lab`
//! for the DMA domains. The first finds nothing there (its IOMMU faults), the second sends.
//!
//! `another_guests_memory PCI-ADDRESS PCI-ADDRESS`; the frames are of EtherType 0x88b5, from the VF's address.

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
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use arrayvec::ArrayVec;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use virtio_forwarder::guest::{Gpa, GuestMemory, RegionSpec, UserAddr};
    use virtio_forwarder::vf::eal::{Eal, EalConfig};
    use virtio_forwarder::vf::ethdev::EthdevTx;
    use virtio_forwarder::vf::{Dma, Lendable, Mac, Queues, TxQueue, Vf, VfConfig, VfSpec};

    const FRAMES: usize = 16;
    const LEN: usize = 1024;

    /// Sends all frames from where they lie. How many the driver had back in half a second, and after how many ms the last.
    fn send(queue: &mut EthdevTx, lendable: &Arc<Lendable>) -> (u32, u128) {
        let before = queue.returned();
        let mut refused = 0;
        for place in 0..FRAMES {
            let frame = lendable.memory().translate(Gpa((place * LEN) as u64), LEN as u64).expect("it lies there");
            let mut burst = ArrayVec::new();
            burst.push(queue.lend(frame, lendable).expect("the driver is on the list"));
            assert_eq!((queue.send(&mut burst, &mut refused), refused), (1, 0));
        }
        let (sent, mut back) = (Instant::now(), (0, 0));
        while sent.elapsed() < Duration::from_millis(500) {
            queue.reclaim(Instant::now());
            let now = queue.returned().wrapping_sub(before);
            if now != back.0 {
                back = (now, sent.elapsed().as_millis());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        back
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
        let [(stranger, strangers_tx, _), (owner, owners_tx, _)] = &mut vfs[..] else { panic!("two VFs") };
        let source = |vf: &Vf| vf.link().mac.expect("it has an address");

        // As a guest's: hugepages of somebody's.
        let file = File::from(memfd_create("guest", MemfdFlags::HUGETLB).expect("a memfd"));
        let size = 2 << 20;
        ftruncate(&file, size).expect("hugepages");
        let spec = RegionSpec { gpa: Gpa(0), size, user: UserAddr(0), offset: 0 };
        let memory = GuestMemory::empty().with(spec, file).expect("it is mapped");
        let fill = |source: Mac| {
            let all = memory.translate(Gpa(0), (FRAMES * LEN) as u64).expect("it lies there");
            let frame = [&[0xff; 6], &source.0[..], &[0x88, 0xb5], &[0x5a; LEN - 14]].concat().repeat(FRAMES);
            // SAFETY: mapped so far, and nobody else's; no frame is out.
            unsafe { all.as_ptr().copy_from(frame.as_ptr(), frame.len()) };
        };

        let pages = memory.pieces(true, size as usize).remove(0);
        let map = Arc::new(owner.map(pages).expect("it is mapped for its own VF"));
        fill(source(stranger));
        // The lie: for this VF nothing is mapped.
        println!("stranger: {:?}", send(&mut strangers_tx[0], &Lendable::all(memory.clone())));
        // The first has no frame any more then, and the second is as good as before.
        for vf in [stranger, &mut *owner] {
            vf.restart().expect("it stops and starts");
        }
        fill(source(owner));
        let (back, after) = send(&mut owners_tx[0], &Lendable::mapped(memory.clone(), vec![map]));
        println!("owner: {back} of {FRAMES} frames back after {after} ms");

        for (mut vf, tx, rx) in vfs {
            drop((tx, rx));
            vf.stop().expect("it stops");
            vf.remove().expect("it goes");
        }
        drop(eal);
    }
}
