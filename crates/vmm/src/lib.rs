//! The KVM hypervisor: memory, vCPUs, boot, PCI, ACPI, consoles, event loop.
//!
//! [`machine`] puts a machine together and runs it; everything else is a part of one. What differs from one processor
//! architecture to another stands in [`arch`], and nowhere else.

pub mod arch;
pub mod bus;
pub mod console;
pub mod control;
pub mod devices;
pub mod host;
pub mod interrupts;
pub mod irq;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod pci;
pub mod signals;
pub mod vcpu;
