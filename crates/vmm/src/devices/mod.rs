//! Simple devices that sit on a bus by themselves: the serial port and pvpanic.
//!
//! Not here: PCI devices ([`crate::pci`]) and what only one architecture has ([`crate::arch`]).

pub mod pvpanic;
pub mod serial;
