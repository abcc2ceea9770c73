//! What a disk is going to look like, told before it is used: from headers alone, without locks, and with nothing left open.

use std::rc::Rc;

use crate::chain::{self, OpenPolicy, Top};
use crate::disk::{Disk, block_on, blocking_driver, check_size, limits_of};
use crate::error::Result;
use crate::queue::Queue;
use crate::request::Limits;
use crate::spec::DiskSpec;

/// What a guest is told of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskShape {
    /// The virtual size in bytes, a multiple of 512.
    pub size: u64,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// The geometry.
    pub limits: Limits,
}

impl Disk {
    /// What the disk looks like that `spec` describes, as its images are now. Only the headers of its chain are read, and nothing is locked, so
    /// it may be in use. (Where an image lies inside of another one's disk that one is opened for a moment, as for reading.)
    ///
    /// # Errors
    /// What the headers tell: a file that is missing, or may not be opened; a format that is not what it is said to be; features that are not
    /// known. What tables say, and whether a secret is the right one, is found out when the disk is opened.
    pub fn shape(spec: &DiskSpec, policy: &OpenPolicy) -> Result<DiskShape> {
        let queue = Queue::new(blocking_driver(&policy.storage)?);
        block_on(&queue, {
            let (queue, spec, policy) = (queue.clone(), spec.clone(), policy.clone());
            async move { shape_on(&queue, &spec, &policy).await }
        })
    }
}

async fn shape_on(queue: &Rc<Queue>, spec: &DiskSpec, policy: &OpenPolicy) -> Result<DiskShape> {
    let Top { size, granularity, align } = chain::look(queue, spec, policy).await?;
    check_size(spec, size)?;
    Ok(DiskShape { size, read_only: spec.readonly, limits: limits_of(spec.block_size, granularity, align) })
}

#[cfg(test)]
#[path = "shape_test.rs"]
mod tests;
