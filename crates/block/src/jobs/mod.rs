//! Work on whole disks that nobody else uses meanwhile: what `qemu-img` and its kind do.
//!
//! [`copy`](mod@copy) fills a disk from others ([`plan`] says with what, [`sparse`] finds the zeros), [`compare`](mod@compare) holds two
//! against each other, [`measure`](mod@measure) says how much room a copy would take.
//!
//! Each job runs on the thread that calls it, with one I/O queue for all its disks, and ends when its work is over. The disks must
//! stay as they are meanwhile.

pub mod compare;
pub mod copy;
pub mod measure;
mod plan;
mod sparse;
