//! Message-signalled interrupts, as devices see them.
//!
//! The interface between PCI (which decodes MSI-X tables and MSI capabilities) and the hypervisor (which owns GSIs and
//! routes). Nothing here knows KVM, so PCI devices can be tested without it.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// What the guest programmed into one MSI or MSI-X vector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// The address that the message is written to.
    pub address: u64,
    /// The 32 bits of data.
    pub data: u32,
    /// The PCI requester ID (bus 15:8, device 7:3, function 2:0), which an ITS tells devices apart by.
    pub device_id: u32,
}

/// One interrupt vector of one device.
pub trait MsiVector: Send + Sync {
    /// Routes the vector to `message` from now on; a vector not routed yet, or masked, is connected by this.
    ///
    /// # Errors
    /// When the hypervisor refuses the route.
    fn route(&self, message: MsiMessage) -> io::Result<()>;

    /// Disconnects the vector: signals of its eventfd stay pending in the eventfd's counter.
    ///
    /// # Errors
    /// When the hypervisor refuses.
    fn mask(&self) -> io::Result<()>;

    /// The eventfd (the vector's irqfd): a write to it interrupts the guest while the vector is connected. While masked the
    /// owner can read it to learn whether an interrupt became pending.
    fn eventfd(&self) -> &EventFd;
}

/// Hands out interrupt vectors.
pub trait MsiAllocator: Send + Sync {
    /// A new vector, with its own GSI and eventfd, masked; both are given back when it is dropped.
    ///
    /// # Errors
    /// When GSIs or descriptors are exhausted.
    fn allocate(&self) -> io::Result<Arc<dyn MsiVector>>;
}

/// Connects guest writes of a doorbell to an eventfd inside the kernel, so that no vCPU has to leave the guest's run loop.
pub trait DoorbellRegistry: Send + Sync {
    /// From now on, a guest write of any value and width to `address` signals `event`.
    ///
    /// # Errors
    /// When the hypervisor refuses.
    fn register(&self, event: &EventFd, address: u64) -> io::Result<()>;

    /// Ends what [`register`](Self::register) with the same arguments began.
    ///
    /// # Errors
    /// When there is no such doorbell.
    fn unregister(&self, event: &EventFd, address: u64) -> io::Result<()>;
}
