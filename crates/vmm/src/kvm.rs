//! A KVM virtual machine: opening `/dev/kvm`, what it must be able to do, its memory slots.
//!
//! Not here: vCPUs ([`crate::vcpu`]), interrupts ([`crate::interrupts`]), anything of an architecture ([`crate::arch`]).

use std::io;
use std::ops::Range;

use kvm_bindings::{KVM_API_VERSION, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Where KVM is found.
pub const KVM_PATH: &str = "/dev/kvm";

/// Why KVM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// There is no KVM.
    #[error(
        "{KVM_PATH}: not there; load the kernel's KVM module, switch virtualization on in the firmware, or (in a virtual machine) \
             have nested virtualization allowed"
    )]
    Missing,
    /// The user may not use KVM.
    #[error("{KVM_PATH}: permission denied; join the group that owns it (often `kvm`) and log in again")]
    Permission,
    /// KVM is there but does not open.
    #[error("{KVM_PATH}: cannot be opened: {0}; see `cowhand doctor`")]
    Open(io::Error),
    /// KVM speaks another language.
    #[error("{KVM_PATH}: has API version {0}, cowhand needs {KVM_API_VERSION}; the kernel is too old")]
    ApiVersion(i32),
    /// A needed capability is not there.
    #[error("{KVM_PATH}: lacks {0}, which cowhand needs; a newer kernel has it")]
    Capability(&'static str),
    /// An ioctl failed.
    #[error("{KVM_PATH}: {what} failed: {source}; see `cowhand doctor`")]
    Ioctl {
        /// What was asked for.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
}

impl KvmError {
    /// Makes an error of a failed ioctl that was to do `what`.
    pub fn ioctl(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |e| Self::Ioctl { what, source: e.into() }
    }
}

/// The capabilities that a machine cannot do without, for [`open`] and for the doctor.
pub const REQUIRED: &[(Cap, &str)] = &[
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::IoeventfdNoLength, "KVM_CAP_IOEVENTFD_NO_LENGTH"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Opens `/dev/kvm`.
///
/// # Errors
/// When it is not there, may not be opened, or speaks another API.
pub fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|e| match e.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Missing,
        libc::EACCES | libc::EPERM => KvmError::Permission,
        _ => KvmError::Open(e.into()),
    })?;
    match kvm.get_api_version() {
        version if version == KVM_API_VERSION as i32 => Ok(kvm),
        version => Err(KvmError::ApiVersion(version)),
    }
}

/// Fails when KVM lacks something that every machine needs, or one of the architecture's `more`.
///
/// # Errors
/// Names the first capability that is not there.
pub fn require(kvm: &Kvm, more: &[(Cap, &'static str)]) -> Result<(), KvmError> {
    match REQUIRED.iter().chain(more).find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, name)) => Err(KvmError::Capability(name)),
        None => Ok(()),
    }
}

/// Creates a virtual machine.
///
/// # Errors
/// When KVM refuses.
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, KvmError> {
    // A signal that arrives while KVM creates its worker threads interrupts the call for no reason of ours.
    for _ in 0..5 {
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR => {}
            result => return result.map_err(KvmError::ioctl("KVM_CREATE_VM")),
        }
    }
    Err(KvmError::ioctl("KVM_CREATE_VM")(kvm_ioctls::Error::new(libc::EINTR)))
}

/// Gives the guest the part `range` of `memory`, as the slot with that number. `memory` must outlive `vm` and every vCPU of it.
///
/// # Errors
/// When the range does not lie in one region of `memory`, or KVM refuses the slot.
pub fn add_memory(vm: &VmFd, memory: &GuestMemoryMmap<()>, number: u32, range: &Range<u64>) -> Result<(), KvmError> {
    let failed = |source| KvmError::Ioctl { what: "KVM_SET_USER_MEMORY_REGION", source };
    let len = range.end.saturating_sub(range.start);
    let part = usize::try_from(len).ok().and_then(|len| memory.get_slice(GuestAddress(range.start), len).ok());
    let part = part.ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
    let slot = kvm_userspace_memory_region {
        slot: number,
        flags: 0,
        guest_phys_addr: range.start,
        memory_size: len,
        userspace_addr: part.ptr_guard_mut().as_ptr() as u64,
    };
    // SAFETY: the slot is exactly `part`, which lies in one mapped region that `memory` keeps mapped; the machine keeps
    // `memory` for as long as the VM lives.
    unsafe { vm.set_user_memory_region(slot) }.map_err(|e| failed(e.into()))
}
