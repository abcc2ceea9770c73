//! Backing files that a header describes by `json:`: read as QEMU reads them, and no way around what may be opened.

use std::path::Path;

use super::guest::{policy, read_all};
use super::qemu::{self, text};
use super::{dice, read_test};
use crate::disk::Disk;
use crate::error::ErrorKind;
use crate::io::host::Engine;
use crate::jobs::commit::{CommitOptions, commit};
use crate::spec::{DiskSpec, Format};

/// An overlay in `dir` whose header names `backing`, without a look at it.
fn overlay(dir: &Path, backing: &str, format: &str) -> DiskSpec {
    let path = dir.join("overlay.qcow2");
    qemu::img(&["create", "-q", "-u", "-f", "qcow2", "-F", format, "-b", backing, text(&path), "1M"]);
    DiskSpec { readonly: true, ..DiskSpec::new(&path, Format::Qcow2) }
}

#[test]
fn a_backing_file_that_a_header_describes_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base,1.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", text(&base), "1M"]);
    qemu::io(&base, &["write -P 7 64k 128k".into()]);
    let json = format!(r#"json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{}"}}}}"#, text(&base));
    let spec = overlay(dir.path(), &json, "qcow2");
    let disk = Disk::open(&spec, &policy(Engine::Auto)).unwrap();
    let read = read_all(&disk, 1, &mut dice("json"));
    read_test::assert_same(&read, &qemu::content(&spec.path));
    assert_eq!(disk.layers().len(), 2);
}

#[test]
fn what_is_committed_goes_where_the_description_says() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    std::fs::write(&base, vec![1; 2 << 20]).unwrap();
    let json = format!(r#"json:{{"driver":"raw","offset":65536,"size":1048576,"file.filename":"{}"}}"#, text(&base));
    let spec = overlay(dir.path(), &json, "raw");
    qemu::io(&spec.path, &["write -P 7 64k 64k".into()]);
    let spec = DiskSpec { readonly: false, ..spec };
    commit(&spec, &policy(Engine::Auto), &CommitOptions::default(), Box::new(|_, _| ())).unwrap();
    let committed = std::fs::read(&base).unwrap();
    assert!(committed.iter().enumerate().all(|(at, &byte)| byte == if at >> 16 == 2 { 7 } else { 1 }));
}

#[test]
fn a_description_opens_nothing_that_a_name_would_not() {
    let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (inside, outside) = (dir.path().join("inside"), elsewhere.path().join("outside"));
    std::fs::write(&outside, vec![1; 1 << 20]).unwrap();
    qemu::img(&["create", "-q", "-f", "qcow2", text(&inside), "1M"]);
    let (inside, outside) = (text(&inside), text(&outside));
    for (json, says) in [
        (format!(r#"{{"driver":"raw","file.filename":"{outside}"}}"#), "outside the allowed directories"),
        (
            format!(
                r#"{{"driver":"qcow2","file.filename":"{inside}","backing":{{"driver":"raw","file.filename":"{outside}"}}}}"#
            ),
            "outside the allowed directories",
        ),
        (
            format!(r#"{{"driver":"qcow2","file.filename":"{inside}","data-file.filename":"{outside}"}}"#),
            "outside the allowed directories",
        ),
        (r#"{"driver":"nbd","host":"127.0.0.1"}"#.into(), "Unknown driver 'nbd'"),
        (format!(r#"{{"driver":"raw","offset":512,"file.filename":"{outside}"}}"#), "outside the allowed directories"),
        (
            format!(r#"{{"driver":"raw","file":{{"driver":"qcow2","file.filename":"{outside}"}}}}"#),
            "outside the allowed directories",
        ),
        (r#"{"driver":"blkdebug","file.filename":"x"}"#.into(), "A block device must be specified"),
        (
            format!(r#"{{"driver":"qcow2","file":{{"driver":"blkdebug","image.filename":"{outside}"}}}}"#),
            "outside the allowed directories",
        ),
        (
            format!(
                r#"{{"driver":"qcow2","file":{{"driver":"blkdebug","config":"{outside}","image.filename":"{inside}"}}}}"#
            ),
            "outside the allowed directories",
        ),
        (format!(r#"{{"driver":"qcow2","file.filename":"{inside}","encrypt.key-secret":"s"}}"#), "No secret"),
        (
            format!(r#"{{"driver":"qcow2","file":{{"driver":"qcow2","file.filename":"{inside}"}}}}"#),
            "may not ask for an image inside of another image's disk",
        ),
        (
            format!(
                r#"{{"driver":"qcow2","file.filename":"{inside}","backing":{{"driver":"raw","file":{{"driver":"qcow2","file.filename":"{inside}"}}}}}}"#
            ),
            "may not ask for an image inside of another image's disk",
        ),
        (
            format!(
                r#"{{"driver":"qcow2","file.filename":"{inside}","data-file":{{"driver":"null-co","latency-ns":9000000000000}}}}"#
            ),
            "may not ask for null-co that takes its time",
        ),
        (
            format!(
                r#"{{"driver":"raw","offset":512,"file":{{"driver":"blkdebug","align":1073741824,"image.filename":"{inside}"}}}}"#
            ),
            "may not ask for blkdebug that changes sizes",
        ),
        ("[]".into(), "an object is expected"),
    ] {
        let spec = overlay(dir.path(), &format!("json:{json}"), "qcow2");
        let error = Disk::open(&spec, &policy(Engine::Auto)).err().unwrap_or_else(|| panic!("opened: {json}"));
        assert!(error.to_string().contains(says), "{json}: {error}");
        assert_eq!(error.kind(), ErrorKind::Refused, "{json}: {error}");
    }
}

#[test]
fn an_image_that_names_what_it_shows_as_its_backing_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let itself = dir.path().join("overlay.qcow2");
    for (driver, file) in [("qcow2", "qcow2"), ("raw", "qcow2")] {
        let json =
            format!(r#"json:{{"driver":"{driver}","file":{{"driver":"{file}","file.filename":"{}"}}}}"#, text(&itself));
        let spec = overlay(dir.path(), &json, driver);
        let error = Disk::open(&spec, &policy(Engine::Auto)).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
    }
}
