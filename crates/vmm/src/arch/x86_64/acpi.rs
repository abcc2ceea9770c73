//! The ACPI tables of the machine: hardware-reduced, so that no legacy timer, keyboard controller or clock is waited for.
//!
//! RSDP → XSDT → FADT (→ DSDT), MADT, MCFG. Section numbers are those of the ACPI specification 6.5.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal, IO, If, Interrupt,
    Local, Memory32Fixed, Method, Name, NotEqual, Notify, ONE, Or, Package, Path, ResourceTemplate, Return, Scope,
    Store, Uuid, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::layout;
use super::platform::{RESET_OFFSET, RESET_VALUE, SLEEP_CONTROL_OFFSET, SLEEP_STATUS_OFFSET, SLEEP_TYPE_S5};

const OEM_ID: [u8; 6] = *b"COWHND";
const OEM_TABLE_ID: [u8; 8] = *b"COWHAND ";
const OEM_REVISION: u32 = 1;
/// Bytes of a table's header.
const SDT_HEADER: u32 = 36;

/// IAPC_BOOT_ARCH (5.2.9.3): there is no VGA to probe, PCIe ASPM is not for the OS, there is no CMOS clock; and no 8042, which
/// is a bit left clear.
const BOOT_ARCH: u16 = (1 << 2) | (1 << 4) | (1 << 5);

/// `_OSC` for PCI host bridges (PCI Firmware Specification 3.3, 4.5).
const OSC_PCI_UUID: &str = "33DB4D5B-1FF7-401C-9657-7441C03DD766";
/// What the OS may take over: native hot plug, PME, AER, the capability structure; not SHPC.
const OSC_GRANTED: u8 = 0x1d;
const OSC_UNRECOGNIZED_UUID: u8 = 1 << 2;
const OSC_UNRECOGNIZED_REVISION: u8 = 1 << 3;
const OSC_MASKED: u8 = 1 << 4;

/// Lays the tables into guest memory, the RSDP at the start of [`layout::ACPI_TABLES`].
///
/// # Errors
/// When they do not fit.
pub fn write_tables(
    memory: &GuestMemoryMmap<()>,
    cpus: u32,
    window64: std::ops::Range<u64>,
) -> Result<(), GuestMemoryError> {
    let mut area = TableArea { memory, next: layout::ACPI_TABLES.start + 64 };
    let dsdt = area.place(dsdt(&window64).as_slice())?;
    let tables = [area.place(&fadt(dsdt))?, area.place(&madt(cpus))?, area.place(&mcfg())?];
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    tables.into_iter().for_each(|table| xsdt.add_entry(table));
    let xsdt = area.place(&bytes(&xsdt))?;
    let rsdp = bytes(&Rsdp::new(OEM_ID, xsdt));
    memory.write_slice(&rsdp, GuestAddress(layout::ACPI_TABLES.start))
}

struct TableArea<'a> {
    memory: &'a GuestMemoryMmap<()>,
    next: u64,
}

impl TableArea<'_> {
    fn place(&mut self, table: &[u8]) -> Result<u64, GuestMemoryError> {
        let at = self.next;
        let end = at + table.len() as u64;
        if end > layout::ACPI_TABLES.end {
            return Err(GuestMemoryError::InvalidGuestAddress(GuestAddress(end)));
        }
        self.memory.write_slice(table, GuestAddress(at))?;
        self.next = end.next_multiple_of(16);
        Ok(at)
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let register = |offset: u16| {
        GAS::new(GasSpace::SystemIo, 8, 0, AccessSize::ByteAccess, (layout::PORT_ACPI.start + offset).into())
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        .flag(Flags::ResetRegSup)
        // Power and sleep buttons are not fixed hardware; the power button is a device.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = register(RESET_OFFSET);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = register(SLEEP_CONTROL_OFFSET);
    fadt.sleep_status_reg = register(SLEEP_STATUS_OFFSET);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"cowhand\0").into();
    bytes(&fadt.finalize())
}

fn madt(cpus: u32) -> Vec<u8> {
    let local = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, local);
    for cpu in 0..cpus.min(super::MAX_CPUS) as u8 {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    bytes(&madt)
}

fn mcfg() -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::PCI_ECAM.start, 0, 0, layout::PCI_LAST_BUS);
    bytes(&mcfg)
}

fn dsdt(window64: &std::ops::Range<u64>) -> Sdt {
    let mut aml = Vec::new();
    pci_host_bridge(&mut aml, window64);
    motherboard_resources(&mut aml);
    serial_port(&mut aml);
    power_button(&mut aml);
    pvpanic(&mut aml);
    let s5 = SLEEP_TYPE_S5;
    Name::new("\\_S5_".into(), &Package::new(vec![&s5, &s5, &ZERO, &ZERO])).to_aml_bytes(&mut aml);
    let mut dsdt = Sdt::new(*b"DSDT", SDT_HEADER, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&aml);
    dsdt
}

/// Appends the device `name` to the scope `\_SB`.
fn system_bus(sink: &mut dyn AmlSink, name: &str, children: Vec<&dyn Aml>) {
    Scope::new("\\_SB_".into(), vec![&Device::new(name.into(), children)]).to_aml_bytes(sink);
}

fn pci_host_bridge(sink: &mut dyn AmlSink, window64: &std::ops::Range<u64>) {
    let memory32 = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        layout::PCI_WINDOW32.start as u32,
        (layout::PCI_WINDOW32.end - 1) as u32,
        None,
    );
    let buses = AddressSpace::new_bus_number(0u16, u16::from(layout::PCI_LAST_BUS));
    let config =
        IO::new(layout::PORT_PCI_CONFIG.start, layout::PORT_PCI_CONFIG.start, 1, layout::PORT_PCI_CONFIG.len() as u8);
    let ports = AddressSpace::new_io(0x1000u16, 0xffff, None);
    let memory64 = (!window64.is_empty()).then(|| {
        AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, window64.start, window64.end - 1, None)
    });
    let mut resources: Vec<&dyn Aml> = vec![&buses, &config, &ports, &memory32];
    if let Some(memory64) = &memory64 {
        resources.push(memory64);
    }
    system_bus(
        sink,
        "PCI0",
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
            &OscMethod,
        ],
    );
}

/// `_OSC`: the OS says what it can do and asks for what it wants to control; it gets [`OSC_GRANTED`] of that.
struct OscMethod;

impl Aml for OscMethod {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let status = Path::new("CDW1");
        let control = Path::new("CDW3");
        let set = |bit: &'static u8| Bit { register: "CDW1", bit };
        Method::new(
            "_OSC".into(),
            4,
            true,
            vec![
                &CreateDWordField::new(&status, &Arg(3), &ZERO),
                &If::new(
                    &Equal::new(&Arg(0), &Uuid::new(OSC_PCI_UUID)),
                    vec![
                        &CreateDWordField::new(&control, &Arg(3), &8u8),
                        &And::new(&Local(0), &control, &OSC_GRANTED),
                        &If::new(&NotEqual::new(&Arg(1), &ONE), vec![&set(&OSC_UNRECOGNIZED_REVISION)]),
                        &If::new(&NotEqual::new(&control, &Local(0)), vec![&set(&OSC_MASKED)]),
                        &Store::new(&control, &Local(0)),
                    ],
                ),
                &Else::new(vec![&set(&OSC_UNRECOGNIZED_UUID)]),
                &Return::new(&Arg(3)),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// `register |= bit`.
struct Bit {
    register: &'static str,
    bit: &'static u8,
}

impl Aml for Bit {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let register = Path::new(self.register);
        Or::new(&register, &register, self.bit).to_aml_bytes(sink);
    }
}

/// ECAM and the ACPI ports as resources of the motherboard: Linux uses no ECAM that nobody claims.
fn motherboard_resources(sink: &mut dyn AmlSink) {
    let ecam = &layout::PCI_ECAM;
    system_bus(
        sink,
        "MRES",
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, ecam.start as u32, (ecam.end - ecam.start) as u32),
                    &IO::new(layout::PORT_ACPI.start, layout::PORT_ACPI.start, 1, layout::PORT_ACPI.len() as u8),
                ]),
            ),
        ],
    );
}

fn edge_interrupt(number: u32) -> Interrupt {
    let (consumer, edge_triggered, active_low, shared) = (true, true, false, false);
    Interrupt::new(consumer, edge_triggered, active_low, shared, number)
}

fn serial_port(sink: &mut dyn AmlSink) {
    system_bus(
        sink,
        "COM1",
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &IO::new(layout::PORT_COM1.start, layout::PORT_COM1.start, 1, layout::PORT_COM1.len() as u8),
                    &edge_interrupt(layout::IRQ_COM1),
                ]),
            ),
        ],
    );
}

/// The power button, and the generic event device (5.6.9) whose one interrupt is its being pressed.
fn power_button(sink: &mut dyn AmlSink) {
    const PRESSED: u8 = 0x80;
    system_bus(
        sink,
        "PWRB",
        vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C")), &Name::new("_UID".into(), &ZERO)],
    );
    system_bus(
        sink,
        "GED_",
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&edge_interrupt(layout::IRQ_GED)])),
            &Method::new("_EVT".into(), 1, true, vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &PRESSED)]),
        ],
    );
}

fn pvpanic(sink: &mut dyn AmlSink) {
    system_bus(
        sink,
        "PVPC",
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&IO::new(layout::PORT_PVPANIC, layout::PORT_PVPANIC, 1, 1)]),
            ),
        ],
    );
}

#[cfg(test)]
#[path = "acpi_test.rs"]
mod tests;
