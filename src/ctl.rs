//! `cowhand ctl`: asks and steers a running cowhand over its control socket.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use cowhand_control::{Client, Disk, DiskList, Resize};
use serde_json::to_string_pretty;

use crate::Failure;
use crate::img::units::human;
use crate::quantity;

/// Steers a running cowhand over the socket that it was given with --api-socket
#[derive(Parser)]
#[command(after_help = "\
Exit status: 0 done · 1 not done · 2 bad arguments

Example:
  cowhand vhost-user-blk --api-socket /run/api.sock --socket-path /run/vda.sock --image path=debian.qcow2,format=qcow2 &
  cowhand ctl --api-socket /run/api.sock disk resize vda 20G")]
pub(crate) struct Args {
    /// The control socket
    #[arg(long, value_name = "PATH")]
    api_socket: PathBuf,
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Disks: list, show, resize
    Disk(DiskArgs),
}

#[derive(Parser)]
struct DiskArgs {
    /// Prints JSON, as the API has it
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    what: DiskWhat,
}

#[derive(Subcommand)]
enum DiskWhat {
    /// All disks that are served
    #[command(after_help = "Example:\n  cowhand ctl --api-socket /run/api.sock disk list")]
    List,
    /// One disk, with its chain of images
    #[command(after_help = "Example:\n  cowhand ctl --api-socket /run/api.sock disk show vda")]
    Show {
        /// The disk
        id: String,
    },
    /// Gives a disk another size; a running guest sees it at once
    #[command(after_help = "Example:\n  cowhand ctl --api-socket /run/api.sock disk resize vda 20G")]
    Resize {
        /// Allows the disk to become smaller: what is cut off is lost
        #[arg(long)]
        shrink: bool,
        /// The disk
        id: String,
        /// The new size: bytes, or a number with K, M, G or T
        #[arg(value_parser = quantity::size)]
        size: u64,
    },
}

/// Does what is asked for; gives the exit status.
pub(crate) fn run(args: &Args) -> Result<u8, Failure> {
    let client = Client::new(&args.api_socket);
    let What::Disk(DiskArgs { json, what }) = &args.what;
    let said = match what {
        DiskWhat::List => {
            let disks = client.disks()?;
            if *json { to_string_pretty(&DiskList { disks })? } else { table(&disks) }
        }
        DiskWhat::Show { id } => {
            let disk = client.disk(id)?;
            if *json { to_string_pretty(&disk)? } else { described(&disk) }
        }
        DiskWhat::Resize { shrink, id, size } => {
            let disk = client.resize(id, &Resize { size: *size, shrink: *shrink })?;
            if *json { to_string_pretty(&disk)? } else { format!("{}: {}", disk.id, size_of(disk.size)) }
        }
    };
    println!("{said}");
    Ok(0)
}

fn size_of(bytes: u64) -> String {
    format!("{} ({bytes} bytes)", human(bytes))
}

/// A line for each disk, below a line of titles.
fn table(disks: &[Disk]) -> String {
    let width = disks.iter().map(|disk| disk.id.chars().count()).chain([4]).max().unwrap_or(0);
    let mut lines = vec![format!("{:width$}  {:>10}  {:9}  {:13}  IMAGES", "DISK", "SIZE", "ACCESS", "FRONT-END")];
    for disk in disks {
        let Disk { id, size, read_only, connected, open, .. } = disk;
        let (access, connected, open) = words(*read_only, *connected, *open);
        lines.push(format!("{id:width$}  {:>10}  {access:9}  {connected:13}  {open}", human(*size)));
    }
    lines.join("\n")
}

fn words(read_only: bool, connected: bool, open: bool) -> (&'static str, &'static str, &'static str) {
    (
        if read_only { "read-only" } else { "writable" },
        if connected { "connected" } else { "not connected" },
        if open { "open" } else { "closed" },
    )
}

fn described(disk: &Disk) -> String {
    let (access, connected, open) = words(disk.read_only, disk.connected, disk.open);
    let mut lines = vec![
        format!("disk:       {}", disk.id),
        format!("size:       {}", size_of(disk.size)),
        format!("access:     {access}"),
        format!("front-end:  {connected}"),
        format!("images:     {open}"),
    ];
    for layer in disk.chain.iter().flatten() {
        lines.push(format!("  {} ({}, {})", layer.path, layer.format, human(layer.size)));
    }
    lines.join("\n")
}

#[cfg(test)]
#[path = "ctl_test.rs"]
mod tests;
