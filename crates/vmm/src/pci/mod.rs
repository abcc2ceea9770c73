//! PCI: configuration space and how it is reached, root ports with hot plug, message interrupts, and virtio over it.
//!
//! ```text
//!   bus 0   00.0 host bridge
//!           01.0 root port ── bus 1 ── 00.0 virtio function
//!           01.1 root port ── bus 2 ── 00.0 virtio function
//!           …    (eight to a device, as many as are asked for; a port may be empty)
//! ```
//!
//! [`PciHost`] is the way in. No firmware runs, so everything is assigned here, bus numbers, windows and BARs, in a
//! way that a guest finds valid and keeps. Nothing here knows KVM: interrupts, doorbells and buses are interfaces. No INTx.

mod access;
mod address;
mod config;
mod express;
mod function;
mod host;
mod host_bridge;
mod msi;
mod msix;
mod root_port;
#[cfg(test)]
mod testing;
mod tree;
mod virtio;
mod window;

use std::io;

use crate::bus::BusError;

pub use address::Bdf;
pub use host::{Ecam, PciHost, PciHostConfig, PortId, Windows};
pub use window::Window;

/// Why something could not be put on the PCI bus.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    /// Bus numbers, or functions of bus 0, have run out.
    #[error("there is no room for another PCI port")]
    NoPortLeft,
    /// A memory window is too small for another port, or a port's for its device.
    #[error("a PCI memory window has no room for {len:#x} bytes")]
    NoRoom {
        /// Bytes that were asked for.
        len: u64,
    },
    /// No port of this name.
    #[error("there is no PCI port {0}")]
    NoSuchPort(PortId),
    /// The port's slot holds a device.
    #[error("the slot of PCI port {0} is taken")]
    Occupied(PortId),
    /// A device with more queues than the notification region has room for.
    #[error("a device with {queues} queues does not fit into PCI ({max} are the most)")]
    TooManyQueues {
        /// The device's.
        queues: usize,
        /// The most.
        max: usize,
    },
    /// The capability list is longer than configuration space.
    #[error("a function's capabilities do not fit into its configuration space")]
    CapabilitiesDoNotFit,
    /// An interrupt vector could not be had.
    #[error("an interrupt vector cannot be allocated: {0}")]
    Interrupt(io::Error),
    /// An eventfd could not be had.
    #[error("a doorbell cannot be made: {0}")]
    Doorbell(io::Error),
    /// Configuration space collides with another device.
    #[error("PCI configuration space cannot be placed: {0}")]
    Bus(#[from] BusError),
}
