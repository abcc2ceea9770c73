//! The legacy devices of the x86_64 machine and where they sit: COM1, pvpanic, ACPI's registers, the ways to reset.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::layout;
use crate::bus::{Bus, BusDevice, BusError};
use crate::console::output::ConsoleOutput;
use crate::control::{Control, Exit};
use crate::devices::pvpanic::Pvpanic;
use crate::devices::serial::SerialPort;
use crate::interrupts::InterruptRouter;
use crate::vcpu::Buses;

pub(super) const SLEEP_CONTROL_OFFSET: u16 = 0;
pub(super) const SLEEP_STATUS_OFFSET: u16 = 1;
pub(super) const RESET_OFFSET: u16 = 2;
/// What is written to the reset register to reset.
pub(super) const RESET_VALUE: u8 = 1;
/// The sleep type of soft off, as `\_S5` says it.
pub(super) const SLEEP_TYPE_S5: u8 = 5;

/// What the platform is made of.
pub struct PlatformParts<'a> {
    /// Where the devices are placed.
    pub buses: &'a Buses,
    /// Where their interrupts go.
    pub router: &'a InterruptRouter,
    /// What they report.
    pub control: &'a Arc<Control>,
    /// Where the serial port writes.
    pub console: ConsoleOutput,
    /// A bus on which PCI answers at CONFIG_ADDRESS and CONFIG_DATA.
    pub pci_config_ports: Arc<Bus>,
}

/// The platform of a machine.
pub struct Platform {
    /// The console's port.
    pub serial: Arc<SerialPort>,
    power_button: EventFd,
}

impl Platform {
    /// Makes the platform's devices and places them.
    ///
    /// # Errors
    /// When KVM refuses an interrupt or there is no descriptor left.
    pub fn new(parts: PlatformParts<'_>) -> io::Result<Self> {
        let PlatformParts { buses, router, control, console, pci_config_ports } = parts;
        let serial = Arc::new(SerialPort::new(console, router.wired(layout::IRQ_COM1)?)?);
        let place = |ports: std::ops::Range<u16>, device: Arc<dyn BusDevice>| {
            buses.pio.insert(ports.start.into(), ports.len() as u64, device).map_err(|e: BusError| io::Error::other(e))
        };
        place(layout::PORT_COM1, serial.clone())?;
        place(layout::PORT_PVPANIC..layout::PORT_PVPANIC + 1, Arc::new(Pvpanic(control.clone())))?;
        place(layout::PORT_ACPI, Arc::new(AcpiRegisters(control.clone())))?;
        place(layout::PORT_I8042_COMMAND..layout::PORT_I8042_COMMAND + 1, Arc::new(KeyboardReset(control.clone())))?;
        place(layout::PORT_PCI_CONFIG, Arc::new(ConfigPorts { pci: pci_config_ports, control: control.clone() }))?;
        Ok(Self { serial, power_button: router.wired(layout::IRQ_GED)? })
    }

    /// Presses the machine's power button.
    ///
    /// # Errors
    /// When the event cannot be signalled.
    pub fn press_power_button(&self) -> io::Result<()> {
        self.power_button.write(1)
    }
}

/// ACPI's sleep control, sleep status (4.8.3.7) and reset (4.8.3.6) registers.
struct AcpiRegisters(Arc<Control>);

impl BusDevice for AcpiRegisters {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // Never asleep, so no wake status either.
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        const SLEEP_ENABLE: u8 = 1 << 5;
        for (offset, &byte) in (offset..).zip(data) {
            match u16::try_from(offset) {
                Ok(SLEEP_CONTROL_OFFSET) if byte & SLEEP_ENABLE != 0 && (byte >> 2) & 7 == SLEEP_TYPE_S5 => {
                    self.0.end(Exit::PowerOff);
                }
                Ok(RESET_OFFSET) if byte == RESET_VALUE => self.0.end(Exit::Reset),
                _ => {}
            }
        }
    }
}

/// The keyboard controller's command port, of which only the pulse of the reset line is left: kernels without ACPI use it.
struct KeyboardReset(Arc<Control>);

impl BusDevice for KeyboardReset {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // Input buffer empty: nothing to wait for.
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        const PULSE_RESET: u8 = 0xfe;
        if data.first() == Some(&PULSE_RESET) {
            self.0.end(Exit::Reset);
        }
    }
}

/// PCI's configuration ports, with the reset control register in their midst: it answers to bytes, they to double words.
struct ConfigPorts {
    pci: Arc<Bus>,
    control: Arc<Control>,
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == layout::PCI_RESET_CONTROL_OFFSET && data.len() == 1 {
            data.fill(0);
        } else {
            self.pci.read(u64::from(layout::PORT_PCI_CONFIG.start) + offset, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        const RESET_CPU: u8 = 1 << 2;
        match data {
            [byte] if offset == layout::PCI_RESET_CONTROL_OFFSET => {
                if byte & RESET_CPU != 0 {
                    self.control.end(Exit::Reset);
                }
            }
            data => self.pci.write(u64::from(layout::PORT_PCI_CONFIG.start) + offset, data),
        }
    }
}

#[cfg(test)]
#[path = "platform_test.rs"]
mod tests;
