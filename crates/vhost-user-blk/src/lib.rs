//! The vhost-user-blk backend: disks of the engine, served to other VMMs over a Unix socket.
//!
//! The specification is QEMU's docs/interop/vhost-user.rst; section names in this crate are its. What a request means is
//! [`cowhand_virtio::blk`]'s to know, and where the bytes go is the engine's.
//!
//! - [`export`] is one disk with its socket: a thread that has one front-end at a time, until it is told to stop;
//! - `command` is what it can be told and asked;
//! - `socket` is where front-ends come from, `connection` one of them and its messages, one after the other;
//! - `device` answers them; `regions` is the front-end's memory; `ring` is one queue and the worker that serves it;
//! - `served` is the disk, which is open only while a ring runs;
//! - `inflight` is the memory that outlives this process: the front-end keeps it and gives it to the next one;
//! - `front` sends the front-end messages of our own; `shared` maps memory; `wake` wakes an export's thread;
//! - [`sigbus`] lets the process outlive a front-end that takes its memory away.
//!
//! Of rust-vmm this takes `vhost`'s messages (`BackendReqHandler`), and not `vhost-user-backend`: that one has no in-flight records,
//! takes no connected descriptor, needs a new daemon for each connection, and hides the channel to the front-end. Its public
//! types do not carry here either: a `VringRwLock` is a queue behind a lock that a worker takes for each request, where ours owns its
//! queue, and its `BitmapMmapRegion` takes a lock for each page that is marked and sees nothing of what io_uring writes.
//!
//! Threads: one for each export, which owns everything that messages change; and one for each ring that runs
//! ([`cowhand_virtio::blk::BlockWorker`]). To change what a worker uses it is stopped, which drains its queue, and started again.

mod command;
mod connection;
mod device;
pub mod export;
mod front;
mod inflight;
mod regions;
mod ring;
mod served;
mod shared;
pub mod sigbus;
mod socket;
mod wake;

pub use command::{ExportControl, ExportStatus, Shrink};
pub use export::{Export, ExportError, ExportHandle, ExportOptions};
pub use socket::SocketSource;
pub use wake::Wake;
