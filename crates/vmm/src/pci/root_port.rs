//! A PCI Express root port: a bridge with one hot-plug slot, as Linux' pciehp drives it.
//!
//! The port starts as firmware would leave it: bus numbers assigned, windows open, the slot's power on. A device in the
//! slot is reached while it is present, powered, and the link is not disabled.
//!
//! Locks: the port's own, then what its device locks. A device never calls its port.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::address::Bdf;
use super::config::{COMMAND_MEMORY, ConfigSpace, Identity, reg};
use super::express::{self, reg as express_reg};
use super::function::{PciFunction, Upstream};
use super::msi::Msi;
use super::window::Window;
use crate::irq::MsiVector;

const IDENTITY: Identity = Identity { vendor: 0x1b36, device: 0x000c, revision: 0, class: 0x06_04_00 };
const BRIDGE_CONTROL_SECONDARY_RESET: u16 = 1 << 6;
/// Bridge control: parity, SERR#, VGA-free; secondary bus reset.
const BRIDGE_CONTROL_WRITABLE: u16 = 0x0003 | BRIDGE_CONTROL_SECONDARY_RESET;
const WINDOW_GRANULE: u64 = 1 << 20;

/// What a port is given when it is made.
#[derive(Clone, Copy, Debug)]
pub(super) struct PortLayout {
    /// Where the port itself is.
    pub bdf: Bdf,
    /// The number of the bus behind it, and of its slot.
    pub secondary: u8,
    /// The 32-bit window, a multiple of 1 MiB.
    pub memory: Window,
    /// The prefetchable window, a multiple of 1 MiB.
    pub prefetch: Window,
}

struct State {
    config: ConfigSpace,
    msi: Msi,
    device: Option<Arc<dyn PciFunction>>,
    /// The device leaves as soon as the guest turns its power off.
    leaving: bool,
    link_up: bool,
    /// An event is reported that the guest has not cleared.
    event: bool,
}

/// A root port and what is in its slot.
pub(super) struct RootPort {
    bdf: Bdf,
    express: usize,
    initial: ConfigSpace,
    state: Mutex<State>,
}

impl RootPort {
    /// A port with an empty slot, interrupting through `irq`; nothing when the capabilities do not fit.
    pub(super) fn new(layout: PortLayout, irq: Arc<dyn MsiVector>) -> Option<Self> {
        let mut config = ConfigSpace::bridge(IDENTITY);
        config.set_u8(reg::SECONDARY_BUS, layout.secondary);
        config.set_u8(reg::SUBORDINATE_BUS, layout.secondary);
        config.set_u16(reg::MEMORY_BASE, (layout.memory.base >> 16) as u16 & 0xfff0);
        config.set_u16(reg::MEMORY_LIMIT, ((layout.memory.base + layout.memory.len - 1) >> 16) as u16 & 0xfff0);
        let last = layout.prefetch.base + layout.prefetch.len - 1;
        config.set_u16(reg::PREFETCH_BASE, (layout.prefetch.base >> 16) as u16 & 0xfff0 | 1);
        config.set_u16(reg::PREFETCH_LIMIT, (last >> 16) as u16 & 0xfff0 | 1);
        config.set_u32(reg::PREFETCH_BASE_UPPER, (layout.prefetch.base >> 32) as u32);
        config.set_u32(reg::PREFETCH_LIMIT_UPPER, (last >> 32) as u32);
        config.allow_u16(reg::BRIDGE_CONTROL, BRIDGE_CONTROL_WRITABLE);
        let express = express::add_root_port(&mut config, layout.secondary.into())?;
        let msi = Msi::add(&mut config, irq)?;
        let initial = config.clone();
        let state = State { config, msi, device: None, leaving: false, link_up: false, event: false };
        Some(Self { bdf: layout.bdf, express, initial, state: Mutex::new(state) })
    }

    /// Where the port is.
    pub(super) fn bdf(&self) -> Bdf {
        self.bdf
    }

    /// Whether accesses to `bus` go through the port; if so, the device at `bdf`, if the link to it is up.
    pub(super) fn forward(&self, bdf: Bdf) -> Option<Option<Arc<dyn PciFunction>>> {
        let state = self.lock();
        let secondary = state.config.u8(reg::SECONDARY_BUS);
        let subordinate = state.config.u8(reg::SUBORDINATE_BUS);
        if secondary == 0 || !(secondary..=subordinate).contains(&bdf.bus()) {
            return None;
        }
        let reached = state.link_up && bdf == Bdf::new(secondary, 0, 0);
        Some(if reached { state.device.clone() } else { None })
    }

    /// The guest reads the port's own configuration space.
    pub(super) fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.lock().config.read(offset, data);
    }

    /// The guest writes the port's own configuration space.
    pub(super) fn config_write(&self, offset: u16, data: &[u8]) {
        let mut state = self.lock();
        let bridge_control = state.config.u16(reg::BRIDGE_CONTROL);
        let powered = self.powered(&state.config);
        state.config.write(offset, data);
        let pressed = !bridge_control & state.config.u16(reg::BRIDGE_CONTROL) & BRIDGE_CONTROL_SECONDARY_RESET != 0;
        if pressed && let Some(device) = &state.device {
            device.reset();
        }
        if powered && !self.powered(&state.config) {
            self.power_off(&mut state);
        }
        self.settle(&mut state);
    }

    /// Whether the slot holds a device.
    pub(super) fn occupied(&self) -> bool {
        self.lock().device.is_some()
    }

    /// Puts a device in before the guest runs: it is simply there. Gives the device back when the slot is taken.
    pub(super) fn plug_cold(&self, device: Arc<dyn PciFunction>) -> Result<(), Arc<dyn PciFunction>> {
        let mut state = self.lock();
        if state.device.is_some() {
            return Err(device);
        }
        state.device = Some(device);
        self.power_on_reset(&mut state);
        Ok(())
    }

    /// Puts a device in while the guest runs, and tells it. Gives the device back when the slot is taken.
    pub(super) fn plug(&self, device: Arc<dyn PciFunction>) -> Result<(), Arc<dyn PciFunction>> {
        let mut state = self.lock();
        if state.device.is_some() {
            return Err(device);
        }
        state.device = Some(device);
        state.leaving = false;
        self.presence_changed(&mut state);
        if !self.powered(&state.config) {
            // Linux turns the power of an empty slot off, and then wants to hear of presence only together with the
            // button: where a slot has one, it leaves the interrupt for presence alone switched off.
            self.raise(&mut state, express::SLOT_ATTENTION_BUTTON);
        }
        self.settle(&mut state);
        Ok(())
    }

    /// Presses the attention button: a guest that agrees turns the slot's power off (Linux after five seconds), and
    /// the device leaves then. Says whether there is a device.
    pub(super) fn request_unplug(&self) -> bool {
        let mut state = self.lock();
        if state.device.is_none() {
            return false;
        }
        state.leaving = true;
        if self.powered(&state.config) {
            self.raise(&mut state, express::SLOT_ATTENTION_BUTTON);
        } else {
            self.take_out(&mut state);
        }
        self.settle(&mut state);
        true
    }

    /// Takes the device out without asking the guest, after stopping and draining it. Says whether there was one.
    pub(super) fn unplug(&self) -> bool {
        let mut state = self.lock();
        let there = state.device.is_some();
        self.take_out(&mut state);
        self.settle(&mut state);
        there
    }

    /// Back to the state after power-on, with the device in the slot, and its windows and bus numbers as assigned.
    pub(super) fn reset(&self) {
        let mut state = self.lock();
        if let Some(device) = &state.device {
            device.reset();
        }
        if state.leaving {
            self.take_out(&mut state);
        }
        state.config = self.initial.clone();
        self.power_on_reset(&mut state);
    }

    /// Stops and drains the device for good.
    pub(super) fn shutdown(&self) {
        let mut state = self.lock();
        if let Some(device) = state.device.take() {
            device.shutdown();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn powered(&self, config: &ConfigSpace) -> bool {
        config.u16(self.express + express_reg::SLOT_CONTROL) & express::SLOT_POWER_OFF == 0
    }

    /// What is in the slot has been there since power-on: no event tells of it.
    fn power_on_reset(&self, state: &mut State) {
        self.presence_changed(state);
        self.settle(state);
        let status = self.express + express_reg::SLOT_STATUS;
        state.config.set_u16(status, state.config.u16(status) & !express::SLOT_EVENTS);
        state.event = false;
    }

    /// A device that is leaving leaves; another stays, and starts anew when the power comes back.
    fn power_off(&self, state: &mut State) {
        if state.leaving {
            self.take_out(state);
        } else if let Some(device) = &state.device {
            device.reset();
        }
    }

    fn take_out(&self, state: &mut State) {
        if let Some(device) = state.device.take() {
            device.set_upstream(None);
            device.shutdown();
            state.leaving = false;
            self.presence_changed(state);
        }
    }

    fn presence_changed(&self, state: &mut State) {
        let status = self.express + express_reg::SLOT_STATUS;
        let present = if state.device.is_some() { express::SLOT_PRESENT } else { 0 };
        state.config.set_u16(status, state.config.u16(status) & !express::SLOT_PRESENT | present);
        self.raise(state, express::SLOT_PRESENCE_CHANGED);
    }

    fn raise(&self, state: &mut State, event: u16) {
        let status = self.express + express_reg::SLOT_STATUS;
        state.config.set_u16(status, state.config.u16(status) | event);
    }

    /// Makes the link, what is forwarded, and the interrupt follow the registers.
    fn settle(&self, state: &mut State) {
        let disabled = state.config.u16(self.express + express_reg::LINK_CONTROL) & express::LINK_DISABLE != 0;
        let up = state.device.is_some() && self.powered(&state.config) && !disabled;
        let link = if up { express::LINK_SPEED_WIDTH | express::LINK_ACTIVE } else { 0 };
        state.config.set_u16(self.express + express_reg::LINK_STATUS, link);
        if up != state.link_up {
            state.link_up = up;
            self.raise(state, express::SLOT_LINK_CHANGED);
        }
        if let Some(device) = &state.device {
            device.set_upstream(up.then(|| upstream(&state.config)));
        }
        state.msi.update(&state.config, self.bdf);
        let event = self.event(&state.config);
        if event && !state.event {
            state.msi.signal();
        }
        state.event = event;
    }

    /// Whether an event stands that the guest wants an interrupt for.
    fn event(&self, config: &ConfigSpace) -> bool {
        let control = config.u16(self.express + express_reg::SLOT_CONTROL);
        let mut enabled = control & (express::SLOT_ATTENTION_BUTTON | express::SLOT_PRESENCE_CHANGED);
        if control & express::SLOT_LINK_CHANGED_ENABLE != 0 {
            enabled |= express::SLOT_LINK_CHANGED;
        }
        let status = config.u16(self.express + express_reg::SLOT_STATUS);
        control & express::SLOT_INTERRUPT_ENABLE != 0 && status & enabled != 0
    }
}

/// What the bridge's registers forward (PCI-to-PCI bridge 1.2 sect. 3.2.5).
fn upstream(config: &ConfigSpace) -> Upstream {
    let field = |offset| u64::from(config.u16(offset) & 0xfff0) << 16;
    let upper = |offset| u64::from(config.u32(offset)) << 32;
    let prefetch_base = field(reg::PREFETCH_BASE) | upper(reg::PREFETCH_BASE_UPPER);
    let prefetch_limit = field(reg::PREFETCH_LIMIT) | upper(reg::PREFETCH_LIMIT_UPPER);
    let decoding = config.u16(reg::COMMAND) & COMMAND_MEMORY != 0;
    let windows = if decoding {
        [window(field(reg::MEMORY_BASE), field(reg::MEMORY_LIMIT)), window(prefetch_base, prefetch_limit)]
    } else {
        [None, None]
    };
    Upstream { bdf: Bdf::new(config.u8(reg::SECONDARY_BUS), 0, 0), windows }
}

/// The window whose first and last granule begin at `base` and `limit`; closed when the limit is below the base.
fn window(base: u64, limit: u64) -> Option<Window> {
    let len = limit.checked_sub(base)?.checked_add(WINDOW_GRANULE)?;
    Some(Window { base, len })
}

#[cfg(test)]
#[path = "root_port_test.rs"]
mod tests;
