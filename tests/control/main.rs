//! The control socket and `vfctl`, against a real server with a crew that only pretends.

mod daemon;
mod socket;
#[path = "../support/tries.rs"]
mod tries;
mod vfctl;
