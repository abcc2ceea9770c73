//! What this host can do for a machine, for the doctor.

use kvm_ioctls::Kvm;

use crate::arch;
use crate::kvm::{self, KvmError};

/// One capability and whether KVM has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capability {
    /// KVM's name of it.
    pub name: &'static str,
    /// Whether it is there.
    pub present: bool,
}

/// What KVM says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvmReport {
    /// What cowhand cannot do without.
    pub capabilities: Vec<Capability>,
    /// The most vCPUs of a guest.
    pub max_cpus: usize,
    /// The most memory slots of a guest.
    pub memory_slots: usize,
}

/// Asks KVM.
///
/// # Errors
/// When KVM cannot be opened.
pub fn kvm_report() -> Result<KvmReport, KvmError> {
    let kvm = kvm::open()?;
    Ok(report(&kvm))
}

fn report(kvm: &Kvm) -> KvmReport {
    let capabilities = kvm::REQUIRED
        .iter()
        .chain(arch::REQUIRED)
        .map(|(cap, name)| Capability { name, present: kvm.check_extension(*cap) })
        .collect();
    KvmReport { capabilities, max_cpus: kvm.get_max_vcpus(), memory_slots: kvm.get_nr_memslots() }
}
