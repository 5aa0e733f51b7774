//! Messages in any order.

use proptest::prelude::*;

use super::fds::{alone, open_fds};
use crate::session::script::play;

/// Never a panic, never a ring in a lane that is not started and complete, never an fd left behind.
#[test]
fn any_sequence_keeps_the_rules_and_leaks_nothing() {
    alone("sequences::any_sequence_keeps_the_rules_and_leaks_nothing", || {
        let config = ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() };
        proptest!(config, |(script in prop::collection::vec(any::<u8>(), 0..400))| {
            let before = open_fds();
            play(&script);
            prop_assert_eq!(open_fds(), before);
        });
    });
}

/// The same, over scripts that first set a session up, so that rings run when it gets rough.
#[test]
fn any_sequence_behind_a_set_up_keeps_the_rules() {
    alone("sequences::any_sequence_behind_a_set_up_keeps_the_rules", || {
        // Protocol features, features, two regions, and rings 0 and 1: size, address, kick.
        let mut set_up = vec![16, 0, 2, 3, 5, 2, 0, 1];
        for ring in 0..2 {
            set_up.extend([8, ring, 6, 9, ring, 0, 12, ring, 0]);
        }
        let config = ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() };
        proptest!(config, |(script in prop::collection::vec(any::<u8>(), 0..200))| {
            let before = open_fds();
            play(&[&set_up[..], &script].concat());
            prop_assert_eq!(open_fds(), before);
        });
    });
}
