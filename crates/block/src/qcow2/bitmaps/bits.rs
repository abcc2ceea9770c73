//! The bits of one bitmap in memory: set by many threads at once, without a lock. Where none is set they take next to none.

use std::ops::Range;

use cowhand_qcow2::DirectoryEntry;

use crate::sync::{AtomicBool, AtomicU64, OnceLock, Ordering};

/// One bit for each 2^`granularity_bits` bytes of a disk of `size` bytes; bit n of the bitmap is bit n % 64 of word n / 64.
#[derive(Debug)]
pub(crate) struct Bits {
    granularity_bits: u8,
    size: u64,
    /// There as soon as one of their bits is set.
    pages: Box<[OnceLock<Box<Page>>]>,
    /// Whether they are not what the file has of them any more.
    changed: AtomicBool,
}

/// Bits of a word.
const WORD: u64 = 64;

/// Words of a page.
const PAGE: usize = 512;

type Page = [AtomicU64; PAGE];

impl Bits {
    /// None set.
    pub(super) fn new(granularity_bits: u8, size: u64) -> Self {
        let granules = size.div_ceil(1 << granularity_bits);
        let pages = (0..granules.div_ceil(WORD * PAGE as u64)).map(|_| OnceLock::new()).collect();
        Self { granularity_bits, size, pages, changed: AtomicBool::new(false) }
    }

    /// For the bitmap `entry` of a disk of `size` bytes.
    pub(super) fn of(entry: &DirectoryEntry, size: u64) -> Self {
        Self::new(entry.granularity_bits, size)
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// The most bytes of memory that they can take.
    pub(super) fn memory(&self) -> u64 {
        (self.pages.len() * size_of::<Page>()) as u64
    }

    /// Whether they are not what was loaded, or none, any more.
    pub(super) fn is_changed(&self) -> bool {
        self.changed.load(Ordering::Acquire)
    }

    /// A word of which bits are to be set; none past the end.
    fn word(&self, at: u64) -> Option<&AtomicU64> {
        let page = self.pages.get((at / PAGE as u64) as usize)?;
        let page = page.get_or_init(|| Box::new(std::array::from_fn(|_| AtomicU64::new(0))));
        page.get(at as usize % PAGE)
    }

    /// The words that are there, each with its number.
    fn words(&self) -> impl Iterator<Item = (u64, &AtomicU64)> {
        let pages = self.pages.iter().zip(0u64..).filter_map(|(page, index)| Some((page.get()?, index)));
        pages.flat_map(|(page, index)| page.iter().zip(index * PAGE as u64..).map(|(word, at)| (at, word)))
    }

    /// What a word holds.
    fn value(&self, at: u64) -> u64 {
        let page = self.pages.get((at / PAGE as u64) as usize).and_then(OnceLock::get);
        page.and_then(|page| page.get(at as usize % PAGE)).map_or(0, |word| word.load(Ordering::Acquire))
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
            if let Some(word) = self.word(at / WORD) {
                // A bit that is set already costs the other threads' caches nothing.
                if word.load(Ordering::Relaxed) & mask != mask {
                    word.fetch_or(mask, Ordering::Release);
                    if !self.is_changed() {
                        self.changed.store(true, Ordering::Release);
                    }
                }
            }
            at += count;
        }
    }

    pub(super) fn set_all(&self) {
        self.set(0..self.granules());
    }

    pub(super) fn clear(&self) {
        self.words().for_each(|(_, word)| word.store(0, Ordering::Release));
        self.changed.store(true, Ordering::Release);
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
        // The file has them for the other size.
        new.changed.store(true, Ordering::Release);
        new
    }

    /// What the set bits stand for: ranges of bytes in ascending order, none of which touches another, within the disk.
    pub(super) fn ranges(&self) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for (i, word) in self.words() {
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
                let start = (i * WORD + first) << self.granularity_bits;
                let end = ((i * WORD + bit) << self.granularity_bits).min(self.size);
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
        let words = self.granules().div_ceil(WORD);
        for (bytes, at) in bytes.chunks(8).zip(at / 8..words) {
            let mut value = bytes.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
            // What the file has behind the last granule means nothing.
            let used = self.granules() % WORD;
            if at + 1 == words && used > 0 {
                value &= u64::MAX >> (WORD - used);
            }
            if value != 0
                && let Some(word) = self.word(at)
            {
                word.fetch_or(value, Ordering::Release);
            }
        }
    }

    /// The part of `at..at + len` (`at` a multiple of 8) of the file's form that there is.
    pub(super) fn part(&self, at: u64, len: u64) -> Vec<u8> {
        let len = len.min(self.data_len().saturating_sub(at)) as usize;
        let words = (at / 8..).take(len.div_ceil(8));
        let mut bytes: Vec<u8> = words.flat_map(|at| self.value(at).to_le_bytes()).collect();
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
