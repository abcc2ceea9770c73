//! What the engine must refuse: with one line that names the file and what is wrong, and no file changed.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::guest::{ask, policy};
use super::qemu::{self, text};
use crate::chain::OpenPolicy;
use crate::disk::Disk;
use crate::error::{Error, ErrorKind};
use crate::io::Buffer;
use crate::io::host::Engine;
use crate::request::Request;
use crate::secret::SecretSource;
use crate::spec::{DiskSpec, Format};
use crate::sync::Arc;

/// Which ways of opening are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refused {
    Always,
    /// Only for writing: it can still be read.
    Writing,
}

fn open(path: &Path, format: Format, readonly: bool) -> Result<Arc<Disk>, Error> {
    // The file of an opening that failed may be open a moment longer: in a child of another test that is about to run its program.
    let policy = OpenPolicy { lock_patience: Duration::from_secs(20), ..policy(Engine::Auto) };
    Disk::open(&DiskSpec { readonly, ..DiskSpec::new(path, format) }, &policy)
}

/// The line of a refusal, for the file as it is named.
fn assert_refused(path: &Path, format: Format, refused: Refused, kind: ErrorKind, says: &str) {
    let dir = path.parent().unwrap();
    for readonly in [false, true] {
        let before = files(dir);
        let opened = open(path, format, readonly);
        if readonly && refused == Refused::Writing {
            opened.unwrap().close().unwrap();
        } else {
            let error = opened.err().unwrap_or_else(|| panic!("opened (readonly: {readonly}), should say '{says}'"));
            let line = error.to_string();
            assert!(line.contains(says), "'{line}' does not say '{says}'");
            assert!(line.contains(text(dir)) && line.lines().count() == 1, "one line, naming the file: {line}");
            assert_eq!(error.kind(), kind, "{line}");
        }
        assert!(before == files(dir), "a refusal changed a file ({says})");
    }
}

/// Every regular file of a directory with its bytes.
fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let paths = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = paths.filter(|p| p.is_file()).map(|p| (p.clone(), fs::read(&p).unwrap())).collect();
    files.sort();
    files
}

/// An image with some data, in a directory of its own.
fn image(options: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", "-o", options, text(&path), "4M"]);
    qemu::io(&path, &["write -q -P 9 0 128k".into()]);
    (dir, path)
}

fn put(path: &Path, at: usize, bytes: &[u8]) {
    let mut image = fs::read(path).unwrap();
    image[at..at + bytes.len()].copy_from_slice(bytes);
    fs::write(path, image).unwrap();
}

fn number(path: &Path, at: usize) -> u64 {
    u64::from_be_bytes(fs::read(path).unwrap()[at..at + 8].try_into().unwrap())
}

/// An image with these bytes at this place is refused.
fn assert_refused_with(at: usize, bytes: &[u8], refused: Refused, kind: ErrorKind, says: &str) {
    let (_dir, path) = image("compat=1.1,cluster_size=65536");
    put(&path, at, bytes);
    assert_refused(&path, Format::Qcow2, refused, kind, says);
}

const CORRUPT: ErrorKind = ErrorKind::Corrupt;

#[test]
fn edge_01_other_versions_are_refused() {
    for version in [0u32, 1, 4, u32::MAX] {
        assert_refused_with(4, &version.to_be_bytes(), Refused::Always, ErrorKind::Unsupported, "version");
    }
}

#[test]
fn edge_02_header_lengths_outside_the_rules_are_refused() {
    for length in [0u32, 72, 103, 65537, u32::MAX] {
        assert_refused_with(100, &length.to_be_bytes(), Refused::Always, CORRUPT, "header");
    }
}

#[test]
fn edge_03_an_unknown_incompatible_feature_is_refused_by_its_name() {
    assert_refused_with(
        72,
        &[0, 0, 0, 0, 0, 0, 2, 0],
        Refused::Always,
        ErrorKind::Unsupported,
        "Unknown incompatible feature: 200",
    );
    let (_dir, path) = image("compat=1.1");
    // QEMU's own name table, in which one entry gets another number and a name as long as can be.
    let bytes = fs::read(&path).unwrap();
    let at = bytes.windows(12).position(|w| w == b"corrupt bit\0").unwrap();
    put(&path, at - 1, &[9]);
    put(&path, at, &[b'z'; 46]);
    put(&path, 72, &[0, 0, 0, 0, 0, 0, 2, 0]);
    assert_refused(&path, Format::Qcow2, Refused::Always, ErrorKind::Unsupported, &"z".repeat(46));
}

#[test]
fn edge_04_a_compression_type_without_its_bit_is_refused() {
    assert_refused_with(104, &[1], Refused::Always, CORRUPT, "compression");
    let (_dir, path) = image("compat=1.1,compression_type=zstd");
    put(&path, 104, &[0]);
    assert_refused(&path, Format::Qcow2, Refused::Always, CORRUPT, "compression");
    put(&path, 104, &[7]);
    assert_refused(&path, Format::Qcow2, Refused::Always, ErrorKind::Unsupported, "compression");
}

#[test]
fn edge_06_backing_names_too_long_or_outside_the_first_cluster_are_refused() {
    let name = |offset: u64, len: u32| [&offset.to_be_bytes()[..], &len.to_be_bytes()].concat();
    assert_refused_with(8, &name(512, 1024), Refused::Always, CORRUPT, "backing");
    assert_refused_with(8, &name(65530, 10), Refused::Always, CORRUPT, "backing");
    assert_refused_with(8, &name(u64::MAX - 4, 10), Refused::Always, CORRUPT, "backing");
}

#[test]
fn edge_07_refcount_orders_above_6_are_refused() {
    for order in [7u32, 64, u32::MAX] {
        assert_refused_with(96, &order.to_be_bytes(), Refused::Always, CORRUPT, "refcount");
    }
}

#[test]
fn edge_08_tables_outside_their_bounds_are_refused() {
    for bits in [0u32, 8, 22, 63, u32::MAX] {
        assert_refused_with(20, &bits.to_be_bytes(), Refused::Always, CORRUPT, "cluster");
    }
    assert_refused_with(36, &u32::MAX.to_be_bytes(), Refused::Always, CORRUPT, "l1_");
    assert_refused_with(40, &0x30001u64.to_be_bytes(), Refused::Always, CORRUPT, "l1_");
    assert_refused_with(40, &(u64::MAX - 65535).to_be_bytes(), Refused::Always, CORRUPT, "l1_");
    assert_refused_with(48, &0x10001u64.to_be_bytes(), Refused::Always, CORRUPT, "refcount_table_");
    assert_refused_with(56, &u32::MAX.to_be_bytes(), Refused::Always, CORRUPT, "refcount_table_");
    assert_refused_with(60, &65537u32.to_be_bytes(), Refused::Always, CORRUPT, "snapshots");
}

#[test]
fn edge_09_missing_refcounts_and_an_l1_table_too_small_are_refused() {
    assert_refused_with(56, &0u32.to_be_bytes(), Refused::Always, CORRUPT, "refcount_table_");
    assert_refused_with(36, &0u32.to_be_bytes(), Refused::Always, CORRUPT, "l1_");
    assert_refused_with(24, &(1u64 << 40).to_be_bytes(), Refused::Always, CORRUPT, "l1_");
    assert_refused_with(24, &u64::MAX.to_be_bytes(), Refused::Always, CORRUPT, "");
}

#[test]
fn edge_12_corrupt_images_are_refused_for_writing_only() {
    assert_refused_with(72, &[0, 0, 0, 0, 0, 0, 0, 2], Refused::Writing, CORRUPT, "marked corrupt");
    assert_refused_with(72, &[0, 0, 0, 0, 0, 0, 0, 3], Refused::Writing, CORRUPT, "marked corrupt");
}

#[test]
fn edge_12_a_dirty_image_with_other_damage_is_refused_for_writing_only() {
    let (_dir, path) = image("compat=1.1,cluster_size=65536");
    // The second L2 entry leads past the end of the file: what it should say is not known.
    let l2 = number(&path, number(&path, 40) as usize) & 0x00ff_ffff_ffff_fe00;
    put(&path, l2 as usize + 8, &(1u64 << 63 | 1 << 30).to_be_bytes());
    put(&path, 79, &[1]);
    assert_refused(&path, Format::Qcow2, Refused::Writing, CORRUPT, "not closed");
}

#[test]
fn edge_13_encrypted_images_are_refused_without_their_secret() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let secret = "secret,id=s,data=x";
    qemu::img(&["create", "-q", "-f", "qcow2", "--object", secret, "-o", options, text(&path), "1M"]);
    assert_refused(&path, Format::Qcow2, Refused::Always, ErrorKind::Invalid, "give its secret with secret=");
    let secret = dir.path().join("wrong");
    fs::write(&secret, "y").unwrap();
    let spec = DiskSpec { secret: Some(SecretSource::File(secret)), ..DiskSpec::new(&path, Format::Qcow2) };
    let error = Disk::open(&spec, &policy(Engine::Auto)).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.to_string().contains("Invalid password, cannot unlock any keyslot"), "{error}");
    let spec = DiskSpec { secret: Some("file:/nonexistent".parse().unwrap()), ..spec };
    let error = Disk::open(&spec, &policy(Engine::Auto)).err().unwrap().to_string();
    assert!(error.contains("cannot read the secret from /nonexistent"), "{error}");
}

#[test]
fn data_files_that_are_missing_or_elsewhere_are_refused() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = dir.path().join("disk.qcow2");
    for (data, removed, kind, says) in [
        (dir.path().join("data.raw"), true, ErrorKind::NotFound, "data file"),
        (other.path().join("data.raw"), false, ErrorKind::Refused, "outside the allowed directories"),
    ] {
        let options = format!("data_file={}", text(&data));
        qemu::img(&["create", "-q", "-f", "qcow2", "-o", &options, text(&path), "1M"]);
        if removed {
            fs::remove_file(&data).unwrap();
        }
        assert_refused(&path, Format::Qcow2, Refused::Always, kind, says);
    }
}

#[test]
fn data_files_that_are_another_layers_file_too_are_refused_for_writing() {
    // The data file of which layer is which other file.
    for (of, is) in
        [("top.raw", "base.raw"), ("top.raw", "middle.raw"), ("top.raw", "middle.qcow2"), ("middle.raw", "top.qcow2")]
    {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("base.raw"), vec![1; 1 << 20]).unwrap();
        for (layer, below, format) in [("middle", "base.raw", "raw"), ("top", "middle.qcow2", "qcow2")] {
            let options = format!("data_file={}", at(&format!("{layer}.raw")).display());
            let path = at(&format!("{layer}.qcow2"));
            qemu::img(&["create", "-q", "-f", "qcow2", "-o", &options, "-b", below, "-F", format, text(&path)]);
        }
        open(&at("top.qcow2"), Format::Qcow2, false).unwrap().close().unwrap();
        fs::remove_file(at(of)).unwrap();
        fs::hard_link(at(is), at(of)).unwrap();
        assert_refused(&at("top.qcow2"), Format::Qcow2, Refused::Writing, ErrorKind::Refused, "another layer's");
    }
}

#[test]
fn truncated_images_are_refused() {
    for len in [0u64, 3] {
        let (_dir, path) = image("compat=1.1");
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(len).unwrap();
        assert_refused(&path, Format::Qcow2, Refused::Always, ErrorKind::Invalid, "not a qcow2 image");
    }
    for len in [5u64, 71, 80, 103] {
        let (_dir, path) = image("compat=1.1");
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(len).unwrap();
        assert_refused(&path, Format::Qcow2, Refused::Always, CORRUPT, "");
    }
    for (at, what) in [(40, "L1 table"), (48, "refcount table")] {
        let (_dir, path) = image("compat=1.1");
        let table = number(&path, at);
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(table + 4).unwrap();
        // The refcount table lies before the L1 table.
        let says = if what == "L1 table" { "L1 table" } else { "past the end of the file" };
        assert_refused(&path, Format::Qcow2, Refused::Always, CORRUPT, says);
    }
}

#[test]
fn a_backing_file_without_a_format_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (base, path) = (dir.path().join("base.raw"), dir.path().join("disk.qcow2"));
    fs::write(&base, vec![1; 1 << 20]).unwrap();
    qemu::img(&["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", text(&path)]);
    let bytes = fs::read(&path).unwrap();
    // The extension that says the format becomes one that nobody knows.
    let at = bytes.windows(4).position(|w| w == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
    put(&path, at, &[0x7f, 1, 2, 3]);
    assert_refused(&path, Format::Qcow2, Refused::Always, ErrorKind::Refused, "is not guessed");
    let spec = DiskSpec { backing_format: Some(Format::Raw), readonly: true, ..DiskSpec::new(&path, Format::Qcow2) };
    Disk::open(&spec, &policy(Engine::Auto)).unwrap().close().unwrap();
}

/// An image whose header names a backing file that nobody looked at.
fn overlay_on(dir: &Path, name: &str, backing: &str, format: &str) -> PathBuf {
    let path = dir.join(name);
    qemu::img(&["create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", format, text(&path), "1M"]);
    path
}

#[test]
fn edge_51_backing_files_that_may_not_be_opened_are_refused() {
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret.raw");
    fs::write(&secret, vec![1; 1 << 20]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let inside = dir.path().join("sub");
    fs::create_dir(&inside).unwrap();
    std::os::unix::fs::symlink(&secret, inside.join("link")).unwrap();
    let up = format!("../../{}/secret.raw", outside.path().file_name().unwrap().to_str().unwrap());
    for name in [text(&secret), &up, "link", &format!("file:{}", text(&secret))] {
        let path = overlay_on(&inside, "disk.qcow2", name, "raw");
        assert_refused(&path, Format::Qcow2, Refused::Always, ErrorKind::Refused, "outside the allowed directories");
        let allowed =
            crate::chain::OpenPolicy { allow_dirs: vec![outside.path().to_path_buf()], ..policy(Engine::Auto) };
        let spec = DiskSpec { readonly: true, ..DiskSpec::new(&path, Format::Qcow2) };
        Disk::open(&spec, &allowed).unwrap().close().unwrap();
    }
    for (name, says) in [
        ("nbd://localhost/x", "not a plain file"),
        ("json:{\"driver\":\"host_device\"}", "A block device must be specified"),
        ("fat:/etc", "not a plain file"),
    ] {
        // Written by hand: QEMU would look at some of them.
        let path = overlay_on(&inside, "disk.qcow2", &"n".repeat(name.len()), "raw");
        put(&path, number(&path, 8) as usize, name.as_bytes());
        assert_refused(&path, Format::Qcow2, Refused::Always, ErrorKind::Refused, says);
    }
    let path = overlay_on(&inside, "disk.qcow2", "missing.raw", "raw");
    assert_refused(&path, Format::Qcow2, Refused::Always, ErrorKind::NotFound, "missing.raw");
    let path = overlay_on(&inside, "disk.qcow2", "link", "vmdk");
    assert_refused(&path, Format::Qcow2, Refused::Always, ErrorKind::Unsupported, "vmdk");
}

#[test]
fn edge_50_chains_that_loop_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let itself = overlay_on(dir.path(), "itself.qcow2", "itself.qcow2", "qcow2");
    assert_refused_as_loop(&itself);
    let first = overlay_on(dir.path(), "first.qcow2", "second.qcow2", "qcow2");
    overlay_on(dir.path(), "second.qcow2", "third.qcow2", "qcow2");
    // By device and inode: another name of the same file is no other file.
    fs::hard_link(&first, dir.path().join("third.qcow2")).unwrap();
    assert_refused_as_loop(&first);
}

/// Not as locked: the chain's own lock is nobody else's.
fn assert_refused_as_loop(path: &Path) {
    let before = files(path.parent().unwrap());
    let read = open(path, Format::Qcow2, true).err().unwrap();
    assert!(read.to_string().contains("loops"), "{read}");
    let write = open(path, Format::Qcow2, false).err().unwrap();
    assert!(write.to_string().contains("loops"), "{write}");
    assert!(before == files(path.parent().unwrap()));
}

#[test]
fn files_of_another_kind_are_refused() {
    let (dir, path) = image("compat=1.1");
    assert_refused(&path, Format::Raw, Refused::Always, ErrorKind::Invalid, "format=qcow2");
    let raw = dir.path().join("disk.raw");
    fs::write(&raw, vec![1; 1 << 20]).unwrap();
    assert_refused(&raw, Format::Qcow2, Refused::Always, ErrorKind::Invalid, "format=raw");
    let directory = dir.path().join("directory");
    fs::create_dir(&directory).unwrap();
    let fifo = dir.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
    for format in [Format::Qcow2, Format::Raw] {
        assert_refused(&directory, format, Refused::Always, ErrorKind::Invalid, "directory");
        assert_refused(&fifo, format, Refused::Always, ErrorKind::Io, "not a regular file");
        assert_refused(&dir.path().join("nothing"), format, Refused::Always, ErrorKind::NotFound, "Could not open");
    }
    let overlay = overlay_on(dir.path(), "overlay.qcow2", "directory", "raw");
    assert_refused(&overlay, Format::Qcow2, Refused::Always, ErrorKind::Invalid, "directory");
    let overlay = overlay_on(dir.path(), "overlay.qcow2", "disk.raw", "qcow2");
    assert_refused(&overlay, Format::Qcow2, Refused::Always, ErrorKind::Invalid, "not a qcow2 image");
}

/// An L2 entry of the first cluster that breaks the rules: opened, but the cluster is an error to read and to write. Whether the image is
/// then marked corrupt.
fn assert_damaged(options: &str, entry: u64, marked: bool) {
    let (_dir, path) = image(options);
    let l2 = number(&path, number(&path, 40) as usize) & 0x00ff_ffff_ffff_fe00;
    put(&path, l2 as usize, &entry.to_be_bytes());
    let mut expected = fs::read(&path).unwrap();
    expected[79] |= u8::from(marked) << 1;
    let disk = open(&path, Format::Qcow2, false).unwrap();
    let mut queue = disk.queue().unwrap();
    let buffer = Buffer::from_bytes(&[7; 512]);
    let data = || vec![buffer.seg(0, 512)];
    for request in [
        Request::Read { offset: 0, data: data() },
        Request::Write { offset: 0, data: data() },
        Request::WriteZeroes { offset: 0, len: 65536, unmap: true },
    ] {
        let error = ask(&mut queue, request).expect_err("the entry is damaged");
        assert_eq!(error.kind(), CORRUPT, "{error}");
    }
    // Its neighbour is well.
    ask(&mut queue, Request::Read { offset: 65536, data: data() }).unwrap();
    assert_eq!(*buffer, [9; 512]);
    let neighbour = ask(&mut queue, Request::Write { offset: 65536, data: data() });
    assert_eq!(neighbour.map_err(|e| e.kind()), if marked { Err(CORRUPT) } else { Ok(()) });
    drop(queue);
    disk.close().unwrap();
    assert!(expected == fs::read(&path).unwrap(), "damage was written to");
    if marked {
        assert_refused(&path, Format::Qcow2, Refused::Writing, CORRUPT, "marked corrupt");
        let info = qemu::run("qemu-img", &["info", text(&path)]);
        assert!(info.said.contains("corrupt: true"), "{info:?}");
    }
}

#[test]
fn edge_17_the_zero_bit_in_version_2_is_an_error() {
    assert_damaged("compat=0.10,cluster_size=65536", 1, false);
}

#[test]
fn edge_18_an_unaligned_offset_is_an_error() {
    assert_damaged("compat=1.1,cluster_size=65536", 1 << 63 | 0x50200, true);
}

#[test]
fn reserved_bits_of_an_entry_are_an_error_of_that_entry_and_stay_what_they_are() {
    for options in ["cluster_size=65536", "cluster_size=65536,extended_l2=on"] {
        for (bits, copied_table) in [(1u64 << 56, false), (0x3f00_0000_0000_01fc, true), (1 << 1, true)] {
            let (_dir, path) = image(options);
            let l1 = number(&path, 40) as usize;
            let l2 = (number(&path, l1) & 0x00ff_ffff_ffff_fe00) as usize;
            let entry = number(&path, l2) | bits;
            put(&path, l2, &entry.to_be_bytes());
            if copied_table {
                // As if a snapshot shared the table: it is copied before it changes.
                put(&path, l1, &(l2 as u64).to_be_bytes());
            }
            let disk = open(&path, Format::Qcow2, false).unwrap();
            let mut queue = disk.queue().unwrap();
            let buffer = Buffer::from_bytes(&[7; 4096]);
            let data = || vec![buffer.seg(0, 4096)];
            for offset in [65536, 1 << 20] {
                ask(&mut queue, Request::Write { offset, data: data() }).unwrap();
            }
            for request in [
                Request::Read { offset: 0, data: data() },
                Request::Write { offset: 4096, data: data() },
                Request::Discard { offset: 0, len: 65536 },
            ] {
                let error = ask(&mut queue, request).expect_err("the entry is damaged");
                assert!(error.kind() == CORRUPT && error.to_string().contains("reserved bits"), "{error}");
            }
            ask(&mut queue, Request::Read { offset: 65536, data: data() }).unwrap();
            assert_eq!(*buffer, [7; 4096]);
            drop(queue);
            disk.close().unwrap();
            let now = (number(&path, l1) & 0x00ff_ffff_ffff_fe00) as usize;
            assert_eq!(now != l2, copied_table);
            assert_eq!(number(&path, now), entry, "{options}: the entry has changed");
            // With the bits gone the disk is whole again.
            put(&path, now, &(entry & !bits).to_be_bytes());
            qemu::assert_clean(&path);
            let content = qemu::content(&path);
            assert!(content[..65536] == [9; 65536] && content[65536..69632] == [7; 4096]);
            assert!(content[1 << 20..(1 << 20) + 4096] == [7; 4096]);
        }
    }
}
