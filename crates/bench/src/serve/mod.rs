//! A disk of the engine behind a vhost-user-blk socket: one front-end, one thread for each queue, until the front-end goes.
//!
//! - `device` answers the front-end's messages;
//! - `ring` is one queue: its addresses and eventfds, and the worker that serves it;
//! - `regions` is the front-end's memory.
//!
//! Only what measuring needs: no reconnection, no in-flight records, no migration, no sandbox.

mod device;
mod regions;
mod ring;

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, anyhow};
use cowhand_block::io::host::{Engine, Host};
use cowhand_block::{Disk, DiskSpec, OpenPolicy};
use cowhand_virtio::blk::DiskBackend;
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};

use device::Device;

/// Serves a disk to one vhost-user-blk front-end, and ends when that goes
#[derive(clap::Args)]
pub struct Args {
    /// The socket to listen on; made once the disk is open, and removed at the end
    #[arg(long)]
    socket: PathBuf,
    /// The disk: path=P,format=F[,key=value]...
    #[arg(long)]
    disk: String,
    /// Files that image headers name may lie below this directory
    #[arg(long)]
    allow_dir: Vec<PathBuf>,
    /// Queues that are offered
    #[arg(long, default_value_t = 1)]
    queues: u16,
    /// Do I/O on a pool of threads, whose calls can be counted from outside, instead of io_uring
    #[arg(long)]
    threads: bool,
}

/// Opens the disk, serves, closes the disk.
///
/// # Errors
/// When the disk cannot be opened or closed, or the front-end breaks the protocol.
pub fn run(args: &Args) -> Result<()> {
    let engine = if args.threads { Engine::Threads } else { Engine::Auto };
    let storage = Arc::new(Host::new(engine));
    let policy = OpenPolicy { storage, allow_dirs: args.allow_dir.clone(), ..OpenPolicy::host() };
    let disk = Disk::open(&DiskSpec::parse(&args.disk)?, &policy).map_err(|error| anyhow!("{error}"))?;
    let listener = UnixListener::bind(&args.socket).with_context(|| args.socket.display().to_string())?;
    let served = serve(&listener, &disk, args.queues);
    // Once: that it is gone already is all right too.
    let _ = std::fs::remove_file(&args.socket);
    served?;
    disk.close().map_err(|error| anyhow!("{error}"))
}

/// Serves the first front-end that connects, until it disconnects; then all queues have been drained.
///
/// # Errors
/// When the front-end breaks the protocol.
pub fn serve(listener: &UnixListener, disk: &Arc<Disk>, queues: u16) -> Result<()> {
    let (stream, _) = listener.accept()?;
    let device = Device::new(Arc::new(DiskBackend(disk.clone())), queues)?;
    let mut handler = BackendReqHandler::from_stream(stream, Arc::new(Mutex::new(device)));
    loop {
        match handler.handle_request() {
            Ok(()) => {}
            Err(VhostError::Disconnected | VhostError::PartialMessage | VhostError::SocketBroken(_)) => return Ok(()),
            Err(VhostError::SocketRetry(_)) => {}
            Err(error) => return Err(anyhow!("the front-end: {error}")),
        }
    }
}

#[cfg(test)]
#[path = "serve_test.rs"]
mod tests;
