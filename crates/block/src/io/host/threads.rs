//! An I/O queue on a pool of threads, for hosts that refuse io_uring.
//!
//! Lock order: the job list and the results each have one lock, never held together nor across a system call.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::compute::{self, Computing};
use super::{Wake, drain_eventfd, take_signal};
use crate::io::{Completion, Driver, IoSeg, Notify, Op, Work};

const THREADS: usize = 4;
const MAX_SEGS: usize = 1024;

struct Job {
    token: u64,
    file: RawFd,
    op: Op,
}

#[derive(Default)]
struct Jobs {
    list: VecDeque<Job>,
    closed: bool,
}

struct Pool {
    jobs: Mutex<Jobs>,
    more: Condvar,
    done: Mutex<Vec<Completion>>,
    wake: Arc<Wake>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The queue.
pub(super) struct Threads {
    pool: Arc<Pool>,
    workers: Vec<JoinHandle<()>>,
    watches: Vec<(RawFd, u64)>,
    computing: Computing,
}

impl Threads {
    /// A queue whose computing `computes` does.
    pub(super) fn new(computes: &Arc<compute::Pool>) -> io::Result<Self> {
        let pool =
            Arc::new(Pool { jobs: Mutex::default(), more: Condvar::new(), done: Mutex::default(), wake: Wake::new()? });
        let computing = Computing::new(computes, pool.wake.clone());
        let mut queue = Self { pool, workers: Vec::new(), watches: Vec::new(), computing };
        for _ in 0..THREADS {
            let pool = queue.pool.clone();
            queue.workers.push(std::thread::Builder::new().name("block-io".into()).spawn(move || work(&pool))?);
        }
        Ok(queue)
    }
}

fn work(pool: &Pool) {
    loop {
        let job = {
            let mut jobs = locked(&pool.jobs);
            loop {
                if let Some(job) = jobs.list.pop_front() {
                    break job;
                }
                if jobs.closed {
                    return;
                }
                jobs = pool.more.wait(jobs).unwrap_or_else(PoisonError::into_inner);
            }
        };
        let (result, data) = run(job.file, job.op);
        locked(&pool.done).push(Completion { token: job.token, result, data });
        pool.wake.notify();
    }
}

/// Carries an operation out on the calling thread.
pub(super) fn run(file: RawFd, op: Op) -> (io::Result<usize>, Vec<IoSeg>) {
    match op {
        Op::Read { offset, data } => {
            let n = data.len().min(MAX_SEGS) as i32;
            // SAFETY: IoSeg is laid out as iovec, the list is ours, and its memory is valid until the completion (IoSeg::new).
            let r = unsafe { libc::preadv(file, data.as_ptr().cast(), n, offset.cast_signed()) };
            (check(r), data)
        }
        Op::Write { offset, data } => {
            let n = data.len().min(MAX_SEGS) as i32;
            // SAFETY: as for reading.
            let r = unsafe { libc::pwritev(file, data.as_ptr().cast(), n, offset.cast_signed()) };
            (check(r), data)
        }
        Op::Flush { .. } => {
            // SAFETY: no memory is involved.
            let r = unsafe { libc::fdatasync(file) };
            (check(r as isize), Vec::new())
        }
        Op::WriteZeroes { offset, len } => (fallocate(file, libc::FALLOC_FL_ZERO_RANGE, offset, len), Vec::new()),
        Op::Punch { offset, len } => {
            (fallocate(file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, len), Vec::new())
        }
        Op::Allocate { offset, len } => (fallocate(file, 0, offset, len), Vec::new()),
        Op::SetLength { len } => (set_length(file, len), Vec::new()),
    }
}

fn fallocate(file: RawFd, mode: i32, offset: u64, len: u64) -> io::Result<usize> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::fallocate(file, mode, offset.cast_signed(), len.cast_signed()) } as isize)
}

pub(super) fn set_length(file: RawFd, len: u64) -> io::Result<usize> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::ftruncate(file, len.cast_signed()) } as isize)
}

fn check(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

impl Driver for Threads {
    fn submit(&mut self, token: u64, file: RawFd, op: Op) {
        locked(&self.pool.jobs).list.push_back(Job { token, file, op });
        self.pool.more.notify_one();
    }

    fn compute(&mut self, token: u64, work: Work) {
        self.computing.start(token, work);
    }

    fn watch(&mut self, fd: RawFd, token: u64) -> io::Result<()> {
        self.watches.push((fd, token));
        Ok(())
    }

    fn wait(&mut self, block: bool, done: &mut Vec<Completion>) -> io::Result<()> {
        let wake = self.pool.wake.0.as_raw_fd();
        let pollfd = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut fds: Vec<_> = std::iter::once(wake).chain(self.watches.iter().map(|w| w.0)).map(pollfd).collect();
        // SAFETY: the array is ours and has as many entries as are named.
        let n = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, if block { -1 } else { 0 }) };
        if n < 0 {
            let error = io::Error::last_os_error();
            return if error.raw_os_error() == Some(libc::EINTR) { Ok(()) } else { Err(error) };
        }
        if fds[0].revents & (libc::POLLERR | libc::POLLNVAL) != 0 {
            return Err(io::Error::other("the queue's own eventfd is broken or closed"));
        }
        // Emptied before the results are taken, so that a result that comes later signals again.
        drain_eventfd(wake);
        done.append(&mut locked(&self.pool.done));
        self.computing.take(done);
        let mut polled = fds.iter().skip(1);
        self.watches.retain(|&(fd, token)| {
            let events = polled.next().map_or(0, |p| i32::from(p.revents));
            let signalled = take_signal(fd, events);
            // One that is broken is not polled again: it would be ready at once, for ever.
            let keep = signalled.is_ok();
            if let Some(result) = signalled.map(|signalled| signalled.then_some(0)).transpose() {
                done.push(Completion { token, result, data: Vec::new() });
            }
            keep
        });
        Ok(())
    }

    fn has_news(&mut self) -> bool {
        !locked(&self.pool.done).is_empty() || self.computing.has_news()
    }

    fn notifier(&self) -> Arc<dyn Notify> {
        self.pool.wake.clone()
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        // Workers finish what is listed before they see that the list is closed.
        locked(&self.pool.jobs).closed = true;
        self.pool.more.notify_all();
        for worker in self.workers.drain(..) {
            if worker.join().is_err() {
                tracing::error!("an I/O thread panicked");
            }
        }
    }
}
