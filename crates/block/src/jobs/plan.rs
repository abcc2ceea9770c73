//! What a copy does with each part of a disk: read and write it, write zeros, or leave it alone.

use std::ops::Range;
use std::rc::Rc;

use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::queue::Queue;
use crate::status::Content;
use crate::sync::Arc;

/// What becomes of a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// It is read, and written.
    Data,
    /// It reads as zeros.
    Zero,
    /// The target's backing file has it already.
    Below,
}

/// A part of the copy. Offsets are those of all sources one after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    pub(super) range: Range<u64>,
    pub(super) what: What,
}

/// One of the disks that are copied one behind another.
pub(super) struct Source {
    pub(super) disk: Arc<Disk>,
    /// By which its requests are counted.
    pub(super) number: usize,
    /// Where it is in the copy.
    pub(super) range: Range<u64>,
}

impl Source {
    /// Lays disks one behind another.
    pub(super) fn chain(disks: &[Arc<Disk>]) -> Vec<Self> {
        let mut start = 0u64;
        let mut sources = Vec::with_capacity(disks.len());
        for disk in disks {
            let end = start.saturating_add(disk.size());
            sources.push(Self { disk: disk.clone(), number: disk.next_queue_number(), range: start..end });
            start = end;
        }
        sources
    }
}

/// How parts are chosen.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// The most bytes of data in one part.
    pub(super) most: u64,
    /// Data goes into the target in whole units of so many bytes, which none of the parts splits; 0 or 1 if it does not.
    pub(super) unit: u64,
    /// The target has a backing file of so many bytes: only what the sources' topmost layers have is copied, and zeros behind the backing
    /// file's end are there already.
    pub(super) backing: Option<u64>,
    /// What cannot be told apart is taken for data instead of failing.
    pub(super) salvage: bool,
}

/// The parts of a copy, in order.
pub(super) struct Plan {
    sources: Rc<Vec<Source>>,
    rules: Rules,
    at: u64,
    end: u64,
    /// What the metadata say of the bytes from `at` on, as far as they have been asked.
    run: Option<Chunk>,
    /// Found behind it.
    next: Option<Chunk>,
}

impl Plan {
    pub(super) fn new(sources: Rc<Vec<Source>>, rules: Rules) -> Self {
        let end = sources.last().map_or(0, |source| source.range.end);
        Self { sources, rules, at: 0, end, run: None, next: None }
    }

    /// The next part; none at the end.
    ///
    /// # Errors
    /// The sources' metadata cannot be read: with the offset of the copy at which that was.
    pub(super) async fn next(&mut self, queue: &Rc<Queue>) -> std::result::Result<Option<Chunk>, (u64, Error)> {
        if self.at >= self.end {
            return Ok(None);
        }
        let run = self.run(queue).await?;
        let mut chunk = Chunk { range: self.at..run.range.end, what: run.what };
        if chunk.what == What::Data {
            chunk.range.end = chunk.range.end.min(self.at + self.rules.most);
        }
        if self.rules.unit > 1 && chunk.range.end != self.end {
            // The start is the start of a unit.
            chunk.range.end -= chunk.range.end % self.rules.unit;
            if chunk.range.end <= self.at {
                chunk = Chunk { range: self.at..self.end.min(self.at + self.rules.unit), what: What::Data };
            }
        }
        self.at = chunk.range.end;
        Ok(Some(chunk))
    }

    /// What is alike from `at` on.
    async fn run(&mut self, queue: &Rc<Queue>) -> std::result::Result<Chunk, (u64, Error)> {
        let behind = |chunk: &Chunk| chunk.range.end <= self.at;
        if self.run.as_ref().is_some_and(behind) {
            self.run = None;
        }
        if self.next.as_ref().is_some_and(behind) {
            self.next = None;
        }
        let mut run = match self.run.take().or_else(|| self.next.take()) {
            Some(run) => run,
            None => self.look(queue, self.at).await?,
        };
        run.range.start = self.at;
        // Enough for one part, so that small pieces in the file make no small requests; with zeros nothing is to be gained by less.
        let enough = |run: &Chunk| run.what == What::Data && run.range.end - run.range.start >= self.rules.most;
        while self.next.is_none() && run.range.end < self.end && !enough(&run) {
            match self.look(queue, run.range.end).await {
                Ok(next) if next.what == run.what => run.range.end = next.range.end,
                Ok(next) => self.next = Some(next),
                // What was found before it comes first.
                Err(_) => break,
            }
        }
        self.run = Some(run.clone());
        Ok(run)
    }

    /// What one piece at `at` is.
    async fn look(&self, queue: &Rc<Queue>, at: u64) -> std::result::Result<Chunk, (u64, Error)> {
        let Some(source) = self.sources.iter().find(|source| source.range.contains(&at)) else {
            return Ok(Chunk { range: at..self.end, what: What::Zero });
        };
        let mut end = source.range.end;
        if let Some(backing) = self.rules.backing
            && at < backing
        {
            end = end.min(backing);
        }
        let extent = async {
            let (_entered, node) = source.disk.enter_to_look(source.number).await?;
            node.extent(queue, at - source.range.start, end - at).await
        };
        let extent = match extent.await {
            Ok(extent) => extent,
            // Reading will show it, or do.
            Err(_) if self.rules.salvage => return Ok(Chunk { range: at..end.min(at + 512), what: What::Data }),
            Err(error) => return Err((at - source.range.start, error)),
        };
        let what = match (extent.content, self.rules.backing) {
            // Behind its backing file's end the target reads as zeros.
            (Content::Nothing | Content::Zero, Some(backing)) if at >= backing => What::Below,
            (content, Some(backing)) if at < backing && (extent.depth > 0 || content == Content::Nothing) => {
                What::Below
            }
            (Content::Nothing | Content::Zero, _) => What::Zero,
            (Content::Data, _) if extent.hole => What::Zero,
            (Content::Data | Content::Compressed, _) => What::Data,
        };
        Ok(Chunk { range: at..source.range.start + extent.range.end, what })
    }
}

/// How many bytes a copy has to read and write: what [`Plan::next`] will say is data.
pub(super) async fn total(queue: &Rc<Queue>, sources: &Rc<Vec<Source>>, rules: Rules, zeros: bool) -> Result<u64> {
    let mut plan = Plan::new(sources.clone(), rules);
    let mut total = 0;
    // An error comes again when the copy gets there, and is told then.
    while let Ok(Some(chunk)) = plan.next(queue).await {
        if chunk.what == What::Data || (zeros && chunk.what == What::Zero) {
            total += chunk.range.end - chunk.range.start;
        }
    }
    Ok(total)
}
