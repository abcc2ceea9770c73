//! `commit`: carries an overlay's content down into an image below it.

use std::path::PathBuf;

use clap::Parser;
use cowhand_block::jobs::commit::{CommitOptions, commit};

use super::arguments::ImageArgs;
use super::context::{cache_mode, reason};
use super::pace::{self, Pace};
use super::{Context, Failure, How, Name, shows_progress};

/// Writes what an overlay has into its backing file, and empties it
#[derive(Parser)]
#[command(after_help = "\
The images are sound at every moment, and the overlay shows the same throughout: what was interrupted is done again.

Example:
  cowhand img commit -f qcow2 overlay.qcow2")]
pub(super) struct Args {
    #[command(flatten)]
    image: ImageArgs,
    /// How both images are written: writeback, none, unsafe, …
    #[arg(short = 't', long, value_name = "MODE", default_value = "writeback")]
    cache: String,
    /// The image in the chain that takes the content, if it is not the backing file; the overlay then keeps what it has
    #[arg(short, long, value_name = "IMAGE")]
    base: Option<PathBuf>,
    /// The overlay keeps what it has
    #[arg(short, long)]
    drop: bool,
    /// At most so many bytes a second
    #[arg(short, long, value_name = "BYTES")]
    rate: Option<String>,
    /// Shows how far it is
    #[arg(short, long)]
    progress: bool,
    /// Says nothing but errors
    #[arg(short, long)]
    quiet: bool,
    /// The overlay
    #[arg(value_name = "FILE")]
    files: Vec<String>,
}

pub(super) fn run(args: &Args, cx: &Context) -> Result<u8, Failure> {
    let file = cx.only(&args.files, "commit")?;
    let rate = args.rate.as_deref().map(pace::rate).transpose()?;
    cx.take_objects(&args.image.object)?;
    let cache = cache_mode(&args.cache, "cache")?;
    let how = How { write: true, cache, ..args.image.how() };
    let spec = cx.spec(file, &how)?;
    // What is wrong with the overlay itself is said as everywhere; it is opened again with what lies below it.
    let reader = cx.open_spec(file, &cowhand_block::DiskSpec { readonly: true, ..spec.clone() })?;
    drop(reader);
    let options = CommitOptions { base: args.base.clone(), beside: cx.program() == Name::Qemu.text(), keep: args.drop };
    let pace = Pace::new(shows_progress(args.progress, args.quiet), rate);
    let committed = commit(&spec, &cx.policy, &options, pace.teller());
    pace.end();
    committed.map_err(|e| {
        let failure = match e.kind() {
            _ if args.base.is_some() && e.kind() == cowhand_block::ErrorKind::NotFound => Failure::new(e.reason()),
            cowhand_block::ErrorKind::Io | cowhand_block::ErrorKind::NoSpace => {
                Failure::new(format!("Block job failed: {}", host_words(&e, &spec)))
            }
            _ => Failure::new(reason(&e, &spec)),
        };
        cx.advise(
            failure,
            "the images are sound and the overlay shows what it showed; run the command again to complete it",
        )
    })?;
    if !args.quiet {
        println!("Image committed.");
    }
    Ok(0)
}

/// The host's words for what failed, as QEMU's jobs report them; all of the error where it is another.
fn host_words(error: &cowhand_block::Error, spec: &cowhand_block::DiskSpec) -> String {
    match error.host_error() {
        Some(host) => super::pace::os_text(host),
        None if error.kind() == cowhand_block::ErrorKind::NoSpace => "No space left on device".into(),
        None => reason(error, spec),
    }
}
