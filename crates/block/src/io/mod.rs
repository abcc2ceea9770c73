//! The seam to everything outside the engine: files, their I/O, the clock, other threads.

mod buf;

pub use buf::IoSeg;
