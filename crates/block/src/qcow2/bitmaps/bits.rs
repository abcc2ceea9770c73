//! The bits of one bitmap in memory: set by many threads at once, without a lock.

use std::ops::Range;

use cowhand_qcow2::DirectoryEntry;

use crate::sync::{AtomicU64, Ordering};

/// One bit for each 2^`granularity_bits` bytes of a disk of `size` bytes; bit n of the bitmap is bit n % 64 of word n / 64.
#[derive(Debug)]
pub(crate) struct Bits {
    granularity_bits: u8,
    size: u64,
    words: Box<[AtomicU64]>,
}

/// Bits of a word.
const WORD: u64 = 64;

impl Bits {
    /// None set.
    pub(super) fn new(granularity_bits: u8, size: u64) -> Self {
        let granules = size.div_ceil(1 << granularity_bits);
        let words = (0..granules.div_ceil(WORD)).map(|_| AtomicU64::new(0)).collect();
        Self { granularity_bits, size, words }
    }

    /// For the bitmap `entry` of a disk of `size` bytes.
    pub(super) fn of(entry: &DirectoryEntry, size: u64) -> Self {
        Self::new(entry.granularity_bits, size)
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of memory.
    pub(super) fn memory(&self) -> u64 {
        self.words.len() as u64 * 8
    }

    fn granules(&self) -> u64 {
        self.size.div_ceil(1 << self.granularity_bits)
    }

    /// Sets the bits of all granules that the `len` bytes at `offset` touch. What lies past the end has none.
    pub(super) fn mark(&self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.size);
        if offset < end {
            let last = (end - 1) >> self.granularity_bits;
            self.set(offset >> self.granularity_bits..last + 1);
        }
    }

    fn set(&self, granules: Range<u64>) {
        let mut at = granules.start;
        while at < granules.end {
            let first = at % WORD;
            let count = (WORD - first).min(granules.end - at);
            let mask = (u64::MAX >> (WORD - count)) << first;
            // Bounded: the granules are the disk's.
            if let Some(word) = self.words.get((at / WORD) as usize) {
                // A bit that is set already costs the other threads' caches nothing.
                if word.load(Ordering::Relaxed) & mask != mask {
                    word.fetch_or(mask, Ordering::Release);
                }
            }
            at += count;
        }
    }

    pub(super) fn set_all(&self) {
        self.set(0..self.granules());
    }

    pub(super) fn clear(&self) {
        self.words.iter().for_each(|word| word.store(0, Ordering::Release));
    }

    /// Sets every bit that stands for something that `other`, of any granularity, has a bit for.
    pub(super) fn merge(&self, other: &Self) {
        for range in other.ranges() {
            self.mark(range.start, range.end - range.start);
        }
    }

    /// The same bits for a disk of another size: what is added has none set.
    pub(super) fn resized(&self, size: u64) -> Self {
        let new = Self::new(self.granularity_bits, size);
        for range in self.ranges() {
            new.mark(range.start, range.end - range.start);
        }
        new
    }

    /// What the set bits stand for: ranges of bytes in ascending order, none of which touches another, within the disk.
    pub(super) fn ranges(&self) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for (i, word) in self.words.iter().enumerate() {
            let word = word.load(Ordering::Acquire);
            let mut bit = 0;
            while bit < WORD {
                let rest = word >> bit;
                if rest == 0 {
                    break;
                }
                let first = bit + u64::from(rest.trailing_zeros());
                let count = u64::from((!(word >> first)).trailing_zeros());
                bit = first + count;
                let start = (i as u64 * WORD + first) << self.granularity_bits;
                let end = ((i as u64 * WORD + bit) << self.granularity_bits).min(self.size);
                match ranges.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ => ranges.push(start..end),
                }
            }
        }
        ranges
    }

    /// Bytes in the file's form.
    pub(super) fn data_len(&self) -> u64 {
        self.granules().div_ceil(8)
    }

    /// Sets what is set in `bytes`, which are those at `at` (a multiple of 8) of the file's form.
    pub(super) fn load(&self, at: u64, bytes: &[u8]) {
        let words = self.words.iter().skip((at / 8) as usize);
        for (word, bytes) in words.zip(bytes.chunks(8)) {
            let value = bytes.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
            word.fetch_or(value, Ordering::Release);
        }
        // What the file has behind the last granule means nothing.
        let used = self.granules() % WORD;
        if let (1.., Some(last)) = (used, self.words.last()) {
            last.fetch_and(u64::MAX >> (WORD - used), Ordering::Release);
        }
    }

    /// The part of `at..at + len` (`at` a multiple of 8) of the file's form that there is.
    pub(super) fn part(&self, at: u64, len: u64) -> Vec<u8> {
        let len = len.min(self.data_len().saturating_sub(at)) as usize;
        let words = self.words.iter().skip((at / 8) as usize).take(len.div_ceil(8));
        let mut bytes: Vec<u8> = words.flat_map(|word| word.load(Ordering::Acquire).to_le_bytes()).collect();
        bytes.truncate(len);
        bytes
    }

    /// Whether `bytes`, at `at` in the file's form, are all ones as far as they mean something.
    pub(super) fn is_full(&self, at: u64, bytes: &[u8]) -> bool {
        let end = at + bytes.len() as u64;
        let odd = if end == self.data_len() { self.granules() % 8 } else { 0 };
        match bytes.split_last() {
            Some((last, rest)) if odd > 0 => *last == (1u8 << odd) - 1 && rest.iter().all(|&byte| byte == 0xff),
            _ => bytes.iter().all(|&byte| byte == 0xff),
        }
    }
}

#[cfg(test)]
#[path = "bits_test.rs"]
mod tests;
