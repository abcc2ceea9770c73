//! The process dies (as far as one process can play that: the disk is dropped as it is) under a guest that lives on, with nothing
//! flushed; the next one replays the journal, and QEMU judges: no errors, no leaks, and every byte that was acknowledged.
//!
//! A process that is truly killed is in the tests of the vhost-user back-end.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

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
    // The kernel may keep the files of a ring for a moment.
    let lock_patience = Duration::from_secs(20);
    let policy = OpenPolicy { survival: Survival::Journal(words), lock_patience, ..policy(engine) };
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

/// Of the sorts one in so many is tried.
const EACH: usize = 4;

#[test]
fn images_of_many_sorts_keep_what_was_acknowledged_and_leak_nothing() {
    // Which sorts those are is the seed's: all of them take minutes.
    let sorts = matrix::all_sorts();
    let first = super::dice("sorts that die").below(EACH as u64) as usize;
    let some: Vec<_> = sorts.into_iter().skip(first).step_by(EACH).collect();
    matrix::each("death", &some, assert_survives);
}
