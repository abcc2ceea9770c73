//! `cowhand run` on a terminal: the guest has it raw, and on every way out it is as it was before.

#![expect(
    clippy::unwrap_used,
    reason = "clippy takes only functions marked #[test] for tests; the helpers here are, too"
)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Runs a shell script on a new terminal (`script` of util-linux makes one), types `keys` once the guest has spoken.
/// In the script, `guest WORD ARGUMENT...` runs the tiny guest, whose process ID stands in the file `pid`;
/// `running` waits until it runs. Gives what `stty` said before, while and after the guest ran.
fn on_terminal(dir: &Path, script: &str, keys: &[u8]) -> [String; 3] {
    let kernel = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("resources/tiny-guest")
        .join(format!("{}.elf", std::env::consts::ARCH));
    let prelude = format!(
        "guest() {{ word=$1; shift; sh -c 'echo $$ > pid; exec \"$0\" \"$@\"' '{}' run --kernel '{}' --memory 32M \
         --cmdline \"$word\" \"$@\"; }}\nstty -a > before\n",
        env!("CARGO_BIN_EXE_cowhand"),
        kernel.display()
    );
    // The guest's terminal is looked at from outside, until it is raw: a loaded host may take its time.
    let watch = "(i=0; while [ $i -lt 150 ]; do stty -a -F /dev/tty > now; \
                 grep -q -e -icanon now && mv now during && break; sleep 0.1; i=$((i + 1)); done) &\n\
                 running() { until [ -e during ]; do sleep 0.1; done; }\n";
    let script = format!("{prelude}{watch}{script}\nstty -a > after\n");
    std::fs::write(dir.join("script.sh"), script).unwrap();
    let mut child = Command::new("script")
        .args(["-qec", "sh script.sh", "/dev/null"])
        .current_dir(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    while !dir.join("during").exists() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(50));
    }
    std::thread::sleep(Duration::from_millis(200));
    // The terminal is gone when the machine has ended by itself.
    let _ = input.write_all(keys);
    child.wait().unwrap();
    ["before", "during", "after"].map(|name| std::fs::read_to_string(dir.join(name)).unwrap_or_default())
}

fn check(script: &str, keys: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    let [before, during, after] = on_terminal(dir.path(), script, keys);
    assert!(before.contains(" icanon") && before.contains(" echo "), "{before}");
    assert!(during.contains("-icanon") && during.contains("-isig"), "{during}");
    assert_eq!(before, after);
}

#[test]
fn the_terminal_is_restored_after_ctrl_a_x() {
    check("guest idle --timeout 30s", b"\x01x");
}

#[test]
fn the_terminal_is_restored_after_a_timeout() {
    check("guest idle --timeout 3s", b"");
}

#[test]
fn the_terminal_is_restored_after_two_signals() {
    check("(running; kill $(cat pid); sleep 0.5; kill $(cat pid)) & guest idle --timeout 30s", b"");
}

#[test]
fn the_terminal_is_restored_after_a_crash_of_the_vmm() {
    check("(running; kill -ABRT $(cat pid)) & guest idle --timeout 30s", b"");
}

#[test]
fn the_terminal_is_restored_after_the_guest_powers_off() {
    check("guest echo --timeout 30s", b"q");
}
