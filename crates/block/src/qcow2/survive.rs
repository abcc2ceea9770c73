//! What an acknowledged write needs so that it survives the death of the process (not a power cut, which is [`super::commit`]'s).
//!
//! The page cache survives, so what is in the file is safe, and so is the data: what is not is the mapping in memory. Either its changes
//! are noted in a [journal](crate::journal) before anybody can be told of them ([`super::publish`]), which a commit shortens, and whoever opens the
//! image next [replays](super::replay) it. Or, without one, requests that changed the mapping wait for a commit; and so do those that found
//! what others had changed, for they wrote to clusters that the file's mapping does not have yet.

use std::rc::Rc;

use super::Image;
use super::commit::Until;
use crate::error::Result;
use crate::journal::Ring;
use crate::mutation::Mutation;
use crate::queue::Queue;
use crate::sync::Ordering;

impl Image {
    /// From now on changes of the mapping are noted there.
    pub(crate) fn attach(&self, ring: Ring) {
        self.meta.lock().journal = Some(ring);
    }

    /// From now on they are not: nothing is acknowledged that is not in the file.
    pub(crate) fn detach(&self) {
        self.meta.lock().journal = None;
    }

    /// Whether the mapping in memory is another than the file's, as far as requests wait for that.
    pub(super) fn has_unsettled(&self) -> bool {
        self.options.synchronous && self.changed.load(Ordering::SeqCst) > self.saved.load(Ordering::SeqCst)
    }

    /// Waits until the mapping that a request has found, or made, is in the file, if it is to.
    pub(crate) async fn settle_changes(&self, queue: &Rc<Queue>) -> Result<()> {
        if Mutation::AnswerBeforeMapping.is_on() {
            return Ok(());
        }
        // One commit does for all who wait for it.
        if self.has_unsettled() { self.commit(queue, Until::Mapping).await } else { Ok(()) }
    }
}
