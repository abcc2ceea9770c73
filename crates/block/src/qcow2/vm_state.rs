//! The VM state: what a VM host keeps in an image beside the disk, for the snapshot that it is about to take.
//!
//! It begins at the first L1 entry that maps nothing of the disk (sharp edge 36), and no request of a guest gets there. So an open
//! image does not have these entries: whoever reads or writes the VM state gets a view of the image that has them, and no backing file, for as
//! long as that takes. A write is made alone with the image, which is then read again; see [`super::snapshot`].
//!
//! Where the L1 table is too short, a longer one takes its place by one switch of the header.

use std::rc::Rc;

use cowhand_qcow2::{L1Entry, limits};

use super::Image;
use super::open::ImageOptions;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{IoSeg, fill_zero, segs_len, split_segs};
use crate::queue::Queue;

impl Image {
    /// Reads from the byte `at` of the VM state on. What there is none of reads as zeros. Nobody writes it meanwhile.
    ///
    /// # Errors
    /// An external data file, beside which there is none; the host's.
    pub(crate) async fn read_vm_state(&self, queue: &Rc<Queue>, at: u64, data: &[IoSeg]) -> Result<()> {
        let header = self.header_now();
        let start = self.vm_state_place(header.size, at, segs_len(data), libc::EIO)?.0;
        let mapped = u64::from(header.l1_size).saturating_mul(self.geometry.l2_coverage());
        let there = mapped.saturating_sub(start).min(segs_len(data));
        fill_zero(&split_segs(data, there, segs_len(data) - there));
        if there == 0 {
            return Ok(());
        }
        let view = self.with_vm_state(queue, mapped, false).await?;
        view.read(queue, start, &split_segs(data, 0, there)).await
    }

    /// Writes from the byte `at` of the VM state on, durably.
    ///
    /// # Errors
    /// As [`read_vm_state`](Self::read_vm_state); also when no L1 table can map so much.
    pub(crate) async fn write_vm_state(&self, queue: &Rc<Queue>, at: u64, data: &[IoSeg]) -> Result<()> {
        self.check_writable()?;
        let header = self.header_now();
        let (start, end) = self.vm_state_place(header.size, at, segs_len(data), libc::EFBIG)?;
        if start == end {
            return Ok(());
        }
        let (needed, most) = (self.geometry.l1_entries_for(end), limits::L1_TABLE_BYTES_MAX / 8);
        if needed > most {
            return Err(self.no_place(at, libc::EFBIG));
        }
        let mut entries = u64::from(header.l1_size);
        if needed > entries {
            // Room for more: a VM state comes in many pieces, one after the other.
            entries = needed.max(entries.saturating_mul(3).div_ceil(2)).min(most);
            let mut l1 = self.read_l1(queue, header.l1_table_offset, header.l1_size).await?;
            l1.resize(entries as usize, L1Entry::UNALLOCATED);
            self.replace_l1(queue, &header, &l1).await?;
            self.finish(queue).await?;
        }
        let view = self.with_vm_state(queue, entries.saturating_mul(self.geometry.l2_coverage()), true).await?;
        let written = view.write(queue, start, data).await;
        let finished = view.finish(queue).await;
        self.corrupt.fetch_or(view.is_corrupt(), crate::sync::Ordering::AcqRel);
        written.and(finished)
    }

    /// Where the VM state's `len` bytes from `at` on lie among the guest's offsets; if nowhere, an error of that number.
    fn vm_state_place(&self, size: u64, at: u64, len: u64, errno: i32) -> Result<(u64, u64)> {
        if self.geometry.has_data_file {
            let message = "an image with an external data file has no VM state";
            return Err(Error::new(ErrorKind::Unsupported, message).at_path(&self.path));
        }
        if !at.is_multiple_of(512) || !len.is_multiple_of(512) {
            let message = "a VM state is read and written in multiples of 512 bytes";
            return Err(Error::new(ErrorKind::Invalid, message).at_path(&self.path));
        }
        let start = self.geometry.vm_state_offset(size).and_then(|first| first.get().checked_add(at));
        start.and_then(|start| Some((start, start.checked_add(len)?))).ok_or_else(|| self.no_place(at, errno))
    }

    fn no_place(&self, at: u64, errno: i32) -> Error {
        let error = std::io::Error::from_raw_os_error(errno);
        Error::io(format!("the VM state cannot have a byte {at}"), error).at_path(&self.path)
    }

    /// The image with all that its L1 table maps, `size` bytes, as its disk. What this one has changed is in the file.
    async fn with_vm_state(&self, queue: &Rc<Queue>, size: u64, writable: bool) -> Result<Self> {
        let opening = self.read_header(queue).await?;
        let options = ImageOptions { writable, ..self.options };
        let mut view = opening.finish_as(queue, (None, None), self.cipher.clone(), options, size).await?;
        view.flushes = self.flushes.clone();
        view.grace = self.grace.clone();
        Ok(view)
    }
}
