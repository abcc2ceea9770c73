use super::*;

#[test]
fn the_failed_calls_error_is_told() {
    let error = Error::io("cannot write", io::Error::from_raw_os_error(libc::EDQUOT)).at_offset(7);
    assert_eq!((error.errno(), error.strerror().as_str()), (libc::EDQUOT, "Disk quota exceeded"));
}

#[test]
fn without_a_failed_call_the_kind_is_told() {
    let words = |kind| Error::new(kind, "something").strerror();
    assert_eq!(words(ErrorKind::Corrupt), "Input/output error");
    assert_eq!(words(ErrorKind::NoSpace), "No space left on device");
    assert_eq!(words(ErrorKind::Unsupported), "Operation not supported");
    assert_eq!(words(ErrorKind::ReadOnly), "Operation not permitted");
}

#[test]
fn an_error_of_no_system_call_has_its_kinds_number() {
    let error = Error::io("cannot write", io::Error::new(io::ErrorKind::WriteZero, "the host does not write on"));
    assert_eq!(error.errno(), libc::EIO);
}
