//! `dd`: copies a part of a disk to a new image, on the command line of the system's dd.

use clap::Parser;
use cowhand_block::DiskSpec;
use cowhand_block::bytes::{ByteRequest, Memory};
use cowhand_block::io::Buffer;

use super::arguments::ImageArgs;
use super::bench::number;
use super::context::is_part_of;
use super::create::make_to_fill;
use super::create_options::{CreateOptions, creatable};
use super::options::Options;
use super::{Context, Failure, How};

/// The most bytes that are read and written at once, however large the blocks are.
const PIECE: u64 = 2 << 20;

/// Copies a part of a disk to a new image
#[derive(Parser)]
#[command(after_help = "\
Example:
  cowhand img dd -f qcow2 -O raw bs=1M skip=1 count=10 if=disk.qcow2 of=part.raw")]
pub(super) struct Args {
    #[command(flatten)]
    image: ImageArgs,
    /// The output's format
    #[arg(short = 'O', long, value_name = "FORMAT", default_value = "raw")]
    output_format: String,
    /// Takes no locks: somebody else may be writing the input
    #[arg(short = 'U', long)]
    force_share: bool,
    /// if=INPUT of=OUTPUT [bs=SIZE] (512) [count=BLOCKS] [skip=BLOCKS]; what is skipped is part of the count
    #[arg(value_name = "OPERAND")]
    operands: Vec<String>,
}

/// What the operands say.
#[derive(Debug, PartialEq, Eq)]
struct Operands {
    input: String,
    output: String,
    block: u64,
    count: Option<u64>,
    skip: u64,
}

impl Operands {
    fn parse(words: &[String]) -> Result<Self, Failure> {
        let (mut input, mut output, mut block, mut count, mut skip) = (None, None, 512, None, 0);
        for word in words {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            match name {
                "if" => input = Some(value.to_string()),
                "of" => output = Some(value.to_string()),
                "bs" => block = number(value, "bs", 1, i32::MAX as u64)?,
                "count" => count = Some(number(value, "count", 0, i64::MAX as u64)?),
                "skip" => skip = number(value, "skip", 0, i64::MAX as u64)?,
                _ => return Err(Failure::new(format!("unrecognized operand {name}"))),
            }
        }
        let (Some(input), Some(output)) = (input, output) else {
            return Err(Failure::new("Must specify both input and output files"));
        };
        Ok(Self { input, output, block, count, skip })
    }
}

pub(super) fn run(args: &Args, cx: &Context) -> Result<u8, Failure> {
    let operands = Operands::parse(&args.operands)?;
    cx.take_objects(&args.image.object)?;
    if args.image.image_opts && args.image.format.is_some() {
        return Err(Failure::new("--image-opts and --format are mutually exclusive"));
    }
    let how = How { force_share: args.force_share, ..args.image.how() };
    let input = cx.open(&operands.input, &how)?;
    let format = creatable(&args.output_format).map_err(|e| {
        // Without the name, as QEMU has it here.
        Failure::new(if e.starts_with("Unknown file format") { "Unknown file format".into() } else { e })
    })?;
    // As in QEMU, what is skipped counts too.
    let end = operands.count.map_or(input.size(), |count| count.saturating_mul(operands.block).min(input.size()));
    let start = operands.skip.saturating_mul(operands.block);
    let size = end.saturating_sub(start);
    let output = &operands.output;
    let failed = |message: String| Failure::new(format!("{output}: error while creating output image: {message}"));
    if is_part_of(output, &input) {
        return Err(failed("it is a file of the input, whose content would be lost".into()));
    }
    let options = CreateOptions::new(format, &Options::default()).map_err(failed)?;
    let whole_size = make_to_fill(&options, size, output, cx).map_err(failed)?;
    let how = How { format: Some(format.name()), write: true, ..How::default() };
    let spec = DiskSpec { unfinished: Some(whole_size), ..cx.spec(output, &how)? };
    let target = cx.open_spec(output, &spec)?;
    if start > end {
        cx.error(&format!("{}: cannot skip to specified offset", operands.input));
    }
    let copied = copy(&input, &target, start, size, operands.block);
    if let Err(failure) = copied {
        drop(target);
        super::convert::remove_unfinished(output, format, cx);
        return Err(failure);
    }
    target.finish_filling().and_then(|()| target.close()).map_err(|e| Failure::new(e.reason()))?;
    Ok(0)
}

type Disk = std::sync::Arc<cowhand_block::Disk>;

/// Copies block after block, zeros too.
fn copy(input: &Disk, target: &Disk, start: u64, size: u64, block: u64) -> Result<(), Failure> {
    let in_words = |e: cowhand_block::Error| Failure::new(e.reason());
    let (mut from, mut into) = (input.byte_queue().map_err(in_words)?, target.byte_queue().map_err(in_words)?);
    // Small blocks are joined: nobody sees how the reads were cut.
    let piece = if block >= PIECE { PIECE } else { PIECE - PIECE % block };
    let mut done = 0;
    while done < size {
        let len = (size - done).min(piece);
        let memory = Memory::new(Buffer::zeroed(len as usize));
        let (read, memory) = from.run(ByteRequest::Read { offset: start + done, memory });
        read.map_err(|e| Failure::new(format!("error while reading from input image file: {}", e.strerror())))?;
        let Some(memory) = memory else { return Err(Failure::new("a read did not give its memory back")) };
        let (written, _) = into.run(ByteRequest::Write { offset: done, memory, durable: false });
        written.map_err(|e| Failure::new(format!("error while writing to output image file: {}", e.strerror())))?;
        done += len;
    }
    Ok(())
}
