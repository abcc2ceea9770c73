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

pub use cowhand_block::SharedWords;
pub use device::{ActivateError, Activation, ActiveQueue, Interrupt, Memory, VirtioDevice};
pub use dirty::{DirtyLog, DirtyMarks, PageLog};
