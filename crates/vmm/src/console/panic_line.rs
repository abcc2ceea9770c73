//! Hears in the console's output that a Linux kernel panicked.
//!
//! Stock kernels load the pvpanic driver late or never, so the console is the only witness of an early panic. A program in
//! the guest that prints the same words is taken for the kernel: therefore it can be turned off.

/// What begins Linux' panic message (`panic()` in kernel/panic.c).
const START: &[u8] = b"Kernel panic - not syncing";
/// What begins its last line.
const END: &[u8] = b"---[ end Kernel panic";

/// What a byte of output meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Nothing.
    Nothing,
    /// The kernel panicked; it has more to say.
    Panic,
    /// The kernel has said everything.
    End,
}

/// Listens to console output.
#[derive(Debug)]
pub struct PanicListener {
    waiting_for: Part,
}

/// The part of the panic's message that comes next, and how much of it was seen.
#[derive(Debug)]
enum Part {
    Start(usize),
    LastLine(usize),
    EndOfLine,
    Nothing,
}

impl Default for PanicListener {
    fn default() -> Self {
        Self { waiting_for: Part::Start(0) }
    }
}

impl PanicListener {
    /// Listens to one byte.
    pub fn hear(&mut self, byte: u8) -> Heard {
        let (next, heard) = match &mut self.waiting_for {
            Part::Start(matched) => match advance(START, matched, byte) {
                true => (Part::LastLine(0), Heard::Panic),
                false => return Heard::Nothing,
            },
            Part::LastLine(matched) => match advance(END, matched, byte) {
                true => (Part::EndOfLine, Heard::Nothing),
                false => return Heard::Nothing,
            },
            // The line's end is waited for, so that it is not cut off on the console.
            Part::EndOfLine if byte == b'\n' => (Part::Nothing, Heard::End),
            Part::EndOfLine | Part::Nothing => return Heard::Nothing,
        };
        self.waiting_for = next;
        heard
    }
}

/// Goes on in matching `pattern` by `byte`; says whether all of it was seen.
fn advance(pattern: &[u8], matched: &mut usize, byte: u8) -> bool {
    if pattern.get(*matched) == Some(&byte) {
        *matched += 1;
    } else if byte == b'-' && pattern.starts_with(b"---") && *matched == 3 {
        // A fourth dash still ends in three.
    } else {
        // Apart from that, no proper prefix of the patterns is a suffix of another but their first byte.
        *matched = usize::from(pattern.first() == Some(&byte));
    }
    *matched == pattern.len()
}

#[cfg(test)]
#[path = "panic_line_test.rs"]
mod tests;
