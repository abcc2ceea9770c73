//! The block engine: storage drivers, images and chains, requests, locks.
//!
//! It knows nothing of virtio, of KVM or of the command line.

mod error;
pub mod io;
pub mod request;

pub use error::{Error, ErrorKind, Result};
pub use request::{Event, Limits, Request, RequestQueue, Wait};
