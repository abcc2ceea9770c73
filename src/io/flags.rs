//! The options of the commands that make requests: each letter means the same in all that take it.

use super::command::Command;
use super::language::Options;
use super::session::{Outcome, Session};

/// What reads are verified against and writes are filled with if nothing else is said.
const WRITTEN: u8 = 0xcd;

/// How a request is made, and reported.
#[derive(Clone, Debug, Default)]
pub(crate) struct Flags<'a> {
    /// `-b`
    pub(crate) vm_state: bool,
    /// `-c`
    pub(crate) compressed: bool,
    /// `-C`
    pub(crate) for_programs: bool,
    /// `-f`
    pub(crate) durable: bool,
    /// `-i`
    pub(crate) invalid: bool,
    /// `-l`
    pub(crate) len: Option<&'a str>,
    /// `-n`
    pub(crate) fast_only: bool,
    /// `-P`
    pub(crate) pattern: Option<u8>,
    /// `-q`
    pub(crate) quiet: bool,
    /// `-s`: where a read is verified from, or the file that is written.
    pub(crate) source: Option<&'a str>,
    /// `-u`
    pub(crate) unmap: bool,
    /// `-v`
    pub(crate) show: bool,
    /// `-z`
    pub(crate) zeroes: bool,
}

impl<'a> Flags<'a> {
    /// Takes a command's words apart: the options, of which it knows the letters `known`, and the operands.
    pub(crate) fn take(
        session: &mut Session,
        command: &Command,
        words: &'a [String],
        known: &'a str,
    ) -> Outcome<(Self, Vec<&'a str>)> {
        let mut options = Options::new(words, known);
        let mut flags = Self::default();
        loop {
            match options.next() {
                Ok(None) => return Ok((flags, options.operands())),
                Ok(Some(('b', _))) => flags.vm_state = true,
                Ok(Some(('c', _))) => flags.compressed = true,
                Ok(Some(('C', _))) => flags.for_programs = true,
                Ok(Some(('f', _))) => flags.durable = true,
                Ok(Some(('i', _))) => flags.invalid = true,
                Ok(Some(('l', word))) => flags.len = Some(word),
                Ok(Some(('n', _))) => flags.fast_only = true,
                Ok(Some(('P', word))) => flags.pattern = Some(session.pattern(word)?),
                Ok(Some(('q', _))) => flags.quiet = true,
                Ok(Some(('s', word))) => flags.source = Some(word),
                Ok(Some(('u', _))) => flags.unmap = true,
                Ok(Some(('v', _))) => flags.show = true,
                Ok(Some(('z', _))) => flags.zeroes = true,
                // -p means nothing, and -r nothing here.
                Ok(Some(_)) => {}
                Err(message) => return session.wrong_option(command, &message),
            }
        }
    }

    /// Why those of a write do not go together.
    pub(crate) fn conflict(&self) -> Option<&'static str> {
        let sources =
            usize::from(self.zeroes) + usize::from(self.pattern.is_some()) + usize::from(self.source.is_some());
        if self.vm_state && self.zeroes {
            Some("-b and -z cannot be specified at the same time")
        } else if self.durable && (self.vm_state || self.compressed) {
            Some("-f and -b or -c cannot be specified at the same time")
        } else if self.fast_only && !self.zeroes {
            Some("-n requires -z to be specified")
        } else if self.unmap && !self.zeroes {
            Some("-u requires -z to be specified")
        } else if sources > 1 {
            Some("Only one of -z, -P, and -s can be specified at the same time")
        } else {
            None
        }
    }

    /// What a write is filled with.
    pub(crate) fn fill(&self) -> u8 {
        self.pattern.unwrap_or(WRITTEN)
    }
}

impl Session {
    /// The operands `off len [len..]`.
    pub(crate) fn vector<'a>(&mut self, command: &Command, operands: &[&'a str]) -> Outcome<(u64, Vec<&'a str>)> {
        match operands {
            [offset, lens @ ..] if !lens.is_empty() => Ok((self.size(offset)?, lens.to_vec())),
            _ => self.misused(command),
        }
    }
}
