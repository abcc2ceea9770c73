//! One queue of the device (section "Ring states"): what the front-end has said of it, and the worker that serves it while it is started
//! and enabled.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use cowhand_block::SharedWords;
use cowhand_virtio::blk::{BlockBackend, BlockSettings, BlockWorker, Inflight, InflightQueue, WorkerParts};
use cowhand_virtio::{ActiveQueue, DirtyLog, DirtyMarks, Interrupt};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::{Refusal, refuse};
use crate::regions::Regions;

/// The most entries that a split ring may have (virtio 1.2, sect. 2.7).
pub(crate) const MAX_SIZE: u16 = 32768;

/// The eventfds by which the front-end hears of a ring; one that gave none looks by itself. They may be replaced while the ring runs.
#[derive(Default)]
struct Bells {
    call: Mutex<Option<EventFd>>,
    err: Mutex<Option<EventFd>>,
}

impl Bells {
    fn ring(bell: &Mutex<Option<EventFd>>) {
        let bell = bell.lock().unwrap_or_else(PoisonError::into_inner);
        // An eventfd that nobody reads is full at last: then it has been rung all the same.
        if let Some(Err(error)) = bell.as_ref().map(|bell| bell.write(1))
            && error.kind() != io::ErrorKind::WouldBlock
        {
            tracing::error!("the front-end cannot be signalled: {error}");
        }
    }

    fn replace(bell: &Mutex<Option<EventFd>>, new: Option<EventFd>) {
        *bell.lock().unwrap_or_else(PoisonError::into_inner) = new;
    }
}

impl Interrupt for Bells {
    fn signal_queue(&self, _queue: u16) {
        Self::ring(&self.call);
    }

    /// Workers have nothing to say of the configuration.
    fn signal_config(&self) {}

    fn signal_needs_reset(&self) {
        Self::ring(&self.err);
    }
}

/// What a worker is given besides what the front-end says of its ring.
pub(crate) struct Start<'a> {
    pub regions: &'a Regions,
    pub backend: Arc<dyn BlockBackend>,
    pub settings: Arc<BlockSettings>,
    /// Where the ring's in-flight records lie, if they are kept, and for rings of which size.
    pub records: Option<(SharedWords, usize, u16)>,
    /// What marks the guest's pages that are written, during a migration.
    pub log: Option<Arc<dyn DirtyLog>>,
    pub patience: Duration,
    /// The disk's name, for the thread's.
    pub id: &'a str,
}

/// Where the front-end has the parts of a ring, in its own addresses, and where the guest has the used ring for the dirty log.
#[derive(Clone, Copy)]
pub(crate) struct Addresses {
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    /// None: the used ring is not logged.
    pub used_log: Option<GuestAddress>,
}

struct Running {
    stop: EventFd,
    thread: JoinHandle<ActiveQueue>,
}

/// A queue, running or not.
pub(crate) struct Ring {
    index: u16,
    queue: Queue,
    addresses: Option<Addresses>,
    enabled: bool,
    kick: Option<EventFd>,
    bells: Arc<Bells>,
    running: Option<Running>,
}

impl Ring {
    pub(crate) fn new(index: u16) -> Result<Self, Refusal> {
        Ok(Self {
            index,
            queue: new_queue()?,
            addresses: None,
            enabled: false,
            kick: None,
            bells: Arc::default(),
            running: None,
        })
    }

    pub(crate) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Whether the front-end has said all that the worker needs.
    pub(crate) fn is_ready(&self) -> bool {
        self.enabled && self.kick.is_some() && self.addresses.is_some()
    }

    pub(crate) fn set_size(&mut self, size: u32) -> Result<(), Refusal> {
        let entries = u16::try_from(size).ok().filter(|size| size.is_power_of_two() && *size <= MAX_SIZE);
        let Some(entries) = entries else { return refuse(format!("a ring cannot have {size} entries")) };
        self.stopped()?.set_size(entries);
        Ok(())
    }

    pub(crate) fn set_base(&mut self, base: u32) -> Result<(), Refusal> {
        let Ok(base) = u16::try_from(base) else { return refuse(format!("a split ring cannot begin at {base}")) };
        let queue = self.stopped()?;
        queue.set_next_avail(base);
        queue.set_next_used(base);
        Ok(())
    }

    pub(crate) fn set_addresses(&mut self, addresses: Addresses) -> Result<(), Refusal> {
        self.stopped()?;
        self.addresses = Some(addresses);
        Ok(())
    }

    pub(crate) fn set_event_idx(&mut self, enabled: bool) -> Result<(), Refusal> {
        self.stopped()?.set_event_idx(enabled);
        Ok(())
    }

    pub(crate) fn set_kick(&mut self, file: Option<File>) -> Result<(), Refusal> {
        self.stopped()?;
        let Some(file) = file else {
            // It would have us look at the ring all the time, for ever.
            return refuse("a ring without an eventfd for its kicks is not served".into());
        };
        self.kick = Some(eventfd(file)?);
        Ok(())
    }

    /// May come while the ring runs.
    pub(crate) fn set_call(&mut self, file: Option<File>) -> Result<(), Refusal> {
        Bells::replace(&self.bells.call, file.map(eventfd).transpose()?);
        // What has completed before, here or in a process that died, may have rung a bell that nobody hears. One ring too many
        // does no harm.
        Bells::ring(&self.bells.call);
        Ok(())
    }

    /// May come while the ring runs.
    pub(crate) fn set_err(&mut self, file: Option<File>) -> Result<(), Refusal> {
        Bells::replace(&self.bells.err, file.map(eventfd).transpose()?);
        Ok(())
    }

    pub(crate) fn set_enabled(&mut self, enabled: bool) {
        self.enabled = enabled;
    }

    /// Starts the worker. The ring is ready, and does not run.
    pub(crate) fn start(&mut self, start: Start<'_>) -> Result<(), Refusal> {
        let (Some(addresses), Some(kick)) = (self.addresses, self.kick.as_ref().map(EventFd::try_clone)) else {
            return refuse("a ring that is not ready cannot start".into());
        };
        let kick = kick?;
        let memory = start.regions.snapshot();
        self.place(addresses, start.regions, &memory)?;
        // What was made available before we listened has been kicked already, or never will be: look at once.
        kick.write(1)?;
        let inflight = start.records.map(|records| self.recover(records, &memory)).transpose()?;
        let stop = EventFd::new(EFD_NONBLOCK).map_err(Refusal::from)?;
        let parts = WorkerParts {
            queue: ActiveQueue { index: self.index, queue: std::mem::replace(&mut self.queue, new_queue()?), kick },
            stop: stop.try_clone()?,
            memory: start.regions.memory().clone(),
            interrupt: self.bells.clone(),
            backend: start.backend,
            settings: start.settings,
            inflight,
            dirty: start.log.map(|log| DirtyMarks { log, used_ring: addresses.used_log }),
            patience: start.patience,
        };
        let worker = BlockWorker::new(parts);
        let name = format!("{}-q{}", start.id, self.index);
        let thread = std::thread::Builder::new().name(name).spawn(move || worker.run())?;
        self.running = Some(Running { stop, thread });
        Ok(())
    }

    /// Puts the queue where the front-end has it.
    fn place(&mut self, at: Addresses, regions: &Regions, memory: &GuestMemoryMmap) -> Result<(), Refusal> {
        let halves = |user| {
            let GuestAddress(address) = regions.translate(user)?;
            Ok::<_, Refusal>((Some(address as u32), Some((address >> 32) as u32)))
        };
        let (low, high) = halves(at.descriptors)?;
        self.queue.set_desc_table_address(low, high);
        let (low, high) = halves(at.available)?;
        self.queue.set_avail_ring_address(low, high);
        let (low, high) = halves(at.used)?;
        self.queue.set_used_ring_address(low, high);
        self.queue.set_ready(true);
        if self.queue.is_valid(memory) {
            return Ok(());
        }
        refuse(format!("ring {} does not lie in the front-end's memory as a whole, or not aligned", self.index))
    }

    /// Finds out what a process before us has taken from the ring and not given back.
    fn recover(
        &mut self,
        (words, at, size): (SharedWords, usize, u16),
        memory: &GuestMemoryMmap,
    ) -> Result<Inflight, Refusal> {
        if size < self.queue.size() {
            return refuse(format!("ring {} has {} entries, its records {size}", self.index, self.queue.size()));
        }
        let wrong = |error: &dyn std::fmt::Display| Refusal(format!("ring {}: {error}", self.index));
        let used = self.queue.used_idx(memory, std::sync::atomic::Ordering::Acquire).map_err(|e| wrong(&e))?;
        let mut records = InflightQueue::new(words, at, size).map_err(|e| wrong(&e))?;
        let resubmit = records.recover(used.0).map_err(|e| wrong(&e))?;
        if !resubmit.is_empty() {
            tracing::info!("ring {}: {} requests were in flight", self.index, resubmit.len());
        }
        // Whatever the front-end takes for the base: what was taken and not given back lies between the two.
        self.queue.set_next_used(used.0);
        self.queue.set_next_avail(used.0.wrapping_add(resubmit.len() as u16));
        Ok(Inflight { records, resubmit })
    }

    /// Waits until what was taken from the ring has completed, and ends the worker. The ring can be started again as it stands.
    pub(crate) fn stop(&mut self) -> Result<(), Refusal> {
        if let Some(running) = self.running.take() {
            running.stop.write(1)?;
            let Ok(active) = running.thread.join() else { return refuse("a ring's worker has panicked".into()) };
            self.queue = active.queue;
        }
        Ok(())
    }

    /// Ends the worker, and forgets the kicks: the ring is stopped. Gives the ring's next available entry.
    pub(crate) fn take_base(&mut self) -> Result<u16, Refusal> {
        self.stop()?;
        self.kick = None;
        Ok(self.queue.next_avail())
    }

    /// Ends the worker, and forgets everything.
    pub(crate) fn reset(&mut self) -> Result<(), Refusal> {
        self.stop()?;
        *self = Self::new(self.index)?;
        Ok(())
    }

    /// The queue, which a running worker would have.
    fn stopped(&mut self) -> Result<&mut Queue, Refusal> {
        if self.running.is_some() {
            return refuse(format!("ring {} is running", self.index));
        }
        Ok(&mut self.queue)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::error!("{error}");
        }
    }
}

fn new_queue() -> Result<Queue, Refusal> {
    Queue::new(MAX_SIZE).map_err(|error| Refusal(error.to_string()))
}

/// The front-end's descriptor as an eventfd that never makes us wait.
fn eventfd(file: File) -> Result<EventFd, Refusal> {
    let flags = fcntl_getfl(&file)?;
    fcntl_setfl(&file, flags | OFlags::NONBLOCK)?;
    // SAFETY: the descriptor is open and, by `into_raw_fd`, nobody else's.
    Ok(unsafe { EventFd::from_raw_fd(file.into_raw_fd()) })
}
