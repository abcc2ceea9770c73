//! Reading guest data from one layer, and from the layers below where this one has none.

use std::rc::Rc;

use super::Image;
use super::mapping::{Kind, Run};
use crate::error::Result;
use crate::io::{IoSeg, fill_zero, segs_len, split_segs};
use crate::join::join_all;
use crate::queue::Queue;

impl Image {
    /// Reads from `offset` (inside the virtual size) into `data`.
    pub(crate) async fn read(&self, queue: &Rc<Queue>, offset: u64, data: &[IoSeg]) -> Result<()> {
        let len = segs_len(data);
        let mut parts = Vec::new();
        let mut done = 0;
        while done < len {
            let run = self.run(queue, offset + done, len - done).await?;
            let part = split_segs(data, done, run.len);
            let at = offset + done;
            done += run.len;
            parts.push(async move { self.read_run(queue, at, run, part).await });
        }
        join_all(parts).await
    }

    async fn read_run(&self, queue: &Rc<Queue>, offset: u64, run: Run, data: Vec<IoSeg>) -> Result<()> {
        match run.kind {
            Kind::Unallocated => self.read_backing(queue, offset, data).await,
            Kind::Zero { .. } => {
                fill_zero(&data);
                Ok(())
            }
            Kind::Data { host, .. } => {
                let read = queue.read(&self.file, host.get(), data).await;
                read.map_err(|e| self.io_error("cannot read", host.get(), e))
            }
            Kind::Compressed(range) => {
                let decoded = self.decoded(queue, range).await?;
                decoded.scatter(self.geometry.cluster_bits.offset_in(offset) as usize, &data);
                Ok(())
            }
        }
    }

    /// Reads what this layer does not have. A backing file that is shorter reads as zeros past its end. (Sharp edge 20.)
    pub(super) async fn read_backing(&self, queue: &Rc<Queue>, offset: u64, data: Vec<IoSeg>) -> Result<()> {
        let Some(backing) = &self.backing else {
            fill_zero(&data);
            return Ok(());
        };
        let len = segs_len(&data);
        let there = backing.size().saturating_sub(offset).min(len);
        if there < len {
            fill_zero(&split_segs(&data, there, len - there));
        }
        if there == 0 {
            return Ok(());
        }
        Box::pin(backing.read(queue, offset, &split_segs(&data, 0, there))).await
    }
}
