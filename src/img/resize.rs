//! `resize`: makes a disk larger or smaller.

use clap::Parser;
use cowhand_block::Preallocation;

use super::units::parse_size;
use super::{Context, Failure, How};

/// Makes a disk larger or smaller
#[derive(Parser)]
#[command(after_help = "\
Example:
  cowhand img resize -f qcow2 disk.qcow2 +10G")]
pub(super) struct Args {
    /// An object that defines a secret: secret,id=ID,file=PATH
    #[arg(long, value_name = "OBJECT")]
    object: Vec<String>,
    /// The image's name is a list of options (driver=qcow2,file.filename=…)
    #[arg(long)]
    image_opts: bool,
    /// The image's format
    #[arg(short = 'f', value_name = "FORMAT")]
    format: Option<String>,
    /// How space is taken for what is added: off, metadata, falloc or full
    #[arg(long, value_name = "MODE", default_value = "off")]
    preallocation: String,
    /// Says nothing but errors
    #[arg(short)]
    quiet: bool,
    /// Allows the disk to become smaller: what is cut off is lost
    #[arg(long)]
    shrink: bool,
    /// The image
    file: String,
    /// The new size, or how much is added (+) or taken off (-)
    #[arg(allow_hyphen_values = true)]
    size: String,
}

pub(super) fn run(args: &Args, cx: &Context) -> Result<u8, Failure> {
    cx.take_objects(&args.object)?;
    let preallocation = match args.preallocation.as_str() {
        "off" => Preallocation::Off,
        "metadata" => Preallocation::Metadata,
        "falloc" => Preallocation::Falloc,
        "full" => Preallocation::Full,
        other => return Err(Failure::new(format!("Invalid preallocation mode '{other}'"))),
    };
    let (sign, digits) = match args.size.as_bytes().first() {
        Some(b'+') => (1, &args.size[1..]),
        Some(b'-') => (-1, &args.size[1..]),
        _ => (0, args.size.as_str()),
    };
    let bytes = parse_size(digits, 1).map_err(|_| Failure::new(format!("Invalid size '{}'", args.size)))?;
    let how = How {
        format: args.format.as_deref(),
        image_opts: args.image_opts,
        // What lies below decides what the new part must not show.
        write: true,
        ..How::default()
    };
    let disk = cx.open(&args.file, &how)?;
    let old = disk.size();
    let new = match sign {
        1 => old.checked_add(bytes),
        -1 => old.checked_sub(bytes).filter(|&n| n > 0),
        _ => Some(bytes),
    };
    let new = new.ok_or_else(|| Failure::new("New image size must be positive"))?;
    if new < old && !args.shrink {
        cx.warn("Shrinking an image will delete all data beyond the shrunken image's end. Before performing such an operation, \
                 make sure there is no important data there.");
        return Err(Failure::new("Use the --shrink option to perform a shrink operation."));
    }
    disk.resize_with(new, preallocation).map_err(|e| Failure::new(e.reason()))?;
    disk.close().map_err(|e| Failure::new(e.reason()))?;
    if !args.quiet {
        println!("Image resized.");
    }
    Ok(0)
}
