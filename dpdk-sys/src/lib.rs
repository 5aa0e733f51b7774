//! Bindings to the system's libdpdk: what virtio-forwarder calls of it, as C declares it.
//!
//! Static inlines and macros come through the shim (`shim_*`, `SHIM_*`). `rte_mbuf` is opaque: its
//! fields lie at the `SHIM_MBUF_*` offsets, whose paths in C differ by DPDK release.

#![allow(non_camel_case_types, non_upper_case_globals, non_snake_case)]

mod bindings {
    #![allow(missing_docs, unsafe_op_in_unsafe_fn, clippy::all)]
    include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
}
pub use bindings::*;
