//! What is typed at the guest's console: everything is the guest's, but for the escape key Ctrl-A.

/// The escape key, Ctrl-A.
const ESCAPE: u8 = 0x01;

/// Separates the escape sequences from what the guest gets.
#[derive(Debug, Default)]
pub struct EscapeFilter {
    escaped: bool,
}

/// What typed bytes come to.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Typed {
    /// For the guest.
    pub bytes: Vec<u8>,
    /// Ctrl-A x was typed: end the machine. What was typed after it is dropped.
    pub quit: bool,
}

impl EscapeFilter {
    /// Takes typed bytes. Ctrl-A Ctrl-A is one Ctrl-A for the guest; Ctrl-A before any other key but x goes to it as it is.
    /// Gives the guest at most one byte more than was typed.
    pub fn filter(&mut self, typed: &[u8]) -> Typed {
        let mut out = Typed::default();
        for &byte in typed {
            match (std::mem::take(&mut self.escaped), byte) {
                (false, ESCAPE) => self.escaped = true,
                (true, b'x' | b'X') => {
                    out.quit = true;
                    return out;
                }
                (true, ESCAPE) => out.bytes.push(ESCAPE),
                (true, byte) => out.bytes.extend([ESCAPE, byte]),
                (false, byte) => out.bytes.push(byte),
            }
        }
        out
    }
}

#[cfg(test)]
#[path = "input_test.rs"]
mod tests;
