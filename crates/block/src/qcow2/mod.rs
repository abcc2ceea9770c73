//! QCOW2 images: where guest data lies, and how that changes.
//!
//! One concern a file: [`entry`], [`slices`], [`load`] and [`mapping`] find where data lies, [`resolve`] also in the layers below;
//! [`publish`] changes that; [`refcounts`] and [`space`] give host clusters out and take
//! them back; [`commit`] writes metadata in the order that survives a power cut; [`read`], [`write`] and [`zero`] serve requests;
//! [`data`] reads and writes the data itself; [`compressed`] reads and [`compress`] writes
//! compressed clusters by means of [`codec`]; [`layout`] keeps guest data off the metadata, [`owners`] metadata off other
//! metadata, and [`corrupt`] is what follows when they find something;
//! [`open`] validates an image ([`dirty`]: one that was not closed) and [`create`] makes one; [`check`] finds and repairs damage.
//! [`survive`] is about the death of the process: [`record`] notes what changes in the journal, [`replay`] takes over what one has left.
//! [`filling`] keeps an image from looking whole before it is. [`bitmaps`] keep the persistent dirty bitmaps.
//! [`snapshot`] and [`resize`] (with [`prealloc`]) change an image as a whole, alone with it: they work on the file by means of
//! [`tree`], [`run`], [`unused_blocks`] and [`snapshot_table`], and then it is read again ([`reload`]); so do [`empty`], [`version`]
//! (with [`expand`]), [`refcount_width`], [`keys`], [`vm_state`], and [`header_switch`], which changes more of the header than its
//! numbers. [`layer`] puts an image over another one.
//!
//! A mapped cluster is read and written in place without any lock. A change of the mapping goes: take the clusters' range lock,
//! allocate, write the data, store the L2 entry in the cached slice, mark it dirty. Nothing of that reaches the file's metadata
//! before the next commit.
//!
//! Lock order: cluster range locks ([`Image::ranges`]), then the table lock ([`Image::tables`]), then the commit lock
//! ([`Image::commit_lock`]), then that of refcount block reads ([`Image::refblock_loads`]), all held across I/O by tasks; last,
//! and never across I/O, the metadata lock ([`Image::meta`]).

mod bitmaps;
pub(crate) mod check;
mod codec;
mod commit;
mod compress;
mod compressed;
mod corrupt;
pub(crate) mod create;
pub(crate) mod data;
mod dirty;
mod empty;
mod entry;
mod expand;
mod filling;
mod header_switch;
pub(crate) mod inspect;
pub(crate) mod keys;
mod layer;
mod layout;
mod load;
mod mapping;
pub(crate) mod open;
mod owners;
mod prealloc;
mod publish;
mod read;
mod record;
mod refcount_width;
mod refcounts;
mod reload;
mod replay;
mod resize;
mod resolve;
mod run;
mod slices;
pub(crate) mod snapshot;
pub(crate) mod snapshot_table;
mod space;
mod status;
mod survive;
mod tree;
mod unused_blocks;
mod version;
mod vm_state;
mod write;
mod zero;

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::task::Waker;

use cowhand_qcow2::cipher::Cipher;
use cowhand_qcow2::{FormatError, Geometry, Header, HostOffset, L1Entry};

use self::bitmaps::Live;
use self::compressed::DecodedCache;
use self::data::DataFile;
use self::layout::Layout;
use self::open::ImageOptions;
use self::owners::Owners;
use self::refcounts::Refcounts;
use self::slices::{Slice, SliceCache};
pub(crate) use self::zero::Zeros;
use crate::error::{Error, ErrorKind};
use crate::flush::Flushes;
use crate::grace::Grace;
use crate::io::File;
use crate::journal::Ring;
use crate::node::Node;
use crate::sync::{Arc, AsyncMutex, AtomicBool, AtomicU64, Mutex, OnceLock, Ordering, RangeLocks};

/// After about so many clusters that needed no I/O a task lets the others on its thread go on, and others at the metadata lock.
const CLUSTERS_AT_ONCE: u64 = 4096;

/// What the metadata lock guards.
struct Meta {
    /// Counts changes: what was dirty at one moment is told from what became so later.
    clock: u64,
    refcounts: Refcounts,
    owners: Owners,
    /// L1 entries that differ from the file, and when they changed last.
    dirty_l1: BTreeMap<usize, u64>,
    /// L2 tables that are not in the file yet, by L1 index.
    new_tables: BTreeMap<usize, NewTable>,
    /// Slices that differ from the file, and when they changed last.
    dirty_slices: BTreeMap<Slice, u64>,
    /// Slices being read, and who waits for them.
    loading: HashMap<Slice, Vec<Waker>>,
    /// References that the mapping in memory has dropped, but that in the file has not.
    dropped: Vec<Range<u64>>,
    /// References that the file's mapping has dropped too, waiting for the requests of their time to end.
    retired: Vec<(u64, Vec<Range<u64>>)>,
    /// Where changes of the mapping are noted that are not in the file yet.
    journal: Option<Ring>,
}

/// An L2 table that is not in the file yet.
#[derive(Clone, Copy, Debug)]
struct NewTable {
    /// The shared table of which it is a copy.
    source: Option<HostOffset>,
}

impl Meta {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// The host clusters in `host..host + bytes` lose a reference as soon as the mapping without it is durable.
    fn drop_reference(&mut self, geometry: &Geometry, host: HostOffset, bytes: u64) {
        let bits = geometry.cluster_bits;
        let first = bits.index_of(host.get());
        let last = bits.index_of(host.get().saturating_add(bytes.max(1) - 1));
        self.dropped.push(first..last + 1);
    }
}

/// The header, and its first sector as it is in the file.
struct HeaderState {
    header: Header,
    sector: Vec<u8>,
}

/// An open QCOW2 image (one layer).
pub(crate) struct Image {
    file: File,
    /// The same file, for guest data.
    content: File,
    /// Where guest data lies, if not in the file.
    external: Option<DataFile>,
    cipher: Option<Arc<Cipher>>,
    path: PathBuf,
    geometry: Geometry,
    /// The virtual size in bytes, a multiple of 512.
    size: u64,
    header: Mutex<HeaderState>,
    backing: Option<Arc<Node>>,
    /// All layers below, the backing file first; empty if there is none, or if this image is itself below another one and its
    /// slices are not to say what lies further down.
    below: Box<[Arc<Node>]>,
    writable: bool,
    /// Known to be corrupt: not to be written any more.
    corrupt: AtomicBool,
    /// Its header does not let it look whole.
    filling: AtomicBool,
    /// Whether the file that holds the data has many holes, found out when it is asked for.
    sparse: OnceLock<bool>,
    options: ImageOptions,
    /// Shared with the image that takes this one's place when it is read again.
    flushes: Arc<Flushes>,
    l1: Box<[AtomicU64]>,
    slices: SliceCache,
    /// Where metadata lay when the image was opened; known only to a writer.
    layout: Arc<Layout>,
    slice_entries: usize,
    decoded: DecodedCache,
    meta: Mutex<Meta>,
    ranges: RangeLocks,
    /// Serialises making and copying L2 tables.
    tables: AsyncMutex,
    commit_lock: AsyncMutex,
    /// Serialises reading refcount blocks: a read that another one overtakes, together with a change, its commit and the
    /// block's eviction, would bring the old counts back.
    refblock_loads: AsyncMutex,
    /// Counts finished commits: of several flushes that wait, one commits for all.
    commits: AtomicU64,
    /// When the mapping changed last, by the metadata's clock, and until when it is in the file.
    changed: AtomicU64,
    saved: AtomicU64,
    grace: Arc<Grace>,
    /// The enabled dirty bitmaps.
    live: Live,
    /// Those that have been enabled since, for the image that takes this one's place.
    joining: Mutex<Live>,
}

impl Image {
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The file that holds guest data.
    pub(crate) fn data_path(&self) -> &Path {
        self.external.as_ref().map_or(&self.path, |external| &external.path)
    }

    /// The header as it is now.
    pub(crate) fn header_now(&self) -> Header {
        self.header.lock().header.clone()
    }

    pub(crate) fn cluster_size(&self) -> u64 {
        self.geometry.cluster_bits.size()
    }

    pub(crate) fn version(&self) -> u32 {
        self.geometry.version
    }

    /// Bytes of the smallest part of the disk that the image can have and its backing file not.
    pub(crate) fn granule(&self) -> u64 {
        self.geometry.subcluster_size()
    }

    pub(crate) fn backing(&self) -> Option<&Arc<Node>> {
        self.backing.as_ref()
    }

    pub(crate) fn grace(&self) -> &Arc<Grace> {
        &self.grace
    }

    fn l1_entry(&self, index: usize) -> L1Entry {
        self.l1.get(index).map_or(L1Entry::UNALLOCATED, |e| L1Entry::from_raw(e.load(Ordering::Acquire)))
    }

    /// The cluster range that a byte range touches.
    fn clusters(&self, offset: u64, len: u64) -> Range<u64> {
        let bits = self.geometry.cluster_bits;
        bits.index_of(offset)..bits.index_of(offset + len - 1) + 1
    }

    fn format_error(&self, error: &FormatError) -> Error {
        Error::new(ErrorKind::Corrupt, format!("the image is damaged: {error}; look at it with a check"))
            .briefly(error.brief())
            .at_path(&self.path)
    }

    fn io_error(&self, what: &str, offset: u64, error: std::io::Error) -> Error {
        Error::io(what, error).at_path(&self.path).at_offset(offset)
    }
}
