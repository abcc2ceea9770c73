//! `cowhand run`: boots a guest.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use cowhand_block::DiskSpec;
use cowhand_virtio::VirtioDevice;
use cowhand_virtio::rng::Rng;
use cowhand_vmm::console::SerialConfig;
use cowhand_vmm::control::Exit;
use cowhand_vmm::machine::{self, Config, DeviceError, DeviceSource, NamedFile, OnReboot};
use cowhand_vmm::signals::SignalEvents;

use rustix::process::{Resource, getrlimit, setrlimit};

use crate::disks::Disks;
use crate::{EXIT_FAILURE, EXIT_USAGE, Failure, quantity};

const EXIT_RESET: u8 = 32;
const EXIT_CRASH: u8 = 33;
const EXIT_PANIC: u8 = 34;
const EXIT_TIMEOUT: u8 = 124;

/// Boots a virtual machine
#[derive(Parser)]
#[command(after_help = "\
Exit status: 0 the guest powered off (or Ctrl-A x was typed) · 1 the machine failed or was stopped · 2 bad arguments · \
32 the guest reset (with --on-reboot exit) · 33 the guest crashed · 34 the guest's kernel panicked · 124 the time ran out

Example:
  cowhand run --kernel vmlinuz --initrd initrd.img --cmdline 'console=ttyS0 root=/dev/vda1' \\
      --disk path=debian.qcow2,format=qcow2 --memory 1G --cpus 2")]
pub(crate) struct Args {
    /// The kernel to boot: a bzImage (vmlinuz) or an ELF file with a PVH note (vmlinux)
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "STRING", default_value = "console=ttyS0")]
    cmdline: String,
    /// A disk: path=P,format=qcow2|raw[,id=vda][,readonly=on][,ephemeral=on][,queues=N][,cache=writeback|none|unsafe]
    /// [,discard=unmap|ignore][,detect-zeroes=off|on|unmap][,backing-format=F][,secret=file:P|fd:N][,serial=S][,metadata-cache=SIZE]
    /// [,block-size=512][,lock=on|off]; a comma inside a value is written twice
    #[arg(long, value_name = "DISK", value_parser = DiskSpec::parse)]
    disk: Vec<DiskSpec>,
    /// Files that images refer to (backing files, data files) may be opened below this directory; may be repeated. Without
    /// it, each image may refer to files below its own directory
    #[arg(long, value_name = "DIR")]
    allow_dir: Vec<PathBuf>,
    /// The guest's memory
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = quantity::size)]
    memory: u64,
    /// The guest's processors
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// What the guest's serial port is connected to: stdio, null or file:PATH. On a terminal Ctrl-A x ends the machine
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    serial: SerialConfig,
    /// Ends the machine after this time, with status 124
    #[arg(long, value_name = "TIME", value_parser = quantity::duration)]
    timeout: Option<Duration>,
    /// What happens when the guest resets
    #[arg(long, value_name = "ACTION", default_value = "restart")]
    on_reboot: Reboot,
    /// Whether "Kernel panic - not syncing" on the serial port counts as a panic of the guest's kernel
    #[arg(long, value_name = "on|off", default_value = "on")]
    panic_line: Switch,
}

#[derive(Clone, Copy, ValueEnum)]
enum Reboot {
    Restart,
    Exit,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

/// Runs the guest; gives the exit status.
pub(crate) fn run(args: &Args) -> Result<u8, Failure> {
    let Some(kernel) = &args.kernel else {
        let message = "no kernel: give --kernel FILE (a vmlinuz, and what it needs by --initrd and --cmdline)".into();
        return Err(Failure { message, status: EXIT_USAGE });
    };
    let kernel = NamedFile::open(kernel)?;
    let initrd = args.initrd.as_deref().map(NamedFile::open).transpose()?;
    // Before anything has a thread: from here on a signal cannot end the process with an image half written.
    let signals = SignalEvents::new()?;
    raise_descriptor_limit();
    let disks = Disks::open(&args.disk, &args.allow_dir, args.cpus)?;
    let config = Config {
        kernel,
        initrd,
        cmdline: args.cmdline.clone(),
        memory: args.memory,
        cpus: args.cpus,
        serial: args.serial.clone(),
        timeout: args.timeout,
        on_reboot: match args.on_reboot {
            Reboot::Restart => OnReboot::Restart,
            Reboot::Exit => OnReboot::Exit,
        },
        devices: disks.devices().chain([Box::new(RngSource) as Box<dyn DeviceSource>]).collect(),
        panic_line: args.panic_line == Switch::On,
    };
    let result = machine::run(&config, signals);
    drop(config);
    let closed = disks.close();
    let status = report(&result?);
    closed?;
    Ok(status)
}

/// Allows as many descriptors as may be had: every queue of every disk needs some, and 1024 is a common limit.
pub(crate) fn raise_descriptor_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::debug!("the limit of open files stays: {error}");
    }
}

/// Where the guest's entropy device comes from.
struct RngSource;

impl DeviceSource for RngSource {
    fn make(&self) -> Result<Box<dyn VirtioDevice>, DeviceError> {
        Ok(Box::new(Rng::new()))
    }
}

/// Says why the machine ended, where that is not what was to be expected; gives the exit status.
fn report(exit: &Exit) -> u8 {
    let (message, status) = match exit {
        Exit::PowerOff => return 0,
        Exit::Reset => return EXIT_RESET,
        Exit::Quit => return 0,
        Exit::Panic => ("the guest's kernel panicked".into(), EXIT_PANIC),
        Exit::Crash(what) => (format!("the guest crashed: {what}"), EXIT_CRASH),
        Exit::Timeout => ("the time ran out (--timeout)".into(), EXIT_TIMEOUT),
        Exit::Stopped(how) => (format!("stopped {how}"), EXIT_FAILURE),
        Exit::Failed(what) => (what.clone(), EXIT_FAILURE),
    };
    eprintln!("cowhand: {message}");
    status
}

#[cfg(test)]
#[path = "run_test.rs"]
mod tests;
