//! The engine's image locks and QEMU's: one writer or many readers, whoever they are.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Stdio};

use super::guest::policy;
use super::qemu::{self, text};
use crate::disk::Disk;
use crate::error::{Error, ErrorKind};
use crate::io::host::Engine;
use crate::spec::{DiskSpec, Format};
use crate::sync::Arc;

/// A directory with an image, and an overlay on it.
struct Scene {
    dir: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        let scene = Self { dir: tempfile::tempdir().unwrap() };
        qemu::img(&["create", "-q", "-f", "qcow2", text(&scene.image()), "1M"]);
        let overlay = scene.dir.path().join("overlay.qcow2");
        qemu::img(&["create", "-q", "-f", "qcow2", "-b", "image.qcow2", "-F", "qcow2", text(&overlay)]);
        scene
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("image.qcow2")
    }

    fn overlay(&self) -> PathBuf {
        self.dir.path().join("overlay.qcow2")
    }
}

fn open(path: &Path, readonly: bool) -> Result<Arc<Disk>, Error> {
    let spec = DiskSpec { readonly, ..DiskSpec::new(path, Format::Qcow2) };
    Disk::open(&spec, &policy(Engine::Auto))
}

/// Opening fails with one line that names the file and what holds it.
fn assert_locked(path: &Path, result: Result<Arc<Disk>, Error>) {
    let error = result.err().expect("the image is in use");
    assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
    let line = error.to_string();
    assert!(line.starts_with(text(path)) && line.contains("another process uses the image"), "{line}");
    assert_eq!(line.lines().count(), 1, "{line}");
}

fn qemu_write(path: &Path) -> qemu::Ended {
    qemu::run("qemu-io", &["-f", "qcow2", "-c", "write -q -P 1 0 512", text(path)])
}

fn assert_qemu_cannot_write(path: &Path) {
    let ended = qemu_write(path);
    assert!(ended.status != 0 && ended.said.contains("lock"), "{ended:?}");
    let ended = qemu::run("qemu-img", &["resize", "-q", "-f", "qcow2", text(path), "2M"]);
    assert!(ended.status != 0 && ended.said.contains("lock"), "{ended:?}");
}

fn assert_qemu_can_write(path: &Path) {
    let ended = qemu_write(path);
    assert_eq!(ended.status, 0, "{ended:?}");
}

/// A qemu-io that has the image open until it is dropped.
struct Holder {
    child: Child,
    stdin: Option<ChildStdin>,
}

impl Holder {
    fn new(path: &Path, options: &[&str]) -> Self {
        let args = [&["-f", "qcow2"], options, &[text(path)]].concat();
        let mut child = qemu::command("qemu-io", &args);
        let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        // An answer means that the image is open.
        writeln!(stdin, "length").unwrap();
        let mut line = String::new();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        stdout.read_line(&mut line).unwrap();
        assert!(line.contains("MiB"), "{line}");
        Self { child, stdin: Some(stdin) }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.stdin = None;
        let _ = self.child.wait();
    }
}

#[test]
fn our_writer_keeps_qemu_and_other_disks_out_until_it_closes() {
    let scene = Scene::new();
    let disk = open(&scene.image(), false).unwrap();
    assert_qemu_cannot_write(&scene.image());
    let ended = qemu::run("qemu-img", &["check", text(&scene.image())]);
    assert!(ended.status == 1 && ended.said.contains("lock"), "{ended:?}");
    assert_locked(&scene.image(), open(&scene.image(), false));
    assert_locked(&scene.image(), open(&scene.image(), true));
    disk.close().unwrap();
    assert_qemu_can_write(&scene.image());
}

#[test]
fn a_dropped_disk_gives_its_locks_back() {
    let scene = Scene::new();
    drop(open(&scene.overlay(), false).unwrap());
    assert_qemu_can_write(&scene.overlay());
    assert_qemu_can_write(&scene.image());
}

#[test]
fn our_readers_coexist_with_each_other_and_with_qemus_but_not_with_a_writer() {
    let scene = Scene::new();
    let first = open(&scene.image(), true).unwrap();
    let second = open(&scene.image(), true).unwrap();
    qemu::assert_clean(&scene.image());
    let reader = Holder::new(&scene.image(), &["-r"]);
    assert_qemu_cannot_write(&scene.image());
    assert_locked(&scene.image(), open(&scene.image(), false));
    drop(reader);
    first.close().unwrap();
    second.close().unwrap();
    open(&scene.image(), false).unwrap().close().unwrap();
}

#[test]
fn qemus_writer_keeps_our_writer_and_our_reader_out() {
    let scene = Scene::new();
    let holder = Holder::new(&scene.image(), &[]);
    assert_locked(&scene.image(), open(&scene.image(), false));
    assert_locked(&scene.image(), open(&scene.image(), true));
    drop(holder);
    open(&scene.image(), false).unwrap().close().unwrap();
}

#[test]
fn qemus_reader_keeps_our_writer_out() {
    let scene = Scene::new();
    let holder = Holder::new(&scene.image(), &["-r"]);
    assert_locked(&scene.image(), open(&scene.image(), false));
    open(&scene.image(), true).unwrap().close().unwrap();
    drop(holder);
    open(&scene.image(), false).unwrap().close().unwrap();
}

#[test]
fn a_backing_file_in_use_is_shared_by_readers_and_closed_to_writers() {
    let scene = Scene::new();
    let second = scene.dir.path().join("second.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", "-b", "image.qcow2", "-F", "qcow2", text(&second)]);
    let disk = open(&scene.overlay(), false).unwrap();
    assert_qemu_cannot_write(&scene.image());
    assert_locked(&scene.image(), open(&scene.image(), false));
    // Two writers on one base: the common case.
    let other = open(&second, false).unwrap();
    other.close().unwrap();
    let holder = Holder::new(&second, &[]);
    drop(holder);
    disk.close().unwrap();
    let holder = Holder::new(&scene.image(), &[]);
    let error = open(&scene.overlay(), false).err().expect("the base is being written");
    assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
    assert!(error.to_string().contains(text(&scene.image())), "{error}");
    drop(holder);
}

#[test]
fn an_ephemeral_disk_reads_beside_readers() {
    let scene = Scene::new();
    let spec = DiskSpec { ephemeral: true, ..DiskSpec::new(&scene.image(), Format::Qcow2) };
    let first = Disk::open(&spec, &policy(Engine::Auto)).unwrap();
    let second = Disk::open(&spec, &policy(Engine::Auto)).unwrap();
    qemu::assert_clean(&scene.image());
    assert_qemu_cannot_write(&scene.image());
    first.close().unwrap();
    second.close().unwrap();
}

#[test]
fn lock_off_opens_what_another_process_holds() {
    let scene = Scene::new();
    let holder = Holder::new(&scene.image(), &[]);
    let spec = DiskSpec { lock: false, readonly: true, ..DiskSpec::new(&scene.image(), Format::Qcow2) };
    Disk::open(&spec, &policy(Engine::Auto)).unwrap().close().unwrap();
    drop(holder);
}
