//! `cowhand run` with the tiny guest on the host's own KVM: every exit status that does not need a stock kernel, the console,
//! and the signals.

#![expect(
    clippy::unwrap_used,
    reason = "clippy takes only functions marked #[test] for tests; the helpers here are, too"
)]

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

fn kernel() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("resources/tiny-guest")
        .join(format!("{}.elf", std::env::consts::ARCH))
}

/// `cowhand run` of the tiny guest that is told `word`.
fn command(word: &str, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cowhand"));
    command.arg("run").arg("--kernel").arg(kernel()).args(["--cmdline", word, "--memory", "32M"]);
    if !args.contains(&"--timeout") {
        command.args(["--timeout", "30s"]);
    }
    command.args(args).stdin(Stdio::null());
    command
}

fn run(word: &str, args: &[&str]) -> Output {
    command(word, args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A running guest whose output and input are pipes.
fn start(word: &str, args: &[&str]) -> Child {
    command(word, args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Reads the guest's output until `expected` was said.
fn wait_for(child: &mut Child, expected: &str) {
    let output = child.stdout.as_mut().unwrap();
    let mut said = Vec::new();
    let mut byte = [0];
    while !text(&said).contains(expected) {
        assert_eq!(output.read(&mut byte).unwrap(), 1, "the guest said only {:?}", text(&said));
        said.push(byte[0]);
    }
}

fn signal(child: &Child, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(child.id().try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

fn status(child: Child) -> (Option<i32>, String) {
    let output = child.wait_with_output().unwrap();
    (output.status.code(), text(&output.stderr))
}

#[test]
fn power_off_is_0_and_the_console_reaches_stdout() {
    let output = run("hello", &[]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "hello from the tiny guest\r\n");
    assert_eq!(text(&output.stderr), "");
}

#[test]
fn an_initrd_that_the_guest_uses_with_its_first_instructions_is_whole() {
    let mut initrd = tempfile::NamedTempFile::new().unwrap();
    let words: Vec<u32> = (1..(1 << 20) / 4_u32 + 100).map(|i| i.wrapping_mul(0x9e37_79b9)).collect();
    initrd.write_all(&words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>()).unwrap();
    let sum = words.iter().fold(0_u32, |sum, word| sum.wrapping_add(*word));
    let name = initrd.path().to_str().unwrap();
    for cpus in ["1", "2"] {
        let output = run("sum", &["--initrd", name, "--cpus", cpus]);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        assert_eq!(text(&output.stdout), format!("{sum:08x}"));
    }
}

#[test]
fn power_off_of_many_cpus_is_0() {
    assert_eq!(run("hello", &["--cpus", "8"]).status.code(), Some(0));
}

#[test]
fn reset_with_on_reboot_exit_is_32() {
    assert_eq!(run("reset", &["--on-reboot", "exit"]).status.code(), Some(32));
}

#[test]
fn reset_with_on_reboot_restart_boots_again_until_the_time_runs_out() {
    let start = Instant::now();
    let output = run("reset", &["--timeout", "500ms"]);
    assert_eq!(output.status.code(), Some(124));
    assert!(start.elapsed() >= Duration::from_millis(500));
}

#[test]
fn triple_fault_is_33_and_says_so() {
    let output = run("triple", &[]);
    assert_eq!(output.status.code(), Some(33));
    assert!(text(&output.stderr).starts_with("cowhand: the guest crashed: "), "{}", text(&output.stderr));
    assert_eq!(text(&output.stderr).lines().count(), 1);
}

#[test]
fn panic_by_the_pvpanic_device_is_34() {
    assert_eq!(run("panic", &[]).status.code(), Some(34));
}

#[test]
fn panic_heard_on_the_console_is_34_with_all_of_its_lines() {
    let output = run("kernel panic", &[]);
    assert_eq!(output.status.code(), Some(34));
    assert!(text(&output.stdout).ends_with("]---\r\n"));
}

#[test]
fn panic_followed_by_a_reset_is_34_also_when_resets_restart() {
    assert_eq!(run("Kernel", &[]).status.code(), Some(34));
}

#[test]
fn panic_line_off_leaves_the_reset() {
    assert_eq!(run("Kernel", &["--panic-line", "off", "--on-reboot", "exit"]).status.code(), Some(32));
}

#[test]
fn timeout_is_124() {
    assert_eq!(run("idle", &["--timeout", "200ms"]).status.code(), Some(124));
}

#[test]
fn the_second_sigterm_stops_a_guest_that_ignores_its_power_button() {
    let mut child = start("idle", &[]);
    wait_for(&mut child, "idle");
    signal(&child, rustix::process::Signal::TERM);
    std::thread::sleep(Duration::from_millis(100));
    assert!(child.try_wait().unwrap().is_none());
    signal(&child, rustix::process::Signal::INT);
    let (code, message) = status(child);
    assert_eq!(code, Some(1));
    assert!(message.contains("second signal"), "{message}");
}

#[test]
fn what_is_typed_reaches_the_guest() {
    let mut child = start("echo", &[]);
    let long = "0123456789".repeat(100);
    child.stdin.as_mut().unwrap().write_all(format!("{long}q").as_bytes()).unwrap();
    wait_for(&mut child, &long);
    assert_eq!(status(child).0, Some(0));
}

#[test]
fn typing_ctrl_a_x_ends_the_machine() {
    let mut child = start("echo", &[]);
    child.stdin.as_mut().unwrap().write_all(b"ab\x01").unwrap();
    wait_for(&mut child, "ab");
    child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
    assert_eq!(status(child).0, Some(0));
}

#[test]
fn input_from_a_regular_file_reaches_the_guest() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all("abc".repeat(100).as_bytes()).unwrap();
    file.write_all(b"q").unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    let output = command("echo", &[]).stdin(file).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "abc".repeat(100));
}

#[test]
fn a_console_that_nobody_reads_does_not_hold_the_machine() {
    let mut child = start("echo", &["--timeout", "1s"]);
    // More than the pipes hold, so that the guest's output blocks.
    let mut input = child.stdin.take().unwrap();
    std::thread::spawn(move || input.write_all(&vec![b'x'; 1 << 20]));
    let started = Instant::now();
    assert_eq!(child.wait().unwrap().code(), Some(124));
    assert!(started.elapsed() < Duration::from_secs(10));
}

#[test]
fn serial_to_a_file_and_to_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console");
    let output = run("hello", &["--serial", &format!("file:{}", path.display())]);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), String::new()));
    assert_eq!(std::fs::read_to_string(path).unwrap(), "hello from the tiny guest\r\n");
    assert_eq!(text(&run("hello", &["--serial", "null"]).stdout), "");
}

#[test]
fn the_doctor_runs_the_tiny_guest() {
    let output = Command::new(env!("CARGO_BIN_EXE_cowhand")).arg("doctor").output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stdout));
    assert!(text(&output.stdout).contains("a tiny guest: ran from start to power-off in"));
}
