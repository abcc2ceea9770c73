//! The API's socket: only its owner may connect, one that a killed process has left is replaced, and it is removed at the end.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 64;

/// Why the API cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The socket cannot be made.
    #[error("{}: cannot listen there: {error}", path.display())]
    Socket {
        /// Where it was to be.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Somebody listens there.
    #[error("{}: another process listens there; stop it, or choose another path", .0.display())]
    InUse(PathBuf),
}

/// A socket's file, which is removed with this.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    made: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Another process may have put its own socket there meanwhile.
        if identity(&self.path).is_ok_and(|now| now == self.made)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!("{}: cannot remove the socket: {error}", self.path.display());
        }
    }
}

/// Listens at `path`.
///
/// # Errors
/// Somebody does already, or there can be no socket.
pub(crate) fn bind(path: &Path) -> Result<(UnixListener, SocketFile), ListenError> {
    let failed = |error: io::Error| ListenError::Socket { path: path.to_path_buf(), error };
    if fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket()) {
        match UnixStream::connect(path) {
            // A process that was killed leaves its socket behind, and nobody listens there.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(failed)?,
            _ => return Err(ListenError::InUse(path.to_path_buf())),
        }
    }
    let listener = listen(path).map_err(failed)?;
    let made = identity(path).map_err(failed)?;
    Ok((listener, SocketFile { path: path.to_path_buf(), made }))
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Linux gives the file the mode that the socket has when it is bound: at no moment may anyone else connect.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}
