//! QEMU's image locks: shared open-file-description locks on single bytes of the image.
//!
//! For each permission i that is held a shared lock lies on byte 100 + i, for each that is not shared with others one on
//! byte 200 + i; a conflict shows as somebody else's lock on the opposite byte. (QEMU, `block/file-posix.c`.)

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use crate::io::{LockError, LockMasks};

const HELD: i64 = 100;
const UNSHARED: i64 = 200;
const PERMISSIONS: u8 = 4;

/// QEMU's names of the permissions.
const NAMES: [&str; PERMISSIONS as usize] = ["\"consistent read\"", "\"write\"", "\"write unchanged\"", "\"resize\""];

/// The same where it is about who shares it.
const SHARED_NAMES: [&str; PERMISSIONS as usize] =
    ["shared \"consistent read\"", "shared \"write\"", "shared \"write unchanged\"", "shared \"resize\""];

fn call(fd: BorrowedFd<'_>, command: i32, kind: i32, start: i64, len: i64) -> io::Result<libc::flock> {
    let mut lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: len,
        l_pid: 0,
    };
    // SAFETY: `lock` is a valid flock that lives across the call, and fd is open.
    if unsafe { libc::fcntl(fd.as_raw_fd(), command, &raw mut lock) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(lock)
}

fn bits(mask: u8) -> impl Iterator<Item = u8> {
    (0..PERMISSIONS).filter(move |i| mask & (1 << i) != 0)
}

/// Takes the locks of `masks`; on failure gives all back.
pub(super) fn lock(fd: BorrowedFd<'_>, masks: LockMasks) -> Result<(), LockError> {
    let fd = fd.as_fd();
    let taken = try_lock(fd, masks);
    if taken.is_err() {
        unlock(fd);
    }
    taken
}

fn try_lock(fd: BorrowedFd<'_>, masks: LockMasks) -> Result<(), LockError> {
    for (base, mask) in [(HELD, masks.held), (UNSHARED, masks.unshared)] {
        for i in 0..PERMISSIONS {
            let kind = if mask & (1 << i) != 0 { libc::F_RDLCK } else { libc::F_UNLCK };
            call(fd, libc::F_OFD_SETLK, kind, base + i64::from(i), 1).map_err(|e| match e.raw_os_error() {
                Some(libc::EAGAIN | libc::EACCES) => LockError::Held(NAMES[usize::from(i)]),
                _ => LockError::Io(e),
            })?;
        }
    }
    // Only after our own locks stand: two who come at once then see each other, and at worst both give way.
    for (opposite, mask, names) in [(UNSHARED, masks.held, NAMES), (HELD, masks.unshared, SHARED_NAMES)] {
        for i in bits(mask) {
            let found =
                call(fd, libc::F_OFD_GETLK, libc::F_WRLCK, opposite + i64::from(i), 1).map_err(LockError::Io)?;
            if i32::from(found.l_type) != libc::F_UNLCK {
                return Err(LockError::Held(names[usize::from(i)]));
            }
        }
    }
    Ok(())
}

/// Gives back the locks that `masks` do not ask for. A conflict is not looked for: none can come of it.
pub(super) fn relax(fd: BorrowedFd<'_>, masks: LockMasks) {
    for (base, mask) in [(HELD, masks.held), (UNSHARED, masks.unshared)] {
        for i in bits(!mask) {
            // Unlocking can only fail on a descriptor that is not open.
            let _ = call(fd, libc::F_OFD_SETLK, libc::F_UNLCK, base + i64::from(i), 1);
        }
    }
}

/// Gives back every lock of this open file on the bytes that QEMU uses.
pub(super) fn unlock(fd: BorrowedFd<'_>) {
    for base in [HELD, UNSHARED] {
        // Unlocking can only fail on a descriptor that is not open.
        let _ = call(fd, libc::F_OFD_SETLK, libc::F_UNLCK, base, i64::from(PERMISSIONS));
    }
}
