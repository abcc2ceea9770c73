use std::path::Path;
use std::time::Duration;

use crate::chain::OpenPolicy;
use crate::error::ErrorKind;
use crate::{Disk, DiskSpec, Format};

fn patient(patience: u64) -> OpenPolicy {
    OpenPolicy { lock_patience: Duration::from_millis(patience), ..OpenPolicy::host() }
}

fn raw(dir: &Path) -> DiskSpec {
    let path = dir.join("disk.raw");
    std::fs::write(&path, vec![0; 4096]).unwrap();
    DiskSpec::new(&path, Format::Raw)
}

#[test]
fn lock_that_is_given_back_in_time_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let spec = raw(dir.path());
    let held = Disk::open(&spec, &OpenPolicy::host()).unwrap();
    let other = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        held.close().unwrap();
    });
    assert!(Disk::open(&spec, &patient(10_000)).is_ok());
    other.join().unwrap();
}

#[test]
fn lock_that_stays_held_is_an_error_when_patience_ends() {
    let dir = tempfile::tempdir().unwrap();
    let spec = raw(dir.path());
    let _held = Disk::open(&spec, &OpenPolicy::host()).unwrap();
    assert!(Disk::open(&spec, &patient(20)).is_err_and(|e| e.kind() == ErrorKind::Locked));
}
