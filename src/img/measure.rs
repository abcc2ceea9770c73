//! `measure`: how large the file of a new image would be.

use clap::Parser;
use cowhand_block::Format;
use cowhand_block::jobs::measure::{Measured, measure_qcow2, measure_raw};

use super::arguments::ImageArgs;
use super::create_options::{CreateOptions, NewImage};
use super::options::Options;
use super::snapshot_view::view;
use super::tree::is_json;
use super::units::{SizeError, parse_size};
use super::{Context, Failure, How};

/// Says how large the file of a new image would be
#[derive(Parser)]
#[command(after_help = "\
Example:
  cowhand img measure -O qcow2 --size 20G
  cowhand img measure -f raw -O qcow2 -o cluster_size=1M disk.raw")]
pub(super) struct Args {
    #[command(flatten)]
    image: ImageArgs,
    /// The new image's format
    #[arg(short = 'O', long, value_name = "FORMAT", default_value = "raw")]
    target_format: String,
    /// The new image's options, as for create
    #[arg(short = 'o', value_name = "OPTIONS")]
    options: Vec<String>,
    /// A new, empty disk of this size
    #[arg(short = 's', long, value_name = "SIZE")]
    size: Option<String>,
    /// The image as it was in this snapshot
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    snapshot: Option<String>,
    /// How it is shown: human or json
    #[arg(long, value_name = "FORM", default_value = "human")]
    output: String,
    /// Takes no locks: somebody else may be writing the image
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The image that would be converted
    #[arg(value_name = "FILE")]
    files: Vec<String>,
}

pub(super) fn run(args: &Args, cx: &Context) -> Result<u8, Failure> {
    let json = is_json(Some(&args.output), "measure", cx)?;
    let size = args.size.as_deref().map(size).transpose()?;
    let options = Options::parse(&args.options).map_err(Failure::new)?;
    cx.take_objects(&args.image.object)?;
    let file = match args.files.as_slice() {
        [] => None,
        [file] => Some(file),
        _ => return Err(Failure::new("At most one filename argument is allowed.")),
    };
    if file.is_none() && (args.image.image_opts || args.image.format.is_some() || args.snapshot.is_some()) {
        return Err(Failure::new("--image-opts, -f, and -l require a filename argument."));
    }
    match (file, size) {
        (None, None) => return Err(Failure::new("Either --size N or one filename must be specified.")),
        (Some(_), Some(_)) => return Err(Failure::new("--size N cannot be used together with a filename.")),
        _ => {}
    }
    let format = target_format(&args.target_format)?;
    let disk = match file {
        None => None,
        Some(file) => {
            if args.image.image_opts && args.image.format.is_some() {
                return Err(Failure::new("--image-opts and --format are mutually exclusive"));
            }
            let how = How { force_share: args.force_share, ..args.image.how() };
            let disk = cx.open(file, &how)?;
            args.snapshot.as_deref().map_or(Ok(()), |which| view(&disk, which, cx))?;
            Some(disk)
        }
    };
    let (options, luks) = without_encryption(options)?;
    let options = CreateOptions::new(format, &options).map_err(|e| {
        cx.error(&e);
        Failure::new(format!("Invalid options for file format '{format}'"))
    })?;
    let size = size.or(options.size()).unwrap_or(0);
    let size = disk.as_ref().map_or(size, |disk| disk.size());
    let measured = match options.image(size).map_err(in_measures_words)? {
        NewImage::Raw { size, .. } => measure_raw(size),
        NewImage::Qcow2 { params, preallocation } => {
            measure_qcow2(&params, preallocation, luks, disk.as_ref()).map_err(|e| Failure::new(e.reason()))?
        }
    };
    print!("{}", if json { in_json(&measured) } else { in_words(&measured) });
    Ok(0)
}

/// Takes what says how the image would be encrypted out of the options; gives the length of its LUKS header, 0 if it has none. A backing
/// file's format does not matter here.
fn without_encryption(options: Options) -> Result<(Options, u64), Failure> {
    let is_luks = options.get("encrypt.format") == Some("luks");
    if is_luks && options.get("encrypt.key-secret").is_none() {
        return Err(Failure::new("Parameter 'encrypt.key-secret' is required for cipher"));
    }
    let key_bytes = match (options.get("encrypt.cipher-alg"), options.get("encrypt.cipher-mode")) {
        (cipher, None | Some("xts")) => 2 * cipher_key_bytes(cipher),
        (cipher, Some(_)) => cipher_key_bytes(cipher),
    };
    let mut rest = Options::default();
    for (key, value) in options.iter().filter(|(key, _)| !(is_luks && key.starts_with("encrypt."))) {
        rest.set(key, value);
    }
    if rest.get("backing_file").is_some() && rest.get("backing_fmt").is_none() {
        rest.set("backing_fmt", "raw");
    }
    Ok((rest, if is_luks { luks_len(key_bytes) } else { 0 }))
}

/// The bytes of a cipher's key.
fn cipher_key_bytes(cipher: Option<&str>) -> u64 {
    match cipher {
        Some("aes-128" | "serpent-128" | "twofish-128" | "cast5-128") => 16,
        Some("aes-192" | "serpent-192" | "twofish-192") => 24,
        _ => 32,
    }
}

/// The bytes of a LUKS header with eight key slots, each of 4000 stripes of the key, in whole pages.
fn luks_len(key_bytes: u64) -> u64 {
    4096 + 8 * (4000 * key_bytes).next_multiple_of(4096)
}

/// Measuring has words of its own for some wrong values.
fn in_measures_words(message: String) -> Failure {
    let preallocation = message.strip_prefix("Parameter 'preallocation' does not accept value '");
    if let Some(value) = preallocation.and_then(|rest| rest.strip_suffix('\'')) {
        return Failure::new(format!("invalid parameter value: {value}"));
    }
    Failure::new(message.replace("(use version=v3 or greater)", "(use compat=1.1 or greater)"))
}

fn size(text: &str) -> Result<u64, Failure> {
    let too_large = || Failure::new("Invalid image size specified. Must be between 0 and 9223372036854775807.");
    parse_size(text, 1).map_err(|e| match e {
        SizeError::TooLarge => too_large(),
        SizeError::Malformed => Failure::new(format!("Invalid image size specified: '{text}'.")),
    })
}

fn target_format(name: &str) -> Result<Format, Failure> {
    name.parse().map_err(|e| match e {
        cowhand_block::FormatError::Unknown(name) => Failure::new(format!("Unknown file format '{name}'")),
        cowhand_block::FormatError::Other(name) => {
            Failure::new(format!("Block driver '{name}' does not support size measurement"))
        }
    })
}

fn in_words(measured: &Measured) -> String {
    let mut text =
        format!("required size: {}\nfully allocated size: {}\n", measured.required, measured.fully_allocated);
    if let Some(bitmaps) = measured.bitmaps {
        text.push_str(&format!("bitmaps size: {bitmaps}\n"));
    }
    text
}

fn in_json(measured: &Measured) -> String {
    let bitmaps = measured.bitmaps.map(|bytes| format!("    \"bitmaps\": {bytes},\n")).unwrap_or_default();
    format!(
        "{{\n{bitmaps}    \"required\": {},\n    \"fully-allocated\": {}\n}}\n",
        measured.required, measured.fully_allocated
    )
}
