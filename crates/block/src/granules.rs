//! A bit for each granule of a disk, set and cleared by several threads at once.

use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};
use crate::sync::{AtomicU64, Ordering};

/// Bits that one bitmap may have: 128 MiB of memory.
const GRANULES_MAX: u64 = 1 << 30;

/// The bits, one for each `granularity` bytes of a disk; the last granule may reach past its end.
pub(crate) struct Granules {
    /// Of the disk, in bytes.
    size: u64,
    /// The granularity is 2^`shift` bytes.
    shift: u32,
    words: Box<[AtomicU64]>,
}

/// The bits of one word that lie in a range of granules.
fn mask(word: u64, granules: &Range<u64>) -> u64 {
    let first = granules.start.saturating_sub(word * 64).min(64);
    let end = granules.end.saturating_sub(word * 64).min(64);
    let below = |n: u64| if n >= 64 { u64::MAX } else { (1 << n) - 1 };
    below(end) & !below(first)
}

fn check_count(size: u64, shift: u32) -> Result<()> {
    if size.div_ceil(1 << shift) <= GRANULES_MAX {
        return Ok(());
    }
    let message = format!("in steps of {} bytes so large a disk cannot be followed; take larger ones", 1u64 << shift);
    Err(Error::new(ErrorKind::Invalid, message))
}

impl Granules {
    /// All clear, for a disk of `size` bytes.
    ///
    /// # Errors
    /// The granularity is not a power of two of at least 512, or so small that there would be more than [`GRANULES_MAX`] bits.
    pub(crate) fn new(size: u64, granularity: u64) -> Result<Self> {
        if !granularity.is_power_of_two() || granularity < 512 {
            let message = format!("a granularity is a power of two of at least 512 bytes, which {granularity} is not");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        let shift = granularity.trailing_zeros();
        check_count(size, shift)?;
        Ok(Self::with(size, shift))
    }

    fn with(size: u64, shift: u32) -> Self {
        let words = (0..size.div_ceil(1 << shift).div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { size, shift, words }
    }

    /// Refuses a size for which there would be more than [`GRANULES_MAX`] bits.
    pub(crate) fn check_size(&self, size: u64) -> Result<()> {
        check_count(size, self.shift)
    }

    /// The same bits for a disk that has another size, which was [checked](Self::check_size); those that are new are set.
    pub(crate) fn resized(&self, size: u64) -> Self {
        let new = Self::with(size, self.shift);
        for (new, old) in new.words.iter().zip(&self.words) {
            new.store(old.load(Ordering::SeqCst), Ordering::SeqCst);
        }
        if size > self.size {
            new.set(&(self.size..size));
        } else {
            // What lay past the new end is nobody's business any more, and must not come back.
            new.clear_granules(&(new.count()..new.words.len() as u64 * 64));
        }
        new
    }

    /// Of the disk, in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// How many there are.
    pub(crate) fn count(&self) -> u64 {
        self.size.div_ceil(1 << self.shift)
    }

    /// The granules that a range of bytes touches, as far as it lies on the disk.
    pub(crate) fn of(&self, bytes: &Range<u64>) -> Range<u64> {
        let end = bytes.end.min(self.size);
        if bytes.start >= end {
            return 0..0;
        }
        bytes.start >> self.shift..((end - 1) >> self.shift) + 1
    }

    /// The bytes of granules, as far as they lie on the disk.
    pub(crate) fn bytes(&self, granules: &Range<u64>) -> Range<u64> {
        (granules.start << self.shift).min(self.size)..(granules.end << self.shift).min(self.size)
    }

    fn each_word(&self, granules: &Range<u64>, mut visit: impl FnMut(&AtomicU64, u64)) {
        if granules.is_empty() {
            return;
        }
        for index in granules.start / 64..=(granules.end - 1) / 64 {
            if let Some(word) = self.words.get(index as usize) {
                visit(word, mask(index, granules));
            }
        }
    }

    /// Sets the bits of all that a range of bytes touches.
    pub(crate) fn set(&self, bytes: &Range<u64>) {
        self.set_granules(&self.of(bytes));
    }

    pub(crate) fn set_granules(&self, granules: &Range<u64>) {
        self.each_word(granules, |word, mask| {
            // Mostly they are set already, and a look leaves the cache line with whoever else looks.
            if word.load(Ordering::SeqCst) & mask != mask {
                word.fetch_or(mask, Ordering::SeqCst);
            }
        });
    }

    pub(crate) fn clear_granules(&self, granules: &Range<u64>) {
        self.each_word(granules, |word, mask| {
            word.fetch_and(!mask, Ordering::SeqCst);
        });
    }

    /// Whether all of the granules have their bits set.
    pub(crate) fn has_all(&self, granules: &Range<u64>) -> bool {
        let mut all = true;
        self.each_word(granules, |word, mask| all &= word.load(Ordering::SeqCst) & mask == mask);
        all
    }

    /// How many bits are set.
    pub(crate) fn set_count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.load(Ordering::SeqCst).count_ones())).sum()
    }

    /// The first run of at most `max` granules in `within` whose bits all are `set`, or all are not.
    pub(crate) fn run(&self, within: &Range<u64>, set: bool, max: u64) -> Option<Range<u64>> {
        let end = within.end.min(self.count());
        let bit = |at: u64| {
            let word = self.words.get((at / 64) as usize).map_or(0, |word| word.load(Ordering::SeqCst));
            if set { word >> (at % 64) } else { !word >> (at % 64) }
        };
        let mut at = within.start;
        while at < end {
            match bit(at) {
                // None in the rest of the word.
                0 => at = (at / 64 + 1) * 64,
                bits => {
                    let first = at + u64::from(bits.trailing_zeros());
                    let mut last = first;
                    while last < end && last - first < max && bit(last) & 1 == 1 {
                        last += 1;
                    }
                    return (first < last).then_some(first..last);
                }
            }
        }
        None
    }
}

#[cfg(test)]
#[path = "granules_test.rs"]
mod tests;
