//! Discards that keep their place (`discard-no-unref=on`), held against QEMU's option of that name.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::guest::{ask, policy};
use super::image::{Base, Shape};
use super::matrix;
use super::qemu::{self, text};
use super::write_test::assert_written_well;
use crate::disk::Disk;
use crate::error::ErrorKind;
use crate::io::Buffer;
use crate::io::host::Engine;
use crate::request::Request;
use crate::spec::{DiskSpec, Format};

fn spec(path: &Path) -> DiskSpec {
    DiskSpec { discard_no_unref: true, ..DiskSpec::new(path, Format::Qcow2) }
}

const MIB: u64 = 1 << 20;

/// What is done to both images: discards of whole clusters and of parts, zeros that may and may not give space back, all of it
/// over clusters that are data, zero, not there, or shared with a snapshot.
const STEPS: [(&str, u64, u64); 7] = [
    ("discard", MIB, MIB),
    ("write -z -u", 3 * MIB, MIB),
    ("write -z", 5 * MIB, MIB),
    ("discard", 5 * MIB, MIB / 2),
    ("discard", 7 * MIB + 4096, MIB / 2),
    ("write -P 3", MIB + 65536, 65536),
    ("discard", 15 * MIB, MIB),
];

fn ours(path: &Path) {
    let disk = Disk::open(&spec(path), &policy(Engine::Auto)).unwrap();
    let mut queue = disk.queue().unwrap();
    let buffer = Buffer::from_bytes(&[3; 65536]);
    for (what, offset, len) in STEPS {
        let request = match what {
            "discard" => Request::Discard { offset, len },
            "write -z" => Request::WriteZeroes { offset, len, unmap: false },
            "write -z -u" => Request::WriteZeroes { offset, len, unmap: true },
            _ => Request::Write { offset, data: vec![buffer.seg(0, buffer.len())] },
        };
        ask(&mut queue, request).unwrap();
    }
    drop(queue);
    disk.close().unwrap();
}

fn theirs(path: &Path) {
    let opened = format!(
        "driver=qcow2,discard=unmap,discard-no-unref=on,file.driver=file,file.discard=unmap,file.filename={}",
        path.display()
    );
    let commands: Vec<_> = STEPS
        .iter()
        .map(|(what, offset, len)| {
            let (verb, options) = what.split_once(' ').unwrap_or((what, ""));
            format!("{verb} -q {options} {offset} {len}")
        })
        .collect();
    let mut args = vec!["--image-opts"];
    commands.iter().for_each(|command| args.extend(["-c", command.as_str()]));
    args.push(&opened);
    let said = qemu::succeed("qemu-io", &args);
    assert!(!said.contains("rror") && !said.contains("failed"), "{said}");
}

/// Where the clusters lie, as `qemu-img map` has it.
fn map(path: &Path) -> String {
    qemu::img(&["map", "--output=json", "-f", "qcow2", text(path)])
}

#[test]
fn what_is_discarded_keeps_its_place_as_in_qemu() {
    for options in ["cluster_size=65536", "cluster_size=4096", "cluster_size=65536,extended_l2=on"] {
        let dir = tempfile::tempdir().unwrap();
        let [ours_path, theirs_path] = ["ours.qcow2", "theirs.qcow2"].map(|name| dir.path().join(name));
        qemu::img(&["create", "-q", "-f", "qcow2", "-o", options, text(&ours_path), "16M"]);
        qemu::io(&ours_path, &["write -q -P 1 0 12M".into()]);
        fs::copy(&ours_path, &theirs_path).unwrap();
        let before = fs::metadata(&ours_path).unwrap();
        ours(&ours_path);
        theirs(&theirs_path);
        qemu::assert_clean(&ours_path);
        assert!(qemu::content(&ours_path) == qemu::content(&theirs_path), "{options}");
        assert_eq!(map(&ours_path), map(&theirs_path), "{options}");
        let after = fs::metadata(&ours_path).unwrap();
        assert_eq!(after.len(), before.len(), "{options}: the file grew");
        assert!(after.blocks() * 512 + 2 * MIB < before.blocks() * 512, "{options}: the host got nothing back");
    }
}

#[test]
fn what_a_snapshot_shares_is_not_emptied_with_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", text(&path), "16M"]);
    qemu::io(&path, &["write -q -P 1 0 12M".into()]);
    qemu::img(&["snapshot", "-c", "before", text(&path)]);
    let before = qemu::content(&path);
    ours(&path);
    qemu::assert_clean(&path);
    assert!(qemu::content_with(&path, &["-l", "snapshot.name=before"]) == before);
}

#[test]
fn images_are_written_well_when_discards_keep_their_place() {
    let shapes = [
        Shape::new(4096),
        Shape { base: Base::Raw(70), ..Shape::new(65536) },
        Shape { base: Base::Qcow2(120), snapshot: true, ..Shape::new(4096) },
        Shape { compressed: true, ..Shape::new(65536) },
        Shape { options: &["extended_l2=on"], base: Base::Raw(110), ..Shape::new(16384) },
        Shape { data_file: true, ..Shape::new(65536) },
    ];
    matrix::each("discard-no-unref", &shapes, |made, shape, spec, engine, rng| {
        let spec = DiskSpec { discard_no_unref: true, ..spec.clone() };
        assert_written_well(made, shape, &spec, engine, rng);
    });
}

#[test]
fn version_2_is_refused_as_in_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", "-o", "compat=0.10", text(&path), "16M"]);
    let error = Disk::open(&spec(&path), &policy(Engine::Auto)).map(drop).unwrap_err();
    assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("version 3"), "{error}");
}
