//! What survives the death of the process, and what a dead one has left, as the policy of opening says.

use super::OpenPolicy;
use crate::error::{Error, ErrorKind, Result};
use crate::journal::{Journal, Left, Survival};
use crate::spec::DiskSpec;

/// What a process that served the disk, and died, has left of it.
pub(super) fn left(spec: &DiskSpec, policy: &OpenPolicy) -> Result<Option<Left>> {
    let Survival::Journal(words) = &policy.survival else { return Ok(None) };
    let left = Journal::new(words, &spec.path)?.left(&spec.path)?;
    let what = match (spec.readonly, spec.ephemeral) {
        _ if left.is_none() => return Ok(None),
        (true, _) => "a process that wrote to the disk died; open it without readonly=on, so that nothing is lost",
        (_, true) => {
            "the process died, and with it the throw-away overlay (ephemeral=on) that the guest has written to"
        }
        _ => return Ok(left),
    };
    Err(Error::new(ErrorKind::Refused, what).at_path(&spec.path))
}

/// Whether requests wait until the mapping is in the file.
pub(super) fn is_synchronous(policy: &OpenPolicy) -> bool {
    matches!(policy.survival, Survival::Synchronous)
}
