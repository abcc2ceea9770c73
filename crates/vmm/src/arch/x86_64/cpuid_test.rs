use super::*;

fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = registers;
    kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
}

fn template(cpus: u32) -> CpuTemplate {
    let supported = [
        leaf(0, 0, [0x1f, 0, 0, 0]),
        leaf(1, 0, [0, 0x1234_5678, 0, LEAF1_EDX_HTT]),
        leaf(4, 0, [0x1c00_4121, 0, 0, 0]),
        leaf(4, 3, [0x1c03_c163, 0, 0, 0]),
        leaf(0xb, 0, [9, 9, 9, 9]),
        leaf(0x8000_0008, 0, [46, 0, 0xffff, 0]),
        leaf(0x8000_001e, 0, [7, 7, 7, 7]),
    ];
    CpuTemplate::from_supported(&supported, cpus, true)
}

fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
    *cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
}

#[test]
fn each_vcpu_has_its_own_apic_id() {
    let template = template(3);
    for index in 0..3 {
        let cpuid = template.for_cpu(index).unwrap();
        assert_eq!(find(&cpuid, 1, 0).ebx >> 24, index);
        assert_eq!(find(&cpuid, 0xb, 1).edx, index);
        assert_eq!(find(&cpuid, 0x1f, 0).edx, index);
        assert_eq!(find(&cpuid, 0x8000_001e, 0).eax, index);
    }
}

#[test]
fn topology_counts_cores_and_rounds_ids_up() {
    let cpuid = template(3).for_cpu(0).unwrap();
    let cores = find(&cpuid, 0xb, 1);
    assert_eq!((cores.eax, cores.ebx, cores.ecx), (2, 3, 0x201));
    assert_eq!(find(&cpuid, 0xb, 0).ebx, 1);
    assert_eq!(find(&cpuid, 0x8000_0008, 0).ecx & 0xf0ff, 0x2002);
    assert_eq!((find(&cpuid, 1, 0).ebx >> 16) & 0xff, 4);
}

#[test]
fn only_the_last_level_cache_is_shared() {
    let cpuid = template(2).for_cpu(0).unwrap();
    assert_eq!((find(&cpuid, 4, 0).eax >> 14) & 0xfff, 0);
    assert_eq!((find(&cpuid, 4, 3).eax >> 14) & 0xfff, 1);
    assert_eq!(find(&cpuid, 4, 3).eax >> 26, 1);
}

#[test]
fn a_single_vcpu_is_no_hyperthread() {
    let cpuid = template(1).for_cpu(0).unwrap();
    assert_eq!(find(&cpuid, 1, 0).edx & LEAF1_EDX_HTT, 0);
    assert_ne!(find(&cpuid, 1, 0).ecx & LEAF1_ECX_HYPERVISOR, 0);
    assert_ne!(find(&cpuid, 1, 0).ecx & LEAF1_ECX_TSC_DEADLINE, 0);
}

#[test]
fn the_largest_machine_fits_the_fields() {
    let cpuid = template(MAX_CPUS).for_cpu(MAX_CPUS - 1).unwrap();
    assert_eq!(find(&cpuid, 1, 0).ebx >> 16, (253 << 8) | 255);
    assert_eq!(find(&cpuid, 4, 3).eax >> 26, 63);
}
