//! `snapshot`: an image's internal snapshots, listed, taken, gone back to, deleted.

use clap::Parser;
use cowhand_block::{Backing, Error, Format};

use super::arguments::ImageArgs;
use super::context::reason;
use super::snapshots::table;
use super::{Context, Failure, How};

/// Lists, takes, applies and deletes the snapshots that lie in an image
#[derive(Parser)]
#[command(after_help = "\
Example:
  cowhand img snapshot -f qcow2 -c before-upgrade disk.qcow2")]
pub(super) struct Args {
    #[command(flatten)]
    image: ImageArgs,
    /// Says nothing but errors, and the list
    #[arg(short, long)]
    quiet: bool,
    /// Takes no locks: somebody else may be writing the image; for -l only
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Lists the snapshots, which is done without any of these, too
    #[arg(short, long)]
    list: bool,
    /// Takes a snapshot
    #[arg(short, long, value_name = "NAME")]
    create: Option<String>,
    /// Makes the disk what it was then, by the snapshot's ID or name
    #[arg(short, long, value_name = "SNAPSHOT")]
    apply: Option<String>,
    /// Deletes the snapshot of that name
    #[arg(short, long, value_name = "NAME")]
    delete: Option<String>,
    /// The image
    #[arg(value_name = "FILE")]
    files: Vec<String>,
}

pub(super) fn run(args: &Args, cx: &Context) -> Result<u8, Failure> {
    let asked = [args.list, args.create.is_some(), args.apply.is_some(), args.delete.is_some()];
    if asked.iter().filter(|&&asked| asked).count() > 1 {
        return Err(cx.usage("snapshot", "Cannot mix '-l', '-a', '-c', '-d'"));
    }
    let file = cx.only(&args.files, "snapshot")?;
    cx.take_objects(&args.image.object)?;
    let write = asked[1..].contains(&true);
    if write && args.force_share {
        return Err(Context::cannot_open(file, "force-share=on can only be used with read-only images"));
    }
    let how = How {
        write,
        force_share: args.force_share,
        // To go back takes another size, which a backing file may have to be hidden for.
        backing: if args.apply.is_some() { Backing::Header } else { Backing::Alone },
        ..args.image.how()
    };
    let spec = cx.spec(file, &how)?;
    let disk = cx.open_spec(file, &spec)?;
    let said = |what: &str, name: &str, error: &Error| {
        Failure::new(format!("Could not {what} snapshot '{name}': {}", reason(error, &spec)))
    };
    let plain = |e: Error| Failure::new(reason(&e, &spec));
    if let Some(name) = &args.create {
        if spec.format == Format::Raw {
            return Err(Failure::new(format!("Could not create snapshot '{name}': Operation not supported")));
        }
        disk.create_snapshot(name).map_err(|e| said("create", name, &e))?;
    } else if let Some(which) = &args.apply {
        if spec.format == Format::Raw {
            let reason = "Block driver does not support snapshots";
            return Err(Failure::new(format!("Could not apply snapshot '{which}': {reason}")));
        }
        let known = disk.snapshots().map_err(plain)?.iter().any(|s| s.id == *which || s.name == *which);
        if !known {
            let reason = "Failed to load snapshot: No such file or directory";
            return Err(Failure::new(format!("Could not apply snapshot '{which}': {reason}")));
        }
        disk.apply_snapshot(which).map_err(|e| said("apply", which, &e))?;
    } else if let Some(name) = &args.delete {
        // By its name alone, as QEMU does; of several that have it the first goes.
        let snapshots = disk.snapshots().map_err(plain)?;
        let Some(snapshot) = snapshots.iter().find(|snapshot| snapshot.name == *name) else {
            return Err(Failure::new(format!("Could not delete snapshot '{name}': snapshot not found")));
        };
        disk.delete_snapshot(&snapshot.id).map_err(|e| said("delete", name, &e))?;
    } else {
        let snapshots = disk.snapshots().map_err(plain)?;
        if !snapshots.is_empty() {
            print!("Snapshot list:\n{}", table(&snapshots));
        }
    }
    disk.close().map_err(plain)?;
    Ok(0)
}
