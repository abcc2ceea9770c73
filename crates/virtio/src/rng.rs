//! virtio-rng (sect. 5.4): entropy for the guest, from the host's getrandom(2).
//!
//! One queue, served by one thread, which holds no lock. A request gets at most [`MAX_BYTES`]; a driver that wants more asks again.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::chain::Chain;
use crate::device::{ActivateError, Activation, ActiveQueue, Interrupt, Memory, VirtioDevice};
use crate::ring::{self, RingError};

/// The most bytes that one request gets.
pub const MAX_BYTES: usize = 4096;
const QUEUE_SIZE: u16 = 64;
const TAG_KICK: u64 = 0;
const TAG_STOP: u64 = 1;

/// A virtio entropy device.
#[derive(Default)]
pub struct Rng {
    running: Option<(EventFd, JoinHandle<ActiveQueue>)>,
}

impl Rng {
    /// A device that is not active.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        (1 << VIRTIO_F_VERSION_1) | (1 << VIRTIO_RING_F_EVENT_IDX) | (1 << VIRTIO_RING_F_INDIRECT_DESC)
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        if self.running.is_some() {
            return Err(ActivateError::AlreadyActive);
        }
        let queue = activation.queues.pop().ok_or(ActivateError::QueueMissing(0))?;
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let epoll = Epoll::new()?;
        watch(&epoll, &queue.kick, TAG_KICK)?;
        watch(&epoll, &stop, TAG_STOP)?;
        let worker = Worker {
            active: queue,
            epoll,
            memory: activation.memory,
            interrupt: activation.interrupt,
            chain: Chain::new(),
            broken: false,
        };
        let thread = std::thread::Builder::new().name("rng".into()).spawn(move || worker.run())?;
        self.running = Some((stop, thread));
        Ok(())
    }

    fn stop(&mut self) -> Vec<ActiveQueue> {
        let Some((stop, thread)) = self.running.take() else { return Vec::new() };
        // Cannot fail: nobody else writes to the counter.
        let _ = stop.write(1);
        match thread.join() {
            Ok(queue) => vec![queue],
            Err(_) => {
                tracing::error!("the entropy device's thread has panicked");
                Vec::new()
            }
        }
    }
}

impl Drop for Rng {
    fn drop(&mut self) {
        drop(self.stop());
    }
}

/// Edge-triggered: each write to an eventfd is an edge, so its counter need not be read.
fn watch(epoll: &Epoll, fd: &EventFd, tag: u64) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, tag))
}

struct Worker {
    active: ActiveQueue,
    epoll: Epoll,
    memory: Memory,
    interrupt: Arc<dyn Interrupt>,
    chain: Chain,
    broken: bool,
}

impl Worker {
    fn run(mut self) -> ActiveQueue {
        loop {
            let more = self.serve();
            match self.stopping(more) {
                Ok(false) => {}
                Ok(true) => break,
                Err(error) => {
                    tracing::error!(%error, "the entropy device is not served any more");
                    self.interrupt.signal_needs_reset();
                    break;
                }
            }
        }
        self.active
    }

    /// Waits until there is something to do (not at all when there is `more`). Says whether that is to stop.
    fn stopping(&self, more: bool) -> io::Result<bool> {
        let mut events = [EpollEvent::default(); 2];
        match self.epoll.wait(if more { 0 } else { -1 }, &mut events) {
            Ok(count) => Ok(events[..count].iter().any(|event| event.data() == TAG_STOP)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Fills what the driver has made available. Says whether there may be more, for which nobody will wake us.
    fn serve(&mut self) -> bool {
        if self.broken {
            return false;
        }
        let memory = self.memory.memory().into_inner();
        self.fill_all(&memory).unwrap_or_else(|error| {
            tracing::warn!(%error, "the entropy device needs a reset");
            self.broken = true;
            self.interrupt.signal_needs_reset();
            false
        })
    }

    fn fill_all(&mut self, memory: &GuestMemoryMmap) -> Result<bool, RingError> {
        let mut used = false;
        let mut budget = self.active.queue.size();
        let mut more = true;
        while more && budget > 0 {
            self.active.queue.disable_notification(memory)?;
            while budget > 0
                && let Some(chain) = self.active.queue.iter(memory)?.next()
            {
                budget -= 1;
                let head = chain.head_index();
                self.chain.fill(memory, &self.active.queue, head);
                let len = self.fill(memory);
                used |= ring::add_used(&mut self.active.queue, memory, head, len)?;
            }
            more = budget == 0 || self.active.queue.enable_notification(memory)?;
        }
        if used && ring::wants_interrupt(&mut self.active.queue, memory)? {
            self.interrupt.signal_queue(self.active.index);
        }
        Ok(more)
    }

    /// Fills the chain's buffers with entropy; gives the number of bytes, 0 for a chain that makes no sense.
    fn fill(&self, memory: &GuestMemoryMmap) -> u32 {
        if self.chain.fault().is_some() {
            return 0;
        }
        let mut bytes = [0; MAX_BYTES];
        let wanted = self.chain.writable_len().min(MAX_BYTES as u64) as usize;
        let got = match getrandom(&mut bytes[..wanted], GetRandomFlags::empty()) {
            Ok(got) => got,
            Err(error) => {
                tracing::warn!(%error, "the host gives no entropy");
                0
            }
        };
        self.chain.write(memory, 0, &bytes[..got]).map_or(0, |len| len as u32)
    }
}

#[cfg(test)]
#[path = "rng_test.rs"]
mod tests;
