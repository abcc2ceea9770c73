//! Loading what the guest boots: which kind of kernel it is, where the initrd goes, where the guest starts.
//!
//! Kernels are read straight into guest memory; the initrd only gets its place here, and comes later ([`crate::machine`]). The two boot protocols stand in [`super::linux`] (bzImage,
//! 64-bit entry) and [`super::pvh`] (ELF with a PVH note, 32-bit entry).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion};

use super::{layout, linux, pvh, registers};

/// What to boot. The files are regular files, open for reading.
pub struct BootSource<'a> {
    /// The kernel and its name for messages.
    pub kernel: (&'a File, &'a Path),
    /// The initrd and its name for messages.
    pub initrd: Option<(&'a File, &'a Path)>,
    /// The kernel's command line, without a terminating zero.
    pub cmdline: &'a str,
}

/// Where the guest starts, and in which mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryPoint {
    /// Linux' 64-bit boot protocol: long mode, paging on.
    Linux64 {
        /// Guest-physical address.
        address: u64,
    },
    /// PVH: 32-bit protected mode, paging off.
    Pvh {
        /// Guest-physical address.
        address: u64,
    },
}

/// Why there is nothing to boot.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The file could not be read.
    #[error("{}: cannot be read: {source}", file.display())]
    Read {
        /// The kernel or the initrd.
        file: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The file is something else.
    #[error("{}: not a kernel: neither a bzImage nor an x86_64 ELF file; give --kernel a vmlinuz or vmlinux", .0.display())]
    NotAKernel(PathBuf),
    /// A kernel, but one that cannot be booted this way.
    #[error("{}: a kernel that cannot be booted: {reason}", file.display())]
    Unbootable {
        /// The kernel.
        file: PathBuf,
        /// What it lacks.
        reason: String,
    },
    /// The kernel needs more memory than the guest has.
    #[error("{}: the kernel needs {} MiB of memory below 3 GiB, the guest has {}; give more --memory", file.display(), needed.div_ceil(1 << 20), memory >> 20)]
    KernelTooLarge {
        /// The kernel.
        file: PathBuf,
        /// Bytes.
        needed: u64,
        /// Bytes.
        memory: u64,
    },
    /// The initrd does not fit behind the kernel.
    #[error("{}: an initrd of {} MiB is too large for the guest's memory: beside the kernel {} MiB are free for it; give more --memory", file.display(), size.div_ceil(1 << 20), room >> 20)]
    InitrdTooLarge {
        /// The initrd.
        file: PathBuf,
        /// Bytes.
        size: u64,
        /// Bytes that are free for it.
        room: u64,
    },
    /// The command line is longer than the kernel takes.
    #[error("--cmdline: {len} bytes are more than the {max} that the kernel takes")]
    CmdlineTooLong {
        /// Bytes.
        len: usize,
        /// Bytes.
        max: usize,
    },
    /// The command line would end in its midst.
    #[error("--cmdline: holds a zero byte")]
    CmdlineZero,
    /// Guest memory refused an access; a mistake of this program.
    #[error("guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
}

impl BootError {
    /// An error of reading `file`.
    pub(crate) fn read(file: &Path) -> impl Fn(io::Error) -> Self {
        let file = file.to_path_buf();
        move |source| Self::Read { file: file.clone(), source }
    }
}

/// Where an initrd is to be put.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InitrdRange {
    /// Guest-physical address, at the start of a page; nothing else is in its pages.
    pub base: u64,
    /// Bytes.
    pub len: u64,
}

/// What was loaded.
#[derive(Debug, PartialEq, Eq)]
pub struct Loaded {
    /// Where the guest starts.
    pub entry: EntryPoint,
    /// Where it looks for its initrd, which is not there yet.
    pub initrd: Option<InitrdRange>,
}

/// Loads kernel and command line, finds a place for the initrd, and writes everything that the kernel is told about them and the
/// machine.
///
/// # Errors
/// Says which file is wrong and how.
pub fn load(memory: &GuestMemoryMmap<()>, size: u64, source: &BootSource<'_>) -> Result<Loaded, BootError> {
    let (kernel, name) = source.kernel;
    let mut head = [0; linux::HEADER_END];
    let len = read_at_most(kernel, &mut head).map_err(BootError::read(name))?;
    let head = &head[..len];
    let loaded = if head.starts_with(b"\x7fELF") {
        pvh::load(memory, size, source)?
    } else if let Some(header) = linux::parse_header(head) {
        linux::load(memory, size, source, header)?
    } else {
        return Err(BootError::NotAKernel(name.to_path_buf()));
    };
    registers::write_tables(memory, &loaded.entry)?;
    Ok(loaded)
}

/// Reads from the start of `file` until `buf` is full or the file ends.
fn read_at_most(file: &File, buf: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while len < buf.len() {
        match file.read_at(&mut buf[len..], len as u64) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(len)
}

/// Writes the command line, terminated, where both protocols point.
pub(super) fn write_cmdline(memory: &GuestMemoryMmap<()>, cmdline: &str, max: usize) -> Result<(), BootError> {
    if cmdline.len() > max {
        return Err(BootError::CmdlineTooLong { len: cmdline.len(), max });
    }
    if cmdline.bytes().any(|byte| byte == 0) {
        return Err(BootError::CmdlineZero);
    }
    memory.write_slice(cmdline.as_bytes(), GuestAddress(layout::CMDLINE))?;
    memory.write_obj(0u8, GuestAddress(layout::CMDLINE + cmdline.len() as u64))?;
    Ok(())
}

/// Finds a place for the initrd: as high as it may be, below `limit` (exclusive), above `kernel_end`.
pub(super) fn place_initrd(
    source: &BootSource<'_>,
    kernel_end: u64,
    limit: u64,
) -> Result<Option<InitrdRange>, BootError> {
    let Some((file, name)) = source.initrd else { return Ok(None) };
    let len = file.metadata().map_err(BootError::read(name))?.len();
    let room = limit.saturating_sub(kernel_end);
    let too_large = || BootError::InitrdTooLarge { file: name.to_path_buf(), size: len, room };
    let base = limit.checked_sub(len).ok_or_else(too_large)? & !0xfff;
    if base < kernel_end {
        return Err(too_large());
    }
    Ok(Some(InitrdRange { base, len }))
}

/// The end of RAM below the 32-bit hole.
pub(super) fn low_ram_end(memory: &GuestMemoryMmap<()>) -> u64 {
    use vm_memory::GuestMemoryBackend;
    memory.iter().next().map_or(0, GuestMemoryRegion::len)
}

#[cfg(test)]
#[path = "boot_test.rs"]
mod tests;
