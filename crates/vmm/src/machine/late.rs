//! RAM that the guest gets after it has started: the initrd's.
//!
//! A kernel looks at its initrd long after its first instruction, and copying the initrd is a good part of what starting a machine
//! takes. So the guest starts without that range of RAM. A thread fills it and then gives it to the guest; an access
//! that comes earlier leaves the guest like one to a device, waits here, and is done on the memory.
//!
//! Locks: one, which no other is taken under.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use kvm_ioctls::VmFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{MachineError, NamedFile};
use crate::arch::{BootError, InitrdRange};
use crate::bus::{Bus, BusDevice};
use crate::kvm;
use crate::memory;

const PAGE: u64 = 4096;

/// The pages of an initrd, as the guest finds them before they are RAM.
pub(super) struct LateRam {
    memory: GuestMemoryMmap<()>,
    initrd: InitrdRange,
    file: NamedFile,
    vm: Arc<VmFd>,
    /// The number of the slot that the pages will be.
    slot: u32,
    here: Mutex<bool>,
    arrived: Condvar,
}

/// The pages that `initrd` takes.
pub(super) fn pages(initrd: &InitrdRange) -> Range<u64> {
    initrd.base..(initrd.base + initrd.len).next_multiple_of(PAGE)
}

impl LateRam {
    /// Puts it on the bus, to be filled by [`Self::fill`].
    pub(super) fn new(
        memory: &GuestMemoryMmap<()>,
        initrd: InitrdRange,
        file: NamedFile,
        (vm, slot): (Arc<VmFd>, u32),
        bus: &Bus,
    ) -> Result<Arc<Self>, MachineError> {
        let (here, arrived) = (Mutex::new(false), Condvar::new());
        let late = Arc::new(Self { memory: memory.clone(), initrd, file, vm, slot, here, arrived });
        let pages = pages(&initrd);
        bus.insert(pages.start, pages.end - pages.start, late.clone())
            .map_err(|e| MachineError::system("initrd")(std::io::Error::other(e)))?;
        Ok(late)
    }

    /// Reads the initrd and makes its pages RAM. Whoever waits goes on then, even when it failed: the machine must end in that
    /// case.
    ///
    /// # Errors
    /// When the file cannot be read to the length that it had, or KVM refuses the slot.
    pub(super) fn fill(&self) -> Result<(), MachineError> {
        let (file, name) = self.file.parts();
        let result = memory::fill(&self.memory, GuestAddress(self.initrd.base), file, 0, self.initrd.len)
            .map_err(|e| BootError::read(name)(e).into())
            .and_then(|()| Ok(kvm::add_memory(&self.vm, &self.memory, self.slot, &pages(&self.initrd))?));
        *self.here.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.arrived.notify_all();
        result
    }

    fn wait(&self) {
        let mut here = self.here.lock().unwrap_or_else(PoisonError::into_inner);
        while !*here {
            here = self.arrived.wait(here).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl BusDevice for LateRam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.wait();
        // The bus lets only accesses inside the pages through, and those are memory.
        if self.memory.read_slice(data, GuestAddress(self.initrd.base + offset)).is_err() {
            data.fill(0xff);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.wait();
        let _ = self.memory.write_slice(data, GuestAddress(self.initrd.base + offset));
    }
}

#[cfg(test)]
#[path = "late_test.rs"]
mod tests;
