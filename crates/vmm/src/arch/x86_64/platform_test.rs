use super::*;

fn control() -> Arc<Control> {
    Arc::new(Control::new().unwrap())
}

#[test]
fn soft_off_ends_the_machine_and_other_sleep_types_do_not() {
    let control = control();
    let registers = AcpiRegisters(control.clone());
    for value in [0, 0x20, (SLEEP_TYPE_S5 << 2), 0x20 | (3 << 2)] {
        registers.write(SLEEP_CONTROL_OFFSET.into(), &[value]);
    }
    assert_eq!(control.exit(), None);
    registers.write(SLEEP_CONTROL_OFFSET.into(), &[0x20 | (SLEEP_TYPE_S5 << 2)]);
    assert_eq!(control.exit(), Some(Exit::PowerOff));
}

#[test]
fn the_acpi_reset_register_resets_by_its_value_only() {
    let control = control();
    let registers = AcpiRegisters(control.clone());
    registers.write(RESET_OFFSET.into(), &[0xff]);
    assert_eq!(control.exit(), None);
    registers.write(RESET_OFFSET.into(), &[RESET_VALUE]);
    assert_eq!(control.exit(), Some(Exit::Reset));
}

#[test]
fn the_reset_control_register_resets_and_reads_as_zero() {
    let control = control();
    let ports = ConfigPorts { pci: Arc::new(Bus::new()), control: control.clone() };
    let mut byte = [0xaa];
    ports.read(1, &mut byte);
    assert_eq!(byte, [0]);
    ports.write(1, &[0x02]);
    ports.write(0, &[0, 0xff, 0, 0x80]);
    assert_eq!(control.exit(), None);
    ports.write(1, &[0x06]);
    assert_eq!(control.exit(), Some(Exit::Reset));
}

#[test]
fn the_keyboard_controller_knows_only_its_reset() {
    let control = control();
    let keyboard = KeyboardReset(control.clone());
    (0..=0xfd).for_each(|value| keyboard.write(0, &[value]));
    assert_eq!(control.exit(), None);
    keyboard.write(0, &[0xfe]);
    assert_eq!(control.exit(), Some(Exit::Reset));
}
