//! Images that were not closed. (Sharp edge 12.)
//!
//! A program that postpones refcounts (QEMU with `lazy_refcounts=on`) sets the dirty bit first. As long as it is set, counts may be
//! too low, and whoever allocates by them gives out clusters that are in use. So an image that is opened for writing has its
//! references counted first, all of them, which takes a walk through its metadata; then the bit goes, durably. For a reader
//! nothing is done: the mapping is right.
//!
//! This engine never sets the bit. Its refcounts become durable at the same barriers as the data that they count, so that to postpone
//! them would save nothing; an image's wish for lazy refcounts is kept for the next one who has use for it. (Sharp edge 34.)

use std::rc::Rc;

use cowhand_qcow2::Incompatible;

use super::check::Checker;
use super::check::report::Message;
use super::open::Opening;
use crate::error::{ErrorKind, Result};
use crate::queue::Queue;

impl Opening {
    /// The image with refcounts that are right. Everything else that could refuse it has been asked.
    ///
    /// # Errors
    /// More than refcounts is damaged, or they cannot be put right: that is for a repair, which somebody asks for.
    pub(super) async fn cleaned(self, queue: &Rc<Queue>) -> Result<Self> {
        if !self.header.incompatible.contains(Incompatible::DIRTY) {
            return Ok(self);
        }
        let path = self.path.clone();
        tracing::info!("{}: the image was not closed; counting its references", path.display());
        let sink = {
            let path = path.clone();
            move |message| match message {
                Message::Repaired(what) => tracing::info!("{}: {what}", path.display()),
                Message::NotRepaired(what) => tracing::warn!("{}: {what}", path.display()),
                Message::Found(_)
                | Message::Left(_)
                | Message::Repairing(_)
                | Message::Discarding(_)
                | Message::Beyond(_)
                | Message::Rebuilding
                | Message::Progress { .. } => {}
            }
        };
        let mut checker = Checker::open(queue, self.file.clone(), &path, Box::new(sink)).await?;
        if !checker.recount().await? {
            let message = "the image was not closed, and more is damaged than its refcounts; repair it ('qemu-img check -r \
                           all') or open it with readonly=on";
            return Err(self.refuse(ErrorKind::Corrupt, message));
        }
        drop(checker);
        Self::header(queue, self.file, &path).await
    }
}
