//! Where front-ends come from: a socket that we make, or one that we are handed (`--fd`, systemd's socket activation).

use std::fs;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::sockopt::{socket_acceptconn, socket_domain};

use crate::export::ExportError;

/// How long a socket on which somebody listens is waited for.
const PATIENCE: Duration = Duration::from_secs(1);

/// Which socket an export is served on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SocketSource {
    /// A Unix socket at this path, made here and removed at the end.
    Path(PathBuf),
    /// An open descriptor: a Unix socket that listens, or one that a front-end is connected to already.
    Descriptor(RawFd),
}

/// A socket that is removed when it is not used any more.
#[derive(Debug)]
pub(crate) struct Listener {
    listener: UnixListener,
    /// Where it was made, and which file that was.
    made: Option<(PathBuf, (u64, u64))>,
}

/// What a source turned out to be.
#[derive(Debug)]
pub(crate) enum Socket {
    /// Front-ends come one after the other.
    Listening(Listener),
    /// There is one, and no other can come.
    Connected(UnixStream),
}

impl Socket {
    /// Makes the socket, or takes it.
    ///
    /// # Errors
    /// Says which path or descriptor, and what is wrong with it.
    pub(crate) fn open(source: &SocketSource) -> Result<Self, ExportError> {
        match source {
            SocketSource::Path(path) => Ok(Self::Listening(bind(path)?)),
            SocketSource::Descriptor(number) => adopt(*number),
        }
    }
}

impl Listener {
    /// The next front-end; none if it has gone again.
    pub(crate) fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(error),
            },
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Some((path, made)) = &self.made else { return };
        // Another process may have put its own socket there meanwhile.
        if identity(path).is_ok_and(|now| now == *made)
            && let Err(error) = fs::remove_file(path)
        {
            tracing::warn!("{}: cannot remove the socket: {error}", path.display());
        }
    }
}

fn bind(path: &Path) -> Result<Listener, ExportError> {
    let failed = |error: io::Error| ExportError::Socket { path: path.to_path_buf(), error };
    // A process that was killed leaves its socket behind, and nobody listens there.
    let began = Instant::now();
    while fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket()) {
        match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(failed)?,
            // One that was killed is not gone at once.
            _ if began.elapsed() < PATIENCE => std::thread::sleep(PATIENCE / 20),
            _ => return Err(ExportError::SocketInUse(path.to_path_buf())),
        }
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let made = identity(path).map_err(failed)?;
    Ok(Listener { listener, made: Some((path.to_path_buf(), made)) })
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

fn adopt(number: RawFd) -> Result<Socket, ExportError> {
    let wrong = |error: io::Error| ExportError::Descriptor { number, error };
    let is_open = number > 2 && fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_ok();
    if !is_open {
        return Err(wrong(io::Error::from_raw_os_error(rustix::io::Errno::BADF.raw_os_error())));
    }
    // SAFETY: the descriptor is open, none of the standard ones, and by being named here it was given to us; each is taken once
    // (exports with the same one are refused).
    let socket = unsafe { OwnedFd::from_raw_fd(number) };
    // What we start would have it otherwise.
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC).map_err(|e| wrong(e.into()))?;
    if socket_domain(&socket).map_err(|e| wrong(e.into()))? != rustix::net::AddressFamily::UNIX {
        return Err(wrong(io::Error::new(io::ErrorKind::InvalidInput, "it is not a Unix socket")));
    }
    if socket_acceptconn(&socket).map_err(|e| wrong(e.into()))? {
        let listener = UnixListener::from(socket);
        listener.set_nonblocking(true).map_err(wrong)?;
        return Ok(Socket::Listening(Listener { listener, made: None }));
    }
    Ok(Socket::Connected(UnixStream::from(socket)))
}
