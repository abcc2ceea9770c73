//! One thread's hub of the engine: it sends operations to its I/O driver, runs the tasks that wait for them, and finishes
//! short reads and writes.
//!
//! A request whose data lies in one place needs no task: it is a *direct* operation, whose completion goes straight to
//! the caller. Everything else is a task: a future that awaits operations of this queue.
//!
//! Not here: what requests mean ([`crate::disk`]), where data lies ([`crate::qcow2`]).
//!
//! Locks: other threads wake tasks through `Remote`, whose lock is held only to push and to take.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::RawFd;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Wake, Waker};

use self::short::{Rest, Resumed};
use crate::io::{Barrier, Buffer, Completion, Driver, File, IoSeg, Notify, Op, is_aligned, segs_len, zero_segs};
use crate::mutation::Mutation;
use crate::sync::{Arc, AtomicBool, Mutex, Ordering, Permit, Permits};

mod short;

/// Tasks that became ready by another thread's (or their own) doing.
struct Remote {
    ready: Mutex<Vec<(usize, u64)>>,
    sleeping: AtomicBool,
    notify: Arc<dyn Notify>,
}

struct TaskWaker {
    remote: Arc<Remote>,
    slot: usize,
    generation: u64,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.remote.ready.lock().push((self.slot, self.generation));
        // Ordered after the push: either the sleeper's last look sees the push, or we see that it sleeps.
        if self.remote.sleeping.swap(false, Ordering::SeqCst) {
            self.remote.notify.notify();
        }
    }
}

type Task = Pin<Box<dyn Future<Output = ()>>>;

#[derive(Default)]
struct TaskSlot {
    generation: u64,
    task: Option<Task>,
    waker: Option<Waker>,
}

/// Who hears of an operation's end.
enum Owner {
    /// The caller of [`Queue::direct`], by its tag.
    Direct(u64),
    /// A task, which polls for it.
    Task { waker: Option<Waker>, result: Option<(io::Result<()>, Vec<IoSeg>)>, abandoned: bool },
}

struct OpSlot {
    owner: Owner,
    file: RawFd,
    /// What offsets and lengths must be multiples of.
    align: u32,
    /// What is left to do of a read or a write after a short one.
    rest: Option<Rest>,
    /// Buffers that the operation reads or fills, kept alive until it is over even if the task is gone.
    keep: Vec<Arc<Buffer>>,
}

/// What [`Queue::turn`] has to tell.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// A direct operation is over.
    Direct { tag: u64, result: io::Result<()>, data: Vec<IoSeg> },
    /// A watched descriptor was signalled.
    Watch { tag: u64 },
}

/// Marks the tokens of watched descriptors.
const WATCH: u64 = 1 << 63;

/// The most bytes of a write that a driver may do at once ([`Driver::submit_cached`]) when nothing else is under way: some 50 µs of
/// copying. Otherwise the most is where handing it over costs less than what can be done meanwhile.
const CACHED_WRITE_MAX: u64 = 256 << 10;
const CACHED_WRITE_MAX_BUSY: u64 = 16 << 10;

/// How many clusters a queue compresses or decodes at once: their memory is the bound.
const COMPUTED_AT_ONCE: usize = 16;

/// The hub. Used through `Rc` by the tasks of one thread.
pub(crate) struct Queue {
    /// None once the queue is [shut down](Queue::shut_down).
    driver: RefCell<Option<Box<dyn Driver>>>,
    ops: RefCell<Slots>,
    tasks: RefCell<Vec<TaskSlot>>,
    free_tasks: RefCell<Vec<usize>>,
    live_tasks: Cell<usize>,
    ready: RefCell<VecDeque<(usize, u64)>>,
    /// Tasks that let others go first: they are ready again at the next turn.
    giving_way: RefCell<Vec<Waker>>,
    completions: RefCell<Vec<Completion>>,
    permits: Permits,
    remote: Arc<Remote>,
    /// Operations that are over without the driver: of what stands in a file's place.
    served: RefCell<Vec<Completion>>,
    /// Nobody waits for this queue's single operations, only for all of them.
    bulk: bool,
}

#[derive(Default)]
struct Slots {
    slots: Vec<Option<OpSlot>>,
    free: Vec<usize>,
}

impl Slots {
    fn insert(&mut self, op: OpSlot) -> usize {
        if let Some(slot) = self.free.pop() {
            self.slots[slot] = Some(op);
            return slot;
        }
        self.slots.push(Some(op));
        self.slots.len() - 1
    }

    fn remove(&mut self, slot: usize) {
        self.slots[slot] = None;
        self.free.push(slot);
    }

    fn in_use(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

impl Queue {
    pub(crate) fn new(driver: Box<dyn Driver>) -> Rc<Self> {
        Self::with(driver, false)
    }

    /// A queue for who moves much, and waits for all of it: reads and writes through the page cache go by [`Driver::submit_bulk`].
    pub(crate) fn for_copying(driver: Box<dyn Driver>) -> Rc<Self> {
        Self::with(driver, true)
    }

    fn with(driver: Box<dyn Driver>, bulk: bool) -> Rc<Self> {
        let remote =
            Arc::new(Remote { ready: Mutex::default(), sleeping: AtomicBool::new(false), notify: driver.notifier() });
        Rc::new(Self {
            driver: RefCell::new(Some(driver)),
            ops: RefCell::default(),
            tasks: RefCell::default(),
            free_tasks: RefCell::default(),
            live_tasks: Cell::new(0),
            ready: RefCell::default(),
            giving_way: RefCell::default(),
            completions: RefCell::default(),
            permits: Permits::new(COMPUTED_AT_ONCE),
            remote,
            served: RefCell::default(),
            bulk,
        })
    }

    /// Sends a read or a write whose end is told by [`Outcome::Direct`] with `tag`.
    pub(crate) fn direct(self: &Rc<Self>, tag: u64, file: &File, op: Op) {
        self.start(Owner::Direct(tag), file, op, Vec::new());
    }

    pub(crate) fn watch(&self, fd: RawFd, tag: u64) -> io::Result<()> {
        self.driver.borrow_mut().as_mut().ok_or_else(shut)?.watch(fd, WATCH | tag)
    }

    fn start(self: &Rc<Self>, owner: Owner, file: &File, op: Op, keep: Vec<Arc<Buffer>>) -> usize {
        if file.layer().is_some() {
            let slot = self.ops.borrow_mut().insert(OpSlot { owner, file: -1, align: 1, rest: None, keep });
            self.serve(slot as u64, file.clone(), op);
            return slot;
        }
        let rest = match &op {
            Op::Read { offset, data } => Some(Rest::new(false, *offset, data)),
            Op::Write { offset, data } => Some(Rest::new(true, *offset, data)),
            _ => None,
        };
        let buffered = file.traits().align <= 1;
        let (align, file) = (file.traits().align.max(1), file.id());
        let mut ops = self.ops.borrow_mut();
        let slot = ops.insert(OpSlot { owner, file, align, rest, keep });
        let busy = ops.in_use() > 1 || self.live_tasks.get() > 1;
        drop(ops);
        let most = if busy { CACHED_WRITE_MAX_BUSY } else { CACHED_WRITE_MAX };
        let cached = buffered && matches!(&op, Op::Write { data, .. } if segs_len(data) <= most);
        // After the shutdown no task runs, so nothing comes here.
        if let Some(driver) = self.driver.borrow_mut().as_mut() {
            if self.bulk && buffered {
                driver.submit_bulk(slot as u64, file, op);
            } else if cached {
                driver.submit_cached(slot as u64, file, op);
            } else {
                driver.submit(slot as u64, file, op);
            }
        }
        slot
    }

    /// Has what stands in the place of `file` serve an operation, by others of this queue.
    fn serve(self: &Rc<Self>, token: u64, file: File, op: Op) {
        let queue = self.clone();
        self.spawn(async move {
            let result = match file.layer() {
                Some(layer) => layer.serve(&queue, &op, file.role()).await,
                None => Ok(()),
            };
            let data = match op {
                Op::Read { data, .. } | Op::Write { data, .. } => data,
                _ => Vec::new(),
            };
            let moved = segs_len(&data) as usize;
            queue.served.borrow_mut().push(Completion { token, result: result.map(|()| moved), data });
        });
    }

    /// An operation to be awaited. `keep` holds the buffers that its segments lie in.
    fn operate(self: &Rc<Self>, file: &File, op: Op, keep: Vec<Arc<Buffer>>) -> Operation {
        let owner = Owner::Task { waker: None, result: None, abandoned: false };
        Operation { queue: self.clone(), slot: Some(self.start(owner, file, op, keep)) }
    }

    /// Reads into segments; what lies past the end of the file reads as zeros.
    pub(crate) async fn read(self: &Rc<Self>, file: &File, offset: u64, data: Vec<IoSeg>) -> io::Result<()> {
        let align = file.traits().align;
        if is_aligned(align, offset, &data) {
            return self.operate(file, Op::Read { offset, data }, Vec::new()).await.0;
        }
        // Direct I/O: through a buffer that is aligned.
        let (start, len) = aligned_range(align, offset, segs_len(&data));
        let buffer = self.read_aligned(file, start, len).await?;
        buffer.scatter((offset - start) as usize, &data);
        Ok(())
    }

    /// Writes segments, of which some lie in `keep`.
    pub(crate) async fn write(
        self: &Rc<Self>,
        file: &File,
        offset: u64,
        data: Vec<IoSeg>,
        keep: Vec<Arc<Buffer>>,
    ) -> io::Result<()> {
        let align = file.traits().align;
        if align <= 1 {
            return self.operate(file, Op::Write { offset, data }, keep).await.0;
        }
        // Where blocks are larger than sectors, writes of neighbouring sectors meet in one block: one at a time.
        let (start, len) = aligned_range(align, offset, segs_len(&data));
        let _writing = file.writes().lock(start..start + len as u64).await;
        if is_aligned(align, offset, &data) {
            return self.operate(file, Op::Write { offset, data }, keep).await.0;
        }
        let mut buffer = self.read_aligned(file, start, len).await?;
        buffer.gather((offset - start) as usize, &data);
        let buffer = Arc::new(buffer);
        let data = vec![buffer.seg(0, len)];
        self.operate(file, Op::Write { offset: start, data }, vec![buffer]).await.0
    }

    async fn read_aligned(self: &Rc<Self>, file: &File, offset: u64, len: usize) -> io::Result<Buffer> {
        let buffer = Arc::new(Buffer::zeroed(len));
        let op = Op::Read { offset, data: vec![buffer.seg(0, len)] };
        self.operate(file, op, vec![buffer.clone()]).await.0?;
        // The operation is over and gave its share back.
        Arc::try_unwrap(buffer).map_err(|_| io::Error::other("a finished read still holds its buffer"))
    }

    /// Reads `len` bytes into a new buffer; what lies past the end of the file is zero.
    pub(crate) async fn read_buffer(self: &Rc<Self>, file: &File, offset: u64, len: usize) -> io::Result<Buffer> {
        let buffer = Arc::new(Buffer::zeroed(len));
        self.read(file, offset, vec![buffer.seg(0, len)]).await?;
        Arc::try_unwrap(buffer).map_err(|_| io::Error::other("a finished read still holds its buffer"))
    }

    /// Writes a buffer.
    pub(crate) async fn write_buffer(self: &Rc<Self>, file: &File, offset: u64, buffer: Buffer) -> io::Result<()> {
        let buffer = Arc::new(buffer);
        let data = vec![buffer.seg(0, buffer.len())];
        self.write(file, offset, data, vec![buffer]).await
    }

    /// Waits for leave to hold memory for computing: a queue holds only so much at once.
    pub(crate) async fn permit(&self) -> Permit<'_> {
        self.permits.take().await
    }

    /// Whether nothing waits for this thread but who asks, a task that holds a permit.
    pub(crate) fn is_quiet(&self) -> bool {
        self.live_tasks.get() <= 1 && self.permits.taken() <= 1
    }

    /// Has the pool that computes do `work`.
    pub(crate) async fn compute<T: Send + 'static>(
        self: &Rc<Self>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let result = Arc::new(Mutex::new(None));
        let told = result.clone();
        let work = Box::new(move || {
            let computed = work();
            *told.lock() = Some(computed);
        });
        let owner = Owner::Task { waker: None, result: None, abandoned: false };
        let slot = self.ops.borrow_mut().insert(OpSlot { owner, file: -1, align: 1, rest: None, keep: Vec::new() });
        if let Some(driver) = self.driver.borrow_mut().as_mut() {
            driver.compute(slot as u64, work);
        }
        Operation { queue: self.clone(), slot: Some(slot) }.await.0?;
        let computed = result.lock().take();
        computed.ok_or_else(|| io::Error::other("what was to be computed was cut short"))
    }

    pub(crate) async fn flush(self: &Rc<Self>, file: &File, barrier: Barrier) -> io::Result<()> {
        match self.operate(file, Op::Flush { barrier }, Vec::new()).await.0 {
            // A character device that has nothing to flush.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            flushed => flushed,
        }
    }

    /// Gives the range's space back. It reads as zeros then, but of a block device, which may keep what it does not like to give.
    pub(crate) async fn punch(self: &Rc<Self>, file: &File, offset: u64, len: u64) -> io::Result<()> {
        let (offset, len) = match file.traits().block_device {
            true => whole_blocks(file, offset, len),
            false => self.zero_ends(file, offset, len).await?,
        };
        if len == 0 { Ok(()) } else { self.operate(file, Op::Punch { offset, len }, Vec::new()).await.0 }
    }

    pub(crate) async fn write_zeroes(self: &Rc<Self>, file: &File, offset: u64, len: u64) -> io::Result<()> {
        let (offset, len) = self.zero_ends(file, offset, len).await?;
        if len == 0 { Ok(()) } else { self.operate(file, Op::WriteZeroes { offset, len }, Vec::new()).await.0 }
    }

    /// Writes zeros to the parts of blocks at the ends of a range, and gives the whole blocks in between.
    async fn zero_ends(self: &Rc<Self>, file: &File, offset: u64, len: u64) -> io::Result<(u64, u64)> {
        let (first, blocks) = whole_blocks(file, offset, len);
        for part in [offset..first, first + blocks..offset + len] {
            if !part.is_empty() {
                self.write(file, part.start, zero_segs(part.end - part.start), Vec::new()).await?;
            }
        }
        Ok((first, blocks))
    }

    pub(crate) async fn allocate(self: &Rc<Self>, file: &File, offset: u64, len: u64) -> io::Result<()> {
        self.operate(file, Op::Allocate { offset, len }, Vec::new()).await.0
    }

    pub(crate) async fn set_length(self: &Rc<Self>, file: &File, len: u64) -> io::Result<()> {
        self.operate(file, Op::SetLength { len }, Vec::new()).await.0
    }

    /// Starts a task. It runs when [`turn`](Self::turn) is called.
    pub(crate) fn spawn(self: &Rc<Self>, task: impl Future<Output = ()> + 'static) {
        let mut tasks = self.tasks.borrow_mut();
        let slot = self.free_tasks.borrow_mut().pop().unwrap_or_else(|| {
            tasks.push(TaskSlot::default());
            tasks.len() - 1
        });
        let entry = &mut tasks[slot];
        entry.generation += 1;
        let generation = entry.generation;
        entry.task = Some(Box::pin(task));
        entry.waker = Some(Arc::new(TaskWaker { remote: self.remote.clone(), slot, generation }).into());
        self.live_tasks.set(self.live_tasks.get() + 1);
        self.ready.borrow_mut().push_back((slot, generation));
    }

    /// Runs what is ready, sends what is pending, takes what has completed. With `block`, sleeps until something has, unless a task
    /// has ended: its outcome is news too, and perhaps the last.
    ///
    /// # Errors
    /// When the driver, or a watched descriptor, has failed: the queue is of no use then.
    pub(crate) fn turn(&self, block: bool, out: &mut Vec<Outcome>) -> io::Result<()> {
        self.giving_way.take().into_iter().for_each(Waker::wake);
        let ended = self.run_ready();
        let mut completions = self.completions.take();
        let rests = self.giving_way.borrow().is_empty() && self.served.borrow().is_empty();
        let may_sleep = block && !ended && rests && self.prepare_sleep();
        let waited = match self.driver.borrow_mut().as_mut() {
            Some(driver) => driver.wait(may_sleep, &mut completions),
            None => Err(shut()),
        };
        self.remote.sleeping.store(false, Ordering::SeqCst);
        completions.append(&mut self.served.borrow_mut());
        let mut outcome = waited;
        for completion in completions.drain(..) {
            let completed = self.complete(completion, out);
            outcome = outcome.and(completed);
        }
        self.completions.replace(completions);
        outcome?;
        self.run_ready();
        Ok(())
    }

    /// Whether [`turn`](Self::turn) would find something to do, as far as that shows without a system call.
    pub(crate) fn has_news(&self) -> bool {
        !self.ready.borrow().is_empty()
            || !self.served.borrow().is_empty()
            || !self.giving_way.borrow().is_empty()
            || self.driver.borrow_mut().as_mut().is_some_and(|driver| driver.has_news())
            || !self.remote.ready.lock().is_empty()
    }

    /// Lets everything else on this thread go on, including the caller of [`turn`](Self::turn), before the task goes on itself: for
    /// tasks that have much to do between two operations.
    pub(crate) async fn give_way(&self) {
        let mut gave_way = false;
        poll_fn(|cx| {
            if std::mem::replace(&mut gave_way, true) {
                return Poll::Ready(());
            }
            self.giving_way.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Says that this thread is about to sleep; false if something came in between.
    fn prepare_sleep(&self) -> bool {
        let looked_before = Mutation::LooksBeforeItSleeps.is_on().then(|| !self.remote.ready.lock().is_empty());
        self.remote.sleeping.store(true, Ordering::SeqCst);
        let ready = looked_before.unwrap_or_else(|| !self.remote.ready.lock().is_empty());
        if ready {
            self.remote.sleeping.store(false, Ordering::SeqCst);
        }
        !ready
    }

    /// Runs what is ready; whether a task ended.
    fn run_ready(&self) -> bool {
        let mut ended = false;
        loop {
            self.ready.borrow_mut().extend(self.remote.ready.lock().drain(..));
            let Some((slot, generation)) = self.ready.borrow_mut().pop_front() else { return ended };
            ended |= self.run(slot, generation);
        }
    }

    /// Runs a task as far as it gets; whether it ended.
    fn run(&self, slot: usize, generation: u64) -> bool {
        let (mut task, waker) = {
            let mut tasks = self.tasks.borrow_mut();
            let entry = &mut tasks[slot];
            // A task that is over leaves wake-ups behind: its generation tells.
            if entry.generation != generation {
                return false;
            }
            let (Some(task), Some(waker)) = (entry.task.take(), entry.waker.clone()) else { return false };
            (task, waker)
        };
        let finished = task.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
        let mut tasks = self.tasks.borrow_mut();
        if finished {
            tasks[slot].generation += 1;
            tasks[slot].waker = None;
            self.free_tasks.borrow_mut().push(slot);
            self.live_tasks.set(self.live_tasks.get() - 1);
        } else {
            tasks[slot].task = Some(task);
        }
        finished
    }

    /// Fails only for a watched descriptor that has.
    fn complete(&self, completion: Completion, out: &mut Vec<Outcome>) -> io::Result<()> {
        let Completion { token, result, data } = completion;
        if token & WATCH != 0 {
            result?;
            out.push(Outcome::Watch { tag: token & !WATCH });
            return Ok(());
        }
        let slot = token as usize;
        let mut ops = self.ops.borrow_mut();
        let Some(op) = ops.slots.get_mut(slot).and_then(Option::as_mut) else { return Ok(()) };
        let (result, data) = match short::resume(&mut op.rest, op.align, result, data) {
            Resumed::Again(again) => {
                let file = op.file;
                drop(ops);
                if let Some(driver) = self.driver.borrow_mut().as_mut() {
                    driver.submit(token, file, again);
                }
                return Ok(());
            }
            Resumed::Done(result, data) => (result, data),
        };
        op.keep.clear();
        match &mut op.owner {
            Owner::Direct(tag) => {
                out.push(Outcome::Direct { tag: *tag, result, data });
                ops.remove(slot);
            }
            Owner::Task { abandoned: true, .. } => ops.remove(slot),
            Owner::Task { waker, result: told, .. } => {
                *told = Some((result, data));
                if let Some(waker) = waker.take() {
                    drop(ops);
                    waker.wake();
                }
            }
        }
        Ok(())
    }
}

impl Queue {
    /// How many tasks are not over.
    pub(crate) fn live_tasks(&self) -> usize {
        self.live_tasks.get()
    }

    /// Ends the queue: drops the driver, which waits for what is in flight, and only then all tasks, where they stand. (They hold
    /// this queue, so it would never end of itself.) The other way round memory that a task owns would be freed, and clusters that
    /// it keeps from being used again given away, under operations that still write there.
    pub(crate) fn shut_down(&self) {
        drop(self.driver.borrow_mut().take());
        let tasks: Vec<_> = self.tasks.borrow_mut().iter_mut().filter_map(|slot| slot.task.take()).collect();
        drop(tasks);
        self.live_tasks.set(0);
    }
}

fn shut() -> io::Error {
    io::Error::other("the I/O queue is shut down")
}

/// The whole blocks of a range, if only these can be taken: the host's own files take any range.
fn whole_blocks(file: &File, offset: u64, len: u64) -> (u64, u64) {
    let align = u64::from(file.traits().align.max(1));
    if file.layer().is_none() || (offset | len).is_multiple_of(align) {
        return (offset, len);
    }
    let end = offset + len;
    let first = offset.next_multiple_of(align).min(end);
    (first, (end - end % align).saturating_sub(first))
}

/// The smallest aligned range around `offset..offset + len`.
fn aligned_range(align: u32, offset: u64, len: u64) -> (u64, usize) {
    let mask = u64::from(align.max(1)) - 1;
    let start = offset & !mask;
    let end = (offset + len + mask) & !mask;
    (start, (end - start) as usize)
}

/// An operation in flight, to be awaited. Dropped before its end, it goes on without a listener.
struct Operation {
    queue: Rc<Queue>,
    slot: Option<usize>,
}

impl Future for Operation {
    type Output = (io::Result<()>, Vec<IoSeg>);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(slot) = self.slot else {
            return Poll::Ready((Err(io::Error::other("an operation was polled after its end")), Vec::new()));
        };
        let mut ops = self.queue.ops.borrow_mut();
        let Some(Some(OpSlot { owner: Owner::Task { waker, result, .. }, .. })) = ops.slots.get_mut(slot) else {
            return Poll::Ready((Err(io::Error::other("an operation lost its slot")), Vec::new()));
        };
        match result.take() {
            None => {
                *waker = Some(cx.waker().clone());
                Poll::Pending
            }
            Some(result) => {
                ops.remove(slot);
                drop(ops);
                self.slot = None;
                Poll::Ready(result)
            }
        }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        let Some(slot) = self.slot else { return };
        let mut ops = self.queue.ops.borrow_mut();
        if let Some(Some(OpSlot { owner: Owner::Task { result, abandoned, .. }, .. })) = ops.slots.get_mut(slot) {
            if result.is_some() {
                ops.remove(slot);
            } else {
                *abandoned = true;
            }
        }
    }
}

#[cfg(test)]
#[path = "queue_test.rs"]
mod tests;

#[cfg(all(test, feature = "shuttle"))]
#[path = "queue_model.rs"]
mod model;
