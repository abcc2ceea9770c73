//! `cowhand run` with what cannot be run: one line that names the file and says what is wrong, and the fitting status.

#![expect(
    clippy::unwrap_used,
    reason = "clippy takes only functions marked #[test] for tests; the helpers here are, too"
)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Runs it; a process that hangs is killed, and has no status then.
fn run(args: &[&str]) -> (Option<i32>, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_cowhand"))
        .arg("run")
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let until = Instant::now() + Duration::from_secs(30);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > until {
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let output = child.wait_with_output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Runs it and expects `status` and one line that begins and ends as given.
fn expect(args: &[&str], status: i32, start: &str, contains: &str) {
    let (code, message) = run(args);
    assert_eq!(code, Some(status), "{message}");
    assert_eq!(message.lines().count(), 1, "{message}");
    assert!(message.starts_with(&format!("cowhand: {start}")), "{message}");
    assert!(message.contains(contains), "{message}");
}

fn tiny_guest() -> String {
    let path = format!("resources/tiny-guest/{}.elf", std::env::consts::ARCH);
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path).display().to_string()
}

fn file(dir: &Path, name: &str, bytes: &[u8]) -> String {
    let path = dir.join(name);
    std::fs::write(&path, bytes).unwrap();
    path.display().to_string()
}

#[test]
fn missing_kernel_option_is_a_usage_error() {
    expect(&[], 2, "no kernel: give --kernel FILE", "");
}

#[test]
fn unknown_option_is_a_usage_error() {
    expect(&["--kernle", "x"], 2, "unexpected argument '--kernle'", "cowhand --help");
}

#[test]
fn option_values_that_make_no_sense_are_usage_errors() {
    for args in
        [["--memory", "lots"], ["--timeout", "soon"], ["--serial", "pty"], ["--on-reboot", "maybe"], ["--cpus", "x"]]
    {
        expect(&args, 2, "invalid value", args[0]);
    }
}

#[test]
fn missing_kernel_file_is_named() {
    expect(&["--kernel", "/nonexistent/k"], 1, "/nonexistent/k: cannot be opened: No such file or directory", "");
}

#[test]
fn directory_as_kernel_or_initrd_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let name = dir.path().display().to_string();
    expect(&["--kernel", &name], 1, &name, "is a directory");
    expect(&["--kernel", &tiny_guest(), "--initrd", &name], 1, &name, "is a directory");
}

#[test]
fn files_that_are_no_kernels_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let empty = file(dir.path(), "empty", b"");
    let script = file(dir.path(), "script", b"#!/bin/sh\n".repeat(1000).as_slice());
    expect(&["--kernel", &empty], 1, &empty, "not a kernel");
    expect(&["--kernel", &script], 1, &script, "not a kernel");
}

#[test]
fn program_as_kernel_is_refused() {
    let program = env!("CARGO_BIN_EXE_cowhand");
    expect(&["--kernel", program], 1, program, "a kernel that cannot be booted");
}

#[test]
fn kernel_cut_short_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let whole = std::fs::read(tiny_guest()).unwrap();
    for len in [4, 63, 64, 100, 200, 400] {
        let short = file(dir.path(), "short", &whole[..len]);
        expect(&["--kernel", &short], 1, &short, "");
    }
}

#[test]
fn kernel_with_any_byte_of_its_headers_changed_never_takes_the_vmm_down() {
    let dir = tempfile::tempdir().unwrap();
    let whole = std::fs::read(tiny_guest()).unwrap();
    for index in (4..176).step_by(3) {
        let mut damaged = whole.clone();
        damaged[index] ^= 0xff;
        let name = file(dir.path(), "damaged", &damaged);
        let (code, message) = run(&["--kernel", &name, "--timeout", "300ms", "--memory", "32M"]);
        assert!(matches!(code, Some(0 | 1 | 32 | 33 | 34 | 124)), "byte {index}: {code:?} {message}");
        assert!(!message.contains("panicked at"), "byte {index}: {message}");
    }
}

#[test]
fn initrd_too_large_for_the_memory_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let name = dir.path().join("initrd");
    std::fs::File::create(&name).unwrap().set_len(64 << 20).unwrap();
    let name = name.display().to_string();
    expect(&["--kernel", &tiny_guest(), "--initrd", &name, "--memory", "32M"], 1, &name, "give more --memory");
}

#[test]
fn command_line_too_long_is_refused() {
    let long = "x".repeat(70_000);
    expect(&["--kernel", &tiny_guest(), "--cmdline", &long], 1, "--cmdline: 70000 bytes", "");
}

#[test]
fn memory_and_processors_out_of_bounds_are_refused() {
    expect(&["--kernel", &tiny_guest(), "--memory", "1K"], 1, "the guest's memory must be between", "--memory");
    expect(&["--kernel", &tiny_guest(), "--memory", "16T"], 1, "the guest's memory must be between", "--memory");
    expect(&["--kernel", &tiny_guest(), "--cpus", "0"], 1, "--cpus 0:", "");
    expect(&["--kernel", &tiny_guest(), "--cpus", "100000"], 1, "--cpus 100000:", "");
}

#[test]
fn serial_file_that_cannot_be_made_is_named() {
    expect(&["--kernel", &tiny_guest(), "--serial", "file:/nonexistent/log"], 1, "--serial /nonexistent/log", "");
}

/// The first 72 bytes of a version 2 image of 1 MiB, in a file with room for its tables.
fn qcow2() -> Vec<u8> {
    let mut image = vec![0; 4 << 16];
    image[..4].copy_from_slice(b"QFI\xfb");
    for (at, value) in [(4, 2_u32), (20, 16), (36, 1), (56, 1)] {
        image[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }
    // Size, L1 table, refcount table and its one block; each of the four clusters is in use once.
    for (at, value) in [(24, 1_u64 << 20), (40, 3 << 16), (48, 1 << 16), (1 << 16, 2 << 16)] {
        image[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }
    for cluster in 0..4 {
        image[(2 << 16) + 2 * cluster + 1] = 1;
    }
    image
}

fn disk(path: &str, rest: &str) -> String {
    format!("path={path},{rest}")
}

#[test]
fn disks_that_cannot_be_opened_are_named_and_not_changed() {
    let dir = tempfile::tempdir().unwrap();
    let qcow2_file = file(dir.path(), "a.qcow2", &qcow2());
    let raw_file = file(dir.path(), "a.raw", &vec![7; 1 << 20]);
    let short_file = file(dir.path(), "short.qcow2", &qcow2()[..60]);
    let name = dir.path().display().to_string();
    let kernel = tiny_guest();
    for (path, format, what) in [
        (name.as_str(), "qcow2", "directory"),
        (qcow2_file.as_str(), "raw", "format=qcow2"),
        (raw_file.as_str(), "qcow2", "format=raw"),
        (short_file.as_str(), "qcow2", ""),
    ] {
        expect(&["--kernel", &kernel, "--disk", &disk(path, &format!("format={format}"))], 1, path, what);
    }
    let missing = disk("/nonexistent/disk", "format=qcow2");
    expect(&["--kernel", &kernel, "--disk", &missing], 1, "Could not open '/nonexistent/disk'", "No such file");
    assert_eq!(std::fs::read(&qcow2_file).unwrap(), qcow2());
    assert_eq!(std::fs::read(&raw_file).unwrap(), vec![7; 1 << 20]);
}

#[test]
fn disk_descriptions_that_make_no_sense_are_usage_errors() {
    for text in ["path=x", "format=raw", "path=x,format=vmdk", "path=x,format=raw,colour=red", "x"] {
        expect(&["--disk", text], 2, "invalid value", "--disk");
    }
}

#[test]
fn disk_that_another_process_holds_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), "a.qcow2", &qcow2());
    let disk = disk(&path, "format=qcow2");
    let mut holder = Command::new(env!("CARGO_BIN_EXE_cowhand"))
        .args(["run", "--kernel", &tiny_guest(), "--cmdline", "idle", "--disk", &disk, "--timeout", "30s"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut said = [0; 4];
    std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut said).unwrap();
    expect(&["--kernel", &tiny_guest(), "--disk", &disk], 1, &path, "another process");
    holder.kill().unwrap();
    holder.wait().unwrap();
    assert_eq!(run(&["--kernel", &tiny_guest(), "--disk", &disk]).0, Some(0));
}
