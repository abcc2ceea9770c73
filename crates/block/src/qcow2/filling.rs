//! The header of an image that is being filled says a version that there is not.

use std::rc::Rc;

use super::Image;
use crate::error::Result;
use crate::io::Barrier;
use crate::queue::Queue;
use crate::sync::Ordering;

/// Where the header says its version, the first byte: bit 7 is set while the image is being filled.
const MARK: (usize, u8) = (4, 0x80);

/// The header's first sector as it is while the image is being filled.
pub(super) fn marked(sector: &[u8]) -> Vec<u8> {
    let mut marked = sector.to_vec();
    if let Some(byte) = marked.get_mut(MARK.0) {
        *byte |= MARK.1;
    }
    marked
}

/// The header's first sector as it will be then.
pub(super) fn unmark(sector: &mut [u8]) {
    if is_marked(sector)
        && let Some(byte) = sector.get_mut(MARK.0)
    {
        *byte &= !MARK.1;
    }
}

/// Whether a header's first sector is that of an image that was never finished.
pub(super) fn is_marked(sector: &[u8]) -> bool {
    matches!(sector.get(4..8), Some([0x80, 0, 0, 2 | 3]))
}

impl Image {
    /// Everything that the header names is in the file.
    pub(crate) async fn finish_filling(&self, queue: &Rc<Queue>) -> Result<()> {
        self.check_writable()?;
        self.barrier(queue, Barrier::Create).await?;
        let _commit = self.commit_lock.lock().await;
        self.filling.store(false, Ordering::SeqCst);
        let written = async {
            self.update_header(queue, |_| ()).await?;
            self.barrier(queue, Barrier::Header).await
        };
        let written: Result<()> = written.await;
        // What could not be written is not whole.
        written.inspect_err(|_| self.filling.store(true, Ordering::SeqCst))
    }
}
