use super::*;

fn device() -> (Arc<Control>, Pvpanic) {
    let control = Arc::new(Control::new().unwrap());
    (control.clone(), Pvpanic(control))
}

#[test]
fn a_panic_ends_the_machine() {
    let (control, device) = device();
    device.write(0, &[0]);
    assert_eq!(control.exit(), None);
    device.write(0, &[PANICKED]);
    assert_eq!(control.exit(), Some(Exit::Panic));
}

#[test]
fn a_crash_kernel_goes_on_and_its_reset_is_the_panic() {
    let (control, device) = device();
    device.write(0, &[CRASH_LOADED]);
    assert_eq!(control.exit(), None);
    assert!(!control.panic_unfinished());
    control.end(Exit::Reset);
    assert_eq!(control.exit(), Some(Exit::Panic));
}
