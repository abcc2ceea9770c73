use super::*;

fn probed(bytes: &[u8]) -> std::result::Result<Format, String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    probe_format(&FileSpec::host(file.path()), &OpenPolicy::host()).map_err(|e| e.reason())
}

#[test]
fn what_begins_as_qcow2_is_qcow2_and_what_begins_as_nothing_is_raw() {
    assert_eq!(probed(b"QFI\xfb\0\0\0\x03"), Ok(Format::Qcow2));
    assert_eq!(probed(&[0; 512]), Ok(Format::Raw));
    assert_eq!(probed(b""), Ok(Format::Raw));
}

#[test]
fn formats_that_cowhand_does_not_have_are_named() {
    let image = tempfile::NamedTempFile::new().unwrap();
    for format in ["vmdk", "vpc", "vhdx", "vdi", "qed", "qcow", "parallels"] {
        let made = std::process::Command::new("qemu-img")
            .args(["create", "-q", "-f", format])
            .arg(image.path())
            .arg("16M")
            .status()
            .unwrap();
        assert!(made.success(), "{format}");
        let error = probe_format(&FileSpec::host(image.path()), &OpenPolicy::host()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{format}");
        assert!(error.reason().contains(&format!("'{format}'")), "{format}: {error}");
    }
}
