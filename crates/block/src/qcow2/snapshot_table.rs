//! The table of internal snapshots, as it is in the file. (Specification, "Snapshots".)
//!
//! Not here: what snapshots hold ([`super::tree`]), and how the table changes ([`super::snapshot`]).

use std::path::Path;
use std::rc::Rc;

use cowhand_qcow2::{FormatError, Geometry, Header, L1Entry, Snapshot, limits};

use super::mapping::be64;
use crate::error::{Error, ErrorKind, Result};
use crate::io::File;
use crate::queue::Queue;

/// Bytes of the table to an entry that are read at first: names are short, as a rule.
const ENTRY_BYTES: u64 = 256;

/// More than the longest entry takes.
const ENTRY_MAX: u64 = 136 << 10;

/// The most bytes of snapshots' L1 tables that are read when an image is opened.
const INACTIVE_L1_BYTES_MAX: u64 = 4 << 20;

/// And of how many snapshots.
const INACTIVE_L1_MAX: usize = 1024;

/// The table.
#[derive(Debug, Default)]
pub(crate) struct SnapshotTable {
    /// The snapshots, in the order of the table.
    pub(crate) entries: Vec<Snapshot>,
    /// The table's length in bytes.
    pub(super) len: u64,
}

impl SnapshotTable {
    /// Reads the table that `header` names.
    ///
    /// # Errors
    /// It breaks a rule or a bound, or the file ends before it does; the host's.
    pub(super) async fn read(queue: &Rc<Queue>, file: &File, path: &Path, header: &Header) -> Result<Self> {
        let count = header.snapshot_count;
        if count == 0 {
            return Ok(Self::default());
        }
        let place = header.snapshots_offset.get();
        let io_error =
            |e: std::io::Error| Error::io("cannot read the snapshot table", e).at_path(path).at_offset(place);
        let file_len = file.length().map_err(io_error)?;
        // What the table can take at most: where the file ends before, parsing says that it is too short.
        let most = file_len.saturating_sub(place).min(limits::SNAPSHOT_TABLE_BYTES_MAX + ENTRY_MAX);
        let mut len = (u64::from(count) * ENTRY_BYTES).min(most);
        loop {
            let bytes = queue.read_buffer(file, place, len as usize).await.map_err(io_error)?;
            match Snapshot::parse_table(&bytes, count, &header.geometry()) {
                Ok((entries, len)) => return Ok(Self { entries, len: len as u64 }),
                Err(FormatError::TooShort { .. }) if len < most => len = (len * 4).min(most),
                Err(e) => {
                    let message = format!("the image is damaged: {e}; look at it with a check");
                    return Err(Error::new(ErrorKind::Corrupt, message)
                        .briefly(e.brief())
                        .at_path(path)
                        .at_offset(place));
                }
            }
        }
    }

    /// The clusters of the L2 tables that the snapshots name, as far as that is found out at little cost: what cannot be read, or makes
    /// no sense, is passed over.
    pub(super) async fn l2_tables(&self, queue: &Rc<Queue>, file: &File, geometry: &Geometry) -> Vec<u64> {
        let mut left = INACTIVE_L1_BYTES_MAX;
        let mut tables = Vec::new();
        for snapshot in self.entries.iter().take(INACTIVE_L1_MAX) {
            let len = u64::from(snapshot.l1_size) * 8;
            if len > left {
                break;
            }
            left -= len;
            let Ok(bytes) = queue.read_buffer(file, snapshot.l1_table_offset.get(), len as usize).await else {
                continue;
            };
            let entries = bytes.chunks_exact(8).map(|b| L1Entry::from_raw(be64(b)));
            let places = entries.filter_map(|entry| entry.offset(geometry).ok().flatten());
            tables.extend(places.map(|place| geometry.cluster_bits.index_of(place.get())));
        }
        tables.sort_unstable();
        tables.dedup();
        tables
    }
}
