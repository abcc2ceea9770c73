//! What is wrong with a header is said in QEMU's words.

use std::fs;
use std::os::unix::fs::FileExt;

use super::guest::policy;
use super::qemu::{self, text};
use crate::disk::Disk;
use crate::io::host::Engine;
use crate::spec::{DiskSpec, Format};

/// What is written over a sound header, and where.
const DAMAGES: [(u64, &[u8]); 22] = [
    (0, b"QFJ"),
    (4, &[0, 0, 0, 9]),
    (8, &[0xff; 8]),
    (8, &[0, 0, 0, 0, 0, 0, 0x10, 0, 0xff, 0xff, 0xff, 0xff]),
    (8, &[0, 0, 0, 0, 0, 0, 0, 116]),
    (20, &[0, 0, 0, 8]),
    (20, &[0, 0, 0, 22]),
    (32, &[0, 0, 0, 7]),
    (36, &[0xff, 0xff, 0xff, 0xff]),
    (36, &[0, 0, 0, 0]),
    (40, &[0x12, 0x34, 0x56, 0x78, 0x90, 0xab, 0xcd, 0xef]),
    (40, &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 1]),
    (48, &[0x12, 0x34, 0x56, 0x78, 0x90, 0xab, 0xcd, 0xef]),
    (56, &[0, 2, 0, 1]),
    (56, &[0, 0, 0, 0]),
    (60, &[0x7f, 0xff, 0xff, 0xff]),
    (60, &[0, 0, 0, 0, 0x12, 0x34, 0x56, 0x78, 0x90, 0xab, 0xcd, 0xef]),
    (72, &[0x80, 0, 0, 0, 0, 0, 0, 0x20]),
    (96, &[0, 0, 0, 7]),
    (100, &[0, 0, 0, 80]),
    (100, &[0, 1, 0, 8]),
    (112, &[0x12, 0x34, 0x56, 0x78, 0x7f, 0xff, 0xff, 0xff]),
];

#[test]
fn what_is_wrong_with_a_header_is_said_in_qemus_words() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    for (at, bytes) in DAMAGES {
        qemu::img(&["create", "-q", "-f", "qcow2", text(&path), "64M"]);
        fs::File::options().write(true).open(&path).unwrap().write_all_at(bytes, at).unwrap();
        let theirs = qemu::run("qemu-img", &["compare", "-f", "qcow2", "-F", "qcow2", text(&path), text(&path)]).said;
        let spec = DiskSpec { readonly: true, ..DiskSpec::new(&path, Format::Qcow2) };
        let error = Disk::open(&spec, &policy(Engine::Auto)).err().expect("a damaged header");
        let ours = format!("qemu-img: Could not open '{}': {}\n", path.display(), error.reason());
        assert_eq!(ours, theirs, "{bytes:x?} at {at}: {error}");
    }
}
