//! One queue of the device: what the front-end has said of it, and the thread that serves it while it may run.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use cowhand_virtio::blk::{BlockSettings, BlockWorker, DiskBackend, LONGEST_PATIENCE, WorkerParts};
use cowhand_virtio::{ActiveQueue, Interrupt, Memory};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use vhost::vhost_user::{Error, Result};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::regions::Regions;

/// The most entries that a ring may have.
pub const MAX_SIZE: u16 = 1024;

/// The eventfd by which the front-end hears of completions; one that did not give any looks by itself.
struct Call(Option<EventFd>);

impl Interrupt for Call {
    fn signal_queue(&self, _queue: u16) {
        if let Some(Err(error)) = self.0.as_ref().map(|call| call.write(1)) {
            tracing::error!("cannot signal the front-end: {error}");
        }
    }

    fn signal_config(&self) {}

    fn signal_needs_reset(&self) {
        tracing::error!("a queue is of no use any more");
    }
}

/// What a worker needs besides its ring.
#[derive(Clone)]
pub struct Shared {
    pub backend: Arc<DiskBackend>,
    pub settings: Arc<BlockSettings>,
}

struct Running {
    stop: EventFd,
    thread: JoinHandle<ActiveQueue>,
}

/// A queue, running or not.
pub struct Ring {
    index: u16,
    shared: Shared,
    queue: Queue,
    /// Addresses of the front-end: descriptors, available ring, used ring.
    addresses: Option<[u64; 3]>,
    enabled: bool,
    kick: Option<EventFd>,
    call: Option<EventFd>,
    running: Option<Running>,
}

impl Ring {
    pub fn new(index: u16, shared: Shared) -> Result<Self> {
        let queue = Queue::new(MAX_SIZE).map_err(|_| Error::BackendInternalError)?;
        Ok(Self { index, shared, queue, addresses: None, enabled: false, kick: None, call: None, running: None })
    }

    pub fn set_size(&mut self, size: u32) -> Result<()> {
        let size = u16::try_from(size).ok().filter(|size| size.is_power_of_two() && *size <= MAX_SIZE);
        self.stopped()?.set_size(size.ok_or(Error::InvalidParam)?);
        Ok(())
    }

    pub fn set_base(&mut self, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        let queue = self.stopped()?;
        queue.set_next_avail(base);
        queue.set_next_used(base);
        Ok(())
    }

    pub fn set_addresses(&mut self, descriptors: u64, available: u64, used: u64) -> Result<()> {
        self.stopped()?;
        self.addresses = Some([descriptors, available, used]);
        Ok(())
    }

    pub fn set_event_idx(&mut self, enabled: bool) -> Result<()> {
        self.stopped()?.set_event_idx(enabled);
        Ok(())
    }

    pub fn set_kick(&mut self, file: Option<File>) -> Result<()> {
        self.stopped()?;
        if let Some(file) = &file {
            // Else a worker that is woken without need would sleep in the read.
            let flags = fcntl_getfl(file).map_err(|error| Error::ReqHandlerError(error.into()))?;
            fcntl_setfl(file, flags | OFlags::NONBLOCK).map_err(|error| Error::ReqHandlerError(error.into()))?;
        }
        self.kick = file.map(eventfd);
        Ok(())
    }

    /// May come while the ring runs; then it goes on with the new one.
    pub fn set_call(&mut self, file: Option<File>, regions: &Regions) -> Result<()> {
        self.stop()?;
        self.call = file.map(eventfd);
        self.start(regions)
    }

    pub fn set_enabled(&mut self, enabled: bool, regions: &Regions) -> Result<()> {
        self.enabled = enabled;
        if enabled { self.start(regions) } else { self.stop() }
    }

    /// Starts the worker if all that it needs is there.
    pub fn start(&mut self, regions: &Regions) -> Result<()> {
        let (Some(addresses), Some(kick)) = (self.addresses, &self.kick) else { return Ok(()) };
        if !self.enabled || self.running.is_some() {
            return Ok(());
        }
        let kick = kick.try_clone().map_err(Error::ReqHandlerError)?;
        let call = self.call.as_ref().map(EventFd::try_clone).transpose().map_err(Error::ReqHandlerError)?;
        let memory = regions.memory();
        self.place(addresses.map(|address| regions.translate(address)), &memory)?;
        self.running = Some(self.spawn(kick, call, memory).map_err(Error::ReqHandlerError)?);
        Ok(())
    }

    fn place(&mut self, [descriptors, available, used]: [Result<u64>; 3], memory: &Memory) -> Result<()> {
        use vm_memory::GuestAddressSpace;
        let halves = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
        let (low, high) = halves(descriptors?);
        self.queue.set_desc_table_address(low, high);
        let (low, high) = halves(available?);
        self.queue.set_avail_ring_address(low, high);
        let (low, high) = halves(used?);
        self.queue.set_used_ring_address(low, high);
        self.queue.set_ready(true);
        if self.queue.is_valid(&*memory.memory()) { Ok(()) } else { Err(Error::InvalidParam) }
    }

    fn spawn(&mut self, kick: EventFd, call: Option<EventFd>, memory: Memory) -> io::Result<Running> {
        // What was made available before we listened has been kicked already, or never will be: look at once.
        kick.write(1)?;
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let unused = Queue::new(MAX_SIZE).map_err(io::Error::other)?;
        let queue = std::mem::replace(&mut self.queue, unused);
        let worker = BlockWorker::new(WorkerParts {
            queue: ActiveQueue { index: self.index, queue, kick },
            stop: stop.try_clone()?,
            memory,
            interrupt: Arc::new(Call(call)),
            backend: self.shared.backend.clone(),
            settings: self.shared.settings.clone(),
            inflight: None,
            dirty: None,
            patience: LONGEST_PATIENCE,
        });
        let name = format!("queue-{}", self.index);
        let thread = std::thread::Builder::new().name(name).spawn(move || worker.run())?;
        Ok(Running { stop, thread })
    }

    /// Waits until what was taken from the ring has completed, and ends the worker.
    pub fn stop(&mut self) -> Result<()> {
        if let Some(running) = self.running.take() {
            running.stop.write(1).map_err(Error::ReqHandlerError)?;
            self.queue = running.thread.join().map_err(|_| Error::BackendInternalError)?.queue;
        }
        Ok(())
    }

    /// Ends the worker; what the ring's next available entry would have been.
    pub fn take_base(&mut self) -> Result<u16> {
        self.stop()?;
        self.kick = None;
        self.call = None;
        Ok(self.queue.next_avail())
    }

    /// The queue, which a running worker would have.
    fn stopped(&mut self) -> Result<&mut Queue> {
        if self.running.is_some() {
            return Err(Error::InvalidOperation("the ring is running"));
        }
        Ok(&mut self.queue)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::error!("cannot stop a queue: {error}");
        }
    }
}

/// The front-end's descriptor as an eventfd.
fn eventfd(file: File) -> EventFd {
    // SAFETY: the descriptor is open and, by `into_raw_fd`, nobody else's.
    unsafe { EventFd::from_raw_fd(file.into_raw_fd()) }
}
