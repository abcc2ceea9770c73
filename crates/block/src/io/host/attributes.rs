//! What Linux's file systems can be asked to do with a file beyond what POSIX knows: the extended attributes of `FS_IOC_FSSETXATTR`.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// `struct fsxattr` of `linux/fs.h`.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    flags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    copy_extent_size: u32,
    padding: [u8; 8],
}

/// `FS_XFLAG_EXTSIZE`: the extent size means something.
const EXTENT_SIZE: u32 = 0x800;

/// `_IOR('X', 31, struct fsxattr)` and `_IOW('X', 32, struct fsxattr)`, as x86_64 and aarch64 number them.
const GET: libc::Ioctl = 0x801c_581f_u32 as libc::Ioctl;
const SET: libc::Ioctl = 0x401c_5820_u32 as libc::Ioctl;

/// Asks the file system to give the file space in pieces of `bytes`.
pub(super) fn set_extent_size(fd: &OwnedFd, bytes: u32) -> io::Result<()> {
    let mut attributes = Attributes::default();
    // SAFETY: the call writes one `struct fsxattr`, 28 bytes, which is what it is given, and keeps nothing.
    if unsafe { libc::ioctl(fd.as_raw_fd(), GET, &raw mut attributes) } < 0 {
        return Err(io::Error::last_os_error());
    }
    attributes.flags |= EXTENT_SIZE;
    attributes.extent_size = bytes;
    // SAFETY: the call reads one `struct fsxattr`, and keeps nothing.
    if unsafe { libc::ioctl(fd.as_raw_fd(), SET, &raw const attributes) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

const _: () = assert!(size_of::<Attributes>() == 28);
