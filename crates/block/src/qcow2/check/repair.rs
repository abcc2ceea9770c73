//! What is repaired, in which order.
//!
//! A power cut at any moment leaves the image no worse than it was, and a repair that is started again goes on:
//!
//! 1. bitmaps whose tables cannot be read are given up; the file grows over guest data that was cut off; refcounts that are too low are
//!    raised, in place or by a rebuild, those of clusters that copies will take among them; copies are made; **barrier**;
//! 2. entries are changed: to the copies, and COPIED flags off where a write in place would harm another; **barrier**;
//! 3. everything is walked again; only now, when all that is in use is counted and nothing damaged is left that could hide a reference,
//!    refcounts that are too high are lowered; **barrier**;
//! 4. COPIED flags are put right; **barrier**; a snapshot table that lacks something is written anew ([`super::snapshots`]);
//! 5. at the very end, if nothing is left, the dirty and the corrupt bit go.

use cowhand_qcow2::{Autoclear, Incompatible, refcount};

use super::compare::{Counts, Pass, counts_text};
use super::copied::Fix;
use super::mend::Plan;
use super::report::Repair;
use super::walk::{Stored, Walked};
use super::{Checker, Stage};
use crate::error::Result;
use crate::io::Barrier;

impl Checker {
    /// Whether the header says that the image is not to be trusted.
    pub(super) fn is_flagged(&self) -> bool {
        self.header.incompatible.intersects(Incompatible::DIRTY | Incompatible::CORRUPT)
    }

    /// Nothing is wrong any more: the header may say so.
    pub(super) async fn vouch(&mut self) -> Result<()> {
        // What the header is about to vouch for may be in the host's memory alone: whoever wrote it may have died without a flush.
        self.barrier(Barrier::BeforeHeader).await?;
        self.header.incompatible.remove(Incompatible::DIRTY | Incompatible::CORRUPT);
        self.disown_unknown();
        self.write_header().await?;
        self.out.repaired("the image is not marked dirty or corrupt any more");
        Ok(())
    }

    /// What a writer does not know of is not vouched for any more. (Sharp edge 3.)
    fn disown_unknown(&mut self) {
        self.header.autoclear &= Autoclear::all();
    }

    /// The same, at once: who may write the image does not know of it.
    pub(super) async fn forget_unknown(&mut self) -> Result<()> {
        if self.header.autoclear.unknown().is_empty() {
            return Ok(());
        }
        self.disown_unknown();
        self.write_header().await
    }

    /// Repairs what was found.
    pub(super) async fn repair(&mut self, repair: Repair, walked: Walked, counts: Counts) -> Result<()> {
        self.out.start(Stage::Silent);
        self.forget_unknown().await?;
        let (mut w, mut counts) = (walked, counts);
        if repair == Repair::All {
            self.give_up_bitmaps(&w).await?;
        }
        if repair == Repair::All && self.grow_over_data(&w).await? {
            w = self.walk(true).await?;
            counts = self.refcounts(&mut w, Pass::Report).await?;
        }
        // Not asked again later: when the file has grown over a place that was outside, that place tells nothing any more.
        let may_free = w.hides_nothing();
        let mut left = None;
        if repair == Repair::All {
            left = self.secure(w, counts).await?;
        }
        self.settle(if repair == Repair::All { Fix::All } else { Fix::Set }, may_free, left).await
    }

    /// Guest data that was cut off reads as zeros (sharp edge 48), but the next one to allocate a cluster would lay other data
    /// there. The file grows over it, so that it can be counted. Whether it has.
    ///
    /// That a cluster was cut off is known by its refcount. A place past the end that is not counted is a damaged entry: what it
    /// should say is not known.
    async fn grow_over_data(&mut self, w: &Walked) -> Result<bool> {
        let (order, per_block) = (self.geometry.refcount_order, self.geometry.refcount_block_entries());
        let stored = self.believed(w).await?;
        let mut end = self.end;
        let (mut from, limit) = (self.end, self.growth_limit(w));
        let mut block = (u64::MAX, None);
        while let Some(cluster) = w.beyond.next_used(from).filter(|&cluster| cluster < limit) {
            from = cluster + 1;
            let index = cluster / per_block;
            if block.0 != index {
                block = (index, self.stored_block(&stored, index).await?);
            }
            let entry = (cluster % per_block) as usize;
            let count = block.1.as_ref().and_then(|block| refcount::get(order, block, entry).ok());
            if count.is_some_and(|count| count > 0) {
                end = cluster + 1;
            }
        }
        if end == self.end {
            return Ok(false);
        }
        // A file system may not know files this large: then it stays as it was.
        let grown = self.queue.set_length(&self.file, self.offset_of(end)).await.is_ok();
        if grown {
            let (from, to) = (self.file_len, self.offset_of(end));
            self.out.repaired(format!("the file is {to} bytes again, not {from}: guest data that is missing is zeros"));
        }
        Ok(grown)
    }

    /// Steps 1 and 2: all that is in use is counted, and nothing else lies there. Where the refcounts were written anew: the clusters
    /// that the old ones took and nothing takes any more.
    ///
    /// As in QEMU they are written anew, too, when a cluster that is in use counts as free: one write of the header puts all of them
    /// right at once. Where there is no room for that they are raised in their place.
    async fn secure(&mut self, mut w: Walked, counts: Counts) -> Result<Option<Vec<u64>>> {
        let first_free =
            if self.file.traits().block_device { counts.highest.map_or(1, |highest| highest + 1) } else { self.end };
        let (before, believed) = (self.refcount_clusters(&w.stored), self.believed(&w).await?);
        let end = self.end;
        let mut in_place = !counts.uncovered && w.stored.sound;
        let mut plan = Plan::default();
        if in_place {
            plan = self.plan(&mut w, first_free).await?;
            in_place = self.is_counted(&w, &plan);
        }
        if !in_place || counts.missed {
            let planned_end = self.end;
            let mut anew = self.walk(false).await?;
            let plan = self.plan(&mut anew, first_free).await?;
            let hides = !anew.hides_nothing();
            let old = if hides { believed } else { Stored::default() };
            if self.rebuild(&mut anew, &old, plan.next).await? {
                self.carry_out(&anew, &plan).await?;
                self.barrier(Barrier::Mapping).await?;
                let gone = |cluster: &u64| *cluster < end && !hides && anew.refs.count(*cluster) == 0;
                return Ok(Some(before.into_iter().filter(gone).collect()));
            }
            self.end = planned_end;
        }
        if !in_place {
            self.out.not_repaired("there is no room for new refcounts behind the image: they stay as they are");
            return Ok(None);
        }
        w.adopt_beyond(self.end);
        let raised = self.refcounts(&mut w, Pass::Raise).await?.changed;
        self.out.repaired_some(raised, "refcounts raised");
        self.barrier(Barrier::BeforeMapping).await?;
        self.carry_out(&w, &plan).await?;
        self.barrier(Barrier::Mapping).await?;
        Ok(None)
    }

    /// Whether there are refcounts for all clusters that copies take.
    fn is_counted(&self, w: &Walked, plan: &Plan) -> bool {
        let per_block = self.geometry.refcount_block_entries();
        let taken = plan.taken();
        plan.is_empty()
            || (taken.start / per_block..=(taken.end.saturating_sub(1)) / per_block)
                .all(|index| w.stored.block(index).is_some())
    }

    /// Steps 3 and 4: leaks are freed, flags are set. `left` is what old refcounts have left behind, if there are new ones.
    async fn settle(&mut self, fix: Fix, may_free: bool, left: Option<Vec<u64>>) -> Result<()> {
        if left.is_some() {
            self.out.start(Stage::Again);
        }
        let mut w = self.walk(true).await?;
        self.out.start(Stage::Silent);
        for cluster in left.unwrap_or_default() {
            self.out.repairing(counts_text(cluster, 1, 0));
        }
        if !w.stored.sound {
            // Refcounts that share their place with something are not written to.
            return Ok(());
        }
        let may_free = may_free && w.hides_nothing();
        let lowered = self.refcounts(&mut w, if may_free { Pass::Lower } else { Pass::Report }).await?.changed;
        self.out.repaired_some(lowered, "leaked clusters freed");
        self.barrier(Barrier::BeforeMapping).await?;
        let changed = self.copied(&mut w, fix).await?.changed;
        self.out.repaired_some(changed, "COPIED flags put right");
        self.barrier(Barrier::Mapping).await?;
        self.complete_snapshots(may_free).await
    }
}
