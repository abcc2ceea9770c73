//! Persistent dirty bitmaps: which parts of the disk were written since somebody last asked. (Specification, "Bitmaps".)
//!
//! [`bits`] are a bitmap's bits in memory; [`directory`] is how bitmaps are read from the file and come into it; [`live`] keeps the
//! enabled ones up to date. Here: what can be done with them.
//!
//! A bitmap in the file is one of four: *disabled* and good, nobody's business until somebody asks; *enabled* and tracked, in use
//! as long as the image is open for writing; *in use* but not tracked, so that some writer did not save it: inconsistent,
//! which can only be removed; or with *extra data* that nobody here knows: it stays as it is, unless a write makes it wrong,
//! and then it is marked as in use. (Sharp edges 40 and 55.)
//!
//! A disabled bitmap changes in the file, as snapshots do: beside what is there, and switched to by the header. An enabled one
//! changes in memory. All of this is done alone with the image, but for reading.

mod bits;
mod directory;
mod live;

use std::ops::Range;
use std::rc::Rc;

use cowhand_qcow2::{BitmapFlags, BitmapKind, DirectoryEntry, HostOffset, limits};

use self::bits::Bits;
pub(super) use self::directory::Directory;
pub(super) use self::live::Live;
use self::live::Tracked;
use super::Image;
use crate::bitmap::{BitmapInfo, BitmapState};
use crate::error::{Error, ErrorKind, Result};
use crate::queue::Queue;
use crate::sync::Arc;

/// The granularity of a bitmap for which none is asked, as QEMU picks it: the cluster size, within these bounds of bytes.
const GRANULARITY: (u64, u64) = (4096, 65536);

/// Bits by reference or read for the purpose.
enum Found {
    Live(Arc<Tracked>),
    Stored(Bits),
}

impl Found {
    fn bits(&self) -> &Bits {
        match self {
            Self::Live(tracked) => &tracked.bits,
            Self::Stored(bits) => bits,
        }
    }
}

impl Image {
    fn bitmap_error(&self, kind: ErrorKind, message: String) -> Error {
        Error::new(kind, message).at_path(&self.path)
    }

    /// What there is.
    pub(crate) async fn bitmaps(&self, queue: &Rc<Queue>) -> Result<Vec<BitmapInfo>> {
        let info = |entry: &DirectoryEntry| {
            let info = BitmapInfo::new(entry, self.size);
            // In use by us.
            let live = self.live(&entry.name).is_some();
            if live { BitmapInfo { state: BitmapState::Consistent, ..info } } else { info }
        };
        Ok(self.any_directory(queue).await?.entries.iter().map(info).collect())
    }

    /// The bitmap's entry, if it may be used.
    fn usable<'a>(&self, directory: &'a Directory, name: &str) -> Result<&'a DirectoryEntry> {
        let refuse = |kind, what: &str| Err(self.bitmap_error(kind, format!("the bitmap '{name}' {what}")));
        let Some(entry) = directory.find(name.as_bytes()) else {
            return Err(self.bitmap_error(ErrorKind::NotFound, format!("Dirty bitmap '{name}' not found")));
        };
        if !entry.is_usable() {
            return refuse(ErrorKind::Unsupported, "has extra data that is not known, so it is kept as it is");
        }
        if entry.flags.contains(BitmapFlags::IN_USE) && self.live(&entry.name).is_none() {
            let message = format!("Bitmap '{name}' is inconsistent and cannot be used");
            return Err(self.bitmap_error(ErrorKind::Invalid, message));
        }
        Ok(entry)
    }

    /// Whether there is a bitmap of that name, which may be used.
    pub(crate) async fn check_bitmap(&self, queue: &Rc<Queue>, name: &str) -> Result<()> {
        self.usable(&self.any_directory(queue).await?, name).map(drop)
    }

    /// Whether there is one, which may be removed.
    pub(crate) async fn check_bitmap_removable(&self, queue: &Rc<Queue>, name: &str) -> Result<()> {
        self.removable(&self.any_directory(queue).await?, name)
    }

    fn removable(&self, directory: &Directory, name: &str) -> Result<()> {
        match directory.find(name.as_bytes()) {
            Some(entry) if entry.flags.contains(BitmapFlags::IN_USE) => Ok(()),
            _ => self.usable(directory, name).map(drop),
        }
    }

    /// Whether a bitmap can be made.
    pub(crate) async fn check_new_bitmap(&self, queue: &Rc<Queue>, name: &str, granularity: Option<u64>) -> Result<()> {
        self.new_bitmap(&self.directory(queue).await?, name, granularity).map(drop)
    }

    async fn found(&self, queue: &Rc<Queue>, directory: &Directory, name: &str) -> Result<Found> {
        let entry = self.usable(directory, name)?;
        Ok(match self.live(&entry.name) {
            Some(tracked) => Found::Live(tracked.clone()),
            None => Found::Stored(self.load_bits(queue, entry).await?),
        })
    }

    /// The ranges of the disk that the bitmap says have changed.
    pub(crate) async fn bitmap_ranges(&self, queue: &Rc<Queue>, name: &str) -> Result<Vec<Range<u64>>> {
        let directory = self.any_directory(queue).await?;
        Ok(self.found(queue, &directory, name).await?.bits().ranges())
    }

    /// Whether the bitmap changes in memory alone.
    pub(crate) fn is_tracked(&self, name: &str) -> bool {
        self.live(name.as_bytes()).is_some()
    }

    pub(crate) fn check_bitmaps_writable(&self) -> Result<()> {
        self.check_writable()?;
        if self.geometry.version < 3 {
            let message = "Cannot store dirty bitmaps in qcow2 v2 files";
            return Err(self.bitmap_error(ErrorKind::Unsupported, message.into()));
        }
        Ok(())
    }

    /// Adds a bitmap with no bit set, of a granularity in bytes.
    pub(crate) async fn create_bitmap(
        &self,
        queue: &Rc<Queue>,
        name: &str,
        granularity: Option<u64>,
        enabled: bool,
    ) -> Result<()> {
        // Where the header does not vouch for them, the bitmaps that are there are forgotten: what they name may be used otherwise.
        let directory = self.directory(queue).await?;
        let entry = self.new_bitmap(&directory, name, granularity)?;
        let bits = Bits::of(&entry, self.size);
        let mut entry = self.store_bits(queue, &bits, &entry).await?;
        if enabled {
            self.check_memory(bits.memory())?;
            entry.flags = BitmapFlags::AUTO | BitmapFlags::IN_USE;
            self.joining.lock().push(Arc::new(Tracked { name: entry.name.clone(), bits }));
        }
        let mut entries = directory.entries.clone();
        entries.push(entry);
        self.switch_directory(queue, &directory, entries, true).await
    }

    /// A bitmap that is not there yet, or why there cannot be one.
    fn new_bitmap(&self, directory: &Directory, name: &str, granularity: Option<u64>) -> Result<DirectoryEntry> {
        let refuse = |message: String| Err(self.bitmap_error(ErrorKind::Invalid, message));
        if name.is_empty() || name.len() > limits::BITMAP_NAME_MAX as usize {
            return refuse(format!("a bitmap's name has 1 to {} bytes, not {}", limits::BITMAP_NAME_MAX, name.len()));
        }
        if directory.find(name.as_bytes()).is_some() {
            return refuse(format!("Bitmap already exists: {name}"));
        }
        if directory.entries.len() >= limits::BITMAPS_MAX as usize {
            return refuse(format!("there are {} bitmaps already, which is the most", directory.entries.len()));
        }
        let granularity = granularity.unwrap_or_else(|| self.cluster_size().clamp(GRANULARITY.0, GRANULARITY.1));
        let (min, max) = (limits::BITMAP_GRANULARITY_BITS_MIN, limits::BITMAP_GRANULARITY_BITS_MAX);
        let bits = granularity.trailing_zeros();
        if !granularity.is_power_of_two() || !(u32::from(min)..=u32::from(max)).contains(&bits) {
            return refuse("Granularity must be power of 2 and at least 512".into());
        }
        let entry = DirectoryEntry {
            table_offset: HostOffset::new(0),
            table_size: 0,
            flags: BitmapFlags::empty(),
            kind: BitmapKind::DirtyTracking,
            // At most 31.
            granularity_bits: bits as u8,
            name: name.as_bytes().to_vec(),
            extra_data: Vec::new(),
        };
        if self.size == 0 {
            return refuse("a disk without a byte has nothing that could change".into());
        }
        let len = entry.data_len(self.size);
        if len > limits::BITMAP_BYTES_MAX {
            return refuse(format!("a bitmap of that granularity would take {len} bytes; take a larger one"));
        }
        if directory.tables_len() + self.bitmap_table_len(&entry, self.size) > directory::TABLES_MAX {
            return refuse(
                "the tables of all bitmaps would be too large; take a larger granularity, or remove some".into(),
            );
        }
        Ok(entry)
    }

    /// Bytes of a bitmap's table for a disk of `size` bytes.
    fn bitmap_table_len(&self, entry: &DirectoryEntry, size: u64) -> u64 {
        self.geometry.cluster_bits.clusters_for(entry.data_len(size)) * 8
    }

    pub(crate) async fn remove_bitmap(&self, queue: &Rc<Queue>, name: &str) -> Result<()> {
        let directory = self.any_directory(queue).await?;
        self.removable(&directory, name)?;
        let mut entries = directory.entries.clone();
        entries.retain(|entry| entry.name != name.as_bytes());
        self.switch_directory(queue, &directory, entries, directory.is_vouched()).await
    }

    /// From now on the bitmap is kept up to date, beginning with the bits that it has.
    pub(crate) async fn enable_bitmap(&self, queue: &Rc<Queue>, name: &str) -> Result<()> {
        let mut directory = self.any_directory(queue).await?;
        let Found::Stored(bits) = self.found(queue, &directory, name).await? else { return Ok(()) };
        self.check_memory(bits.memory())?;
        self.joining.lock().push(Arc::new(Tracked { name: name.as_bytes().to_vec(), bits }));
        let flags = |entry: &DirectoryEntry| match entry.name == name.as_bytes() {
            true => entry.flags | BitmapFlags::AUTO | BitmapFlags::IN_USE,
            false => entry.flags,
        };
        self.write_flags(queue, &mut directory, flags).await
    }

    /// From now on the bitmap stays as it is.
    pub(crate) async fn disable_bitmap(&self, queue: &Rc<Queue>, name: &str) -> Result<()> {
        let directory = self.any_directory(queue).await?;
        match self.found(queue, &directory, name).await? {
            Found::Live(tracked) => self.rewrite_bitmap(queue, &directory, name, &tracked.bits).await,
            Found::Stored(_) => Ok(()),
        }
    }

    /// Clears all bits of a bitmap.
    pub(crate) async fn clear_bitmap(&self, queue: &Rc<Queue>, name: &str) -> Result<()> {
        if let Some(tracked) = self.live(name.as_bytes()) {
            tracked.bits.clear();
            return Ok(());
        }
        let directory = self.any_directory(queue).await?;
        let none = Bits::of(self.usable(&directory, name)?, self.size);
        self.rewrite_bitmap(queue, &directory, name, &none).await
    }

    /// Sets in the bitmap `into` what `from` has set.
    pub(crate) async fn merge_bitmap(&self, queue: &Rc<Queue>, into: &str, from: &str) -> Result<()> {
        let directory = self.any_directory(queue).await?;
        let source = self.found(queue, &directory, from).await?;
        let target = self.found(queue, &directory, into).await?;
        target.bits().merge(source.bits());
        match &target {
            Found::Live(_) => Ok(()),
            Found::Stored(bits) => self.rewrite_bitmap(queue, &directory, into, bits).await,
        }
    }

    /// Sets the bits for ranges of bytes of the disk.
    pub(crate) async fn set_in_bitmap(&self, queue: &Rc<Queue>, name: &str, ranges: &[Range<u64>]) -> Result<()> {
        let directory = self.any_directory(queue).await?;
        let target = self.found(queue, &directory, name).await?;
        for range in ranges {
            let (start, end) = (range.start.min(self.size), range.end.min(self.size));
            if start < end {
                target.bits().mark(start, end - start);
            }
        }
        match &target {
            Found::Live(_) => Ok(()),
            Found::Stored(bits) => self.rewrite_bitmap(queue, &directory, name, bits).await,
        }
    }

    /// Writes a disabled bitmap, or one that is disabled with that.
    async fn rewrite_bitmap(&self, queue: &Rc<Queue>, directory: &Directory, name: &str, bits: &Bits) -> Result<()> {
        let mut entries = directory.entries.clone();
        for entry in entries.iter_mut().filter(|entry| entry.name == name.as_bytes()) {
            *entry = self.store_bits(queue, bits, entry).await?;
            entry.flags.remove(BitmapFlags::AUTO | BitmapFlags::IN_USE);
        }
        self.switch_directory(queue, directory, entries, true).await
    }
}
