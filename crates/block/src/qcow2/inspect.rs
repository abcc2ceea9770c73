//! Everything about an image that can be known without its backing file, its data file and its secret.

use std::path::Path;
use std::rc::Rc;

use cowhand_qcow2::{Header, luks};

use super::bitmaps::Directory;
use super::open::{LUKS_HEADER, Opening};
use super::snapshot_table::SnapshotTable;
use crate::bitmap::BitmapInfo;
use crate::change::SnapshotInfo;
use crate::error::{Error, ErrorKind, Result};
use crate::io::File;
use crate::queue::Queue;

/// What was found.
pub(crate) struct Inspection {
    pub(crate) header: Header,
    pub(crate) snapshots: Vec<SnapshotInfo>,
    pub(crate) bitmaps: Vec<BitmapInfo>,
    pub(crate) luks: Option<luks::Header>,
}

impl Inspection {
    pub(crate) async fn make(queue: &Rc<Queue>, file: File, path: &Path) -> Result<Self> {
        let (file, header, ..) = Opening::header(queue, file, path).await?.into_parts();
        let snapshots = SnapshotTable::read(queue, &file, path, &header).await?;
        let bitmaps = Directory::read_any(queue, &file, path, &header).await?;
        let luks = luks_header(queue, &file, path, &header).await?;
        Ok(Self {
            snapshots: snapshots.entries.iter().map(SnapshotInfo::from).collect(),
            bitmaps: bitmaps.entries.iter().map(|entry| BitmapInfo::new(entry, header.size)).collect(),
            header,
            luks,
        })
    }
}

async fn luks_header(queue: &Rc<Queue>, file: &File, path: &Path, header: &Header) -> Result<Option<luks::Header>> {
    let damaged =
        |e: &dyn std::fmt::Display| Error::new(ErrorKind::Corrupt, format!("the image is damaged: {e}")).at_path(path);
    let Some(place) = header.luks_extension().map_err(|e| damaged(&e))? else { return Ok(None) };
    let read = queue.read_buffer(file, place.offset.get(), LUKS_HEADER).await;
    let bytes = read.map_err(|e| Error::io("cannot read the LUKS header", e).at_path(path))?;
    luks::Header::parse(&bytes, place).map(Some).map_err(|e| damaged(&e).at_offset(place.offset.get()))
}
