//! `map`: which file has which part of a disk, and where.

use std::io::Write;

use clap::Parser;
use cowhand_block::{Content, Extent};

use super::arguments::ImageArgs;
use super::tree::is_json;
use super::units::parse_size;
use super::{Context, Failure, How};

/// Shows which file has which part of a disk, and where
#[derive(Parser)]
#[command(after_help = "\
Example:
  cowhand img map -f qcow2 --output=json disk.qcow2")]
pub(super) struct Args {
    #[command(flatten)]
    image: ImageArgs,
    /// How it is shown: human or json
    #[arg(long, value_name = "FORM", default_value = "human")]
    output: String,
    /// Where on the disk to begin
    #[arg(short = 's', long, value_name = "OFFSET")]
    start_offset: Option<String>,
    /// How many bytes to show at most
    #[arg(short = 'l', long, value_name = "LENGTH")]
    max_length: Option<String>,
    /// Takes no locks: somebody else may be writing the image
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The image
    #[arg(value_name = "FILE")]
    files: Vec<String>,
}

pub(super) fn run(args: &Args, cx: &Context) -> Result<u8, Failure> {
    let json = is_json(Some(&args.output), "map", cx)?;
    let size = |text: &Option<String>, what: &str| match text {
        None => Ok(None),
        Some(text) => {
            parse_size(text, 1).map(Some).map_err(|_| Failure::new(format!("Invalid {what} specified: '{text}'.")))
        }
    };
    let start = size(&args.start_offset, "start offset")?.unwrap_or(0);
    let most = size(&args.max_length, "max length")?.unwrap_or(u64::MAX);
    let file = cx.only(&args.files, "map")?;
    cx.take_objects(&args.image.object)?;
    if args.image.image_opts && args.image.format.is_some() {
        return Err(Failure::new("--image-opts and --format are mutually exclusive"));
    }
    let how = How { force_share: args.force_share, ..args.image.how() };
    let disk = cx.open(file, &how)?;
    let end = disk.size().min(start.saturating_add(most));
    let files = disk.data_paths();
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    let mut shown = String::new();
    if json {
        shown.push('[');
    } else {
        shown.push_str(&format!("{:<16}{:<16}{:<16}File\n", "Offset", "Length", "Mapped to"));
    }
    let failed = |e: std::io::Error| Failure::new(format!("Could not write: {e}"));
    let mut first = true;
    for extent in disk.extents(start..end).map_err(|e| Failure::new(e.reason()))? {
        let extent = extent.map_err(|e| Failure::new(format!("Failed to read image metadata: {}", e.reason())))?;
        if json {
            if !std::mem::take(&mut first) {
                shown.push_str(",\n");
            }
            shown.push_str(&in_json(&extent));
        } else if extent.content == Content::Compressed || (extent.content == Content::Data && extent.place.is_none()) {
            out.write_all(shown.as_bytes()).and_then(|()| out.flush()).map_err(failed)?;
            return Err(Failure::new("File contains external, encrypted or compressed clusters."));
        } else if let (Content::Data, Some(place), false) = (extent.content, extent.place, extent.hole) {
            let length = extent.range.end - extent.range.start;
            let columns = [extent.range.start, length, place].map(hexadecimal);
            let name = files.get(extent.depth).map(|file| file.display().to_string()).unwrap_or_default();
            shown.push_str(&format!("{:<16}{:<16}{:<16}{name}\n", columns[0], columns[1], columns[2]));
        }
        out.write_all(shown.as_bytes()).map_err(failed)?;
        shown.clear();
    }
    if json {
        shown.push_str("]\n");
    }
    out.write_all(shown.as_bytes()).and_then(|()| out.flush()).map_err(failed)?;
    Ok(0)
}

/// As C's `%#x`, which gives zero no prefix.
fn hexadecimal(number: u64) -> String {
    if number == 0 { "0".into() } else { format!("{number:#x}") }
}

/// One line of JSON, without what separates it from the next.
fn in_json(extent: &Extent) -> String {
    let (depth, present) = (extent.depth, extent.content != Content::Nothing);
    let compressed = extent.content == Content::Compressed;
    let data = compressed || extent.content == Content::Data;
    let offset = extent.place.map(|place| format!(", \"offset\": {place}")).unwrap_or_default();
    format!(
        "{{ \"start\": {}, \"length\": {}, \"depth\": {depth}, \"present\": {present}, \"zero\": {}, \"data\": {data}, \
         \"compressed\": {compressed}{offset}}}",
        extent.range.start,
        extent.range.end - extent.range.start,
        !data || extent.hole,
    )
}
