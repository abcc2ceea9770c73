//! The PCI Express capability (PCIe 4.0 sect. 7.5.3): its registers, and those of a slot with hot plug.
//!
//! Only registers; what happens when the guest turns a slot's power off is the root port's concern.

use super::config::ConfigSpace;

const CAPABILITY_ID: u8 = 0x10;
/// Bytes of a version 2 capability.
const LEN: usize = 0x3c;

/// Offsets from the capability's start.
pub(super) mod reg {
    pub const FLAGS: usize = 0x02;
    pub const DEVICE_CAPABILITIES: usize = 0x04;
    pub const DEVICE_CONTROL: usize = 0x08;
    pub const DEVICE_STATUS: usize = 0x0a;
    pub const LINK_CAPABILITIES: usize = 0x0c;
    pub const LINK_CONTROL: usize = 0x10;
    pub const LINK_STATUS: usize = 0x12;
    pub const SLOT_CAPABILITIES: usize = 0x14;
    pub const SLOT_CONTROL: usize = 0x18;
    pub const SLOT_STATUS: usize = 0x1a;
    pub const ROOT_CONTROL: usize = 0x1c;
    pub const LINK_CAPABILITIES_2: usize = 0x2c;
}

/// Link control: the link is disabled.
pub(super) const LINK_DISABLE: u16 = 1 << 4;
/// Link status: the data link layer is active.
pub(super) const LINK_ACTIVE: u16 = 1 << 13;
/// 2.5 GT/s, one lane: in link capabilities and in link status alike.
pub(super) const LINK_SPEED_WIDTH: u16 = 1 | (1 << 4);
const LINK_CAPABILITY_ACTIVE_REPORTING: u32 = 1 << 20;

/// Slot status and, as enables, slot control: the attention button was pressed.
pub(super) const SLOT_ATTENTION_BUTTON: u16 = 1;
/// Slot status and, as an enable, slot control: presence has changed.
pub(super) const SLOT_PRESENCE_CHANGED: u16 = 1 << 3;
/// Slot status: a device is present.
pub(super) const SLOT_PRESENT: u16 = 1 << 6;
/// Slot status: the link went up or down.
pub(super) const SLOT_LINK_CHANGED: u16 = 1 << 8;
/// Slot control: events interrupt.
pub(super) const SLOT_INTERRUPT_ENABLE: u16 = 1 << 5;
/// Slot control: the power is off.
pub(super) const SLOT_POWER_OFF: u16 = 1 << 10;
/// Slot control: a change of the link is an event.
pub(super) const SLOT_LINK_CHANGED_ENABLE: u16 = 1 << 12;
const SLOT_CONTROL_WRITABLE: u16 = 0x17ff;
/// Attention button, power controller, both indicators, surprise removal, hot plug, no command-completed events.
const SLOT_CAPABILITIES: u32 = 1 | (1 << 1) | (1 << 3) | (1 << 4) | (1 << 5) | (1 << 6) | (1 << 18);
/// The events that the slot can have.
pub(super) const SLOT_EVENTS: u16 = SLOT_ATTENTION_BUTTON | SLOT_PRESENCE_CHANGED | SLOT_LINK_CHANGED;

const VERSION: u16 = 2;
const TYPE_ENDPOINT: u16 = 0;
const TYPE_ROOT_PORT: u16 = 4;
const FLAGS_SLOT: u16 = 1 << 8;
/// Role-based error reporting; payloads of 128 bytes.
const DEVICE_CAPABILITIES: u32 = 1 << 15;
const DEVICE_CONTROL_WRITABLE: u16 = 0x7fff;
const DEVICE_STATUS_ERRORS: u16 = 0x000f;
/// Active-state power management, read completion boundary, common clock.
const LINK_CONTROL_WRITABLE: u16 = 0x00c3;

/// Adds the capability of an endpoint; nothing when it does not fit.
pub(super) fn add_endpoint(config: &mut ConfigSpace) -> Option<usize> {
    let at = config.add_capability(CAPABILITY_ID, &[0; LEN - 2])?;
    add_link(config, at, TYPE_ENDPOINT, 0);
    config.set_u16(at + reg::LINK_STATUS, LINK_SPEED_WIDTH);
    Some(at)
}

/// Adds the capability of a root port with slot `slot` (1 to 8191), which is empty; nothing when it does not fit.
pub(super) fn add_root_port(config: &mut ConfigSpace, slot: u16) -> Option<usize> {
    let at = config.add_capability(CAPABILITY_ID, &[0; LEN - 2])?;
    add_link(config, at, TYPE_ROOT_PORT | (FLAGS_SLOT >> 4), slot);
    config.set_u32(
        at + reg::LINK_CAPABILITIES,
        config.u32(at + reg::LINK_CAPABILITIES) | LINK_CAPABILITY_ACTIVE_REPORTING,
    );
    config.allow_u16(at + reg::LINK_CONTROL, LINK_CONTROL_WRITABLE | LINK_DISABLE);
    config.set_u32(at + reg::SLOT_CAPABILITIES, SLOT_CAPABILITIES | (u32::from(slot & 0x1fff) << 19));
    config.allow_u16(at + reg::SLOT_CONTROL, SLOT_CONTROL_WRITABLE);
    config.allow_clear_u16(at + reg::SLOT_STATUS, SLOT_EVENTS);
    config.allow_u16(at + reg::ROOT_CONTROL, 0x001f);
    Some(at)
}

/// `kind` goes into flags 7:4 (and the slot bit above them).
fn add_link(config: &mut ConfigSpace, at: usize, kind: u16, port: u16) {
    let link = u32::from(LINK_SPEED_WIDTH) | (u32::from(port & 0xff) << 24);
    config.set_u16(at + reg::FLAGS, VERSION | (kind << 4));
    config.set_u32(at + reg::DEVICE_CAPABILITIES, DEVICE_CAPABILITIES);
    config.allow_u16(at + reg::DEVICE_CONTROL, DEVICE_CONTROL_WRITABLE);
    config.allow_clear_u16(at + reg::DEVICE_STATUS, DEVICE_STATUS_ERRORS);
    config.set_u32(at + reg::LINK_CAPABILITIES, link);
    config.allow_u16(at + reg::LINK_CONTROL, LINK_CONTROL_WRITABLE);
    // Supported speeds: 2.5 GT/s.
    config.set_u32(at + reg::LINK_CAPABILITIES_2, 1 << 1);
}
