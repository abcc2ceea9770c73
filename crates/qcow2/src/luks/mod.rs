//! LUKS1 as it stands inside a QCOW2 image: the header that says how data is encrypted, and the key slots, each of
//! which gives the key of the volume to one secret. (Specification, "Full disk encryption header pointer"; LUKS1
//! On-Disk Format Specification 1.2.3.)
//!
//! - [`header`]: the 592 bytes of the partition header, parsed, validated, encoded;
//! - [`unlock`]: a secret and the key material to the [`VolumeKey`], and from there to the [`crate::Cipher`];
//! - [`change`]: a new header; adding and erasing key slots;
//! - [`hash`]: PBKDF2 and how many iterations it gets; `af`: the anti-forensic splitter; `names`: what the header calls
//!   ciphers and hashes.
//!
//! The *area* is what the header extension points to ([`crate::LuksExtension`]): the partition header, then the slots'
//! key material, at offsets relative to the area's start. The header's payload offset is where the area ends; it says
//! nothing about where a QCOW2 image has its data.
//!
//! Not responsible for: reading and writing the area, where entropy and secrets come from (both come in as bytes),
//! measuring time. Secrets, keys and what they are made from are wiped from memory when they are dropped; not so the
//! working memory of the hash functions' own code.

mod af;
pub mod change;
pub mod error;
pub mod hash;
pub mod header;
mod names;
pub mod unlock;

pub use change::{CreateParams, Created, SlotChange};
pub use error::LuksError;
pub use hash::{Hash, Iterations};
pub use header::{Header, KeySlot};
pub use unlock::{Unlocked, VolumeKey};

#[cfg(test)]
mod oracle_test;
