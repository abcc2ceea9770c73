//! `rebase`: puts an overlay over another image.

use std::sync::Arc;

use clap::Parser;
use cowhand_block::jobs::rebase::{NewBacking, rebase, rebase_unsafe};
use cowhand_block::{Backing, Disk, DiskSpec, Error, ErrorKind, Format, FormatError};

use super::arguments::ImageArgs;
use super::context::{cache_mode, reason};
use super::pace::Pace;
use super::{Context, Failure, How, shows_progress};

/// Puts an overlay over another backing file, or over none
#[derive(Parser)]
#[command(after_help = "\
Without -u the image shows the same afterwards: what the old and the new backing file differ in is copied into it first. The image is
sound at every moment, and shows the same throughout: what was interrupted is done again.

Example:
  cowhand img rebase -f qcow2 -b new-base.qcow2 -F qcow2 overlay.qcow2")]
pub(super) struct Args {
    #[command(flatten)]
    image: ImageArgs,
    /// How the image is written: writeback, none, unsafe, …
    #[arg(short = 't', long, value_name = "MODE", default_value = "writeback")]
    cache: String,
    /// How the backing files are read: writeback, none, …
    #[arg(short = 'T', long, value_name = "MODE", default_value = "writeback")]
    backing_cache: String,
    /// The new backing file, as the image's header is to name it; an empty name for none
    #[arg(short, long, value_name = "FILE")]
    backing: Option<String>,
    /// Its format
    #[arg(short = 'F', long, value_name = "FORMAT")]
    backing_format: Option<String>,
    /// Changes the header alone: the image shows the same only if the new backing file has the content of the old one
    #[arg(short = 'u', long)]
    backing_unsafe: bool,
    /// Writes what is copied compressed
    #[arg(short, long)]
    compress: bool,
    /// Shows how far it is
    #[arg(short, long)]
    progress: bool,
    /// Says nothing but errors
    #[arg(short, long)]
    quiet: bool,
    /// Takes no locks: somebody else may be using the images
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The image
    #[arg(value_name = "FILE")]
    files: Vec<String>,
}

pub(super) fn run(args: &Args, cx: &Context) -> Result<u8, Failure> {
    let file = cx.only(&args.files, "rebase")?;
    if !args.backing_unsafe && args.backing.is_none() {
        return Err(cx.usage("rebase", "Must specify backing file (-b) or use unsafe mode (-u)"));
    }
    cx.take_objects(&args.image.object)?;
    let cache = cache_mode(&args.cache, "cache")?;
    let backing_cache = cache_mode(&args.backing_cache, "source cache")?;
    let name = args.backing.as_deref().filter(|name| !name.is_empty());
    if let Some(format) = &args.backing_format
        // How a file is reached is no format, but a name that a header may have.
        && !matches!(format.as_str(), "file" | "host_device")
        && let Err(FormatError::Unknown(_)) = format.parse::<Format>()
    {
        return Err(Failure::new(format!("Invalid format name: '{format}'")));
    }
    let how = How {
        write: true,
        force_share: args.force_share,
        cache,
        backing: if args.backing_unsafe { Backing::Alone } else { Backing::Header },
        ..args.image.how()
    };
    let spec = cx.spec(file, &how)?;
    let disk = cx.open_spec(file, &spec)?;
    let cannot_change = |e: &Error| cannot_change(e, name, args, &spec);
    if spec.format == Format::Raw {
        if args.compress && !args.backing_unsafe {
            return Err(Failure::new("Compression not supported for this file format"));
        }
        return Err(Failure::new(format!(
            "Could not change the backing file to '{}': Operation not supported",
            name.unwrap_or_default()
        )));
    }
    let backing = NewBacking { name: name.map(|name| name.as_bytes().to_vec()), format: args.backing_format.clone() };
    if args.backing_unsafe {
        if name.is_some() && args.backing_format.is_none() {
            return Err(needs_format(name));
        }
        rebase_unsafe(&disk, &backing).map_err(|e| cannot_change(&e))?;
        return close(&disk, &spec).map(|()| 0);
    }
    let new = name.map(|name| open_new(args, cx, (name, &spec), backing_cache)).transpose()?;
    if name.is_some() && args.backing_format.is_none() {
        return Err(needs_format(name));
    }
    let pace = Pace::new(shows_progress(args.progress, args.quiet), None);
    let rebased = rebase(&disk, new.as_ref(), &backing, args.compress, pace.teller());
    pace.end();
    rebased.map_err(|e| {
        cx.advise(
            cannot_change(&e),
            "the image is sound and shows what it showed; run the command again to complete it",
        )
    })?;
    close(&disk, &spec)?;
    Ok(0)
}

/// Opens the new backing file, whose name is relative to the image's directory.
fn open_new(
    args: &Args,
    cx: &Context,
    (name, spec): (&str, &DiskSpec),
    cache: cowhand_block::Cache,
) -> Result<Arc<Disk>, Failure> {
    let how = How { format: args.backing_format.as_deref(), force_share: args.force_share, cache, ..How::default() };
    let refused = |failure: Failure| {
        let said = failure.message.strip_prefix(&format!("Could not open '{name}': ")).unwrap_or(&failure.message);
        Failure::new(format!("Could not open new backing file '{name}': {said}"))
    };
    let mut new = if name.starts_with("json:") {
        cx.spec(name, &how).map_err(refused)?
    } else {
        let dir = spec.path.parent().unwrap_or(std::path::Path::new(""));
        let full = dir.join(name.strip_prefix("file:").unwrap_or(name));
        let said = full.to_string_lossy().into_owned();
        let renamed = |failure: Failure| Failure {
            message: failure.message.replacen(
                &format!("Could not open '{said}': "),
                &format!("Could not open '{name}': "),
                1,
            ),
            ..failure
        };
        cx.spec(&said, &how).map_err(|failure| refused(renamed(failure)))?
    };
    new.readonly = true;
    // What opens the image opens what it is put over.
    new.secret = new.secret.or_else(|| spec.secret.clone());
    Disk::open(&new, &cx.policy)
        .map_err(|e| Failure::new(format!("Could not open new backing file '{name}': {}", reason(&e, &new))))
}

fn needs_format(name: Option<&str>) -> Failure {
    let name = name.unwrap_or_default();
    Failure::new(format!("Could not change the backing file to '{name}': backing format must be specified"))
}

fn cannot_change(error: &Error, name: Option<&str>, args: &Args, spec: &DiskSpec) -> Failure {
    let what = if args.backing_unsafe || matches!(error.kind(), ErrorKind::NoSpace | ErrorKind::Invalid) {
        format!("Could not change the backing file to '{}': ", name.unwrap_or_default())
    } else {
        String::new()
    };
    Failure::new(format!("{what}{}", reason(error, spec)))
}

fn close(disk: &Arc<Disk>, spec: &DiskSpec) -> Result<(), Failure> {
    disk.close().map_err(|e| Failure::new(reason(&e, spec)))
}
