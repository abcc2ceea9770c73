//! Encrypted images: what QEMU encrypts we read, what we encrypt QEMU reads.

use std::fs;
use std::path::Path;

use super::dice;
use super::guest::{policy, read_all};
use super::image::{Shape, random_disk};
use super::qemu::{self, text};
use super::read_test::assert_same;
use super::write_test::play;
use crate::disk::Disk;
use crate::io::host::Engine;
use crate::spec::DiskSpec;

const SECRET: &str = "secret,id=s,data=correct horse";

fn image_options(path: &Path) -> String {
    format!("driver=qcow2,encrypt.key-secret=s,file.filename={}", text(path))
}

/// The disk as QEMU decrypts it.
fn content(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("decrypted");
    qemu::img(&["convert", "--object", SECRET, "--image-opts", &image_options(path), "-O", "raw", text(&raw)]);
    fs::read(raw).unwrap()
}

/// An encrypted image, some of it filled by QEMU, and how it is opened.
fn make(dir: &Path, encryption: &str, size: u64, rng: &mut crate::io::sim::Rng) -> (std::path::PathBuf, DiskSpec) {
    let (path, raw, secret) = (dir.join("disk.qcow2"), dir.join("content.raw"), dir.join("secret"));
    fs::write(&raw, random_disk(size, rng)).unwrap();
    fs::write(&secret, "correct horse").unwrap();
    let options = format!("{encryption},encrypt.key-secret=s");
    qemu::img(&["create", "-q", "-f", "qcow2", "--object", SECRET, "-o", &options, text(&path), &size.to_string()]);
    let target = image_options(&path);
    qemu::img(&["convert", "-n", "--object", SECRET, "-f", "raw", text(&raw), "--target-image-opts", &target]);
    let spec = DiskSpec::parse(&format!("path={},format=qcow2,secret=file:{}", text(&path), text(&secret))).unwrap();
    (path, spec)
}

#[test]
fn edge_42_luks_images_are_read_and_written_as_qemu_does() {
    let mut rng = dice("luks");
    let luks = "encrypt.format=luks,encrypt.iter-time=10";
    for (options, cluster) in [
        ("", 65536),
        (
            ",encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256",
            65536,
        ),
        (",cluster_size=512", 512),
        (",extended_l2=on,cluster_size=16384", 16384),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (path, spec) = make(dir.path(), &format!("{luks}{options}"), (3 << 20) + 1024, &mut rng);
        let initial = content(&path);
        let disk = Disk::open(&spec, &policy(Engine::Auto)).unwrap();
        assert_same(&read_all(&disk, 2, &mut rng), &initial);
        let model = play(&disk, initial, &Shape::new(cluster), &mut rng);
        disk.close().unwrap();
        qemu::img(&["check", "--object", SECRET, "--image-opts", &image_options(&path)]);
        model.check_all(&content(&path)).unwrap();
    }
}

#[test]
fn edge_42_old_aes_images_can_be_read_only() {
    let mut rng = dice("aes");
    let dir = tempfile::tempdir().unwrap();
    let (path, spec) = make(dir.path(), "encrypt.format=aes", 1 << 20, &mut rng);
    let error = Disk::open(&spec, &policy(Engine::Auto)).err().unwrap().to_string();
    assert!(error.contains("readonly=on"), "{error}");
    let disk = Disk::open(&DiskSpec { readonly: true, ..spec }, &policy(Engine::Auto)).unwrap();
    assert_same(&read_all(&disk, 2, &mut rng), &content(&path));
}

#[test]
fn edge_42_an_overlay_reads_an_encrypted_backing_file() {
    let mut rng = dice("overlay on luks");
    let dir = tempfile::tempdir().unwrap();
    let (path, spec) = make(dir.path(), "encrypt.format=luks,encrypt.iter-time=10", 2 << 20, &mut rng);
    let disk = Disk::open(&DiskSpec { ephemeral: true, ..spec }, &policy(Engine::Auto)).unwrap();
    assert_same(&read_all(&disk, 2, &mut rng), &content(&path));
}
