use super::*;

fn heard(text: &str) -> Vec<Heard> {
    let mut listener = PanicListener::default();
    text.bytes().map(|byte| listener.hear(byte)).filter(|heard| *heard != Heard::Nothing).collect()
}

#[test]
fn a_panic_is_heard_once_and_ends_with_its_last_line() {
    let text = "[ 1.0] Kernel panic - not syncing: sysrq\r\nCPU: 0\r\n[ 1.1] ---[ end Kernel panic - not syncing: x ]---\r\nmore\n";
    assert_eq!(heard(text), [Heard::Panic, Heard::End]);
}

#[test]
fn a_panic_after_a_false_start_is_heard() {
    assert_eq!(heard("KKernel paniKernel panic - not syncing"), [Heard::Panic]);
}

#[test]
fn the_last_line_after_other_dashes_is_heard() {
    assert_eq!(heard("Kernel panic - not syncing\n-----[ end Kernel panic\n"), [Heard::Panic, Heard::End]);
    assert_eq!(heard("Kernel panic - not syncing\n--[ end ---[ end trace ]---\n"), [Heard::Panic]);
}

#[test]
fn an_end_without_a_panic_is_nothing() {
    assert_eq!(heard("---[ end Kernel panic\n"), []);
}
