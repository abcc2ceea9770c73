//! Ranges of guest-physical addresses that belong to PCI, and who gets which part of them.

/// A range of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// First address.
    pub base: u64,
    /// Bytes.
    pub len: u64,
}

impl Window {
    /// Whether `base..base + len` is not empty and lies inside.
    #[must_use]
    pub fn contains(&self, base: u64, len: u64) -> bool {
        len > 0
            && base.checked_sub(self.base).and_then(|offset| offset.checked_add(len)).is_some_and(|end| end <= self.len)
    }
}

/// Hands out parts of a window, lowest first; nothing is given back, because ports live as long as their host.
#[derive(Debug)]
pub(super) struct WindowAllocator {
    window: Window,
    used: u64,
}

impl WindowAllocator {
    /// All of `window` is free.
    pub(super) fn new(window: Window) -> Self {
        Self { window, used: 0 }
    }

    /// `len` bytes on a multiple of `align` (a power of two); nothing when there is no room left.
    pub(super) fn allocate(&mut self, len: u64, align: u64) -> Option<Window> {
        let base = self.window.base.checked_add(self.used)?.checked_next_multiple_of(align)?;
        if !self.window.contains(base, len) {
            return None;
        }
        self.used = base + len - self.window.base;
        Some(Window { base, len })
    }
}

#[cfg(test)]
#[path = "window_test.rs"]
mod tests;
