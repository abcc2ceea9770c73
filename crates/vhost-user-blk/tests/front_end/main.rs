//! The back-end under a front-end of our own (`cowhand-vhost-user-client`): what works, and that nothing which a front-end does harms it.
//!
//! Exports run in this process, on images in a directory of the test's own. After each test the image checks clean.

#![expect(
    clippy::unwrap_used,
    reason = "clippy takes only functions marked #[test] for tests; the helpers here are, too"
)]

mod config;
mod hostile;
mod hostile_ring;
mod inflight;
mod log;
mod memory;
mod migration;
mod requests;
mod world;
