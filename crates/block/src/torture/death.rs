//! The process dies under a guest that lives on: what it was told has to be there, flushed or not.
//!
//! The words of the journal stay as they are when the process dies, and are gone with the power. The next one replays them, and may die, or
//! lose its power, in the midst of that.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::AtomicU64;

use super::{Case, Defect, Play, check, text};
use crate::chain::OpenPolicy;
use crate::disk::Disk;
use crate::io::{Buffer, Storage};
use crate::journal::{Journal, SharedWords, Survival};
use crate::queue::Queue;
use crate::request::{Event, Request, RequestQueue, Wait};
use crate::spec::DiskSpec;
use crate::sync::Arc;

/// What is to survive when the process dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Survives {
    /// What was flushed, and the image.
    Flushed,
    /// All that was acknowledged, by a journal of so many records.
    Journal(usize),
    /// The same without one.
    Synchronous,
}

/// How opening a disk has ended.
type Opened = Result<Arc<Disk>, String>;

/// A journal for the case, of words that nobody has used.
pub(super) fn words(case: &Case) -> SharedWords {
    let records = if let Survives::Journal(records) = case.survives { records } else { 0 };
    Arc::new((0..16 + records * 4).map(|_| AtomicU64::new(0)).collect::<Vec<_>>())
}

impl Play {
    /// How a life's disk is opened.
    pub(super) fn life_policy(&self) -> OpenPolicy {
        let survival = match self.case.survives {
            Survives::Flushed => Survival::PowerCut,
            Survives::Journal(_) => Survival::Journal(self.words.clone()),
            Survives::Synchronous => Survival::Synchronous,
        };
        OpenPolicy { survival, ..self.policy() }
    }

    /// Whether an end of the process is followed by a replay, after which all is durable.
    pub(super) fn is_replayed(&self) -> bool {
        matches!(self.case.survives, Survives::Journal(_))
    }

    /// The power fails, and with it goes the memory that outlives the process.
    pub(super) fn cut_power(&mut self) {
        self.world.cut_power();
        self.words = words(&self.case);
    }

    /// After the death of a process: the next one takes over, perhaps not at the first go. Whether what it found is durable then.
    pub(super) fn survive_death(&mut self, spec: &DiskSpec) -> Result<bool, String> {
        let spec = DiskSpec { path: self.image.clone(), ..spec.clone() };
        if let Survives::Journal(_) = self.case.survives {
            let left = Journal::new(&self.words, &spec.path).and_then(|journal| journal.left(&spec.path));
            let noted = left.map_err(text)?.map_or(0, |left| left.records.len());
            self.replays = (self.replays.0 + 1, self.replays.1 + noted as u64);
        }
        let image = self.world.content(&self.image).ok_or("the image is gone")?;
        check::check(&image).map_err(|e| format!("after the death: {e}"))?;
        for _ in 0..self.rng.below(3) {
            self.replay_cut_short(&spec)?;
            if self.rng.one_in(4) {
                self.world.note(|| "the power fails in the replay".into());
                self.cut_power();
                return Ok(true);
            }
            self.world.kill_process();
            let image = self.world.content(&self.image).ok_or("the image is gone")?;
            check::check(&image).map_err(|e| format!("after a death in the replay: {e}"))?;
        }
        Defect::switch(self.case.defect, &self.world);
        let disk = Disk::open(&spec, &self.life_policy());
        Defect::switch(None, &self.world);
        let disk = disk.map_err(|e| format!("after the death: {e}"))?;
        let bytes = self.read_all(&disk)?;
        self.model.check_acknowledged(&bytes).map_err(|e| format!("after the death {e}"))?;
        disk.close().map_err(text)?;
        self.world.note(|| "model: what was acknowledged is there".into());
        let image = self.world.content(&self.image).ok_or("the image is gone")?;
        match check::leaks(&image).map_err(|e| format!("after the replay: {e}"))? {
            leaks if self.is_replayed() && leaks > 0 => Err(format!("after the replay {leaks} clusters leak")),
            _ => Ok(true),
        }
    }

    /// Opens the disk, but not to the end. (Or to the end, and nothing comes of it.)
    fn replay_cut_short(&mut self, spec: &DiskSpec) -> Result<(), String> {
        let queue = Queue::new(self.world.driver().map_err(text)?);
        let opened: Rc<RefCell<Option<Opened>>> = Rc::default();
        let task = {
            let (queue, spec, policy, slot) = (queue.clone(), spec.clone(), self.life_policy(), opened.clone());
            async move {
                let disk = Disk::open_on(&queue, &spec, &policy).await.map_err(text);
                *slot.borrow_mut() = Some(disk);
            }
        };
        Defect::switch(self.case.defect, &self.world);
        queue.spawn(task);
        for _ in 0..self.rng.below(150) {
            self.world.step();
            queue.turn(false, &mut Vec::new()).map_err(text)?;
        }
        Defect::switch(None, &self.world);
        let ended = opened.borrow_mut().take();
        if let Some(disk) = ended.transpose().map_err(|e| format!("after the death: {e}"))? {
            disk.forget();
        }
        self.world.note(|| "the replay is cut short".into());
        queue.shut_down();
        Ok(())
    }

    /// What an open disk holds.
    pub(super) fn read_all(&self, disk: &Arc<Disk>) -> Result<Buffer, String> {
        let mut queue = disk.queue().map_err(text)?;
        let buffer = Buffer::zeroed(disk.size() as usize);
        queue.submit(0, Request::Read { offset: 0, data: vec![buffer.seg(0, buffer.len())] });
        let mut events = Vec::new();
        while events.is_empty() {
            self.world.step();
            queue.wait(Wait::Poll, &mut events).map_err(text)?;
        }
        match events.pop() {
            Some(Event::Done { result: Err(e), .. }) => Err(format!("reading back: {e}")),
            _ => Ok(buffer),
        }
    }
}
