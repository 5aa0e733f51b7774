//! Message sequences with fds, over a real socket, against a session whose lanes check every call.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|script: &[u8]| virtio_forwarder::session::script::play(script));
