//! The queues' doorbells: the eventfds that wake the device, connected inside the kernel to the addresses that the driver
//! writes, while the BAR answers somewhere and the device is active.
//!
//! Where the hypervisor refuses a connection, the write leaves the guest and [`Doorbells::ring`] does the same.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::irq::DoorbellRegistry;

/// Bytes from one queue's doorbell to the next.
pub(super) const MULTIPLIER: u32 = 4;

struct Placement {
    /// Where the notification region answers.
    base: Option<u64>,
    active: bool,
    /// The base for which doorbells are connected.
    connected_base: Option<u64>,
    /// Which of them are.
    connected: Vec<bool>,
}

/// One doorbell for each queue of a device.
pub(super) struct Doorbells {
    registry: Arc<dyn DoorbellRegistry>,
    kicks: Vec<EventFd>,
    active: AtomicBool,
    placement: Mutex<Placement>,
}

impl Doorbells {
    pub(super) fn new(registry: Arc<dyn DoorbellRegistry>, queues: usize) -> io::Result<Self> {
        let kicks = (0..queues).map(|_| EventFd::new(EFD_NONBLOCK)).collect::<io::Result<Vec<_>>>()?;
        let placement =
            Placement { base: None, active: false, connected_base: None, connected: vec![false; kicks.len()] };
        Ok(Self { registry, kicks, active: AtomicBool::new(false), placement: Mutex::new(placement) })
    }

    /// A second descriptor of a queue's eventfd, its counter at zero.
    pub(super) fn kick(&self, queue: u16) -> io::Result<EventFd> {
        let kick = self.kicks.get(usize::from(queue)).ok_or(io::ErrorKind::NotFound)?;
        // Nothing to read is the usual case.
        let _ = kick.read();
        kick.try_clone()
    }

    /// The driver's write to a doorbell has reached us.
    pub(super) fn ring(&self, queue: u64) {
        let kick = usize::try_from(queue).ok().and_then(|queue| self.kicks.get(queue));
        if let Some(kick) = kick
            && self.active.load(Ordering::Acquire)
        {
            // Fails only when the counter is full, and then the device is being woken already.
            let _ = kick.write(1);
        }
    }

    /// The notification region answers at `base` from now on.
    pub(super) fn set_base(&self, base: Option<u64>) {
        self.change(|placement| placement.base = base);
    }

    /// The device has become active, or inactive.
    pub(super) fn set_active(&self, active: bool) {
        self.active.store(active, Ordering::Release);
        self.change(|placement| placement.active = active);
    }

    fn change(&self, change: impl FnOnce(&mut Placement)) {
        let mut placement = self.placement.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut placement);
        let wanted = placement.base.filter(|_| placement.active);
        if wanted == placement.connected_base {
            return;
        }
        if let Some(old) = placement.connected_base.take() {
            self.disconnect(old, &mut placement.connected);
        }
        if let Some(new) = wanted {
            self.connect(new, &mut placement.connected);
            placement.connected_base = Some(new);
        }
    }

    fn connect(&self, base: u64, connected: &mut [bool]) {
        for ((queue, kick), connected) in (0u64..).zip(&self.kicks).zip(connected) {
            match self.registry.register(kick, base + queue * u64::from(MULTIPLIER)) {
                Ok(()) => *connected = true,
                Err(error) => tracing::debug!(%error, queue, "a doorbell stays outside the kernel"),
            }
        }
    }

    fn disconnect(&self, base: u64, connected: &mut [bool]) {
        for ((queue, kick), connected) in (0u64..).zip(&self.kicks).zip(connected) {
            if std::mem::take(connected)
                && let Err(error) = self.registry.unregister(kick, base + queue * u64::from(MULTIPLIER))
            {
                tracing::debug!(%error, queue, "a doorbell cannot be disconnected");
            }
        }
    }
}
