//! `create`: makes a new image.

use std::path::Path;

use clap::Parser;
use cowhand_block::{Backing, FileHints, Format, NewFormat, Preallocation, inspect, make_image};
use cowhand_qcow2::CryptMethod;

use super::context::{is_one_of, is_part_of};
use super::create_options::{CreateOptions, NewImage, creatable, help};
use super::luks_volume::{self, Volume};
use super::options::Options;
use super::units::{SizeError, parse_size};
use super::{Context, Failure, How};

/// Makes a new image
#[derive(Parser)]
#[command(after_help = "\
Examples:
  cowhand img create -f qcow2 disk.qcow2 20G
  cowhand img create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2
  cowhand img create -f qcow2 -o help")]
pub(super) struct Args {
    /// An object that defines a secret: secret,id=ID,file=PATH
    #[arg(long, value_name = "OBJECT")]
    object: Vec<String>,
    /// Says nothing but errors
    #[arg(short)]
    quiet: bool,
    /// The format of the image: qcow2, raw, or luks (which can only be made)
    #[arg(short = 'f', value_name = "FORMAT", default_value = "raw")]
    format: String,
    /// The backing file: what the image does not have is read from there
    #[arg(short = 'b', value_name = "FILE")]
    backing: Option<String>,
    /// The backing file's format
    #[arg(short = 'F', value_name = "FORMAT")]
    backing_format: Option<String>,
    /// Does not look at the backing file
    #[arg(short = 'u')]
    unsafe_mode: bool,
    /// Options of the format: KEY=VALUE,…; `help` lists them
    #[arg(short = 'o', value_name = "OPTIONS", allow_hyphen_values = true)]
    options: Vec<String>,
    /// The image
    file: Option<String>,
    /// Its virtual size: bytes, or with k, M, G, T, P or E; the backing file's if it is not given
    size: Option<String>,
}

pub(super) fn run(args: &Args, cx: &Context) -> Result<u8, Failure> {
    cx.take_objects(&args.object)?;
    let mut options = Options::parse(&args.options).map_err(Failure::new)?;
    if args.format == "luks" {
        return run_luks(args, &options, cx);
    }
    if options.asks_for_help() {
        let format = creatable(&args.format).map_err(Failure::new)?;
        print!("{}", help(format, args.file.is_some()));
        return Ok(0);
    }
    let Some(name) = &args.file else {
        return Err(cx.usage("create", "Expecting image file name"));
    };
    let of_image = |message: String| Failure::new(format!("{name}: {message}"));
    let size = args.size.as_deref().map(positional_size).transpose()?;
    let format = creatable(&args.format).map_err(of_image)?;
    for (key, value) in [("backing_file", &args.backing), ("backing_fmt", &args.backing_format)] {
        if let Some(value) = value {
            if format == Format::Raw {
                let what = if key == "backing_file" { "Backing file" } else { "Backing file format" };
                return Err(of_image(format!("{what} not supported for file format 'raw'")));
            }
            options.set(key, value);
        }
    }
    let mut options = CreateOptions::new(format, &options).map_err(of_image)?;
    if let (Some(_), Some(_)) = (size, options.size()) {
        return Err(of_image("The image size must be specified only once".into()));
    }
    let size = size.or(options.size());
    let size = backing_size(&options, name, size, args.unsafe_mode, cx).map_err(of_image)?.or(size);
    let size = size.ok_or_else(|| of_image("Image creation needs a size parameter".into()))?;
    options.set("size", &size.to_string());
    if !args.quiet {
        println!("Formatting '{name}', {}", options.shown());
    }
    make(&options, size, name, cx).map_err(of_image)?;
    Ok(0)
}

fn run_luks(args: &Args, options: &Options, cx: &Context) -> Result<u8, Failure> {
    if options.asks_for_help() {
        print!("{}", luks_volume::help(args.file.is_some()));
        return Ok(0);
    }
    let Some(name) = &args.file else {
        return Err(cx.usage("create", "Expecting image file name"));
    };
    let of_image = |message: String| Failure::new(format!("{name}: {message}"));
    if args.backing.is_some() || args.backing_format.is_some() {
        return Err(of_image("Backing file not supported for file format 'luks'".into()));
    }
    let volume = Volume::new(options).map_err(of_image)?;
    let size = match (args.size.as_deref().map(positional_size).transpose()?, volume.size()) {
        (Some(_), Some(_)) => return Err(of_image("The image size must be specified only once".into())),
        (given, option) => given.or(option).ok_or_else(|| of_image("Image creation needs a size parameter".into()))?,
    };
    if !args.quiet {
        println!("Formatting '{name}', {}", volume.shown(size));
    }
    let (format, preallocation) = volume.format(size, &cx.secrets).map_err(of_image)?;
    make_as((format, preallocation, FileHints::default()), name, false, cx).map_err(of_image)?;
    Ok(0)
}

/// Makes the image that is called `name`.
pub(super) fn make(options: &CreateOptions, size: u64, name: &str, cx: &Context) -> Result<(), String> {
    make_as(content(options, size, cx)?, name, false, cx)
}

/// The same of an image that is going to be filled; gives the size that its disk is going to have. It is to be opened as unfinished.
pub(super) fn make_to_fill(options: &CreateOptions, size: u64, name: &str, cx: &Context) -> Result<u64, String> {
    make_as(content(options, size, cx)?, name, true, cx)?;
    Ok(size.next_multiple_of(512))
}

/// What an image is, what of its space is taken at once, and what the file system is asked for.
type What = (NewFormat, Preallocation, FileHints);

fn content(options: &CreateOptions, size: u64, cx: &Context) -> Result<What, String> {
    let (format, preallocation) = match options.image(size)? {
        NewImage::Raw { size, preallocation } => (NewFormat::Raw(size), preallocation),
        NewImage::Qcow2 { params, preallocation } => {
            (NewFormat::Qcow2(params, options.encryption(&cx.secrets)?), preallocation)
        }
    };
    Ok((format, preallocation, options.hints()?))
}

fn make_as((format, preallocation, hints): What, name: &str, unfinished: bool, cx: &Context) -> Result<(), String> {
    let path = cowhand_block::options::plain_name(name);
    let new = cowhand_block::NewImage { path: path.clone(), format, preallocation, replace: true, unfinished, hints };
    let made = make_image(&cx.policy, &new);
    if let Some(e) = made.map_err(|e| if e.path() == Some(&path) { e.reason() } else { e.to_string() })? {
        cx.warn(&format!("Failed to set extent size hint: {}", e.strerror()));
    }
    Ok(())
}

fn positional_size(text: &str) -> Result<u64, Failure> {
    let too_large = || Failure::new("Invalid image size specified. Must be between 0 and 9223372036854775807.");
    parse_size(text, 1).map_err(|e| match e {
        SizeError::TooLarge => too_large(),
        SizeError::Malformed => Failure::new(format!("Invalid image size specified: '{text}'.")),
    })
}

/// The image would take the place of what lies below it.
const SAME: &str = "Error: Trying to create an image with the same filename as the backing file";

/// Looks at the backing file, unless it is not to be looked at and need not be; gives its size.
fn backing_size(
    options: &CreateOptions,
    name: &str,
    size: Option<u64>,
    unsafe_mode: bool,
    cx: &Context,
) -> Result<Option<u64>, String> {
    let Some(backing) = options.get("backing_file") else { return Ok(None) };
    if backing.is_empty() {
        return Err("Expected backing file name, got empty string".into());
    }
    let format = options.get("backing_fmt");
    if let Some(format) = format {
        format.parse::<Format>().map_err(|e| format!("{e}\nCould not open backing image."))?;
    }
    // Relative to the image, as it will be read.
    let dir = Path::new(name).parent().unwrap_or(Path::new(""));
    let full = match backing.strip_prefix("json:") {
        Some(_) => backing.to_string(),
        None => dir.join(cowhand_block::options::plain_name(backing)).to_string_lossy().into_owned(),
    };
    if full == name {
        return Err(SAME.into());
    }
    if unsafe_mode && format.is_none() {
        return Err("Backing file specified without backing format".into());
    }
    if unsafe_mode {
        return Ok(None);
    }
    let how = How { format, guess: true, backing: Backing::Alone, ..How::default() };
    let could_not = |e: String| format!("{e}\nCould not open backing image.");
    let spec = cx.spec_or_reason(&full, &how).map_err(could_not)?;
    if format.is_none() {
        let detected = spec.format;
        return Err(format!("Backing file specified without backing format\nDetected format of {detected}."));
    }
    if is_one_of(name, [spec.path.clone()]) {
        return Err(SAME.into());
    }
    // Its secret is asked for when it is read, not now.
    if spec.format == Format::Qcow2 && spec.secret.is_none() {
        let info = inspect(&spec, &cx.policy);
        let info = info.map_err(|e| could_not(super::context::reason(&e, &spec)))?;
        if info.qcow2.is_some_and(|qcow2| qcow2.header.crypt_method != CryptMethod::None) {
            return Ok(size.is_none().then_some(info.virtual_size));
        }
    }
    // All below it too: what cannot be read now cannot be read later.
    let spec = cowhand_block::DiskSpec { backing: Backing::Header, ..spec };
    let disk =
        cowhand_block::Disk::open(&spec, &cx.policy).map_err(|e| could_not(super::context::reason(&e, &spec)))?;
    if is_part_of(name, &disk) {
        return Err(SAME.into());
    }
    Ok(size.is_none().then(|| disk.size()))
}
