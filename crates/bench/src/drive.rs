//! Keeps a number of a load's requests in flight, and counts what completes: the same for a socket and in-process.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::clock::ProcessClock;
use crate::load::{Ask, Load, LoadArgs};

/// One queue to send requests to. Slots are numbers below the depth; each has a buffer of the load's block size.
pub trait Target {
    /// Takes a request into a free slot; it may be sent only with the next [`complete`](Self::complete).
    ///
    /// # Errors
    /// When it cannot be taken.
    fn submit(&mut self, slot: usize, ask: Ask) -> Result<()>;

    /// Sends what was taken, waits until something has completed, and appends the slots of all that has.
    ///
    /// # Errors
    /// When a request failed, or the queue did.
    fn complete(&mut self, done: &mut Vec<usize>) -> Result<()>;
}

/// What has completed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Reads and writes.
    pub requests: u64,
    /// Flushes.
    pub flushes: u64,
}

/// How a load is driven and for how long.
#[derive(Clone, Debug, clap::Args)]
pub struct DriveArgs {
    #[command(flatten)]
    pub load: LoadArgs,
    /// Requests in flight on each queue
    #[arg(long, default_value_t = 32)]
    pub depth: usize,
    /// Queues, each served by a thread
    #[arg(long, default_value_t = 1)]
    pub queues: u16,
    /// How long to measure; a load that is over earlier ends earlier
    #[arg(long, default_value_t = 3.0)]
    pub seconds: f64,
    /// How long the load runs before it is measured (never for --pattern scatter)
    #[arg(long, default_value_t = 0.5)]
    pub warm_up: f64,
    /// Before all else, read a block at each multiple of so many bytes
    #[arg(long)]
    pub touch: Option<u64>,
}

/// Runs `load` on `target` with `depth` requests in flight, until the load is over or `time` has passed; then waits for
/// what is in flight. A flush has the queue to itself, as after an application's fsync.
///
/// # Errors
/// At the first request that fails.
pub fn drive(target: &mut impl Target, load: &mut Load, depth: usize, time: Option<Duration>) -> Result<Count> {
    let end = time.map(|time| Instant::now() + time);
    let mut count = Count::default();
    let mut free: Vec<usize> = (0..depth).rev().collect();
    let mut done = Vec::with_capacity(depth);
    let mut next = load.next();
    loop {
        if end.is_some_and(|end| Instant::now() >= end) {
            next = None;
        }
        let mut flushing = false;
        while !flushing && let Some(ask) = next {
            // A flush is for what has completed: it waits for all, and all wait for it.
            flushing = ask == Ask::Flush;
            if flushing && free.len() < depth {
                flushing = false;
                break;
            }
            let Some(slot) = free.pop() else { break };
            target.submit(slot, ask)?;
            next = load.next();
        }
        if free.len() == depth {
            return Ok(count);
        }
        target.complete(&mut done)?;
        let counter = if flushing { &mut count.flushes } else { &mut count.requests };
        *counter += done.len() as u64;
        free.append(&mut done);
    }
}

/// Plays the phases of a measurement: touch, warm-up, and the one that counts. `phase` runs one load for each queue
/// side by side, for at most the given time. `clock` is that of the process which does the work.
///
/// # Errors
/// Whatever a phase says, and when the load does not fit a disk of `size` bytes.
pub fn measure(
    args: &DriveArgs,
    size: u64,
    clock: ProcessClock,
    mut phase: impl FnMut(&mut [Load], Option<Duration>) -> Result<Count>,
) -> Result<Measured> {
    let queues = u64::from(args.queues);
    let loads = |load: &LoadArgs| -> Result<Vec<Load>> {
        (0..queues).map(|queue| Ok(Load::new(load, size, queue, queues)?)).collect()
    };
    if let Some(stride) = args.touch {
        phase(&mut [Load::touch(args.load.block, size, stride)], None).context("touching the disk")?;
    }
    let mut measured = loads(&args.load)?;
    if args.load.pattern != crate::load::Pattern::Scatter && args.warm_up > 0.0 {
        let mut warm = loads(&LoadArgs { seed: !args.load.seed, requests: None, ..args.load.clone() })?;
        phase(&mut warm, Some(Duration::try_from_secs_f64(args.warm_up)?)).context("warming up")?;
    }
    let time = Duration::try_from_secs_f64(args.seconds)?;
    let (start, cpu) = (Instant::now(), clock.now()?);
    let count = phase(&mut measured, Some(time))?;
    Ok(Measured { count, time: start.elapsed(), cpu: clock.now()?.saturating_sub(cpu) })
}

/// What a measurement gave.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// What completed.
    pub count: Count,
    /// In this time.
    pub time: Duration,
    /// At the cost of this processor time.
    pub cpu: Duration,
}

impl Measured {
    /// As one line of JSON.
    #[must_use]
    pub fn json(&self) -> String {
        format!(
            r#"{{"requests": {}, "flushes": {}, "seconds": {:.6}, "cpu_seconds": {:.6}}}"#,
            self.count.requests,
            self.count.flushes,
            self.time.as_secs_f64(),
            self.cpu.as_secs_f64()
        )
    }
}

#[cfg(test)]
#[path = "drive_test.rs"]
mod tests;
