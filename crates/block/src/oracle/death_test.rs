//! The process dies (as far as one process can play that: the disk is dropped as it is) under a guest that lives on, with nothing
//! flushed; the next one replays the journal, and QEMU judges: no errors, no leaks, and every byte that was acknowledged.
//!
//! A process that is truly killed is in the tests of the vhost-user back-end.

use std::sync::atomic::AtomicU64;

use super::guest::policy;
use super::image::{Made, SNAPSHOT, Shape};
use super::read_test::assert_same;
use super::write_test::play;
use super::{matrix, qemu};
use crate::chain::OpenPolicy;
use crate::disk::Disk;
use crate::io::host::Engine;
use crate::io::sim::Rng;
use crate::journal::{SharedWords, Survival};
use crate::spec::DiskSpec;
use crate::sync::Arc;

/// Lives that end with a death; half of them by a replay that is told of nothing more.
fn assert_survives(made: &Made, shape: &Shape, spec: &DiskSpec, engine: Engine, rng: &mut Rng) {
    // Some are full now and then.
    let records = [30, 1 << 14][rng.below(2) as usize];
    let words: SharedWords = Arc::new((0..16 + records * 4).map(|_| AtomicU64::new(0)).collect::<Vec<_>>());
    let policy = OpenPolicy { survival: Survival::Journal(words), ..policy(engine) };
    for life in 0..2 {
        let initial = qemu::content(&made.path);
        let disk = Disk::open(spec, &policy).unwrap();
        let model = play(&disk, initial, shape, rng);
        disk.forget();
        drop(disk);
        if life == 1 {
            let replayed = Disk::open(spec, &policy).unwrap();
            replayed.forget();
        }
        Disk::open(spec, &policy).unwrap().close().unwrap();
        qemu::assert_clean(&made.path);
        model.check_all(&qemu::content(&made.path)).unwrap();
        if let Some(snapshot) = &made.snapshot {
            let name = format!("snapshot.name={SNAPSHOT}");
            assert_same(&qemu::content_with(&made.path, &["-l", &name]), snapshot);
        }
    }
}

#[test]
fn images_of_all_sorts_keep_what_was_acknowledged_and_leak_nothing() {
    matrix::each("death", &matrix::all_sorts(), assert_survives);
}
