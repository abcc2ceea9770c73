//! Memory for requests: filled with a pattern, from a file, or to be read into.

use std::fs::File;
use std::io::Read;
use std::ops::Range;

use cowhand_block::bytes::Memory;
use cowhand_block::io::Buffer;
use cowhand_block::size::parse_size;

use super::number::{REQUEST_MAX, no_size};
use super::session::{Failed, Outcome, Session};

/// By how much memory is misaligned with `-m`.
const MISALIGNED: usize = 16;

impl Session {
    fn first_byte(&self) -> usize {
        if self.misalign { MISALIGNED } else { 0 }
    }

    /// The part of a request's buffer that takes part.
    pub(crate) fn bytes<'a>(&self, buffer: &'a [u8]) -> &'a [u8] {
        buffer.get(self.first_byte()..).unwrap_or_default()
    }

    /// Memory for parts of these lengths, one behind the other, filled by `fill`. The caller has bounded them.
    pub(crate) fn memory(&self, lens: &[u64], fill: impl FnOnce(&mut [u8])) -> Memory {
        let first = self.first_byte();
        let len: u64 = lens.iter().sum();
        let mut buffer = Buffer::zeroed(first + len as usize);
        fill(buffer.get_mut(first..).unwrap_or_default());
        let mut end = first;
        let parts = lens.iter().map(|&len| {
            let start = end;
            end += len as usize;
            Range { start, end }
        });
        let parts = parts.collect();
        Memory::of_parts(buffer, parts).unwrap_or_else(|| Memory::new(Buffer::zeroed(0)))
    }

    /// Memory for `len` bytes that hold what is in the file at `path`, again and again.
    pub(crate) fn memory_from_file(&mut self, len: u64, path: &str) -> Outcome<Memory> {
        let mut content = Vec::new();
        let read = File::open(path).and_then(|file| file.take(len).read_to_end(&mut content));
        if let Err(error) = read {
            let text = error.to_string();
            let text = text.split(" (os error").next().unwrap_or_default();
            eprintln!("{path}: {text}");
            return Err(Failed);
        }
        if content.is_empty() {
            eprintln!("{path}: file is empty");
            return Err(Failed);
        }
        Ok(self.memory(&[len], |bytes| {
            bytes.chunks_mut(content.len()).for_each(|part| {
                part.copy_from_slice(&content[..part.len()]);
            })
        }))
    }

    /// The lengths of several parts of one request.
    pub(crate) fn lens(&mut self, words: &[&str]) -> Outcome<Vec<u64>> {
        let mut lens = Vec::with_capacity(words.len());
        for word in words {
            let len = self.size(word)?;
            if len > REQUEST_MAX {
                return self.fail(&format!("Argument '{word}' exceeds maximum size {REQUEST_MAX}"));
            }
            if lens.iter().sum::<u64>() > REQUEST_MAX - len {
                return self.fail(&format!("The total number of bytes exceed the maximum size {REQUEST_MAX}"));
            }
            lens.push(len);
        }
        Ok(lens)
    }

    /// A size in bytes.
    pub(crate) fn size(&mut self, word: &str) -> Outcome<u64> {
        match parse_size(word, 1) {
            Ok(size) => Ok(size),
            Err(error) => self.fail(&no_size(word, error)),
        }
    }

    /// A byte's value.
    pub(crate) fn pattern(&mut self, word: &str) -> Outcome<u8> {
        match super::number::pattern(word) {
            Some(pattern) => Ok(pattern),
            None => self.fail(&format!("{word} is not a valid pattern byte")),
        }
    }
}
