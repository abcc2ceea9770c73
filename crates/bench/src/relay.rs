//! Between virtio-driver's front-end and the server: adds the messages about requests in flight (section "Inflight I/O tracking"
//! of vhost-user.rst), which real front-ends send and that one does not. Without them a back-end has no memory that outlives
//! it, and has to keep its promises in a slower way.
//!
//! Only messages pass here, while the queues are set up; requests do not.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use cowhand_vhost_user_client::message::{flag, protocol, request};
use cowhand_vhost_user_client::{FrontEnd, Inflight, Reply, Wire};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

/// A socket that stands before the server's, for one front-end.
pub struct Relay {
    /// Where the front-end is to connect.
    pub socket: PathBuf,
}

impl Relay {
    /// Connects to the server, and listens beside its socket for a front-end that will set up so many queues. A thread passes
    /// on what both say until one of them goes.
    ///
    /// # Errors
    /// When the server cannot be reached, or the socket not be made.
    pub fn new(server: &Path, queues: u16) -> io::Result<Self> {
        let back = FrontEnd { wire: Wire::connect(server)?, features: 0, protocol: 0 };
        let socket = server.with_extension("relay");
        let listener = UnixListener::bind(&socket)?;
        std::thread::Builder::new().name("relay".into()).spawn(move || {
            let passed = listener.accept().and_then(|(front, _)| {
                drop(listener);
                Pair { front: Wire::over(front)?, back, queues, kept: None }.run()
            });
            match passed {
                Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => tracing::error!("the relay: {error}"),
                _ => {}
            }
        })?;
        Ok(Self { socket })
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // Only the name, and that it is gone already is all right too.
        let _ = fs::remove_file(&self.socket);
    }
}

struct Pair {
    front: Wire,
    /// To the server; its protocol features are those that were agreed on.
    back: FrontEnd,
    queues: u16,
    /// As long as the connection is there, as a front-end that means to come back does.
    kept: Option<Inflight>,
}

impl Pair {
    /// # Errors
    /// When one of them goes (`UnexpectedEof`), or the server refuses.
    fn run(mut self) -> io::Result<()> {
        loop {
            let mut polled = [&self.front, &self.back.wire].map(|wire| PollFd::new(wire, PollFlags::IN));
            match poll(&mut polled, None) {
                Err(Errno::INTR) => continue,
                result => result?,
            };
            let [front, back] = polled.map(|end| !end.revents().is_empty());
            if front {
                let message = self.front.receive()?;
                self.pass_to_server(message)?;
            }
            if back {
                let message = self.back.wire.receive()?;
                self.pass_to_front_end(&message)?;
            }
        }
    }

    fn pass_to_server(&mut self, mut message: Reply) -> io::Result<()> {
        match message.request {
            request::SET_PROTOCOL_FEATURES => {
                // Until now this was what the server offers.
                let wanted = message.u64()? | protocol::INFLIGHT_SHMFD;
                self.back.protocol &= wanted;
                message.payload = self.back.protocol.to_le_bytes().to_vec();
            }
            // Memory that is given after this would come too late for the ring.
            request::SET_VRING_NUM if self.kept.is_none() && self.back.protocol & protocol::INFLIGHT_SHMFD != 0 => {
                let size = message.payload.get(4..6).and_then(|size| size.try_into().ok()).map(u16::from_le_bytes);
                let size = size.ok_or(io::ErrorKind::InvalidData)?;
                let memory = self.back.get_inflight(self.queues, size)?;
                self.back.set_inflight(&memory)?;
                self.kept = Some(memory);
            }
            _ => {}
        }
        pass(&message, &self.back.wire)
    }

    fn pass_to_front_end(&mut self, message: &Reply) -> io::Result<()> {
        if message.request == request::GET_PROTOCOL_FEATURES && message.flags & flag::REPLY != 0 {
            self.back.protocol = message.u64()?;
        }
        pass(message, &self.front)
    }
}

fn pass(message: &Reply, to: &Wire) -> io::Result<()> {
    let files: Vec<_> = message.files.iter().map(AsFd::as_fd).collect();
    to.send(message.request, message.flags, &message.payload, &files)
}

#[cfg(test)]
#[path = "relay_test.rs"]
mod tests;
