//! A guest's memory: its address spaces, its mapped regions, and every load and store on it.
//!
//! Guest memory is shared with a hostile party, so it is never a Rust reference here: only raw
//! pointers with volatile, atomic or `copy_nonoverlapping` access, each inside a range that a
//! region look-up proved to be mapped for its whole length.
//!
//! Loads are methods of [`HostRange`]; every store goes through `GuestStore`, the one place where
//! dirty logging is added for live migration.

mod address;
mod memory;
mod range;
mod region;
mod sigbus;
mod store;
mod view;

pub use address::{Gpa, UserAddr};
pub use memory::{Drained, GuestMemory};
pub use range::HostRange;
pub use region::RegionSpec;
pub use sigbus::install as install_sigbus_handler;
pub use store::GuestSink;
pub(crate) use store::GuestStore;
pub(crate) use view::View;
