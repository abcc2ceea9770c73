//! A disk: a chain of images, served by queues. How it changes as a whole while it is served: [`crate::change`].
//!
//! Locks: the disk itself has none on the way of a request; see [`crate::qcow2`]. Its topmost layer stands behind a lock that is held
//! only to take it and to replace it, and so do those who follow what is written ([`crate::hooks`]); each queue has both at hand, and takes
//! them anew when the generation has changed.

use std::cell::RefCell;
use std::future::Future;
use std::ops::Range;
use std::rc::Rc;

use crate::chain::{self, OpenPolicy};
use crate::error::{Error, ErrorKind, Result};
use crate::grace::{Grace, Ticket};
use crate::hooks::Hooks;
use crate::io::{Driver, Storage, is_zero, segs_len};
use crate::journal::{Journal, Survival};
use crate::node::Node;
use crate::qcow2::Zeros;
use crate::queue::Queue;
use crate::request::{Limits, Request};
use crate::spec::{DetectZeroes, DiskSpec, Format};
use crate::sync::{Arc, AsyncMutex, AtomicBool, AtomicU64, AtomicUsize, Mutex, Ordering, RangeLocks};

pub use queue::DiskQueue;

mod queue;

/// The most bytes that one request may discard or zero.
const DISCARD_MAX: u64 = 1 << 30;

/// One layer of a disk, as it is shown to people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerInfo {
    /// The file.
    pub path: std::path::PathBuf,
    /// Its format.
    pub format: Format,
    /// Its virtual size in bytes.
    pub size: u64,
    /// It is raw by a guess ([`DiskSpec::guessed`]).
    pub guessed: bool,
}

/// What requests must be multiples of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unit {
    /// 512 bytes.
    Sectors,
    /// What the topmost layer takes.
    Layers,
}

/// What a request of a disk meets when it enters.
#[derive(Clone)]
struct Top {
    /// The topmost layer.
    node: Arc<Node>,
    /// Who follows what is written, if anybody does.
    hooks: Option<Arc<Hooks>>,
}

/// An open disk, shared by its queues.
pub struct Disk {
    spec: DiskSpec,
    policy: OpenPolicy,
    /// What requests meet. It is replaced only while the gate of `grace` is closed.
    top: Mutex<Top>,
    /// How often it has been replaced.
    generation: AtomicU64,
    /// The requests in flight.
    grace: Arc<Grace>,
    /// Held by whatever changes the disk as a whole.
    changes: AsyncMutex,
    /// The sectors that are being written by those who write bytes ([`crate::bytes`]).
    byte_writers: RangeLocks,
    /// Where changes are noted that are not in the topmost file yet.
    journal: Option<Journal>,
    queues: AtomicUsize,
    closed: AtomicBool,
}

impl Disk {
    /// Opens a disk: every layer is validated and locked before anything is written.
    ///
    /// # Errors
    /// One line that says which file is wrong, how, and what to do.
    pub fn open(spec: &DiskSpec, policy: &OpenPolicy) -> Result<Arc<Self>> {
        let queue = Queue::new(blocking_driver(&policy.storage)?);
        block_on(&queue, {
            let (queue, spec, policy) = (queue.clone(), spec.clone(), policy.clone());
            async move { Self::open_on(&queue, &spec, &policy).await }
        })
    }

    /// Opens the disk of which `base`, open already, is a layer below: that layer is used as it is.
    pub(crate) fn open_over(spec: &DiskSpec, policy: &OpenPolicy, base: &Arc<Self>) -> Result<Arc<Self>> {
        let queue = Queue::new(blocking_driver(&policy.storage)?);
        block_on(&queue, {
            let (queue, spec, policy, base) = (queue.clone(), spec.clone(), policy.clone(), base.node());
            async move {
                let node = chain::open_over(&queue, &spec, &policy, Some(&base)).await?;
                Self::of_node(&queue, node, &spec, &policy).await
            }
        })
    }

    /// Opens a disk with the operations of `queue`.
    pub(crate) async fn open_on(queue: &Rc<Queue>, spec: &DiskSpec, policy: &OpenPolicy) -> Result<Arc<Self>> {
        let node = chain::open(queue, spec, policy).await?;
        Self::of_node(queue, node, spec, policy).await
    }

    async fn of_node(queue: &Rc<Queue>, node: Arc<Node>, spec: &DiskSpec, policy: &OpenPolicy) -> Result<Arc<Self>> {
        check_size(spec, node.size())?;
        node.begin_writing(queue).await?;
        let journal = match &policy.survival {
            Survival::Journal(words) if !spec.readonly => Some(Journal::new(words, &spec.path)?),
            _ => None,
        };
        if let Some(journal) = &journal {
            // All that was left is in the file.
            journal.start(node.file().traits().identity);
            node.attach(journal.ring());
        }
        Ok(Arc::new(Self {
            journal,
            spec: spec.clone(),
            policy: policy.clone(),
            grace: node.grace().cloned().unwrap_or_default(),
            top: Mutex::new(Top { node, hooks: None }),
            generation: AtomicU64::new(0),
            changes: AsyncMutex::default(),
            byte_writers: RangeLocks::default(),
            queues: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
        }))
    }

    /// The topmost layer as it is now. Only who has entered may rely on it.
    pub(crate) fn node(&self) -> Arc<Node> {
        self.top.lock().node.clone()
    }

    /// Who follows what is written.
    pub(crate) fn hooks(&self) -> Option<Arc<Hooks>> {
        self.top.lock().hooks.clone()
    }

    /// Puts another topmost layer in the place of the one that is there. The gate is closed.
    pub(crate) fn replace(&self, node: Arc<Node>) {
        let mut top = self.top.lock();
        if node.size() != top.node.size() {
            top.hooks = top.hooks.take().and_then(|hooks| hooks.resized(node.size()));
        }
        top.node = node;
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    /// Has others follow what is written. The gate is closed.
    pub(crate) fn replace_hooks(&self, hooks: Option<Arc<Hooks>>) {
        self.top.lock().hooks = hooks;
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn grace(&self) -> &Arc<Grace> {
        &self.grace
    }

    pub(crate) fn journal(&self) -> Option<&Journal> {
        self.journal.as_ref()
    }

    pub(crate) fn storage(&self) -> &Arc<dyn Storage> {
        &self.policy.storage
    }

    pub(crate) fn policy(&self) -> &OpenPolicy {
        &self.policy
    }

    /// What it was opened with, if it is encrypted.
    pub(crate) fn secret(&self) -> Result<Option<crate::secret::Secret>> {
        chain::secret(&self.spec, &self.policy)
    }

    /// Refuses if a change was cut short, so that what is in memory may not fit the file, and if the disk is closed.
    pub(crate) fn check_whole(&self) -> Result<()> {
        if self.grace.is_broken() {
            return Err(self.broken());
        }
        if self.closed.load(Ordering::SeqCst) {
            return Err(Error::new(ErrorKind::Invalid, "the disk is closed").at_path(self.node().path()));
        }
        Ok(())
    }

    pub(crate) fn changes(&self) -> &AsyncMutex {
        &self.changes
    }

    pub(crate) fn byte_writers(&self) -> &RangeLocks {
        &self.byte_writers
    }

    /// The virtual size in bytes, a multiple of 512.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.node().size()
    }

    /// Whether the topmost layer's data lies on a block device, which holds what it held before.
    #[must_use]
    pub fn is_block_device(&self) -> bool {
        self.node().data_file().traits().block_device
    }

    /// Whether the guest may only read.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.spec.readonly
    }

    /// How the disk was described.
    #[must_use]
    pub fn spec(&self) -> &DiskSpec {
        &self.spec
    }

    /// What the guest is told of the geometry.
    #[must_use]
    pub fn limits(&self) -> Limits {
        let node = self.node();
        limits_of(self.spec.block_size, node.granularity(), node.data_file().traits().align)
    }

    /// The layers, the topmost first.
    #[must_use]
    pub fn layers(&self) -> Vec<LayerInfo> {
        let top = self.node();
        let layers = std::iter::successors(Some(&top), |node| node.backing());
        let info = |node: &Arc<Node>| LayerInfo {
            path: node.path().into(),
            format: node.format(),
            size: node.size(),
            guessed: matches!(&**node, Node::Raw(raw) if raw.guessed),
        };
        layers.map(info).collect()
    }

    /// The files that hold the layers' data, the topmost layer's first.
    #[must_use]
    pub fn data_paths(&self) -> Vec<std::path::PathBuf> {
        let top = self.node();
        let layers = std::iter::successors(Some(&top), |node| node.backing());
        layers
            .flat_map(|node| match (&**node, node.file().layer().and_then(|layer| layer.disk())) {
                // A raw disk of what another one shows has that one's files.
                (Node::Raw(_), Some(disk)) => disk.data_paths(),
                _ => vec![node.data_path().to_path_buf()],
            })
            .collect()
    }

    /// All files that the disk is made of, those of disks inside of which its images lie as well.
    #[must_use]
    pub fn files(&self) -> Vec<std::path::PathBuf> {
        let top = self.node();
        let layers = std::iter::successors(Some(&top), |node| node.backing());
        let mut files = Vec::new();
        for node in layers {
            files.push(node.path().to_path_buf());
            let mut handles = vec![node.file()];
            if node.data_path() != node.path() {
                files.push(node.data_path().to_path_buf());
                handles.push(node.data_file());
            }
            let inside = handles.into_iter().filter_map(|file| file.layer()?.inside());
            files.extend(inside.flat_map(|disk| disk.files()));
        }
        files
    }

    /// A queue of requests, to be used by the calling thread alone.
    ///
    /// # Errors
    /// When the host has no room for one.
    pub fn queue(self: &Arc<Self>) -> Result<DiskQueue> {
        let driver = self.policy.storage.driver();
        Ok(self.queue_on(driver.map_err(|e| Error::io("cannot set up an I/O queue", e).at_path(&self.spec.path))?))
    }

    /// The number by which the requests of another queue are counted.
    pub(crate) fn next_queue_number(&self) -> usize {
        self.queues.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn queue_on(self: &Arc<Self>, driver: Box<dyn Driver>) -> DiskQueue {
        DiskQueue::new(self.clone(), driver)
    }

    /// Writes everything that is not written yet, flushes, and gives the locks back. All queues must have been dropped.
    ///
    /// # Errors
    /// When something could not be written: then the image may lack what was not flushed before, but is consistent.
    pub fn close(&self) -> Result<()> {
        let queue = Queue::new(blocking_driver(&self.policy.storage)?);
        let node = self.node();
        let task = {
            let (queue, node, broken) = (queue.clone(), node.clone(), self.grace.is_broken().then(|| self.broken()));
            // What is in memory of a disk whose change was cut short must not be written over what is in the file.
            async move { if let Some(error) = broken { Err(error) } else { node.finish(&queue).await } }
        };
        let mut result = block_on(&queue, task);
        if let (Some(journal), Ok(())) = (&self.journal, &result) {
            journal.end();
        }
        self.closed.store(true, Ordering::SeqCst);
        // What lies below may be other disks' as well: the last one that lets it go unlocks it.
        let own = if self.policy.shared.is_some() { 1 } else { usize::MAX };
        let layers = std::iter::successors(Some(&node), |node| node.backing());
        for (depth, node) in layers.enumerate() {
            for file in [node.data_file(), node.file()] {
                if let Some(layer) = file.layer() {
                    result = result.and(layer.close());
                }
                if depth < own {
                    file.unlock();
                }
            }
        }
        result
    }

    /// Ends the disk without writing anything more, as the death of the process would.
    #[cfg(test)]
    pub(crate) fn forget(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    /// What everyone hears of a disk after a change that was cut short.
    pub(crate) fn broken(&self) -> Error {
        let message = "a change of the disk was cut short, and its image could not be read again; close the disk and \
                       open it anew";
        Error::new(ErrorKind::Io, message).at_path(&self.spec.path)
    }

    /// Enters once the gate is open and no copy is in the way, and checks the request against the disk as it is then.
    async fn enter_when_open(&self, queue: usize, request: &Request, unit: Unit) -> Result<(Entered, Arc<Node>)> {
        while self.grace.opened().await {
            let Some(ticket) = self.grace.enter(queue, matches!(request, Request::Flush)) else { continue };
            let mut entered = Entered { grace: self.grace.clone(), ticket, marks: None };
            let Top { node, hooks } = self.top.lock().clone();
            self.check(&node, request, unit)?;
            if let (Some(hooks), Some(bytes)) = (hooks, request.written()) {
                if let Some(copy) = hooks.obstacle(&bytes) {
                    // Not inside: a gate that closes meanwhile would wait for us, and the copy for the gate.
                    drop(entered);
                    copy.until_copied(&bytes).await;
                    continue;
                }
                entered.marks = Some((hooks, bytes));
            }
            return Ok((entered, node));
        }
        Err(self.broken())
    }

    /// Enters once the gate is open, to look at the topmost layer's metadata.
    pub(crate) async fn enter_to_look(&self, queue: usize) -> Result<(Entered, Arc<Node>)> {
        while self.grace.opened().await {
            let Some(ticket) = self.grace.enter(queue, false) else { continue };
            return Ok((Entered { grace: self.grace.clone(), ticket, marks: None }, self.node()));
        }
        Err(self.broken())
    }

    /// Serves a request in whatever units the topmost layer takes ([`Node::unit`]), on the calling task.
    pub(crate) async fn request(&self, queue: &Rc<Queue>, number: usize, request: &Request) -> Result<()> {
        let (_entered, node) = self.enter_when_open(number, request, Unit::Layers).await?;
        self.serve(&node, queue, request).await
    }

    /// Makes a range read as zeros; the topmost image says so itself, where it can, and so keeps them whatever comes to lie below.
    pub(crate) async fn say_zeroes(
        &self,
        queue: &Rc<Queue>,
        number: usize,
        range: Range<u64>,
        unmap: bool,
    ) -> Result<()> {
        let (offset, len) = (range.start, range.end - range.start);
        let request = Request::WriteZeroes { offset, len, unmap };
        let (_entered, node) = self.enter_when_open(number, &request, Unit::Layers).await?;
        node.write_zeroes(queue, offset, len, Zeros { unmap: unmap && self.spec.discard, said: true }).await
    }

    /// Serves a request, which has entered.
    async fn serve(&self, node: &Node, queue: &Rc<Queue>, request: &Request) -> Result<()> {
        self.carry_out(node, queue, request).await?;
        if request.written().is_some() { node.settle_changes(queue).await } else { Ok(()) }
    }

    async fn carry_out(&self, node: &Node, queue: &Rc<Queue>, request: &Request) -> Result<()> {
        match request {
            Request::Read { offset, data } => node.read(queue, *offset, data).await,
            Request::Write { offset, data } if !self.spec.compress => {
                if self.spec.detect_zeroes != DetectZeroes::Off && is_zero(data) {
                    let unmap = self.spec.detect_zeroes == DetectZeroes::Unmap;
                    return node.write_zeroes(queue, *offset, segs_len(data), Zeros { unmap, said: false }).await;
                }
                node.write(queue, *offset, data).await
            }
            Request::Write { offset, data } | Request::WriteCompressed { offset, data } => {
                if self.spec.detect_zeroes != DetectZeroes::Off && is_zero(data) {
                    let unmap = self.spec.detect_zeroes == DetectZeroes::Unmap;
                    return node.write_zeroes(queue, *offset, segs_len(data), Zeros { unmap, said: false }).await;
                }
                node.write_compressed(queue, *offset, data).await
            }
            Request::Flush => node.flush(queue).await,
            // A discard is a hint: to ignore it is right.
            Request::Discard { .. } if !self.spec.discard => Ok(()),
            Request::Discard { offset, len } => node.discard(queue, *offset, *len).await,
            Request::WriteZeroes { offset, len, unmap } => {
                let zeros = Zeros { unmap: *unmap && self.spec.discard, said: false };
                node.write_zeroes(queue, *offset, *len, zeros).await
            }
        }
    }

    fn check(&self, node: &Node, request: &Request, unit: Unit) -> Result<()> {
        let (offset, len, writes) = match request {
            Request::Read { offset, data } => (*offset, segs_len(data), false),
            Request::Write { offset, data } | Request::WriteCompressed { offset, data } => {
                (*offset, segs_len(data), true)
            }
            Request::Flush => return Ok(()),
            Request::Discard { offset, len } | Request::WriteZeroes { offset, len, .. } => (*offset, *len, true),
        };
        if writes && self.spec.readonly {
            return Err(Error::new(ErrorKind::ReadOnly, "the disk is read-only").at_path(&self.spec.path));
        }
        let size = node.size();
        let unit = if unit == Unit::Sectors { 512 } else { node.unit() };
        if (offset | len) % unit != 0 || len == 0 || offset.checked_add(len).is_none_or(|end| end > size) {
            let message = format!("a request for {len} bytes at {offset} does not fit the disk of {size} bytes");
            return Err(Error::new(ErrorKind::Invalid, message).at_path(&self.spec.path));
        }
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if !self.closed.load(Ordering::SeqCst)
            && let Err(e) = self.close()
        {
            tracing::error!("cannot close a disk: {e}");
        }
    }
}

/// What the guest is told of a disk in blocks of `block_size`, which gives space back in units of `granularity`, and whose data has to be
/// aligned so.
pub(crate) fn limits_of(block_size: u32, granularity: u32, align: u32) -> Limits {
    Limits {
        block_size,
        physical_block_size: block_size.max(align).max(4096),
        discard_granularity: granularity.max(block_size),
        max_discard: DISCARD_MAX,
    }
}

/// What guests can be served in blocks of `block_size`.
pub(crate) fn check_size(spec: &DiskSpec, size: u64) -> Result<()> {
    if size.is_multiple_of(spec.block_size.into()) {
        return Ok(());
    }
    let message = format!("its size, {size} bytes, is not a multiple of block-size={}", spec.block_size);
    Err(Error::new(ErrorKind::Invalid, message).at_path(&spec.path))
}

pub(crate) fn blocking_driver(storage: &Arc<dyn Storage>) -> Result<Box<dyn Driver>> {
    storage.blocking_driver().map_err(|e| Error::io("cannot set up an I/O queue", e))
}

/// Runs a future to its end on the calling thread.
pub(crate) fn block_on<T: 'static>(queue: &Rc<Queue>, future: impl Future<Output = Result<T>> + 'static) -> Result<T> {
    let slot: Rc<RefCell<Option<Result<T>>>> = Rc::default();
    let result = slot.clone();
    queue.spawn(async move {
        let ended = future.await;
        *result.borrow_mut() = Some(ended);
    });
    let mut outcomes = Vec::new();
    while queue.live_tasks() > 0 {
        if let Err(e) = queue.turn(true, &mut outcomes) {
            queue.shut_down();
            return Err(Error::io("the I/O queue failed", e));
        }
    }
    let ended = slot.borrow_mut().take();
    ended.unwrap_or_else(|| Err(Error::new(ErrorKind::Io, "a task ended without a result")))
}

/// Leaves when the request is over, however it ends.
pub(crate) struct Entered {
    grace: Arc<Grace>,
    ticket: Ticket,
    /// Whom to tell before that what may have been written.
    marks: Option<(Arc<Hooks>, Range<u64>)>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if let Some((hooks, bytes)) = &self.marks {
            hooks.mark(bytes);
        }
        self.grace.leave(self.ticket);
    }
}

#[cfg(test)]
#[path = "disk_test.rs"]
mod tests;
