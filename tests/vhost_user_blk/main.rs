//! `cowhand vhost-user-blk` as a program, under a front-end of our own.

#![expect(
    clippy::unwrap_used,
    reason = "clippy takes only functions marked #[test] for tests; the helpers here are, too"
)]

mod bad_input;
mod conventions;
mod kill;
mod program;
