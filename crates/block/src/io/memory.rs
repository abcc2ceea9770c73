//! The seam in memory: files that live as long as the process, each operation carried out at once.
//!
//! It is the simulator's world without a seed.

use super::sim::World;

/// An empty storage in memory.
#[must_use]
pub fn memory() -> World {
    World::orderly()
}
