//! `bench`: how fast requests of one kind are served.

use std::time::Instant;

use clap::Parser;
use cowhand_block::bytes::{ByteRequest, Memory};
use cowhand_block::io::Buffer;

use super::context::cache_mode;
use super::units::{SizeError, parse_size};
use super::{Context, Failure, How};

/// Sends requests to a disk, several at once, and says how long that took
#[derive(Parser)]
#[command(after_help = "\
Example:
  cowhand img bench -f qcow2 -c 100000 -d 32 -s 4k disk.qcow2")]
pub(super) struct Args {
    /// The image's name is a list of options (driver=qcow2,file.filename=…)
    #[arg(long)]
    image_opts: bool,
    /// The image's format
    #[arg(short = 'f', long, value_name = "FORMAT")]
    format: Option<String>,
    /// How the image is opened: writeback, none, unsafe, …
    #[arg(short = 't', long, value_name = "MODE", default_value = "writeback")]
    cache: String,
    /// How many requests
    #[arg(short = 'c', long, value_name = "COUNT", default_value = "75000")]
    count: String,
    /// How many of them at once
    #[arg(short = 'd', long, value_name = "DEPTH", default_value = "64")]
    depth: String,
    /// Where the first request begins
    #[arg(short = 'o', long, value_name = "OFFSET", default_value = "0")]
    offset: String,
    /// How many bytes each request has
    #[arg(short = 's', long, value_name = "SIZE", default_value = "4096")]
    buffer_size: String,
    /// How far behind one another requests begin; as many bytes as they have, if not given
    #[arg(short = 'S', long, value_name = "SIZE")]
    step_size: Option<String>,
    /// The host's interface: threads, native or io_uring. cowhand uses io_uring, or threads where that is refused, whatever is given
    #[arg(short = 'i', long, value_name = "AIO")]
    aio: Option<String>,
    /// The same as -i native, which needs -t none
    #[arg(short = 'n', long)]
    native: bool,
    /// Writes, and reads not
    #[arg(short = 'w', long)]
    write: bool,
    /// The byte that is written
    #[arg(long, value_name = "BYTE", default_value = "0")]
    pattern: String,
    /// Flushes after so many writes
    #[arg(long, value_name = "COUNT")]
    flush_interval: Option<String>,
    /// Flushes while writes are under way, without waiting for them
    #[arg(long)]
    no_drain: bool,
    /// Says nothing but the result
    #[arg(short = 'q', long)]
    quiet: bool,
    /// Takes no locks: somebody else may be using the image
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The image
    #[arg(value_name = "FILE")]
    files: Vec<String>,
}

/// What is to be done.
struct Plan {
    count: u64,
    depth: u64,
    offset: u64,
    size: u64,
    step: u64,
    write: bool,
    pattern: u8,
    flush_interval: u64,
    drain: bool,
}

impl Plan {
    fn new(args: &Args) -> Result<Self, Failure> {
        let int = i32::MAX as u64;
        let size = number(&args.buffer_size, "buffer size", 1, int)?;
        let plan = Self {
            count: number(&args.count, "request count", 1, int)?,
            depth: number(&args.depth, "queue depth", 1, int)?,
            offset: number(&args.offset, "offset", 0, i64::MAX as u64)?,
            size,
            step: match &args.step_size {
                Some(step) => number(step, "step size", 0, int)?,
                None => 0,
            },
            write: args.write,
            pattern: number(&args.pattern, "pattern byte", 0, 255)? as u8,
            flush_interval: match &args.flush_interval {
                Some(interval) => number(interval, "flush interval", 0, int)?,
                None => 0,
            },
            drain: !args.no_drain,
        };
        let plan = Self { step: if plan.step == 0 { size } else { plan.step }, ..plan };
        if plan.flush_interval > 0 && !plan.write {
            return Err(Failure::new("--flush-interval is only available in write tests"));
        }
        if plan.flush_interval > 0 && plan.flush_interval < plan.depth {
            return Err(Failure::new("Flush interval can't be smaller than depth"));
        }
        Ok(plan)
    }

    fn kind(&self) -> &'static str {
        if self.write { "write" } else { "read" }
    }
}

/// A number of an option, from `least` to `most`.
pub(super) fn number(text: &str, what: &str, least: u64, most: u64) -> Result<u64, Failure> {
    let range = || Failure::new(format!("Invalid {what} specified. Must be between {least} and {most}."));
    match parse_size(text, 1) {
        Ok(number) if (least..=most).contains(&number) => Ok(number),
        Ok(_) | Err(SizeError::TooLarge) => Err(range()),
        Err(SizeError::Malformed) => Err(Failure::new(format!("Invalid {what} specified: '{text}'."))),
    }
}

pub(super) fn run(args: &Args, cx: &Context) -> Result<u8, Failure> {
    if let Some(aio) = args.aio.as_deref().filter(|aio| !matches!(*aio, "threads" | "native" | "io_uring")) {
        return Err(Failure::new(format!("Invalid aio option: {aio}")));
    }
    let plan = Plan::new(args)?;
    let cache = cache_mode(&args.cache, "").map_err(|_| Failure::new("Invalid cache mode"))?;
    let file = cx.only(&args.files, "bench")?;
    if (args.native || args.aio.as_deref() == Some("native")) && !cache.is_direct() {
        let reason = "aio=native was specified, but it requires cache.direct=on, which was not specified.";
        return Err(Context::cannot_open(file, reason));
    }
    if args.image_opts && args.format.is_some() {
        return Err(Failure::new("--image-opts and --format are mutually exclusive"));
    }
    let how = How {
        format: args.format.as_deref(),
        image_opts: args.image_opts,
        write: plan.write,
        force_share: args.force_share,
        cache,
        ..How::default()
    };
    let disk = cx.open(file, &how)?;
    println!(
        "Sending {} {} requests, {} bytes each, {} in parallel (starting at offset {}, step size {})",
        plan.count,
        plan.kind(),
        plan.size,
        plan.depth,
        plan.offset,
        plan.step
    );
    if plan.flush_interval > 0 {
        println!("Sending flush every {} requests", plan.flush_interval);
    }
    let seconds = bench(&plan, &disk)?;
    println!("Run completed in {seconds:3.3} seconds.");
    disk.close().map_err(|e| Failure::new(e.reason()))?;
    Ok(0)
}

/// Does it; how many seconds that took.
fn bench(plan: &Plan, disk: &std::sync::Arc<cowhand_block::Disk>) -> Result<f64, Failure> {
    let mut queue = disk.byte_queue().map_err(|e| Failure::new(e.reason()))?;
    // Bounded by the number of requests, which may be less than may be under way.
    let mut memories: Vec<Memory> = Vec::new();
    let memory = || {
        let mut buffer = Buffer::zeroed(plan.size as usize);
        buffer.fill(plan.pattern);
        Memory::new(buffer)
    };
    let size = disk.size();
    let mut offset = plan.offset;
    let (mut sent, mut flushing, mut since_flush) = (0, false, 0);
    let began = Instant::now();
    while sent < plan.count || queue.in_flight() > 0 {
        let due = plan.flush_interval > 0 && since_flush >= plan.flush_interval;
        if due && (!plan.drain || queue.in_flight() == 0) {
            queue.submit(0, ByteRequest::Flush);
            (flushing, since_flush) = (plan.drain, 0);
        }
        let blocked = flushing || (plan.drain && plan.flush_interval > 0 && since_flush >= plan.flush_interval);
        while !blocked && sent < plan.count && (queue.in_flight() as u64) < plan.depth {
            let memory = memories.pop().unwrap_or_else(memory);
            let request = match plan.write {
                true => ByteRequest::Write { offset, memory, durable: false },
                false => ByteRequest::Read { offset, memory },
            };
            queue.submit(1, request);
            offset += plan.step;
            // A request that reaches over the end fails, as in QEMU.
            offset = offset.checked_rem(size).unwrap_or(0);
            sent += 1;
            since_flush += 1;
            if plan.flush_interval > 0 && since_flush >= plan.flush_interval {
                break;
            }
        }
        queue.wait().map_err(|e| Failure::new(e.reason()))?;
        for done in queue.finished() {
            done.result.map_err(|e| Failure::new(format!("Failed request: {}", e.strerror())))?;
            flushing &= done.tag != 0;
            memories.extend(done.memory);
        }
    }
    Ok(began.elapsed().as_secs_f64())
}
