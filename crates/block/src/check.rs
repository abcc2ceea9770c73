//! Checking and repairing an image: what `cowhand img check` does.
//!
//! The image is opened by itself: no backing file and no external data file is touched. It may be one that a disk refuses: dirty,
//! marked corrupt, with refcounts that are gone.
//!
//! A repair guesses nothing. What cannot be understood stays as it is and is reported, and as long as something is left that could
//! refer to a cluster nothing is freed. A power cut in its midst leaves the image no worse than it was.

use crate::chain::{OpenPolicy, open_file};
use crate::disk::{block_on, blocking_driver};
use crate::error::Result;
use crate::protocol::How;
use crate::qcow2::check::Checker;
pub use crate::qcow2::check::report::{CheckOptions, CheckReport, Finding, FindingKind, Message, Repair};
use crate::queue::Queue;
use crate::spec::{Cache, DiskSpec};

/// Checks the qcow2 image that `disk` describes, repairs what `options` ask for, and tells `sink` on the way what is found and done.
///
/// # Errors
/// The file cannot be opened or locked, is no qcow2 image, has a header that nothing can be made of, or could not be read or
/// written. Damage is no error: the report says it.
pub fn check(
    disk: &DiskSpec,
    options: &CheckOptions,
    policy: &OpenPolicy,
    sink: impl FnMut(Message) + 'static,
) -> Result<CheckReport> {
    let queue = Queue::new(blocking_driver(&policy.storage)?);
    let spec = DiskSpec { lock: options.lock, cache: Cache::default(), ..disk.clone() };
    let repair = options.repair;
    let task = {
        let (queue, policy) = (queue.clone(), policy.clone());
        async move {
            let how = How { write: repair != Repair::None, spec: &spec, policy: &policy };
            let file = open_file(&queue, how).await?;
            let checked = match Checker::open(&queue, file.clone(), &spec.path, Box::new(sink)).await {
                Ok(mut checker) => checker.run(repair).await,
                Err(error) => Err(error),
            };
            let closed = file.layer().map_or(Ok(()), |layer| layer.close());
            file.unlock();
            checked.and_then(|report| closed.map(|()| report))
        }
    };
    block_on(&queue, task)
}
