use super::*;

#[test]
fn a_missing_file_is_named_in_one_line() {
    let error = NamedFile::open(Path::new("/nonexistent/vmlinuz")).unwrap_err();
    assert_eq!(error.to_string(), "/nonexistent/vmlinuz: cannot be opened: No such file or directory");
}

#[test]
fn a_directory_or_a_device_returns_error() {
    assert!(matches!(NamedFile::open(Path::new("/tmp")), Err(SourceError::Directory(_))));
    assert!(matches!(NamedFile::open(Path::new("/dev/null")), Err(SourceError::NotRegular(_))));
}

#[test]
fn a_file_from_bytes_has_them() {
    let file = NamedFile::from_bytes("guest", b"abc").unwrap();
    assert_eq!(file.parts().0.metadata().unwrap().len(), 3);
}
