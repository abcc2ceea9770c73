//! `amend`: makes another sort of image of one that is there.

use std::time::Duration;

use clap::Parser;
use cowhand_block::jobs::amend::{AmendOptions, KeyChange, amend};
use cowhand_block::secret::{Secret, SecretSource};
use cowhand_block::{Backing, Error, Format};

use super::arguments::ImageArgs;
use super::context::{cache_mode, reason};
use super::options::{Options, on_off};
use super::pace::Pace;
use super::units::{SizeError, parse_size};
use super::{Context, Failure, How, shows_progress};

/// Changes the options of an image that is there
#[derive(Parser)]
#[command(after_help = "\
'-o help -f qcow2' lists the options. The image is sound at every moment: what was interrupted is done again.

Example:
  cowhand img amend -f qcow2 -o compat=1.1,refcount_bits=8 disk.qcow2")]
pub(super) struct Args {
    #[command(flatten)]
    image: ImageArgs,
    /// How the image is written: writeback, none, unsafe, …
    #[arg(short = 't', long, value_name = "MODE", default_value = "writeback")]
    cache: String,
    /// What is to change: KEY=VALUE,…; may be repeated
    #[arg(short = 'o', long, value_name = "OPTIONS")]
    options: Vec<String>,
    /// Allows what may lock everybody out of an encrypted image
    #[arg(long)]
    force: bool,
    /// Shows how far it is
    #[arg(short, long)]
    progress: bool,
    /// Says nothing but errors
    #[arg(short, long)]
    quiet: bool,
    /// The image
    #[arg(value_name = "FILE")]
    files: Vec<String>,
}

/// The options that can change, with what `-o help` says of them.
const OPTIONS: [(&str, &str); 13] = [
    ("backing_file=<str>", "File name of a base image"),
    ("backing_fmt=<str>", "Image format of the base image"),
    ("compat=<str>", "Compatibility level (v2 [0.10] or v3 [1.1])"),
    ("data_file=<str>", "File name of an external data file"),
    ("data_file_raw=<bool (on/off)>", "The external data file must stay valid as a raw image"),
    ("encrypt.iter-time=<num>", "Time to spend in PBKDF in milliseconds"),
    ("encrypt.keyslot=<num>", "Select a single keyslot to modify explicitly"),
    ("encrypt.new-secret=<str>", "New secret to set in the matching keyslots. Empty string to erase"),
    ("encrypt.old-secret=<str>", "Select all keyslots that match this password"),
    ("encrypt.state=<str>", "Select new state of affected keyslots (active/inactive)"),
    ("lazy_refcounts=<bool (on/off)>", "Postpone refcount updates"),
    ("refcount_bits=<num>", "Width of a reference count entry in bits"),
    ("size=<size>", "Virtual disk size"),
];

/// The options that an image has only when it is made.
const FIXED: [&str; 12] = [
    "cluster_size",
    "compression_type",
    "encrypt.cipher-alg",
    "encrypt.cipher-mode",
    "encrypt.format",
    "encrypt.hash-alg",
    "encrypt.ivgen-alg",
    "encrypt.ivgen-hash-alg",
    "encrypt.key-secret",
    "encryption",
    "extended_l2",
    "preallocation",
];

pub(super) fn run(args: &Args, cx: &Context) -> Result<u8, Failure> {
    if args.options.is_empty() {
        return Err(cx.usage("amend", "Must specify options (-o)"));
    }
    let options = Options::parse(&args.options).map_err(Failure::new)?;
    if options.asks_for_help()
        && let Some(format) = &args.image.format
    {
        return help(format);
    }
    let [file] = args.files.as_slice() else {
        // In this place QEMU does not point to its help.
        return Err(Failure::new("Expecting one image file name"));
    };
    cx.take_objects(&args.image.object)?;
    let how =
        How { write: true, cache: cache_mode(&args.cache, "cache")?, backing: Backing::Header, ..args.image.how() };
    let spec = cx.spec(file, &how)?;
    if options.asks_for_help() {
        return help(spec.format.name());
    }
    if spec.format != Format::Qcow2 {
        return Err(no_amendment(spec.format.name()));
    }
    let asked = asked(&options, cx, args.force)?;
    let disk = cx.open_spec(file, &spec)?;
    let pace = Pace::new(shows_progress(args.progress, args.quiet), None);
    let amended = amend(&disk, &asked, pace.teller());
    pace.end();
    amended.map_err(|e| {
        cx.advise(said(&e, &reason(&e, &spec)), "the image is sound; run the command again to complete it")
    })?;
    disk.close().map_err(|e| Failure::new(reason(&e, &spec)))?;
    Ok(0)
}

fn no_amendment(format: &str) -> Failure {
    Failure::new(format!("Format driver '{format}' does not support option amendment"))
}

/// What `-o help` says.
fn help(format: &str) -> Result<u8, Failure> {
    if format != "qcow2" {
        return Err(no_amendment(format));
    }
    println!("Amend options for 'qcow2':");
    for (name, what) in OPTIONS {
        println!("  {name:<22} - {what}");
    }
    Ok(0)
}

fn said(error: &Error, reason: &str) -> Failure {
    let hint =
        if error.reason() == "Cannot amend the backing file" { "\nYou can use 'qemu-img rebase' instead." } else { "" };
    Failure::new(format!("{reason}{hint}"))
}

/// What is asked for, as the engine takes it.
fn asked(options: &Options, cx: &Context, force: bool) -> Result<AmendOptions, Failure> {
    let known: Vec<&str> = OPTIONS.iter().filter_map(|(name, _)| name.split('=').next()).collect();
    if let Some(key) = options.unknown(&known) {
        let hint = if FIXED.contains(&key) { "\nThis option is only supported for image creation" } else { "" };
        return Err(Failure::new(format!("Invalid parameter '{key}'{hint}")));
    }
    let flag = |key: &str| options.get(key).map(|value| on_off(key, value).map_err(Failure::new)).transpose();
    let version = match options.get("compat") {
        None | Some("") => None,
        Some("0.10" | "v2") => Some(2),
        Some("1.1" | "v3") => Some(3),
        Some(other) => return Err(Failure::new(format!("Unknown compatibility level {other}"))),
    };
    let refcount_order = match options.get("refcount_bits").map(|text| number("refcount_bits", text)).transpose()? {
        None => None,
        Some(bits) if bits <= 64 && bits.is_power_of_two() => Some(bits.trailing_zeros()),
        Some(_) => {
            return Err(Failure::new("Refcount width must be a power of two and may not exceed 64 bits"));
        }
    };
    let size = match options.get("size").map(|text| (text, parse_size(text, 1))) {
        None | Some((_, Ok(0))) => None,
        Some((_, Ok(size))) => Some(size),
        Some((text, Err(SizeError::TooLarge))) => {
            return Err(Failure::new(format!("Value '{text}' is out of range for parameter 'size'")));
        }
        Some((_, Err(_))) => return Err(Failure::new(super::resize::SIZE_EXPECTED)),
    };
    Ok(AmendOptions {
        version,
        refcount_order,
        lazy_refcounts: flag("lazy_refcounts")?,
        size,
        data_file: options.get("data_file").map(|name| name.as_bytes().to_vec()),
        data_file_raw: flag("data_file_raw")?,
        backing_file: options.get("backing_file").map(|name| name.as_bytes().to_vec()),
        backing_format: options.get("backing_fmt").map(str::to_string),
        keys: keys(options, cx, force)?,
    })
}

fn keys(options: &Options, cx: &Context, force: bool) -> Result<Option<KeyChange>, Failure> {
    if !options.iter().any(|(key, _)| key.starts_with("encrypt.")) {
        return Ok(None);
    }
    let activate = match options.get("encrypt.state") {
        Some("active") => true,
        Some("inactive") => false,
        Some(other) => {
            return Err(Failure::new(format!("Parameter 'encrypt.state' does not accept value '{other}'")));
        }
        None => return Err(Failure::new("Parameter 'encrypt.state' is missing")),
    };
    let secret = |key: &str| -> Result<Option<Secret>, Failure> {
        let Some(id) = options.get(key) else { return Ok(None) };
        match cx.secrets.get(id).map_err(Failure::new)? {
            SecretSource::Known(secret) => Ok(Some(secret)),
            SecretSource::File(_) | SecretSource::Descriptor(_) => {
                Err(Failure::new(format!("No secret with id '{id}'")))
            }
        }
    };
    let numbered = |key: &str| options.get(key).map(|text| number(key, text)).transpose();
    Ok(Some(KeyChange {
        activate,
        slot: numbered("encrypt.keyslot")?.map(|slot| usize::try_from(slot).unwrap_or(usize::MAX)),
        old_secret: secret("encrypt.old-secret")?,
        new_secret: secret("encrypt.new-secret")?,
        iter_time: numbered("encrypt.iter-time")?.map(Duration::from_millis),
        force,
    }))
}

fn number(key: &str, text: &str) -> Result<u64, Failure> {
    text.parse().map_err(|_| Failure::new(format!("Parameter '{key}' expects a number")))
}
