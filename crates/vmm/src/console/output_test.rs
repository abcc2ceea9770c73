use super::*;
use std::io::Read;

#[test]
fn output_reaches_the_file_and_a_panic_the_control() {
    let control = Arc::new(Control::new().unwrap());
    let mut file = tempfile::tempfile().unwrap();
    let mut output = ConsoleOutput::new(Sink::File(file.try_clone().unwrap()), true, control.clone());
    output.write_all(b"Kernel panic - not syncing: test\n").unwrap();
    assert!(control.panicked() && !control.stopping());
    output.write_all(b"---[ end Kernel panic - not syncing ]---\n").unwrap();
    assert_eq!(control.exit(), Some(Exit::Panic));
    let mut text = String::new();
    std::io::Seek::rewind(&mut file).unwrap();
    file.read_to_string(&mut text).unwrap();
    assert!(text.ends_with("]---\n"));
}

#[test]
fn a_panic_is_not_heard_when_nobody_listens() {
    let control = Arc::new(Control::new().unwrap());
    let mut output = ConsoleOutput::new(Sink::Null, false, control.clone());
    output.write_all(b"Kernel panic - not syncing: test\n").unwrap();
    assert!(!control.panicked());
}

#[test]
fn a_full_pipe_does_not_hold_a_machine_that_ends() {
    let control = Arc::new(Control::new().unwrap());
    let (_reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
    let mut output = ConsoleOutput::new(Sink::File(writer.into()), true, control.clone());
    control.end(Exit::Timeout);
    output.write_all(&vec![b'x'; 1 << 20]).unwrap();
}
