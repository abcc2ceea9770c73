//! Interrupts into the guest by eventfd: MSI vectors through KVM's GSI routing, and doorbells out of it by ioeventfd.
//!
//! KVM takes the whole routing table at once, so one router owns it. Wired interrupts (below [`layout::IOAPIC_PINS`]) keep
//! the architecture's fixed routes.
//!
//! Locks: the router's, then nothing.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KvmIrqRouting, kvm_irq_routing_entry};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::{self, layout};
use crate::irq::{DoorbellRegistry, MsiAllocator, MsiMessage, MsiVector};

/// GSIs that KVM has room for (`KVM_MAX_IRQ_ROUTES`).
const MAX_GSIS: u32 = 4096;

/// Owns a machine's GSIs and their routes.
pub struct InterruptRouter {
    vm: Arc<VmFd>,
    /// The routed message of each allocated GSI; `None` while it was never routed.
    routes: Mutex<BTreeMap<u32, Option<MsiMessage>>>,
}

impl InterruptRouter {
    /// A router for `vm`, whose interrupt controller exists.
    #[must_use]
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, routes: Mutex::default() }
    }

    /// An eventfd that raises wired interrupt `pin` (edge-triggered) when it is written.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn wired(&self, pin: u32) -> io::Result<EventFd> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        self.vm.register_irqfd(&event, pin)?;
        Ok(event)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Option<MsiMessage>>> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the table, with `gsi` going to `message`, to KVM; keeps it only when KVM took it.
    fn set_route(&self, gsi: u32, message: MsiMessage) -> io::Result<()> {
        let mut routes = self.lock();
        if routes.get(&gsi) == Some(&Some(message)) {
            return Ok(());
        }
        let others = routes.iter().filter(|(other, _)| **other != gsi);
        let mut entries: Vec<kvm_irq_routing_entry> = arch::wired_routes();
        entries.extend(others.filter_map(|(gsi, message)| message.map(|m| arch::msi_route(*gsi, m))));
        entries.push(arch::msi_route(gsi, message));
        let table = KvmIrqRouting::from_entries(&entries).map_err(|e| io::Error::other(format!("{e:?}")))?;
        self.vm.set_gsi_routing(&table)?;
        routes.insert(gsi, Some(message));
        Ok(())
    }
}

/// Hands out [`MsiVector`]s of one [`InterruptRouter`].
pub struct KvmMsiAllocator(pub Arc<InterruptRouter>);

impl MsiAllocator for KvmMsiAllocator {
    fn allocate(&self) -> io::Result<Arc<dyn MsiVector>> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let mut routes = self.0.lock();
        let gsi = (layout::IOAPIC_PINS..MAX_GSIS)
            .find(|gsi| !routes.contains_key(gsi))
            .ok_or_else(|| io::Error::other("the machine has no interrupt vector left"))?;
        routes.insert(gsi, None);
        Ok(Arc::new(KvmMsiVector { router: self.0.clone(), gsi, event, connected: Mutex::new(false) }))
    }
}

struct KvmMsiVector {
    router: Arc<InterruptRouter>,
    gsi: u32,
    event: EventFd,
    /// Whether the eventfd is an irqfd at the moment.
    connected: Mutex<bool>,
}

impl MsiVector for KvmMsiVector {
    fn route(&self, message: MsiMessage) -> io::Result<()> {
        let mut connected = self.connected.lock().unwrap_or_else(PoisonError::into_inner);
        self.router.set_route(self.gsi, message)?;
        if !*connected {
            // KVM looks at the counter while it connects, so what became pending under the mask is delivered here.
            self.router.vm.register_irqfd(&self.event, self.gsi)?;
            *connected = true;
        }
        Ok(())
    }

    fn mask(&self) -> io::Result<()> {
        let mut connected = self.connected.lock().unwrap_or_else(PoisonError::into_inner);
        if *connected {
            self.router.vm.unregister_irqfd(&self.event, self.gsi)?;
            *connected = false;
        }
        Ok(())
    }

    fn eventfd(&self) -> &EventFd {
        &self.event
    }
}

impl Drop for KvmMsiVector {
    fn drop(&mut self) {
        if let Err(e) = self.mask() {
            tracing::warn!("interrupt vector {} cannot be given back: {e}", self.gsi);
            return;
        }
        self.router.lock().remove(&self.gsi);
    }
}

/// Connects guest writes to eventfds (ioeventfd).
pub struct KvmDoorbells(pub Arc<VmFd>);

impl DoorbellRegistry for KvmDoorbells {
    fn register(&self, event: &EventFd, address: u64) -> io::Result<()> {
        Ok(self.0.register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)?)
    }

    fn unregister(&self, event: &EventFd, address: u64) -> io::Result<()> {
        Ok(self.0.unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)?)
    }
}

#[cfg(test)]
#[path = "interrupts_test.rs"]
mod tests;
