use super::*;

#[test]
fn serial_config_reads_its_three_forms() {
    assert_eq!("stdio".parse(), Ok(SerialConfig::Stdio));
    assert_eq!("null".parse(), Ok(SerialConfig::Null));
    assert_eq!("file:/tmp/a:b".parse(), Ok(SerialConfig::File("/tmp/a:b".into())));
}

#[test]
fn serial_config_anything_else_returns_error() {
    for text in ["", "file", "file:", "pty", "stdio:x", "null:"] {
        assert!(text.parse::<SerialConfig>().is_err(), "{text}");
    }
}
