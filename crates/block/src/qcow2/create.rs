//! Making a new, empty image.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use cowhand_qcow2::{
    CreateParams, FormatError, Header, HostOffset, L1Entry, L2Entry, RefTableEntry, SubclusterBitmap, limits, refcount,
};

use crate::chain;
use crate::disk::{block_on, blocking_driver};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Barrier, Buffer, File, OpenMode, Storage, zero_segs};
use crate::queue::Queue;
use crate::spec::{DiskSpec, Format};
use crate::sync::Arc;

/// How many zeros are written at once.
const FILL_BYTES: u64 = 4 << 20;

/// What of a new image's space is taken at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing: tables and clusters come as they are written.
    #[default]
    Off,
    /// The L2 tables, and a place in the file for each cluster; the host's space comes as they are written.
    Metadata,
    /// The host's space too, as the host reserves it.
    Falloc,
    /// The host's space too, written with zeros.
    Full,
}

/// Writes an empty image into the empty file `file`: the header last, when all it names is durable.
pub(crate) async fn create(
    queue: &Rc<Queue>,
    file: &File,
    path: &Path,
    params: &CreateParams,
    no_flush: bool,
) -> Result<()> {
    create_with(queue, (file, None), path, params, Preallocation::Off, no_flush).await
}

/// Makes a new image file and, if it is to have one, its data file, which must not exist yet, with their directory entries durable.
/// What could not be finished is removed.
///
/// # Errors
/// The options contradict each other; the file exists; the host's.
pub fn create_image(
    storage: &Arc<dyn Storage>,
    path: &Path,
    params: &CreateParams,
    preallocation: Preallocation,
) -> Result<()> {
    make_image(storage, path, params, preallocation, Existing::Refuse)
}

/// The same in place of files that are there already, whose content is lost. They are locked as for writing, so that nobody loses what
/// he uses.
///
/// # Errors
/// The options contradict each other, or another process uses a file: nothing has changed then. The host's: a file that was there
/// is no image then, and one that was not is removed.
pub fn create_image_over(
    storage: &Arc<dyn Storage>,
    path: &Path,
    params: &CreateParams,
    preallocation: Preallocation,
) -> Result<()> {
    make_image(storage, path, params, preallocation, Existing::Replace)
}

/// Makes a raw image of `size` bytes, a multiple of 512 or not, in place of a file that is there already (whose content is lost) or
/// anew. Of a block device nothing changes: it has to be large enough.
///
/// # Errors
/// Metadata is asked for, which raw images have none of; another process uses the file; the host's.
pub fn create_raw_over(storage: &Arc<dyn Storage>, path: &Path, size: u64, preallocation: Preallocation) -> Result<()> {
    if preallocation == Preallocation::Metadata {
        let message = "a raw disk has no metadata to preallocate (off, falloc and full it knows)";
        return Err(Error::new(ErrorKind::Invalid, message).at_path(path));
    }
    let queue = Queue::new(blocking_driver(storage)?);
    let mut made = Made { storage, existing: Existing::Replace, paths: Vec::new() };
    let result = made.open(path).and_then(|file| {
        let task = {
            let (queue, file, path) = (queue.clone(), file.clone(), path.to_path_buf());
            async move {
                let io_error = |e: std::io::Error| Error::io("cannot write", e).at_path(&path);
                if !file.traits().block_device {
                    queue.set_length(&file, 0).await.map_err(io_error)?;
                }
                set_length(&queue, &file, &path, size).await?;
                take_space(&queue, &file, 0, size, preallocation).await.map_err(io_error)?;
                queue.flush(&file, Barrier::Create).await.map_err(io_error)
            }
        };
        let written = block_on(&queue, task);
        file.unlock();
        written
    });
    result.and_then(|()| made.sync()).inspect_err(|_| made.undo())
}

/// What becomes of a file that is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Existing {
    Refuse,
    Replace,
}

/// The files of an image that is being made.
struct Made<'a> {
    storage: &'a Arc<dyn Storage>,
    existing: Existing,
    /// Those that were not there before.
    paths: Vec<PathBuf>,
}

impl Made<'_> {
    /// Makes a file, or takes the one that is there, locked.
    fn open(&mut self, path: &Path) -> Result<File> {
        if self.existing == Existing::Replace {
            let spec = DiskSpec::new(path, Format::Raw);
            let opened = self.storage.open(path, OpenMode { write: true, direct: false });
            match opened {
                Ok(file) => {
                    chain::lock(&file, path, true, &spec)?;
                    return Ok(file);
                }
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(Error::io("Could not create file", e).at_path(path)),
            }
        }
        let file = self.storage.create(path).map_err(|e| Error::io("Could not create file", e).at_path(path))?;
        self.paths.push(path.to_path_buf());
        Ok(file)
    }

    /// Makes the directory entries durable.
    fn sync(&self) -> Result<()> {
        for path in &self.paths {
            let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let synced = self.storage.sync_dir(dir);
            synced.map_err(|e| Error::io("cannot make the directory entry durable", e).at_path(path))?;
        }
        Ok(())
    }

    /// Removes what was made: what went wrong is what matters, and a file that stays has no header, and is no image.
    fn undo(&self) {
        for path in &self.paths {
            let _ = self.storage.remove(path);
        }
    }
}

fn make_image(
    storage: &Arc<dyn Storage>,
    path: &Path,
    params: &CreateParams,
    preallocation: Preallocation,
    existing: Existing,
) -> Result<()> {
    // Before anything is touched.
    check(path, params, preallocation)?;
    let queue = Queue::new(blocking_driver(storage)?);
    let data_path = match &params.data_file {
        None => None,
        Some(name) => Some(chain::named_file(name, path).ok_or_else(|| {
            let message = "its data file is not a plain file, which is all that cowhand opens";
            Error::new(ErrorKind::Invalid, message).at_path(path)
        })?),
    };
    let mut made = Made { storage, existing, paths: Vec::new() };
    let result = made.open(path).and_then(|file| {
        let data = data_path.as_deref().map(|path| made.open(path)).transpose()?;
        let task = {
            let (queue, path, params) = (queue.clone(), path.to_path_buf(), params.clone());
            let (file, data) = (file.clone(), data.clone());
            async move {
                for old in [Some(&file), data.as_ref()].into_iter().flatten() {
                    if !old.traits().block_device {
                        let emptied = queue.set_length(old, 0).await;
                        emptied.map_err(|e| Error::io("cannot empty the file", e).at_path(&path))?;
                    }
                }
                create_with(&queue, (&file, data.as_ref()), &path, &params, preallocation, false).await
            }
        };
        let written = block_on(&queue, task);
        file.unlock();
        if let Some(data) = &data {
            data.unlock();
        }
        written
    });
    result.and_then(|()| made.sync()).inspect_err(|_| made.undo())
}

/// Why there can be no such image, as far as that can be told before.
fn check(path: &Path, params: &CreateParams, preallocation: Preallocation) -> Result<(Header, Plan, Preallocation)> {
    let invalid = |message: &str| Error::new(ErrorKind::Invalid, message).at_path(path);
    let header = params.header().map_err(|e| invalid(&e.to_string()).briefly(e.brief()))?;
    if preallocation != Preallocation::Off && params.backing.is_some() && !params.extended_l2 {
        return Err(invalid("Backing file and preallocation can only be used at the same time if extended_l2 is on"));
    }
    // What is to read as the disk by itself has all of it mapped. (Sharp edge 41.)
    let preallocation = match preallocation {
        Preallocation::Off if params.data_file_raw => Preallocation::Metadata,
        asked => asked,
    };
    let plan = Plan::new(&header, preallocation);
    if header.cluster_bits.size() * plan.tables > limits::REFCOUNT_TABLE_BYTES_MAX {
        return Err(invalid(
            "the refcounts of so large an image would not fit; take larger clusters or narrower refcounts",
        ));
    }
    Ok((header, plan, preallocation))
}

/// Makes a file this long. A block device has to be.
async fn set_length(queue: &Rc<Queue>, file: &File, path: &Path, len: u64) -> Result<()> {
    let io_error = |e: std::io::Error| Error::io("Could not resize file", e).at_path(path);
    if !file.traits().block_device {
        return queue.set_length(file, len).await.map_err(io_error);
    }
    let has = file.length().map_err(io_error)?;
    if has < len {
        let message = format!("the block device is too small: it has {has} bytes, and {len} are needed");
        return Err(Error::new(ErrorKind::NoSpace, message).at_path(path));
    }
    Ok(())
}

/// Where the structures of a new image lie, in clusters: one after the other, after the header.
struct Plan {
    /// Clusters of the refcount table, from 1 on.
    tables: u64,
    /// Refcount blocks.
    blocks: u64,
    /// Clusters of the L1 table.
    l1: u64,
    /// L2 tables.
    l2: u64,
    /// Clusters for guest data.
    data: u64,
}

impl Plan {
    fn new(header: &Header, preallocation: Preallocation) -> Self {
        let bits = header.cluster_bits;
        let l1 = bits.clusters_for(u64::from(header.l1_size) * 8);
        let (l2, data) = match preallocation {
            Preallocation::Off => (0, 0),
            // Guest data lies elsewhere.
            _ if header.has_data_file() => (header.l1_entries_needed(), 0),
            _ => (header.l1_entries_needed(), bits.clusters_for(header.size)),
        };
        let mut plan = Self { tables: 1, blocks: 1, l1, l2, data };
        // The counts depend on each other a little.
        loop {
            let blocks = plan.total().div_ceil(header.refcount_block_entries());
            let tables = bits.clusters_for(plan.blocks * 8);
            if blocks <= plan.blocks && tables <= plan.tables {
                return plan;
            }
            (plan.tables, plan.blocks) = (tables.max(plan.tables), blocks.max(plan.blocks));
        }
    }

    fn first_block(&self) -> u64 {
        1 + self.tables
    }

    fn first_l1(&self) -> u64 {
        self.first_block() + self.blocks
    }

    fn first_l2(&self) -> u64 {
        self.first_l1() + self.l1
    }

    fn first_data(&self) -> u64 {
        self.first_l2() + self.l2
    }

    fn total(&self) -> u64 {
        self.first_data() + self.data
    }
}

/// The same, with space taken at once: all clusters of the disk lie together, in order, after the tables; or in the data file, which
/// must be given then.
///
/// # Errors
/// Also when preallocation is asked for over a backing file, whose content the clusters would hide.
pub(crate) async fn create_with(
    queue: &Rc<Queue>,
    (file, data_file): (&File, Option<&File>),
    path: &Path,
    params: &CreateParams,
    preallocation: Preallocation,
    no_flush: bool,
) -> Result<()> {
    let format_error = |e: FormatError| Error::new(ErrorKind::Invalid, e.to_string()).briefly(e.brief()).at_path(path);
    let io_error = |e: std::io::Error| Error::io("cannot write", e).at_path(path);
    let (mut header, plan, preallocation) = check(path, params, preallocation)?;
    let bits = header.cluster_bits;
    let place = |cluster: u64| HostOffset::new(cluster << bits.bits());
    header.refcount_table_offset = place(1);
    // Bounded just above.
    header.refcount_table_clusters = plan.tables as u32;
    if plan.l1 > 0 {
        header.l1_table_offset = place(plan.first_l1());
    }

    let cluster = bits.size() as usize;
    let per_block = header.refcount_block_entries();
    let mut table = Buffer::zeroed(plan.tables as usize * cluster);
    for (block, entry) in (0..plan.blocks).zip(table.chunks_exact_mut(8)) {
        let at = place(plan.first_block() + block);
        entry.copy_from_slice(&RefTableEntry::new(at).map_err(format_error)?.raw().to_be_bytes());
        let mut counts = Buffer::zeroed(cluster);
        for index in 0..plan.total().saturating_sub(block * per_block).min(per_block) {
            refcount::set(params.refcount_order, &mut counts, index as usize, 1).map_err(format_error)?;
        }
        queue.write_buffer(file, at.get(), counts).await.map_err(io_error)?;
    }
    queue.write_buffer(file, place(1).get(), table).await.map_err(io_error)?;
    let mut l1 = Buffer::zeroed(plan.l1 as usize * cluster);
    for (table, entry) in (0..plan.l2).zip(l1.chunks_exact_mut(8)) {
        let at = place(plan.first_l2() + table);
        entry.copy_from_slice(&L1Entry::new(at, true).map_err(format_error)?.raw().to_be_bytes());
        let l2 = preallocated_l2(&header, &plan, table).map_err(format_error)?;
        queue.write_buffer(file, at.get(), l2).await.map_err(io_error)?;
    }
    if plan.l2 > 0 {
        queue.write_buffer(file, header.l1_table_offset.get(), l1).await.map_err(io_error)?;
    }
    set_length(queue, file, path, place(plan.total()).get()).await?;
    take_space(queue, file, place(plan.first_data()).get(), plan.data << bits.bits(), preallocation)
        .await
        .map_err(io_error)?;
    if let Some(data_file) = data_file {
        set_length(queue, data_file, path, header.size).await?;
        take_space(queue, data_file, 0, header.size, preallocation).await.map_err(io_error)?;
        if !no_flush {
            queue.flush(data_file, Barrier::Create).await.map_err(io_error)?;
        }
    }
    let encoded = header.encode().map_err(format_error)?;
    write_new_header(queue, file, &encoded, no_flush).await.map_err(io_error)
}

/// Writes the header area of an image that nobody uses yet, durably, and its first sector last: until that is there the file names
/// nothing, neither its tables nor the strings that lie in other sectors. (Sharp edge 57.)
pub(crate) async fn write_new_header(
    queue: &Rc<Queue>,
    file: &File,
    area: &[u8],
    no_flush: bool,
) -> std::io::Result<()> {
    let (first, rest) = area.split_at(area.len().min(512));
    if !rest.is_empty() {
        queue.write_buffer(file, 512, Buffer::from_bytes(rest)).await?;
    }
    if !no_flush {
        queue.flush(file, Barrier::Create).await?;
    }
    queue.write_buffer(file, 0, Buffer::from_bytes(first)).await?;
    if no_flush { Ok(()) } else { queue.flush(file, Barrier::Header).await }
}

/// A preallocated L2 table. With extended L2 entries no subcluster is allocated: what they are shows through, or is zero; but in a data
/// file that is to read as the disk, all are.
fn preallocated_l2(header: &Header, plan: &Plan, table: u64) -> std::result::Result<Buffer, FormatError> {
    let bits = header.cluster_bits;
    let mut l2 = Buffer::zeroed(bits.size() as usize);
    let first = table * header.l2_entries();
    let entries = l2.chunks_exact_mut(header.geometry().l2_entry_size() as usize);
    // In a data file everything lies where the guest has it.
    let first_data = if header.has_data_file() { 0 } else { plan.first_data() };
    for (cluster, entry) in (first..bits.clusters_for(header.size)).zip(entries) {
        let place = HostOffset::new((first_data + cluster) << bits.bits());
        entry[..8].copy_from_slice(&L2Entry::data(place, true)?.raw().to_be_bytes());
        if let Some(bitmap) = entry.get_mut(8..16)
            && header.is_data_file_raw()
        {
            bitmap.copy_from_slice(&SubclusterBitmap::ALL_ALLOCATED.raw().to_be_bytes());
        }
    }
    Ok(l2)
}

/// Has the host give space for guest data, which reads as zeros.
async fn take_space(
    queue: &Rc<Queue>,
    file: &File,
    offset: u64,
    len: u64,
    preallocation: Preallocation,
) -> std::io::Result<()> {
    match preallocation {
        _ if len == 0 => Ok(()),
        // The file is as long as that already, and empty there.
        Preallocation::Off | Preallocation::Metadata => Ok(()),
        Preallocation::Falloc => queue.allocate(file, offset, len).await,
        Preallocation::Full => {
            let mut done = 0;
            while done < len {
                let n = (len - done).min(FILL_BYTES);
                queue.write(file, offset + done, zero_segs(n), Vec::new()).await?;
                done += n;
            }
            Ok(())
        }
    }
}
