//! A thread that falls asleep while another makes one of its tasks ready, under a model checker: no wake-up is lost.

use super::*;
use crate::disk::block_on;
use crate::io::Work;
use crate::sync::{AsyncMutex, model_of};

/// A driver that does nothing, and sleeps until it is woken.
struct Sleeper(Arc<Bell>);

/// Whether it was rung; and the sleeper's thread.
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    sleeper: Mutex<Option<shuttle::thread::Thread>>,
}

impl Notify for Bell {
    fn notify(&self) {
        *self.rung.lock() = true;
        if let Some(sleeper) = &*self.sleeper.lock() {
            sleeper.unpark();
        }
    }
}

impl Driver for Sleeper {
    fn submit(&mut self, _token: u64, _file: RawFd, _op: Op) {}

    fn compute(&mut self, _token: u64, _work: Work) {}

    fn watch(&mut self, _fd: RawFd, _token: u64) -> io::Result<()> {
        Ok(())
    }

    fn wait(&mut self, block: bool, _done: &mut Vec<Completion>) -> io::Result<()> {
        *self.0.sleeper.lock() = Some(shuttle::thread::current());
        while block && !std::mem::take(&mut *self.0.rung.lock()) {
            shuttle::thread::park();
        }
        Ok(())
    }

    fn notifier(&self) -> Arc<dyn Notify> {
        self.0.clone()
    }
}

/// Tasks on two threads hand a lock to each other.
fn handing_over() {
    let lock = Arc::new(AsyncMutex::default());
    let thread = || {
        let lock = lock.clone();
        shuttle::thread::spawn(move || {
            let queue = Queue::new(Box::new(Sleeper(Arc::default())));
            let inner = queue.clone();
            block_on(&queue, async move {
                let _held = lock.lock().await;
                // So that others come meanwhile.
                inner.give_way().await;
                Ok(())
            })
            .unwrap();
        })
    };
    [thread(), thread()].into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn a_task_that_another_thread_makes_ready_runs() {
    model_of(handing_over).holds().fails_with(Mutation::LooksBeforeItSleeps);
}
