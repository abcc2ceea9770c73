use super::*;

#[test]
fn size_reads_numbers_with_and_without_units() {
    assert_eq!(size("4096"), Ok(4096));
    assert_eq!(size("512M"), Ok(512 << 20));
    assert_eq!(size("2g"), Ok(2 << 30));
}

#[test]
fn size_nonsense_returns_error() {
    for text in ["", "M", "-1", "1.5G", "512MB", "0x10", "16777216T", "ß"] {
        assert!(size(text).is_err(), "{text}");
    }
}

#[test]
fn duration_reads_its_units() {
    assert_eq!(duration("90"), Ok(Duration::from_secs(90)));
    assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
    assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
    assert_eq!(duration("1h"), Ok(Duration::from_secs(3600)));
}

#[test]
fn duration_nonsense_returns_error() {
    for text in ["", "s", "1d", "-5s", "99999999999999999999h", "9999999999s"] {
        assert!(duration(text).is_err(), "{text}");
    }
}
