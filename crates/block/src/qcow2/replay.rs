//! Taking over an image from a process that died while it served it: what its [journal](crate::journal) says of the mapping comes into the
//! file, and what that process had counted and never used is freed.
//!
//! Nothing of it is believed: the memory was held by a stranger. First all references of the file are counted; then each host cluster that
//! a record names must be one that nothing refers to, or that which the file's own entry of the same guest cluster names. (Compressed
//! clusters may share theirs, with others of their kind.) The counts of such clusters may be high already: a commit of the dead
//! process may have come that far. What does not fit is refused, and nothing is written: then another program has changed the image since, or
//! the memory is another disk's.
//!
//! What fits goes the way of all changes: counted first, then published, then committed in order. Only when that is in the file, durably, is
//! freed what nothing refers to; before that it may be what the guest wrote last. Whatever ends the replay, the
//! journal is still there, and to replay it again does no harm: what has come into the file already is found there.
//!
//! Of the records only the last one counts for a guest cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;

use cowhand_qcow2::{Incompatible, L2Entry, L2Kind};

use super::Image;
use super::check::Checker;
use super::check::survey::Survey;
use super::data::DataFile;
use super::entry::Stored;
use super::open::{ImageOptions, Opening};
use super::publish::host_of;
use super::record::Entries;
use super::refcounts::Need;
use crate::error::{Error, ErrorKind, Result};
use crate::io::Barrier;
use crate::journal::{Left, Record};
use crate::mutation::Mutation;
use crate::queue::Queue;

fn misfit(path: &Path, what: &str) -> Error {
    let message = format!(
        "what the process left that served the disk before does not fit the image ({what}): another program has changed \
         the image since, or the memory is another disk's; nothing was written"
    );
    Error::new(ErrorKind::Refused, message).at_path(path)
}

impl Opening {
    /// The image with all that a process noted which died while it served it, and without what leaked then. Everything else that could
    /// refuse it has been asked; it is locked.
    ///
    /// # Errors
    /// What was left does not fit the image, which is then unchanged; the host's.
    pub(super) async fn replayed(
        self,
        queue: &Rc<Queue>,
        left: Left,
        external: Option<&DataFile>,
        options: ImageOptions,
    ) -> Result<Self> {
        let path = self.path.clone();
        if !left.records.is_empty() && self.header.incompatible.contains(Incompatible::DIRTY) {
            // We take the bit off before anything is noted.
            return Err(misfit(&path, "it was opened, and not closed"));
        }
        tracing::info!("{}: a process died that served it; {} changes are noted", path.display(), left.records.len());
        let opening = self.cleaned(queue).await?;
        let file = opening.file.clone();
        let checker = async || Checker::open(queue, file.clone(), &path, Box::new(drop)).await;
        if Mutation::LeaksBeforeReplay.is_on() {
            checker().await?.free_leaks().await?;
        }
        if !left.records.is_empty() {
            let mut checker = checker().await?;
            let survey = checker.survey().await?;
            let size = opening.header.size;
            let options = ImageOptions { synchronous: false, resolve: false, ..options };
            let image = opening.finish_as(queue, (None, external.cloned()), None, options, size).await?;
            let entries = image.latest(&left.records)?;
            let plan = Plan::new(queue, &image, &mut checker, &survey, entries).await?;
            plan.carry_out(queue, &image).await?;
        }
        checker().await?.free_leaks().await?;
        if let Some(DataFile { file, path, .. }) = external {
            let flushed = queue.flush(file, Barrier::Data).await;
            flushed.map_err(|e| Error::io("flush failed", e).at_path(path))?;
        }
        // What the guest was told may be in the host's memory alone, and so may be what the dead process did last.
        let flushed = queue.flush(&file, Barrier::Data).await;
        flushed.map_err(|e| Error::io("flush failed", e).at_path(&path))?;
        Self::header(queue, file.clone(), &path).await
    }
}

impl Image {
    /// The last entries that records give to each cluster, in the order of the disk.
    fn latest(&self, records: &[Record]) -> Result<Vec<Entries>> {
        let mut latest = Vec::new();
        // What later records have said, as ranges that do not overlap, by their start.
        let mut said: BTreeMap<u64, u64> = BTreeMap::new();
        for record in records.iter().rev() {
            let entries = Entries::parse(*record, &self.geometry, self.size, self.slice_entries as u64);
            let entries = entries.map_err(|what| misfit(&self.path, what))?;
            let end = entries.first + entries.count;
            let (mut from, mut joined) = (entries.first, entries.first..end);
            if let Some((&start, &before)) = said.range(..=entries.first).next_back()
                && before >= entries.first
            {
                (from, joined.start) = (before, start);
            }
            while from < end {
                let next = said.range(from..end).next().map(|(&start, &end)| start..end);
                let stop = next.as_ref().map_or(end, |next| next.start);
                if from < stop {
                    latest.push(entries.part(from - entries.first, stop - from));
                }
                from = next.map_or(end, |next| next.end);
            }
            joined.end = joined.end.max(from);
            let covered: Vec<u64> = said.range(joined.clone()).map(|(&start, _)| start).collect();
            for start in covered {
                said.remove(&start);
            }
            said.insert(joined.start, joined.end);
        }
        latest.sort_unstable_by_key(|entries| entries.first);
        Ok(latest)
    }

    /// The entry of a cluster as it is in the file; none if that is one that must not be touched.
    async fn entry_in_file(&self, queue: &Rc<Queue>, cluster: u64) -> Result<Option<(Stored, L2Kind)>> {
        let (slice, index) = self.slice_of(cluster << self.geometry.cluster_bits.bits());
        loop {
            if let Some(stored) = self.slices.get(slice, index) {
                let stored = stored.on_disk();
                return Ok(stored.decode(&self.geometry).ok().map(|(kind, _)| (stored, kind)));
            }
            self.load(queue, slice).await?;
        }
    }
}

/// The entry that takes the place of `old`: it shares its cluster with others as that did, or has it alone.
fn renewed(new: Stored, new_kind: &L2Kind, old: Stored, old_kind: &L2Kind) -> Stored {
    let copied = match host_of(*new_kind) {
        host @ Some(_) if host == host_of(*old_kind) => L2Entry::from_raw(old.entry).copied(),
        host => host.is_some(),
    };
    Stored { entry: L2Entry::from_raw(new.entry).with_copied(copied).raw(), ..new }
}

/// What has to be done.
struct Plan {
    entries: Vec<Entries>,
    /// Clusters that nothing has referred to yet, and that have one reference each from now on; in ascending order.
    fresh: Vec<Range<u64>>,
    /// How many references each cluster with compressed data is going to have.
    packed: BTreeMap<u64, u64>,
}

impl Plan {
    /// # Errors
    /// The entries do not fit the image.
    async fn new(
        queue: &Rc<Queue>,
        image: &Image,
        checker: &mut Checker,
        survey: &Survey,
        entries: Vec<Entries>,
    ) -> Result<Self> {
        let misfit = |what: &str| misfit(&image.path, what);
        if survey.hides || survey.miscounted {
            return Err(misfit("its references are damaged, or not counted"));
        }
        let mut plan = Self { entries: Vec::new(), fresh: Vec::new(), packed: BTreeMap::new() };
        for entries in entries {
            let mut differs = false;
            for number in 0..entries.count {
                let new = entries.entry(number);
                let kind = new.decode(&image.geometry).map_err(|e| image.format_error(&e))?.0;
                let Some((old, old_kind)) = image.entry_in_file(queue, entries.first + number).await? else {
                    return Err(misfit("an entry in its place breaks the format's rules"));
                };
                differs |= renewed(new, &kind, old, &old_kind) != old;
                plan.claim(image, kind, old_kind);
            }
            if differs {
                plan.entries.push(entries);
            }
        }
        plan.check(image, checker, survey).await?;
        Ok(plan)
    }

    /// Notes the clusters that an entry names and the one in its place does not.
    fn claim(&mut self, image: &Image, new: L2Kind, old: L2Kind) {
        let bits = image.geometry.cluster_bits;
        if image.external.is_some() || new == old {
            return;
        }
        match new {
            L2Kind::Compressed(range) => {
                let (host, count) = range.clusters(bits);
                let first = bits.index_of(host.get());
                (first..first + count).for_each(|cluster| *self.packed.entry(cluster).or_default() += 1);
            }
            _ => {
                let Some(host) = host_of(new).filter(|host| host_of(old) != Some(*host)) else { return };
                let cluster = bits.index_of(host.get());
                match self.fresh.last_mut() {
                    Some(last) if last.end == cluster => last.end += 1,
                    _ => self.fresh.push(cluster..cluster + 1),
                }
            }
        }
    }

    async fn check(&mut self, image: &Image, checker: &mut Checker, survey: &Survey) -> Result<()> {
        let misfit = |what: &str| Err(misfit(&image.path, what));
        self.fresh.sort_unstable_by_key(|range| range.start);
        if self.fresh.windows(2).any(|pair| pair[0].end > pair[1].start) {
            return misfit("a cluster is named twice");
        }
        let last = self.fresh.last().map(|range| range.end - 1).max(self.packed.keys().next_back().copied());
        if last.is_some_and(|last| last >= survey.end) {
            return misfit("a cluster lies past the end of the file");
        }
        if self.fresh.iter().any(|range| !survey.is_free(range.clone())) {
            return misfit("a cluster is in use");
        }
        let fresh = |cluster: u64| {
            let at = self.fresh.partition_point(|range| range.end <= cluster);
            self.fresh.get(at).is_some_and(|range| range.start <= cluster)
        };
        if self.packed.keys().any(|&cluster| fresh(cluster)) {
            return misfit("a cluster is named twice");
        }
        let shared: BTreeSet<u64> = self.packed.keys().copied().filter(|c| survey.references(*c) > 0).collect();
        if checker.not_packed(survey, &shared).await?.is_some() {
            return misfit("a cluster is in use");
        }
        for (cluster, references) in &mut self.packed {
            *references = references.saturating_add(survey.references(*cluster));
        }
        Ok(())
    }

    async fn carry_out(&self, queue: &Rc<Queue>, image: &Image) -> Result<()> {
        if !Mutation::NamedGivenOut.is_on() {
            image.meta.lock().refcounts.name(self.named());
        }
        if !Mutation::ReplayWithoutRefcounts.is_on() {
            for range in &self.fresh {
                image.make_blocks(queue, range).await?;
                image.raise_run(queue, range.clone(), 1).await?;
            }
            for (&cluster, &references) in &self.packed {
                image.make_blocks(queue, &(cluster..cluster + 1)).await?;
                image.raise_run(queue, cluster..cluster + 1, references).await?;
            }
        }
        let geometry = image.geometry;
        for entries in &self.entries {
            let offset = entries.first << geometry.cluster_bits.bits();
            image.own_table(queue, offset).await?;
            let change = |number, old: Stored| {
                let new = entries.entry(number);
                let (new_kind, old_kind) = (new.decode(&geometry)?.0, old.decode(&geometry)?.0);
                Ok(renewed(new, &new_kind, old, &old_kind))
            };
            image.publish(queue, offset, entries.count, change).await?;
        }
        image.finish(queue).await
    }

    /// All clusters that are going to be referred to, and are not in the file.
    fn named(&self) -> Vec<Range<u64>> {
        let mut named = self.fresh.clone();
        named.extend(self.packed.keys().map(|&cluster| cluster..cluster + 1));
        named.sort_unstable_by_key(|range| range.start);
        named
    }
}

impl Image {
    /// Sees to it that each cluster of a run, for all of which there are refcount blocks, has so many references at least.
    async fn raise_run(&self, queue: &Rc<Queue>, clusters: Range<u64>, references: u64) -> Result<()> {
        let mut at = clusters.start;
        while at < clusters.end {
            let need: Need = {
                let mut meta = self.meta.lock();
                let now = meta.tick();
                match (at..clusters.end).find_map(|cluster| {
                    at = cluster;
                    meta.refcounts.raise(cluster, references, now).err()
                }) {
                    Some(need) => need,
                    None => return Ok(()),
                }
            };
            self.satisfy_alone(queue, need).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "replay_test.rs"]
mod tests;
