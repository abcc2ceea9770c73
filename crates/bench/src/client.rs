//! A vhost-user-blk client, which does what a guest's driver does: notifications by event index in both directions, sleeping
//! while there is nothing to do. It does not know who serves.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkReqBuf,
    VirtioFeatureFlags, VirtioTransport,
};

use crate::clock::ProcessClock;
use crate::drive::{DriveArgs, Measured, Target, drive, measure};
use crate::in_process::sum;
use crate::load::{Ask, Load};
use crate::memory::Arena;
use crate::relay::Relay;

/// Descriptors of one request: header, data, status.
const DESCRIPTORS: usize = 3;

/// How a client waits for completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Waiting {
    /// Asleep, until the server signals: as a guest's driver does.
    Interrupt,
    /// Looking at the ring over and over, which leaves the server nobody to signal.
    Poll,
}

/// Loads a vhost-user-blk server
#[derive(clap::Args)]
pub struct Args {
    /// The server's socket
    #[arg(long)]
    socket: String,
    /// The server's process, whose processor time is counted
    #[arg(long)]
    server: i32,
    /// How completions are waited for
    #[arg(long, value_enum, default_value = "interrupt")]
    wait: Waiting,
    /// Keeps no memory for the server's records of requests in flight, also if it could make use of it
    #[arg(long)]
    no_inflight: bool,
    /// Stays connected, with nothing to do, until standard input ends; prints what that cost the server
    #[arg(long)]
    hold: bool,
    #[command(flatten)]
    drive: DriveArgs,
}

/// Measures, and prints one line of JSON; with `hold` a second one.
///
/// # Errors
/// When the server cannot be reached, lacks something, or fails a request.
pub fn run(args: &Args) -> Result<()> {
    let clock = ProcessClock::of(args.server).with_context(|| format!("process {}", args.server))?;
    let mut connection = Connection::open(&args.socket, &args.drive, args.wait, !args.no_inflight)?;
    println!("{}", load(&mut connection, clock, &args.drive)?.json());
    if args.hold {
        std::io::stdout().flush()?;
        let (start, cpu) = (Instant::now(), clock.now()?);
        std::io::stdin().lock().read_to_end(&mut Vec::new())?;
        let (held, cpu) = (start.elapsed().as_secs_f64(), clock.now()?.saturating_sub(cpu).as_secs_f64());
        println!(r#"{{"held_seconds": {held:.6}, "held_cpu_seconds": {cpu:.6}}}"#);
    }
    Ok(())
}

/// Loads the server behind a connection.
///
/// # Errors
/// As [`run`].
pub fn load(connection: &mut Connection, clock: ProcessClock, args: &DriveArgs) -> Result<Measured> {
    let size = connection.size;
    let phase = |loads: &mut [Load], time: Option<Duration>| {
        std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for (queue, load) in connection.queues.iter_mut().zip(loads) {
                threads.push(scope.spawn(move || drive(queue, load, args.depth, time)));
            }
            sum(threads)
        })
    };
    measure(args, size, clock, phase)
}

/// A server to whom queues are set up.
pub struct Connection {
    /// Before the transport, whose memory they lie in.
    pub queues: Vec<SocketQueue>,
    /// Bytes of the disk.
    pub size: u64,
    _transport: VhostUser<VirtioBlkConfig, VirtioBlkReqBuf>,
}

impl Connection {
    /// Connects, and sets up the queues; `inflight`: with memory for requests in flight, if the server offers that.
    ///
    /// # Errors
    /// When the server cannot be reached or lacks a feature.
    pub fn open(socket: &str, args: &DriveArgs, wait: Waiting, inflight: bool) -> Result<Self> {
        if inflight {
            let relay = Relay::new(Path::new(socket), args.queues).with_context(|| socket.to_owned())?;
            let between = relay.socket.to_str().context("a socket whose name is no text")?;
            return Self::set_up(between, args, wait);
        }
        Self::set_up(socket, args, wait)
    }

    fn set_up(socket: &str, args: &DriveArgs, wait: Waiting) -> Result<Self> {
        let wanted = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX;
        let of_disks = VirtioBlkFeatureFlags::MQ | VirtioBlkFeatureFlags::FLUSH;
        let mut transport: VhostUser<VirtioBlkConfig, VirtioBlkReqBuf> =
            VhostUser::new(socket, wanted.bits() | of_disks.bits()).with_context(|| socket.to_owned())?;
        let features = transport.get_features();
        ensure!(features & wanted.bits() == wanted.bits(), "the server lacks virtio 1 or the event index");
        let size = transport.get_config()?.capacity.to_native() * 512;

        ensure!(args.depth > 0 && args.queues > 0, "no queue, or nothing in flight");
        let queue_size = u16::try_from((args.depth * DESCRIPTORS).next_power_of_two().max(128))?;
        let queues = VirtioBlkQueue::setup_queues(&mut transport, args.queues.into(), queue_size)?;
        let mut connected = Vec::new();
        for (index, queue) in queues.into_iter().enumerate() {
            let arena = Arena::new(args.depth, usize::try_from(args.load.block)?).context("buffers")?;
            let (address, len, file) = arena.mapping();
            transport.map_mem_region(address, len, file.as_raw_fd(), 0)?;
            // Some servers make it non-blocking, for both of us; we sleep in a read.
            let call = transport.get_completion_fd(index);
            fcntl_setfl(call.as_fd(), fcntl_getfl(call.as_fd())? - OFlags::NONBLOCK)?;
            connected.push(SocketQueue { queue, kick: transport.get_submission_notifier(index), call, arena, wait });
        }
        Ok(Self { queues: connected, size, _transport: transport })
    }
}

/// One queue, for one thread.
pub struct SocketQueue {
    queue: VirtioBlkQueue<'static, usize>,
    kick: Box<dyn QueueNotifier>,
    call: Arc<EventFd>,
    /// The requests' data.
    pub arena: Arena,
    wait: Waiting,
}

impl SocketQueue {
    fn take(&mut self, done: &mut Vec<usize>) -> Result<()> {
        for completion in self.queue.completions() {
            if completion.ret != 0 {
                bail!("a request failed: {}", std::io::Error::from_raw_os_error(-completion.ret));
            }
            done.push(completion.context);
        }
        Ok(())
    }
}

impl Target for SocketQueue {
    fn submit(&mut self, slot: usize, ask: Ask) -> Result<()> {
        let (data, len) = (self.arena.address(slot), self.arena.buffer_len());
        match ask {
            // SAFETY: the buffer is shared with the server as long as the connection is; nobody holds a reference into it.
            Ask::Read(offset) => unsafe { self.queue.read_raw(offset, data, len, slot) }?,
            // SAFETY: as above.
            Ask::Write(offset) => unsafe { self.queue.write_raw(offset, data, len, slot) }?,
            Ask::Flush => self.queue.flush(slot)?,
        }
        Ok(())
    }

    fn complete(&mut self, done: &mut Vec<usize>) -> Result<()> {
        if self.queue.avail_notif_needed() {
            self.kick.notify()?;
        }
        self.take(done)?;
        while done.is_empty() {
            if self.wait == Waiting::Interrupt {
                // With the event index this asks for one interrupt, at the next completion, and (unlike `true`) for none after it
                // until the next time that there is nothing to do.
                self.queue.set_used_notif_enabled(false);
                if !self.queue.completions().has_next() {
                    self.call.read()?;
                }
            } else {
                std::hint::spin_loop();
            }
            self.take(done)?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "client_test.rs"]
mod tests;
