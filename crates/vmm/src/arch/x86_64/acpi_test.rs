use super::*;
use crate::memory;

fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn read(memory: &GuestMemoryMmap<()>, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

fn table(memory: &GuestMemoryMmap<()>, at: u64) -> Vec<u8> {
    let len: u32 = memory.read_obj(GuestAddress(at + 4)).unwrap();
    read(memory, at, len as usize)
}

/// The tables that the RSDP leads to, by signature.
fn tables(cpus: u32) -> Vec<Vec<u8>> {
    let memory = memory::create(64 << 20).unwrap();
    write_tables(&memory, cpus, layout::pci_window64(64 << 20, 48)).unwrap();
    let rsdp = read(&memory, layout::ACPI_TABLES.start, 36);
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!((checksum(&rsdp[..20]), checksum(&rsdp)), (0, 0));
    let xsdt = table(&memory, u64::from_le_bytes(rsdp[24..32].try_into().unwrap()));
    let mut tables = vec![xsdt.clone()];
    for entry in xsdt[36..].chunks_exact(8) {
        tables.push(table(&memory, u64::from_le_bytes(entry.try_into().unwrap())));
    }
    let dsdt = u64::from_le_bytes(tables[1][140..148].try_into().unwrap());
    tables.push(table(&memory, dsdt));
    tables
}

#[test]
fn all_tables_are_reached_and_add_up() {
    let tables = tables(2);
    let signatures: Vec<&[u8]> = tables.iter().map(|t| &t[..4]).collect();
    assert_eq!(signatures, [b"XSDT", b"FACP", b"APIC", b"MCFG", b"DSDT"]);
    for table in &tables {
        assert_eq!(checksum(table), 0, "{:?}", &table[..4]);
    }
}

#[test]
fn tables_of_the_largest_machine_fit() {
    let tables = tables(super::super::MAX_CPUS);
    assert_eq!(tables[2].len(), 44 + 254 * 8 + 12);
}

#[test]
fn fadt_is_hardware_reduced_without_clock_and_keyboard() {
    let fadt = &tables(1)[1];
    let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
    assert_ne!(flags & (1 << 20), 0);
    assert_ne!(flags & (1 << 10), 0);
    let boot_arch = u16::from_le_bytes(fadt[109..111].try_into().unwrap());
    assert_eq!(boot_arch & (1 << 1), 0);
    assert_ne!(boot_arch & (1 << 5), 0);
}
