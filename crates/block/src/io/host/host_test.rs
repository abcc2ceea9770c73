use std::io::{Seek, SeekFrom};

use super::*;
use crate::io::Completion;
use crate::io::{Buffer, Op, OpenMode, Storage};
use crate::testing::within_seconds;

/// What a driver says of a descriptor that cannot be watched, and then of one that can.
fn watched(driver: &mut dyn Driver, broken: RawFd) -> Vec<Completion> {
    let kick = Wake::new().unwrap();
    driver.watch(broken, 1).unwrap();
    let mut done = Vec::new();
    while done.is_empty() {
        driver.wait(true, &mut done).unwrap();
    }
    driver.watch(kick.0.as_raw_fd(), 2).unwrap();
    // Whatever comes late.
    (0..100).for_each(|_| driver.wait(false, &mut done).unwrap());
    kick.notify();
    while done.iter().all(|completion| completion.token != 2) {
        driver.wait(true, &mut done).unwrap();
    }
    done
}

#[test]
fn a_descriptor_that_cannot_be_watched_is_told_of_once() {
    for engine in [Engine::Auto, Engine::Threads] {
        within_seconds(move || {
            let (reader, writer) = std::io::pipe().unwrap();
            drop(reader);
            // No descriptor has the first number; the other one has nobody to talk to any more.
            for broken in [RawFd::MAX, writer.as_raw_fd()] {
                let mut driver = Host::new(engine).driver().unwrap();
                let done = watched(&mut *driver, broken);
                let told: Vec<_> =
                    done.iter().map(|completion| (completion.token, completion.result.is_ok())).collect();
                assert_eq!(told, [(1, false), (2, true)], "{engine:?} {broken}");
            }
        });
    }
}

#[test]
fn edge_47_reads_and_writes_leave_the_position_that_duplicates_share_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, [1; 8192]).unwrap();
    for engine in [Engine::Auto, Engine::Threads] {
        let host = Host::new(engine);
        for mut driver in [host.driver().unwrap(), host.blocking_driver().unwrap()] {
            let file = host.open(&path, OpenMode { write: true, ..OpenMode::default() }).unwrap();
            // SAFETY: the file is open as long as `file` is, and its descriptor is borrowed for less.
            let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(file.id()) };
            let mut duplicate = std::fs::File::from(fd.try_clone_to_owned().unwrap());
            duplicate.seek(SeekFrom::Start(777)).unwrap();
            let buffer = Buffer::from_bytes(&[2; 1024]);

            let mut done = Vec::new();
            driver.submit(1, file.id(), Op::Write { offset: 4096, data: vec![buffer.seg(0, 1024)] });
            driver.submit(2, file.id(), Op::Read { offset: 0, data: vec![buffer.seg(512, 512)] });
            driver.submit_cached(3, file.id(), Op::Write { offset: 0, data: vec![buffer.seg(0, 512)] });
            while done.len() < 3 {
                driver.wait(true, &mut done).unwrap();
            }

            assert!(done.iter().all(|completion| completion.result.is_ok()), "{done:?}");
            assert_eq!(duplicate.stream_position().unwrap(), 777, "{engine:?}");
        }
    }
}
