//! How much of an image's metadata is kept in memory, as QEMU's options say it: held against the image, and turned into one number.

use cowhand_qcow2::Geometry;

/// QEMU's options of qcow2 nodes that say how, and not what: their values make sense only beside the image they are for, so they are
/// checked when it is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tuning {
    /// `cache-size`: for L2 tables and refcounts together, in bytes.
    pub total: Option<u64>,
    /// `l2-cache-size`: for L2 tables, in bytes.
    pub l2: Option<u64>,
    /// `refcount-cache-size`: for refcounts, in bytes.
    pub refcounts: Option<u64>,
    /// `l2-cache-entry-size`: the unit in which L2 tables are read, in bytes. Ours is fixed: this is only checked.
    pub entry: Option<u64>,
    /// `lazy-refcounts=on`: refcounts may be wrong after a crash. Ours never are: this is only checked.
    pub lazy_refcounts: bool,
}

/// What QEMU caches of L2 tables unless told otherwise, at most.
const L2_DEFAULT: u64 = 32 << 20;

/// What QEMU caches of refcounts at least, in clusters.
const REFCOUNTS_LEAST: u64 = 4;

impl Tuning {
    /// The options after `new` ones were given, which take the place of those they contradict.
    pub(crate) fn changed(self, new: Self) -> Self {
        let old = if new.total.is_some() { Self { l2: None, refcounts: None, ..self } } else { self };
        let (l2, refcounts) = (new.l2.or(old.l2), new.refcounts.or(old.refcounts));
        let old_total = old.total.filter(|_| l2.is_none() || refcounts.is_none());
        Self { total: new.total.or(old_total), l2, refcounts, entry: new.entry.or(old.entry), ..new }
    }

    /// The bytes of metadata to keep of an image of `size` bytes; `None` where nothing is said of it.
    ///
    /// # Errors
    /// What cannot be, in QEMU's words.
    pub(crate) fn metadata_cache(&self, geometry: &Geometry, size: u64) -> Result<Option<u64>, String> {
        let cluster = geometry.cluster_bits.size();
        let (l2, refcounts) = self.shares(geometry, size)?;
        let entry = self.entry.unwrap_or(cluster);
        if !(512..=cluster).contains(&entry) || !entry.is_power_of_two() {
            return Err(format!(
                "L2 cache entry size must be a power of two between 512 and the cluster size ({cluster})"
            ));
        }
        if l2 / entry > i32::MAX as u64 {
            return Err("L2 cache size too big".into());
        }
        if refcounts / cluster > i32::MAX as u64 {
            return Err("Refcount cache size too big".into());
        }
        if self.lazy_refcounts && geometry.version < 3 {
            return Err("Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level".into());
        }
        let said = self.total.or(self.l2).or(self.refcounts).is_some();
        Ok(said.then(|| l2.saturating_add(refcounts)))
    }

    /// What L2 tables and refcounts get, in bytes.
    fn shares(&self, geometry: &Geometry, size: u64) -> Result<(u64, u64), String> {
        let bits = geometry.cluster_bits;
        let all_l2 = bits.clusters_for(size).saturating_mul(geometry.l2_entry_size());
        let all_l2 = all_l2.div_ceil(bits.size()).saturating_mul(bits.size());
        let least = REFCOUNTS_LEAST * bits.size();
        let useful = |l2: u64| l2.min(all_l2);
        let Some(total) = self.total else {
            return Ok((useful(self.l2.unwrap_or(L2_DEFAULT)), self.refcounts.unwrap_or(least)));
        };
        match (self.l2, self.refcounts) {
            (Some(_), Some(_)) => {
                Err("cache-size, l2-cache-size and refcount-cache-size may not be set at the same time".into())
            }
            (Some(l2), None) if l2 > total => Err("l2-cache-size may not exceed cache-size".into()),
            (None, Some(refcounts)) if refcounts > total => Err("refcount-cache-size may not exceed cache-size".into()),
            (Some(l2), None) => Ok((useful(l2), total - useful(l2))),
            (None, Some(refcounts)) => Ok((total - refcounts, refcounts)),
            // The tables first, as far as they reach; but some refcounts in any case.
            (None, None) if total >= all_l2.saturating_add(least) => Ok((all_l2, total - all_l2)),
            (None, None) => Ok((total - total.min(least), total.min(least))),
        }
    }
}

#[cfg(test)]
#[path = "tuning_test.rs"]
mod tests;
