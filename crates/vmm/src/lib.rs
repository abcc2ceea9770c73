//! The KVM hypervisor: memory, vCPUs, boot, PCI, ACPI, consoles, event loop.

pub mod bus;
pub mod irq;
pub mod pci;
