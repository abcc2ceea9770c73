//! The device's side of the negotiation: the common configuration registers (sect. 4.1.4.3), the device status and what each
//! step of it allows, and when the device is activated, stopped and reset.
//!
//! [`State`] is all that has to be saved of the transport (vectors and ISR are in `interrupt`). Reading never changes
//! anything; a write counts only when it has the width of a field, as sect. 4.1.3.1 asks of drivers.

use std::sync::Arc;

use cowhand_virtio::{Activation, ActiveQueue, Interrupt, Memory, VirtioDevice};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestAddressSpace};

use super::doorbell::Doorbells;
use super::interrupt::VirtioInterrupt;

/// Bytes of the common configuration that hold registers.
pub(super) const COMMON_LEN: usize = 64;

const ACKNOWLEDGE: u8 = VIRTIO_CONFIG_S_ACKNOWLEDGE as u8;
const DRIVER: u8 = VIRTIO_CONFIG_S_DRIVER as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
const FAILED: u8 = VIRTIO_CONFIG_S_FAILED as u8;
/// What a driver may set.
const DRIVER_BITS: u8 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;

/// What the driver has configured of one queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct QueueState {
    pub size: u16,
    pub enabled: bool,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

/// The transport's registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct State {
    pub device_feature_select: u32,
    pub driver_feature_select: u32,
    pub driver_features: u64,
    pub status: u8,
    pub queue_select: u16,
    pub queues: Vec<QueueState>,
}

impl State {
    fn new(sizes: &[u16]) -> Self {
        let queue = |&size| QueueState { size, enabled: false, descriptors: 0, available: 0, used: 0 };
        Self {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            status: 0,
            queue_select: 0,
            queues: sizes.iter().map(queue).collect(),
        }
    }

    fn has(&self, status: u8) -> bool {
        self.status & status == status
    }
}

/// Why the queues cannot be handed to the device.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("queue {0} has addresses or a size that cannot be")]
    BadQueue(u16),
    #[error(transparent)]
    Doorbell(#[from] std::io::Error),
    #[error(transparent)]
    Activate(#[from] cowhand_virtio::ActivateError),
}

/// One device and the state of its negotiation.
pub(super) struct Transport {
    device: Box<dyn VirtioDevice>,
    state: State,
    memory: Memory,
    interrupt: Arc<VirtioInterrupt>,
    doorbells: Arc<Doorbells>,
    closed: bool,
}

impl Transport {
    pub(super) fn new(
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        interrupt: Arc<VirtioInterrupt>,
        doorbells: Arc<Doorbells>,
    ) -> Self {
        let state = State::new(device.queue_max_sizes());
        Self { device, state, memory, interrupt, doorbells, closed: false }
    }

    /// Stops and drains the device; everything is as before the driver came.
    pub(super) fn reset(&mut self) {
        self.doorbells.set_active(false);
        self.device.reset();
        // Only now: the queues' last signals must not find their vectors gone.
        self.interrupt.reset();
        self.state = State::new(self.device.queue_max_sizes());
    }

    /// Resets the device for good: an access that was on its way already cannot start it again.
    pub(super) fn close(&mut self) {
        self.reset();
        self.closed = true;
    }

    /// The device's own configuration space is read.
    pub(super) fn read_device(&self, offset: u64, data: &mut [u8]) {
        self.device.read_config(offset, data);
    }

    /// The device's own configuration space is written.
    pub(super) fn write_device(&mut self, offset: u64, data: &[u8]) {
        self.device.write_config(offset, data);
    }

    /// The guest reads the common configuration; past its end it reads zeros.
    pub(super) fn read_common(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let image = self.image();
        let Ok(offset) = usize::try_from(offset) else { return };
        for (to, from) in data.iter_mut().zip(image.get(offset..).unwrap_or_default()) {
            *to = *from;
        }
    }

    /// The guest writes the common configuration.
    pub(super) fn write_common(&mut self, offset: u64, data: &[u8]) {
        match *data {
            [value] if offset == 0x14 => self.set_status(value),
            [a, b] => self.write_u16(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write_u32(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] if matches!(offset, 0x20 | 0x28 | 0x30) => {
                self.write_u32(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_u32(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
    }

    fn status(&self) -> u8 {
        self.state.status | if self.interrupt.needs_reset() { NEEDS_RESET } else { 0 }
    }

    /// The registers as they read.
    fn image(&self) -> [u8; COMMON_LEN] {
        let state = &self.state;
        let mut image = [0; COMMON_LEN];
        let mut put = |offset: usize, bytes: &[u8]| image[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0x00, &state.device_feature_select.to_le_bytes());
        put(0x04, &word(self.device.features(), state.device_feature_select).to_le_bytes());
        put(0x08, &state.driver_feature_select.to_le_bytes());
        put(0x0c, &word(state.driver_features, state.driver_feature_select).to_le_bytes());
        put(0x10, &self.interrupt.config_vector().to_le_bytes());
        put(0x12, &(state.queues.len() as u16).to_le_bytes());
        put(0x14, &[self.status(), self.interrupt.generation()]);
        put(0x16, &state.queue_select.to_le_bytes());
        // A queue that does not exist has size 0, and zeros for the rest (sect. 4.1.4.3.1).
        if let Some(queue) = state.queues.get(usize::from(state.queue_select)) {
            put(0x18, &queue.size.to_le_bytes());
            put(0x1a, &self.interrupt.queue_vector(state.queue_select).to_le_bytes());
            put(0x1c, &u16::from(queue.enabled).to_le_bytes());
            put(0x1e, &state.queue_select.to_le_bytes());
            put(0x20, &queue.descriptors.to_le_bytes());
            put(0x28, &queue.available.to_le_bytes());
            put(0x30, &queue.used.to_le_bytes());
        }
        image
    }

    fn write_u16(&mut self, offset: u64, value: u16) {
        match offset {
            0x10 => self.interrupt.set_config_vector(value),
            0x16 => self.state.queue_select = value,
            0x18 => {
                let max = self.device.queue_max_sizes().get(usize::from(self.state.queue_select)).copied();
                if let Some(queue) = self.open_queue()
                    && value.is_power_of_two()
                    && max.is_some_and(|max| value <= max)
                {
                    queue.size = value;
                }
            }
            0x1a => self.interrupt.set_queue_vector(self.state.queue_select, value),
            0x1c if value == 1 => {
                if let Some(queue) = self.open_queue() {
                    queue.enabled = true;
                }
            }
            _ => {}
        }
    }

    fn write_u32(&mut self, offset: u64, value: u32) {
        match offset {
            0x00 => self.state.device_feature_select = value,
            0x08 => self.state.driver_feature_select = value,
            0x0c if !self.state.has(FEATURES_OK) => {
                set_word(&mut self.state.driver_features, self.state.driver_feature_select, value);
            }
            0x20..0x38 if offset.is_multiple_of(4) => {
                if let Some(queue) = self.open_queue() {
                    let address = match offset & !7 {
                        0x20 => &mut queue.descriptors,
                        0x28 => &mut queue.available,
                        _ => &mut queue.used,
                    };
                    set_word(address, u32::from(offset & 4 != 0), value);
                }
            }
            _ => {}
        }
    }

    /// The selected queue, while it may still be configured: not enabled yet, the device not started.
    fn open_queue(&mut self) -> Option<&mut QueueState> {
        if self.state.has(DRIVER_OK) {
            return None;
        }
        self.state.queues.get_mut(usize::from(self.state.queue_select)).filter(|queue| !queue.enabled)
    }

    /// The driver writes the device status (sect. 2.1, 3.1): zero resets; otherwise bits are only ever added, each only
    /// after those it builds on.
    fn set_status(&mut self, value: u8) {
        if value == 0 {
            self.reset();
            return;
        }
        let added = value & DRIVER_BITS & !self.state.status;
        self.state.status |= added & (ACKNOWLEDGE | DRIVER | FAILED);
        if added & FEATURES_OK != 0 && self.state.has(ACKNOWLEDGE | DRIVER) && self.features_acceptable() {
            self.state.status |= FEATURES_OK;
            self.device.negotiated(self.state.driver_features);
        }
        if added & DRIVER_OK != 0 && self.state.has(FEATURES_OK) && !self.interrupt.needs_reset() && !self.closed {
            self.state.status |= DRIVER_OK;
            if let Err(error) = self.start() {
                tracing::warn!(%error, device_type = self.device.device_type(), "the guest's driver cannot be served");
                self.interrupt.signal_needs_reset();
            }
        }
    }

    /// Only what is offered, and never a legacy driver's set.
    fn features_acceptable(&self) -> bool {
        let features = self.state.driver_features;
        features & !self.device.features() == 0 && features & (1 << VIRTIO_F_VERSION_1) != 0
    }

    fn start(&mut self) -> Result<(), StartError> {
        let queues = self.queues()?;
        self.device.activate(Activation {
            memory: self.memory.clone(),
            features: self.state.driver_features,
            queues,
            interrupt: self.interrupt.clone(),
        })?;
        self.doorbells.set_active(true);
        Ok(())
    }

    /// The enabled queues, checked against guest memory.
    fn queues(&self) -> Result<Vec<ActiveQueue>, StartError> {
        let event_idx = self.state.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let memory = self.memory.memory();
        let mut active = Vec::new();
        for (index, (state, &max)) in (0u16..).zip(self.state.queues.iter().zip(self.device.queue_max_sizes())) {
            if !state.enabled {
                continue;
            }
            let queue = ring(state, max, event_idx)
                .ok()
                .filter(|queue| queue.is_valid(&*memory))
                .ok_or(StartError::BadQueue(index))?;
            active.push(ActiveQueue { index, queue, kick: self.doorbells.kick(index)? });
        }
        Ok(active)
    }
}

fn ring(state: &QueueState, max: u16, event_idx: bool) -> Result<Queue, virtio_queue::Error> {
    let mut queue = Queue::new(max)?;
    queue.try_set_size(state.size)?;
    queue.try_set_desc_table_address(GuestAddress(state.descriptors))?;
    queue.try_set_avail_ring_address(GuestAddress(state.available))?;
    queue.try_set_used_ring_address(GuestAddress(state.used))?;
    queue.set_event_idx(event_idx);
    queue.set_ready(true);
    Ok(queue)
}

/// The 32 bits of `value` that `select` names; none beyond the second word.
fn word(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_word(value: &mut u64, select: u32, word: u32) {
    match select {
        0 => *value = (*value & !0xffff_ffff) | u64::from(word),
        1 => *value = (*value & 0xffff_ffff) | (u64::from(word) << 32),
        _ => {}
    }
}

#[cfg(test)]
#[path = "transport_test.rs"]
mod tests;
