//! Flushes of one file from several threads, under a model checker, on a kernel that cannot write a page and says so once.

use std::os::fd::RawFd;

use shuttle::thread;

use super::*;
use crate::disk::block_on;
use crate::io::{Completion, Driver, IoSeg, Notify, Op, OpenMode, Storage, Work, memory};
use crate::sync::{Arc, Mutex, model_of};

/// What the kernel knows of the file.
#[derive(Default)]
struct Kernel {
    /// A page that it could not write.
    failed: AtomicBool,
    /// Somebody was told.
    told: AtomicBool,
}

/// One thread's way to the kernel.
struct Calls {
    kernel: Arc<Kernel>,
    done: Mutex<Vec<Completion>>,
    notify: Arc<dyn Notify>,
}

impl Driver for Calls {
    fn submit(&mut self, token: u64, _file: RawFd, op: Op) {
        assert!(matches!(op, Op::Flush { .. }));
        self.kernel.failed.store(true, Ordering::SeqCst);
        thread::yield_now();
        // From the second on it says that all is well.
        let told = self.kernel.told.swap(true, Ordering::SeqCst);
        let result = if told { Ok(0) } else { Err(std::io::Error::from_raw_os_error(libc::EIO)) };
        thread::yield_now();
        self.done.lock().push(Completion { token, result, data: Vec::<IoSeg>::new() });
    }

    fn compute(&mut self, _token: u64, _work: Work) {}

    fn watch(&mut self, _fd: RawFd, _token: u64) -> std::io::Result<()> {
        Ok(())
    }

    fn wait(&mut self, _block: bool, done: &mut Vec<Completion>) -> std::io::Result<()> {
        thread::yield_now();
        done.append(&mut self.done.lock());
        Ok(())
    }

    fn notifier(&self) -> Arc<dyn Notify> {
        self.notify.clone()
    }
}

fn flushes() {
    let kernel = Arc::new(Kernel::default());
    let flushes = Arc::new(Flushes::new(false));
    let world = memory::memory();
    world.put(Path::new("/file"), Vec::new());
    let thread = || {
        let (kernel, flushes, world) = (kernel.clone(), flushes.clone(), world.clone());
        thread::spawn(move || {
            let notify = world.driver().unwrap().notifier();
            let queue = Queue::new(Box::new(Calls { kernel, done: Mutex::default(), notify }));
            let file = world.open(Path::new("/file"), OpenMode::default()).unwrap();
            let inner = queue.clone();
            let ended = block_on(&queue, async move {
                flushes.flush_for_all(&inner, &file, Path::new("/file"), Barrier::Data).await
            });
            assert!(ended.is_err(), "a flush promises what was lost");
        })
    };
    [thread(), thread(), thread()].into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn no_flush_promises_what_the_kernel_could_not_write() {
    model_of(flushes).holds().fails_with(Mutation::FlushesSideBySide);
}
