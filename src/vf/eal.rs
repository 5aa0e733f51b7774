//! DPDK's environment abstraction layer: started once per process, threads registered with it.

use std::ffi::{CStr, CString, c_char, c_int};
use std::marker::PhantomData;
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::SeqCst};

use rustix::thread::{sched_getaffinity, sched_setaffinity};

use super::mempool;
use crate::error::{Error, Result};

/// Memory without hugepages, unless the configuration says otherwise.
const DEFAULT_NO_HUGE_MIB: u32 = 256;

/// How the EAL is started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EalConfig {
    /// Run without hugepages. Otherwise hugepages are used, in memory: no file stays.
    pub no_huge: bool,
    /// MiB of memory with `no_huge` (it cannot grow); 0: 256.
    pub no_huge_mib: u32,
    /// More arguments, appended as they are; a later one overrides an earlier one of ours.
    pub extra: Vec<String>,
}

const NOT_STARTED: u8 = 0;
const RUNNING: u8 = 1;
const ENDED: u8 = 2;

static STATE: AtomicU8 = AtomicU8::new(NOT_STARTED);

/// The running EAL. One per process. Dropping it ends DPDK for the rest of the process: every VF has been
/// removed before. Every [`LcoreGuard`] holds on to it, so no registered thread is left then. Where threads may be
/// left behind, in a driver that does not return or with the cores of such a port, it is ended with [`Self::end`].
#[derive(Debug)]
pub struct Eal {
    _private: (),
}

impl Eal {
    /// Starts it, with no PCI device probed (they are probed one by one, on attach), and registers our
    /// mempool ops. Its file prefix is unique to the process. The calling thread's CPU affinity is kept.
    ///
    /// Fails if it was started before in this process, even unsuccessfully: DPDK allows one try.
    /// Signals that a thread blocks before this call stay blocked in EAL's threads, and net_tap
    /// receives only while *some* thread takes its real-time signal: block signals afterwards.
    pub fn start(config: &EalConfig) -> Result<Self> {
        let affinity = sched_getaffinity(None)
            .map_err(|e| Error::Io { what: "cannot read the CPU affinity".into(), source: e.into() })?;
        let cpus = (0..rustix::thread::CpuSet::MAX_CPU)
            .filter(|&cpu| affinity.is_set(cpu))
            .map(|cpu| cpu.to_string())
            .collect::<Vec<_>>()
            .join(",");
        let arguments = arguments(config, &cpus)
            .into_iter()
            .map(|argument| {
                CString::new(argument).map_err(|e| Error::Invalid(format!("an EAL argument contains a NUL: {e}")))
            })
            .collect::<Result<Vec<_>>>()?;
        STATE
            .compare_exchange(NOT_STARTED, RUNNING, SeqCst, SeqCst)
            .map_err(|_| Error::Invalid("DPDK's EAL can be started once per process".into()))?;

        // EAL keeps pointers into its arguments for the life of the process.
        let arguments: &'static [CString] = arguments.leak();
        let mut argv: Vec<*mut c_char> = arguments.iter().map(|argument| argument.as_ptr().cast_mut()).collect();
        let argc = c_int::try_from(argv.len()).map_err(|_| Error::Invalid("too many EAL arguments".into()))?;
        argv.push(std::ptr::null_mut());
        // SAFETY: argv holds argc NUL-terminated strings and a null pointer; EAL permutes the array
        // and does not write to the strings.
        let rc = unsafe { dpdk_sys::rte_eal_init(argc, argv.leak().as_mut_ptr()) };
        remove_runtime_directory();
        // EAL pins its caller to its own idea of the main lcore.
        let restored = sched_setaffinity(None, &affinity);
        if rc < 0 {
            STATE.store(ENDED, SeqCst);
            return Err(Error::Dpdk {
                call: "rte_eal_init",
                subject: format!("arguments {arguments:?}"),
                errno: errno(),
                hint: if !config.extra.is_empty() {
                    "see the EAL lines on stderr; correct or leave out --eal-arg (eal_args), the last of these arguments"
                } else if config.no_huge {
                    "see the EAL lines on stderr; give it less --memory"
                } else {
                    "see the EAL lines on stderr; reserve hugepages (vm.nr_hugepages), or use --no-huge"
                },
            });
        }
        let eal = Self { _private: () };
        restored.map_err(|e| Error::Io {
            what: "cannot restore the CPU affinity after rte_eal_init".into(),
            source: e.into(),
        })?;
        mempool::register_ops()?;
        Ok(eal)
    }

    /// Registers the calling thread (per-lcore mempool caches). The guard unregisters; it stays on its thread.
    /// A thread that EAL knows already (the one that started it) is left as it is.
    pub fn register_thread(self: &Arc<Self>) -> Result<LcoreGuard> {
        // SAFETY: reads a thread-local.
        let registered = unsafe { dpdk_sys::shim_lcore_id() } == dpdk_sys::SHIM_LCORE_ID_ANY;
        if registered {
            // SAFETY: EAL is initialised: `self` exists.
            if unsafe { dpdk_sys::rte_thread_register() } != 0 {
                return Err(match errno() {
                    libc::ENOMEM => Error::Exhausted(format!(
                        "all {} DPDK lcores are in use; use fewer poll cores",
                        dpdk_sys::RTE_MAX_LCORE
                    )),
                    errno => Error::Dpdk {
                        call: "rte_thread_register",
                        subject: "the calling thread".into(),
                        errno,
                        hint: "do not override --in-memory or --no-shconf",
                    },
                });
            }
        }
        Ok(LcoreGuard { registered, _eal: self.clone(), _not_send: PhantomData })
    }

    /// Ends DPDK, if nobody else holds on to it. `false`: somebody does, and now it lasts as long as the process,
    /// which is to end without the destructors of DPDK's libraries.
    pub fn end(self: Arc<Self>) -> bool {
        match Arc::try_unwrap(self) {
            Ok(eal) => {
                drop(eal);
                true
            }
            Err(shared) => {
                // Whoever lets go last would end it beside a thread that is in a driver.
                std::mem::forget(shared);
                false
            }
        }
    }

    /// How many ethdevs this libdpdk can hold (RTE_MAX_ETHPORTS).
    pub fn max_ethdevs(&self) -> u32 {
        dpdk_sys::RTE_MAX_ETHPORTS
    }

    /// libdpdk's version.
    pub fn version(&self) -> String {
        // SAFETY: returns a static string.
        unsafe { CStr::from_ptr(dpdk_sys::rte_version()) }.to_string_lossy().into_owned()
    }

    /// Bytes of DPDK memory in use, over all NUMA nodes: what leaks would show in.
    pub fn heap_in_use(&self) -> u64 {
        (0..dpdk_sys::RTE_MAX_NUMA_NODES)
            .filter_map(|node| {
                let mut stats = dpdk_sys::rte_malloc_socket_stats::default();
                // SAFETY: EAL is initialised; `stats` is ours.
                let rc = unsafe { dpdk_sys::rte_malloc_get_socket_stats(c_int::try_from(node).ok()?, &mut stats) };
                (rc == 0).then_some(stats.heap_allocsz_bytes as u64)
            })
            .sum()
    }
}

impl Drop for Eal {
    fn drop(&mut self) {
        STATE.store(ENDED, SeqCst);
        // SAFETY: EAL was initialised, once; no registered thread is left, and no VF (see the type).
        unsafe { dpdk_sys::rte_eal_cleanup() };
    }
}

/// An error unless the EAL runs: DPDK crashes when called without.
pub(super) fn running() -> Result<()> {
    if STATE.load(SeqCst) == RUNNING {
        Ok(())
    } else {
        Err(Error::Invalid("DPDK's EAL is not running; start the daemon with DPDK, or use soft VFs".into()))
    }
}

/// Devices find memory at the addresses at which we do (IOVA = VA).
pub(super) fn addresses_are_virtual() -> bool {
    // SAFETY: reads EAL's configuration.
    unsafe { dpdk_sys::rte_eal_iova_mode() == dpdk_sys::SHIM_IOVA_VA }
}

/// The calling thread's `rte_errno`.
pub(super) fn errno() -> i32 {
    // SAFETY: reads a thread-local.
    unsafe { dpdk_sys::shim_errno() }
}

/// EAL makes one for its prefix, also where it puts nothing into it: gone now, it cannot stay after a crash.
fn remove_runtime_directory() {
    // SAFETY: a static string of EAL's, empty before it has one.
    let path = unsafe { CStr::from_ptr(dpdk_sys::rte_eal_get_runtime_dir()) };
    // Not empty if `extra` asked for shared configuration or telemetry: then it has to stay.
    let _ = std::fs::remove_dir(path.to_string_lossy().as_ref());
}

fn arguments(config: &EalConfig, cpus: &str) -> Vec<String> {
    let mut arguments = vec![
        "virtio-forwarder".to_owned(),
        // An allow-list that matches nothing. `--no-pci` would keep the bus from being scanned later, too.
        "--allow=ffff:ff:1f.7".to_owned(),
        // One lcore, the calling thread, free to run wherever it may run now.
        format!("--lcores=0@({cpus})"),
        format!("--file-prefix=virtio-forwarder-{}", process::id()),
        "--no-telemetry".to_owned(),
        // Errors only; a later --log-level raises it.
        "--log-level=4".to_owned(),
    ];
    if config.no_huge {
        let mib = match config.no_huge_mib {
            0 => DEFAULT_NO_HUGE_MIB,
            mib => mib,
        };
        // DPDK 22.11 refuses --in-memory together with --no-huge; this is the same without files.
        arguments.extend(["--no-huge".to_owned(), "--no-shconf".to_owned()]);
        arguments.extend(["-m".to_owned(), mib.to_string()]);
    } else {
        arguments.push("--in-memory".to_owned());
    }
    arguments.extend(config.extra.iter().cloned());
    arguments
}

/// A thread's registration with the EAL.
#[derive(Debug)]
pub struct LcoreGuard {
    registered: bool,
    // Let go of after the thread is unregistered.
    _eal: Arc<Eal>,
    _not_send: PhantomData<*const ()>,
}

impl Drop for LcoreGuard {
    fn drop(&mut self) {
        if self.registered {
            // SAFETY: the guard cannot leave the thread that it registered.
            unsafe { dpdk_sys::rte_thread_unregister() };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hugepages_are_used_in_memory_and_without_them_no_file_is_made_either() {
        let huge = arguments(&EalConfig::default(), "0,1");
        assert!(huge.contains(&"--in-memory".to_owned()));
        assert!(huge.contains(&"--lcores=0@(0,1)".to_owned()));

        let config = EalConfig { no_huge: true, no_huge_mib: 64, extra: vec!["--log-level=8".into()] };
        let small = arguments(&config, "3");
        assert!(!small.contains(&"--in-memory".to_owned()));
        assert!(small.contains(&"--no-shconf".to_owned()));
        assert!(small.windows(2).any(|pair| pair == ["-m", "64"]));
        assert_eq!(small.last().map(String::as_str), Some("--log-level=8"));
    }
}
