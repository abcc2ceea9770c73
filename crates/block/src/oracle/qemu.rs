//! QEMU's tools: run, with what they said. A tool that is not there fails the test.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::process::{Command, Stdio};

/// How a tool ended.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) status: i32,
    /// Both outputs.
    pub(super) said: String,
}

/// A tool with its arguments, not yet started.
pub(super) fn command(tool: &str, args: &[&str]) -> Command {
    let mut command = Command::new(tool);
    command.args(args).env("LC_ALL", "C").stdin(Stdio::null());
    command
}

/// Runs a tool to its end.
pub(super) fn run(tool: &str, args: &[&str]) -> Ended {
    let output = command(tool, args).output().unwrap_or_else(|e| match e.kind() {
        ErrorKind::NotFound => {
            panic!(
                "{tool} is not on the PATH: these tests hold the engine against QEMU (Debian: apt install qemu-utils)"
            )
        }
        _ => panic!("cannot run {tool}: {e}"),
    });
    let said = [output.stdout, output.stderr].concat();
    Ended { status: output.status.code().unwrap_or(-1), said: String::from_utf8_lossy(&said).into_owned() }
}

/// Runs a tool that must succeed.
pub(super) fn succeed(tool: &str, args: &[&str]) -> String {
    let ended = run(tool, args);
    assert_eq!(ended.status, 0, "{tool} {args:?}: {}", ended.said);
    ended.said
}

pub(super) fn img(args: &[&str]) -> String {
    succeed("qemu-img", args)
}

/// `qemu-io` commands on a qcow2 image, all of which must succeed. Discards reach the image.
pub(super) fn io(image: &Path, commands: &[String]) {
    let mut args = vec!["-f", "qcow2", "-d", "unmap"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(text(image));
    let said = succeed("qemu-io", &args);
    // qemu-io ends with 0 after some failures, and says them.
    let failed = said.lines().find(|line| line.contains("failed") || line.contains("rror"));
    assert!(failed.is_none(), "qemu-io {args:?}: {failed:?}");
}

/// A path as an argument.
pub(super) fn text(path: &Path) -> &str {
    path.to_str().expect("the tests' paths are plain text")
}

/// Asserts that `qemu-img check` finds nothing, leaks included.
pub(super) fn assert_clean(image: &Path) {
    let ended = run("qemu-img", &["check", "-f", "qcow2", text(image)]);
    assert_eq!(ended.status, 0, "qemu-img check {}: {}", image.display(), ended.said);
}

/// The whole disk as QEMU reads it; with options for `qemu-img convert`.
pub(super) fn content_with(image: &Path, options: &[&str]) -> Vec<u8> {
    let raw = image.with_extension("converted");
    let mut args = vec!["convert", "-f", "qcow2", "-O", "raw"];
    args.extend(options);
    args.extend([text(image), text(&raw)]);
    img(&args);
    let bytes = fs::read(&raw).unwrap();
    fs::remove_file(&raw).unwrap();
    bytes
}

/// The whole disk as QEMU reads it.
pub(super) fn content(image: &Path) -> Vec<u8> {
    content_with(image, &[])
}
