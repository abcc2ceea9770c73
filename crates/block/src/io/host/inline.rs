//! An I/O queue that does each operation at once, on the calling thread: for the few of opening and closing, where
//! setting up a ring would cost more than it saves.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use super::{Wake, threads};
use crate::io::{Completion, Driver, Notify, Op, Work};

/// The queue.
pub(super) struct Inline {
    done: Vec<Completion>,
    wake: Arc<Wake>,
}

impl Inline {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { done: Vec::new(), wake: Wake::new()? })
    }
}

impl Driver for Inline {
    fn submit(&mut self, token: u64, file: RawFd, op: Op) {
        let (result, data) = threads::run(file, op);
        self.done.push(Completion { token, result, data });
    }

    fn compute(&mut self, token: u64, work: Work) {
        work();
        self.done.push(Completion { token, result: Ok(0), data: Vec::new() });
    }

    fn watch(&mut self, _fd: RawFd, _token: u64) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "an inline queue watches no descriptors"))
    }

    fn wait(&mut self, block: bool, done: &mut Vec<Completion>) -> io::Result<()> {
        if block && self.done.is_empty() {
            super::sleep_until_signalled(&self.wake);
        }
        done.append(&mut self.done);
        Ok(())
    }

    fn notifier(&self) -> Arc<dyn Notify> {
        self.wake.clone()
    }
}
