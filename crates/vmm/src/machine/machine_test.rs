use super::*;
use crate::arch;

fn config(word: &str) -> Config {
    Config {
        kernel: NamedFile::from_bytes("tiny-guest", arch::TINY_GUEST).unwrap(),
        initrd: None,
        cmdline: word.into(),
        memory: 32 << 20,
        cpus: 2,
        serial: SerialConfig::Null,
        timeout: None,
        on_reboot: OnReboot::Exit,
        devices: vec![Box::new(RngSource), Box::new(RngSource)],
        panic_line: true,
    }
}

struct RngSource;

impl DeviceSource for RngSource {
    fn make(&self) -> Result<Box<dyn VirtioDevice>, DeviceError> {
        Ok(Box::new(cowhand_virtio::rng::Rng::new()))
    }
}

struct BrokenSource;

impl DeviceSource for BrokenSource {
    fn make(&self) -> Result<Box<dyn VirtioDevice>, DeviceError> {
        Err(DeviceError("disk x: broken".into()))
    }
}

#[test]
fn a_device_that_cannot_be_made_is_the_error() {
    let mut config = config("");
    config.devices.push(Box::new(BrokenSource));
    let error = Machine::new(&kvm::open().unwrap(), &config, &Sink::Null).err().unwrap();
    assert_eq!(error.to_string(), "disk x: broken");
}

#[test]
fn no_processors_and_too_many_return_error() {
    let kvm = kvm::open().unwrap();
    for cpus in [0, 100_000] {
        let config = Config { cpus, ..config("") };
        assert!(matches!(Machine::new(&kvm, &config, &Sink::Null), Err(MachineError::Cpus { .. })));
    }
}

/// Numbers that look random and are the same in every run (Marsaglia's xorshift).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[test]
fn rubbish_written_to_every_port_never_takes_the_machine_down() {
    let machine = Machine::new(&kvm::open().unwrap(), &config(""), &Sink::Null).unwrap();
    let pio = &machine.buses().pio;
    let mut numbers = Numbers(1);
    for port in (0..=0xffff).cycle().take(8 * 0x1_0000) {
        let mut data = numbers.next().to_le_bytes();
        let len = [1, 2, 4][(numbers.next() % 3) as usize];
        pio.write(port, &data[..len]);
        pio.read(port, &mut data[..len]);
    }
    // Among so much there was a reset or a power-off, and nothing worse.
    assert!(matches!(machine.control().exit(), Some(Exit::Reset | Exit::PowerOff | Exit::Panic)));
}

#[test]
fn rubbish_written_to_configuration_space_and_windows_never_takes_the_machine_down() {
    let machine = Machine::new(&kvm::open().unwrap(), &config(""), &Sink::Null).unwrap();
    let mmio = &machine.buses().mmio;
    let mut numbers = Numbers(2);
    let window64 = arch::layout::pci_window64(32 << 20, 48);
    for _ in 0..300_000 {
        let base = match numbers.next() % 3 {
            // The first buses, where everything is.
            0 => arch::layout::PCI_ECAM.start + numbers.next() % (4 << 20),
            1 => arch::layout::PCI_WINDOW32.start + numbers.next() % (8 << 20),
            _ => window64.start + numbers.next() % (8 << 20),
        };
        let mut data = numbers.next().to_le_bytes();
        let len = [1, 2, 4, 8][(numbers.next() % 4) as usize];
        mmio.write(base, &data[..len]);
        mmio.read(base, &mut data[..len]);
    }
}
