//! Finds the system's libdpdk, generates the bindings and compiles the shim.

use std::path::PathBuf;
use std::process::{Command, exit};

/// The oldest release that is tested; `rte_dev_name` and others did not exist before.
const OLDEST: &str = "22.11";

fn main() {
    println!("cargo::rerun-if-changed=shim.h");
    println!("cargo::rerun-if-changed=shim.c");
    let flags = compiler_flags();

    let mut shim = cc::Build::new();
    shim.file("shim.c").warnings(true).flags(&flags);
    shim.compile("virtio_forwarder_dpdk_shim");

    // The shim was emitted first, so that the shared libraries it needs follow it on the link line.
    find_libdpdk();

    let bindings = bindgen::Builder::default()
        .header("shim.h")
        .clang_args(&flags)
        .allowlist_function("rte_eal_(init|cleanup|get_runtime_dir|has_hugepages|hotplug_add|hotplug_remove|iova_mode)")
        .allowlist_function("rte_(version|thread_register|thread_unregister|dev_name)")
        .allowlist_function("rte_malloc_get_socket_stats")
        .allowlist_function("rte_mem_event_callback_(register|unregister)")
        .allowlist_function("rte_mcfg_mem_read_(lock|unlock)")
        .allowlist_function("rte_eth_.*")
        .allowlist_function("rte_mempool_(create_empty|free|set_ops_byname|populate_default)")
        .allowlist_function("rte_mempool_(obj_iter|avail_count|register_ops)")
        .allowlist_function("rte_pktmbuf_(init|pool_init|pool_create|free_bulk)")
        .allowlist_function("rte_ring_(lookup|free)")
        .allowlist_function("shim_.*")
        .allowlist_var("(SHIM|RTE_MAX)_.*")
        .allowlist_type("rte_mempool_ops")
        .allowlist_type("rte_pktmbuf_pool_private")
        // Read and written through the shim's offsets only: its field paths differ by release.
        .opaque_type("rte_mbuf")
        .opaque_type("rte_ring")
        .opaque_type("rte_(mp|intr|bus|device|devargs|flow|mtr|tm|security)_.*")
        .layout_tests(true)
        .derive_default(true)
        .generate_comments(false)
        .generate()
        .unwrap_or_else(|error| fail(&format!("bindgen cannot read DPDK's headers: {error}")));
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    bindings.write_to_file(out.join("bindings.rs")).expect("OUT_DIR is writable");
}

fn find_libdpdk() {
    if let Err(error) = pkg_config::Config::new().atleast_version(OLDEST).probe("libdpdk") {
        missing(&error.to_string());
    }
}

/// `pkg-config --cflags`, unabridged: the pkg-config crate drops `-include rte_config.h` and
/// `-march`, without which DPDK's headers do not compile.
fn compiler_flags() -> Vec<String> {
    let tool = std::env::var("PKG_CONFIG").unwrap_or_else(|_| "pkg-config".into());
    let output = Command::new(&tool)
        .args(["--cflags", "libdpdk"])
        .output()
        .unwrap_or_else(|error| missing(&format!("{tool}: {error}")));
    if !output.status.success() {
        missing(String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8_lossy(&output.stdout)
        .split_whitespace()
        // As system headers: their warnings are not ours.
        .map(|flag| match flag.strip_prefix("-I") {
            Some(directory) => format!("-isystem{directory}"),
            None => flag.to_owned(),
        })
        .collect()
}

fn missing(reason: &str) -> ! {
    fail(&format!(
        "libdpdk {OLDEST} or newer was not found.\n\
         On Debian and Ubuntu: apt install libdpdk-dev pkg-config clang libclang-dev\n\
         Without DPDK: cargo build --no-default-features (soft VFs only).\n\n{reason}"
    ))
}

fn fail(message: &str) -> ! {
    eprintln!("\nerror: {message}\n");
    exit(1)
}
