//! One front-end: its messages, one after the other, until it goes or breaks the protocol.
//!
//! A message is handed to `vhost` only when all of it is there: that one reads a header and a body with one call each, which
//! would wait for what a front-end leaves out, and takes a body that comes in two parts for a broken one.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionread};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};

use crate::device::Device;
use crate::served::Served;
use crate::wake::Wake;

/// Bytes of a message's header: request, flags, size of the payload.
const HEADER: usize = 12;
/// The largest payload that is listened to; `vhost` takes none larger.
const PAYLOAD_MAX: u32 = 4096;
/// The most descriptors that come with a message; `vhost` would lose its place in the stream if there were more.
const DESCRIPTORS: usize = 32;
/// How long the rest of a message may take, and how long a front-end may leave its replies unread.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Ended {
    /// The front-end has closed it.
    #[error("the front-end has disconnected")]
    Gone,
    /// It does not keep to the protocol, or wants what cannot be.
    #[error("the front-end is disconnected: {0}")]
    Broken(String),
}

/// What waits to be read.
enum Ahead {
    /// Not a whole message yet.
    Part,
    /// A message, and whether it brings the channel to the front-end.
    Message { brings_channel: bool },
}

/// A front-end that is connected.
pub(crate) struct Connection {
    stream: UnixStream,
    device: Arc<Mutex<Device>>,
    handler: BackendReqHandler<Mutex<Device>>,
    /// Rung when the front-end has taken memory away that is mapped.
    lost: Wake,
    /// Since when a part of a message has been waiting for the rest, or a message for room for its reply.
    waits_since: Option<Instant>,
}

impl Connection {
    /// # Errors
    /// The system refuses; the disk comes back.
    pub(crate) fn new(stream: UnixStream, device: Device) -> Result<Self, Box<(io::Error, Served)>> {
        let handed = match stream.set_nonblocking(false).and_then(|()| stream.try_clone()) {
            Ok(handed) => handed,
            Err(error) => return Err(Box::new((error, device.end().0))),
        };
        let lost = device.lost().clone();
        let device = Arc::new(Mutex::new(device));
        let handler = BackendReqHandler::from_stream(handed, device.clone());
        Ok(Self { stream, device, handler, lost, waits_since: None })
    }

    /// The device that it talks to.
    pub(crate) fn device(&self) -> MutexGuard<'_, Device> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What wakes whoever waits for a message when there is another reason to [`handle`](Self::handle).
    pub(crate) fn lost(&self) -> &Wake {
        &self.lost
    }

    /// When to look again though nothing more came: something waits.
    pub(crate) fn look_again(&self) -> Option<Duration> {
        self.waits_since.map(|_| Duration::from_millis(1))
    }

    /// Handles the next message, if it is there.
    ///
    /// # Errors
    /// The connection is over.
    pub(crate) fn handle(&mut self) -> Result<(), Ended> {
        if self.lost.hear() {
            return Err(Ended::Broken("it has taken away memory that is in use".into()));
        }
        match self.look_ahead()? {
            // Nothing more will come.
            Ahead::Part if self.is_hung_up() => Err(Ended::Gone),
            Ahead::Part => self.wait("a message broke off"),
            // `vhost` would wait without end for room for a reply. Where a little has been read there is room for the largest one.
            Ahead::Message { .. } if !self.has_room() => self.wait("it does not read its replies"),
            Ahead::Message { brings_channel } => {
                self.waits_since = None;
                let channel = if brings_channel { self.peek_descriptor()? } else { None };
                self.handler.handle_request().map_err(|error| match error {
                    VhostError::Disconnected | VhostError::SocketBroken(_) => Ended::Gone,
                    error => Ended::Broken(error.to_string()),
                })?;
                if let Some(channel) = channel {
                    self.device().front().set_socket(channel);
                }
                Ok(())
            }
        }
    }

    /// Comes back later, unless that has been going on for too long.
    fn wait(&mut self, why: &str) -> Result<(), Ended> {
        let since = *self.waits_since.get_or_insert_with(Instant::now);
        if since.elapsed() < PATIENCE { Ok(()) } else { Err(Ended::Broken(why.into())) }
    }

    /// Looks at the header that waits, and whether all of its message is there.
    fn look_ahead(&self) -> Result<Ahead, Ended> {
        let mut header = [0; HEADER];
        let mut none = RecvAncillaryBuffer::default();
        let (there, descriptors) = self.peek(&mut header, &mut none)?;
        if there == 0 {
            return Err(Ended::Gone);
        }
        if there < HEADER {
            return Ok(Ahead::Part);
        }
        if descriptors {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
            if let (_, true) = self.peek(&mut header, &mut RecvAncillaryBuffer::new(&mut space))? {
                return Err(Ended::Broken(format!("a message with more than {DESCRIPTORS} descriptors")));
            }
        }
        let [a, b, c, d, _, _, _, _, size @ ..] = header;
        let (request, size) = (u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes(size));
        if size > PAYLOAD_MAX {
            return Err(Ended::Broken(format!("message {request} with {size} bytes of payload")));
        }
        let queued = ioctl_fionread(&self.stream).map_err(broken)?;
        if queued < HEADER as u64 + u64::from(size) {
            return Ok(Ahead::Part);
        }
        Ok(Ahead::Message { brings_channel: request == FrontendReq::SET_BACKEND_REQ_FD as u32 })
    }

    /// A copy of the descriptor that comes with the message that waits, which stays where it is.
    fn peek_descriptor(&self) -> Result<Option<OwnedFd>, Ended> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        self.peek(&mut [0; HEADER], &mut control)?;
        let descriptors = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        });
        Ok(descriptors.flatten().next())
    }

    /// Copies of what waits: how many bytes, and whether there are more descriptors than there was room for.
    fn peek(&self, bytes: &mut [u8], control: &mut RecvAncillaryBuffer<'_>) -> Result<(usize, bool), Ended> {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        match recvmsg(&self.stream, &mut [IoSliceMut::new(bytes)], control, flags) {
            Ok(received) => Ok((received.bytes, received.flags.contains(ReturnFlags::CTRUNC))),
            Err(Errno::CONNRESET) => Err(Ended::Gone),
            Err(error) => Err(broken(error)),
        }
    }

    /// Whether the front-end has closed its end; what it sent before may still wait.
    pub(crate) fn is_hung_up(&self) -> bool {
        self.is(PollFlags::HUP)
    }

    /// Whether a reply can be sent without waiting: for a Unix socket when most of its room is free.
    fn has_room(&self) -> bool {
        self.is(PollFlags::OUT)
    }

    fn is(&self, state: PollFlags) -> bool {
        let mut polled = [PollFd::new(&self.stream, state)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut polled, Some(&now)).is_ok_and(|_| polled[0].revents().contains(state))
    }

    /// Drains and closes everything; gives the disk back, and why it could not be flushed, if so.
    pub(crate) fn end(self) -> Option<(Served, cowhand_block::Result<()>)> {
        let Self { device, handler, stream, .. } = self;
        drop(handler);
        let device = Arc::into_inner(device).map(|device| device.into_inner().unwrap_or_else(PoisonError::into_inner));
        let served = device.map(Device::end);
        // Only now: a front-end that comes back then finds everything drained.
        drop(stream);
        served
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn broken(error: Errno) -> Ended {
    match error {
        Errno::AGAIN => Ended::Broken("its socket cannot be read".into()),
        error => Ended::Broken(error.to_string()),
    }
}
