//! `compare`: whether two disks have the same content.

use std::rc::Rc;

use clap::Parser;
use cowhand_block::jobs::compare::{CompareError, Verdict, compare};
use cowhand_block::jobs::copy::CopyEvent;

use super::context::cache_mode;
use super::progress::Progress;
use super::{Context, Failure, How, shows_progress};

/// The disks differ.
const DIFFER: u8 = 1;
/// An image cannot be opened, or the arguments are wrong.
const CANNOT_OPEN: u8 = 2;
/// What a disk is made of cannot be told.
const CANNOT_TELL: u8 = 3;
/// A disk cannot be read.
const CANNOT_READ: u8 = 4;

/// What is said of disks that are alike as far as the smaller one goes.
const SIZES_DIFFER: &str = "Warning: Image size mismatch!";

/// Says whether two disks have the same content: exit status 0 if they have, 1 if they differ
#[derive(Parser)]
#[command(after_help = "\
Exit status: 0 identical, 1 different, 2 cannot be opened, 3 cannot tell what is allocated, 4 cannot be read.

Example:
  cowhand img compare -f raw -F qcow2 disk.raw disk.qcow2")]
pub(super) struct Args {
    /// An object that defines a secret: secret,id=ID,file=PATH
    #[arg(long, value_name = "OBJECT")]
    object: Vec<String>,
    /// The images' names are lists of options (driver=qcow2,file.filename=…)
    #[arg(long)]
    image_opts: bool,
    /// The first image's format
    #[arg(short = 'f', long = "a-format", value_name = "FORMAT")]
    format: Option<String>,
    /// The second image's format
    #[arg(short = 'F', long = "b-format", value_name = "FORMAT")]
    second_format: Option<String>,
    /// How the images are read: writeback, none, …
    #[arg(short = 'T', long = "cache", value_name = "MODE", default_value = "writeback")]
    cache: String,
    /// Shows how far it is
    #[arg(short = 'p', long)]
    progress: bool,
    /// Says nothing but errors
    #[arg(short = 'q', long)]
    quiet: bool,
    /// Sizes, and what is allocated, must be the same too
    #[arg(short = 's', long)]
    strict: bool,
    /// Takes no locks: somebody else may be writing the images
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The two images
    #[arg(value_name = "FILE")]
    files: Vec<String>,
}

pub(super) fn run(args: &Args, cx: &Context) -> Result<u8, Failure> {
    let refused = |failure: Failure| failure.with_status(CANNOT_OPEN);
    let [first_name, second_name] = args.files.as_slice() else {
        return Err(cx.usage("compare", "Expecting two image file names"));
    };
    if args.image_opts && (args.format.is_some() || args.second_format.is_some()) {
        return Err(refused(Failure::new("--image-opts and --format are mutually exclusive")));
    }
    cx.take_objects(&args.object).map_err(refused)?;
    let cache = cache_mode(&args.cache, "source cache").map_err(refused)?;
    let how =
        |format| How { format, image_opts: args.image_opts, force_share: args.force_share, cache, ..How::default() };
    let first = cx.open(first_name, &how(args.format.as_deref())).map_err(refused)?;
    let second = cx.open(second_name, &how(args.second_format.as_deref())).map_err(refused)?;
    let progress = shows_progress(args.progress, args.quiet).then(|| Rc::new(Progress::new()));
    let listener = progress.clone().map(|progress| {
        Rc::new(move |event: CopyEvent<'_>| {
            if let CopyEvent::Progress { done, total } = event {
                progress.show(done, total);
            }
        }) as _
    });
    let verdict = compare(&first, &second, args.strict, listener);
    let common = first.size().min(second.size());
    let verdict = verdict.map_err(|error| {
        if let Some(progress) = &progress {
            progress.end();
        }
        let failure = failure(&error, [first_name, second_name]);
        let past_the_end = matches!(error, CompareError::Read { offset, .. } if offset >= common);
        if args.quiet || !past_the_end || first.size() == second.size() {
            return failure;
        }
        failure.say(cx);
        println!("{SIZES_DIFFER}");
        Failure { message: String::new(), ..failure }
    })?;
    let lines = told(verdict, first.size() != second.size(), common);
    if let Some(progress) = &progress
        && verdict == Verdict::Same
    {
        progress.show(1, 1);
    }
    if !args.quiet {
        lines.iter().for_each(|line| println!("{line}"));
    }
    if let Some(progress) = &progress {
        progress.end();
    }
    Ok(if verdict == Verdict::Same { 0 } else { DIFFER })
}

fn told(verdict: Verdict, sizes_differ: bool, common: u64) -> Vec<String> {
    let mut lines = Vec::new();
    let passed_the_end = match verdict {
        Verdict::Same => true,
        Verdict::Content(offset) => offset >= common,
        Verdict::Size | Verdict::Allocation(_) => false,
    };
    if sizes_differ && passed_the_end {
        lines.push(SIZES_DIFFER.to_string());
    }
    lines.push(match verdict {
        Verdict::Same => "Images are identical.".to_string(),
        Verdict::Content(offset) => format!("Content mismatch at offset {offset}!"),
        Verdict::Size => "Strict mode: Image size mismatch!".to_string(),
        Verdict::Allocation(offset) => format!("Strict mode: Offset {offset} block status mismatch!"),
    });
    lines
}

fn failure(error: &CompareError, names: [&String; 2]) -> Failure {
    let name = |second: bool| names[usize::from(second)];
    match error {
        CompareError::Status { second, error } => {
            tracing::info!("{error}");
            Failure::new(format!("Sector allocation test failed for {}", name(*second))).with_status(CANNOT_TELL)
        }
        CompareError::Read { second, offset, error } => {
            tracing::info!("{error}");
            let message = format!("Error while reading offset {offset} of {}: {}", name(*second), error.strerror());
            Failure::new(message).with_status(CANNOT_READ)
        }
        CompareError::Other(error) => Failure::new(error.reason()).with_status(CANNOT_READ),
    }
}
