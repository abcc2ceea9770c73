//! `cowhand doctor`: says what this host can do, and why not.

use std::io::Read;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Parser;
use cowhand_vmm::console::SerialConfig;
use cowhand_vmm::control::Exit;
use cowhand_vmm::machine::{self, Config, NamedFile, OnReboot};
use cowhand_vmm::signals::SignalEvents;
use cowhand_vmm::{arch, host};

use crate::{EXIT_FAILURE, Failure};

/// Says what this host can do, and what is missing; runs a tiny guest on its KVM
#[derive(Parser)]
#[command(after_help = "\
Exit status: 0 machines can be run here · 1 they cannot

Example:
  cowhand doctor")]
pub(crate) struct Args {}

/// How a check came out.
enum Finding {
    Good(String),
    /// Something is missing that cowhand can do without.
    Weak(String),
    /// Machines cannot be run.
    Bad(String),
}

/// The longest that the tiny guest may take.
const TINY_GUEST_TIMEOUT: Duration = Duration::from_secs(20);

/// Looks at everything; the status is 0 when machines can be run here.
pub(crate) fn run(_args: &Args) -> Result<u8, Failure> {
    let mut status = 0;
    let checks: [fn() -> Vec<Finding>; 5] = [kvm, io_uring, locks, landlock, tiny_guest];
    for finding in checks.into_iter().flat_map(|check| check()) {
        match finding {
            Finding::Good(text) => println!("good     {text}"),
            Finding::Weak(text) => println!("weak     {text}"),
            Finding::Bad(text) => {
                println!("missing  {text}");
                status = EXIT_FAILURE;
            }
        }
    }
    Ok(status)
}

fn kvm() -> Vec<Finding> {
    let report = match host::kvm_report() {
        Ok(report) => report,
        Err(error) => return vec![Finding::Bad(error.to_string())],
    };
    let mut findings = vec![Finding::Good(format!(
        "/dev/kvm: opens; guests of up to {} processors and {} memory slots",
        report.max_cpus, report.memory_slots
    ))];
    let missing: Vec<_> = report.capabilities.iter().filter(|cap| !cap.present).map(|cap| cap.name).collect();
    findings.push(if missing.is_empty() {
        Finding::Good(format!("/dev/kvm: has all {} capabilities that are needed", report.capabilities.len()))
    } else {
        Finding::Bad(format!("/dev/kvm: lacks {}; a newer kernel has it", missing.join(", ")))
    });
    if !report.hardware {
        findings.push(Finding::Weak(
            "the processor shows no virtualization extension, so this KVM works in software; stock kernels may not run"
                .into(),
        ));
    }
    findings
}

fn io_uring() -> Vec<Finding> {
    vec![match host::io_uring() {
        Ok(()) => Finding::Good("io_uring: works".into()),
        Err(error) => Finding::Weak(format!("io_uring: refused ({error}); disks will be slower, on threads")),
    }]
}

fn locks() -> Vec<Finding> {
    vec![match host::ofd_locks() {
        Ok(()) => Finding::Good("file locks: OFD locks work".into()),
        Err(error) => Finding::Weak(format!("file locks: no OFD locks ({error}); disks need lock=off")),
    }]
}

fn landlock() -> Vec<Finding> {
    vec![match host::landlock_abi() {
        Ok(version) => Finding::Good(format!("Landlock: ABI {version}")),
        Err(error) => Finding::Weak(format!("Landlock: not there ({error}); file access will not be confined")),
    }]
}

fn tiny_guest() -> Vec<Finding> {
    let start = Instant::now();
    vec![match run_tiny_guest() {
        Ok(text) if text.contains(arch::TINY_GUEST_SAYS) => {
            let time = start.elapsed().as_secs_f64() * 1000.0;
            Finding::Good(format!("a tiny guest: ran from start to power-off in {time:.1} ms"))
        }
        Ok(text) => Finding::Bad(format!("a tiny guest: powered off, but said {text:?}; please report this")),
        Err(why) => Finding::Bad(format!("a tiny guest: {why}")),
    }]
}

/// Boots the guest that this program carries; gives what it printed, or why it did not come to its end.
fn run_tiny_guest() -> Result<String, String> {
    // A file in memory, reached by its descriptor, takes the console's output.
    let mut console = rustix::fs::memfd_create("cowhand-doctor", rustix::fs::MemfdFlags::CLOEXEC)
        .map(std::fs::File::from)
        .map_err(|e| e.to_string())?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&console)));
    let config = Config {
        kernel: NamedFile::from_bytes("tiny-guest", arch::TINY_GUEST).map_err(|e| e.to_string())?,
        initrd: None,
        cmdline: String::new(),
        memory: 16 << 20,
        cpus: 1,
        serial: SerialConfig::File(path),
        timeout: Some(TINY_GUEST_TIMEOUT),
        on_reboot: OnReboot::Exit,
        devices: Vec::new(),
        panic_line: false,
    };
    let signals = SignalEvents::new().map_err(|e| e.to_string())?;
    match machine::run(&config, signals).map_err(|e| e.to_string())? {
        Exit::PowerOff => {}
        Exit::Crash(what) => return Err(format!("crashed: {what}")),
        Exit::Timeout => return Err(format!("was not done after {} s", TINY_GUEST_TIMEOUT.as_secs())),
        exit => return Err(format!("ended unexpectedly: {exit:?}")),
    }
    let mut text = String::new();
    console.read_to_string(&mut text).map_err(|e| e.to_string())?;
    Ok(text)
}
