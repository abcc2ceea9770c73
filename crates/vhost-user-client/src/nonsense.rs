//! Bytes as a front-end's behaviour: messages that are mostly well-formed, with whatever in their fields, memory files and eventfds as their
//! descriptors, and a driver that fills its rings with anything. For fuzzing: the same bytes do the same.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::bell::Bell;
use crate::disk::{Ask, Queue};
use crate::front_end::{FEATURES_ALL, FrontEnd, Inflight, PROTOCOL_ALL};
use crate::guest::{Guest, memory_file};
use crate::message::{flag, request};
use crate::ring::{Descriptor, Ring};
use crate::wire::Wire;

/// Entries of each ring that is set up as it should be.
const RING: u16 = 16;
/// Bytes of guest memory for each queue.
const ROOM: u64 = 128 << 10;
const QUEUES: u16 = 2;
/// The most that one input does.
const STEPS: usize = 200;

/// Takes numbers off the input.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()])
    }

    fn u64(&mut self) -> u64 {
        u64::from(self.u32()) << 32 | u64::from(self.u32())
    }

    /// A small number, mostly.
    fn small(&mut self) -> u32 {
        match self.byte() {
            byte @ 0..250 => u32::from(byte % 5),
            _ => self.u32(),
        }
    }

    /// A number that means something to a ring or to memory, mostly.
    fn place(&mut self) -> u64 {
        let byte = self.byte();
        match byte % 8 {
            0 => self.u64(),
            1 => u64::from(self.u32()),
            2 => 1 << (byte >> 3),
            3 => u64::MAX - u64::from(byte),
            _ => u64::from(self.byte()) * 512,
        }
    }
}

struct Player {
    front_end: FrontEnd,
    guest: Arc<Guest>,
    queues: Vec<Queue>,
    inflight: Option<Inflight>,
    other: File,
}

/// Does to the back-end at `socket` what the bytes say.
///
/// # Errors
/// Only when there is no back-end, or no memory: that a connection ends is part of it.
pub fn play(socket: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut input = Input(bytes);
    let mut player = Player::new(socket)?;
    for _ in 0..STEPS {
        if input.0.is_empty() {
            break;
        }
        if player.step(&mut input).is_err() {
            player.reconnect(socket)?;
        }
    }
    Ok(())
}

fn connect(socket: &Path) -> io::Result<FrontEnd> {
    let mut last = None;
    // It may be about to let go of a connection that has just ended.
    for _ in 0..1000 {
        let connected = Wire::connect_soon(socket, Duration::from_secs(5))
            .and_then(|wire| FrontEnd::agree(wire, FEATURES_ALL, PROTOCOL_ALL));
        match connected {
            Ok(front_end) => return Ok(front_end),
            Err(error) => last = Some(error),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Err(last.unwrap_or_else(|| io::ErrorKind::TimedOut.into()))
}

impl Player {
    fn new(socket: &Path) -> io::Result<Self> {
        let front_end = connect(socket)?;
        let guest = Arc::new(Guest::new(&[(0, ROOM * u64::from(QUEUES)), (1 << 32, 64 << 10)])?);
        let queue = |index| Queue::new(&guest, index, RING, ROOM * u64::from(index), (5, 8 << 10));
        let queues = (0..QUEUES).map(queue).collect::<io::Result<_>>()?;
        Ok(Self { front_end, guest, queues, inflight: None, other: memory_file(8192)? })
    }

    fn reconnect(&mut self, socket: &Path) -> io::Result<()> {
        self.front_end.wire.close();
        self.front_end = connect(socket)?;
        Ok(())
    }

    fn start(&mut self, index: usize) -> io::Result<()> {
        self.front_end.set_memory(&self.guest)?;
        let ring = &self.queues[index].ring;
        self.front_end.start(&self.guest, ring, ring.used_index()?)
    }

    fn step(&mut self, input: &mut Input<'_>) -> io::Result<()> {
        let what = input.byte();
        let index = usize::from(input.byte()) % self.queues.len();
        match what % 16 {
            0 => self.start(index),
            1 => self.front_end.stop(index as u16).map(drop),
            2 => {
                let inflight = self.front_end.get_inflight(input.small() as u16, 1 << (input.byte() % 5))?;
                self.front_end.set_inflight(&inflight)?;
                self.inflight = Some(inflight);
                Ok(())
            }
            3 => match &self.inflight {
                Some(inflight) => self.front_end.set_inflight(inflight),
                None => Ok(()),
            },
            4 => self.scribble(input),
            5..=8 => self.request(index, input),
            9 => self.chain(index, input),
            10 => {
                let at =
                    [self.queues[index].ring.at.available, self.queues[index].ring.at.used][usize::from(what >> 4 & 1)];
                self.guest.put(at + input.place() % 256, &input.u32().to_le_bytes())?;
                self.queues[index].ring.kick.ring()
            }
            11 => Err(io::ErrorKind::ConnectionReset.into()),
            12 => {
                let bytes: Vec<u8> = (0..input.byte() % 40).map(|_| input.byte()).collect();
                self.front_end.wire.send_bytes(&bytes, &[])?;
                // Whatever that was, it is the end of it.
                Err(io::ErrorKind::ConnectionReset.into())
            }
            _ => self.message(index, input),
        }
    }

    /// Changes what a process before left behind.
    fn scribble(&self, input: &mut Input<'_>) -> io::Result<()> {
        let Some(inflight) = &self.inflight else { return Ok(()) };
        let at = match input.byte() % 3 {
            0 => input.place() % 1024 * 8,
            1 => u64::from(input.u32()) % inflight.len,
            _ => (64 << 10) + u64::from(input.byte()) * 8,
        };
        std::os::unix::fs::FileExt::write_all_at(&inflight.file, &input.place().to_le_bytes(), at.min(inflight.len - 8))
    }

    fn request(&mut self, index: usize, input: &mut Input<'_>) -> io::Result<()> {
        let queue = &mut self.queues[index];
        let (offset, len) = (input.place() & !511, u64::from(input.byte() % 16) * 512);
        let ask = match input.byte() % 8 {
            0 | 1 => Ask::Read(offset, len as u32),
            2 | 3 => Ask::Write(offset, vec![input.byte(); len as usize]),
            4 => Ask::Flush,
            5 => Ask::Discard(offset, input.place()),
            6 => Ask::WriteZeroes(offset, input.place(), len & 512 != 0),
            _ => Ask::Other(input.small(), offset, len as u32, vec![input.byte(); usize::from(input.byte())]),
        };
        queue.indirect = input.byte() & 1 == 1;
        // A ring that is full, or makes no sense any more, is begun anew.
        let submitted = queue.submit(&ask).and_then(|_| queue.ring.notify()).and_then(|_| queue.take());
        if submitted.is_err() {
            *queue = Queue::new(&self.guest, index as u16, RING, ROOM * index as u64, (5, 8 << 10))?;
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        Ok(())
    }

    fn chain(&mut self, index: usize, input: &mut Input<'_>) -> io::Result<()> {
        let ring: &mut Ring = &mut self.queues[index].ring;
        for n in 0..u16::from(input.byte() % 4) {
            let descriptor = Descriptor { at: input.place(), len: input.small().wrapping_mul(16), flags: 0 };
            let flags = u16::from(input.byte()) & if input.byte() < 250 { 7 } else { 0xff };
            self.guest.put(ring.descriptor(n), &descriptor.encode(flags, input.small() as u16))?;
        }
        ring.offer(input.small() as u16)?;
        ring.kick.ring()
    }

    fn message(&mut self, index: usize, input: &mut Input<'_>) -> io::Result<()> {
        let request = u32::from(input.byte() % 46);
        let fields = usize::from(input.byte() % 8);
        let mut payload = match request {
            request::SET_VRING_NUM | request::SET_VRING_BASE | request::GET_VRING_BASE | request::SET_VRING_ENABLE => {
                [input.small(), 1 << (input.byte() % 17)].map(u32::to_le_bytes).concat()
            }
            request::SET_VRING_KICK | request::SET_VRING_CALL | request::SET_VRING_ERR => {
                (index as u64).to_le_bytes().to_vec()
            }
            request::SET_MEM_TABLE => u64::from(input.small()).to_le_bytes().to_vec(),
            request::GET_CONFIG | request::SET_CONFIG => {
                let len = input.byte() % 64;
                let mut payload = [input.small().wrapping_mul(8), len.into(), 0].map(u32::to_le_bytes).concat();
                payload.extend((0..len).map(|_| input.byte()));
                payload
            }
            request::ADD_MEM_REG | request::REM_MEM_REG => vec![0; 8],
            _ => Vec::new(),
        };
        if payload.len() < 8 || matches!(request, request::SET_MEM_TABLE | request::ADD_MEM_REG | request::REM_MEM_REG)
        {
            payload.extend((0..fields).flat_map(|_| input.place().to_le_bytes()));
        }
        let bell = Bell::new()?;
        let region = &self.guest.regions[index % self.guest.regions.len()];
        let files = [bell.as_fd(), region.fd(), self.other.as_fd()];
        let first = usize::from(input.byte() % 4).min(files.len());
        let count = usize::from(input.byte() % 3).min(files.len() - first);
        let flags = flag::VERSION | if input.byte() & 1 == 0 { flag::NEED_REPLY } else { 0 };
        self.front_end.wire.send(request, flags, &payload, &files[first..first + count])?;
        // Then something that is answered, which shows that the first was handled; answers that came before it are passed over.
        self.front_end.wire.send(request::GET_QUEUE_NUM, flag::VERSION, &[], &[])?;
        while self.front_end.wire.receive()?.request != request::GET_QUEUE_NUM {}
        Ok(())
    }
}
