//! Making a new, empty image.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use cowhand_qcow2::{
    CreateParams, CryptMethod, FormatError, Header, HostOffset, L1Entry, L2Entry, LuksExtension, RefTableEntry,
    SubclusterBitmap, limits, refcount,
};

use super::filling::marked;
use crate::chain::{self, OpenPolicy};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Barrier, Buffer, File, Storage, zero_segs};
use crate::new_image::{FileHints, NewFormat, NewImage, make_image};
use crate::queue::Queue;
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
    let policy = OpenPolicy { storage: storage.clone(), ..OpenPolicy::host() };
    let format = NewFormat::Qcow2(Box::new(params.clone()), None);
    let (path, hints) = (path.to_path_buf(), FileHints::default());
    let new = NewImage { path, format, preallocation, replace: false, unfinished: false, hints };
    make_image(&policy, &new).map(drop)
}

/// Where the external data file of a new image is to be, if it has one.
pub(crate) fn data_path(path: &Path, params: &CreateParams) -> Result<Option<PathBuf>> {
    let Some(name) = &params.data_file else { return Ok(None) };
    let message = "its data file is not a plain file, which is all that cowhand opens";
    let named = chain::named_file(name, path);
    named.map(Some).ok_or_else(|| Error::new(ErrorKind::Invalid, message).at_path(path))
}

/// Where the structures of a new image lie, in clusters: one after the other, after the header.
struct Plan {
    /// Clusters of the refcount table, from 1 on.
    tables: u64,
    /// Refcount blocks.
    blocks: u64,
    /// Clusters of the L1 table.
    l1: u64,
    /// Clusters of the LUKS header with its key material.
    luks: u64,
    /// L2 tables.
    l2: u64,
    /// Clusters for guest data.
    data: u64,
}

impl Plan {
    fn new(header: &Header, preallocation: Preallocation, luks_len: u64) -> Self {
        let bits = header.cluster_bits;
        let l1 = bits.clusters_for(u64::from(header.l1_size) * 8);
        let (l2, data) = match preallocation {
            Preallocation::Off => (0, 0),
            // Guest data lies elsewhere.
            _ if header.has_data_file() => (header.l1_entries_needed(), 0),
            _ => (header.l1_entries_needed(), bits.clusters_for(header.size)),
        };
        let mut plan = Self { tables: 1, blocks: 1, l1, luks: bits.clusters_for(luks_len), l2, data };
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

    fn first_luks(&self) -> u64 {
        self.first_l1() + self.l1
    }

    fn first_l2(&self) -> u64 {
        self.first_luks() + self.luks
    }

    fn first_data(&self) -> u64 {
        self.first_l2() + self.l2
    }

    fn total(&self) -> u64 {
        self.first_data() + self.data
    }
}

/// Finds whether the options contradict each other, before anything is made; gives the header as far as it is known.
///
/// # Errors
/// They do: also when preallocation is asked for over a backing file, whose content the clusters would hide.
pub(crate) fn check(
    path: &Path,
    params: &CreateParams,
    preallocation: Preallocation,
    encrypted: bool,
) -> Result<Header> {
    let refuse = |message: String| Err(Error::new(ErrorKind::Invalid, message).at_path(path));
    let too_large = "The image size is too large for file format 'qcow2' (try using a larger cluster size)";
    let header = match params.header() {
        Ok(header) => header,
        Err(FormatError::OutOfRange { field, .. }) if field.name() == "size" => return refuse(too_large.into()),
        Err(e) => return Err(Error::new(ErrorKind::Invalid, e.to_string()).at_path(path).briefly(e.brief())),
    };
    data_path(path, params)?;
    if preallocation != Preallocation::Off && params.backing.is_some() && !params.extended_l2 {
        let message = "Backing file and preallocation can only be used at the same time if extended_l2 is on";
        return refuse(message.into());
    }
    if encrypted && params.data_file_raw {
        // What the data file reads as would not be the disk.
        return refuse("an encrypted image cannot have a data file that is a raw image by itself".into());
    }
    if encrypted && preallocation != Preallocation::Off && params.version < 3 {
        return refuse("space of encrypted images can be preallocated in version 3 (compat=v3) only".into());
    }
    let plan = Plan::new(&header, preallocation, 0);
    if header.cluster_bits.size() * plan.tables > limits::REFCOUNT_TABLE_BYTES_MAX {
        return refuse(too_large.into());
    }
    Ok(header)
}

/// Writes an image into an empty file, or onto a block device, with space taken at once; see [`Template::create`].
pub(crate) async fn create_with(
    queue: &Rc<Queue>,
    files: (&File, Option<&File>),
    path: &Path,
    params: &CreateParams,
    preallocation: Preallocation,
    no_flush: bool,
) -> Result<()> {
    let template = Template { params: params.clone(), preallocation, luks: None, unfinished: false };
    template.create(queue, files, path, no_flush).await
}

/// All that a new image is made of.
pub(crate) struct Template {
    pub(crate) params: CreateParams,
    pub(crate) preallocation: Preallocation,
    /// The LUKS header with its key material.
    pub(crate) luks: Option<Vec<u8>>,
    /// It is going to be filled, and does not look whole before.
    pub(crate) unfinished: bool,
}

impl Template {
    /// Writes the image: all clusters of the disk, if they are preallocated, lie together, in order, after the tables; or in the data file,
    /// which must be given then.
    ///
    /// # Errors
    /// As [`check`]; the host's; a block device that is too small.
    pub(crate) async fn create(
        &self,
        queue: &Rc<Queue>,
        (file, data_file): (&File, Option<&File>),
        path: &Path,
        no_flush: bool,
    ) -> Result<()> {
        let params = &self.params;
        let format_error = |e: FormatError| Error::new(ErrorKind::Invalid, e.to_string()).at_path(path);
        let io_error = |e: std::io::Error| Error::io("cannot write", e).at_path(path);
        let mut header = check(path, params, self.preallocation, self.luks.is_some())?;
        // What is to read as the disk by itself has all of it mapped. (Sharp edge 41.)
        let preallocation = match self.preallocation {
            Preallocation::Off if params.data_file_raw => Preallocation::Metadata,
            asked => asked,
        };
        let bits = header.cluster_bits;
        let luks = self.luks.as_deref().unwrap_or_default();
        let plan = Plan::new(&header, preallocation, luks.len() as u64);
        let place = |cluster: u64| HostOffset::new(cluster << bits.bits());
        header.refcount_table_offset = place(1);
        // Bounded by the check.
        header.refcount_table_clusters = plan.tables as u32;
        if plan.l1 > 0 {
            header.l1_table_offset = place(plan.first_l1());
        }
        if !luks.is_empty() {
            header.set_luks(Some(LuksExtension { offset: place(plan.first_luks()), len: luks.len() as u64 }));
        }
        let mut encoded = header.encode().map_err(format_error)?;
        if self.unfinished {
            encoded = marked(&encoded);
        }
        // As in QEMU's images the file ends with the L1 table, if that is the last of it.
        let end = match plan.l1 > 0 && plan.luks + plan.l2 + plan.data == 0 {
            true => header.l1_table_offset.get() + u64::from(header.l1_size) * 8,
            false => place(plan.total()).get(),
        };
        if file.traits().block_device {
            let length = file.length().map_err(io_error)?;
            if length < end {
                let message = format!("the device has {length} bytes, but the image takes {end}");
                return Err(Error::new(ErrorKind::NoSpace, message).at_path(path));
            }
            // Until the header is there again it is no image.
            queue.write_buffer(file, 0, Buffer::zeroed(encoded.len())).await.map_err(io_error)?;
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
        if !luks.is_empty() {
            let at = place(plan.first_luks()).get();
            queue.write_buffer(file, at, Buffer::from_bytes(luks)).await.map_err(io_error)?;
        }
        let mut l1 = Buffer::zeroed(plan.l1 as usize * cluster);
        for (table, entry) in (0..plan.l2).zip(l1.chunks_exact_mut(8)) {
            let at = place(plan.first_l2() + table);
            entry.copy_from_slice(&L1Entry::new(at, true).map_err(format_error)?.raw().to_be_bytes());
            let l2 = preallocated_l2(&header, &plan, table).map_err(format_error)?;
            queue.write_buffer(file, at.get(), l2).await.map_err(io_error)?;
        }
        // An empty table of a new file is a hole.
        if plan.l1 > 0 && (plan.l2 > 0 || file.traits().block_device) {
            queue.write_buffer(file, header.l1_table_offset.get(), l1).await.map_err(io_error)?;
        }
        if !file.traits().block_device {
            queue.set_length(file, end).await.map_err(io_error)?;
            let (first, len) = (place(plan.first_data()).get(), plan.data << bits.bits());
            take_space(queue, file, first, len, preallocation).await.map_err(io_error)?;
        }
        if let Some(data_file) = data_file {
            if !data_file.traits().block_device {
                queue.set_length(data_file, header.size).await.map_err(io_error)?;
                take_space(queue, data_file, 0, header.size, preallocation).await.map_err(io_error)?;
            }
            if !no_flush {
                queue.flush(data_file, Barrier::Create).await.map_err(io_error)?;
            }
        }
        write_new_header(queue, file, &encoded, no_flush).await.map_err(io_error)
    }
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
        // What the file's zeros mean when they are decrypted is no zeros.
        let l2_entry = match header.crypt_method == CryptMethod::None || header.is_extended_l2() {
            true => L2Entry::data(place, true)?,
            false => L2Entry::zero(Some(place), true)?,
        };
        entry[..8].copy_from_slice(&l2_entry.raw().to_be_bytes());
        if let Some(bitmap) = entry.get_mut(8..16)
            && header.is_data_file_raw()
        {
            bitmap.copy_from_slice(&SubclusterBitmap::ALL_ALLOCATED.raw().to_be_bytes());
        }
    }
    Ok(l2)
}

/// Has the host give space for guest data, which reads as zeros.
pub(crate) async fn take_space(
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
