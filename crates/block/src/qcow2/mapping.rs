//! Where guest data lies: lookups, from the caches alone or with what has to be read for them.

use std::rc::Rc;

use cowhand_qcow2::{
    CompressedRange, FormatError, Geometry, GuestOffset, HostOffset, L2Kind, Subcluster, SubclusterBitmap,
};

use super::Image;
use super::entry::{Below, Stored};
use super::slices::Slice;
use crate::error::{Error, Result};
use crate::io::File;
use crate::mutation::Mutation;
use crate::queue::Queue;

/// How a run of guest data is kept. Runs of `Reserved`, `Data` and `Zero` lie together in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Not in this layer.
    Unallocated(Below),
    /// Not in this layer, but its cluster has a place (with extended L2 entries), writable in place if `copied`.
    Reserved { host: HostOffset, copied: bool },
    /// Reads as zeros; the clusters may have a place (`host`), writable in place if `copied`.
    Zero { host: Option<HostOffset>, copied: bool },
    /// At this place, writable in place if `copied`.
    Data { host: HostOffset, copied: bool },
    /// One compressed cluster.
    Compressed(CompressedRange),
}

/// Guest data of one kind, from some offset on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) kind: Kind,
    /// In bytes; at least 1.
    pub(crate) len: u64,
}

/// What the caches know of an offset without I/O.
enum Peek {
    /// The kind, and the guest offset up to which it is known to be the same.
    Known(Kind, u64),
    Missing(Slice),
}

/// How closely a run is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum View {
    /// Everything that a reader has to know.
    Reader,
    /// What lies below a cluster that is not in this layer is all the same.
    Writer,
    /// As the writer's, in whole clusters: with extended L2 entries `Data` means only that a cluster has a place, `Unallocated` only that
    /// it has none.
    Clusters,
}

impl Image {
    pub(super) fn slice_of(&self, offset: u64) -> (Slice, usize) {
        let cluster = self.geometry.cluster_bits.index_of(offset);
        let entries = self.slice_entries as u64;
        (Slice(cluster / entries), (cluster % entries) as usize)
    }

    /// The L1 index of a slice, and the slice's place in its table in bytes.
    pub(super) fn slice_place(&self, slice: Slice) -> (usize, u64) {
        let per_table = self.geometry.l2_entries() / self.slice_entries as u64;
        let bytes = self.slice_entries as u64 * self.geometry.l2_entry_size();
        ((slice.0 / per_table) as usize, slice.0 % per_table * bytes)
    }

    /// What the caches say of `offset`; a place is that of the very byte.
    fn peek(&self, offset: u64, view: View) -> Result<Peek> {
        // Where layers below are resolved, the slices of a table that does not exist say what is there.
        if self.below.is_empty() && self.l1_entry(self.geometry.l1_index(GuestOffset::new(offset)) as usize).raw() == 0
        {
            let coverage = self.geometry.l2_coverage();
            let end = (offset & !(coverage - 1)).saturating_add(coverage);
            return Ok(Peek::Known(Kind::Unallocated(self.unresolved(view)), end));
        }
        let (slice, index) = self.slice_of(offset);
        let Some(stored) = self.slices.get(slice, index) else { return Ok(Peek::Missing(slice)) };
        let decoded = stored.decode(&self.geometry);
        let (kind, below) = decoded.map_err(|e| self.entry_error(stored, &e, slice, index))?;
        let within = self.geometry.cluster_bits.offset_in(offset);
        let cluster_end = offset - within + self.cluster_size();
        if self.geometry.extended_l2 && !matches!(kind, L2Kind::Compressed(_)) {
            let (kind, units) = match view {
                View::Clusters => (self.cluster_kind(stored, kind, within), Geometry::SUBCLUSTERS),
                View::Reader | View::Writer => self.subcluster_kind(stored, kind, below, offset, view),
            };
            return Ok(Peek::Known(kind, offset - within + units * self.geometry.subcluster_size()));
        }
        let at = |host: HostOffset| HostOffset::new(host.get() + within);
        let kind = match kind {
            L2Kind::Unallocated => Kind::Unallocated(self.below_at(below, within, view)),
            L2Kind::Zero { host, copied } => Kind::Zero { host: host.map(at), copied },
            L2Kind::Data { host, copied } => Kind::Data { host: at(host), copied },
            L2Kind::Compressed(range) => Kind::Compressed(range),
        };
        Ok(Peek::Known(kind, cluster_end))
    }

    /// What is wrong with an entry, which stands there in its slice. One that leads into metadata, or to a place that is no cluster's,
    /// shows that the image must not be written any more. (Sharp edges 18 and 43.)
    fn entry_error(&self, stored: Stored, error: &FormatError, slice: Slice, index: usize) -> Error {
        let in_words = match error {
            _ if stored.is_misled() => self.misled_error().damaging(),
            FormatError::Misaligned { .. } => self.format_error(error).damaging(),
            _ => self.format_error(error),
        };
        let (l1_index, at) = self.slice_place(slice);
        match self.l1_entry(l1_index).offset(&self.geometry) {
            Ok(Some(table)) => in_words.at_offset(table.get() + at + index as u64 * self.geometry.l2_entry_size()),
            _ => in_words,
        }
    }

    /// The kind of the subcluster at `offset`, and the number in its cluster of the first subcluster that may be of another.
    fn subcluster_kind(&self, stored: Stored, kind: L2Kind, below: Below, offset: u64, view: View) -> (Kind, u64) {
        let within = self.geometry.cluster_bits.offset_in(offset);
        let place = match kind {
            L2Kind::Data { host, copied } => Some((HostOffset::new(host.get() + within), copied)),
            _ => None,
        };
        let first = self.geometry.subcluster_index(GuestOffset::new(offset)) as u32;
        let (what, count) = stored.bitmap.run(first).unwrap_or((Subcluster::Unallocated, 1));
        let kind = match (what, place) {
            (Subcluster::Zero, place) => Kind::Zero { host: place.map(|p| p.0), copied: place.is_some_and(|p| p.1) },
            (Subcluster::Allocated, Some((host, copied))) => Kind::Data { host, copied },
            (Subcluster::Unallocated, Some((host, copied))) => Kind::Reserved { host, copied },
            // Allocated without a place does not validate.
            (_, None) => Kind::Unallocated(self.below_at(below, within, view)),
        };
        (kind, u64::from(first + count))
    }

    /// The kind of a whole cluster with an extended entry.
    fn cluster_kind(&self, stored: Stored, kind: L2Kind, within: u64) -> Kind {
        let all_zero = stored.bitmap == SubclusterBitmap::ALL_ZERO;
        match kind {
            L2Kind::Data { host, copied } => {
                let host = HostOffset::new(host.get() + within);
                if all_zero { Kind::Zero { host: Some(host), copied } } else { Kind::Data { host, copied } }
            }
            _ if all_zero => Kind::Zero { host: None, copied: false },
            _ => Kind::Unallocated(Below::Unknown),
        }
    }

    /// What lies below the byte `within` of a cluster that is not in this layer.
    fn below_at(&self, below: Below, within: u64, view: View) -> Below {
        match below {
            Below::Unknown => self.unresolved(view),
            _ if view != View::Reader => Below::Unknown,
            Below::At { layer, place } => Below::At { layer, place: place + within },
            other => other,
        }
    }

    fn unresolved(&self, view: View) -> Below {
        if self.backing.is_none() && view == View::Reader { Below::Nothing } else { Below::Unknown }
    }

    /// How far from `offset` the data is of one kind and in one place, at most `len` bytes, looking only where the caches know.
    fn extend(&self, offset: u64, len: u64, (kind, mut end): (Kind, u64), view: View) -> Result<Run> {
        if !matches!(kind, Kind::Compressed(_)) {
            while end < offset + len {
                let Peek::Known(next, next_end) = self.peek(end, view)? else { break };
                if !follows(kind, next, end - offset) {
                    break;
                }
                end = next_end;
            }
        }
        Ok(Run { kind, len: (end - offset).min(len) })
    }

    /// In which file and where the `len` bytes at `offset` lie, if all lie together, can be used in place, and the caches know: the
    /// path of nearly every request, without a lock or an allocation.
    pub(crate) fn mapped(&self, offset: u64, len: u64, write: bool) -> Option<(&File, u64)> {
        if !self.is_plain() || (write && self.is_corrupt()) {
            return None;
        }
        let Ok(Peek::Known(kind, end)) = self.peek(offset, View::Reader) else { return None };
        let found = match kind {
            Kind::Data { host, copied } if copied || !write => (self.data_file(), host.get()),
            Kind::Unallocated(Below::At { layer, place }) if !write => (self.layer(layer)?.data_file(), place),
            _ => return None,
        };
        // Looked at after the mapping: who sees an entry sees that it is not in the file yet.
        if write && self.has_unsettled() && !Mutation::UnsettledPlaceWritten.is_on() {
            return None;
        }
        let whole = end - offset >= len || self.extend(offset, len, (kind, end), View::Reader).ok()?.len == len;
        whole.then_some(found)
    }

    /// The run that begins at `offset`, at most `len` bytes of it (`len` is not 0).
    pub(crate) async fn run(&self, queue: &Rc<Queue>, offset: u64, len: u64) -> Result<Run> {
        self.run_seen(queue, offset, len, View::Reader).await
    }

    /// The same for who writes it: clusters that are not in this layer are all one.
    pub(super) async fn run_to_write(&self, queue: &Rc<Queue>, offset: u64, len: u64) -> Result<Run> {
        self.run_seen(queue, offset, len, View::Writer).await
    }

    /// The same for who changes whole clusters.
    pub(super) async fn run_of_clusters(&self, queue: &Rc<Queue>, offset: u64, len: u64) -> Result<Run> {
        self.run_seen(queue, offset, len, View::Clusters).await
    }

    async fn run_seen(&self, queue: &Rc<Queue>, offset: u64, len: u64, view: View) -> Result<Run> {
        loop {
            match self.peek(offset, view)? {
                Peek::Known(kind, end) => return self.extend(offset, len, (kind, end), view),
                Peek::Missing(slice) => self.load(queue, slice).await?,
            }
        }
    }

    /// Whether the range is known to read as zeros.
    pub(super) async fn reads_zero(&self, queue: &Rc<Queue>, offset: u64, len: u64) -> Result<bool> {
        let mut done = 0;
        while done < len {
            let run = self.run(queue, offset + done, len - done).await?;
            if !matches!(run.kind, Kind::Zero { .. } | Kind::Unallocated(Below::Nothing)) {
                return Ok(false);
            }
            done += run.len;
        }
        Ok(true)
    }
}

/// Whether `next`, found `distance` bytes after a run's first byte, goes on with the run.
fn follows(kind: Kind, next: Kind, distance: u64) -> bool {
    let joins = |a: HostOffset, b: HostOffset| a.get() + distance == b.get();
    match (kind, next) {
        (Kind::Unallocated(a), Kind::Unallocated(b)) => match (a, b) {
            (Below::At { layer, place }, Below::At { layer: next_layer, place: next_place }) => {
                layer == next_layer && place + distance == next_place
            }
            _ => a == b,
        },
        (Kind::Zero { host: None, .. }, Kind::Zero { host: None, .. }) => true,
        (Kind::Zero { host: Some(a), copied }, Kind::Zero { host: Some(b), copied: c })
        | (Kind::Reserved { host: a, copied }, Kind::Reserved { host: b, copied: c })
        | (Kind::Data { host: a, copied }, Kind::Data { host: b, copied: c }) => copied == c && joins(a, b),
        _ => false,
    }
}

/// A big-endian number of eight bytes.
pub(super) fn be64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}
