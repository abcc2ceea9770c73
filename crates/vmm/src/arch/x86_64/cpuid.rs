//! What the guest's processors say of themselves: KVM's supported CPUID with the topology of this machine.
//!
//! The topology is one package of single-threaded cores; APIC IDs are the vCPUs' indices. Leaf numbers as in Intel's SDM
//! volume 2A (CPUID) and AMD's APM volume 3, appendix E; the leaves from 0x4000_0000 on are KVM's.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use super::invalid;
use crate::kvm::KvmError;

/// The most vCPUs: APIC ID 255 is the broadcast to all.
pub const MAX_CPUS: u32 = 254;

const LEAF1_ECX_X2APIC: u32 = 1 << 21;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const LEAF6_EAX_ARAT: u32 = 1 << 2;
const LEAF6_ECX_EPB: u32 = 1 << 3;
const EXT1_ECX_CMP_LEGACY: u32 = 1 << 1;
const TOPOLOGY_SMT: u32 = 1;
const TOPOLOGY_CORE: u32 = 2;

/// The CPUID of a machine, but for what differs from one vCPU to the next.
pub struct CpuTemplate {
    entries: Vec<kvm_cpuid_entry2>,
    cpus: u32,
}

impl CpuTemplate {
    pub(super) fn new(kvm: &Kvm, cpus: u32) -> Result<Self, KvmError> {
        let supported =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(KvmError::ioctl("KVM_GET_SUPPORTED_CPUID"))?;
        Ok(Self::from_supported(supported.as_slice(), cpus, kvm.check_extension(Cap::TscDeadlineTimer)))
    }

    fn from_supported(supported: &[kvm_cpuid_entry2], cpus: u32, tsc_deadline: bool) -> Self {
        // The topology leaves are ours alone: KVM's hold the host's.
        let mut entries: Vec<_> = supported.iter().filter(|e| !matches!(e.function, 0xb | 0x1f)).copied().collect();
        let max_leaf = entries.iter().find(|e| e.function == 0).map_or(0, |e| e.eax);
        for entry in &mut entries {
            patch(entry, cpus, tsc_deadline);
        }
        for leaf in [0xb, 0x1f].into_iter().filter(|leaf| *leaf <= max_leaf) {
            entries.extend(topology(leaf, cpus));
        }
        Self { entries, cpus }
    }

    /// The CPUID of vCPU `index`.
    ///
    /// # Errors
    /// When there are more leaves than KVM takes.
    pub fn for_cpu(&self, index: u32) -> Result<CpuId, KvmError> {
        let mut cpuid = CpuId::from_entries(&self.entries).map_err(|_| invalid("KVM_SET_CPUID2"))?;
        for entry in cpuid.as_mut_slice() {
            match entry.function {
                1 => entry.ebx = (entry.ebx & 0x00ff_ffff) | (index << 24),
                0xb | 0x1f => entry.edx = index,
                // Extended APIC ID; core ID and threads for each core; one node.
                0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (index, index & 0xff, 0),
                _ => {}
            }
        }
        Ok(cpuid)
    }

    /// Bits of a guest-physical address (leaf 0x8000_0008).
    #[must_use]
    pub fn address_bits(&self) -> u32 {
        self.entries.iter().find(|e| e.function == 0x8000_0008).map_or(36, |e| e.eax & 0xff)
    }

    /// How many vCPUs the template is for.
    #[must_use]
    pub fn cpus(&self) -> u32 {
        self.cpus
    }
}

/// Bits that hold `n` different IDs.
fn id_bits(n: u32) -> u32 {
    n.next_power_of_two().trailing_zeros()
}

fn patch(entry: &mut kvm_cpuid_entry2, cpus: u32, tsc_deadline: bool) {
    let ids = 1 << id_bits(cpus);
    match entry.function {
        1 => {
            entry.ecx |= LEAF1_ECX_X2APIC | LEAF1_ECX_HYPERVISOR;
            // KVM emulates the deadline timer itself, and says so by the capability, not by its CPUID.
            set(&mut entry.ecx, LEAF1_ECX_TSC_DEADLINE, tsc_deadline);
            entry.ebx = (entry.ebx & 0x0000_ffff) | (u32::min(ids, 255) << 16);
            set(&mut entry.edx, LEAF1_EDX_HTT, cpus > 1);
        }
        // Caches: level in eax[7:5]; the last level is shared by all, the others by none.
        4 if entry.eax & 0x1f != 0 => {
            let sharing = if (entry.eax >> 5) & 7 >= 3 { ids - 1 } else { 0 };
            entry.eax = (entry.eax & 0x0000_3fff) | (sharing << 14) | (u32::min(ids - 1, 63) << 26);
        }
        6 => {
            entry.eax |= LEAF6_EAX_ARAT;
            entry.ecx &= !LEAF6_ECX_EPB;
        }
        0x8000_0001 if cpus == 1 => entry.ecx &= !EXT1_ECX_CMP_LEGACY,
        // Number of cores less one, and the width of their part of the APIC ID.
        0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | (id_bits(cpus) << 12) | u32::min(cpus - 1, 255),
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let sharing = if (entry.eax >> 5) & 7 >= 3 { cpus - 1 } else { 0 };
            entry.eax = (entry.eax & 0x0000_3fff) | (sharing << 14);
        }
        _ => {}
    }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on { *register |= bit } else { *register &= !bit }
}

/// Leaves 0xb and 0x1f: threads of a core, cores of the package, and the end.
fn topology(function: u32, cpus: u32) -> [kvm_cpuid_entry2; 3] {
    const SIGNIFICANT_INDEX: u32 = kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
    let level = |index: u32, shift: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
        function,
        index,
        flags: SIGNIFICANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: (kind << 8) | index,
        ..Default::default()
    };
    [level(0, 0, 1, TOPOLOGY_SMT), level(1, id_bits(cpus), cpus, TOPOLOGY_CORE), level(2, 0, 0, 0)]
}

#[cfg(test)]
#[path = "cpuid_test.rs"]
mod tests;
