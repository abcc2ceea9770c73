//! Which structure each cluster of metadata belongs to: what lay there when the image was opened ([`super::layout`]), and what has come
//! since. (Sharp edge 43.)
//!
//! Asked before each write of metadata: a structure that is about to be written where another one lies shows that the image's
//! refcounts (or we) are wrong, and to go on would destroy the other. One look costs a search in a sorted list.

use std::collections::BTreeMap;
use std::ops::Range;

use super::layout::{Layout, Structure};
use crate::sync::Arc;

/// The owners of metadata clusters.
pub(super) struct Owners {
    layout: Arc<Layout>,
    /// By cluster, those that are not in the layout.
    made: BTreeMap<u64, Structure>,
}

/// A cluster belongs to another structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owned {
    pub(super) cluster: u64,
    pub(super) by: Structure,
}

impl Owners {
    pub(super) fn new(layout: Arc<Layout>) -> Self {
        Self { layout, made: BTreeMap::new() }
    }

    fn owner(&self, cluster: u64) -> Option<Structure> {
        self.made.get(&cluster).copied().or_else(|| self.layout.owner(cluster))
    }

    /// A structure is written in these clusters: they are its own, or nobody's and its own from now on.
    pub(super) fn claim(&mut self, structure: Structure, clusters: Range<u64>) -> Result<(), Owned> {
        self.claim_from(structure, clusters, Some(structure))
    }

    /// The same for clusters that were just given out: they are nobody's.
    pub(super) fn claim_new(&mut self, structure: Structure, clusters: Range<u64>) -> Result<(), Owned> {
        self.claim_from(structure, clusters, None)
    }

    fn claim_from(&mut self, structure: Structure, clusters: Range<u64>, own: Option<Structure>) -> Result<(), Owned> {
        for cluster in clusters.clone() {
            match self.owner(cluster) {
                Some(by) if Some(by) != own => return Err(Owned { cluster, by }),
                _ => {}
            }
        }
        for cluster in clusters.filter(|&cluster| self.layout.owner(cluster).is_none()) {
            self.made.insert(cluster, structure);
        }
        Ok(())
    }

    /// One of these clusters that holds metadata, if any does. Of an image that is only read nothing is known.
    pub(super) fn metadata_in(&self, clusters: &Range<u64>) -> Option<u64> {
        let made = || self.made.range(clusters.clone()).next().map(|(&cluster, _)| cluster);
        self.layout.first_in(clusters).or_else(made)
    }

    /// The cluster is free again.
    pub(super) fn release(&mut self, cluster: u64) {
        self.made.remove(&cluster);
    }
}

#[cfg(test)]
#[path = "owners_test.rs"]
mod tests;
