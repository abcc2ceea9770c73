use super::*;
use crate::io::Completion;
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
