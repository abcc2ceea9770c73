//! What the server asks of whoever has disks.

use crate::api::{Disk, Error, Resize};

/// Disks that are served, each with a name. Every call comes on a thread that may wait; several may come at once.
pub trait Disks: Send + Sync {
    /// All of them, in the order in which they were given.
    ///
    /// # Errors
    /// Why that cannot be told.
    fn list(&self) -> Result<Vec<Disk>, Error>;

    /// The disk called `id`.
    ///
    /// # Errors
    /// There is none.
    fn one(&self, id: &str) -> Result<Disk, Error>;

    /// Changes the size of the disk called `id`; says what it is then.
    ///
    /// # Errors
    /// There is none; it would become smaller, and was not to; the engine's.
    fn resize(&self, id: &str, resize: &Resize) -> Result<Disk, Error>;
}
