//! The simulator's dice: SplitMix64, so that a seed means the same run on every machine and with every library version.

/// A small deterministic generator.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator that starts from `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A generator for the test `test`: from the seed in this environment variable, or a new one each time; printed either way.
    ///
    /// # Panics
    /// When the variable is not a number.
    #[cfg(any(test, feature = "testing"))]
    #[must_use]
    #[allow(clippy::expect_used, reason = "for tests alone, which end by it")]
    pub fn from_environment(variable: &str, test: &str) -> Self {
        let seed = match std::env::var(variable) {
            Ok(seed) => seed.parse().expect("the seed is a number"),
            // Each has keys of its own, from the system's entropy.
            Err(_) => std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), test),
        };
        eprintln!("{test}: {variable}={seed}");
        Self::new(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n` (which must not be 0).
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next_u64()) * u128::from(n)) >> 64) as u64
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}
