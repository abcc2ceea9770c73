//! The guest's serial port: vm-superio's 16550 behind a bus and an interrupt.
//!
//! Locks: the port's, held while a byte is written to the host's console.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::console::output::ConsoleOutput;

/// The interrupt line of the port.
struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells the control thread that the guest has read everything.
struct RoomForInput(Arc<EventFd>);

impl SerialEvents for RoomForInput {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // Fails only when the counter is full, and then the reader has enough to wake up for.
        let _ = self.0.write(1);
    }
}

/// A 16550A.
pub struct SerialPort {
    port: Mutex<Serial<Interrupt, RoomForInput, ConsoleOutput>>,
    room: Arc<EventFd>,
}

impl SerialPort {
    /// A port that writes to `output` and interrupts through `interrupt`.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn new(output: ConsoleOutput, interrupt: EventFd) -> io::Result<Self> {
        let room = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let port = Serial::with_events(Interrupt(interrupt), RoomForInput(room.clone()), output);
        Ok(Self { port: Mutex::new(port), room })
    }

    /// Signalled when the guest has read everything that was typed.
    #[must_use]
    pub fn room_event(&self) -> &EventFd {
        &self.room
    }

    /// How many bytes can be typed now.
    #[must_use]
    pub fn room(&self) -> usize {
        self.lock().fifo_capacity()
    }

    /// Types `bytes`, at most [`room`](Self::room) of them; the rest, and everything in loop-back mode, is lost as on a line.
    pub fn type_in(&self, bytes: &[u8]) {
        if let Err(e) = self.lock().enqueue_raw_bytes(bytes) {
            tracing::debug!("serial input lost: {e}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Serial<Interrupt, RoomForInput, ConsoleOutput>> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut port = self.lock();
        // The bus keeps accesses inside the eight registers; a wide one reads successive registers.
        for (offset, byte) in (offset as u8..).zip(data) {
            *byte = port.read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut port = self.lock();
        for (offset, byte) in (offset as u8..).zip(data) {
            if let Err(e) = port.write(offset, *byte) {
                tracing::debug!("serial output lost: {e}");
            }
        }
    }
}
