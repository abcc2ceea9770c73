//! The KVM hypervisor: memory, vCPUs, boot, PCI, ACPI, consoles, event loop.
