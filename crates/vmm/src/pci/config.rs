//! The registers of one function's configuration space: bytes, which bits the guest may write, and which it clears by
//! writing ones. What a write means beyond that (a BAR that moves, a power controller) is the function's own concern.
//!
//! Only the first 256 bytes exist; the extended space reads as zeros, which means "no extended capabilities".

/// Bytes of configuration space that hold registers.
pub(super) const CONFIG_LEN: usize = 256;

/// Offsets of the standard header (PCI 3.0 sect. 6.1, PCI-to-PCI bridge 1.2 sect. 3.2).
pub(super) mod reg {
    pub const VENDOR_ID: usize = 0x00;
    pub const DEVICE_ID: usize = 0x02;
    pub const COMMAND: usize = 0x04;
    pub const STATUS: usize = 0x06;
    pub const REVISION: usize = 0x08;
    pub const CLASS: usize = 0x09;
    pub const CACHE_LINE: usize = 0x0c;
    pub const HEADER_TYPE: usize = 0x0e;
    pub const BAR0: usize = 0x10;
    pub const SUBSYSTEM_VENDOR: usize = 0x2c;
    pub const SUBSYSTEM_ID: usize = 0x2e;
    pub const CAPABILITIES: usize = 0x34;
    pub const INTERRUPT_LINE: usize = 0x3c;

    pub const PRIMARY_BUS: usize = 0x18;
    pub const SECONDARY_BUS: usize = 0x19;
    pub const SUBORDINATE_BUS: usize = 0x1a;
    pub const MEMORY_BASE: usize = 0x20;
    pub const MEMORY_LIMIT: usize = 0x22;
    pub const PREFETCH_BASE: usize = 0x24;
    pub const PREFETCH_LIMIT: usize = 0x26;
    pub const PREFETCH_BASE_UPPER: usize = 0x28;
    pub const PREFETCH_LIMIT_UPPER: usize = 0x2c;
    pub const BRIDGE_CONTROL: usize = 0x3e;
}

/// Command register: answer in memory space.
pub(super) const COMMAND_MEMORY: u16 = 1 << 1;
/// Command register: may send requests (DMA and message interrupts).
pub(super) const COMMAND_MASTER: u16 = 1 << 2;
/// The bits of the command register that a PCI Express function keeps: I/O, memory, master, parity, SERR#, INTx disable.
const COMMAND_WRITABLE: u16 = 0x0547;
/// Status register: there is a capability list.
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// What a function is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Identity {
    pub vendor: u16,
    pub device: u16,
    pub revision: u8,
    /// Base class 23:16, sub-class 15:8, interface 7:0.
    pub class: u32,
}

/// One function's registers.
#[derive(Clone, Debug)]
pub(super) struct ConfigSpace {
    bytes: [u8; CONFIG_LEN],
    writable: [u8; CONFIG_LEN],
    clearable: [u8; CONFIG_LEN],
    /// Where the link to the next capability goes.
    link: usize,
    /// Where the next capability goes.
    free: usize,
}

impl ConfigSpace {
    fn new(identity: Identity, header_type: u8) -> Self {
        let mut config = Self {
            bytes: [0; CONFIG_LEN],
            writable: [0; CONFIG_LEN],
            clearable: [0; CONFIG_LEN],
            link: reg::CAPABILITIES,
            free: 0x40,
        };
        config.set_u16(reg::VENDOR_ID, identity.vendor);
        config.set_u16(reg::DEVICE_ID, identity.device);
        config.set_u8(reg::REVISION, identity.revision);
        config.set(reg::CLASS, &identity.class.to_le_bytes()[..3]);
        config.set_u8(reg::HEADER_TYPE, header_type);
        config.allow_u16(reg::COMMAND, COMMAND_WRITABLE);
        // Bits that only hold what is written there; firmware-like code of guests expects them to.
        config.allow(reg::CACHE_LINE, &[0xff]);
        config.allow(reg::INTERRUPT_LINE, &[0xff]);
        config
    }

    /// An endpoint's registers, with its subsystem's vendor and identity.
    pub(super) fn endpoint(identity: Identity, subsystem_vendor: u16, subsystem: u16) -> Self {
        let mut config = Self::new(identity, 0);
        config.set_u16(reg::SUBSYSTEM_VENDOR, subsystem_vendor);
        config.set_u16(reg::SUBSYSTEM_ID, subsystem);
        config
    }

    /// A PCI-to-PCI bridge's registers, as one function of several. It has no I/O window; the prefetchable one is 64 bits wide.
    pub(super) fn bridge(identity: Identity) -> Self {
        let mut config = Self::new(identity, 0x81);
        config.allow(reg::PRIMARY_BUS, &[0xff; 3]);
        config.allow_u16(reg::MEMORY_BASE, 0xfff0);
        config.allow_u16(reg::MEMORY_LIMIT, 0xfff0);
        config.set_u16(reg::PREFETCH_BASE, 1);
        config.set_u16(reg::PREFETCH_LIMIT, 1);
        config.allow_u16(reg::PREFETCH_BASE, 0xfff0);
        config.allow_u16(reg::PREFETCH_LIMIT, 0xfff0);
        config.allow(reg::PREFETCH_BASE_UPPER, &[0xff; 8]);
        config
    }

    /// Appends a capability: `body` follows its identity and link. Gives its offset; nothing when it does not fit.
    pub(super) fn add_capability(&mut self, id: u8, body: &[u8]) -> Option<usize> {
        let offset = self.free;
        let end = offset + 2 + body.len();
        if end > CONFIG_LEN {
            return None;
        }
        self.set_u8(offset, id);
        self.set(offset + 2, body);
        self.set_u8(self.link, offset as u8);
        self.set_u16(reg::STATUS, self.u16(reg::STATUS) | STATUS_CAPABILITIES);
        self.link = offset + 1;
        self.free = end.next_multiple_of(4);
        Some(offset)
    }

    /// Reads what the guest sees at `offset`.
    pub(super) fn read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(usize::from(offset) + i).copied().unwrap_or(0);
        }
    }

    /// The guest writes `data` at `offset`: writable bits take its value, clearable bits are cleared by ones.
    pub(super) fn write(&mut self, offset: u16, data: &[u8]) {
        for (i, value) in data.iter().enumerate() {
            let at = usize::from(offset) + i;
            if at >= CONFIG_LEN {
                return;
            }
            let kept = self.bytes[at] & !self.writable[at] & !(self.clearable[at] & value);
            self.bytes[at] = kept | (value & self.writable[at]);
        }
    }

    /// Sets bytes, whatever the guest may write.
    pub(super) fn set(&mut self, offset: usize, data: &[u8]) {
        self.bytes[offset..offset + data.len()].copy_from_slice(data);
    }

    /// Lets the guest write the bits that are set in `mask`.
    pub(super) fn allow(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }

    /// Lets the guest write bits of a 16-bit register.
    pub(super) fn allow_u16(&mut self, offset: usize, mask: u16) {
        self.allow(offset, &mask.to_le_bytes());
    }

    /// Lets the guest write bits of a 32-bit register.
    pub(super) fn allow_u32(&mut self, offset: usize, mask: u32) {
        self.allow(offset, &mask.to_le_bytes());
    }

    /// Lets the guest clear bits of a 16-bit register by writing ones.
    pub(super) fn allow_clear_u16(&mut self, offset: usize, mask: u16) {
        self.clearable[offset..offset + 2].copy_from_slice(&mask.to_le_bytes());
    }

    /// An 8-bit register.
    pub(super) fn u8(&self, offset: usize) -> u8 {
        self.bytes[offset]
    }

    /// A 16-bit register.
    pub(super) fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    /// A 32-bit register.
    pub(super) fn u32(&self, offset: usize) -> u32 {
        u32::from(self.u16(offset)) | (u32::from(self.u16(offset + 2)) << 16)
    }

    /// Sets an 8-bit register.
    pub(super) fn set_u8(&mut self, offset: usize, value: u8) {
        self.bytes[offset] = value;
    }

    /// Sets a 16-bit register.
    pub(super) fn set_u16(&mut self, offset: usize, value: u16) {
        self.set(offset, &value.to_le_bytes());
    }

    /// Sets a 32-bit register.
    pub(super) fn set_u32(&mut self, offset: usize, value: u32) {
        self.set(offset, &value.to_le_bytes());
    }
}

#[cfg(test)]
#[path = "config_test.rs"]
mod tests;
