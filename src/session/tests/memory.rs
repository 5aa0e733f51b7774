//! The memory table: what pauses, what drains, what is refused whole.

use super::*;

const BESIDE: Region = [GPA + SIZE, SIZE, USER + SIZE, 0];

/// A talk with one region and ring 0 running at position 9.
fn running() -> (Talk, OwnedFd) {
    let mut talk = Talk::negotiated(1);
    let memory = memfd(SIZE);
    talk.ok(mem_table(&[(REGION, &memory)]));
    talk.start(0);
    talk.lanes.rings.get_mut(&0).unwrap().position = 9;
    talk.lanes.take_calls();
    (talk, memory)
}

fn regions(talk: &Talk) -> usize {
    talk.session.memory().regions().len()
}

#[test]
fn a_table_that_keeps_every_region_pauses_one_that_loses_one_drains() {
    let (mut talk, memory) = running();
    let beside = memfd(SIZE);
    for (table, lanes) in [
        (vec![(REGION, &memory)], "paused"),
        (vec![(REGION, &memory), (BESIDE, &beside)], "paused"),
        // The order means nothing.
        (vec![(BESIDE, &beside), (REGION, &memory)], "paused"),
        (vec![(REGION, &memory)], "drained"),
        (vec![(REGION, &beside)], "drained"),
        (vec![([GPA, SIZE / 2, USER, 0], &beside)], "drained"),
        (vec![([GPA, SIZE / 2, USER, SIZE / 2], &beside)], "drained"),
        (vec![], "drained"),
        (vec![], "paused"),
    ] {
        let count = table.len();
        talk.ok(mem_table(&table));
        assert_eq!(depth(&talk.lanes.take_calls()), lanes);
        assert_eq!(regions(&talk), count);
        assert_eq!(talk.lanes.rings[&0].position, 9, "a drained ring goes on where it was");
    }
}

#[test]
fn regions_come_and_go_one_by_one() {
    let (mut talk, memory) = running();
    talk.ok(mem_region(Req::ADD_MEM_REG, BESIDE, Some(&memfd(SIZE))));
    assert_eq!(depth(&talk.lanes.take_calls()), "paused");
    assert_eq!(regions(&talk), 2);
    // The offset means nothing, and an fd is tolerated.
    talk.ok(mem_region(Req::REM_MEM_REG, [REGION[0], REGION[1], REGION[2], 77], Some(&memory)));
    assert_eq!(depth(&talk.lanes.take_calls()), "drained");
    assert_eq!(regions(&talk), 1);
    assert_eq!(talk.session.state().regions.len(), 1);
    for wrong in [REGION, [BESIDE[0] + 4096, SIZE, BESIDE[2], 0], [BESIDE[0], SIZE, 0, 0], [BESIDE[0], 1, BESIDE[2], 0]]
    {
        talk.refused(mem_region(Req::REM_MEM_REG, wrong, None));
    }
}

#[test]
fn a_refused_table_has_changed_nothing() {
    let (mut talk, memory) = running();
    let good = (BESIDE, memfd(SIZE));
    for bad in [
        [GPA, 0, USER, 0],
        [GPA, SIZE, USER, 4096],
        [GPA, SIZE + 4096, USER, 0],
        [u64::MAX - 4095, SIZE, USER, 0],
        [GPA, SIZE, u64::MAX - 4095, 0],
        [GPA, SIZE, USER, u64::MAX - 4095],
        [BESIDE[0], SIZE, USER, 0],
        [GPA, SIZE, BESIDE[2], 0],
    ] {
        // The good one first: it must not stay mapped when the bad one fails.
        talk.refused(mem_table(&[(good.0, &good.1), (bad, &memory)]));
        talk.refused(mem_region(Req::ADD_MEM_REG, bad, Some(&memory)));
        assert_eq!(regions(&talk), 1);
    }
    // Not a file at all.
    talk.refused(mem_table(&[(BESIDE, &new_eventfd())]));
    talk.refused(mem_region(Req::ADD_MEM_REG, REGION, Some(&memory)));
}

#[test]
fn more_than_eight_regions_need_configure_mem_slots() {
    let memory = memfd(SIZE);
    let table: Vec<_> = (0..9).map(|i| ([GPA + i * 4096, 4096, USER + i * 4096, i * 4096], &memory)).collect();
    let mut talk = Talk::new(1);
    talk.ok(mem_table(&table[..8]));
    talk.refused(mem_table(&table));
    let mut talk = Talk::negotiated(1);
    talk.ok(mem_table(&table));
    assert_eq!(regions(&talk), 9);
}

#[test]
fn there_are_509_slots() {
    let memory = memfd(509 * 4096);
    let slot = |i: u64| {
        let region = [GPA + i * 4096, 4096, USER + i * 4096, (i % 509) * 4096];
        mem_region(Req::ADD_MEM_REG, region, Some(&memory))
    };
    let mut talk = Talk::negotiated(1);
    for i in 0..509 {
        talk.ok(slot(i));
    }
    assert!(talk.refused(slot(509)).contains("509"));
    assert_eq!(regions(&talk), 509);
}

/// Of a region that stays, the file we have stays too, and the new fd is closed.
#[test]
fn a_kept_region_keeps_its_file() {
    use std::os::fd::AsRawFd;
    let (mut talk, memory) = running();
    let fd = |talk: &Talk| talk.session.state().regions[0].1.as_raw_fd();
    let before = fd(&talk);
    talk.ok(mem_table(&[(REGION, &memory)]));
    assert_eq!(fd(&talk), before);
}
