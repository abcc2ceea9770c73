//! Changes of the whole disk while the guest goes on: snapshots taken, gone back to and deleted, other sizes; cut short like all else.

use std::cell::RefCell;
use std::rc::Rc;

use cowhand_qcow2::Snapshot;

use super::check::Look;
use super::follow::Copier;
use super::model::{Whole, tag_of};
use super::over::Over;
use super::{Play, text};
use crate::CopyBeforeWrite;
use crate::disk::Disk;
use crate::error::{Error, ErrorKind};
use crate::io::Storage;
use crate::overlay::snapshot_on;
use crate::qcow2::create::Preallocation;
use crate::queue::Queue;
use crate::sync::Arc;

/// A snapshot that there is, or may be.
pub(super) struct Taken {
    id: String,
    /// A tag to each sector.
    content: Vec<u32>,
    /// Whether it must be there after an end.
    sure: bool,
}

/// How a change ended.
type Ended = Result<Option<String>, Error>;

/// A change in flight.
pub(super) struct Changing {
    queue: Rc<Queue>,
    op: u64,
    what: Whole,
    /// The snapshot that is being deleted.
    id: Option<String>,
    /// The overlay that is being made.
    pub(super) over: Option<Over>,
    /// The copy that was begun.
    copy: Rc<RefCell<Option<CopyBeforeWrite>>>,
    /// Once it has ended, with the ID of a snapshot that was taken.
    result: Rc<RefCell<Option<Ended>>>,
}

impl Changing {
    /// The end has come.
    pub(super) fn abandon(self) {
        self.queue.shut_down();
    }
}

impl Play {
    /// Begins a change of the seed's choice.
    pub(super) fn begin_change(&mut self, disk: &Arc<Disk>) -> Result<Changing, String> {
        let (what, id) = match self.rng.below(11) {
            8 | 9 => (Whole::Overlay, None),
            10 if self.copier.is_none() => (Whole::Copy, None),
            0..=2 => (Whole::Take, None),
            3 | 4 if !self.taken.is_empty() => {
                let pick = self.rng.below(self.taken.len() as u64) as usize;
                (Whole::Apply(self.taken[pick].content.clone()), Some(self.taken[pick].id.clone()))
            }
            5 if !self.taken.is_empty() => {
                let pick = self.rng.below(self.taken.len() as u64) as usize;
                // From now on it may be gone.
                self.taken[pick].sure = false;
                (Whole::Delete, Some(self.taken[pick].id.clone()))
            }
            _ => {
                let whole_cluster = self.rng.one_in(3);
                let sectors = 1 + self.rng.below(self.case.sectors * 3 / 2);
                let cluster = 1 << (self.case.cluster_bits - 9);
                (Whole::Resize(if whole_cluster { sectors.next_multiple_of(cluster) } else { sectors }), None)
            }
        };
        self.ops += 1;
        let op = self.ops;
        self.world.note(|| match &what {
            Whole::Apply(_) => format!("op {op}: apply snapshot {id:?}"),
            what => format!("op {op}: {what:?} {id:?}"),
        });
        self.model.begin_whole(op, &what);
        use Preallocation::{Falloc, Full, Metadata, Off};
        let preallocation = [Off, Off, Metadata, Falloc, Full][self.rng.below(5) as usize];
        let queue = Queue::new(self.world.driver().map_err(text)?);
        let result = Rc::new(RefCell::new(None));
        let (overlay, over, note) = self.plan_overlay(op);
        let over = matches!(what, Whole::Overlay).then_some(over);
        let copy = Rc::new(RefCell::new(None));
        let begun = copy.clone();
        let task = {
            let (disk, queue, what, id, slot) = (disk.clone(), queue.clone(), what.clone(), id.clone(), result.clone());
            async move {
                let id = id.unwrap_or_default();
                let ended = match what {
                    Whole::Take => disk.create_snapshot_on(&queue, "a name").await.map(|info| Some(info.id)),
                    Whole::Apply(_) => disk.apply_snapshot_on(&queue, &id).await.map(|()| None),
                    Whole::Overlay => snapshot_on(&queue, &[(disk, overlay)], note).await.map(|()| None),
                    Whole::Copy => disk.copy_before_write_on(None).await.map(|copy| {
                        *begun.borrow_mut() = Some(copy);
                        None
                    }),
                    Whole::Delete => disk.delete_snapshot_on(&queue, &id).await.map(|()| None),
                    Whole::Resize(sectors) => {
                        let mode = if sectors * 512 > disk.size() { preallocation } else { Preallocation::Off };
                        disk.resize_on(&queue, sectors * 512, mode).await.map(|()| None)
                    }
                };
                *slot.borrow_mut() = Some(ended);
            }
        };
        queue.spawn(task);
        Ok(Changing { queue, op, what, id, over, copy, result })
    }

    /// Lets a change go on for a while; gives it back if it has not ended.
    pub(super) fn go_on(&mut self, changing: Changing, disk: &Arc<Disk>) -> Result<Option<Changing>, String> {
        for _ in 0..1 + self.rng.below(4) {
            self.world.step();
            changing.queue.turn(false, &mut Vec::new()).map_err(text)?;
            let ended = changing.result.borrow_mut().take();
            if let Some(ended) = ended {
                self.end_change(&changing, ended, disk)?;
                return Ok(None);
            }
        }
        Ok(Some(changing))
    }

    fn end_change(&mut self, changing: &Changing, ended: Ended, disk: &Arc<Disk>) -> Result<(), String> {
        let Changing { op, what, id, .. } = changing;
        self.world.note(|| format!("op {op} done: {ended:?}"));
        self.model.end_whole(*op, what, ended.is_ok(), disk.size() / 512)?;
        let refused = [ErrorKind::Invalid, ErrorKind::Unsupported];
        let faultless = self.case.faults.io == 0 && self.case.faults.no_space == 0 && self.case.faults.flush == 0;
        if let Err(e) = &ended
            && faultless
            && !refused.contains(&e.kind())
        {
            return Err(format!("a change fails without a reason: {e}"));
        }
        match (what, &ended) {
            (Whole::Take, Ok(Some(new))) => self.taken_anew(new, true)?,
            (Whole::Overlay, Ok(_)) => self.switched(changing.over.as_ref().ok_or("no overlay was made")?)?,
            (Whole::Copy, Ok(_)) => {
                let legal = self.model.take_taken().ok_or("a copy was not begun")?;
                let copy = changing.copy.borrow_mut().take().ok_or("a copy was not begun")?;
                self.copier = Some(Copier::new(copy, disk, legal)?);
            }
            (Whole::Delete, Ok(_)) => self.taken.retain(|taken| Some(&taken.id) != id.as_ref()),
            (_, Ok(_)) => {}
            (_, Err(e)) if refused.contains(&e.kind()) => {
                self.taken.iter_mut().filter(|taken| Some(&taken.id) == id.as_ref()).for_each(|t| t.sure = true);
                self.model.take_taken();
            }
            // The disk goes on as it was, and nothing was written that could undo it.
            (Whole::Overlay | Whole::Copy, Err(_)) => drop(self.model.take_taken()),
            (Whole::Take, Err(_)) => {
                self.uncertain = true;
                let image = self.world.content(&self.image).ok_or("the image is gone")?;
                let known = |s: &Snapshot| self.taken.iter().any(|taken| taken.id.as_bytes() == s.id);
                let new = Look::new(&image)?.snapshots()?.into_iter().find(|s| !known(s));
                if let Some(new) = new {
                    self.taken_anew(&String::from_utf8_lossy(&new.id), false)?;
                }
                self.model.take_taken();
            }
            (_, Err(_)) => self.uncertain = true,
        }
        Ok(())
    }

    /// A snapshot is there that was not there before.
    fn taken_anew(&mut self, id: &str, sure: bool) -> Result<(), String> {
        let image = self.world.content(&self.image).ok_or("the image is gone")?;
        let look = Look::new(&image)?;
        let snapshots = look.snapshots()?;
        let found = snapshots.iter().find(|s| s.id == id.as_bytes()).ok_or("a snapshot that was taken is not there")?;
        let content = self.content(&look, found)?;
        let legal = self.model.take_taken().ok_or_else(|| format!("snapshot {id} is there, but was not taken"))?;
        if content.len() != legal.len() {
            return Err(format!("snapshot {id} has {} sectors, not {}", content.len(), legal.len()));
        }
        let wrong = (0..content.len()).find(|&i| !legal[i].contains(&content[i]));
        if let Some(i) = wrong {
            return Err(format!("snapshot {id} has {} in sector {i}, legal {:?}", content[i], legal[i]));
        }
        self.taken.retain(|taken| taken.id != id);
        self.taken.push(Taken { id: id.to_string(), content, sure });
        Ok(())
    }

    /// What a snapshot holds.
    fn content(&self, look: &Look, snapshot: &Snapshot) -> Result<Vec<u32>, String> {
        let sectors = snapshot.disk_size.ok_or("a snapshot without a size")? / 512;
        let tag = |sector: u64| match look.sector(snapshot, sector)? {
            None => Ok(self.base.get(sector as usize).copied().unwrap_or(0)),
            Some(bytes) => tag_of(sector, &bytes).ok_or_else(|| format!("sector {sector} of a snapshot is mixed")),
        };
        (0..sectors).map(tag).collect()
    }

    /// After an end: every snapshot that was taken is there and holds what it held, and no other but one that was being taken.
    pub(super) fn inspect_snapshots(&mut self, image: &[u8]) -> Result<(), String> {
        let look = Look::new(image)?;
        let snapshots = look.snapshots()?;
        for taken in &self.taken {
            let found = snapshots.iter().find(|s| s.id == taken.id.as_bytes());
            match found {
                None if taken.sure => return Err(format!("snapshot {} is gone", taken.id)),
                None => {}
                Some(found) => {
                    let content = self.content(&look, found)?;
                    if let Some(i) = (0..content.len()).find(|&i| content.get(i) != taken.content.get(i)) {
                        let (is, was) = (content[i], taken.content.get(i));
                        return Err(format!("snapshot {} holds {is} in sector {i}, not {was:?}", taken.id));
                    }
                }
            }
        }
        let ids: Vec<String> = snapshots.iter().map(|s| String::from_utf8_lossy(&s.id).into_owned()).collect();
        self.taken.retain(|taken| ids.contains(&taken.id));
        for id in &ids {
            if !self.taken.iter().any(|taken| taken.id == *id) {
                self.taken_anew(id, true)?;
            }
        }
        self.taken.iter_mut().for_each(|taken| taken.sure = true);
        Ok(())
    }
}
