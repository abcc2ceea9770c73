//! The block device: what it offers, its configuration, and the threads that serve its queues.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_GEOMETRY,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::config::{self, WRITEBACK};
use super::patience::LONGEST_PATIENCE;
use super::settings::BlockSettings;
use super::worker::{BlockWorker, WorkerParts};
use super::{BlockBackend, SECTOR};
use crate::device::{ActivateError, Activation, ActiveQueue, VirtioDevice};

/// How a block device shows itself.
#[derive(Clone, Debug)]
pub struct BlockOptions {
    /// The disk's name, which its threads carry too.
    pub id: String,
    /// What GET_ID gives; the first 20 bytes.
    pub serial: String,
    /// The number of queues, at least 1: one for each vCPU is best.
    pub queues: u16,
    /// Entries of each queue: a power of two, at least 4.
    pub queue_size: u16,
    /// How long a queue's thread may look for work before it sleeps; zero: never.
    pub patience: Duration,
}

impl Default for BlockOptions {
    fn default() -> Self {
        Self { id: "disk".into(), serial: String::new(), queues: 1, queue_size: 256, patience: LONGEST_PATIENCE }
    }
}

struct Running {
    stop: EventFd,
    thread: JoinHandle<ActiveQueue>,
}

/// A virtio block device.
pub struct Block {
    backend: Arc<dyn BlockBackend>,
    id: String,
    queue_sizes: Vec<u16>,
    settings: Arc<BlockSettings>,
    features: u64,
    negotiated: u64,
    patience: Duration,
    running: Vec<Running>,
}

impl Block {
    /// A device for `backend`.
    ///
    /// # Errors
    /// When the number or the size of the queues cannot be.
    pub fn new(backend: Arc<dyn BlockBackend>, options: BlockOptions) -> io::Result<Self> {
        if options.queues == 0 || !options.queue_size.is_power_of_two() || !(4..=32768).contains(&options.queue_size) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "a disk cannot have {} queues of {} entries: at least one queue, and a power of two of entries",
                    options.queues, options.queue_size
                ),
            ));
        }
        let limits = backend.limits();
        let discard = !backend.read_only() && limits.max_discard >= SECTOR;
        let mut features = bits(&[
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_GEOMETRY,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_CONFIG_WCE,
            VIRTIO_BLK_F_MQ,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_F_VERSION_1,
        ]);
        if backend.read_only() {
            features |= bits(&[VIRTIO_BLK_F_RO]);
        }
        if discard {
            features |= bits(&[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
        }
        Ok(Self {
            settings: Arc::new(BlockSettings::new(&options.serial, discard)),
            backend,
            id: options.id,
            queue_sizes: vec![options.queue_size; options.queues.into()],
            features,
            negotiated: 0,
            patience: options.patience,
            running: Vec::new(),
        })
    }

    /// What the guest sets, shared with workers: for a transport that runs them itself.
    #[must_use]
    pub fn settings(&self) -> &Arc<BlockSettings> {
        &self.settings
    }

    fn start(&mut self, activation: Activation) -> io::Result<()> {
        for queue in activation.queues {
            let stop = EventFd::new(EFD_NONBLOCK)?;
            let name = format!("{}-q{}", self.id, queue.index);
            let worker = BlockWorker::new(WorkerParts {
                queue,
                stop: stop.try_clone()?,
                memory: activation.memory.clone(),
                interrupt: activation.interrupt.clone(),
                backend: self.backend.clone(),
                settings: self.settings.clone(),
                // The guest ends with the process, and does not move.
                inflight: None,
                dirty: None,
                patience: self.patience,
            });
            let thread = std::thread::Builder::new().name(name).spawn(move || worker.run())?;
            self.running.push(Running { stop, thread });
        }
        Ok(())
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config_len(&self) -> usize {
        config::CONFIG_LEN
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let size = self.queue_sizes.first().copied().unwrap_or_default();
        let image = config::image(&*self.backend, self.queue_sizes.len() as u16, size, self.settings.writeback());
        let from = usize::try_from(offset).ok().and_then(|offset| image.get(offset..)).unwrap_or_default();
        data.fill(0);
        for (to, from) in data.iter_mut().zip(from) {
            *to = *from;
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // Sect. 5.2.5.2: only with CONFIG_WCE negotiated; other values than 0 and 1 have no meaning.
        if self.negotiated & bits(&[VIRTIO_BLK_F_CONFIG_WCE]) != 0
            && let (WRITEBACK, &[value @ (0 | 1)]) = (offset, data)
        {
            self.settings.set_writeback(value == 1);
        }
    }

    fn negotiated(&mut self, features: u64) {
        self.negotiated = features;
        // A driver that cannot flush gets a disk without a write cache (sect. 5.2.5.2, 5.2.6.2).
        self.settings.set_writeback(features & bits(&[VIRTIO_BLK_F_FLUSH]) != 0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if !self.running.is_empty() {
            return Err(ActivateError::AlreadyActive);
        }
        if activation.queues.is_empty() {
            return Err(ActivateError::QueueMissing(0));
        }
        if let Err(error) = self.start(activation) {
            drop(self.stop());
            return Err(error.into());
        }
        Ok(())
    }

    fn stop(&mut self) -> Vec<ActiveQueue> {
        // All are told before any is waited for: they drain side by side.
        for running in &self.running {
            // Cannot fail: nobody else writes to the counter.
            let _ = running.stop.write(1);
        }
        let mut queues = Vec::with_capacity(self.running.len());
        for running in self.running.drain(..) {
            match running.thread.join() {
                Ok(queue) => queues.push(queue),
                Err(_) => tracing::error!(disk = self.id, "a queue's thread has panicked"),
            }
        }
        queues
    }

    fn reset(&mut self) {
        drop(self.stop());
        self.negotiated = 0;
        self.settings.set_writeback(true);
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        drop(self.stop());
    }
}

/// The feature bits with these numbers.
fn bits(numbers: &[u32]) -> u64 {
    numbers.iter().fold(0, |bits, number| bits | (1 << number))
}

#[cfg(test)]
#[path = "device_test.rs"]
mod tests;
