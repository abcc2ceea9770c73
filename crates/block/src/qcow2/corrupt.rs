//! An image that turns out to be corrupt while it is being written: it says so in its header, durably, and nothing is written to
//! it any more; reads go on. (Sharp edges 18 and 43.)
//!
//! Two things show it. Metadata would be written over other metadata ([`super::owners`]), or guest data lies where metadata lies; or a
//! write meets an entry whose offset is not aligned. What breaks other rules is an error of that entry alone. An error says by
//! [`Error::is_damage`] that it is of this sort; who serves a write looks at it when no lock is held any more.

use std::future::Future;
use std::rc::Rc;

use cowhand_qcow2::{HostOffset, Incompatible};

use super::Image;
use super::layout::Structure;
use super::owners::Owned;
use super::refcounts::Extent;
use crate::error::{Error, ErrorKind, Result};
use crate::io::Barrier;
use crate::queue::Queue;
use crate::sync::Ordering;

impl Image {
    /// Whether the image is known to be corrupt.
    pub(super) fn is_corrupt(&self) -> bool {
        self.corrupt.load(Ordering::Acquire)
    }

    /// What a write to a corrupt image comes to.
    pub(super) fn corrupt_error(&self) -> Error {
        let message = "the image is corrupt, and is not written any more; close the disk and repair it ('qemu-img check -r \
                       all')";
        Error::new(ErrorKind::Corrupt, message).at_path(&self.path)
    }

    /// Does something that writes. If that shows the image to be corrupt, the image says so from then on.
    pub(crate) async fn watched<T>(&self, queue: &Rc<Queue>, work: impl Future<Output = Result<T>>) -> Result<T> {
        let result = work.await;
        if let Err(error) = &result
            && self.writable
            && error.is_damage()
            // A layer below is not ours to mark.
            && error.path() == Some(&self.path)
        {
            self.mark_corrupt(queue, error).await;
        }
        result
    }

    async fn mark_corrupt(&self, queue: &Rc<Queue>, error: &Error) {
        if self.corrupt.swap(true, Ordering::AcqRel) {
            return;
        }
        tracing::error!("{error}; the image is marked corrupt, and not written any more");
        // Version 2 has no room for it.
        if self.geometry.version < 3 {
            return;
        }
        let marked = async {
            let _commit = self.commit_lock.lock().await;
            self.update_header(queue, |header| header.incompatible.insert(Incompatible::CORRUPT)).await?;
            self.barrier(queue, Barrier::Header).await
        };
        let marked: Result<()> = marked.await;
        if let Err(e) = marked {
            tracing::warn!("{}: cannot mark the image corrupt: {e}", self.path.display());
        }
    }

    /// Writes a piece of metadata of a structure, unless another one lies there.
    pub(super) async fn write_as(
        &self,
        queue: &Rc<Queue>,
        structure: Structure,
        place: HostOffset,
        bytes: &[u8],
    ) -> Result<()> {
        self.claim(structure, place, bytes.len())?;
        self.write_metadata(queue, place, bytes).await
    }

    /// Sees to it that a piece of metadata may be written.
    pub(super) fn claim(&self, structure: Structure, place: HostOffset, len: usize) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let first = bits.index_of(place.get());
        let end = bits.clusters_for(place.get().saturating_add(len as u64));
        let claimed = self.meta.lock().owners.claim(structure, first..end);
        claimed.map_err(|owned| self.owned_error(structure, owned))
    }

    /// The same for a structure in clusters that were just given out.
    pub(super) fn claim_new(&self, structure: Structure, extent: Extent) -> Result<()> {
        let first = self.geometry.cluster_bits.index_of(extent.host.get());
        let claimed = self.meta.lock().owners.claim_new(structure, first..first + extent.clusters);
        claimed.map_err(|owned| self.owned_error(structure, owned))
    }

    fn owned_error(&self, structure: Structure, owned: Owned) -> Error {
        let message = format!(
            "the image is corrupt: a {structure} would be written over a {}; close the disk and repair it ('qemu-img check \
             -r all')",
            owned.by
        );
        let offset = owned.cluster << self.geometry.cluster_bits.bits();
        Error::new(ErrorKind::Corrupt, message).at_path(&self.path).at_offset(offset).damaging()
    }
}

#[cfg(test)]
#[path = "corrupt_test.rs"]
mod tests;
