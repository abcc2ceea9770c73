//! Which requests a load makes: pure choice, from a seed, without any I/O.

use std::fmt;

use clap::ValueEnum;

/// One request. All reads and writes of a load have the same length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Read a block at this offset, in bytes.
    Read(u64),
    /// Write a block at this offset, in bytes.
    Write(u64),
    /// Flush.
    Flush,
}

/// Where a load's requests go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Pattern {
    /// Anywhere, for as long as it is asked.
    Random,
    /// One block after the other, over and over.
    Sequential,
    /// One block into each unit (cluster), the units in random order; then it is over.
    Scatter,
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Random => "random",
            Self::Sequential => "sequential",
            Self::Scatter => "scatter",
        })
    }
}

/// What a load is.
#[derive(Clone, Debug, clap::Args)]
pub struct LoadArgs {
    /// Where requests go
    #[arg(long, value_enum, default_value_t = Pattern::Random)]
    pub pattern: Pattern,
    /// Write instead of reading
    #[arg(long)]
    pub write: bool,
    /// Bytes of each request
    #[arg(long, default_value_t = 4096)]
    pub block: u64,
    /// The unit (cluster) of which each is used once by --pattern scatter
    #[arg(long, default_value_t = 65536)]
    pub unit: u64,
    /// Flush after so many writes of a queue
    #[arg(long)]
    pub flush_every: Option<u64>,
    /// At most so many requests of each queue
    #[arg(long)]
    pub requests: Option<u64>,
    /// Only the first so many bytes of the disk
    #[arg(long)]
    pub span: Option<u64>,
    /// The seed of all random choices
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// Why a load cannot be.
#[derive(Debug, PartialEq, Eq)]
pub struct LoadError(String);

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for LoadError {}

/// A small, fast, seeded generator (splitmix64); not for secrets.
#[derive(Clone, Debug)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, which is not 0. The bias is below `bound / 2^64`.
    fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
}

#[derive(Debug)]
enum Places {
    Random { blocks: u64 },
    Sequential { next: u64, first: u64, end: u64 },
    Scatter { order: std::vec::IntoIter<u32>, blocks_in_unit: u64 },
    Touch { next: u64, end: u64, stride: u64 },
}

/// The requests of one queue.
#[derive(Debug)]
pub struct Load {
    places: Places,
    random: Random,
    write: bool,
    block: u64,
    unit: u64,
    flush_every: Option<u64>,
    writes_since_flush: u64,
    left: u64,
}

impl Load {
    /// The load of queue `queue` of `queues` on a disk of `size` bytes. Queues share a random load's space; the other patterns
    /// give each its own part.
    ///
    /// # Errors
    /// When the disk is too small, or block and unit make no sense.
    pub fn new(args: &LoadArgs, size: u64, queue: u64, queues: u64) -> Result<Self, LoadError> {
        let bad = |message: String| Err(LoadError(message));
        let fits = args.pattern != Pattern::Scatter || args.block > 0 && args.unit.is_multiple_of(args.block);
        if args.block == 0 || !args.block.is_multiple_of(512) || !fits {
            return bad(format!("blocks of {} in units of {} bytes cannot be", args.block, args.unit));
        }
        let mut random = Random(args.seed ^ (queue.wrapping_add(1)).wrapping_mul(0xd6e8_feb8_6659_fd93));
        let size = args.span.map_or(size, |span| size.min(span));
        let blocks = size / args.block;
        let units = size / args.unit.max(1);
        let part = if args.pattern == Pattern::Scatter { units } else { blocks };
        if part < queues.max(1) || units > u64::from(u32::MAX) {
            return bad(format!("a disk of {size} bytes does not fit this load"));
        }
        let places = match args.pattern {
            Pattern::Random => Places::Random { blocks },
            Pattern::Sequential => {
                let first = blocks / queues * queue;
                Places::Sequential { next: first, first, end: first + blocks / queues }
            }
            Pattern::Scatter => {
                let mut order: Vec<u32> = (0..units as u32).filter(|unit| u64::from(*unit) % queues == queue).collect();
                for last in (1..order.len()).rev() {
                    order.swap(last, random.below(last as u64 + 1) as usize);
                }
                Places::Scatter { order: order.into_iter(), blocks_in_unit: args.unit / args.block }
            }
        };
        Ok(Self {
            places,
            random,
            write: args.write,
            block: args.block,
            unit: args.unit,
            flush_every: args.flush_every,
            writes_since_flush: 0,
            left: args.requests.unwrap_or(u64::MAX),
        })
    }

    /// A load that reads one block at each multiple of `stride`, once: what is cached of a disk is cached then.
    #[must_use]
    pub fn touch(block: u64, size: u64, stride: u64) -> Self {
        Self {
            places: Places::Touch { next: 0, end: size.saturating_sub(block), stride: stride.max(1) },
            random: Random(0),
            write: false,
            block,
            unit: stride,
            flush_every: None,
            writes_since_flush: 0,
            left: u64::MAX,
        }
    }
}

impl Iterator for Load {
    type Item = Ask;

    fn next(&mut self) -> Option<Ask> {
        if self.flush_every.is_some_and(|every| self.writes_since_flush >= every) {
            self.writes_since_flush = 0;
            return Some(Ask::Flush);
        }
        self.left = self.left.checked_sub(1)?;
        let offset = match &mut self.places {
            Places::Random { blocks } => self.random.below(*blocks) * self.block,
            Places::Sequential { next, first, end } => {
                let here = *next;
                *next = if here + 1 == *end { *first } else { here + 1 };
                here * self.block
            }
            Places::Scatter { order, blocks_in_unit } => {
                let unit = u64::from(order.next()?);
                unit * self.unit + self.random.below(*blocks_in_unit) * self.block
            }
            Places::Touch { next, end, stride } => {
                if *next > *end {
                    return None;
                }
                let here = *next;
                *next = here + *stride;
                here
            }
        };
        if !self.write {
            return Some(Ask::Read(offset));
        }
        self.writes_since_flush += 1;
        Some(Ask::Write(offset))
    }
}

#[cfg(test)]
#[path = "load_test.rs"]
mod tests;
