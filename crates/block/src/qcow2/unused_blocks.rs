//! Refcount blocks that count nothing any more are given back, when a disk was made smaller: else the file keeps them for ever.
//! (Sharp edge 33.)
//!
//! The refcount table names such a block no more; when that is durable, its cluster is free. A power cut in between leaks the
//! cluster, or, where the block counted itself, nothing.

use std::rc::Rc;

use cowhand_qcow2::HostOffset;

use super::Image;
use super::layout::Structure;
use crate::error::Result;
use crate::io::Barrier;
use crate::mutation::Mutation;
use crate::queue::Queue;

impl Image {
    /// Takes refcount blocks that count nothing out of the refcount table, and frees them. Alone with the image, of whose metadata
    /// nothing is dirty.
    pub(super) async fn drop_unused_blocks(&self, queue: &Rc<Queue>) -> Result<()> {
        let mut looked_at: Vec<u64> = {
            let meta = self.meta.lock();
            let table = meta.refcounts.table().1.iter().enumerate();
            table.filter(|(_, entry)| entry.raw() != 0).map(|(index, _)| index as u64).collect()
        };
        // A block that is freed may have been all that another one counted. Each round drops one at least.
        while !looked_at.is_empty() {
            let mut unused = Vec::new();
            for &index in &looked_at {
                unused.extend(self.unused_block(queue, index).await?.map(|place| (index, place)));
            }
            looked_at = self.drop_blocks(queue, &unused).await?;
            self.finish(queue).await?;
        }
        Ok(())
    }

    async fn unused_block(&self, queue: &Rc<Queue>, index: u64) -> Result<Option<u64>> {
        loop {
            let need = match self.meta.lock().refcounts.unused_block(index) {
                Ok(place) => return Ok(place),
                Err(need) => need,
            };
            self.satisfy_alone(queue, need).await?;
        }
    }

    /// Drops these blocks (index and cluster): the indexes of those that counted their clusters.
    async fn drop_blocks(&self, queue: &Rc<Queue>, unused: &[(u64, u64)]) -> Result<Vec<u64>> {
        if unused.is_empty() {
            return Ok(Vec::new());
        }
        if Mutation::RefblockFreedFirst.is_on() {
            self.free(queue, unused.iter().map(|(_, place)| *place).collect()).await;
        }
        let table = self.meta.lock().refcounts.table().0;
        for (index, _) in unused {
            let at = HostOffset::new(table.get() + index * 8);
            self.write_as(queue, Structure::RefcountTable, at, &[0; 8]).await?;
        }
        self.barrier(queue, Barrier::Mapping).await?;
        let (mut free, mut counting) = (Vec::new(), Vec::new());
        for &(index, place) in unused {
            let counted_by = self.meta.lock().refcounts.forget_block(index, place);
            match counted_by {
                None => free.push(place),
                // It counts this one, so it is none of those that are dropped.
                Some(other) => {
                    self.drop_clusters(queue, place..place + 1).await?;
                    counting.push(other);
                }
            }
        }
        self.free(queue, free).await;
        counting.sort_unstable();
        counting.dedup();
        Ok(counting)
    }
}
