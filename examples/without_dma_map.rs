//! Runs a program whose every VFIO DMA map "succeeds" and maps nothing: the negative control of `scripts/vf-lab`.
//! What works there as well proves nothing about the DMA maps.
//!
//! `without_dma_map PROGRAM ARGUMENT...`

use std::os::unix::process::CommandExt;
use std::process::Command;

/// `_IO(';', 100 + 13)` (linux/vfio.h).
const VFIO_IOMMU_MAP_DMA: u32 = 0x3b71;

/// Offsets in `struct seccomp_data` (seccomp(2)).
const SYSCALL: u32 = 0;
const SECOND_ARGUMENT: u32 = 24;

fn main() {
    let mut words = std::env::args_os().skip(1);
    let program = words.next().expect("a program to run");
    lie_about_dma_maps().expect("seccomp takes the filter");
    let error = Command::new(&program).args(words).exec();
    panic!("{}: {error}", program.display());
}

/// A seccomp filter that answers the ioctl with 0, unseen by the kernel, and allows everything else.
fn lie_about_dma_maps() -> std::io::Result<()> {
    let load = |offset| instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, offset);
    let skip_unless = |value, skipped| instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, skipped, value);
    let answer = |value| instruction(libc::BPF_RET | libc::BPF_K, 0, value);
    let mut program = [
        load(SYSCALL),
        skip_unless(libc::SYS_ioctl as u32, 3),
        load(SECOND_ARGUMENT),
        skip_unless(VFIO_IOMMU_MAP_DMA, 1),
        answer(libc::SECCOMP_RET_ERRNO), // errno 0
        answer(libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the filter is valid during the call, which copies it.
    let rc = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            | libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter)
    };
    if rc == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

fn instruction(code: u32, skipped_if_not_equal: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: 0, jf: skipped_if_not_equal, k }
}
