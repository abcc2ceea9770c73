//! What a check finds and says: the public types.

use std::fmt;

/// What a check may repair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repair {
    /// Nothing: the image is not written.
    #[default]
    None,
    /// Leaked clusters are freed.
    Leaks,
    /// Everything that can be repaired without a guess.
    All,
}

/// How an image is to be checked.
#[derive(Clone, Copy, Debug)]
pub struct CheckOptions {
    /// What to repair.
    pub repair: Repair,
    /// Whether to take QEMU's image locks: without them nobody else may use the image meanwhile.
    pub lock: bool,
}

impl Default for CheckOptions {
    fn default() -> Self {
        Self { repair: Repair::None, lock: true }
    }
}

/// What sort of thing was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FindingKind {
    /// A cluster is counted more often than it is referred to: space is lost, nothing else.
    Leak,
    /// A cluster is counted less often than it is referred to: it may be given out though it is in use.
    Refcount,
    /// An entry's COPIED flag contradicts the refcount.
    Copied,
    /// Structures that cannot share a cluster do.
    Overlap,
    /// A table entry breaks the format's rules.
    Entry,
    /// Something lies past the end of the file.
    Outside,
    /// The refcount table or a refcount block cannot be used.
    RefcountStructure,
    /// The snapshot table, or an entry of it.
    Snapshot,
    /// The bitmap directory, a bitmap table, or an entry of one.
    Bitmap,
}

impl FindingKind {
    /// Whether stale refcounts explain it: it goes with a count of all references.
    pub(crate) const fn is_of_counts(self) -> bool {
        matches!(self, Self::Leak | Self::Refcount | Self::Copied | Self::RefcountStructure)
    }
}

/// One thing that is wrong with an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What sort of thing.
    pub kind: FindingKind,
    /// Where in the file: the cluster that is miscounted, or the entry that is wrong, in bytes.
    pub offset: u64,
    /// The number of the host cluster that `offset` lies in.
    pub cluster: u64,
    /// What is wrong, in words: in QEMU's where QEMU finds the same.
    pub text: String,
}

impl Finding {
    /// Whether it is a leak; everything else is a corruption.
    #[must_use]
    pub fn is_leak(&self) -> bool {
        self.kind == FindingKind::Leak
    }
}

impl fmt::Display for Finding {
    /// As `qemu-img check` says it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            FindingKind::Leak => "Leaked",
            FindingKind::Outside => "ERROR:",
            _ => "ERROR",
        };
        write!(f, "{what} {}", self.text)
    }
}

/// What a check says while it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Something is wrong.
    Found(Finding),
    /// One thing that is wrong is being repaired: what, in the words of its [`Finding`].
    Repairing(String),
    /// Something goes for good, as the format does not allow it: what.
    Discarding(String),
    /// The snapshot table is beyond the format's bounds, and nothing more has been looked at: what is wrong with it, and what a repair
    /// would remove.
    Beyond(String),
    /// The refcounts are about to be written anew.
    Rebuilding,
    /// Something has been repaired.
    Repaired(String),
    /// Something could not be repaired, or must not be.
    NotRepaired(String),
    /// Something is wrong still, after the repair.
    Left(Finding),
    /// How far a walk has come. A repair walks more than once.
    Progress {
        /// Clusters behind the walk.
        done: u64,
        /// Clusters of the file.
        total: u64,
    },
}

/// The numbers of a check; after a repair, of what is left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Things that are wrong and can lose data.
    pub corruptions: u64,
    /// Clusters that are counted but not referred to (or not so often).
    pub leaks: u64,
    /// Corruptions that were there and are not any more.
    pub corruptions_fixed: u64,
    /// Leaks that were there and are not any more.
    pub leaks_fixed: u64,
    /// Of the corruptions, those that hide what a table refers to. As long as there are any no leak is freed: it might be in use.
    pub unreadable: u64,
    /// Where the last cluster in use ends, in bytes.
    pub image_end_offset: u64,
    /// Guest clusters of the disk.
    pub total_clusters: u64,
    /// Guest clusters with a host cluster (or a part of one, compressed).
    pub allocated_clusters: u64,
    /// Guest clusters that are compressed.
    pub compressed_clusters: u64,
    /// Guest clusters that do not lie right behind the one before them. Compressed ones all count.
    pub fragmented_clusters: u64,
}

impl CheckReport {
    /// Whether nothing is wrong (any more).
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0
    }
}

#[cfg(test)]
#[path = "report_test.rs"]
mod tests;
