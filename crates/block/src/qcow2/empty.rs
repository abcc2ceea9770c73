//! An image that has nothing of its own any more: everything shows what its backing file has.
//!
//! One switch of the header's first sector, to an L1 table without an entry; then what the old one led to is freed. Snapshots keep what
//! they have, and bitmaps stay as they are.
//!
//! Alone with the image, on the file, which is then read again; see [`super::snapshot`].

use std::rc::Rc;

use cowhand_qcow2::L1Entry;

use super::Image;
use crate::error::{Error, ErrorKind, Result};
use crate::queue::Queue;

impl Image {
    /// Empties the image.
    ///
    /// # Errors
    /// It has no backing file, so that its content would be gone; the host's. It is then as it was.
    pub(crate) async fn make_empty(&self, queue: &Rc<Queue>) -> Result<()> {
        self.check_writable()?;
        if self.backing.is_none() {
            let message = "an image without a backing file is not emptied: its content would be gone";
            return Err(Error::new(ErrorKind::Invalid, message).at_path(&self.path));
        }
        let header = self.header.lock().header.clone();
        let old = self.read_l1(queue, header.l1_table_offset, header.l1_size).await?;
        if old.iter().all(|entry| entry.raw() == 0) {
            return Ok(());
        }
        // As long as the disk needs: what was past it, a VM state, goes too.
        let entries = header.l1_entries_needed() as u32;
        let place = self.write_new_l1(queue, &vec![L1Entry::UNALLOCATED; entries as usize]).await?;
        self.settle(queue).await?;
        self.switch_header(queue, |header| {
            header.l1_table_offset = place;
            header.l1_size = entries;
        })
        .await?;
        let freed = async {
            self.drop_tree(queue, &old).await?;
            self.drop_structure(queue, header.l1_table_offset, u64::from(header.l1_size) * 8).await?;
            match &self.external {
                Some(external) => self.give_back_data_file(queue, &external.file).await,
                None => Ok(()),
            }
        };
        let freed: Result<()> = freed.await;
        self.warn_of_leak(freed);
        Ok(())
    }

    async fn give_back_data_file(&self, queue: &Rc<Queue>, file: &crate::io::File) -> Result<()> {
        let length = file.length().map_err(|e| self.io_error("cannot tell the data file's length", 0, e))?;
        if length == 0 {
            return Ok(());
        }
        queue.punch(file, 0, length).await.map_err(|e| self.io_error("cannot give space back", 0, e))
    }
}
