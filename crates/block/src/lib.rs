//! The block engine: storage drivers, images and chains, requests, locks.
//!
//! It knows nothing of virtio, of KVM or of the command line.

mod bitmap;
pub mod bytes;
mod chain;
mod change;
pub mod check;
mod copy_before;
mod disk;
mod errno;
mod error;
mod filling;
mod flush;
mod grace;
mod granules;
mod hooks;
mod inspect;
pub mod io;
pub mod jobs;
mod join;
mod journal;
#[cfg(test)]
mod live_test;
mod locks;
mod mutation;
mod new_image;
mod node;
pub mod options;
#[cfg(test)]
mod oracle;
mod overlay;
mod probe;
pub mod protocol;
mod qcow2;
mod queue;
mod raw;
pub mod request;
pub mod secret;
mod shape;
mod shared;
pub mod size;
pub mod spec;
mod status;
#[cfg(test)]
mod stress_test;
mod sync;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod torture;
mod tracker;
mod tuning;

pub use bitmap::{BitmapInfo, BitmapState};
pub use chain::OpenPolicy;
pub use change::SnapshotInfo;
pub use copy_before::CopyBeforeWrite;
pub use disk::{Disk, DiskQueue, LayerInfo};
pub use error::{Error, ErrorKind, Result};
pub use inspect::{ImageInfo, Qcow2Info, inspect};
pub use journal::{JOURNAL_WORDS, SharedWords, Survival};
pub use new_image::{Encryption, FileHints, NewFormat, NewImage, make_image};
pub use overlay::{Overlay, OverlayOptions, OverlaySource, snapshot_disks};
pub use probe::probe_format;
pub use qcow2::create::{Preallocation, create_image};
pub use request::{Event, Limits, Request, RequestQueue, Wait};
pub use shape::DiskShape;
pub use shared::SharedLayers;
pub use spec::{Backing, Cache, DiskSpec, Format, FormatError, SpecError};
pub use status::{Content, Extent, Extents};
pub use tracker::DirtyTracker;
pub use tuning::Tuning;
