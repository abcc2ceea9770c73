//! The bitmaps in the file: the directory, tables and bits read, written to new places, and switched to.
//!
//! Nothing is changed in place but flags: one bit of one sector. Everything else is written beside what is there, counted and
//! made durable; then the header names it, and what only the old directory named is freed.

use std::ops::Range;
use std::path::Path;
use std::rc::Rc;

use cowhand_qcow2::{
    Autoclear, BitmapFlags, BitmapTableEntry, BitmapsExtension, DirectoryEntry, ExtensionKind, FormatError, Geometry,
    Header, HostOffset, limits,
};

use super::bits::Bits;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Barrier, File};
use crate::qcow2::Image;
use crate::qcow2::layout::{Part, Structure};
use crate::qcow2::mapping::be64;
use crate::queue::Queue;

/// What the tables of all bitmaps of an image that is to be written may take together, in bytes: they are read when it is opened.
pub(super) const TABLES_MAX: u64 = 16 << 20;

/// The bitmap directory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Directory {
    pub(crate) entries: Vec<DirectoryEntry>,
    /// Where it is.
    place: Option<BitmapsExtension>,
    /// The autoclear bit says that nobody who does not know bitmaps has written to the image. Otherwise what the directory names
    /// may be something else by now, and all bitmaps are inconsistent. (Sharp edge 40.)
    vouched: bool,
}

impl Directory {
    /// Reads the directory that `header` vouches for; an empty one if it does not.
    pub(crate) async fn read(queue: &Rc<Queue>, file: &File, path: &Path, header: &Header) -> Result<Self> {
        let damaged = |e: FormatError| damaged(path, &e.to_string());
        let Some(place) = header.bitmaps_extension().map_err(damaged)? else { return Ok(Self::default()) };
        Self::read_at(queue, file, path, header, place, true).await
    }

    /// The same, also where the header does not vouch for it. What cannot be read is not there then.
    pub(crate) async fn read_any(queue: &Rc<Queue>, file: &File, path: &Path, header: &Header) -> Result<Self> {
        if header.autoclear.contains(Autoclear::BITMAPS) {
            return Self::read(queue, file, path, header).await;
        }
        let extension = header.extension(ExtensionKind::Bitmaps).filter(|_| header.version >= 3);
        let place = extension.and_then(|data| BitmapsExtension::parse(data, header.cluster_bits).ok());
        let Some(place) = place else { return Ok(Self::default()) };
        let read = Self::read_at(queue, file, path, header, place, false).await;
        let mut directory = read.unwrap_or_default();
        directory.entries.iter_mut().for_each(|entry| entry.flags |= BitmapFlags::IN_USE);
        Ok(directory)
    }

    async fn read_at(
        queue: &Rc<Queue>,
        file: &File,
        path: &Path,
        header: &Header,
        place: BitmapsExtension,
        vouched: bool,
    ) -> Result<Self> {
        let io_error = |e| Error::io("cannot read the bitmap directory", e).at_path(path);
        let offset = place.directory_offset.get();
        check_there(file, path, "the bitmap directory", offset, place.directory_size)?;
        // Bounded where the extension is parsed.
        let bytes = queue.read_buffer(file, offset, place.directory_size as usize).await.map_err(io_error)?;
        let entries = DirectoryEntry::parse_directory(&bytes, place.nb_bitmaps, &header.geometry());
        let entries = entries.map_err(|e| damaged(path, &e.to_string()).at_offset(offset))?;
        Ok(Self { entries, place: Some(place), vouched })
    }

    /// Whether the header vouches for it.
    pub(super) fn is_vouched(&self) -> bool {
        self.vouched
    }

    /// Bytes of all tables.
    pub(super) fn tables_len(&self) -> u64 {
        self.entries.iter().map(|entry| u64::from(entry.table_size) * 8).sum()
    }

    pub(crate) fn find(&self, name: &[u8]) -> Option<&DirectoryEntry> {
        self.entries.iter().find(|entry| entry.name == name)
    }

    /// Where all of it lies, for the image's layout.
    ///
    /// # Errors
    /// A table is damaged, or does not fit the disk; the host's.
    pub(in crate::qcow2) async fn parts(
        &self,
        queue: &Rc<Queue>,
        file: &File,
        path: &Path,
        header: &Header,
    ) -> Result<Vec<Part>> {
        let bits = header.cluster_bits;
        let part = |what, clusters| Part { what, clusters, shared: false };
        let run = |offset: HostOffset, bytes: u64| {
            let first = bits.index_of(offset.get());
            first..first + bits.clusters_for(bytes)
        };
        let Some(place) = self.place.filter(|_| self.vouched) else { return Ok(Vec::new()) };
        let tables = self.tables_len();
        if tables > TABLES_MAX {
            let message = format!(
                "the tables of its bitmaps take {tables} bytes, more than the {TABLES_MAX} that are read; open it with \
                 readonly=on, or remove some ('qemu-img bitmap --remove')"
            );
            return Err(Error::new(ErrorKind::Unsupported, message).at_path(path));
        }
        let mut parts = vec![part(Structure::BitmapDirectory, run(place.directory_offset, place.directory_size))];
        for entry in &self.entries {
            // One that was not saved may be of any size.
            let misfit = u64::from(entry.table_size) != bits.clusters_for(entry.data_len(header.size));
            if misfit && !entry.flags.contains(BitmapFlags::IN_USE) {
                let name = String::from_utf8_lossy(&entry.name);
                let problem = format!("the table of the bitmap '{name}' does not fit the disk's size");
                return Err(damaged(path, &problem));
            }
            parts.push(part(Structure::BitmapTable, run(entry.table_offset, u64::from(entry.table_size) * 8)));
            let table = read_table(queue, file, path, header, entry).await?;
            parts.extend(data_runs(header, &table).into_iter().map(|clusters| part(Structure::BitmapData, clusters)));
        }
        Ok(parts)
    }
}

/// The runs of clusters that a table names.
fn data_runs(header: &Header, table: &[BitmapTableEntry]) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for entry in table {
        let BitmapTableEntry::Cluster(host) = entry else { continue };
        let cluster = header.cluster_bits.index_of(host.get());
        match runs.last_mut() {
            Some(last) if last.end == cluster => last.end += 1,
            _ => runs.push(cluster..cluster + 1),
        }
    }
    runs
}

async fn read_table(
    queue: &Rc<Queue>,
    file: &File,
    path: &Path,
    header: &Header,
    entry: &DirectoryEntry,
) -> Result<Vec<BitmapTableEntry>> {
    let (offset, len) = (entry.table_offset.get(), u64::from(entry.table_size) * 8);
    let name = String::from_utf8_lossy(&entry.name);
    if len == 0 {
        return Ok(Vec::new());
    }
    check_there(file, path, &format!("the table of the bitmap '{name}'"), offset, len)?;
    let read = queue.read_buffer(file, offset, len as usize).await;
    let bytes = read.map_err(|e| Error::io("cannot read a bitmap's table", e).at_path(path).at_offset(offset))?;
    let geometry: Geometry = header.geometry();
    let entries = bytes.chunks_exact(8).map(|raw| BitmapTableEntry::decode(be64(raw), &geometry));
    let entries: std::result::Result<Vec<_>, FormatError> = entries.collect();
    let entries = entries.map_err(|e| damaged(path, &format!("in the bitmap '{name}', {e}")))?;
    for entry in &entries {
        if let BitmapTableEntry::Cluster(host) = entry {
            check_there(file, path, &format!("the bitmap '{name}'"), host.get(), header.cluster_bits.size())?;
        }
    }
    Ok(entries)
}

fn damaged(path: &Path, problem: &str) -> Error {
    let message = format!(
        "the image's bitmaps are damaged: {problem}; open it with readonly=on, or repair it ('qemu-img check -r all')"
    );
    Error::new(ErrorKind::Corrupt, message).at_path(path)
}

/// Bitmaps are written whole clusters at a time: what is missing was cut off.
fn check_there(file: &File, path: &Path, what: &str, offset: u64, len: u64) -> Result<()> {
    let end = file.length().map_err(|e| Error::io("cannot tell the file's length", e).at_path(path))?;
    if offset.checked_add(len).is_none_or(|there| there > end) {
        let problem = format!("{what} ends past the end of the file");
        return Err(damaged(path, &problem).at_offset(offset));
    }
    Ok(())
}

impl Image {
    /// The directory as it is in the file, also one that the header does not vouch for.
    pub(super) async fn any_directory(&self, queue: &Rc<Queue>) -> Result<Directory> {
        let header = self.header.lock().header.clone();
        Directory::read_any(queue, &self.file, &self.path, &header).await
    }

    /// The directory as it is in the file; an empty one if the header does not vouch for it.
    pub(super) async fn directory(&self, queue: &Rc<Queue>) -> Result<Directory> {
        let header = self.header.lock().header.clone();
        Directory::read(queue, &self.file, &self.path, &header).await
    }

    /// The bits that the file has of a bitmap.
    ///
    /// # Errors
    /// Its table is damaged or does not fit the disk's size; the host's.
    pub(super) async fn load_bits(&self, queue: &Rc<Queue>, entry: &DirectoryEntry) -> Result<Bits> {
        let header = self.header.lock().header.clone();
        let table = read_table(queue, &self.file, &self.path, &header, entry).await?;
        let cluster = self.cluster_size();
        let len = entry.data_len(self.size);
        if len > limits::BITMAP_BYTES_MAX || self.geometry.cluster_bits.clusters_for(len) != table.len() as u64 {
            let name = String::from_utf8_lossy(&entry.name);
            let problem = format!("the table of the bitmap '{name}' does not fit the disk's size");
            return Err(damaged(&self.path, &problem));
        }
        let bits = Bits::of(entry, self.size);
        for (i, entry) in table.iter().enumerate() {
            let at = i as u64 * cluster;
            let here = cluster.min(len - at);
            match entry {
                BitmapTableEntry::AllZeros => {}
                BitmapTableEntry::AllOnes => bits.load(at, &vec![0xff; here as usize]),
                BitmapTableEntry::Cluster(host) => {
                    let read = queue.read_buffer(&self.file, host.get(), here as usize).await;
                    bits.load(at, &read.map_err(|e| self.io_error("cannot read a bitmap", host.get(), e))?);
                }
            }
        }
        Ok(bits)
    }

    /// Writes bits, and their table, to new places; `entry` names the table then. Nothing in the file does.
    pub(super) async fn store_bits(
        &self,
        queue: &Rc<Queue>,
        bits: &Bits,
        entry: &DirectoryEntry,
    ) -> Result<DirectoryEntry> {
        let cluster = self.cluster_size();
        let mut table = Vec::new();
        let mut at = 0;
        while at < bits.data_len() {
            let part = bits.part(at, cluster);
            let stored = if part.iter().all(|&byte| byte == 0) {
                BitmapTableEntry::AllZeros
            } else if bits.is_full(at, &part) {
                BitmapTableEntry::AllOnes
            } else {
                BitmapTableEntry::Cluster(self.write_structure(queue, Structure::BitmapData, &part).await?)
            };
            table.extend(stored.encode().map_err(|e| self.format_error(&e))?.to_be_bytes());
            at += cluster;
        }
        let table_offset = self.write_structure(queue, Structure::BitmapTable, &table).await?;
        // Bounded by the bits that a bitmap may have.
        let table_size = u32::try_from(table.len() / 8).unwrap_or(u32::MAX);
        Ok(DirectoryEntry { table_offset, table_size, ..entry.clone() })
    }

    /// Puts a directory of these entries in the place of `old`, and frees what only that one named. The caller is alone with the image.
    /// When this fails, only the file can tell which of them it has.
    pub(super) async fn switch_directory(
        &self,
        queue: &Rc<Queue>,
        old: &Directory,
        entries: Vec<DirectoryEntry>,
        vouched: bool,
    ) -> Result<()> {
        let header = self.header.lock().header.clone();
        // What is to be freed must be understood before it is forgotten. What nobody vouched for is never freed: it may be
        // somebody else's by now.
        let mut dropped = Vec::new();
        if let Some(place) = old.place.filter(|_| old.vouched) {
            let kept = |offset| entries.iter().any(|entry| entry.table_offset == offset);
            for entry in old.entries.iter().filter(|entry| !kept(entry.table_offset)) {
                let table = read_table(queue, &self.file, &self.path, &header, entry).await?;
                dropped.extend(data_runs(&header, &table));
                dropped.push(self.run_of(entry.table_offset, u64::from(entry.table_size) * 8));
            }
            dropped.push(self.run_of(place.directory_offset, place.directory_size));
        }
        let extension = self.write_directory(queue, &entries).await?;
        self.settle(queue).await?;
        self.switch_extension(queue, extension, vouched).await?;
        for clusters in dropped {
            let freed = self.drop_clusters(queue, clusters).await;
            self.warn_of_leak(freed);
        }
        Ok(())
    }

    fn run_of(&self, place: HostOffset, bytes: u64) -> Range<u64> {
        let bits = self.geometry.cluster_bits;
        let first = bits.index_of(place.get());
        first..first + bits.clusters_for(bytes)
    }

    /// Writes a directory to a new place: what the header is to say of it.
    async fn write_directory(&self, queue: &Rc<Queue>, entries: &[DirectoryEntry]) -> Result<Option<BitmapsExtension>> {
        if entries.is_empty() {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        for entry in entries {
            entry.encode(&self.geometry, &mut bytes).map_err(|e| self.format_error(&e))?;
        }
        let directory_size = bytes.len() as u64;
        if directory_size > limits::BITMAP_DIRECTORY_BYTES_MAX {
            let message = "there is no room for another bitmap in the directory";
            return Err(Error::new(ErrorKind::Invalid, message).at_path(&self.path));
        }
        let directory_offset = self.write_structure(queue, Structure::BitmapDirectory, &bytes).await?;
        // As many as a directory of that size can have fit.
        let nb_bitmaps = u32::try_from(entries.len()).unwrap_or(u32::MAX);
        Ok(Some(BitmapsExtension { nb_bitmaps, directory_size, directory_offset }))
    }

    /// Names another directory in the header, or none.
    async fn switch_extension(
        &self,
        queue: &Rc<Queue>,
        extension: Option<BitmapsExtension>,
        vouched: bool,
    ) -> Result<()> {
        let _commit = self.commit_lock.lock().await;
        let old = self.header.lock().header.clone();
        let area = self.header_area(queue).await?;
        let mut new = old.clone();
        new.autoclear.set(Autoclear::BITMAPS, extension.is_some() && vouched);
        new.set_extension(ExtensionKind::Bitmaps, extension.map(|extension| extension.encode()));
        let switch = match new.switch_from(&old, &area) {
            // What nobody vouches for means nothing: it may stay where it cannot be taken out.
            Err(FormatError::HeaderFull { .. }) if extension.is_none() => {
                let mut kept = old.clone();
                kept.autoclear.remove(Autoclear::BITMAPS);
                kept.switch_from(&old, &area)
            }
            other => other,
        };
        let switch = switch.map_err(|e| {
            let message = format!("the header has no room to name the bitmaps: {e}");
            Error::new(ErrorKind::Invalid, message).at_path(&self.path)
        })?;
        self.take_header_steps(queue, switch).await
    }

    /// Changes flags in the directory, durably. Each entry's are in one sector, so each has the old ones or the new.
    pub(super) async fn write_flags(
        &self,
        queue: &Rc<Queue>,
        directory: &mut Directory,
        change: impl Fn(&DirectoryEntry) -> BitmapFlags,
    ) -> Result<()> {
        let Some(place) = directory.place.filter(|_| directory.vouched) else { return Ok(()) };
        let encode = |entries: &[DirectoryEntry]| {
            let mut bytes = Vec::new();
            let encoded: std::result::Result<(), FormatError> =
                entries.iter().try_for_each(|entry| entry.encode(&self.geometry, &mut bytes));
            encoded.map(|()| bytes).map_err(|e| self.format_error(&e))
        };
        let old = encode(&directory.entries)?;
        let mut entries = directory.entries.clone();
        entries.iter_mut().for_each(|entry| entry.flags = change(entry));
        let new = encode(&entries)?;
        let mut at = place.directory_offset.get();
        let mut changed = false;
        for (old, new) in old.chunks(512).zip(new.chunks(512)) {
            if old != new {
                // Behind the directory's end its last sector is free: clusters are whole sectors.
                let mut sector = new.to_vec();
                sector.resize(512, 0);
                self.write_as(queue, Structure::BitmapDirectory, HostOffset::new(at), &sector).await?;
                changed = true;
            }
            at += 512;
        }
        directory.entries = entries;
        if changed { self.barrier(queue, Barrier::Header).await } else { Ok(()) }
    }
}
