//! The pool that computes: threads that compress and decode clusters, so that the thread of a queue need not, and one queue uses
//! all processors.
//!
//! They start as there is work for them, up to one for each processor, and end when the pool is dropped.
//!
//! Lock order: the pool's list and each queue's list of what is over have one lock each, never held together nor while computing.

use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::Wake;
use crate::io::{Completion, Notify, Work};

/// For each thread, the jobs that may wait: enough that none is idle, and no more than memory has room for.
const WAITING: usize = 32;

struct Job {
    work: Work,
    token: u64,
    report: Arc<Report>,
}

/// Where a queue hears of what is over.
struct Report {
    over: Mutex<Vec<u64>>,
    wake: Arc<Wake>,
}

#[derive(Default)]
struct Jobs {
    list: VecDeque<Job>,
    /// Threads that wait for a job.
    idle: usize,
    closed: bool,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    jobs: Mutex<Jobs>,
    more: Condvar,
}

/// The pool.
pub(super) struct Pool {
    shared: Arc<Shared>,
    processors: usize,
}

impl Default for Pool {
    fn default() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self { shared: Arc::default(), processors }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({} processors)", self.processors)
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// Takes a job; gives it back if there is no room, or no thread to be had.
    fn take(&self, job: Job) -> Result<(), Job> {
        let mut jobs = locked(&self.shared.jobs);
        if jobs.list.len() >= WAITING * self.processors {
            return Err(job);
        }
        if jobs.idle <= jobs.list.len() && jobs.threads.len() < self.processors {
            let shared = self.shared.clone();
            let thread = std::thread::Builder::new().name("block-compute".into()).spawn(move || serve(&shared));
            jobs.threads.extend(thread.inspect_err(|e| tracing::debug!("no thread that computes: {e}")));
        }
        if jobs.threads.is_empty() {
            return Err(job);
        }
        jobs.list.push_back(job);
        drop(jobs);
        self.shared.more.notify_one();
        Ok(())
    }
}

fn serve(shared: &Shared) {
    loop {
        let job = {
            let mut jobs = locked(&shared.jobs);
            loop {
                if jobs.closed {
                    return;
                }
                if let Some(job) = jobs.list.pop_front() {
                    break job;
                }
                jobs.idle += 1;
                jobs = shared.more.wait(jobs).unwrap_or_else(PoisonError::into_inner);
                jobs.idle -= 1;
            }
        };
        job.run();
    }
}

impl Job {
    fn run(self) {
        // Whoever waits is told in any case, and finds that nothing came of it.
        if catch_unwind(AssertUnwindSafe(self.work)).is_err() {
            tracing::error!("work of the pool that computes panicked");
        }
        locked(&self.report.over).push(self.token);
        self.report.wake.notify();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let threads = {
            let mut jobs = locked(&self.shared.jobs);
            jobs.closed = true;
            // No queue is left to hear of them.
            jobs.list.clear();
            std::mem::take(&mut jobs.threads)
        };
        self.shared.more.notify_all();
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a thread that computes panicked");
            }
        }
    }
}

/// One queue's part in the pool.
pub(super) struct Computing {
    pool: Arc<Pool>,
    report: Arc<Report>,
}

impl Computing {
    /// For the queue that `wake` wakes.
    pub(super) fn new(pool: &Arc<Pool>, wake: Arc<Wake>) -> Self {
        Self { pool: pool.clone(), report: Arc::new(Report { over: Mutex::default(), wake }) }
    }

    /// Has work done, by the calling thread if the pool cannot.
    pub(super) fn start(&self, token: u64, work: Work) {
        if let Err(job) = self.pool.take(Job { work, token, report: self.report.clone() }) {
            job.run();
        }
    }

    /// Whether something is over that has not been taken.
    pub(super) fn has_news(&self) -> bool {
        !locked(&self.report.over).is_empty()
    }

    /// Appends what is over.
    pub(super) fn take(&self, done: &mut Vec<Completion>) {
        let over = std::mem::take(&mut *locked(&self.report.over));
        done.extend(over.into_iter().map(|token| Completion { token, result: Ok(0), data: Vec::new() }));
    }
}

#[cfg(test)]
#[path = "compute_test.rs"]
mod tests;
