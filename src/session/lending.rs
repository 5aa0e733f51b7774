//! What of its guest's memory a port's VF may send from, and receive into.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Weak};

use super::plan::ZeroCopy;
use crate::guest::GuestMemory;
use crate::vf::{Dma, DmaMap, Lendable, Vf};

/// Mapped at a time, in bytes: it may be some 10 ms until the port's thread answers anybody again.
const PIECE: usize = 128 << 20;

/// The way there: a device's driver uses what is mapped for the device, which may take seconds. Until then all is copied.
#[derive(Debug, Default)]
pub(super) struct Lending {
    /// What it is about; `None`: nothing is lent.
    of: Option<(Arc<GuestMemory>, ZeroCopy)>,
    /// By DMA, if the VF does.
    maps: Vec<Arc<DmaMap>>,
    left: VecDeque<Range<usize>>,
    lendable: Option<Arc<Lendable>>,
    hindrance: Option<String>,
    /// Maps of before, which are there as long as something is in flight in them.
    past: Vec<Weak<DmaMap>>,
}

/// Why not all of a guest's memory may be mapped.
fn shortfall(given: usize, all: usize) -> Option<String> {
    let which = match given {
        _ if given == all => return None,
        0 => "the guest's memory is",
        _ => "some of the guest's memory is",
    };
    Some(format!("{which} not on hugepages (zero_copy \"on\" maps it all the same)"))
}

impl Lending {
    /// Rings in this memory run. All that the device has of the guest's is in it: lanes that lose memory are drained
    /// before.
    pub(super) fn follow(&mut self, vf: Option<&Vf>, memory: &Arc<GuestMemory>, wanted: ZeroCopy) {
        let lends = |vf: &&Vf| vf.caps().copies.is_none() || vf.caps().copies_received.is_none();
        let Some(vf) = vf.filter(|vf| wanted != ZeroCopy::Off && lends(vf)) else {
            self.past.extend(self.maps.iter().map(Arc::downgrade));
            *self = Self { past: std::mem::take(&mut self.past), ..Self::default() };
            return;
        };
        if self.of.as_ref().is_some_and(|(ours, when)| Arc::ptr_eq(ours, memory) && *when == wanted) {
            return;
        }
        let before = std::mem::take(self);
        self.of = Some((memory.clone(), wanted));
        if vf.caps().dma == Dma::None {
            self.lendable = Some(Lendable::all(memory.clone()));
            return;
        }
        // Ordinary pages are given back, and taken anew, by any guest with a balloon: the device would go on using the
        // old ones. Hugepages by few; that is the operator's to know (docs/operating.md).
        let pieces = memory.pieces(wanted == ZeroCopy::Auto, PIECE);
        let bytes = |pieces: &[Range<usize>]| pieces.iter().map(ExactSizeIterator::len).sum();
        self.hindrance = shortfall(bytes(&pieces), bytes(&memory.pieces(false, PIECE)));
        let past = before.past.iter().filter_map(Weak::upgrade);
        let (kept, gone): (Vec<_>, Vec<_>) =
            before.maps.into_iter().chain(past).partition(|map| pieces.contains(map.pages()));
        (self.maps, self.past) = (kept, gone.iter().map(Arc::downgrade).collect());
        self.left = pieces.into_iter().filter(|piece| !self.maps.iter().any(|map| map.pages() == piece)).collect();
        self.lend();
    }

    /// Whether something is in flight in maps of before.
    pub(super) fn is_in_the_past(&self) -> bool {
        self.past.iter().any(|map| map.strong_count() > 0)
    }

    /// Nothing is lent any more, and nothing is in flight.
    pub(super) fn end(&mut self) {
        *self = Self::default();
    }

    /// Whether [`Self::map_some`] has something to do.
    pub(super) fn is_under_way(&self) -> bool {
        !self.left.is_empty()
    }

    /// Maps a piece. Whether that was the last: then the rings are to be built anew.
    pub(super) fn map_some(&mut self, vf: Option<&Vf>) -> bool {
        let (Some(vf), Some(piece)) = (vf, self.left.pop_front()) else { return false };
        match vf.map(piece) {
            Ok(map) => self.maps.push(Arc::new(map)),
            Err(error) => {
                self.hindrance = Some(error.to_string());
                self.left.clear();
            }
        }
        if self.left.is_empty() {
            self.lend();
        }
        self.left.is_empty()
    }

    fn lend(&mut self) {
        self.lendable = match &self.of {
            Some((memory, _)) if !self.maps.is_empty() => Some(Lendable::mapped(memory.clone(), self.maps.clone())),
            _ => None,
        };
    }

    /// For rings in `memory`.
    pub(super) fn lendable(&self, memory: &Arc<GuestMemory>) -> Option<Arc<Lendable>> {
        self.lendable.clone().filter(|lendable| Arc::ptr_eq(lendable.memory(), memory))
    }

    /// Why frames are copied that might be lent, of a VF that uses DMA.
    pub(super) fn hindrance(&self) -> Option<String> {
        match &self.lendable {
            _ if self.hindrance.is_some() => self.hindrance.clone(),
            None if self.is_under_way() => Some("the guest's memory is being mapped for the VF".into()),
            None => Some("the guest has no ring that runs".into()),
            Some(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_copied_from_is_not_passed_over() {
        let why = |given| shortfall(given, 4096).unwrap_or_default();
        assert!(why(0).starts_with("the guest's memory is not on hugepages"));
        assert!(why(2048).starts_with("some of the guest's memory is not on hugepages"));
        assert_eq!(why(4096), "");
    }
}
