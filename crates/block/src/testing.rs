//! What several tests need: a driver whose operations never end, operations that fail from a step on, and an end for tests that
//! would not have one.

use std::future::Future;
use std::io;
use std::os::fd::RawFd;
use std::rc::Rc;
use std::sync::mpsc;
use std::time::Duration;

use crate::io::sim::{Faults, World};
use crate::io::{Completion, Driver, Notify, Op, Storage, Work};
use crate::queue::Queue;
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

/// Runs a task on a queue of its own to its end, while every operation of the world's files from the step `faulty` on fails.
pub(crate) fn run_cut_short<T>(world: &World, faulty: u64, task: impl FnOnce(Rc<Queue>) -> T)
where
    T: Future<Output = ()> + 'static,
{
    let queue = Queue::new(world.driver().unwrap());
    queue.spawn(task(queue.clone()));
    for step in 0.. {
        if step == faulty {
            world.set_faults(Faults { io: 1, ..Faults::default() });
        }
        queue.turn(false, &mut Vec::new()).unwrap();
        if queue.live_tasks() == 0 {
            break;
        }
        world.step();
    }
    world.set_faults(Faults::default());
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
