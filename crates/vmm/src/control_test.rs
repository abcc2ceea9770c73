use super::*;

#[test]
fn the_first_reason_counts() {
    let control = Control::new().unwrap();
    control.end(Exit::PowerOff);
    control.end(Exit::Timeout);
    assert_eq!(control.exit(), Some(Exit::PowerOff));
    assert!(control.stopping());
}

#[test]
fn a_reset_after_a_panic_is_the_panic() {
    let control = Control::new().unwrap();
    control.report_panic();
    assert!(!control.stopping());
    control.end(Exit::Reset);
    assert_eq!(control.exit(), Some(Exit::Panic));
}

#[test]
fn a_timeout_after_a_panic_is_a_timeout() {
    let control = Control::new().unwrap();
    control.report_panic();
    control.end(Exit::Timeout);
    assert_eq!(control.exit(), Some(Exit::Timeout));
}
