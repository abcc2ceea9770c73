//! The signals that a running machine heeds, as events.
//!
//! They are blocked in every thread, so this must come before any thread is started.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use vmm_sys_util::signal::create_sigset;

/// Signals that ask the guest to power off, and the second time stop it.
pub const POLITE: [libc::c_int; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];
/// The signal that stops the guest at once.
pub const AT_ONCE: libc::c_int = libc::SIGQUIT;

/// Readable when one of the signals arrived.
pub struct SignalEvents {
    fd: OwnedFd,
}

impl SignalEvents {
    /// From now on the signals are events; a signal that this process was started to ignore stays ignored.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn new() -> io::Result<Self> {
        let signals = [POLITE.as_slice(), &[AT_ONCE]].concat();
        let set = create_sigset(&signals)?;
        // SAFETY: `set` is an initialised signal set; the old mask is not asked for.
        let error = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) };
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        // SAFETY: `set` is an initialised signal set, and -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: signalfd returned a new descriptor that nobody else owns.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// The next signal that arrived; none when all were taken.
    pub fn next(&self) -> Option<libc::c_int> {
        let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
        let len = rustix::io::read(&self.fd, &mut info).ok()?;
        // The signal's number is the first field.
        let number = info.get(..4).filter(|_| len == info.len())?;
        Some(libc::c_int::from_ne_bytes(number.try_into().ok()?))
    }
}

impl AsRawFd for SignalEvents {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl AsFd for SignalEvents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
