//! The messages of a front-end that keeps to the protocol.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::guest::{Guest, Region};
use crate::message::{NO_DESCRIPTOR, VRING_F_LOG, feature, flag, protocol, request};
use crate::ring::Ring;
use crate::wire::{Reply, Wire, invalid};

/// All protocol features that a back-end may offer and this front-end knows.
pub const PROTOCOL_ALL: u64 = protocol::MQ
    | protocol::LOG_SHMFD
    | protocol::REPLY_ACK
    | protocol::BACKEND_REQ
    | protocol::CONFIG
    | protocol::INFLIGHT_SHMFD
    | protocol::RESET_DEVICE
    | protocol::CONFIGURE_MEM_SLOTS;

/// What a driver takes of the features unless it is told otherwise: all but the dirty log.
pub const FEATURES_ALL: u64 = !feature::LOG_ALL;

/// The memory that a back-end wants kept.
#[derive(Debug)]
pub struct Inflight {
    /// Bytes.
    pub len: u64,
    /// Where in the file it begins.
    pub offset: u64,
    /// Rings that it is for.
    pub queues: u16,
    /// Entries of each.
    pub queue_size: u16,
    /// The file.
    pub file: File,
}

impl Inflight {
    /// As messages describe it.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = [self.len, self.offset].map(u64::to_le_bytes).concat();
        bytes.extend([self.queues, self.queue_size].map(u16::to_le_bytes).concat());
        bytes.extend([0; 4]);
        bytes
    }
}

/// A front-end that is connected.
#[derive(Debug)]
pub struct FrontEnd {
    /// The socket.
    pub wire: Wire,
    /// Features that were agreed on.
    pub features: u64,
    /// Protocol features that were agreed on.
    pub protocol: u64,
}

impl FrontEnd {
    /// Connects, and agrees on all features but the dirty log.
    ///
    /// # Errors
    /// Nobody listens, or the back-end refuses.
    pub fn connect(path: &Path) -> io::Result<Self> {
        Self::agree(Wire::connect(path)?, FEATURES_ALL, PROTOCOL_ALL)
    }

    /// Agrees on those of the features that the back-end offers.
    ///
    /// # Errors
    /// The back-end refuses.
    pub fn agree(wire: Wire, features: u64, protocol: u64) -> io::Result<Self> {
        let mut this = Self { wire, features: 0, protocol: 0 };
        let offered = this.get_u64(request::GET_FEATURES)?;
        this.features = offered & features;
        if this.features & feature::PROTOCOL_FEATURES != 0 {
            let protocol = this.get_u64(request::GET_PROTOCOL_FEATURES)? & protocol;
            this.wire.send(request::SET_PROTOCOL_FEATURES, flag::VERSION, &protocol.to_le_bytes(), &[])?;
            this.protocol = protocol;
        }
        this.tell(request::SET_OWNER, &[], &[])?;
        this.set_features(this.features)?;
        Ok(this)
    }

    /// Sets features.
    ///
    /// # Errors
    /// The back-end refuses.
    pub fn set_features(&mut self, features: u64) -> io::Result<()> {
        self.features = features;
        self.tell(request::SET_FEATURES, &features.to_le_bytes(), &[])
    }

    /// Sends a message that has no reply of its own, and has it acknowledged if that was agreed on.
    ///
    /// # Errors
    /// The back-end refuses, or has gone.
    pub fn tell(&self, request: u32, payload: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
        if self.protocol & protocol::REPLY_ACK == 0 {
            return self.wire.send(request, flag::VERSION, payload, files);
        }
        match self.wire.call(request, flag::VERSION | flag::NEED_REPLY, payload, files)?.u64()? {
            0 => Ok(()),
            refusal => Err(io::Error::other(format!("request {request} is refused: {refusal}"))),
        }
    }

    /// Sends a message and gives its reply.
    ///
    /// # Errors
    /// The back-end has gone.
    pub fn ask(&self, request: u32, payload: &[u8]) -> io::Result<Reply> {
        self.wire.call(request, flag::VERSION, payload, &[])
    }

    /// Asks for a number.
    ///
    /// # Errors
    /// The back-end has gone.
    pub fn get_u64(&self, request: u32) -> io::Result<u64> {
        self.ask(request, &[])?.u64()
    }

    /// Says where all of the guest's memory is.
    ///
    /// # Errors
    /// The back-end refuses.
    pub fn set_memory(&self, guest: &Guest) -> io::Result<()> {
        let mut payload = (guest.regions.len() as u64).to_le_bytes().to_vec();
        guest.regions.iter().for_each(|region| payload.extend(region.encode()));
        let files: Vec<_> = guest.regions.iter().map(Region::fd).collect();
        self.tell(request::SET_MEM_TABLE, &payload, &files)
    }

    /// Adds a region.
    ///
    /// # Errors
    /// The back-end refuses.
    pub fn add_region(&self, region: &Region) -> io::Result<()> {
        self.tell(request::ADD_MEM_REG, &[vec![0; 8], region.encode()].concat(), &[region.fd()])
    }

    /// Takes a region away.
    ///
    /// # Errors
    /// The back-end refuses.
    pub fn remove_region(&self, region: &Region) -> io::Result<()> {
        self.tell(request::REM_MEM_REG, &[vec![0; 8], region.encode()].concat(), &[])
    }

    /// Sends a message of a ring's number and another one.
    ///
    /// # Errors
    /// The back-end refuses.
    pub fn set_ring(&self, request: u32, index: u32, value: u32) -> io::Result<()> {
        self.tell(request, &[index, value].map(u32::to_le_bytes).concat(), &[])
    }

    /// Sends one of the messages that bring an eventfd.
    ///
    /// # Errors
    /// The back-end refuses.
    pub fn set_bell(&self, request: u32, index: u16, bell: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let word = u64::from(index) | if bell.is_none() { NO_DESCRIPTOR } else { 0 };
        self.tell(request, &word.to_le_bytes(), bell.as_slice())
    }

    /// Says where a ring lies; `log` is where its used ring is for the dirty log.
    ///
    /// # Errors
    /// The back-end refuses.
    pub fn set_addresses(&self, guest: &Guest, ring: &Ring, log: Option<u64>) -> io::Result<()> {
        let flags = if log.is_some() { VRING_F_LOG } else { 0 };
        let mut payload = [ring.index.into(), flags].map(u32::to_le_bytes).concat();
        let [descriptors, used, available] =
            [ring.at.descriptors, ring.at.used, ring.at.available].map(|at| guest.user(at));
        payload.extend([descriptors?, used?, available?, log.unwrap_or(0)].map(u64::to_le_bytes).concat());
        self.tell(request::SET_VRING_ADDR, &payload, &[])
    }

    /// Starts a ring at `base`, in the order in which QEMU does it.
    ///
    /// # Errors
    /// The back-end refuses.
    pub fn start(&self, guest: &Guest, ring: &Ring, base: u16) -> io::Result<()> {
        let index = ring.index.into();
        self.set_ring(request::SET_VRING_NUM, index, ring.size.into())?;
        self.set_ring(request::SET_VRING_BASE, index, base.into())?;
        self.set_addresses(guest, ring, None)?;
        self.set_bell(request::SET_VRING_ERR, ring.index, Some(ring.err.as_fd()))?;
        self.set_bell(request::SET_VRING_KICK, ring.index, Some(ring.kick.as_fd()))?;
        self.set_bell(request::SET_VRING_CALL, ring.index, Some(ring.call.as_fd()))?;
        if self.features & feature::PROTOCOL_FEATURES != 0 {
            self.set_ring(request::SET_VRING_ENABLE, index, 1)?;
        }
        Ok(())
    }

    /// Stops a ring; gives the next index that it would have taken.
    ///
    /// # Errors
    /// The back-end has gone.
    pub fn stop(&self, index: u16) -> io::Result<u16> {
        let payload = [u32::from(index), 0].map(u32::to_le_bytes).concat();
        let reply = self.ask(request::GET_VRING_BASE, &payload)?;
        match <[u8; 8]>::try_from(reply.payload.as_slice()) {
            Ok([a, b, 0, 0, low, high, 0, 0]) if u16::from_le_bytes([a, b]) == index => {
                Ok(u16::from_le_bytes([low, high]))
            }
            _ => Err(invalid("a base that is none")),
        }
    }

    /// Has the back-end make memory for records of requests in flight.
    ///
    /// # Errors
    /// The back-end refuses.
    pub fn get_inflight(&self, queues: u16, queue_size: u16) -> io::Result<Inflight> {
        let mut payload = vec![0; 16];
        payload.extend([queues, queue_size].map(u16::to_le_bytes).concat());
        payload.extend([0; 4]);
        let reply = self.ask(request::GET_INFLIGHT_FD, &payload)?;
        let number = |at: usize| reply.payload.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
        let (Some(len), Some(offset)) = (number(0), number(8)) else { return Err(invalid("no in-flight records")) };
        let file: Option<OwnedFd> = reply.files.into_iter().next();
        let file = file.ok_or_else(|| invalid("in-flight records without a file"))?.into();
        Ok(Inflight { len: u64::from_le_bytes(len), offset: u64::from_le_bytes(offset), queues, queue_size, file })
    }

    /// Gives the back-end the memory that was kept for it.
    ///
    /// # Errors
    /// The back-end refuses.
    pub fn set_inflight(&self, inflight: &Inflight) -> io::Result<()> {
        self.tell(request::SET_INFLIGHT_FD, &inflight.encode(), &[inflight.file.as_fd()])
    }

    /// Gives the back-end a dirty log of `len` bytes at `offset` of the file.
    ///
    /// # Errors
    /// The back-end refuses.
    pub fn set_log(&self, file: &File, len: u64, offset: u64) -> io::Result<()> {
        let payload = [len, offset].map(u64::to_le_bytes).concat();
        self.wire.call(request::SET_LOG_BASE, flag::VERSION, &payload, &[file.as_fd()]).map(drop)
    }

    /// Reads the configuration space.
    ///
    /// # Errors
    /// The back-end has gone, or has no such bytes.
    pub fn config(&self, offset: u32, len: u32) -> io::Result<Vec<u8>> {
        let mut payload = [offset, len, 0].map(u32::to_le_bytes).concat();
        payload.extend(vec![0; len as usize]);
        let reply = self.ask(request::GET_CONFIG, &payload)?;
        match reply.payload.get(12..) {
            Some(bytes) if bytes.len() == len as usize => Ok(bytes.to_vec()),
            _ => Err(invalid("no such bytes in the configuration space")),
        }
    }

    /// The disk's size in bytes, as the configuration space has it.
    ///
    /// # Errors
    /// As [`config`](Self::config).
    pub fn capacity(&self) -> io::Result<u64> {
        let bytes = self.config(0, 8)?.try_into().map_err(|_| invalid("no capacity"))?;
        Ok(u64::from_le_bytes(bytes) * 512)
    }

    /// Writes the configuration space.
    ///
    /// # Errors
    /// The back-end refuses.
    pub fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        let mut payload = [offset, bytes.len() as u32, 0].map(u32::to_le_bytes).concat();
        payload.extend_from_slice(bytes);
        self.tell(request::SET_CONFIG, &payload, &[])
    }

    /// Opens the channel on which the back-end sends messages of its own; gives our end.
    ///
    /// # Errors
    /// The back-end refuses.
    pub fn open_channel(&self) -> io::Result<Wire> {
        let (ours, theirs) = UnixStream::pair()?;
        self.tell(request::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()])?;
        Wire::over(ours)
    }
}
