//! virtio-blk (sect. 5.2): a disk for the guest, on any engine queue.
//!
//! - `device` is the [`VirtioDevice`](crate::VirtioDevice): features, configuration, and one thread for each queue;
//! - `worker` serves one queue on its thread: chains in, engine requests out, completions back. It knows no transport, so
//!   a vhost-user backend runs it too;
//! - `request` judges and takes apart one chain;
//! - `config` lays out the configuration space;
//! - `inflight` keeps records of what a worker has taken, for one that goes on after it was killed;
//! - `patience` is how long a worker looks for work before it sleeps;
//! - `failed` stands in for an engine queue that is no more.
//!
//! Where the bytes go is the engine's concern: [`BlockBackend`] is all that is asked of a disk, and `disk` gives it for the
//! engine's own.

mod config;
mod device;
mod disk;
mod failed;
#[cfg(test)]
mod fake;
mod inflight;
mod patience;
mod request;
mod settings;
mod worker;

use cowhand_block::{Limits, RequestQueue};

pub use device::{Block, BlockOptions};
pub use disk::DiskBackend;
pub use inflight::{Inflight, InflightError, InflightQueue};
pub use patience::LONGEST_PATIENCE;
pub use settings::BlockSettings;
pub use worker::{BlockWorker, WorkerParts};

/// Bytes of a sector, the unit of everything in the protocol (sect. 5.2.6).
pub const SECTOR: u64 = 512;

/// A disk as the device needs it.
pub trait BlockBackend: Send + Sync {
    /// The disk's size now, in bytes.
    fn size(&self) -> u64;

    /// Whether the disk may not be written. Does not change.
    fn read_only(&self) -> bool;

    /// Block sizes, and what a discard may be. Does not change.
    fn limits(&self) -> Limits;

    /// A queue of requests, for the calling thread alone.
    ///
    /// # Errors
    /// When the I/O driver cannot be set up.
    fn open_queue(&self) -> cowhand_block::Result<Box<dyn RequestQueue>>;
}
