//! That the simulator bites: with any one barrier left out, and with any one mistake made, some seed fails.
//!
//! Each test says within how many seeds, of those that play without a failure when nothing is wrong.

use super::*;

/// How many seeds it may take to notice that a barrier is missing.
const BARRIER_WITHIN: u64 = 2000;

/// Finds a seed below `within` that notices.
fn bites(defect: Defect, focus: Option<Barrier>, within: u64) {
    let found = (0..within).find(|&seed| run(seed, Some(defect), focus).is_err() && run(seed, None, focus).is_ok());
    println!("{defect:?}: noticed by seed {found:?}");
    assert!(found.is_some(), "{within} seeds do not notice {defect:?}");
}

fn bites_without(barrier: Barrier, focus: Option<Barrier>) {
    bites(Defect::NoBarrier(barrier), focus, BARRIER_WITHIN);
}

#[test]
fn without_the_data_barrier_a_seed_fails() {
    bites_without(Barrier::Data, None);
}

#[test]
fn without_the_barrier_before_the_mapping_a_seed_fails() {
    bites_without(Barrier::BeforeMapping, None);
}

#[test]
fn without_the_barrier_after_the_mapping_a_seed_fails() {
    bites_without(Barrier::Mapping, None);
}

#[test]
fn without_the_barrier_for_new_refcount_blocks_a_seed_fails() {
    bites_without(Barrier::NewRefblocks, Some(Barrier::NewRefblocks));
}

#[test]
fn without_the_barrier_for_a_new_refcount_table_a_seed_fails() {
    bites_without(Barrier::NewRefTable, Some(Barrier::NewRefTable));
}

#[test]
fn without_the_barrier_before_the_header_of_a_change_a_seed_fails_edge_37() {
    bites_without(Barrier::BeforeHeader, Some(Barrier::BeforeHeader));
}

#[test]
fn without_the_barrier_after_the_header_of_a_change_a_seed_fails_edge_37() {
    bites_without(Barrier::Header, Some(Barrier::Header));
}

/// A test for each mutation: the flush after which lives end if the mistake is rarely made otherwise, and the seeds that it may take.
macro_rules! noticed {
    ($($name:ident: $mutation:ident, $focus:expr, $within:expr;)*) => {$(
        #[test]
        fn $name() {
            bites(Defect::Mutation(Mutation::$mutation), $focus, $within);
        }
    )*};
}

noticed! {
    mapping_before_data_is_noticed: MappingBeforeData, None, 100;
    mapping_before_refcounts_is_noticed: MappingBeforeRefcounts, None, 100;
    l1_before_new_tables_is_noticed: L1BeforeNewTables, None, 500;
    slices_read_late_are_noticed: SlicesReadLate, None, 200;
    what_changed_and_counts_as_written_is_noticed: ChangedCountsAsWritten, None, 100;
    flush_that_joins_a_running_commit_is_noticed: FlushJoinsRunningCommit, None, 200;
    dirty_slice_that_is_evicted_is_noticed: DirtySliceEvicted, None, 500;
    freed_before_durable_is_noticed_edges_30_and_31: FreedBeforeDurable, None, 2000;
    freed_under_requests_is_noticed: FreedUnderRequests, None, 4000;
    reused_before_its_punch_is_noticed_edge_31: ReusedBeforePunch, None, 500;
    shared_and_punched_is_noticed_edge_25: SharedPunched, None, 100;
    used_and_taken_for_zero_is_noticed: UsedTakenForZero, None, 200;
    head_that_is_not_copied_is_noticed: HeadNotCopied, None, 100;
    tail_that_is_not_copied_is_noticed: TailNotCopied, None, 100;
    writers_that_do_not_wait_are_noticed: WritersUnlocked, None, 200;
    failed_flush_that_is_forgotten_is_noticed: FailedFlushForgotten, None, 500;
    header_before_the_refcount_table_is_noticed_edge_29: HeaderBeforeRefTable, Some(Barrier::NewRefTable), 2000;
    old_refcount_table_freed_early_is_noticed_edge_32: OldRefTableFreedEarly, Some(Barrier::NewRefTable), 4000;
    header_before_its_tables_is_noticed_edge_37: HeaderBeforeTables, Some(Barrier::Header), 200;
    snapshot_that_keeps_copied_is_noticed_edge_38: SnapshotKeepsCopied, None, 200;
    snapshot_dropped_first_is_noticed_edge_37: SnapshotDroppedFirst, Some(Barrier::BeforeHeader), 1000;
    shrunk_before_the_header_is_noticed: ShrunkBeforeHeader, None, 4000;
    refcount_block_freed_first_is_noticed_edge_33: RefblockFreedFirst, None, 4000;
}
