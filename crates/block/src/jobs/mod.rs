//! Work on whole disks that nobody else uses meanwhile: what `qemu-img` and its kind do.
//!
//! [`copy`](mod@copy) fills a disk from others ([`plan`] says with what, [`sparse`] finds the zeros), [`compare`](mod@compare) holds two
//! against each other, [`measure`](mod@measure) says how much room a copy would take. [`commit`](mod@commit) carries an overlay's
//! content down into an image below it, [`rebase`](mod@rebase) puts an overlay over another image ([`pieces`] is how both copy);
//! [`amend`](mod@amend) makes another sort of image of one.
//!
//! Each job runs on the thread that calls it, with one I/O queue for all its disks, and ends when its work is over. The disks must
//! stay as they are meanwhile.

pub mod amend;
pub mod commit;
pub mod compare;
pub mod copy;
pub mod measure;
mod pieces;
mod plan;
pub mod rebase;
mod sparse;

/// Is told how far a job has come: how much is done, and of how much. Who wants a job to go slower sleeps in it.
pub type Progress = Box<dyn FnMut(u64, u64)>;
