//! Discarding guest data, and writing zeros without writing them.
//!
//! Which entries that leaves, and where QEMU leaves others, stands in docs/qcow2.md (zeros and discards).

use std::ops::Range;
use std::rc::Rc;

use cowhand_qcow2::{GuestOffset, HostOffset, L2Kind, Subcluster};

use super::data::Spot;
use super::entry::{Below, Stored};
use super::mapping::Kind;
use super::{CLUSTERS_AT_ONCE, Image};
use crate::error::Result;
use crate::io::{segs_len, zero_segs};
use crate::queue::Queue;

/// What is to become of whole clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// Their content is no longer needed.
    Discard,
    /// They read as zeros; their space may be given back.
    Unmap,
    /// They read as zeros; their space is kept.
    Keep,
}

/// How a range is made to read as zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Zeros {
    /// The space of what is there may be given back.
    pub(crate) unmap: bool,
    /// The image is to say so itself, where it can: also where it has nothing and nothing lies below, so that it stays so whatever comes
    /// to lie there.
    pub(crate) said: bool,
}

impl Zeros {
    fn fate(self) -> Fate {
        if self.unmap { Fate::Unmap } else { Fate::Keep }
    }
}

impl Image {
    /// Gives the whole clusters in the range back; afterwards they read as zeros. What is not a whole cluster stays as it is.
    pub(crate) async fn discard(&self, queue: &Rc<Queue>, offset: u64, len: u64) -> Result<()> {
        self.check_writable()?;
        self.mark_dirty(offset, len);
        let (start, end) = self.whole_clusters(offset, len);
        if self.has_raw_data_file() {
            // Whoever reads the file by itself must not see what the guest does not: the clusters stay mapped, and read as zeros
            // from the file.
            if start < end {
                let _writers = self.ranges.lock(self.clusters(start, end - start)).await;
                self.forget_data(queue, start, end - start).await;
            }
            return Ok(());
        }
        self.change_clusters(queue, start, end, Fate::Discard, false).await
    }

    /// Makes the range read as zeros.
    pub(crate) async fn write_zeroes(&self, queue: &Rc<Queue>, offset: u64, len: u64, zeros: Zeros) -> Result<()> {
        self.check_writable()?;
        self.mark_dirty(offset, len);
        let end = offset + len;
        // Version 2 has nothing to say it with, and a data file that is read by itself says it with its own bytes.
        let said = zeros.said && self.geometry.version >= 3 && !self.has_raw_data_file();
        let zeros = Zeros { said, ..zeros };
        if self.has_raw_data_file() {
            return self.write_zero_bytes(queue, offset, end, zeros).await;
        }
        let (whole_start, whole_end) = self.whole_clusters(offset, len);
        if whole_start >= whole_end {
            return self.zero_part(queue, offset, end, zeros).await;
        }
        self.zero_part(queue, offset, whole_start, zeros).await?;
        self.change_clusters(queue, whole_start, whole_end, zeros.fate(), zeros.said).await?;
        self.zero_part(queue, whole_end.min(end), end, zeros).await
    }

    /// Whether the range can be made to read as zeros by its L2 entries alone, as things are.
    pub(crate) async fn zeroes_without_writing(&self, queue: &Rc<Queue>, offset: u64, len: u64) -> Result<bool> {
        if self.has_raw_data_file() || self.geometry.version < 3 {
            return Ok(false);
        }
        let unit = self.geometry.subcluster_size();
        let end = offset + len;
        // The units that are named in part.
        let first = (!offset.is_multiple_of(unit)).then_some(offset & !(unit - 1));
        let last = (!end.is_multiple_of(unit) && end < self.size).then_some(end & !(unit - 1));
        for start in first.into_iter().chain(last.filter(|_| last != first)) {
            let part = offset.max(start)..end.min(start + unit);
            if !self.is_zero_but_for(queue, start..start + unit, part).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether units of one cluster, of which `part` is to read as zeros, can become zero as a whole.
    async fn is_zero_but_for(&self, queue: &Rc<Queue>, units: Range<u64>, part: Range<u64>) -> Result<bool> {
        let whole = self.run_to_write(queue, units.start, units.end - units.start).await?;
        Ok(!matches!(whole.kind, Kind::Compressed(_)) && self.is_zero_around(queue, units, part).await?)
    }

    /// Makes a part of one cluster (or of two) read as zeros: whole subclusters by their bits, and the rest too if its unit has nothing
    /// but zeros then; else by writing.
    async fn zero_part(&self, queue: &Rc<Queue>, start: u64, end: u64, zeros: Zeros) -> Result<()> {
        let unit = self.geometry.subcluster_size();
        let units_end = if end >= self.size { end.next_multiple_of(unit) } else { end & !(unit - 1) };
        let mut at = start;
        while at < end {
            let whole = at.is_multiple_of(unit) && at < units_end;
            let stop = if whole {
                units_end.min((at | (self.cluster_size() - 1)) + 1)
            } else {
                end.min((at | (unit - 1)) + 1)
            };
            if !self.zero_units(queue, at, stop, zeros).await? {
                self.write_zero_bytes(queue, at, stop.min(end), zeros).await?;
            }
            at = stop;
        }
        Ok(())
    }

    /// Has the L2 entry of the one cluster in which `start..end` lies say that it reads as zeros, together with what lies around it in
    /// its first and last unit (subcluster, or cluster); false if zeros have to be written.
    async fn zero_units(&self, queue: &Rc<Queue>, start: u64, end: u64, zeros: Zeros) -> Result<bool> {
        if self.geometry.version < 3 {
            return Ok(false);
        }
        let unit = self.geometry.subcluster_size();
        let (first, last) = (start & !(unit - 1), end.next_multiple_of(unit));
        let _writers = self.ranges.lock(self.clusters(first, last - first)).await;
        let end = end.min(self.size);
        if !zeros.said && self.reads_zero(queue, start, end - start).await? {
            return Ok(true);
        }
        if !self.is_zero_but_for(queue, first..last, start..end).await? {
            return Ok(false);
        }
        if !self.geometry.extended_l2 {
            self.change_locked(queue, first, last, zeros.fate(), zeros.said).await?;
            return Ok(true);
        }
        self.own_table(queue, start).await?;
        let (number, count) = (self.geometry.subcluster_index(GuestOffset::new(first)), (last - first) / unit);
        let change = |_, old: Stored| {
            Ok(Stored { bitmap: old.bitmap.with_range(number as u32, count as u32, Subcluster::Zero), ..old })
        };
        let cluster = self.geometry.cluster_bits.align_down(first);
        self.publish(queue, cluster, 1, change).await?;
        Ok(true)
    }

    /// Whether what lies in whole units around a part of them reads as zeros, and not because zeros are written there.
    async fn is_zero_around(&self, queue: &Rc<Queue>, units: Range<u64>, part: Range<u64>) -> Result<bool> {
        for around in [units.start..part.start, part.end..units.end.min(self.size)] {
            let mut at = around.start;
            while at < around.end {
                let run = self.run(queue, at, around.end - at).await?;
                let len = match (run.kind, &self.backing) {
                    (Kind::Zero { .. } | Kind::Unallocated(Below::Nothing), _) => run.len,
                    (Kind::Unallocated(_) | Kind::Reserved { .. }, Some(backing)) if at < backing.size() => {
                        let extent = backing.extent(queue, at, run.len.min(backing.size() - at)).await?;
                        if !extent.reads_zero() {
                            return Ok(false);
                        }
                        extent.range.end - at
                    }
                    (Kind::Unallocated(_) | Kind::Reserved { .. }, _) => run.len,
                    (Kind::Data { .. } | Kind::Compressed(_), _) => return Ok(false),
                };
                at += len;
            }
        }
        Ok(true)
    }

    /// The part of a range that is whole clusters; the disk's last cluster is whole when the range reaches the disk's end.
    fn whole_clusters(&self, offset: u64, len: u64) -> (u64, u64) {
        let bits = self.geometry.cluster_bits;
        let end = offset + len;
        // Both are at most the disk's size, which is bounded far below an overflow.
        let start = bits.align_up(offset).unwrap_or(offset);
        let end = if end >= self.size { bits.align_up(end).unwrap_or(end) } else { bits.align_down(end) };
        (start, end)
    }

    /// Writes zeros over `start..end`, leaving alone what already reads as zeros (and is to, whatever lies below).
    async fn write_zero_bytes(&self, queue: &Rc<Queue>, start: u64, end: u64, zeros: Zeros) -> Result<()> {
        let mut at = start;
        while at < end {
            let run = self.run(queue, at, end - at).await?;
            let zero = match run.kind {
                Kind::Zero { .. } => true,
                Kind::Unallocated(below) if !zeros.said => {
                    below == Below::Nothing || self.backing.as_ref().is_none_or(|backing| at >= backing.size())
                }
                _ => false,
            };
            if !zero {
                let zeros = zero_segs(run.len.min(1 << 20));
                self.write(queue, at, &zeros).await?;
                at += segs_len(&zeros);
                continue;
            }
            at += run.len;
        }
        Ok(())
    }

    async fn change_clusters(&self, queue: &Rc<Queue>, start: u64, end: u64, fate: Fate, said: bool) -> Result<()> {
        let coverage = self.geometry.l2_coverage();
        let pause = CLUSTERS_AT_ONCE << self.geometry.cluster_bits.bits();
        let (mut at, mut since) = (start, start);
        while at < end {
            // One L2 table at a time.
            let stop = end.min((at / coverage + 1) * coverage);
            let _writers = self.ranges.lock(self.clusters(at, stop - at)).await;
            self.change_locked(queue, at, stop, fate, said).await?;
            at = stop;
            if at - since >= pause {
                since = at;
                queue.give_way().await;
            }
        }
        Ok(())
    }

    /// Changes whole clusters of one L2 table. The caller holds their range lock.
    async fn change_locked(&self, queue: &Rc<Queue>, start: u64, end: u64, fate: Fate, said: bool) -> Result<()> {
        let cluster = self.cluster_size();
        let mut at = start;
        while at < end {
            let run = self.run_of_clusters(queue, at, end - at).await?;
            let count = run.len.div_ceil(cluster);
            match self.replacement(run.kind, fate, said)? {
                Change::None => {}
                Change::Write => {
                    let zeros = zero_segs(cluster.min(self.size - at));
                    // The range lock is ours: an in-place write needs none, and a new cluster cannot be needed here.
                    if let Kind::Data { host, copied: true } = run.kind {
                        self.write_data(queue, Spot { guest: at, host: host.get() }, zeros, Vec::new()).await?;
                        at += cluster;
                        continue;
                    }
                    self.write_zero_cluster(queue, at).await?;
                    at += cluster;
                    continue;
                }
                Change::Entries(entry_at) => {
                    self.own_table(queue, at).await?;
                    self.publish(queue, at, count, |i, _| entry_at(i * cluster)).await?;
                    if let Kind::Data { host, copied } = run.kind
                        && fate != Fate::Keep
                    {
                        self.forget_data(queue, at, count * cluster).await;
                        if copied && self.options.discard_no_unref {
                            self.empty_data(queue, host, count * cluster).await;
                        }
                    }
                }
            }
            at += count * cluster;
        }
        Ok(())
    }

    /// Allocates a cluster of zeros: what version 2 has in place of the zero flag, where a backing file would show through.
    async fn write_zero_cluster(&self, queue: &Rc<Queue>, at: u64) -> Result<()> {
        self.own_table(queue, at).await?;
        let extent = self.allocate_data(queue, at, 1).await?;
        // Even where the file's end makes it zero already: a check takes an entry that points past the end for damage.
        let zeros = zero_segs(self.cluster_size());
        let spot = Spot { guest: at, host: extent.host.get() };
        self.write_data(queue, spot, zeros, Vec::new()).await.inspect_err(|_| self.give_back_data(extent))?;
        self.publish(queue, at, 1, |_, _| Stored::data(extent.host)).await.map_err(|e| {
            self.give_back_data(extent);
            e.into()
        })
    }

    /// Makes whole clusters of which the image has nothing read as zeros, whatever will lie below it. `end` may be the disk's.
    pub(crate) async fn zero_explicitly(&self, queue: &Rc<Queue>, start: u64, end: u64) -> Result<()> {
        self.check_writable()?;
        let (geometry, cluster, coverage) = (self.geometry, self.cluster_size(), self.geometry.l2_coverage());
        let mut at = start;
        while at < end {
            let stop = end.min((at / coverage + 1) * coverage);
            let _writers = self.ranges.lock(self.clusters(at, stop - at)).await;
            self.own_table(queue, at).await?;
            if geometry.version >= 3 {
                let zero = |_, old: Stored| match old.decode(&geometry)?.0 {
                    L2Kind::Unallocated => Stored::zero(&geometry, None, false),
                    _ => Ok(old),
                };
                self.publish(queue, at, (stop - at).div_ceil(cluster), zero).await?;
                at = stop;
            }
            while at < stop {
                let run = self.run_of_clusters(queue, at, stop - at).await?;
                if matches!(run.kind, Kind::Unallocated(_)) {
                    self.write_zero_cluster(queue, at).await?;
                }
                at += cluster;
            }
        }
        Ok(())
    }

    /// What takes the place of clusters of this kind.
    fn replacement(&self, kind: Kind, fate: Fate, said: bool) -> Result<Change> {
        let v3 = self.geometry.version >= 3;
        let keeps = fate == Fate::Keep || self.options.discard_no_unref;
        let geometry = self.geometry;
        let hole: EntryAt = Box::new(|_| Ok(Stored::default()));
        let zero: EntryAt = Box::new(move |_| Stored::zero(&geometry, None, false));
        // Unallocated reads as zeros only as long as nothing lies below.
        let plain = match v3 {
            true => Some(zero),
            false => self.backing.is_none().then_some(hole),
        };
        Ok(match (kind, fate) {
            (Kind::Unallocated(_), _) if self.backing.is_none() && !said => Change::None,
            (Kind::Zero { host: None, .. }, _) => Change::None,
            (Kind::Zero { host: Some(_), .. }, Fate::Keep) => Change::None,
            (Kind::Zero { host: Some(_), copied: true }, _) if keeps => Change::None,
            (Kind::Unallocated(_), Fate::Discard) if !v3 => Change::None,
            (Kind::Data { host, copied: true }, _) if v3 && keeps => {
                let place = move |i| HostOffset::new(host.get() + i);
                Change::Entries(Box::new(move |i| Stored::zero(&geometry, Some(place(i)), true)))
            }
            // Version 2 can keep the space only where it writes zeros there. Where nothing lies below, it is worth nothing.
            (Kind::Data { copied: true, .. }, Fate::Keep) if self.backing.is_some() => Change::Write,
            // Version 2 cannot say "zeros": a discard leaves the data, rather than show the backing file's. (Sharp edge 21.)
            _ => match (plain, fate) {
                (Some(entry), _) => Change::Entries(entry),
                (None, Fate::Discard) => Change::None,
                (None, _) => Change::Write,
            },
        })
    }
}

type EntryAt = Box<dyn Fn(u64) -> std::result::Result<Stored, cowhand_qcow2::FormatError>>;

enum Change {
    /// Nothing to do.
    None,
    /// Entries by their distance, in bytes, from the run's first.
    Entries(EntryAt),
    /// Zeros have to be written, a cluster at a time.
    Write,
}
