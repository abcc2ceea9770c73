//! The seam between what a virtual machine is and what an architecture makes of it.
//!
//! One directory for each architecture; each exports the same names, and nothing outside this file asks which one it is
//! built for. An architecture knows: where memory and devices lie ([`layout`]), how the interrupt controller and the
//! vCPUs of a KVM machine are set up, how kernels are loaded and entered, which firmware tables the guest reads, and which
//! legacy devices it has.

#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "x86_64")]
pub use x86_64::*;
