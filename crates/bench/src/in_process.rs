//! The loads on the engine's own queues, without a socket: what the engine alone can do.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use cowhand_block::io::IoSeg;
use cowhand_block::{Disk, DiskQueue, DiskSpec, Event, OpenPolicy, Request, RequestQueue, Wait};

use crate::clock::ProcessClock;
use crate::drive::{Count, DriveArgs, Target, drive, measure};
use crate::load::{Ask, Load};
use crate::memory::Arena;

/// Loads the engine without a socket
#[derive(clap::Args)]
pub struct Args {
    /// The disk: path=P,format=F[,key=value]...
    #[arg(long)]
    disk: String,
    /// Files that image headers name may lie below this directory
    #[arg(long)]
    allow_dir: Vec<PathBuf>,
    #[command(flatten)]
    drive: DriveArgs,
}

/// Measures, and prints one line of JSON.
///
/// # Errors
/// When the disk cannot be opened, or a request fails.
pub fn run(args: &Args) -> Result<()> {
    let policy = OpenPolicy { allow_dirs: args.allow_dir.clone(), ..OpenPolicy::host() };
    let disk = Disk::open(&DiskSpec::parse(&args.disk)?, &policy).map_err(|error| anyhow!("{error}"))?;
    let depth = args.drive.depth;
    let block = usize::try_from(args.drive.load.block)?;
    let arenas: Vec<Arena> =
        (0..args.drive.queues).map(|_| Arena::new(depth, block)).collect::<Result<_, _>>().context("buffers")?;
    let phase = |loads: &mut [Load], time: Option<Duration>| in_threads(&disk, &arenas, loads, depth, time);
    let measured = measure(&args.drive, disk.size(), ProcessClock::own(), phase)?;
    disk.close().map_err(|error| anyhow!("{error}"))?;
    println!("{}", measured.json());
    Ok(())
}

/// Runs each load on a thread and a queue of its own.
fn in_threads(
    disk: &Arc<Disk>,
    arenas: &[Arena],
    loads: &mut [Load],
    depth: usize,
    time: Option<Duration>,
) -> Result<Count> {
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for (load, arena) in loads.iter_mut().zip(arenas) {
            threads.push(scope.spawn(move || -> Result<Count> {
                let queue = disk.queue().map_err(|error| anyhow!("{error}"))?;
                let mut target = EngineQueue { queue, arena, spare: Vec::new(), events: Vec::new() };
                drive(&mut target, load, depth, time)
            }));
        }
        sum(threads)
    })
}

/// Waits for all threads, and adds up what they counted.
pub fn sum(threads: Vec<std::thread::ScopedJoinHandle<'_, Result<Count>>>) -> Result<Count> {
    let mut all = Count::default();
    for thread in threads {
        let count = thread.join().map_err(|_| anyhow!("a thread has panicked"))??;
        all.requests += count.requests;
        all.flushes += count.flushes;
    }
    Ok(all)
}

struct EngineQueue<'a> {
    /// Before `arena`'s owner by the borrow: what is in flight ends when the queue is dropped.
    queue: DiskQueue,
    arena: &'a Arena,
    spare: Vec<Vec<IoSeg>>,
    events: Vec<Event>,
}

impl EngineQueue<'_> {
    fn segments(&mut self, slot: usize) -> Vec<IoSeg> {
        let mut data = self.spare.pop().unwrap_or_default();
        // SAFETY: the buffer is mapped as long as the arena lives, which the queue cannot outlive, and the queue waits for
        // what is in flight when it is dropped; nobody holds a reference into the arena.
        data.push(unsafe { IoSeg::new(self.arena.address(slot), self.arena.buffer_len()) });
        data
    }
}

impl Target for EngineQueue<'_> {
    fn submit(&mut self, slot: usize, ask: Ask) -> Result<()> {
        let request = match ask {
            Ask::Read(offset) => Request::Read { offset, data: self.segments(slot) },
            Ask::Write(offset) => Request::Write { offset, data: self.segments(slot) },
            Ask::Flush => Request::Flush,
        };
        self.queue.submit(slot as u64, request);
        Ok(())
    }

    fn complete(&mut self, done: &mut Vec<usize>) -> Result<()> {
        self.queue.wait(Wait::Block, &mut self.events)?;
        for event in self.events.drain(..) {
            let Event::Done { tag, result, mut data } = event else { continue };
            result.map_err(|error| anyhow!("{error}"))?;
            if data.capacity() > 0 {
                data.clear();
                self.spare.push(data);
            }
            done.push(tag as usize);
        }
        Ok(())
    }
}
