//! The control API: JSON over HTTP/1.1 on a Unix socket, by which a running cowhand is asked and steered.
//!
//! `resources/openapi.yaml` describes it, and a test holds the description against the server.
//!
//! - [`api`] has the bodies of requests and answers, the same for both sides;
//! - [`disks`] is what the server asks: whoever has disks implements it, and this crate knows neither engine nor device;
//! - `routes` finds out what a request wants; [`server`] listens, `conversation` is one connection, `socket` the file that it came by;
//! - [`client`] is the other side.

pub mod api;
pub mod client;
mod conversation;
pub mod disks;
mod routes;
pub mod server;
mod socket;

pub use api::{Disk, DiskList, Error, ErrorKind, Layer, Resize};
pub use client::{Client, ClientError};
pub use disks::Disks;
pub use server::{Limits, Listening, Server};
pub use socket::ListenError;

#[cfg(test)]
mod testing;

#[cfg(test)]
#[path = "openapi_test.rs"]
mod openapi_test;
