//! Messages on a socket, whole or in pieces, well-formed or not.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

use crate::message::flag;

/// Bytes of a header.
pub const HEADER: usize = 12;
/// How long an answer is waited for.
const PATIENCE: Duration = Duration::from_secs(30);
/// The most descriptors that go with one message; the kernel takes 253.
const MAX_FILES: usize = 64;

/// A message as it came.
#[derive(Debug)]
pub struct Reply {
    /// What it answers, or asks for.
    pub request: u32,
    /// The header's flags.
    pub flags: u32,
    /// What follows the header.
    pub payload: Vec<u8>,
    /// The descriptors that came with it.
    pub files: Vec<OwnedFd>,
}

impl Reply {
    /// The payload as one number.
    ///
    /// # Errors
    /// It is none.
    pub fn u64(&self) -> io::Result<u64> {
        let bytes = self.payload.as_slice().try_into().map_err(|_| invalid("a reply that is no number"))?;
        Ok(u64::from_le_bytes(bytes))
    }
}

/// One end of a socket.
#[derive(Debug)]
pub struct Wire {
    stream: UnixStream,
}

impl Wire {
    /// Connects to a back-end's socket.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(path: &Path) -> io::Result<Self> {
        Self::over(UnixStream::connect(path)?)
    }

    /// Connects as soon as somebody listens there, within `patience`.
    ///
    /// # Errors
    /// Nobody does.
    pub fn connect_soon(path: &Path, patience: Duration) -> io::Result<Self> {
        let until = Instant::now() + patience;
        loop {
            match Self::connect(path) {
                Err(error) if Instant::now() > until => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
                Ok(wire) => return Ok(wire),
            }
        }
    }

    /// Takes a connected socket.
    ///
    /// # Errors
    /// The system's.
    pub fn over(stream: UnixStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { stream })
    }

    /// A message's bytes.
    #[must_use]
    pub fn encode(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
        let size = payload.len() as u32;
        let mut bytes = [request, flags, size].map(u32::to_le_bytes).concat();
        bytes.extend_from_slice(payload);
        bytes
    }

    /// Sends a message.
    ///
    /// # Errors
    /// The back-end has gone, or does not read.
    pub fn send(&self, request: u32, flags: u32, payload: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send_bytes(&Self::encode(request, flags, payload), files)
    }

    /// Sends bytes, whatever they are. The descriptors go with the first of them.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub fn send_bytes(&self, bytes: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
            return Err(invalid("too many descriptors"));
        }
        let first = [IoSlice::new(bytes)];
        let mut sent = retry_on_intr(|| sendmsg(&self.stream, &first, &mut control, SendFlags::NOSIGNAL))?;
        while sent < bytes.len() {
            let rest = [IoSlice::new(&bytes[sent..])];
            let mut none = SendAncillaryBuffer::default();
            sent += retry_on_intr(|| sendmsg(&self.stream, &rest, &mut none, SendFlags::NOSIGNAL))?;
        }
        Ok(())
    }

    /// Waits for a message.
    ///
    /// # Errors
    /// None comes, or the other end has gone (then `UnexpectedEof`).
    pub fn receive(&self) -> io::Result<Reply> {
        let mut files = Vec::new();
        let mut header = [0; HEADER];
        self.fill(&mut header, &mut files)?;
        let [a, b, c, d, e, f, g, h, size @ ..] = header;
        let size = u32::from_le_bytes(size);
        if size > 1 << 20 {
            return Err(invalid("a message that is too large"));
        }
        let mut payload = vec![0; size as usize];
        self.fill(&mut payload, &mut files)?;
        Ok(Reply { request: u32::from_le_bytes([a, b, c, d]), flags: u32::from_le_bytes([e, f, g, h]), payload, files })
    }

    fn fill(&self, bytes: &mut [u8], files: &mut Vec<OwnedFd>) -> io::Result<()> {
        let mut filled = 0;
        while filled < bytes.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let into = &mut [IoSliceMut::new(&mut bytes[filled..])];
            let received = retry_on_intr(|| recvmsg(&self.stream, into, &mut control, RecvFlags::CMSG_CLOEXEC))?;
            if received.bytes == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            filled += received.bytes;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(sent) = message {
                    files.extend(sent);
                }
            }
        }
        Ok(())
    }

    /// Sends a message and waits for what answers it.
    ///
    /// # Errors
    /// The back-end has gone, or answers something else.
    pub fn call(&self, request: u32, flags: u32, payload: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<Reply> {
        self.send(request, flags, payload, files)?;
        let reply = self.receive()?;
        if reply.request != request || reply.flags & (flag::REPLY | 3) != flag::REPLY | flag::VERSION {
            return Err(invalid(&format!(
                "request {request} is answered by {}, flags {:#x}",
                reply.request, reply.flags
            )));
        }
        Ok(reply)
    }

    /// Whether the other end closes the connection within `patience`; what it sends before is not looked at.
    #[must_use]
    pub fn is_closed_within(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        let mut bytes = [0; 4096];
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            let mut polled = [PollFd::new(&self.stream, PollFlags::IN)];
            match poll(&mut polled, Some(&timeout)) {
                Ok(0) => return false,
                Err(_) => continue,
                Ok(_) => {}
            }
            match rustix::io::read(&self.stream, &mut bytes) {
                Err(Errno::INTR) | Ok(1..) => {}
                Ok(0) | Err(_) => return true,
            }
        }
    }

    /// Hangs up.
    pub fn close(&self) {
        // It may have been closed by the other end: then there is nothing to do.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }

    /// The socket.
    #[must_use]
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

pub(crate) fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}
