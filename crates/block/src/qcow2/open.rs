//! Opening an image: everything is validated before anything is written.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use cowhand_qcow2::cipher::Cipher;
use cowhand_qcow2::luks::{self, LuksError};
use cowhand_qcow2::{Autoclear, CryptMethod, FormatError, Header, HostOffset, Incompatible, L1Entry, RefTableEntry};

use super::bitmaps::{Directory, Live};
use super::compressed::DecodedCache;
use super::data::DataFile;
use super::filling::{is_marked, unmark};
use super::layout::{Layout, Overlap, Part, Structure};
use super::mapping::be64;
use super::owners::Owners;
use super::refcounts::Refcounts;
use super::slices::{SLICE_BYTES, SliceCache};
use super::snapshot_table::SnapshotTable;
use super::{HeaderState, Image, Meta};
use crate::error::{Error, ErrorKind, Result};
use crate::flush::Flushes;
use crate::grace::Grace;
use crate::io::{Barrier, File, Role};
use crate::journal::Left;
use crate::node::Node;
use crate::queue::Queue;
use crate::secret::Secret;
use crate::sync::{Arc, AtomicBool, AtomicU64, Mutex};
use crate::tuning::Tuning;

/// Bytes of metadata kept in memory unless asked otherwise: L2 tables and refcounts of 1 TiB at 64 KiB clusters.
pub(crate) const METADATA_CACHE: u64 = 160 << 20;

/// Bytes of a LUKS header without its key material.
pub(super) const LUKS_HEADER: usize = 592;

/// How an image is to be opened.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ImageOptions {
    pub(crate) writable: bool,
    pub(crate) no_flush: bool,
    pub(crate) metadata_cache: Option<u64>,
    /// See [`Tuning`].
    pub(crate) tuning: Tuning,
    /// Discarded clusters keep their place.
    pub(crate) discard_no_unref: bool,
    /// It is the topmost of its chain: its slices say where the layers below have what it has not.
    pub(crate) resolve: bool,
    /// Who changed the mapping, or wrote to what has changed, waits until that is in the file.
    pub(crate) synchronous: bool,
}

/// An image whose header has been read, not yet connected with its backing file.
pub(crate) struct Opening {
    pub(super) file: File,
    pub(super) path: PathBuf,
    pub(super) header: Header,
    sector: Vec<u8>,
    file_len: u64,
    /// It is being filled.
    filling: bool,
}

impl Opening {
    /// Reads and validates the header of `file`.
    pub(crate) async fn header(queue: &Rc<Queue>, file: File, path: &Path) -> Result<Self> {
        Self::header_as(queue, file, path, Header::parse, false).await
    }

    /// The same of an image that is being filled.
    pub(crate) async fn unfinished(queue: &Rc<Queue>, file: File, path: &Path) -> Result<Self> {
        Self::header_as(queue, file, path, Header::parse, true).await
    }

    /// The same for a check, which does without a refcount table.
    pub(crate) async fn header_for_check(queue: &Rc<Queue>, file: File, path: &Path) -> Result<Self> {
        Self::header_as(queue, file, path, Header::parse_for_check, false).await
    }

    async fn header_as(
        queue: &Rc<Queue>,
        file: File,
        path: &Path,
        parse: fn(&[u8], u64) -> std::result::Result<Header, FormatError>,
        may_be_unfinished: bool,
    ) -> Result<Self> {
        let file_len = file.length().map_err(|e| Error::io("cannot tell the file's length", e).at_path(path))?;
        let format_error = |e: cowhand_qcow2::FormatError| {
            let kind = match e.class() {
                cowhand_qcow2::ErrorClass::Unsupported => ErrorKind::Unsupported,
                _ => ErrorKind::Corrupt,
            };
            Error::new(kind, e.to_string()).briefly(e.brief()).at_path(path)
        };
        let read = |len: usize| queue.read_buffer(&file, 0, len);
        let mut first = read(512.min(file_len as usize))
            .await
            .map_err(|e| Error::io("Could not read qcow2 header", e).at_path(path))?;
        if !Header::probe(&first) {
            let message = "not a qcow2 image (it does not begin with QFI\\xfb); if it is a raw disk, say format=raw";
            return Err(Error::new(ErrorKind::Invalid, message).briefly(FormatError::NotQcow2.brief()).at_path(path));
        }
        let filling = is_marked(&first);
        if filling && !may_be_unfinished {
            let message = "the image was never finished: what filled it was cut short; make it again";
            return Err(Error::new(ErrorKind::Corrupt, message).at_path(path));
        }
        unmark(&mut first);
        let needed = Header::needed_len(&first).map_err(format_error)?;
        let needed = needed.min(usize::try_from(file_len).unwrap_or(usize::MAX));
        let mut first_cluster = read(needed).await.map_err(|e| Error::io("cannot read the header", e).at_path(path))?;
        unmark(&mut first_cluster);
        let header = parse(&first_cluster, file_len).map_err(format_error)?;
        let mut sector = first_cluster[..needed.min(512)].to_vec();
        sector.resize(512, 0);
        Ok(Self { file, path: path.to_path_buf(), header, sector, file_len, filling })
    }

    /// Takes another tree for the image's active one. What it says is looked at when the image is finished.
    pub(super) fn show_tree(&mut self, l1_table: HostOffset, l1_size: u32) {
        self.header.l1_table_offset = l1_table;
        self.header.l1_size = l1_size;
    }

    pub(crate) fn parsed(&self) -> &Header {
        &self.header
    }

    /// The file, its header, the header's first sector, and the file's length.
    pub(crate) fn into_parts(self) -> (File, Header, Vec<u8>, u64) {
        (self.file, self.header, self.sector, self.file_len)
    }

    pub(super) fn refuse(&self, kind: ErrorKind, message: &str) -> Error {
        Error::new(kind, message).at_path(&self.path)
    }

    /// What this engine must not serve to a guest, or not write to.
    fn check_features(&self, options: ImageOptions) -> Result<()> {
        let (header, writable) = (&self.header, options.writable);
        let unsupported = |what: &str| Err(self.refuse(ErrorKind::Unsupported, what));
        if writable && header.crypt_method == CryptMethod::Aes {
            return unsupported(
                "the image has the old AES encryption, which is unsafe: open it with readonly=on, and convert it",
            );
        }
        if writable && header.incompatible.contains(Incompatible::CORRUPT) {
            let message =
                "the image is marked corrupt; repair it ('qemu-img check -r all') or open it with readonly=on";
            return Err(self.refuse(ErrorKind::Corrupt, message));
        }
        if writable && options.discard_no_unref && header.geometry().version < 3 {
            return unsupported(
                "discard-no-unref=on needs a version 3 image: version 2 cannot say that a cluster reads as zeros",
            );
        }
        Ok(())
    }

    /// Refuses an image that could not be opened so, as far as its header tells.
    pub(crate) fn check_openable(&self, options: ImageOptions, has_secret: bool) -> Result<()> {
        self.check_features(options)?;
        self.tuned(options)?;
        if self.header.crypt_method != CryptMethod::None && !has_secret {
            return Err(self.no_secret());
        }
        Ok(())
    }

    fn no_secret(&self) -> Error {
        let message = "the image is encrypted; give its secret with secret=file:PATH or secret=fd:N";
        self.refuse(ErrorKind::Invalid, message)
    }

    /// The options with what QEMU's say of the metadata to keep.
    fn tuned(&self, options: ImageOptions) -> Result<ImageOptions> {
        let kept = options.tuning.metadata_cache(&self.header.geometry(), self.header.size);
        let kept = kept.map_err(|reason| self.refuse(ErrorKind::Invalid, &reason))?;
        Ok(ImageOptions { metadata_cache: kept.or(options.metadata_cache), ..options })
    }

    /// Reads the tables and makes the image.
    pub(crate) async fn finish(
        self,
        queue: &Rc<Queue>,
        (backing, external): (Option<Arc<Node>>, Option<DataFile>),
        secret: Option<&Secret>,
        options: ImageOptions,
    ) -> Result<Image> {
        self.finish_after(queue, (backing, external), secret, options, None).await
    }

    /// The same of an image that a process has left so when it died.
    pub(crate) async fn finish_after(
        self,
        queue: &Rc<Queue>,
        (backing, external): (Option<Arc<Node>>, Option<DataFile>),
        secret: Option<&Secret>,
        options: ImageOptions,
        left: Option<Left>,
    ) -> Result<Image> {
        self.check_features(options)?;
        let options = self.tuned(options)?;
        let cipher = self.cipher(queue, secret).await?.map(Arc::new);
        let opening = match left.filter(|_| options.writable) {
            Some(left) => self.replayed(queue, left, external.as_ref(), options).await?,
            None if options.writable => self.cleaned(queue).await?,
            None => self,
        };
        let size = opening.header.size;
        let mut image = opening.finish_as(queue, (backing, external), cipher, options, size).await?;
        image.live = image.load_live(queue).await?;
        Ok(image)
    }

    /// The same with a cipher that is open already, as an image of `size` bytes where that is not yet what the header says.
    pub(super) async fn finish_as(
        self,
        queue: &Rc<Queue>,
        (backing, external): (Option<Arc<Node>>, Option<DataFile>),
        cipher: Option<Arc<Cipher>>,
        options: ImageOptions,
        size: u64,
    ) -> Result<Image> {
        let header = &self.header;
        let geometry = header.geometry();
        let bits = geometry.cluster_bits;
        // The header was refused if its table did not reach to the end of the disk.
        let l1_len = usize::try_from(geometry.l1_entries_for(size).min(header.l1_size.into())).unwrap_or(usize::MAX);
        let l1_bytes = self.table(queue, "L1 table", header.l1_table_offset.get(), l1_len * 8).await?;
        let l1: Vec<_> = l1_bytes.chunks_exact(8).map(|b| L1Entry::from_raw(be64(b))).collect();

        for entry in &l1 {
            // An entry that means nothing is refused below if the image is to be written, otherwise when it is used.
            self.check_there("an L2 table", entry.offset(&geometry).ok().flatten(), bits.size())?;
        }

        let slice_entries = geometry.l2_entries().min(SLICE_BYTES / geometry.l2_entry_size()) as usize;
        let slices = (l1_len as u64 * geometry.l2_entries()).div_ceil(slice_entries as u64);
        let budget = options.metadata_cache.unwrap_or(METADATA_CACHE);
        let table_len = header.refcount_table_clusters as usize * bits.size() as usize;
        // Only a writer looks at refcounts.
        let table: Vec<_> = if options.writable {
            let offset = header.refcount_table_offset.get();
            let bytes = self.table(queue, "refcount table", offset, table_len).await?;
            bytes.chunks_exact(8).map(|b| RefTableEntry::from_raw(be64(b))).collect()
        } else {
            Vec::new()
        };
        for entry in &table {
            self.check_there("a refcount block", entry.offset(&geometry).ok().flatten(), bits.size())?;
        }
        let layout = if options.writable {
            let snapshots = SnapshotTable::read(queue, &self.file, &self.path, &self.header).await?;
            let inactive = snapshots.l2_tables(queue, &self.file, &geometry).await;
            let bitmaps = Directory::read(queue, &self.file, &self.path, &self.header).await?;
            let bitmaps = bitmaps.parts(queue, &self.file, &self.path, &self.header).await?;
            self.layout(&l1, &table, &snapshots, bitmaps)?.with_inactive(inactive)
        } else {
            Layout::default()
        };
        let layout = Arc::new(layout);
        // The flag alone names no table, and must not look like one that may be written.
        let names_table = |e: L1Entry| e.with_copied(false).raw() != 0;
        let l1 = l1.into_iter().map(|e| AtomicU64::new(if names_table(e) { e.raw() } else { 0 })).collect();
        let corrupt = header.incompatible.contains(Incompatible::CORRUPT);
        let limit = self.file.traits().block_device.then_some(self.file_len);
        let file_clusters = bits.clusters_for(self.file_len);
        let refcounts = Refcounts::new(
            geometry,
            header.refcount_table_offset,
            table,
            file_clusters,
            limit,
            layout.clone(),
            budget / 5,
        );
        let meta = Meta {
            clock: 0,
            refcounts,
            owners: Owners::new(layout.clone()),
            dirty_l1: Default::default(),
            new_tables: Default::default(),
            dirty_slices: Default::default(),
            loading: Default::default(),
            dropped: Vec::new(),
            retired: Vec::new(),
            journal: None,
        };
        let below = std::iter::successors(backing.clone().filter(|_| options.resolve), |node| node.backing().cloned());
        let below = below.collect();
        Ok(Image {
            size: size.next_multiple_of(512),
            path: self.path,
            content: self.file.of(Role::Content),
            file: self.file,
            external,
            cipher,
            geometry,
            header: Mutex::new(HeaderState { header: self.header, sector: self.sector }),
            backing,
            below,
            writable: options.writable,
            corrupt: AtomicBool::new(corrupt),
            filling: AtomicBool::new(self.filling),
            sparse: Default::default(),
            options,
            flushes: Arc::new(Flushes::new(options.no_flush)),
            l1,
            slices: SliceCache::new(slice_entries, geometry.extended_l2, slices, budget / 5 * 4),
            layout,
            slice_entries,
            decoded: DecodedCache::default(),
            meta: Mutex::new(meta),
            ranges: Default::default(),
            tables: Default::default(),
            commit_lock: Default::default(),
            refblock_loads: Default::default(),
            commits: AtomicU64::new(0),
            changed: AtomicU64::new(0),
            saved: AtomicU64::new(0),
            grace: Arc::new(Grace::default()),
            live: Live::new(),
            joining: Default::default(),
        })
    }

    /// The cipher of an encrypted image, opened by `secret`.
    async fn cipher(&self, queue: &Rc<Queue>, secret: Option<&Secret>) -> Result<Option<Cipher>> {
        let method = self.header.crypt_method;
        if method == CryptMethod::None {
            return Ok(None);
        }
        let Some(secret) = secret else { return Err(self.no_secret()) };
        let luks = self.header.luks_extension();
        let luks = luks.map_err(|e| self.refuse(ErrorKind::Corrupt, &format!("the image is damaged: {e}")))?;
        let Some(place) = luks.filter(|_| method == CryptMethod::Luks) else {
            return Ok(Some(Cipher::legacy_aes(secret.bytes())));
        };
        let luks_error = |e: LuksError| {
            if matches!(e, LuksError::NoSlotOpens | LuksError::NoActiveSlot) {
                return self.refuse(ErrorKind::Refused, "Invalid password, cannot unlock any keyslot");
            }
            self.refuse(ErrorKind::Corrupt, &e.to_string()).at_offset(place.offset.get())
        };
        let what = "encryption header";
        // Its length is bounded where the extension is parsed.
        let length = usize::try_from(place.len).unwrap_or(usize::MAX);
        let first = self.table(queue, what, place.offset.get(), length.min(LUKS_HEADER)).await?;
        let header = luks::Header::parse(&first, place).map_err(|e| luks_error(e.into()))?;
        let area = usize::try_from(header.unlock_len()).unwrap_or(usize::MAX).min(length);
        let area = self.table(queue, what, place.offset.get(), area).await?;
        let unlocked = header.unlock(&area, secret.bytes()).map_err(luks_error)?;
        unlocked.key.cipher().map(Some).map_err(luks_error)
    }

    /// Where the image's metadata lies: no two structures in one place, and all refcounts inside the file.
    fn layout(
        &self,
        l1: &[L1Entry],
        refcount_table: &[RefTableEntry],
        snapshots: &SnapshotTable,
        bitmaps: Vec<Part>,
    ) -> Result<Layout> {
        let header = &self.header;
        let geometry = header.geometry();
        let bits = geometry.cluster_bits;
        let corrupt = |e: FormatError| {
            let message = format!("the image is damaged: {e}; look at it with a check");
            self.refuse(ErrorKind::Corrupt, &message).briefly(e.brief())
        };
        let part = |what, offset: HostOffset, bytes: u64| {
            let first = bits.index_of(offset.get());
            Part { what, clusters: first..first + bits.clusters_for(bytes), shared: false }
        };
        let table_bytes = refcount_table.len() as u64 * 8;
        let mut parts = vec![
            part(Structure::Header, HostOffset::new(0), 1),
            part(Structure::L1Table, header.l1_table_offset, u64::from(header.l1_size) * 8),
            part(Structure::RefcountTable, header.refcount_table_offset, table_bytes),
            part(Structure::SnapshotTable, header.snapshots_offset, snapshots.len),
        ];
        for snapshot in &snapshots.entries {
            let bytes = u64::from(snapshot.l1_size) * 8;
            self.check_there("a snapshot's L1 table", Some(snapshot.l1_table_offset), bytes)?;
            parts.push(part(Structure::SnapshotL1Table, snapshot.l1_table_offset, bytes));
        }
        parts.extend(bitmaps);
        if let Some(luks) = header.luks_extension().map_err(corrupt)? {
            parts.push(part(Structure::EncryptionHeader, luks.offset, luks.len));
        }
        for entry in refcount_table {
            let Some(block) = entry.offset(&geometry).map_err(corrupt)? else { continue };
            if block.get() >= self.file_len {
                let message = "the image is truncated: a refcount block lies past the end of the file";
                return Err(self.refuse(ErrorKind::Corrupt, message).at_offset(block.get()));
            }
            parts.push(part(Structure::RefcountBlock, block, 1));
        }
        for entry in l1 {
            let Some(table) = entry.offset(&geometry).map_err(corrupt)? else { continue };
            parts.push(Part { shared: !entry.copied(), ..part(Structure::L2Table, table, 1) });
        }
        Layout::new(parts).map_err(|Overlap { cluster, structures: [one, other] }| {
            let message = format!(
                "the image is damaged: a {one} and a {other} lie in one cluster; open it with readonly=on, or repair it \
                 ('qemu-img check -r all')"
            );
            self.refuse(ErrorKind::Corrupt, &message).at_offset(cluster << bits.bits())
        })
    }

    /// Data may lie past the end of the file, and is zero there; tables are written whole, so one that is missing was cut off.
    fn check_there(&self, what: &str, place: Option<HostOffset>, len: u64) -> Result<()> {
        match place {
            Some(place) if place.get().saturating_add(len) > self.file_len => {
                let message =
                    format!("the image is truncated: {what} ends past the end of the file; restore it from a copy");
                Err(self.refuse(ErrorKind::Corrupt, &message).at_offset(place.get()))
            }
            _ => Ok(()),
        }
    }

    async fn table(&self, queue: &Rc<Queue>, what: &str, offset: u64, len: usize) -> Result<crate::io::Buffer> {
        self.check_there(&format!("its {what}"), Some(HostOffset::new(offset)), len as u64)?;
        let read = queue.read_buffer(&self.file, offset, len).await;
        read.map_err(|e| Error::io(format!("cannot read the {what}"), e).at_path(&self.path).at_offset(offset))
    }
}

impl Image {
    /// What has to be written before anything else is: only when all of the disk has been opened, and nothing can refuse it any more.
    pub(crate) async fn begin_writing(&self, queue: &Rc<Queue>) -> Result<()> {
        // Of an external data file's raw view we take care, and of bitmaps.
        let kept = Autoclear::RAW_DATA_FILE | Autoclear::BITMAPS;
        let vouched = !self.header.lock().header.autoclear.difference(kept).is_empty();
        if self.writable && vouched {
            // What we do not keep up to date must not look valid to the next one who knows it. (Sharp edge 3.)
            self.update_header(queue, |header| header.autoclear = header.autoclear.intersection(kept)).await?;
            self.barrier(queue, Barrier::Header).await?;
        }
        if self.writable { self.begin_tracking(queue).await } else { Ok(()) }
    }
}
