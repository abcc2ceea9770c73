//! Taking an image's lock, and what is said when another has it.

use std::path::Path;
use std::time::Duration;

use crate::chain::OpenPolicy;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{File, LockError, LockMasks};
use crate::spec::DiskSpec;

/// How often a lock that another holds is asked for.
const INTERVAL: Duration = Duration::from_millis(5);

/// Locks a file for who writes it, or only reads; waits for it as long as `policy` says.
pub(crate) fn lock(file: &File, path: &Path, write: bool, spec: &DiskSpec, policy: &OpenPolicy) -> Result<()> {
    if !spec.lock {
        return Ok(());
    }
    let masks = if write { LockMasks::WRITE } else { LockMasks::READ };
    let began = policy.storage.now();
    loop {
        let error = match file.lock(masks) {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        let waited = policy.storage.now().saturating_sub(began);
        if !matches!(error, LockError::Held(_)) || waited >= policy.lock_patience {
            return Err(lock_error(path, write, error));
        }
        policy.storage.sleep(INTERVAL.min(policy.lock_patience.saturating_sub(waited)));
    }
}

fn lock_error(path: &Path, write: bool, error: LockError) -> Error {
    match error {
        LockError::Held(permission) => {
            let way_out = if write { "; readonly=on or ephemeral=on go on if it only reads too" } else { "" };
            let message = format!("Failed to get {permission} lock: another process uses the image{way_out}");
            // One line of QEMU's two.
            let brief =
                format!("Failed to get {permission} lock. Is another process using the image [{}]?", path.display());
            Error::new(ErrorKind::Locked, message).at_path(path).briefly(Some(brief))
        }
        LockError::Io(e) => Error::io("cannot lock (lock=off does without)", e).at_path(path),
    }
}

#[cfg(test)]
#[path = "locks_test.rs"]
mod tests;
