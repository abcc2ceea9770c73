//! What this host can do for a machine, for the doctor: asks, changes nothing.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use rustix::fs::{MemfdFlags, memfd_create};

use crate::arch;
use crate::kvm::{self, KvmError};

/// One capability and whether KVM has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capability {
    /// KVM's name of it.
    pub name: &'static str,
    /// Whether it is there.
    pub present: bool,
}

/// What KVM says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvmReport {
    /// What cowhand cannot do without.
    pub capabilities: Vec<Capability>,
    /// The most vCPUs of a guest.
    pub max_cpus: usize,
    /// The most memory slots of a guest.
    pub memory_slots: usize,
    /// Whether the processor shows the extension that an ordinary KVM uses.
    pub hardware: bool,
}

/// Asks KVM.
///
/// # Errors
/// When KVM cannot be opened.
pub fn kvm_report() -> Result<KvmReport, KvmError> {
    let kvm = kvm::open()?;
    let capabilities = kvm::REQUIRED
        .iter()
        .chain(arch::REQUIRED)
        .map(|(cap, name)| Capability { name, present: kvm.check_extension(*cap) })
        .collect();
    Ok(KvmReport {
        capabilities,
        max_cpus: kvm.get_max_vcpus(),
        memory_slots: kvm.get_nr_memslots(),
        hardware: arch::hardware_virtualization(),
    })
}

/// Sets an io_uring up and takes it down again.
///
/// # Errors
/// With the system's reason when io_uring is refused.
pub fn io_uring() -> io::Result<()> {
    // `struct io_uring_params` of 120 bytes, all zero: no flags.
    let mut params = [0u64; 15];
    // SAFETY: the kernel reads and writes one io_uring_params, which `params` has room for; the rings are never mapped.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1 as libc::c_uint, params.as_mut_ptr()) };
    owned(fd).map(drop)
}

/// Sets an OFD lock on a file of our own.
///
/// # Errors
/// With the system's reason when it is refused.
pub fn ofd_locks() -> io::Result<()> {
    let file = File::from(memfd_create("cowhand-doctor", MemfdFlags::CLOEXEC)?);
    let lock = libc::flock {
        l_type: libc::F_RDLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 100,
        l_len: 1,
        l_pid: 0,
    };
    // SAFETY: `file` is open, and F_OFD_SETLK reads one flock.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The version of Landlock's ABI.
///
/// # Errors
/// With the system's reason when Landlock is not there or off.
pub fn landlock_abi() -> io::Result<i64> {
    const LANDLOCK_CREATE_RULESET_VERSION: libc::c_uint = 1;
    // SAFETY: with this flag and no attributes the call only says its version; no pointer is followed.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<libc::c_void>(),
            0usize,
            LANDLOCK_CREATE_RULESET_VERSION,
        )
    };
    if version < 0 { Err(io::Error::last_os_error()) } else { Ok(version) }
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so this is a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}
