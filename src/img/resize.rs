//! `resize`: makes a disk larger or smaller.

use clap::Parser;
use cowhand_block::Preallocation;

use super::arguments::ImageArgs;
use super::context::reason;
use super::units::{SizeError, parse_size};
use super::{Context, Failure, How};

/// What is said of a size that is none, in QEMU's words.
pub(super) const SIZE_EXPECTED: &str = "Parameter 'size' expects a non-negative number below 2^64\n\
Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
and exabytes, respectively.";

/// Makes a disk larger or smaller
#[derive(Parser)]
#[command(after_help = "\
Example:
  cowhand img resize -f qcow2 disk.qcow2 +10G")]
pub(super) struct Args {
    #[command(flatten)]
    image: ImageArgs,
    /// How space is taken for what is added: off, metadata, falloc or full
    #[arg(long, value_name = "MODE", default_value = "off")]
    preallocation: String,
    /// Says nothing but errors
    #[arg(short, long)]
    quiet: bool,
    /// Allows the disk to become smaller: what is cut off is lost
    #[arg(long)]
    shrink: bool,
    /// The image
    file: Option<String>,
    /// The new size, or how much is added (+) or taken off (-)
    #[arg(allow_hyphen_values = true)]
    size: Option<String>,
}

pub(super) fn run(args: &Args, cx: &Context) -> Result<u8, Failure> {
    let preallocation = match args.preallocation.as_str() {
        "off" => Preallocation::Off,
        "metadata" => Preallocation::Metadata,
        "falloc" => Preallocation::Falloc,
        "full" => Preallocation::Full,
        other => return Err(Failure::new(format!("Invalid preallocation mode '{other}'"))),
    };
    let (Some(file), Some(size)) = (&args.file, &args.size) else {
        return Err(cx.usage("resize", "Expecting image file name and size"));
    };
    cx.take_objects(&args.image.object)?;
    let (sign, digits) = match size.as_bytes().first() {
        Some(b'+') => (1, &size[1..]),
        Some(b'-') => (-1, &size[1..]),
        _ => (0, size.as_str()),
    };
    let bytes = parse_size(digits, 1).map_err(|e| match e {
        SizeError::TooLarge => Failure::new("New image size must be positive"),
        SizeError::Malformed => Failure::new(SIZE_EXPECTED),
    })?;
    let how = How {
        // What lies below decides what the new part must not show.
        write: true,
        ..args.image.how()
    };
    let spec = cx.spec(file, &how)?;
    let disk = cx.open_spec(file, &spec)?;
    let old = disk.size();
    let new = match sign {
        1 => old.checked_add(bytes),
        -1 => old.checked_sub(bytes),
        _ => Some(bytes),
    };
    let new = new.filter(|&size| size > 0 && size <= i64::MAX as u64);
    let new = new.ok_or_else(|| Failure::new("New image size must be positive"))?;
    if new <= old && preallocation != Preallocation::Off {
        return Err(Failure::new("Preallocation can only be used for growing images"));
    }
    if new < old && !args.shrink {
        cx.error("Use the --shrink option to perform a shrink operation.");
        cx.warn(
            "Shrinking an image will delete all data beyond the shrunken image's end. Before performing such an operation, make \
             sure there is no important data there.",
        );
        return Err(Failure::new(""));
    }
    disk.resize_with(new, preallocation).map_err(|e| {
        cx.advise(Failure::new(reason(&e, &spec)), "the image is sound; run the command again to complete it")
    })?;
    disk.close().map_err(|e| Failure::new(reason(&e, &spec)))?;
    if !args.quiet {
        println!("Image resized.");
    }
    Ok(0)
}
