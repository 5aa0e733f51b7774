//! The control socket and `vfctl`, against a real server with a crew that only pretends.

mod daemon;
mod socket;
mod vfctl;
