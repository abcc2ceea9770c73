//! What several tests need: a driver whose operations never end, and an end for tests that would not.

use std::io;
use std::os::fd::RawFd;
use std::sync::mpsc;
use std::time::Duration;

use crate::io::sim::World;
use crate::io::{Completion, Driver, Notify, Op, Storage, Work};
use crate::sync::Arc;

/// A driver whose operations never end before it is dropped, when it calls `at_drop`.
pub(crate) struct Stuck<F: FnMut()> {
    notify: Arc<dyn Notify>,
    at_drop: F,
}

impl<F: FnMut()> Stuck<F> {
    pub(crate) fn new(at_drop: F) -> Self {
        Self { notify: World::orderly().driver().unwrap().notifier(), at_drop }
    }
}

impl<F: FnMut()> Driver for Stuck<F> {
    fn submit(&mut self, _token: u64, _file: RawFd, _op: Op) {}

    fn compute(&mut self, _token: u64, _work: Work) {}

    fn watch(&mut self, _fd: RawFd, _token: u64) -> io::Result<()> {
        Ok(())
    }

    fn wait(&mut self, _block: bool, _done: &mut Vec<Completion>) -> io::Result<()> {
        Ok(())
    }

    fn notifier(&self) -> Arc<dyn Notify> {
        self.notify.clone()
    }
}

impl<F: FnMut()> Drop for Stuck<F> {
    fn drop(&mut self) {
        (self.at_drop)();
    }
}

/// Runs `test` on a thread of its own: one that sleeps or spins for ever fails instead of hanging the run.
pub(crate) fn within_seconds(test: impl FnOnce() + Send + 'static) {
    let (done, finished) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        test();
        done.send(()).unwrap();
    });
    if finished.recv_timeout(Duration::from_secs(30)) == Err(mpsc::RecvTimeoutError::Timeout) {
        panic!("it does not come to an end");
    }
    thread.join().unwrap();
}
