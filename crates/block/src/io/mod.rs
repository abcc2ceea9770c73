//! The seam to everything outside the engine: files and their I/O, directories, locks, time, entropy.
//!
//! The engine is written against [`Storage`], [`FileOps`] and [`Driver`] and never calls the system itself. Behind them stand
//! [`host`] (io_uring, or a pool of threads where io_uring is refused), [`memory`], and the simulator in [`sim`].

mod buf;
pub mod host;
pub mod memory;
pub mod sim;

use std::fmt;
use std::io;
use std::ops::{Deref, Range};
use std::os::fd::RawFd;
use std::path::Path;
use std::sync::Arc;

use crate::protocol::Layer;
use crate::secret::{Secret, SecretSource};
use crate::sync::RangeLocks;
pub use buf::{Buffer, IoSeg, fill_zero, is_aligned, is_zero, segs_len, split_segs, zero_segs};

/// How a file is opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenMode {
    /// For writing too.
    pub write: bool,
    /// Past the host's page cache (`O_DIRECT`).
    pub direct: bool,
    /// What it has to be.
    pub kind: FileKind,
}

/// What a file that is opened has to be, where somebody said it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FileKind {
    /// A file or a block device.
    #[default]
    Either,
    /// A regular file.
    Regular,
    /// A block or character device.
    Device,
}

/// What one holder of an image does with it, and what it lets others do: QEMU's permissions, bit i of each mask being QEMU's
/// permission i (0 read, 1 write, 2 write-unchanged, 3 resize).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockMasks {
    /// What this holder does.
    pub held: u8,
    /// What no other holder may do meanwhile.
    pub unshared: u8,
}

impl LockMasks {
    /// Reads the image, and others may only read it too.
    pub const READ: Self = Self { held: 0b0001, unshared: 0b1010 };
    /// Reads, writes and resizes the image; others may do nothing but read what never changes.
    pub const WRITE: Self = Self { held: 0b1011, unshared: 0b1010 };
}

/// Why a lock could not be had.
#[derive(Debug)]
pub enum LockError {
    /// Another holder does (or forbids) QEMU's permission of this name.
    Held(&'static str),
    /// The system's call failed.
    Io(io::Error),
}

/// What is fixed about an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileTraits {
    /// Device and inode, by which two names of one file are known.
    pub identity: (u64, u64),
    /// Whether it is a block device, whose length cannot change.
    pub block_device: bool,
    /// What offsets, lengths and memory addresses of I/O must be multiples of: 1 through the page cache.
    pub align: u32,
}

/// An open file: what is not positioned I/O.
pub trait FileOps: Send + Sync {
    /// The number that a [`Driver`] of the same storage knows the file by: a descriptor on the host.
    fn id(&self) -> RawFd;

    /// What is fixed about it.
    fn traits(&self) -> FileTraits;

    /// Its length in bytes now.
    ///
    /// # Errors
    /// The system's.
    fn length(&self) -> io::Result<u64>;

    /// How many bytes of the host's space it takes; its length where that is not known.
    ///
    /// # Errors
    /// The system's.
    fn allocated(&self) -> io::Result<u64> {
        self.length()
    }

    /// Asks that the file, which is empty, be changed in place, where the file system would otherwise write what is changed to another place.
    ///
    /// # Errors
    /// The system's; most file systems know of nothing else.
    fn set_no_copy_on_write(&self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Asks that the file, which is empty, get its space in pieces of so many bytes.
    ///
    /// # Errors
    /// The system's; few file systems do that.
    fn set_extent_size(&self, _bytes: u32) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// The first bytes from `offset` on that may be something else than zeros; none if there are no such up to the file's end. A
    /// storage that knows nothing of holes says that all is data.
    ///
    /// # Errors
    /// The system's.
    fn data_after(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let length = self.length()?;
        Ok((offset < length).then_some(offset..length))
    }

    /// Has the host copy `len` bytes from another file, at an offset in it, to `offset`, without their coming into this program's
    /// memory; how many it copied.
    ///
    /// # Errors
    /// The system's, above all that it cannot.
    fn copy_from(&self, from: (&dyn FileOps, u64), offset: u64, len: u64) -> io::Result<u64> {
        let _ = (from, offset, len);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Takes (or replaces) this open file's locks, on the bytes that QEMU uses.
    ///
    /// # Errors
    /// When another holder is in the way; then no new lock is left behind.
    fn lock(&self, masks: LockMasks) -> Result<(), LockError>;

    /// Gives back what `masks` do not ask for of the locks that this open file has. Nobody can be in the way of that.
    fn relax(&self, masks: LockMasks);

    /// Gives all locks back.
    fn unlock(&self);
}

/// A shared handle of an open file.
#[derive(Clone)]
pub struct File {
    shared: Arc<Shared>,
    role: Role,
}

/// What is read and written through a handle: nothing that a file of the host looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// An image's metadata.
    Metadata,
    /// Its L2 tables.
    L2Tables,
    /// The disk's content.
    Content,
}

struct Shared {
    /// For direct I/O: the ranges being written, while some of them have to be read first ([`crate::queue`]).
    writes: RangeLocks,
    ops: Ops,
}

enum Ops {
    /// A storage's.
    Plain(Box<dyn FileOps>),
    /// Of what stands in a file's place.
    Layer(Arc<dyn Layer>),
}

impl File {
    /// Wraps a storage's file.
    pub fn new(ops: impl FileOps + 'static) -> Self {
        Self::with(Ops::Plain(Box::new(ops)))
    }

    /// A file in the place of which something else stands.
    pub(crate) fn layered(layer: impl Layer + 'static) -> Self {
        Self::with(Ops::Layer(Arc::new(layer)))
    }

    fn with(ops: Ops) -> Self {
        Self { shared: Arc::new(Shared { writes: RangeLocks::default(), ops }), role: Role::Metadata }
    }

    /// What stands in the file's place, if it is no file of a storage.
    pub(crate) fn layer(&self) -> Option<&Arc<dyn Layer>> {
        match &self.shared.ops {
            Ops::Plain(_) => None,
            Ops::Layer(layer) => Some(layer),
        }
    }

    /// A handle through which this is read and written.
    pub(crate) fn of(&self, role: Role) -> Self {
        Self { role, ..self.clone() }
    }

    /// What is read and written through this handle.
    pub(crate) fn role(&self) -> Role {
        self.role
    }

    pub(crate) fn writes(&self) -> &RangeLocks {
        &self.shared.writes
    }
}

impl Deref for File {
    type Target = dyn FileOps;
    fn deref(&self) -> &Self::Target {
        match &self.shared.ops {
            Ops::Plain(ops) => &**ops,
            Ops::Layer(layer) => &**layer,
        }
    }
}

impl fmt::Debug for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "File({})", self.id())
    }
}

/// Where files live, and everything else that is not positioned I/O. Shared by all threads.
pub trait Storage: Send + Sync {
    /// Opens an existing file.
    ///
    /// # Errors
    /// The system's; a directory is refused.
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<File>;

    /// Reads a secret from outside.
    ///
    /// # Errors
    /// The system's; more than [`Secret::MAX`] bytes are refused.
    fn secret(&self, source: &SecretSource) -> io::Result<Secret>;

    /// Makes a new file, open for writing; one that exists is refused.
    ///
    /// # Errors
    /// The system's.
    fn create(&self, path: &Path) -> io::Result<File>;

    /// Makes a file without a name in the directory `dir`, gone when it is closed.
    ///
    /// # Errors
    /// The system's.
    fn create_unnamed(&self, dir: &Path) -> io::Result<File>;

    /// Gives a file another name, replacing what had it.
    ///
    /// # Errors
    /// The system's.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file's name.
    ///
    /// # Errors
    /// The system's.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Makes the entries of a directory durable.
    ///
    /// # Errors
    /// The system's.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;

    /// The path without links and dots.
    ///
    /// # Errors
    /// The system's.
    fn canonical(&self, path: &Path) -> io::Result<std::path::PathBuf>;

    /// A new I/O queue, to be used by the calling thread alone.
    ///
    /// # Errors
    /// When the system has no room for one.
    fn driver(&self) -> io::Result<Box<dyn Driver>>;

    /// A new I/O queue for a few operations that the calling thread waits for: cheap to make, with nothing overlapped.
    ///
    /// # Errors
    /// When the system has no room for one.
    fn blocking_driver(&self) -> io::Result<Box<dyn Driver>> {
        self.driver()
    }

    /// Fills `bytes` with entropy.
    ///
    /// # Errors
    /// The system's.
    fn entropy(&self, bytes: &mut [u8]) -> io::Result<()>;

    /// Monotonic time since some fixed moment.
    fn now(&self) -> std::time::Duration;

    /// Lets the calling thread sleep for so long. Where time is only played, it is over at once.
    fn sleep(&self, time: std::time::Duration) {
        let _ = time;
    }

    /// The date: time since the Epoch (the beginning of 1970, UTC).
    fn date(&self) -> std::time::Duration;
}

/// Why a flush is made: names the barrier, so that the simulator can take one out and show that it is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Barrier {
    /// Guest data, with nothing in the metadata to write.
    Data,
    /// New refcount blocks, before the refcount table names them.
    NewRefblocks,
    /// Data, refcounts and new L2 tables, before the L2 and L1 entries that expose them.
    BeforeMapping,
    /// L2 and L1 entries, or refcount table entries that are empty now, before what they no longer name is freed, and before the
    /// guest hears that its flush is done.
    Mapping,
    /// A new refcount table with its blocks, before the header names it.
    NewRefTable,
    /// Tables and refcounts, before the header of an image in use names them.
    BeforeHeader,
    /// The header: a new image's, before its making is reported; autoclear bits taken off, or bitmaps marked as in use, before
    /// the first write; or one that
    /// names other tables, before those that it no longer names are freed, and before the change is reported.
    Header,
    /// A new image's structures, before it is named.
    Create,
}

impl Barrier {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Data,
        Self::NewRefblocks,
        Self::BeforeMapping,
        Self::Mapping,
        Self::NewRefTable,
        Self::BeforeHeader,
        Self::Header,
        Self::Create,
    ];
}

/// One operation on a file. Offsets and lengths in bytes.
#[derive(Debug)]
pub enum Op {
    /// Vectored read; past the end of the file it is short.
    Read {
        /// Where in the file.
        offset: u64,
        /// Where to.
        data: Vec<IoSeg>,
    },
    /// Vectored write.
    Write {
        /// Where in the file.
        offset: u64,
        /// From where.
        data: Vec<IoSeg>,
    },
    /// Makes the range read as zeros, the space kept if that is possible; extends the file if needed.
    WriteZeroes {
        /// Where in the file.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// Gives the range's space back: it reads as zeros. The length stays.
    Punch {
        /// Where in the file.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// Makes all that completed durable, with the metadata needed to read it (`fdatasync`).
    Flush {
        /// Why.
        barrier: Barrier,
    },
    /// Reserves space for the range, extending the file if needed.
    Allocate {
        /// Where in the file.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// Sets the file's length.
    SetLength {
        /// In bytes.
        len: u64,
    },
}

/// How an operation ended.
#[derive(Debug)]
pub struct Completion {
    /// The token it was submitted with.
    pub token: u64,
    /// For reads and writes the number of bytes moved, otherwise 0.
    pub result: io::Result<usize>,
    /// The operation's segment list, given back.
    pub data: Vec<IoSeg>,
}

/// Wakes a thread that sleeps in [`Driver::wait`].
pub trait Notify: Send + Sync {
    /// Makes the current or next blocking wait return.
    fn notify(&self);
}

/// Work for the pool that computes: compressing a cluster, or decoding one. It owns all that it needs.
pub type Work = Box<dyn FnOnce() + Send>;

/// An I/O queue, owned by one thread. Dropping it waits for what is in flight, but for no work of the pool.
pub trait Driver {
    /// Takes an operation on the file with this [`FileOps::id`]; it may be sent only with the next `wait`.
    fn submit(&mut self, token: u64, file: RawFd, op: Op);

    /// The same for a small write that goes to the page cache, which a driver may do at once where handing it over would cost more.
    fn submit_cached(&mut self, token: u64, file: RawFd, op: Op) {
        self.submit(token, file, op);
    }

    /// As [`submit`](Self::submit), for a file of the page cache: one of many operations that nobody waits for but who waits for all of them,
    /// so it may hold the calling thread.
    fn submit_bulk(&mut self, token: u64, file: RawFd, op: Op) {
        self.submit(token, file, op);
    }

    /// Has `work` done where it takes no time of this thread's; a completion with `token` says when it is over. There is room for a
    /// bounded amount: what does not fit is done before the call returns.
    fn compute(&mut self, token: u64, work: Work);

    /// From now on each signal of the eventfd `fd` yields a completion with `token` (and the counter is read). If it cannot be watched,
    /// or not any more, one with an error says so, and it is left alone from then on.
    ///
    /// # Errors
    /// The system's.
    fn watch(&mut self, fd: RawFd, token: u64) -> io::Result<()>;

    /// Sends what is pending and appends what has completed; with `block`, sleeps until something completed or a notification came.
    ///
    /// # Errors
    /// The system's: the queue is of no use then.
    fn wait(&mut self, block: bool, done: &mut Vec<Completion>) -> io::Result<()>;

    /// Whether `wait` would find a completion at once, as far as that shows without a system call. May overlook one.
    fn has_news(&mut self) -> bool {
        false
    }

    /// A handle with which other threads wake this one.
    fn notifier(&self) -> Arc<dyn Notify>;
}
