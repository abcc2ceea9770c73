//! Layers that several disks of one process have in common: opened once, so that they are locked once and cached once.
//!
//! Only layers that are read alone, and that a header names in the plain way: what is described (`json:`, node options) or decrypted may be
//! meant differently each time. A layer stays open as long as a disk has it; then its lock goes with it.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Weak;

use crate::node::Node;
use crate::spec::{DiskSpec, Format};
use crate::sync::{Arc, Mutex};

/// What makes two layers the same.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// By which name it was found: what it refers to lies beside it.
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
    format: Format,
    direct: bool,
    lock: bool,
    metadata_cache: Option<u64>,
}

impl Key {
    /// Of a layer below the topmost one of a disk.
    pub(crate) fn new(path: PathBuf, identity: (u64, u64), format: Format, disk: &DiskSpec) -> Self {
        let &DiskSpec { lock, metadata_cache, .. } = disk;
        Self { path, identity, format, direct: disk.cache.is_direct(), lock, metadata_cache }
    }
}

/// The layers that are open.
#[derive(Default)]
pub struct SharedLayers {
    open: Mutex<HashMap<Key, Weak<Node>>>,
}

impl SharedLayers {
    pub(crate) fn find(&self, key: &Key) -> Option<Arc<Node>> {
        self.open.lock().get(key)?.upgrade()
    }

    /// Two who open a layer at the same moment have one each: the later one is shared from then on.
    pub(crate) fn put(&self, key: Key, layer: &Arc<Node>) {
        let mut open = self.open.lock();
        open.retain(|_, layer| layer.strong_count() > 0);
        open.insert(key, Arc::downgrade(layer));
    }
}

impl fmt::Debug for SharedLayers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.open.lock().keys()).finish()
    }
}

#[cfg(test)]
#[path = "shared_test.rs"]
mod tests;
