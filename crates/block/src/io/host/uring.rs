//! An I/O queue on io_uring: one ring, one thread, one system call to send and to wait.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::compute::{Computing, Pool};
use super::{Wake, take_signal};
use crate::io::{Completion, Driver, IoSeg, Notify, Op, Work, segs_len};

/// Submission entries: as many are sent at once. The completion ring has twice as many; more operations than that wait in the backlog.
const ENTRIES: u32 = 128;

/// The most segments in one vectored operation (Linux's `UIO_MAXIOV`); the rest shows as a short one.
const MAX_SEGS: usize = 1024;

/// User data of watched descriptors: this bit, and the index into `watches`.
const WATCH: u64 = 1 << 63;

/// How long, and how often in a row, the kernel may be out of memory for requests before the queue gives up.
const REFUSAL_PAUSE: Duration = Duration::from_millis(1);
const REFUSALS_MAX: u32 = 10_000;

/// `IORING_ENTER_GETEVENTS`: completions that were deferred appear now.
const GET_EVENTS: u32 = 1;

/// A write to the page cache that takes longer than this has waited for the disk, and for the next while none is done by ourselves.
const SLOW_WRITE: Duration = Duration::from_micros(500);
const SLOW_SPELL: Duration = Duration::from_millis(100);

/// A read among many that is worth a thread's waking up: copying takes longer.
const BULK_READ: u64 = 128 << 10;

struct InFlight {
    token: u64,
    // The kernel reads the list at submission only, but the address must hold until then.
    data: Vec<IoSeg>,
}

struct Watch {
    fd: RawFd,
    /// None: our own wake-up, which nobody is told of.
    token: Option<u64>,
}

/// The queue.
pub(super) struct Uring {
    ring: IoUring,
    wake: Arc<Wake>,
    slots: Vec<Option<InFlight>>,
    free: Vec<u32>,
    in_flight: usize,
    capacity: usize,
    backlog: VecDeque<(u64, RawFd, Op)>,
    /// Entries that the kernel has not taken yet, the oldest first.
    unsent: VecDeque<squeue::Entry>,
    /// How many of them, from the first on, lie in the submission ring.
    in_ring: usize,
    /// How often in a row the kernel took nothing and nothing completed.
    refusals: u32,
    watches: Vec<Watch>,
    rearm: Vec<usize>,
    /// Our own wake-up cannot be watched any more.
    broken: Option<io::Error>,
    /// Until when writes to the page cache are the ring's.
    slow_until: Option<Instant>,
    /// Operations that are done at once: those that have no opcode worth having, and quick ones.
    done_inline: Vec<Completion>,
    computing: Computing,
}

impl Uring {
    /// A queue whose computing `computes` does.
    pub(super) fn new(computes: &Arc<Pool>) -> io::Result<Self> {
        // The flags that let completions run on our own thread at our own time (and tell that there are some, so that looking
        // without sleeping finds them) came with Linux 6.1.
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .build(ENTRIES)
            .or_else(|_| IoUring::new(ENTRIES))?;
        let capacity = ring.params().cq_entries() as usize - 16;
        let wake = Wake::new()?;
        let mut queue = Self {
            ring,
            wake: wake.clone(),
            slots: Vec::new(),
            free: Vec::new(),
            in_flight: 0,
            capacity,
            backlog: VecDeque::new(),
            unsent: VecDeque::new(),
            in_ring: 0,
            refusals: 0,
            watches: Vec::new(),
            rearm: Vec::new(),
            broken: None,
            slow_until: None,
            done_inline: Vec::new(),
            computing: Computing::new(computes, wake.clone()),
        };
        queue.add_watch(wake.0.as_raw_fd(), None);
        // A kernel that refuses the first wait refuses all: say so now, while there is a way out.
        queue.send(false)?.map_or(Ok(()), Err)?;
        Ok(queue)
    }

    fn add_watch(&mut self, fd: RawFd, token: Option<u64>) {
        self.watches.push(Watch { fd, token });
        self.rearm.push(self.watches.len() - 1);
        self.arm_watches();
    }

    fn arm_watches(&mut self) {
        while let Some(index) = self.rearm.pop() {
            let poll = opcode::PollAdd::new(types::Fd(self.watches[index].fd), libc::POLLIN as u32)
                .multi(true)
                .build()
                .user_data(WATCH | index as u64);
            self.unsent.push_back(poll);
        }
    }

    /// Moves entries into the submission ring as far as it has room.
    fn fill_ring(&mut self) {
        let mut ring = self.ring.submission();
        while let Some(entry) = self.unsent.get(self.in_ring) {
            // SAFETY: what the entry points to (a segment list in `slots`, the memory that it names) stays valid until
            // its completion is reaped: slots are emptied only there, and Drop waits for all that the kernel has taken.
            if unsafe { ring.push(entry) }.is_err() {
                return;
            }
            self.in_ring += 1;
        }
    }

    /// Sends all entries; with `block`, also waits for a completion. Tells why, if the kernel has no room for all of them now.
    fn send(&mut self, block: bool) -> io::Result<Option<io::Error>> {
        loop {
            self.fill_ring();
            let all = self.in_ring == self.unsent.len();
            // With deferred task work completions only appear inside this call, so it is made even when nothing is new.
            let entered = self.ring.submit_and_wait(usize::from(block && all));
            let taken = self.in_ring - self.ring.submission().len().min(self.in_ring);
            self.unsent.drain(..taken);
            self.in_ring -= taken;
            if taken > 0 {
                self.refusals = 0;
            }
            match entered {
                Ok(_) if self.unsent.is_empty() => return Ok(None),
                Ok(_) if taken > 0 => {}
                Ok(_) => return Ok(Some(io::Error::from_raw_os_error(libc::EAGAIN))),
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                Err(e) if matches!(e.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN)) => return Ok(Some(e)),
                Err(e) => return Err(e),
            }
        }
    }

    /// Sends what is pending and takes what has completed.
    fn round(&mut self, block: bool, done: &mut Vec<Completion>) -> io::Result<()> {
        let before = done.len();
        let refusal = self.send(block)?;
        if refusal.is_some() {
            // What completes makes room, but the call that was refused did not look.
            // SAFETY: nothing is submitted, and no memory is passed.
            unsafe { self.ring.submitter().enter::<libc::sigset_t>(0, 0, GET_EVENTS, None) }?;
        }
        self.reap(done);
        match refusal {
            Some(e) if done.len() == before && self.refusals >= REFUSALS_MAX => return Err(e),
            Some(_) if done.len() == before => {
                self.refusals += 1;
                std::thread::sleep(REFUSAL_PAUSE);
            }
            _ => self.refusals = 0,
        }
        Ok(())
    }

    /// How many operations the kernel has taken and not completed.
    fn taken(&self) -> usize {
        let unsent = self.unsent.iter().filter(|entry| entry.get_user_data() & WATCH == 0).count();
        self.in_flight - unsent
    }

    fn start(&mut self, token: u64, file: RawFd, op: Op) {
        self.start_with(token, file, op, squeue::Flags::empty());
    }

    fn start_with(&mut self, token: u64, file: RawFd, op: Op, flags: squeue::Flags) {
        let fd = types::Fd(file);
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            (self.slots.len() - 1) as u32
        });
        let (entry, data) = match op {
            Op::Read { offset, data } => (transfer(fd, offset, &data, false), data),
            Op::Write { offset, data } => (transfer(fd, offset, &data, true), data),
            Op::Flush { .. } => (opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(), Vec::new()),
            Op::WriteZeroes { offset, len } => (allocate(fd, offset, len, libc::FALLOC_FL_ZERO_RANGE), Vec::new()),
            Op::Punch { offset, len } => {
                (allocate(fd, offset, len, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE), Vec::new())
            }
            Op::Allocate { offset, len } => (allocate(fd, offset, len, 0), Vec::new()),
            Op::SetLength { len } => {
                // The ring learned ftruncate only with Linux 6.9, and it is rare.
                let result = super::threads::set_length(file, len);
                self.free.push(slot);
                self.done_inline.push(Completion { token, result, data: Vec::new() });
                return;
            }
        };
        self.slots[slot as usize] = Some(InFlight { token, data });
        self.in_flight += 1;
        self.unsent.push_back(entry.user_data(u64::from(slot)).flags(flags));
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        for cqe in self.ring.completion() {
            let user_data = cqe.user_data();
            if user_data & WATCH != 0 {
                let index = (user_data & !WATCH) as usize;
                let watch = &self.watches[index];
                let signalled = match cqe.result() {
                    n if n < 0 => Err(io::Error::from_raw_os_error(-n)),
                    events => take_signal(watch.fd, events),
                };
                // One that is broken is not armed again: it would complete at once, for ever.
                if signalled.is_ok() && !cqueue::more(cqe.flags()) {
                    self.rearm.push(index);
                }
                match (signalled, watch.token) {
                    (Ok(true), Some(token)) => done.push(Completion { token, result: Ok(0), data: Vec::new() }),
                    (Err(e), Some(token)) => done.push(Completion { token, result: Err(e), data: Vec::new() }),
                    (Err(e), None) => self.broken = Some(e),
                    (Ok(_), _) => {}
                }
                continue;
            }
            let Some(op) = self.slots.get_mut(user_data as usize).and_then(Option::take) else {
                continue;
            };
            self.free.push(user_data as u32);
            self.in_flight -= 1;
            let result = match cqe.result() {
                n if n < 0 => Err(io::Error::from_raw_os_error(-n)),
                n => Ok(n as usize),
            };
            done.push(Completion { token: op.token, result, data: op.data });
        }
        self.arm_watches();
        while self.in_flight < self.capacity {
            let Some((token, file, op)) = self.backlog.pop_front() else { break };
            self.start(token, file, op);
        }
    }
}

fn transfer(fd: types::Fd, offset: u64, data: &[IoSeg], write: bool) -> squeue::Entry {
    if let [seg] = data {
        // More than 2 GiB at once comes back short.
        let len = seg.len().min(1 << 30) as u32;
        return if write {
            opcode::Write::new(fd, seg.base(), len).offset(offset).build()
        } else {
            opcode::Read::new(fd, seg.base(), len).offset(offset).build()
        };
    }
    let count = data.len().min(MAX_SEGS) as u32;
    let list = data.as_ptr().cast::<libc::iovec>();
    if write {
        opcode::Writev::new(fd, list, count).offset(offset).build()
    } else {
        opcode::Readv::new(fd, list, count).offset(offset).build()
    }
}

fn allocate(fd: types::Fd, offset: u64, len: u64, mode: i32) -> squeue::Entry {
    opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build()
}

impl Driver for Uring {
    fn submit(&mut self, token: u64, file: RawFd, op: Op) {
        if self.in_flight < self.capacity {
            self.start(token, file, op);
        } else {
            self.backlog.push_back((token, file, op));
        }
    }

    /// Where a file system cannot promise that a write to the page cache does not sleep (ext4), the ring hands each one to a
    /// worker thread, which costs several times what the write does. So it is done here, as long as that is quick: a disk that is
    /// behind with writing back holds whoever writes, and must not hold the reads of this queue.
    fn submit_cached(&mut self, token: u64, file: RawFd, op: Op) {
        let now = Instant::now();
        if self.slow_until.is_some_and(|until| now < until) {
            return self.submit(token, file, op);
        }
        let (result, data) = super::threads::run(file, op);
        self.slow_until = (now.elapsed() > SLOW_WRITE).then(|| now + SLOW_SPELL);
        self.done_inline.push(Completion { token, result, data });
    }

    /// Reads go to the ring's worker threads, though the page cache may have all of it, and writes are done here: so both copy at once. The
    /// other way round writes to one file would wait for each other in the kernel, and each for a thread that wakes up.
    fn submit_bulk(&mut self, token: u64, file: RawFd, op: Op) {
        match &op {
            Op::Write { .. } => {
                let (result, data) = super::threads::run(file, op);
                self.done_inline.push(Completion { token, result, data });
            }
            Op::Read { data, .. } if self.in_flight < self.capacity && segs_len(data) >= BULK_READ => {
                self.start_with(token, file, op, squeue::Flags::ASYNC);
            }
            _ => self.submit(token, file, op),
        }
    }

    fn compute(&mut self, token: u64, work: Work) {
        self.computing.start(token, work);
    }

    fn watch(&mut self, fd: RawFd, token: u64) -> io::Result<()> {
        self.add_watch(fd, Some(token));
        Ok(())
    }

    fn wait(&mut self, block: bool, done: &mut Vec<Completion>) -> io::Result<()> {
        let before = done.len();
        done.append(&mut self.done_inline);
        let block = block && done.len() == before;
        self.round(block, done)?;
        // After the signals were taken, so that what ends later signals again.
        self.computing.take(done);
        self.broken.take().map_or(Ok(()), Err)
    }

    fn has_news(&mut self) -> bool {
        // Completions that the kernel has put off show by their flag, which also tells of those of watched descriptors.
        !self.done_inline.is_empty() || !self.ring.completion().is_empty() || self.ring.submission().taskrun()
    }

    fn notifier(&self) -> Arc<dyn Notify> {
        self.wake.clone()
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        let mut done = Vec::new();
        while self.in_flight > 0 || !self.backlog.is_empty() {
            if let Err(e) = self.round(true, &mut done) {
                tracing::error!("io_uring fails while requests are in flight: {e}");
                if self.taken() > 0 {
                    // Memory that the kernel may still write to must not be freed under it.
                    std::process::abort();
                }
                return;
            }
            done.clear();
        }
    }
}

#[cfg(test)]
#[path = "uring_test.rs"]
mod tests;
