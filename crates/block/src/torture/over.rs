//! The disk goes on in overlays: what lies below never changes again, and after an end the chain is opened from the file that its
//! owner would name.

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;

use cowhand_qcow2::Header;

use super::model::tag_of;
use super::{Buffer, ClusterBits, Disk, DiskSpec, Format, Frozen, Path, Play, text};
use crate::error::Result as EngineResult;
use crate::{Overlay, OverlayOptions, OverlaySource};

/// An overlay in the making.
#[derive(Clone)]
pub(super) struct Over {
    pub(super) path: PathBuf,
    /// The bytes of the file below, once the owner has noted the overlay as the disk's file.
    noted: Rc<RefCell<Option<Vec<u8>>>>,
}

impl Play {
    /// An overlay of the seed's choice, and what the owner notes.
    pub(super) fn plan_overlay(&mut self, op: u64) -> (Overlay, Over, impl FnOnce() -> EngineResult<()> + use<>) {
        let bits = [9, 10, 12, 14, 16][self.rng.below(5) as usize];
        let options = OverlayOptions {
            cluster_bits: ClusterBits::new(bits).unwrap(),
            extended_l2: bits >= 14 && self.rng.one_in(2),
        };
        let over = Over { path: PathBuf::from(format!("/over{op}.qcow2")), noted: Rc::default() };
        let overlay = Overlay { path: over.path.clone(), source: OverlaySource::New(options) };
        let (world, below, noted) = (self.world.clone(), self.image.clone(), over.noted.clone());
        let note = move || {
            world.note(|| "noted".into());
            *noted.borrow_mut() = world.content(&below);
            Ok(())
        };
        (overlay, over, note)
    }

    /// The disk has gone on in an overlay.
    pub(super) fn switched(&mut self, over: &Over) -> Result<(), String> {
        let bytes = over.noted.borrow_mut().take().ok_or("the owner has not noted the overlay")?;
        self.put_over(over.path.clone(), bytes)
    }

    fn put_over(&mut self, path: PathBuf, below: Vec<u8>) -> Result<(), String> {
        let old = std::mem::replace(&mut self.image, path);
        // Internal snapshots stay below.
        self.taken.clear();
        self.frozen = Frozen::default();
        let bytes = self.read_back(&old)?;
        let tag = |(sector, bytes): (usize, &[u8])| tag_of(sector as u64, bytes.try_into().unwrap());
        let tags: Option<Vec<u32>> = bytes.chunks_exact(512).enumerate().map(tag).collect();
        self.base = tags.ok_or("a sector of the image below is mixed")?;
        self.below.push((old, below));
        Ok(())
    }

    /// After an end in the midst: which file is the disk's now.
    pub(super) fn settle_overlay(&mut self, over: &Over, durable: bool, died: bool) -> Result<(), String> {
        if over.noted.borrow().is_some() {
            return self.switched(over);
        }
        if died && self.is_replayed() {
            // The owner, who lives on, has not heard of it.
            return Ok(());
        }
        let there = self.world.content(&over.path).is_some_and(|bytes| Header::probe(&bytes));
        if there && self.rng.one_in(2) {
            self.inspect(durable)?;
            self.world.note(|| "the owner takes the overlay".into());
            let below = self.world.content(&self.image).ok_or("the image is gone")?;
            self.put_over(over.path.clone(), below)?;
        }
        Ok(())
    }

    /// Images below have the bytes that they had when they came to lie there. Zeros at the end may be missing: an image's last cluster is
    /// filled up with them when all that matters is durable.
    pub(super) fn inspect_below(&self) -> Result<(), String> {
        for (path, before) in &self.below {
            let now = self.world.content(path).ok_or("an image below is gone")?;
            let both = now.len().min(before.len());
            let rest = now[both..].iter().chain(&before[both..]);
            if now[..both] != before[..both] || rest.copied().any(|byte| byte != 0) {
                return Err(format!("{} has changed, and lies below", path.display()));
            }
        }
        Ok(())
    }

    /// What a disk holds, read by one who opens it for reading.
    pub(super) fn read_back(&self, path: &Path) -> Result<Buffer, String> {
        let faults = self.world.take_faults();
        let read = || {
            let spec = DiskSpec { readonly: true, ..DiskSpec::new(path, Format::Qcow2) };
            self.read_all(&Disk::open(&spec, &self.policy()).map_err(text)?)
        };
        let result = read();
        self.world.set_faults(faults);
        result
    }
}
