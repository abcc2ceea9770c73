//! A whole machine: what it is made of, how it is put together, run, reset and ended.
//!
//! [`run`] is the way in. A reset that restarts the guest ends this machine and puts together another one from the same
//! configuration: nothing of the old guest's state can be left in it.
//!
//! Threads: the caller's is the control thread, with the event loop ([`supervisor`]); each vCPU has one; devices bring
//! theirs.

mod assembly;
mod late;
mod source;
mod supervisor;

use std::io;
use std::time::Duration;

pub use assembly::Machine;
pub use source::{NamedFile, SourceError};

use cowhand_virtio::VirtioDevice;

use crate::arch::{self, BootError};
use crate::console::SerialConfig;
use crate::console::output::Sink;
use crate::control::Exit;
use crate::kvm::{self, KvmError};
use crate::memory::MemoryError;
use crate::pci::PciError;
use crate::signals::SignalEvents;
use crate::vcpu;
use supervisor::Frontend;

/// What is done when the guest asks for a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnReboot {
    /// The guest starts again.
    Restart,
    /// The machine ends.
    Exit,
}

/// Where a device comes from. Every machine, also that after a reset, gets a new one.
pub trait DeviceSource: Sync {
    /// Makes the device.
    ///
    /// # Errors
    /// When it cannot be made; the error says which device it is.
    fn make(&self) -> Result<Box<dyn VirtioDevice>, DeviceError>;
}

/// Why a device could not be made: one line for the person.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct DeviceError(pub String);

/// What a machine is made of.
pub struct Config {
    /// The kernel to boot.
    pub kernel: NamedFile,
    /// The initrd that it gets.
    pub initrd: Option<NamedFile>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Guest memory, bytes.
    pub memory: u64,
    /// vCPUs.
    pub cpus: u32,
    /// What the serial port is connected to.
    pub serial: SerialConfig,
    /// The machine is ended when it ran for so long.
    pub timeout: Option<Duration>,
    /// What a reset does.
    pub on_reboot: OnReboot,
    /// The devices on the PCI bus, in this order.
    pub devices: Vec<Box<dyn DeviceSource>>,
    /// Whether the kernel's panic line on the console counts as a panic.
    pub panic_line: bool,
}

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// KVM is missing or refuses.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// There is no memory for the guest.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A device cannot be made.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A device cannot be put on the PCI bus.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// There is nothing to boot.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Too few or too many vCPUs.
    #[error("--cpus {asked}: this host's KVM runs 1 to {max}")]
    Cpus {
        /// Asked for.
        asked: u32,
        /// At most.
        max: u32,
    },
    /// The console's file cannot be made.
    #[error("--serial {}: {source}", file.display())]
    Console {
        /// The file.
        file: std::path::PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The system refused something.
    #[error("{what}: {source}")]
    System {
        /// What was to be done.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
}

impl MachineError {
    /// An error of the system while doing `what`.
    pub(crate) fn system(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::System { what, source }
    }
}

/// Runs a machine to its end; `signals` are those of the process, made before it had other threads.
///
/// # Errors
/// When the machine cannot be put together; what the guest does is no error but an [`Exit`].
pub fn run(config: &Config, signals: SignalEvents) -> Result<Exit, MachineError> {
    let kvm = kvm::open()?;
    kvm::require(&kvm, arch::REQUIRED)?;
    vcpu::prepare_process().map_err(MachineError::system("signal handler"))?;
    let sink = Sink::open(&config.serial).map_err(|source| match &config.serial {
        SerialConfig::File(file) => MachineError::Console { file: file.clone(), source },
        _ => MachineError::System { what: "console", source },
    })?;
    let mut frontend = Frontend::new(config, signals)?;
    loop {
        let machine = Machine::new(&kvm, config, &sink)?;
        let exit = frontend.supervise(machine)?;
        match (exit, config.on_reboot) {
            (Exit::Reset, OnReboot::Restart) => tracing::info!("the guest resets"),
            (exit, _) => return Ok(exit),
        }
    }
}

#[cfg(test)]
#[path = "machine_test.rs"]
mod tests;
