//! The QCOW2 on-disk format alone: typed, parsed, validated, encoded. No I/O, no unsafe.
//!
//! Responsible for: what the bytes of an image mean, and which bytes are legal. Everything read from a file passes
//! through here before anything trusts it: counts are bounded before they size an allocation, offsets are newtypes that
//! cannot be mixed up, and no input panics, overflows or loops.
//!
//! Not responsible for: reading or writing files, caching, allocation of clusters, the order of writes, what has to be
//! refused when (a dirty or corrupt image opens for reading): that is the engine's.
//!
//! The specification is QEMU's `docs/interop/qcow2.rst`; section names in the documentation here refer to it.

#![forbid(unsafe_code)]

pub mod bitmap;
mod brief;
pub mod cipher;
pub mod entry;
pub mod error;
pub mod extension;
pub mod feature;
pub mod geometry;
pub mod header;
pub mod limits;
pub mod luks;
pub mod offset;
pub mod refcount;
pub mod snapshot;
pub mod subcluster;

mod wire;

pub use bitmap::{BitmapFlags, BitmapKind, BitmapTableEntry, DirectoryEntry};
pub use cipher::{Cipher, CipherError, CipherSpec, SectorNumbering};
pub use entry::{CompressedRange, L1Entry, L2Entry, L2Kind};
pub use error::{ErrorClass, Field, FormatError};
pub use extension::{BitmapsExtension, Extension, ExtensionKind, LuksExtension};
pub use feature::{Autoclear, Compatible, FeatureKind, FeatureName, Incompatible};
pub use geometry::Geometry;
pub use header::{Compression, CreateParams, CryptMethod, Header, HeaderSwitch};
pub use luks::LuksError;
pub use offset::{ClusterBits, GuestOffset, HostOffset};
pub use refcount::RefTableEntry;
pub use snapshot::Snapshot;
pub use subcluster::{Subcluster, SubclusterBitmap};

#[cfg(test)]
mod roundtrip_test;
#[cfg(test)]
mod samples_test;
