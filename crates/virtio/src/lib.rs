//! virtio device models, free of KVM and of any transport.
//!
//! A device implements [`VirtioDevice`]; a transport (virtio-pci in the VMM, vhost-user) negotiates with the guest and
//! activates it. Section numbers in this crate are those of the virtio 1.2 specification.

pub mod blk;
pub mod chain;
pub mod device;
pub mod dirty;
mod ring;
pub mod rng;

#[cfg(test)]
mod testing;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

pub use device::{ActivateError, Activation, ActiveQueue, Interrupt, Memory, VirtioDevice};
pub use dirty::{DirtyLog, DirtyMarks, PageLog};

/// Memory that is shared with another process, which may change it at any time. Its length never changes.
pub type SharedWords = Arc<dyn AsRef<[AtomicU64]> + Send + Sync>;
