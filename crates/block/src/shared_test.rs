use std::path::Path;

use cowhand_qcow2::CreateParams;

use super::*;
use crate::chain::OpenPolicy;
use crate::error::ErrorKind;
use crate::{Disk, Preallocation, create_image};

/// Overlays called `a` and `b` on `middle`, which lies on `base`.
fn family(dir: &Path) -> (OpenPolicy, [DiskSpec; 2]) {
    let policy = OpenPolicy { shared: Some(Arc::default()), ..OpenPolicy::host() };
    let make = |name: &str, below: Option<&str>| {
        let backing = below.map(|below| (below.as_bytes().to_vec(), "qcow2".to_owned()));
        let params = CreateParams { backing, ..CreateParams::new(1 << 20) };
        create_image(&policy.storage, &dir.join(name), &params, Preallocation::Off).unwrap();
    };
    make("base", None);
    for (name, below) in [("middle", "base"), ("a", "middle"), ("b", "middle")] {
        make(name, Some(below));
    }
    let spec = |name| DiskSpec::new(&dir.join(name), Format::Qcow2);
    (policy, [spec("a"), spec("b")])
}

fn below(disk: &Disk) -> Arc<Node> {
    disk.node().backing().unwrap().clone()
}

#[test]
fn disks_with_the_same_backing_file_have_it_in_common_with_all_below_it() {
    let dir = tempfile::tempdir().unwrap();
    let (policy, [a, b]) = family(dir.path());
    let (a, b) = (Disk::open(&a, &policy).unwrap(), Disk::open(&b, &policy).unwrap());
    assert!(Arc::ptr_eq(&below(&a), &below(&b)));
    assert_eq!(b.layers().len(), 3);
}

#[test]
fn layer_stays_locked_until_the_last_disk_lets_it_go() {
    let dir = tempfile::tempdir().unwrap();
    let (policy, [a, b]) = family(dir.path());
    let (first, second) = (Disk::open(&a, &policy).unwrap(), Disk::open(&b, &policy).unwrap());
    let write = || Disk::open(&DiskSpec::new(&dir.path().join("middle"), Format::Qcow2), &OpenPolicy::host());
    first.close().unwrap();
    drop(first);
    assert!(write().is_err_and(|e| e.kind() == ErrorKind::Locked));
    // The disk itself was unlocked.
    Disk::open(&a, &policy).unwrap().close().unwrap();
    second.close().unwrap();
    drop(second);
    write().unwrap().close().unwrap();
}

#[test]
fn layer_that_was_let_go_is_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let (policy, [a, b]) = family(dir.path());
    let first = Disk::open(&a, &policy).unwrap();
    first.close().unwrap();
    drop(first);
    let name = dir.path().join("middle");
    let changed = Disk::open(&DiskSpec::new(&name, Format::Qcow2), &OpenPolicy::host()).unwrap();
    changed.resize(2 << 20).unwrap();
    changed.close().unwrap();
    drop(changed);
    let second = Disk::open(&b, &policy).unwrap();
    assert_eq!(below(&second).size(), 2 << 20);
}

#[test]
fn disks_of_different_descriptions_have_nothing_in_common() {
    let dir = tempfile::tempdir().unwrap();
    let (policy, [a, b]) = family(dir.path());
    let b = DiskSpec { metadata_cache: Some(1 << 20), ..b };
    let (a, b) = (Disk::open(&a, &policy).unwrap(), Disk::open(&b, &policy).unwrap());
    assert!(!Arc::ptr_eq(&below(&a), &below(&b)));
}
