//! The walk through the bitmap directory, and a window onto tables such as that and the snapshot table.

use cowhand_qcow2::{BitmapFlags, BitmapTableEntry, DirectoryEntry};

use super::Checker;
use super::refs::Class;
use super::report::FindingKind;
use super::walk::{PART, Table, Walked, entries};
use crate::error::Result;
use crate::io::Buffer;

/// More than the longest entry of either table takes: extra data of 1 KiB and two strings of 64 KiB.
const ENTRY_MAX: u64 = 136 << 10;

/// A window onto a table whose entries differ in length.
pub(super) struct Window {
    bytes: Buffer,
    /// Where in the file it starts.
    start: u64,
}

impl Checker {
    /// The bytes from `at` on: an entry whole, if the table has it whole before `end`.
    pub(super) async fn window<'a>(
        &self,
        old: &'a mut Option<Window>,
        what: &str,
        at: u64,
        end: u64,
    ) -> Result<&'a [u8]> {
        let holds = |w: &Window| {
            let window_end = w.start + w.bytes.len() as u64;
            w.start <= at && (window_end >= end || window_end >= at + ENTRY_MAX)
        };
        if !old.as_ref().is_some_and(holds) {
            let len = (ENTRY_MAX * 4).min(end.saturating_sub(at));
            *old = Some(Window { bytes: self.read(what, at, len).await?, start: at });
        }
        let bytes = old.as_ref().and_then(|w| w.bytes.get((at - w.start) as usize..));
        Ok(bytes.unwrap_or_default())
    }

    /// The bitmap directory, and each bitmap's table and clusters.
    pub(super) async fn bitmaps(&mut self, w: &mut Walked) -> Result<()> {
        let Ok(Some(extension)) = self.header.bitmaps_extension() else { return Ok(()) };
        let start = extension.directory_offset.get();
        let end = start + extension.directory_size;
        if !self.claim(w, "the bitmap directory", start, extension.directory_size, 0) {
            w.bitmaps_lost = true;
            return Ok(());
        }
        let mut at = start;
        let mut window = None;
        for index in 0..extension.nb_bitmaps {
            let bytes = self.window(&mut window, "the bitmap directory", at, end).await?;
            let padding = bitmap_padding(bytes);
            let mut parsed = DirectoryEntry::parse(bytes, &self.geometry);
            if let Some(padding) = padding.filter(|p| bytes.get(p.clone()).is_some_and(|p| p.iter().any(|&b| b != 0))) {
                let mut entry = bytes.get(..padding.end).unwrap_or_default().to_vec();
                entry.get_mut(padding.clone()).unwrap_or_default().fill(0);
                parsed = DirectoryEntry::parse(&entry, &self.geometry);
                let text = || format!("bitmap {index}: the padding behind its name is not zero");
                self.found(FindingKind::Bitmap, at, text);
                w.bitmap_padding.push((at + padding.start as u64, padding.len()));
            }
            match parsed {
                Ok((bitmap, len)) => {
                    self.bitmap(w, &bitmap, at).await?;
                    at += len as u64;
                }
                Err(problem) => {
                    (w.unreadable, w.bitmaps_lost) = (w.unreadable + 1, true);
                    self.found(FindingKind::Bitmap, at, || format!("bitmap {index} cannot be read: {problem}"));
                    return Ok(());
                }
            }
        }
        if at != end {
            let text = || "the bitmap directory's size is not the sum of its entries".to_string();
            self.found(FindingKind::Bitmap, at, text);
            w.bitmaps_lost = true;
        }
        Ok(())
    }

    async fn bitmap(&mut self, w: &mut Walked, bitmap: &DirectoryEntry, named_at: u64) -> Result<()> {
        let (start, len) = (bitmap.table_offset.get(), u64::from(bitmap.table_size) * 8);
        let name = || String::from_utf8_lossy(&bitmap.name).escape_debug().to_string();
        let needed = self.geometry.cluster_bits.clusters_for(bitmap.data_len(self.header.size));
        let misfit = !bitmap.flags.contains(BitmapFlags::IN_USE) && u64::from(bitmap.table_size) != needed;
        if len == 0 || misfit {
            w.bitmaps_lost = true;
            let text = || format!("the table of the bitmap '{}' does not fit the disk's size", name());
            self.found(FindingKind::Bitmap, named_at, text);
        }
        if !self.claim(w, "a bitmap's table", start, len, named_at) {
            w.bitmaps_lost = true;
            return Ok(());
        }
        w.bitmap_tables.push(Table { offset: start, entries: bitmap.table_size.into() });
        let mut at = 0;
        while at < len {
            let part = self.read("a bitmap's table", start + at, PART.min(len - at)).await?;
            for (raw, named_at) in entries(&part, start + at) {
                match BitmapTableEntry::decode(raw, &self.geometry) {
                    Ok(BitmapTableEntry::Cluster(host)) => {
                        self.refer(w, Class::Bitmap, (host.get(), self.cluster_size()), 1, named_at);
                    }
                    Ok(_) => {}
                    Err(problem) => {
                        let text = || format!("the bitmap '{}' has a wrong entry {raw:#x}: {problem}", name());
                        self.found(FindingKind::Bitmap, named_at, text);
                    }
                }
            }
            at += part.len() as u64;
        }
        Ok(())
    }
}

/// Where the padding of the bitmap directory entry is that `bytes` begin with.
fn bitmap_padding(bytes: &[u8]) -> Option<std::ops::Range<usize>> {
    let name_len = u16::from_be_bytes(bytes.get(18..20)?.try_into().ok()?);
    let extra_len = u32::from_be_bytes(bytes.get(20..24)?.try_into().ok()?);
    let end = 24usize.checked_add(name_len.into())?.checked_add(usize::try_from(extra_len).ok()?)?;
    Some(end..end.checked_next_multiple_of(8)?)
}
