//! Commands that change images, killed at random moments: the images are sound (clusters may leak), show what they showed, and the
//! command, run again, completes.

#![expect(
    clippy::unwrap_used,
    reason = "clippy takes only functions marked #[test] for tests; the helpers here are, too"
)]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How often each command is killed.
const KILLS: u32 = 8;

fn tool(program: &str, dir: &Path, words: &[&str]) -> (Option<i32>, String) {
    let begun = Instant::now();
    loop {
        let output = Command::new(program).args(words).current_dir(dir).output().unwrap();
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        // The kernel closes the files of an io_uring, and with them releases their locks, a moment after its process is gone.
        if said.contains("Failed to get") && said.contains("lock") && begun.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(5));
            continue;
        }
        return (output.status.code(), said);
    }
}

fn qemu(dir: &Path, words: &[&str]) {
    let (status, said) = tool("qemu-img", dir, words);
    assert_eq!(status, Some(0), "qemu-img {words:?}: {said}");
}

fn io(dir: &Path, image: &str, commands: &[String]) {
    let mut words = vec!["-f", "qcow2"];
    commands.iter().for_each(|command| words.extend(["-c", command]));
    words.push(image);
    let (status, said) = tool("qemu-io", dir, &words);
    assert_eq!(status, Some(0), "{said}");
}

/// An overlay over an image, both scribbled over, and another image.
fn prepare(dir: &Path) {
    let write = |at: u64, step: u64, count: u64| -> Vec<String> {
        (0..count).map(|i| format!("write -q -P {} {} 100k", 1 + (at + i) % 250, (at + i * step) << 10)).collect()
    };
    qemu(dir, &["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "base.qcow2", "60M"]);
    qemu(dir, &["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "other.qcow2", "70M"]);
    qemu(
        dir,
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "cluster_size=4k",
            "-b",
            "base.qcow2",
            "-F",
            "qcow2",
            "top.qcow2",
            "64M",
        ],
    );
    io(dir, "base.qcow2", &write(0, 300, 190));
    io(dir, "other.qcow2", &write(50, 350, 190));
    io(dir, "top.qcow2", &write(77, 500, 120));
    io(dir, "top.qcow2", &["write -q -z 20M 8M".into(), "discard -q 40M 4M".into()]);
}

/// Runs `command` on the images again and again, each time on fresh ones, and kills it after a while that is anything up to the time that
/// it takes; then `again` completes it. The overlay shows the same throughout, as far as `size` bytes of it are meant.
fn kill(command: &[&str], again: &[&str], size: &str) {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepare(dir);
    let copies = ["base.qcow2", "other.qcow2", "top.qcow2"];
    qemu(dir, &["convert", "-f", "qcow2", "-O", "raw", "top.qcow2", "shown.raw"]);
    qemu(dir, &["resize", "-q", "-f", "raw", "--shrink", "shown.raw", size]);
    for name in copies {
        std::fs::copy(dir.join(name), dir.join(format!("{name}.orig"))).unwrap();
    }
    let fresh = || {
        for name in copies {
            std::fs::copy(dir.join(format!("{name}.orig")), dir.join(name)).unwrap();
        }
    };
    let same = |when: &str| {
        for name in copies {
            let (status, said) = tool("qemu-img", dir, &["check", "-f", "qcow2", name]);
            assert!(matches!(status, Some(0 | 3)), "{when}: {name}: {said}");
        }
        // What another size adds or takes is not compared: without -s it counts as zeros.
        let words = ["compare", "-f", "raw", "-F", "qcow2", "shown.raw", "top.qcow2"];
        let (status, said) = tool("qemu-img", dir, &words);
        assert_eq!(status, Some(0), "{when}: {said}");
    };
    let begun = Instant::now();
    let cowhand = env!("CARGO_BIN_EXE_cowhand");
    let (status, said) = tool(cowhand, dir, command);
    assert_eq!(status, Some(0), "{said}");
    let takes = begun.elapsed();
    same("undisturbed");
    let mut killed = 0;
    for i in 0..KILLS {
        fresh();
        let mut child = Command::new(cowhand)
            .args(command)
            .current_dir(dir)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // From early to late; a little more at the end, as a run may take longer.
        std::thread::sleep(takes * (2 * i + 1) / (2 * KILLS) + Duration::from_micros(300));
        let was_running = child.try_wait().unwrap().is_none();
        child.kill().unwrap();
        child.wait().unwrap();
        killed += u32::from(was_running);
        same(&format!("killed after {i} of {KILLS} parts"));
        let (status, said) = tool(cowhand, dir, again);
        assert_eq!(status, Some(0), "again: {said}");
        same("done again");
    }
    println!("{command:?}: killed {killed} of {KILLS} times within {takes:?}");
    assert!(killed > 0, "it is over too soon to be killed");
}

#[test]
fn a_commit_is_killed() {
    let command = &["img", "commit", "-q", "-f", "qcow2", "top.qcow2"];
    kill(command, command, "64M");
}

#[test]
fn a_rebase_is_killed() {
    let command = &["img", "rebase", "-q", "-f", "qcow2", "-b", "other.qcow2", "-F", "qcow2", "top.qcow2"];
    kill(command, command, "64M");
}

#[test]
fn a_rebase_to_nothing_is_killed() {
    let command = &["img", "rebase", "-q", "-c", "-f", "qcow2", "-b", "", "top.qcow2"];
    kill(command, command, "64M");
}

#[test]
fn an_amendment_is_killed() {
    let command = &["img", "amend", "-q", "-f", "qcow2", "-o", "compat=0.10", "top.qcow2"];
    kill(command, command, "64M");
    let command = &["img", "amend", "-q", "-f", "qcow2", "-o", "refcount_bits=64", "top.qcow2"];
    kill(command, command, "64M");
}

#[test]
fn a_resize_is_killed() {
    let command = &["img", "resize", "-q", "-f", "qcow2", "--preallocation=metadata", "top.qcow2", "200M"];
    // What has the size that it is to have needs no space, and has it.
    let again = &["img", "resize", "-q", "-f", "qcow2", "top.qcow2", "200M"];
    kill(command, again, "64M");
}
