//! `cowhand vhost-user-blk`: serves disks to other VMMs.

use std::collections::HashSet;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use cowhand_block::{DiskSpec, Format, OpenPolicy};
use cowhand_vhost_user_blk::export::DEFAULT_QUEUES;
use cowhand_vhost_user_blk::{Export, ExportHandle, ExportOptions, SocketSource, Wake};
use cowhand_vmm::signals::SignalEvents;
use rustix::event::{PollFd, PollFlags, poll};

use crate::api::Api;
use crate::disks::default_id;
use crate::{EXIT_USAGE, Failure, quantity};

/// Serves disks to QEMU, cloud-hypervisor and other virtual machine monitors (a vhost-user-blk back-end)
#[derive(Parser)]
#[command(after_help = "\
One front-end at a time is served on a socket; when it disconnects it can come back. The image is opened and locked while the guest \
uses it. SIGTERM and SIGINT end the program with every image flushed and unlocked. Killed and started again under a running guest, \
nothing that was acknowledged is lost (the front-end has to reconnect: QEMU does with reconnect-ms=).

Exit status: 0 it was told to end, or --once and the front-end has gone · 1 a disk cannot be served · 2 bad arguments

Example:
  cowhand vhost-user-blk --socket-path /run/vda.sock --image path=debian.qcow2,format=qcow2
  qemu-system-x86_64 -M q35,memory-backend=m -object memory-backend-memfd,id=m,size=1G,share=on \\
      -chardev socket,id=c,path=/run/vda.sock,reconnect-ms=100 -device vhost-user-blk-pci,chardev=c ...
  cowhand vhost-user-blk --api-socket /run/api.sock ... & cowhand ctl --api-socket /run/api.sock disk resize vda 20G")]
pub(crate) struct Args {
    /// The socket to listen on; it is made, and removed at the end
    #[arg(long, value_name = "PATH", conflicts_with = "fd")]
    socket_path: Option<PathBuf>,
    /// A socket that is open already: one that listens (systemd's socket activation passes 3), or one that a front-end is
    /// connected to
    #[arg(long, value_name = "N")]
    fd: Option<RawFd>,
    /// A disk: path=P,format=qcow2|raw[,id=vda][,socket=PATH|fd:N][,readonly=on][,ephemeral=on][,queues=N][,cache=writeback|none|unsafe]
    /// [,discard=unmap|ignore][,detect-zeroes=off|on|unmap][,backing-format=F][,secret=file:P|fd:N][,serial=S][,metadata-cache=SIZE]
    /// [,block-size=512][,lock=on|off]; a comma inside a value is written twice. May be repeated, with a socket= each
    #[arg(long, value_name = "DISK", value_parser = DiskSpec::parse)]
    image: Vec<DiskSpec>,
    /// The same as --image path=FILE,format=raw
    #[arg(long, value_name = "FILE", conflicts_with = "image")]
    blk_file: Option<PathBuf>,
    /// No disk may be written
    #[arg(long)]
    read_only: bool,
    /// Queues that are offered, unless the disk says queues=; a front-end takes as many as it wants
    #[arg(long, value_name = "N", default_value_t = DEFAULT_QUEUES)]
    num_queues: u16,
    /// The control socket, for `cowhand ctl`; it is made for its owner alone, and removed at the end
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,
    /// Files that images refer to (backing files, data files) may be opened below this directory; may be repeated. Without
    /// it, each image may refer to files below its own directory
    #[arg(long, value_name = "DIR")]
    allow_dir: Vec<PathBuf>,
    /// Ends when the front-end has disconnected (with several disks: when all have)
    #[arg(long)]
    once: bool,
    /// How long a queue's thread may look for work before it sleeps, if that has been worth while lately; 0 forbids it
    #[arg(long, value_name = "TIME", default_value = "100us", value_parser = quantity::duration)]
    poll_max: Duration,
    /// Prints what this back-end can do, as JSON, and ends
    #[arg(long)]
    print_capabilities: bool,
}

/// Serves until told to end; gives the exit status.
pub(crate) fn run(args: &Args) -> Result<u8, Failure> {
    if args.print_capabilities {
        println!("{}", serde_json::json!({ "type": "block", "features": ["read-only", "blk-file"] }));
        return Ok(0);
    }
    let specs = specs(args)?;
    // Before anything has a thread: from here on a signal cannot end the process with an image half written.
    let signals = SignalEvents::new()?;
    crate::run::raise_descriptor_limit();
    let shared = Some(Arc::default());
    let policy = OpenPolicy { allow_dirs: args.allow_dir.clone(), shared, ..OpenPolicy::host() };
    // All that can be wrong is found before the first front-end is let in.
    let mut exports = Vec::new();
    for (spec, socket) in specs {
        let id = spec.id.clone().unwrap_or_else(|| default_id(exports.len()));
        let queues = spec.queues.unwrap_or(args.num_queues);
        let options = ExportOptions { id: id.clone(), socket, queues, once: args.once, poll_max: args.poll_max };
        exports.push((id, Export::new(spec, policy.clone(), options)?));
    }
    cowhand_vhost_user_blk::sigbus::install()?;
    let api = args.api_socket.as_deref().map(Api::listen).transpose()?;
    let mut running = Vec::new();
    let mut result = serve(exports, api, &signals, &mut running);
    running.iter().for_each(ExportHandle::stop);
    for export in running {
        let joined = export.join();
        result = result.and(joined.map_err(Failure::from));
    }
    result.map(|()| 0)
}

/// Starts everything, and waits for the end. What was started is in `running`, whatever comes of the rest.
fn serve(
    exports: Vec<(String, Export)>,
    api: Option<Api>,
    signals: &SignalEvents,
    running: &mut Vec<ExportHandle>,
) -> Result<(), Failure> {
    let ended = Wake::new()?;
    let mut steered = Vec::new();
    for (id, export) in exports {
        let handle = export.start(ended.clone())?;
        steered.push((id, handle.control()));
        running.push(handle);
    }
    let server = api.map(|api| api.serve(steered)).transpose()?;
    let result = wait(signals, &ended, running);
    running.iter().for_each(ExportHandle::stop);
    // Now whoever asked for something has an answer soon.
    drop(server);
    result
}

/// Waits for a signal, or until no export is left.
fn wait(signals: &SignalEvents, ended: &Wake, exports: &[ExportHandle]) -> Result<(), Failure> {
    loop {
        match poll(&mut [PollFd::new(signals, PollFlags::IN), PollFd::new(ended, PollFlags::IN)], None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        ended.hear();
        if signals.next().is_some() || exports.iter().all(ExportHandle::is_finished) {
            return Ok(());
        }
    }
}

/// The disks, each with the socket that it is served on.
fn specs(args: &Args) -> Result<Vec<(DiskSpec, SocketSource)>, Failure> {
    let mut disks = args.image.clone();
    disks.extend(args.blk_file.as_deref().map(|path| DiskSpec::new(path, Format::Raw)));
    if disks.is_empty() {
        return usage("no disk: give --image path=FILE,format=qcow2 (or raw)");
    }
    let general = match (&args.socket_path, args.fd) {
        (Some(path), _) => Some(SocketSource::Path(path.clone())),
        (None, Some(number)) => Some(SocketSource::Descriptor(number)),
        (None, None) => None,
    };
    if general.is_some() && disks.len() > 1 {
        return usage("--socket-path and --fd are for one disk; give each --image its socket=");
    }
    let mut sockets = HashSet::new();
    let api_socket = args.api_socket.clone().map(SocketSource::Path);
    let mut ids = HashSet::new();
    let mut specs = Vec::new();
    for (index, mut disk) in disks.into_iter().enumerate() {
        let id = disk.id.clone().unwrap_or_else(|| default_id(index));
        if !ids.insert(id.clone()) {
            return usage(&format!("--image: two disks are called {id}; give one another id="));
        }
        let own = disk.socket.take().map(|socket| source(&socket)).transpose()?;
        let socket = match (own, &general) {
            (Some(_), Some(_)) => return usage("a disk with socket= needs no --socket-path or --fd"),
            (Some(socket), None) => socket,
            (None, Some(socket)) => socket.clone(),
            (None, None) => {
                return usage(&format!("disk {id} has no socket: give --socket-path, --fd, or socket= in --image"));
            }
        };
        if Some(&socket) == api_socket.as_ref() {
            return usage("--api-socket is a socket of its own, on which no disk is served");
        }
        let name = match &socket {
            SocketSource::Path(path) => path.display().to_string(),
            SocketSource::Descriptor(number) => format!("fd:{number}"),
        };
        if !sockets.insert(name.clone()) {
            return usage(&format!("{name}: two disks cannot be served on one socket"));
        }
        if args.read_only {
            if disk.ephemeral {
                return usage("--read-only and ephemeral=on exclude each other");
            }
            disk.readonly = true;
        }
        specs.push((disk, socket));
    }
    Ok(specs)
}

/// A socket as DISK's `socket=` names it.
fn source(text: &str) -> Result<SocketSource, Failure> {
    match text.strip_prefix("fd:") {
        None => Ok(SocketSource::Path(text.into())),
        Some(number) => match number.parse() {
            Ok(number) => Ok(SocketSource::Descriptor(number)),
            Err(_) => usage(&format!("disk option socket='{text}': expected a path or fd:N")),
        },
    }
}

fn usage<T>(message: &str) -> Result<T, Failure> {
    Err(Failure { message: message.into(), status: EXIT_USAGE })
}
