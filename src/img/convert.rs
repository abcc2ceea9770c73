//! `convert`: copies one disk, or several one behind another, to another image.
//!
//! A target that is made here does not look whole before it is ([`NewImage::unfinished`](cowhand_block::NewImage::unfinished)), and is removed when the copy fails.

use std::rc::Rc;
use std::sync::Arc;

use clap::Parser;
use cowhand_block::jobs::copy::{CopyError, CopyEvent, CopyOptions, Doing, Listener, WORKERS_MAX, copy};
use cowhand_block::{BitmapState, Disk, Format};

use super::bench::number;
use super::context::{cache_mode, is_part_of};
use super::create::make_to_fill;
use super::create_options::{CreateOptions, creatable, help};
use super::options::Options;
use super::progress::Progress;
use super::snapshot_view::view;
use super::units::parse_size;
use super::{Context, Failure, How, shows_progress};

/// Copies a disk to another image, in another format or with other options
#[derive(Parser)]
#[command(after_help = "\
Examples:
  cowhand img convert -f raw -O qcow2 disk.raw disk.qcow2
  cowhand img convert -f qcow2 -O qcow2 -c -o compression_type=zstd disk.qcow2 small.qcow2
  cowhand img convert -f qcow2 -l snapshot.name=clean -O raw disk.qcow2 clean.raw")]
pub(super) struct Args {
    /// An object that defines a secret: secret,id=ID,file=PATH
    #[arg(long, value_name = "OBJECT")]
    object: Vec<String>,
    /// The sources' names are lists of options (driver=qcow2,file.filename=…)
    #[arg(long, visible_alias = "source-image-opts")]
    image_opts: bool,
    /// The target's name is a list of options
    #[arg(long)]
    target_image_opts: bool,
    /// The sources' format
    #[arg(short = 'f', long = "source-format", value_name = "FORMAT")]
    format: Option<String>,
    /// How the sources are read: writeback, none, …
    #[arg(short = 'T', long = "source-cache", value_name = "MODE", default_value = "writeback")]
    source_cache: String,
    /// The sources as they were in this snapshot: an ID, a name, or snapshot.id=ID,snapshot.name=NAME
    #[arg(short = 'l', long = "source-snapshot", value_name = "SNAPSHOT")]
    snapshot: Option<String>,
    /// The target's format
    #[arg(short = 'O', long = "target-format", value_name = "FORMAT")]
    target_format: Option<String>,
    /// The target's options, as for create
    #[arg(short = 'o', long = "target-options", value_name = "OPTIONS")]
    options: Vec<String>,
    /// How the target is written: unsafe (nothing is flushed), writeback, none, …
    #[arg(short = 't', long = "target-cache", value_name = "MODE", default_value = "unsafe")]
    target_cache: String,
    /// Makes the target an overlay of this file: what the sources have from their own backing files is not copied
    #[arg(short = 'B', long, value_name = "FILE")]
    backing: Option<String>,
    /// The format of the backing file
    #[arg(short = 'F', long, value_name = "FORMAT")]
    backing_format: Option<String>,
    /// Writes compressed clusters
    #[arg(short = 'c', long)]
    compress: bool,
    /// The target is there already, and is overwritten as a disk
    #[arg(short = 'n', long)]
    no_create: bool,
    /// The target reads as zeros already (with -n)
    #[arg(long)]
    target_is_zero: bool,
    /// So many bytes of zeros are not written; 0 writes all
    #[arg(short = 'S', long, value_name = "SIZE")]
    sparse_size: Option<String>,
    /// Copies the first source's dirty bitmaps too
    #[arg(long)]
    bitmaps: bool,
    /// Leaves out bitmaps that cannot be relied on, instead of failing (with --bitmaps)
    #[arg(long)]
    skip_broken_bitmaps: bool,
    /// What cannot be read is told and left as zeros
    #[arg(long)]
    salvage: bool,
    /// How many reads and writes are under way at once
    #[arg(short = 'm', long, value_name = "COUNT", default_value = "8")]
    parallel: String,
    /// Writes need not begin in the order of their offsets
    #[arg(short = 'W', long)]
    oob_writes: bool,
    /// Has the host copy from file to file where it can
    #[arg(short = 'C', long)]
    copy_range_offloading: bool,
    /// The most bytes a second
    #[arg(short = 'r', long, value_name = "RATE")]
    rate: Option<String>,
    /// Shows how far it is
    #[arg(short = 'p', long)]
    progress: bool,
    /// Says nothing but errors
    #[arg(short = 'q', long)]
    quiet: bool,
    /// Takes no locks on the sources: somebody else may be writing them
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The sources, and then the target
    #[arg(value_name = "FILE")]
    files: Vec<String>,
}

/// What the words say, apart from the images.
struct Plan<'a> {
    copy: CopyOptions,
    sources: &'a [String],
    target: &'a str,
    target_format: &'a str,
    options: Options,
}

impl<'a> Plan<'a> {
    /// In the order in which QEMU finds fault.
    fn new(args: &'a Args) -> Result<Self, Failure> {
        let refuse = |message: &str| Err(Failure::new(message));
        let options = Options::parse(&args.options).map_err(Failure::new)?;
        let sparse = match &args.sparse_size {
            None => None,
            Some(text) => {
                let invalid = || Failure::new(format!("Invalid buffer size for sparse output specified: '{text}'."));
                Some(parse_size(text, 1).map_err(|_| invalid())?)
            }
        };
        if let Some(sparse) = sparse.filter(|sparse| !sparse.is_multiple_of(512) || *sparse > SPARSE_MAX) {
            let _ = sparse;
            return Err(Failure::new(format!(
                "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to {SPARSE_MAX}. Select 0 to \
                 disable sparse detection (fully allocates output)."
            )));
        }
        let workers = match parse_size(&args.parallel, 1) {
            Ok(workers @ 1..=16) => workers as usize,
            _ => {
                return Err(Failure::new(format!(
                    "Invalid number of coroutines specified. Must be between 1 and {WORKERS_MAX}."
                )));
            }
        };
        let rate = args.rate.as_deref().map(|rate| number(rate, "rate limit", 0, i64::MAX as u64)).transpose()?;
        if args.target_image_opts && !args.no_create {
            return refuse("--target-image-opts requires use of -n flag");
        }
        if args.skip_broken_bitmaps && !args.bitmaps {
            return refuse("Use of --skip-broken-bitmaps requires --bitmaps");
        }
        if args.image_opts && args.format.is_some() {
            return refuse("--image-opts and --format are mutually exclusive");
        }
        if args.copy_range_offloading {
            if args.compress {
                return refuse("Cannot enable copy offloading when -c is used");
            }
            if sparse.is_some() {
                return refuse("Cannot enable copy offloading when -S is used");
            }
            if args.salvage {
                return refuse("Cannot use copy offloading in salvaging mode");
            }
        }
        let [sources @ .., target] = args.files.as_slice() else { return refuse("Must specify image file name") };
        if sources.is_empty() {
            return refuse("Must specify image file name");
        }
        if args.no_create && !args.options.is_empty() {
            return refuse("-o has no effect when skipping image creation");
        }
        if args.target_is_zero && !args.no_create {
            return refuse("--target-is-zero requires use of -n flag");
        }
        let copy = CopyOptions {
            workers,
            out_of_order: args.oob_writes,
            compressed: args.compress,
            sparse: sparse.unwrap_or(4096),
            target_is_zero: args.target_is_zero,
            over_backing: false,
            salvage: args.salvage,
            rate: rate.filter(|&rate| rate > 0),
            offload: args.copy_range_offloading,
        };
        let target_format = args.target_format.as_deref().unwrap_or("raw");
        Ok(Self { copy, sources, target, target_format, options })
    }
}

/// The largest number of zeros that may be told to be left out.
const SPARSE_MAX: u64 = 16 << 20;

pub(super) fn run(args: &Args, cx: &Context) -> Result<u8, Failure> {
    let options = Options::parse(&args.options).map_err(Failure::new)?;
    if options.asks_for_help() {
        let format = creatable(args.target_format.as_deref().unwrap_or("raw")).map_err(Failure::new)?;
        print!("{}", help(format, args.files.len() > 1));
        return Ok(0);
    }
    let mut plan = Plan::new(args)?;
    cx.take_objects(&args.object)?;
    let source_cache = cache_mode(&args.source_cache, "source cache")?;
    let how = How {
        format: args.format.as_deref(),
        image_opts: args.image_opts,
        force_share: args.force_share,
        cache: source_cache,
        ..How::default()
    };
    let sources = plan.sources.iter().map(|name| cx.open(name, &how)).collect::<Result<Vec<_>, _>>()?;
    if let Some(which) = &args.snapshot {
        if sources.len() > 1 {
            return Err(Failure::new("No support for concatenating multiple snapshot"));
        }
        view(&sources[0], which, cx)?;
    }
    let size = sources.iter().map(|disk| disk.size()).sum();
    let target = match args.no_create {
        true => existing(args, &mut plan, &sources, cx)?,
        false => new(args, &mut plan, &sources, size, cx)?,
    };
    let filled = fill(args, &plan, &sources, &target, cx);
    if filled.is_err() && !args.no_create {
        let format = target.spec().format;
        // Nothing more is written to what goes away.
        drop(target);
        remove_unfinished(plan.target, format, cx);
    }
    filled.map(|()| 0)
}

/// Checks the options for a target that is made, makes it, and opens it.
fn new(args: &Args, plan: &mut Plan<'_>, sources: &[Arc<Disk>], size: u64, cx: &Context) -> Result<Arc<Disk>, Failure> {
    let format = creatable(plan.target_format).map_err(Failure::new)?;
    let mut options = plan.options.clone();
    for (key, value) in [("backing_file", &args.backing), ("backing_fmt", &args.backing_format)] {
        if let Some(value) = value {
            if format == Format::Raw {
                let what = if key == "backing_file" { "Backing file" } else { "Backing file format" };
                return Err(Failure::new(format!("{what} not supported for file format 'raw'")));
            }
            options.set(key, value);
        }
    }
    let mut options = CreateOptions::new(format, &options).map_err(Failure::new)?;
    options.set("size", &size.to_string());
    plan.copy.over_backing = options.get("backing_file").is_some();
    if plan.copy.over_backing {
        over_one_backing(sources)?;
        if options.get("backing_fmt").is_none() {
            return Err(Failure::new("Use of backing file requires explicit backing format"));
        }
    }
    if args.compress {
        if format == Format::Raw {
            return Err(Failure::new("Compression not supported for this file format"));
        }
        if options.get("encryption") == Some("on") || options.get("encrypt.format").is_some() {
            return Err(Failure::new("Compression and encryption not supported at the same time"));
        }
        if options.get("preallocation").is_some_and(|mode| mode != "off") {
            return Err(Failure::new("Compression and preallocation not supported at the same time"));
        }
    }
    if args.bitmaps {
        check_bitmaps(args, sources)?;
        if format == Format::Raw || matches!(options.get("compat"), Some("0.10" | "v2")) {
            return Err(Failure::new(format!("Format driver '{format}' does not support bitmaps")));
        }
    }
    let cache = cache_mode(&args.target_cache, "cache")?;
    let how = How { format: Some(format.name()), write: true, cache, ..How::default() };
    if sources.iter().any(|source| is_part_of(plan.target, source)) {
        let message = "it is a file of the source, whose content would be lost";
        return Err(Failure::new(format!("{}: error while converting {format}: {message}", plan.target)));
    }
    let size = make_to_fill(&options, size, plan.target, cx)
        .map_err(|e| Failure::new(format!("{}: error while converting {format}: {e}", plan.target)))?;
    let mut spec = cx.spec(plan.target, &how)?;
    spec.unfinished = Some(size);
    if let Some(id) = options.get("encrypt.key-secret") {
        spec.secret = Some(cx.secrets.get(id).map_err(Failure::new)?);
    }
    let target = cx.open_spec(plan.target, &spec).inspect_err(|_| remove_unfinished(plan.target, format, cx))?;
    // A block device holds what it held.
    plan.copy.target_is_zero = !plan.copy.over_backing && (format == Format::Qcow2 || !target.is_block_device());
    Ok(target)
}

/// Opens a target that is there already.
fn existing(args: &Args, plan: &mut Plan<'_>, sources: &[Arc<Disk>], cx: &Context) -> Result<Arc<Disk>, Failure> {
    plan.copy.over_backing = args.backing.is_some();
    if plan.copy.over_backing {
        over_one_backing(sources)?;
    }
    if args.bitmaps {
        check_bitmaps(args, sources)?;
    }
    let cache = cache_mode(&args.target_cache, "cache")?;
    let format = (!args.target_image_opts).then_some(plan.target_format);
    let how = How { format, image_opts: args.target_image_opts, write: true, cache, ..How::default() };
    let target = cx.open(plan.target, &how)?;
    if target.size() < sources.iter().map(|disk| disk.size()).sum() {
        return Err(Failure::new("output file is smaller than input file"));
    }
    if args.compress && target.spec().format == Format::Raw {
        return Err(Failure::new("Compression not supported for this file format"));
    }
    plan.copy.compressed |= target.spec().compress;
    if args.bitmaps && !target.can_have_bitmaps() {
        return Err(Failure::new(format!("Format driver '{}' does not support bitmaps", target.spec().format)));
    }
    // Where nothing lies below the target, it gets what the source has from its own backing file, too: it would lack that.
    plan.copy.over_backing &= target.layers().len() > 1;
    if args.target_is_zero && target.layers().len() > 1 {
        cx.warn("--target-is-zero: the target has a backing file, and shows what that has where nothing is written");
    }
    Ok(target)
}

fn over_one_backing(sources: &[Arc<Disk>]) -> Result<(), Failure> {
    if sources.len() > 1 {
        let message = "Having a backing file for the target makes no sense when concatenating multiple input images";
        return Err(Failure::new(message));
    }
    Ok(())
}

/// Whether the source's bitmaps can be copied.
fn check_bitmaps(args: &Args, sources: &[Arc<Disk>]) -> Result<(), Failure> {
    if sources.len() > 1 {
        return Err(Failure::new("Copying bitmaps only possible with single source"));
    }
    let source = &sources[0];
    let failed = |e: cowhand_block::Error| Failure::new(e.reason());
    if !source.can_have_bitmaps() {
        return Err(Failure::new("Source lacks bitmap support"));
    }
    let bitmaps = source.bitmaps().map_err(failed)?;
    match bitmaps.iter().find(|bitmap| bitmap.state != BitmapState::Consistent) {
        Some(broken) if !args.skip_broken_bitmaps => Err(Failure::new(format!(
            "Cannot copy inconsistent bitmap '{}'\n\
             Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it",
            broken.name
        ))),
        _ => Ok(()),
    }
}

/// Copies everything, and lets the target look whole.
fn fill(args: &Args, plan: &Plan<'_>, sources: &[Arc<Disk>], target: &Arc<Disk>, cx: &Context) -> Result<(), Failure> {
    let progress = shows_progress(args.progress, args.quiet).then(|| Rc::new(Progress::new()));
    let (shown, quiet, program) = (progress.clone(), args.quiet, cx.program());
    let listener: Option<Listener> = (progress.is_some() || args.salvage).then(|| {
        Rc::new(move |event: CopyEvent<'_>| match event {
            CopyEvent::Progress { done, total } => {
                if let Some(progress) = &shown {
                    progress.show(done, total);
                }
            }
            CopyEvent::Unreadable { offset, error } if !quiet => {
                eprintln!("{program}: warning: error while reading offset {offset}: {}", error.strerror());
            }
            CopyEvent::Unreadable { .. } => {}
        }) as Listener
    });
    let copied = copy(sources, target, &plan.copy, listener).map_err(|e| in_words(&e));
    let finished = copied.and_then(|()| {
        if args.bitmaps {
            copy_bitmaps(&sources[0], target, cx)?;
        }
        let whole = if args.no_create { Ok(()) } else { target.finish_filling() };
        whole.map_err(|e| Failure::new(e.reason()))?;
        target.close().map_err(|e| Failure::new(e.reason()))
    });
    if let Some(progress) = progress {
        if finished.is_ok() {
            progress.all();
        }
        progress.end();
    }
    finished
}

fn in_words(failure: &CopyError) -> Failure {
    let CopyError { doing, offset, error } = failure;
    // What is told is the system's word, as scripts know it; why it is that, a log says.
    tracing::info!("{error}");
    Failure::new(match doing {
        Doing::Looking => format!("error while reading block status at offset {offset}: {}", error.strerror()),
        Doing::Reading => format!("error while reading at byte {offset}: {}", error.strerror()),
        Doing::Writing => format!("error while writing at byte {offset}: {}", error.strerror()),
        Doing::Working => error.reason(),
    })
}

fn copy_bitmaps(source: &Arc<Disk>, target: &Arc<Disk>, cx: &Context) -> Result<(), Failure> {
    for bitmap in source.bitmaps().map_err(|e| Failure::new(e.reason()))? {
        let name = &bitmap.name;
        if bitmap.state != BitmapState::Consistent {
            cx.warn(&format!("Skipping inconsistent bitmap '{name}'"));
            continue;
        }
        let created = target.create_bitmap(name, Some(bitmap.granularity), bitmap.enabled);
        created.map_err(|e| Failure::new(format!("Failed to create bitmap {name}: {}", e.reason())))?;
        let merged = source.bitmap_ranges(name).and_then(|ranges| target.set_in_bitmap(name, &ranges));
        merged.map_err(|e| Failure::new(format!("Failed to populate bitmap {name}: {}", e.reason())))?;
    }
    Ok(())
}

/// Removes the target of a copy that failed, if it is a file. One that stays does not look whole.
pub(super) fn remove_unfinished(name: &str, format: Format, cx: &Context) {
    let how = How { format: Some(format.name()), ..How::default() };
    let Ok(spec) = cx.spec(name, &how) else { return };
    if std::fs::symlink_metadata(&spec.path).is_ok_and(|file| file.is_file()) {
        // What went wrong is what matters.
        let _ = cx.policy.storage.remove(&spec.path);
    }
}
