//! An I/O queue on io_uring: one ring, one thread, one system call to send and to wait.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::{Wake, drain_eventfd};
use crate::io::{Completion, Driver, IoSeg, Notify, Op};

/// Submission entries. The completion ring has twice as many; more operations than that wait in the backlog.
const ENTRIES: u32 = 128;

/// The most segments in one vectored operation (Linux's `UIO_MAXIOV`); the rest shows as a short one.
const MAX_SEGS: usize = 1024;

/// User data of watched descriptors: this bit, and the index into `watches`.
const WATCH: u64 = 1 << 63;

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
    watches: Vec<Watch>,
    rearm: Vec<usize>,
    /// Operations that have no opcode worth having and are done at once.
    done_inline: Vec<Completion>,
}

impl Uring {
    pub(super) fn new() -> io::Result<Self> {
        // The flags that let completions run on our own thread at our own time came with Linux 6.1.
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .setup_defer_taskrun()
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
            watches: Vec::new(),
            rearm: Vec::new(),
            done_inline: Vec::new(),
        };
        queue.add_watch(wake.0.as_raw_fd(), None);
        // A kernel that refuses the first wait refuses all: say so now, while there is a way out.
        queue.ring.submit()?;
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
            self.push(&poll);
        }
    }

    /// Puts an entry into the submission ring, making room if it is full.
    fn push(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: what the entry points to (a segment list in `slots`, the memory that it names) stays valid until
            // its completion is reaped: slots are emptied only there, and Drop waits for all of them.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return;
            }
            // EBUSY and EAGAIN pass once completions are reaped, which submitting does on its way.
            if let Err(e) = self.ring.submit()
                && !matches!(e.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN))
            {
                tracing::error!("io_uring refuses submissions: {e}");
            }
        }
    }

    fn start(&mut self, token: u64, file: RawFd, op: Op) {
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
        self.push(&entry.user_data(u64::from(slot)));
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        // Borrowing the completion ring ends before `push` may be needed again.
        let mut rearm = std::mem::take(&mut self.rearm);
        for cqe in self.ring.completion() {
            let user_data = cqe.user_data();
            if user_data & WATCH != 0 {
                let index = (user_data & !WATCH) as usize;
                let watch = &self.watches[index];
                let signalled = drain_eventfd(watch.fd);
                if let (true, Some(token)) = (signalled, watch.token) {
                    done.push(Completion { token, result: Ok(0), data: Vec::new() });
                }
                if !cqueue::more(cqe.flags()) {
                    rearm.push(index);
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
        self.rearm = rearm;
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

    fn watch(&mut self, fd: RawFd, token: u64) -> io::Result<()> {
        self.add_watch(fd, Some(token));
        Ok(())
    }

    fn wait(&mut self, block: bool, done: &mut Vec<Completion>) -> io::Result<()> {
        let before = done.len();
        done.append(&mut self.done_inline);
        let block = block && done.len() == before;
        loop {
            // With deferred task work completions only appear inside this call, so it is made even when nothing is new.
            match self.ring.submit_and_wait(usize::from(block)) {
                Ok(_) => break,
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR)) => {}
                // The completion ring is full: take what is there, and send the rest then.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN)) => break,
                Err(e) => return Err(e),
            }
        }
        self.reap(done);
        Ok(())
    }

    fn notifier(&self) -> Arc<dyn Notify> {
        self.wake.clone()
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        let mut done = Vec::new();
        while self.in_flight > 0 || !self.backlog.is_empty() {
            if let Err(e) = self.wait(true, &mut done) {
                // Memory that the kernel may still write to must not be freed under it.
                tracing::error!("io_uring fails while requests are in flight: {e}");
                std::process::abort();
            }
            done.clear();
        }
    }
}
