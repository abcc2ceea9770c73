//! Changing the extensions of an image in use, so that a power cut at any moment leaves the header before or the one after.
//!
//! A disk writes a sector whole or not at all, and several of them in any combination. So what lies behind the first sector
//! is laid where the old header has nothing, and then the first sector is switched. Where that is not possible — QEMU lays
//! the bitmaps extension, as the last one, across the first sector's end — there are three ways more: a change of one sector
//! alone is safe wherever it is; the bitmaps extension means nothing while the autoclear bit is off, so it may change then; and
//! the table of features' names, which is there for people and takes most of a sector, may be away for a moment.
//!
//! Not here: making each step durable before the next.

use zerocopy::FromBytes;

use super::Header;
use super::raw::RawV2;
use crate::error::FormatError;
use crate::extension::ExtensionKind;
use crate::feature::Autoclear;

/// What a disk writes whole or not at all.
pub(super) const SECTOR: usize = 512;
/// Where the backing file name's offset stands in the header.
pub(super) const NAME_OFFSET_AT: usize = 8;
/// Bytes of an extension's type and length, and of the mark that ends them.
const HEAD: usize = 8;

/// Writes of whole sectors, by their offset in the file, that become durable together or in any order.
pub type HeaderStep = Vec<(u64, Vec<u8>)>;

/// How one header takes another's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderSwitch {
    /// What is to be written, step by step: offsets in the file, and whole sectors. Each step must be durable before the next.
    /// A step that is torn leaves a header that says what the old or the new one does; in between the bitmaps' autoclear bit
    /// may be off, and the table of features' names away.
    pub steps: Vec<HeaderStep>,
    /// The header after the last step. The order of its extensions may be another than was asked for, and the table of
    /// features' names, which is there for people, is given up if there is no room otherwise.
    pub header: Header,
    /// The first cluster after the last step.
    pub area: Vec<u8>,
}

/// A header area with what of it is in use behind the numbers.
#[derive(Clone)]
pub(super) struct Laid {
    pub(super) bytes: Vec<u8>,
    /// The extensions with the mark that ends them.
    pub(super) chain: (usize, usize),
    pub(super) name: (usize, usize),
    /// The bitmaps extension's data.
    pub(super) bitmaps: Option<(usize, usize)>,
}

impl Header {
    /// How this header takes the place of `old`, with which the image's first cluster, `area`, begins now. They may differ in the
    /// extensions and in the numbers that [`Header::encode_fixed`] changes.
    ///
    /// # Errors
    /// There is no room that a power cut could not tear; a field has a value that parsing would refuse, or is one that cannot
    /// change so.
    pub fn switch_from(&self, old: &Header, area: &[u8]) -> Result<HeaderSwitch, FormatError> {
        let switch = self.switch_once(old, area)?;
        Ok(self.name_features(switch, |old, area| self.switch_once(old, area)))
    }

    /// `switch`, and if it gave up the table of features' names: with it again behind what is there then, if `onwards` knows how.
    pub(super) fn name_features(
        &self,
        mut switch: HeaderSwitch,
        onwards: impl FnOnce(&Header, &[u8]) -> Result<HeaderSwitch, FormatError>,
    ) -> HeaderSwitch {
        let named = |header: &Header| header.extension(ExtensionKind::FeatureNames).is_some();
        if named(self)
            && !named(&switch.header)
            && let Ok(more) = onwards(&switch.header, &switch.area)
            && named(&more.header)
        {
            switch.steps.extend(more.steps);
            (switch.header, switch.area) = (more.header, more.area);
        }
        switch
    }

    fn switch_once(&self, old: &Header, area: &[u8]) -> Result<HeaderSwitch, FormatError> {
        let size = 1usize << self.cluster_bits.bits();
        let mut bytes = area.to_vec();
        bytes.resize(size, 0);
        let old = old.laid_in(bytes);
        let mut full = FormatError::HeaderFull { needed: 0, available: size as u64 };
        for wanted in self.arrangements() {
            match wanted.switch_as(&old) {
                Err(e @ FormatError::HeaderFull { .. }) => full = e,
                other => return other,
            }
        }
        Err(full)
    }

    /// This header with its extensions in the orders to be tried. First of all the bitmaps', so that its data is in the first
    /// sector and every later change of it a single write.
    pub(super) fn arrangements(&self) -> Vec<Header> {
        let at = |kind| self.extensions.iter().position(|e| e.kind == kind);
        let mut arrangements = vec![self.clone()];
        if let Some(at) = at(ExtensionKind::Bitmaps) {
            let (mut front, mut back) = (self.clone(), self.clone());
            let bitmaps = front.extensions.remove(at);
            front.extensions.insert(0, bitmaps.clone());
            back.extensions.remove(at);
            back.extensions.push(bitmaps);
            arrangements = vec![front, self.clone(), back];
        }
        if at(ExtensionKind::FeatureNames).is_some() {
            let nameless = arrangements.clone();
            arrangements.extend(nameless.into_iter().map(|mut header| {
                header.set_extension(ExtensionKind::FeatureNames, None);
                header
            }));
        }
        arrangements
    }

    fn switch_as(&self, old: &Laid) -> Result<HeaderSwitch, FormatError> {
        let mut steps = Vec::new();
        let mut from = old.clone();
        let mut new = self.lay_over(&from)?;
        if new.is_none() {
            // The name is in the way: it moves first, to where neither header has anything.
            let end = from.chain.0 + self.chain_len();
            let moved = from.with_name_at(end.max(from.chain.1).max(from.name.1).next_multiple_of(8))?;
            steps.extend(from.steps_to(&moved).ok_or_else(|| from.full())?);
            from = moved;
            new = self.lay_over(&from)?;
        }
        let new = new.ok_or_else(|| from.full())?;
        steps.extend(from.steps_to(&new).ok_or_else(|| from.full())?);
        Ok(HeaderSwitch { steps, header: self.clone(), area: new.bytes })
    }

    /// Bytes of the extensions with the mark that ends them.
    fn chain_len(&self) -> usize {
        self.extensions.iter().map(|e| e.encoded_len()).sum::<usize>() + HEAD
    }

    /// Where this header, which `bytes` begin with, has what.
    pub(super) fn laid_in(&self, bytes: Vec<u8>) -> Laid {
        let start = self.header_length as usize;
        let name = RawV2::read_from_prefix(&bytes).map_or((0, 0), |(raw, _)| {
            let at = usize::try_from(raw.backing_file_offset.get()).unwrap_or(usize::MAX).min(bytes.len());
            if at == 0 {
                (0, 0)
            } else {
                (at, at.saturating_add(raw.backing_file_size.get() as usize).min(bytes.len()))
            }
        });
        let mut at = start;
        let mut bitmaps = None;
        for extension in &self.extensions {
            if extension.kind == ExtensionKind::Bitmaps {
                bitmaps = Some((at + HEAD, at + extension.encoded_len()));
            }
            at += extension.encoded_len();
        }
        // Behind the last one there may be no room for the mark that ends them.
        let limit = if name.0 > 0 { name.0 } else { bytes.len() };
        Laid { chain: (start, (at + HEAD).min(limit.max(at))), name, bitmaps, bytes }
    }

    /// This header's extensions and numbers over `old`, where the backing file name stays; `None` if it is in the way.
    fn lay_over(&self, old: &Laid) -> Result<Option<Laid>, FormatError> {
        let mut chain = Vec::new();
        for extension in &self.extensions {
            extension.encode(&mut chain)?;
        }
        chain.extend_from_slice(&[0; HEAD]);
        let start = self.header_length as usize;
        let end = start + chain.len();
        if end > old.bytes.len() {
            return Err(FormatError::HeaderFull { needed: end as u64, available: old.bytes.len() as u64 });
        }
        // The extensions end before the name: one that lies in front of them would end them.
        if old.name.0 > 0 && old.name.0 < end {
            return Ok(None);
        }
        let mut bytes = old.bytes.clone();
        if let Some(place) = bytes.get_mut(start..end) {
            place.copy_from_slice(&chain);
        }
        let sector = self.encode_fixed(bytes.get(..SECTOR).unwrap_or(&bytes))?;
        if let Some(place) = bytes.get_mut(..sector.len()) {
            place.copy_from_slice(&sector);
        }
        Ok(Some(self.laid_in(bytes)))
    }
}

impl Laid {
    /// The same, whose bitmaps are in use whatever a bit says.
    pub(super) fn without_bitmaps(&self) -> Self {
        Self { bitmaps: None, ..self.clone() }
    }

    fn full(&self) -> FormatError {
        let needed = self.chain.1.max(self.name.1) as u64;
        FormatError::HeaderFull { needed, available: self.bytes.len() as u64 }
    }

    /// The same with the backing file name at another place.
    fn with_name_at(&self, at: usize) -> Result<Self, FormatError> {
        let mut moved = self.clone();
        let name = self.bytes.get(self.name.0..self.name.1).unwrap_or_default();
        let end = at + name.len();
        let Some(place) = moved.bytes.get_mut(at..end) else {
            return Err(FormatError::HeaderFull { needed: end as u64, available: self.bytes.len() as u64 });
        };
        place.copy_from_slice(name);
        if let Some(place) = moved.bytes.get_mut(NAME_OFFSET_AT..NAME_OFFSET_AT + 8) {
            place.copy_from_slice(&(at as u64).to_be_bytes());
        }
        moved.name = (at, end);
        // Where the old name was no mark need have ended the extensions: now there must be one.
        if moved.bytes.get(moved.chain.1 - HEAD..moved.chain.1).is_none_or(|mark| mark != [0; HEAD]) {
            return Err(moved.full());
        }
        Ok(moved)
    }

    fn sector(&self, index: usize) -> &[u8] {
        self.bytes.get(index * SECTOR..(index + 1) * SECTOR).unwrap_or_default()
    }

    /// The same first sector without the bit that says that the bitmaps are good.
    fn without_bitmaps_bit(&self) -> Vec<u8> {
        let mut sector = self.sector(0).to_vec();
        // The last byte of the autoclear features.
        if let Some(byte) = sector.get_mut(95) {
            *byte &= !(Autoclear::BITMAPS.bits() as u8);
        }
        sector
    }

    /// Whether one of these sectors of `new` touches what this header uses (but for the data of its bitmaps extension, if that
    /// is not in use now).
    fn conflicts(&self, new: &Self, sectors: &[usize], bitmaps_in_use: bool) -> bool {
        let within = |at: usize, (start, end): (usize, usize)| (start..end).contains(&at);
        let used = |at: usize| {
            let free = !bitmaps_in_use && self.bitmaps.is_some_and(|data| within(at, data));
            !free && (within(at, self.chain) || within(at, self.name))
        };
        let differs = |at: usize| self.bytes.get(at) != new.bytes.get(at);
        sectors.iter().any(|&s| (s * SECTOR..(s + 1) * SECTOR).any(|at| used(at) && differs(at)))
    }

    /// The writes that lead from here to `new`; `None` if there is no safe way.
    pub(super) fn steps_to(&self, new: &Self) -> Option<Vec<HeaderStep>> {
        let sectors = self.bytes.len() / SECTOR;
        let behind: Vec<usize> = (1..sectors).filter(|&s| self.sector(s) != new.sector(s)).collect();
        let rest: Vec<_> = behind.iter().map(|&s| ((s * SECTOR) as u64, new.sector(s).to_vec())).collect();
        let first = |bytes: &[u8]| vec![(0, bytes.to_vec())];
        let off = self.without_bitmaps_bit();
        let mut steps = Vec::new();
        let same_but_bit = off == new.without_bitmaps_bit();
        if self.conflicts(new, &behind, true) {
            let safe = (behind.len() == 1 && same_but_bit) || !self.conflicts(new, &behind, false);
            if !safe {
                return None;
            }
            if self.sector(0) != off {
                steps.push(first(&off));
            }
            steps.push(rest);
            if off != new.sector(0) {
                steps.push(first(new.sector(0)));
            }
            return Some(steps);
        }
        if !rest.is_empty() {
            steps.push(rest);
        }
        if self.sector(0) != new.sector(0) {
            steps.push(first(new.sector(0)));
        }
        Some(steps)
    }
}

#[cfg(test)]
#[path = "switch_test.rs"]
mod tests;
