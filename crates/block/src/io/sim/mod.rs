//! The simulator: a world of files in memory in which a seed decides what happens.
//!
//! It stands behind the same seam as the host. One thread runs the engine and, in between, lets the world take a
//! [`step`](World::step): one operation in flight, picked by the seed, is carried out, or fails. At any moment the power can be
//! [cut](World::cut_power): every change since the last completed flush of its file is kept, lost or torn (in units of
//! 512 bytes), in any combination; or the process can [die](World::kill_process), which spares what the kernel holds. Then the
//! world goes on with what was left. The same seed gives the same run.
//!
//! An *orderly* world has no seed: every queue carries out its own operations at once, in order. That is [`super::memory`].
//!
//! Lock order: the world has one lock, held for one operation.

mod disk;
mod rng;
mod words;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use self::disk::SimDisk;
pub use self::rng::Rng;
use self::words::{barrier_name, describe};
use super::{
    Barrier, Completion, Driver, File, FileOps, FileTraits, LockError, LockMasks, Notify, Op, OpenMode, Storage, Work,
    segs_len,
};
use crate::secret::{Secret, SecretSource};

/// How often operations fail, each as one in so many (0: never).
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Reads, writes and the rest fail with EIO, though they may have been carried out.
    pub io: u32,
    /// Writes fail with ENOSPC.
    pub no_space: u32,
    /// Reads and writes move only some of their bytes.
    pub short: u32,
    /// Flushes fail, and what they should have made durable may be lost.
    pub flush: u32,
    /// Operations take far longer than others.
    pub slow: u32,
}

/// One operation in flight.
struct Pending {
    queue: usize,
    token: u64,
    what: What,
    /// Others go before it, nearly always.
    slow: bool,
}

/// What is to be carried out.
enum What {
    Io {
        file: usize,
        op: Op,
        /// For a flush: how many of the file's changes were complete when it was submitted.
        covers: u64,
    },
    Work(Work),
}

/// A file of the world, and its name's fate.
struct SimFile {
    disk: SimDisk,
    /// The lock masks that open handles hold, by handle.
    locks: BTreeMap<u64, LockMasks>,
    device: bool,
}

impl SimFile {
    fn new(content: Vec<u8>, limit: u64) -> Self {
        Self { disk: SimDisk::new(content, limit), locks: BTreeMap::new(), device: false }
    }

    fn would_grow(&self, op: &Op) -> bool {
        let end = match op {
            Op::Write { offset, data } => offset.saturating_add(segs_len(data)),
            Op::WriteZeroes { offset, len } | Op::Allocate { offset, len } => offset.saturating_add(*len),
            Op::SetLength { len } => *len,
            Op::Read { .. } | Op::Punch { .. } | Op::Flush { .. } => 0,
        };
        end > self.disk.content().len() as u64
    }
}

struct State {
    rng: Rng,
    orderly: bool,
    files: Vec<SimFile>,
    names: BTreeMap<PathBuf, usize>,
    /// The names as the last directory sync (or the start) left them.
    durable_names: BTreeMap<PathBuf, usize>,
    pending: Vec<Pending>,
    done: Vec<VecDeque<Completion>>,
    notified: Vec<bool>,
    faults: Faults,
    skipped: Option<Barrier>,
    flushes: BTreeMap<&'static str, u64>,
    failed_flushes: u64,
    trace: Option<Vec<String>>,
    handles: u64,
    ticks: u64,
    /// Files that are made from now on cannot get longer than this.
    limit: u64,
}

/// The world. Clones share it.
#[derive(Clone)]
pub struct World {
    state: Arc<(Mutex<State>, Condvar)>,
}

impl World {
    /// A world in which `seed` decides.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self::with(Rng::new(seed), false)
    }

    /// A world without surprises.
    #[must_use]
    pub fn orderly() -> Self {
        Self::with(Rng::new(0), true)
    }

    fn with(rng: Rng, orderly: bool) -> Self {
        let state = State {
            rng,
            orderly,
            files: Vec::new(),
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            pending: Vec::new(),
            done: Vec::new(),
            notified: Vec::new(),
            faults: Faults::default(),
            skipped: None,
            flushes: BTreeMap::new(),
            failed_flushes: 0,
            trace: None,
            handles: 0,
            ticks: 0,
            limit: disk::MAX_LEN,
        };
        Self { state: Arc::new((Mutex::new(state), Condvar::new())) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on operations fail this often.
    pub fn set_faults(&self, faults: Faults) {
        self.lock().faults = faults;
    }

    /// Files that are made from now on cannot get longer than this many bytes (1 GiB otherwise).
    pub fn limit_files(&self, bytes: u64) {
        self.lock().limit = bytes.min(disk::MAX_LEN);
    }

    /// From now on no operation fails; how often they did.
    pub fn take_faults(&self) -> Faults {
        std::mem::take(&mut self.lock().faults)
    }

    /// From now on flushes made for this reason do nothing (and say that all is well).
    pub fn skip_barrier(&self, barrier: Option<Barrier>) {
        self.lock().skipped = barrier;
    }

    /// How many flushes were made for this reason.
    #[must_use]
    pub fn flushes(&self, barrier: Barrier) -> u64 {
        self.lock().flushes.get(barrier_name(barrier)).copied().unwrap_or(0)
    }

    /// How many flushes failed.
    #[must_use]
    pub fn failed_flushes(&self) -> u64 {
        self.lock().failed_flushes
    }

    /// From now on keeps a line for each thing that happens.
    pub fn start_trace(&self) {
        self.lock().trace = Some(Vec::new());
    }

    /// The lines kept.
    #[must_use]
    pub fn trace(&self) -> Vec<String> {
        self.lock().trace.clone().unwrap_or_default()
    }

    /// Adds a line of the caller's to the trace.
    pub fn note(&self, line: impl FnOnce() -> String) {
        self.lock().note(line);
    }

    /// Puts a file with this content there, durably.
    pub fn put(&self, path: &Path, content: Vec<u8>) {
        let mut state = self.lock();
        let file = SimFile::new(content, state.limit);
        state.files.push(file);
        let index = state.files.len() - 1;
        state.names.insert(path.to_path_buf(), index);
        state.durable_names.insert(path.to_path_buf(), index);
    }

    /// Makes a block device of a file: its length cannot change.
    pub fn make_device(&self, path: &Path) {
        let mut state = self.lock();
        if let Some(&index) = state.names.get(path) {
            state.files[index].device = true;
        }
    }

    /// The content of a file now.
    #[must_use]
    pub fn content(&self, path: &Path) -> Option<Vec<u8>> {
        let state = self.lock();
        state.names.get(path).map(|&i| state.files[i].disk.content().to_vec())
    }

    /// Carries out one operation in flight, of the seed's choice. Whether there was one.
    pub fn step(&self) -> bool {
        let mut state = self.lock();
        if state.pending.is_empty() {
            return false;
        }
        if let Some(pick) = state.pick() {
            state.carry_out(pick);
        }
        true
    }

    /// How many operations are in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.lock().pending.len()
    }

    /// The power fails and comes back: queues are gone, files hold what was durable and, of the rest, what the seed leaves.
    pub fn cut_power(&self) {
        let mut state = self.lock();
        state.note(|| "power cut".into());
        state.abandon_pending();
        let State { files, rng, trace, .. } = &mut *state;
        for (index, file) in files.iter_mut().enumerate() {
            file.disk.cut_power(rng, |offset, len, fate| {
                if let Some(trace) = trace {
                    trace.push(format!("  file {index} {offset:#x}+{len:#x} {fate}"));
                }
            });
            file.locks.clear();
        }
        let mut names = state.durable_names.clone();
        let current = state.names.clone();
        for (name, index) in current {
            if names.get(&name) != Some(&index) && state.rng.one_in(2) {
                names.insert(name, index);
            }
        }
        state.names.clone_from(&names);
        state.durable_names = names;
    }

    /// The process dies: queues are gone, what was carried out stays, what was in flight may have happened.
    pub fn kill_process(&self) {
        let mut state = self.lock();
        state.note(|| "process killed".into());
        state.abandon_pending();
        let State { files, rng, .. } = &mut *state;
        for file in files {
            file.disk.tear_last(rng);
            file.locks.clear();
        }
    }
}

impl State {
    fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(line());
        }
    }

    /// Takes an operation to be carried out: at once, or when the seed says.
    fn take(&mut self, mut pending: Pending) {
        let slow = u64::from(self.faults.slow);
        pending.slow = slow != 0 && self.rng.one_in(slow);
        if self.orderly {
            self.carry_out(pending);
        } else {
            self.pending.push(pending);
        }
    }

    /// Takes an operation in flight; None if those that there are want to take their time.
    fn pick(&mut self) -> Option<Pending> {
        let quick: Vec<usize> = (0..self.pending.len()).filter(|&at| !self.pending[at].slow).collect();
        let all = self.pending.len() as u64;
        let pick = if quick.is_empty() || (quick.len() as u64) < all && self.rng.one_in(32) {
            if all == 0 || (quick.is_empty() && !self.rng.one_in(8)) {
                return None;
            }
            self.rng.below(all) as usize
        } else {
            quick[self.rng.below(quick.len() as u64) as usize]
        };
        Some(self.pending.swap_remove(pick))
    }

    /// Operations in flight at the end: each may have reached its file, wholly or in part.
    fn abandon_pending(&mut self) {
        for pending in std::mem::take(&mut self.pending) {
            let What::Io { file, op, .. } = pending.what else { continue };
            if self.rng.one_in(2) && !matches!(op, Op::Flush { .. } | Op::Read { .. }) {
                let State { files, .. } = self;
                let _ = files[file].disk.carry_out(&op, u64::MAX);
                files[file].disk.may_tear();
            }
        }
        for done in &mut self.done {
            done.clear();
        }
    }

    fn carry_out(&mut self, pending: Pending) {
        let Pending { queue, token, what, .. } = pending;
        let (file, op, covers) = match what {
            What::Io { file, op, covers } => (file, op, covers),
            What::Work(work) => {
                self.note(|| format!("queue {queue} computes"));
                work();
                return self.done[queue].push_back(Completion { token, result: Ok(0), data: Vec::new() });
            }
        };
        self.note(|| format!("queue {queue} file {file} {}", describe(&op)));
        let result = self.outcome(file, &op, covers);
        if let Err(e) = &result {
            self.note(|| format!("  fails: {e}"));
        }
        let data = match op {
            Op::Read { data, .. } | Op::Write { data, .. } => data,
            _ => Vec::new(),
        };
        self.done[queue].push_back(Completion { token, result, data });
    }

    fn outcome(&mut self, file: usize, op: &Op, covers: u64) -> io::Result<usize> {
        let faults = self.faults;
        let fails = |rng: &mut Rng, one_in: u32| one_in != 0 && rng.one_in(u64::from(one_in));
        let error = |code| Err(io::Error::from_raw_os_error(code));
        if self.files[file].device && self.files[file].would_grow(op) {
            return error(libc::ENOSPC);
        }
        match op {
            Op::Flush { barrier } => {
                *self.flushes.entry(barrier_name(*barrier)).or_default() += 1;
                if fails(&mut self.rng, faults.flush) {
                    self.failed_flushes += 1;
                    self.files[file].disk.fail_flush(&mut self.rng);
                    return error(libc::EIO);
                }
                if self.skipped == Some(*barrier) {
                    return Ok(0);
                }
            }
            Op::Write { .. } | Op::WriteZeroes { .. } | Op::Allocate { .. }
                if fails(&mut self.rng, faults.no_space) =>
            {
                return error(libc::ENOSPC);
            }
            _ => {}
        }
        if !matches!(op, Op::Flush { .. }) && fails(&mut self.rng, faults.io) {
            // What failed may have reached the file all the same.
            if !matches!(op, Op::Read { .. }) && self.rng.one_in(2) {
                let _ = self.files[file].disk.carry_out(op, covers);
            }
            return error(libc::EIO);
        }
        if let Op::Read { offset, data } | Op::Write { offset, data } = op
            && fails(&mut self.rng, faults.short)
            && segs_len(data) > 512
        {
            let sectors = segs_len(data) / 512;
            let some = (1 + self.rng.below(sectors)) * 512;
            let part = super::split_segs(data, 0, some.min(segs_len(data)));
            let op = match op {
                Op::Read { .. } => Op::Read { offset: *offset, data: part },
                _ => Op::Write { offset: *offset, data: part },
            };
            return self.files[file].disk.carry_out(&op, covers);
        }
        self.files[file].disk.carry_out(op, covers)
    }
}

struct Handle {
    world: World,
    index: usize,
    handle: u64,
}

impl FileOps for Handle {
    fn id(&self) -> RawFd {
        self.index as RawFd
    }

    fn traits(&self) -> FileTraits {
        let block_device = self.world.lock().files[self.index].device;
        FileTraits { identity: (0, self.index as u64), block_device, align: 1 }
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.world.lock().files[self.index].disk.content().len() as u64)
    }

    fn lock(&self, masks: LockMasks) -> Result<(), LockError> {
        let mut state = self.world.lock();
        let locks = &mut state.files[self.index].locks;
        for (&holder, other) in locks.iter() {
            if holder != self.handle && (masks.held & other.unshared != 0 || masks.unshared & other.held != 0) {
                return Err(LockError::Held("write"));
            }
        }
        locks.insert(self.handle, masks);
        Ok(())
    }

    fn relax(&self, masks: LockMasks) {
        if let Some(locks) = self.world.lock().files[self.index].locks.get_mut(&self.handle) {
            locks.held &= masks.held;
            locks.unshared &= masks.unshared;
        }
    }

    fn unlock(&self) {
        self.world.lock().files[self.index].locks.remove(&self.handle);
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.unlock();
    }
}

impl World {
    fn handle(&self, state: &mut State, index: usize) -> File {
        state.handles += 1;
        File::new(Handle { world: self.clone(), index, handle: state.handles })
    }

    fn add_file(&self, state: &mut State) -> usize {
        let file = SimFile::new(Vec::new(), state.limit);
        state.files.push(file);
        state.files.len() - 1
    }
}

fn not_found() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOENT)
}

impl Storage for World {
    fn open(&self, path: &Path, _mode: OpenMode) -> io::Result<File> {
        let mut state = self.lock();
        let index = *state.names.get(path).ok_or_else(not_found)?;
        Ok(self.handle(&mut state, index))
    }

    fn secret(&self, source: &SecretSource) -> io::Result<Secret> {
        Ok(Secret::new(source.to_string().into_bytes()))
    }

    fn create(&self, path: &Path) -> io::Result<File> {
        let mut state = self.lock();
        if state.names.contains_key(path) {
            return Err(io::Error::from_raw_os_error(libc::EEXIST));
        }
        let index = self.add_file(&mut state);
        state.names.insert(path.to_path_buf(), index);
        Ok(self.handle(&mut state, index))
    }

    fn create_unnamed(&self, _dir: &Path) -> io::Result<File> {
        let mut state = self.lock();
        let index = self.add_file(&mut state);
        Ok(self.handle(&mut state, index))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.lock();
        let index = state.names.remove(from).ok_or_else(not_found)?;
        state.names.insert(to.to_path_buf(), index);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.lock().names.remove(path).map(drop).ok_or_else(not_found)
    }

    fn sync_dir(&self, _dir: &Path) -> io::Result<()> {
        let mut state = self.lock();
        state.durable_names = state.names.clone();
        Ok(())
    }

    fn canonical(&self, path: &Path) -> io::Result<PathBuf> {
        // The world has one directory.
        if path == Path::new("/") || self.lock().names.contains_key(path) {
            Ok(path.to_path_buf())
        } else {
            Err(not_found())
        }
    }

    fn driver(&self) -> io::Result<Box<dyn Driver>> {
        let mut state = self.lock();
        state.done.push(VecDeque::new());
        state.notified.push(false);
        Ok(Box::new(SimQueue { world: self.clone(), queue: state.done.len() - 1 }))
    }

    fn entropy(&self, bytes: &mut [u8]) -> io::Result<()> {
        let mut state = self.lock();
        for byte in bytes {
            *byte = state.rng.below(256) as u8;
        }
        Ok(())
    }

    fn now(&self) -> Duration {
        let mut state = self.lock();
        state.ticks += 1;
        Duration::from_micros(state.ticks)
    }

    fn date(&self) -> Duration {
        // Some day.
        Duration::from_secs(1_000_000_000) + self.now()
    }
}

struct SimQueue {
    world: World,
    queue: usize,
}

impl Driver for SimQueue {
    fn submit(&mut self, token: u64, file: RawFd, op: Op) {
        let mut state = self.world.lock();
        let file = file as usize;
        let covers = state.files[file].disk.changes();
        let what = What::Io { file, op, covers };
        state.take(Pending { queue: self.queue, token, what, slow: false });
    }

    fn compute(&mut self, token: u64, work: Work) {
        self.world.lock().take(Pending { queue: self.queue, token, what: What::Work(work), slow: false });
    }

    fn watch(&mut self, _fd: RawFd, _token: u64) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "the simulator has no eventfds"))
    }

    fn wait(&mut self, block: bool, done: &mut Vec<Completion>) -> io::Result<()> {
        let mut state = self.world.lock();
        // A chaotic world runs on one thread: whoever blocks in it lets it go on.
        while block && !state.orderly && state.done[self.queue].is_empty() && !state.pending.is_empty() {
            if let Some(pick) = state.pick() {
                state.carry_out(pick);
            }
        }
        while block && state.orderly && state.done[self.queue].is_empty() && !state.notified[self.queue] {
            state = self.world.state.1.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.notified[self.queue] = false;
        done.extend(state.done[self.queue].drain(..));
        Ok(())
    }

    fn notifier(&self) -> Arc<dyn Notify> {
        Arc::new(SimNotify { world: self.world.clone(), queue: self.queue })
    }
}

impl Drop for SimQueue {
    fn drop(&mut self) {
        // What is still in flight belongs to a process that is gone; its memory must not be touched again.
        let queue = self.queue;
        self.world.lock().pending.retain(|p| p.queue != queue);
    }
}

struct SimNotify {
    world: World,
    queue: usize,
}

impl Notify for SimNotify {
    fn notify(&self) {
        self.world.lock().notified[self.queue] = true;
        self.world.state.1.notify_all();
    }
}
