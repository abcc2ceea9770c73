//! What the caches keep for a guest cluster: its L2 entry as it is in the file, or, where this layer has nothing, what lies below.
//!
//! An entry that maps nothing has bits to spare: the reserved bits 1 to 8 and 56 to 61 name a layer below, and bits 9 to 55 the place
//! in that layer's file. So one look at the topmost layer's slices tells where a whole chain has its data. None of
//! that goes into a file: [`Stored::on_disk`] takes it out again.

use cowhand_qcow2::{CompressedRange, Field, FormatError, Geometry, HostOffset, L2Entry, L2Kind, SubclusterBitmap};

/// Bits 9 to 55: where something lies, as in the file's own entries.
const PLACE: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits 1 to 8 and 56 to 61: reserved in the file's entries (but for compressed ones), the layer here.
const LAYER: u64 = 0x3f00_0000_0000_01fe;
/// Bit 62: a compressed cluster, in whose entry all lower bits have a meaning.
const COMPRESSED: u64 = 1 << 62;
/// The greatest number of a layer, 14 bits' worth, means that no layer has the cluster.
const NOTHING: u64 = 0x3fff;

/// The two below it take the place of an entry of the file that is not to be followed: it has reserved bits set, so that what it means
/// is not known; or it names a cluster of metadata.
const RESERVED: u64 = NOTHING - 1;
const MISLED: u64 = NOTHING - 2;

/// Layers below an image that an entry can name.
pub(super) const LAYERS_MAX: usize = MISLED as usize - 1;

/// What lies below a cluster that a layer does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Below {
    /// It has not been looked for.
    Unknown,
    /// Nothing: it reads as zeros.
    Nothing,
    /// Layer `layer` (1 is the backing file) has it in one piece, from `place` of its file on.
    At {
        /// The number of the layer.
        layer: u16,
        /// A byte offset in the layer's file.
        place: u64,
    },
    /// Layer `layer` has to be asked: the cluster is compressed there, in pieces, or partly past its end. No layer above has any of it.
    Ask {
        /// The number of the layer.
        layer: u16,
    },
}

impl Below {
    /// In the place of an entry; `Unknown` is an entry that maps nothing. The place is a multiple of 512 below 2^56 - 512.
    fn pack(self) -> u64 {
        let (layer, place) = match self {
            Self::Unknown => return 0,
            Self::Nothing => (NOTHING, 0),
            Self::At { layer, place } if place & !PLACE == 0 && place != PLACE => (layer.into(), place),
            // No cluster begins there, so this place can stand for all that needs a closer look.
            Self::At { layer, .. } | Self::Ask { layer } => (layer.into(), PLACE),
        };
        numbered(layer) | place
    }

    /// What stands in an entry's place; none if it is an entry of the file.
    fn unpack(entry: u64) -> Option<Self> {
        if entry & LAYER == 0 || entry & COMPRESSED != 0 {
            return None;
        }
        let layer = entry >> 1 & 0xff | entry >> 56 << 8;
        let (place, number) = (entry & PLACE, layer as u16);
        Some(match layer {
            NOTHING => Self::Nothing,
            _ if place == PLACE => Self::Ask { layer: number },
            _ => Self::At { layer: number, place },
        })
    }
}

/// An entry that maps nothing, with this number in its spare bits.
const fn numbered(number: u64) -> u64 {
    (number & 0xff) << 1 | (number >> 8) << 56
}

/// An entry as the caches keep it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) entry: u64,
    /// With extended L2 entries only.
    pub(super) bitmap: SubclusterBitmap,
}

impl Stored {
    /// Of a cluster that no table maps.
    pub(super) fn below(below: Below) -> Self {
        Self { entry: below.pack(), bitmap: SubclusterBitmap::NONE }
    }

    /// Of a cluster that is all data, at `host`, with a single reference.
    pub(super) fn data(host: HostOffset) -> Result<Self, FormatError> {
        Ok(Self { entry: L2Entry::data(host, true)?.raw(), bitmap: SubclusterBitmap::ALL_ALLOCATED })
    }

    /// Of a compressed cluster. (With extended L2 entries its bitmap says nothing.)
    pub(super) fn compressed(geometry: &Geometry, range: CompressedRange) -> Result<Self, FormatError> {
        Ok(Self { entry: L2Entry::compressed(range, geometry)?.raw(), bitmap: SubclusterBitmap::NONE })
    }

    /// Of a cluster that reads as zeros.
    pub(super) fn zero(geometry: &Geometry, host: Option<HostOffset>, copied: bool) -> Result<Self, FormatError> {
        let entry = match host {
            _ if !geometry.extended_l2 => L2Entry::zero(host, copied)?,
            Some(host) => L2Entry::data(host, copied)?,
            None => L2Entry::UNALLOCATED,
        };
        Ok(Self { entry: entry.raw(), bitmap: SubclusterBitmap::ALL_ZERO })
    }

    /// In the place of an entry of the file that has reserved bits set.
    pub(super) fn reserved() -> Self {
        Self { entry: numbered(RESERVED), bitmap: SubclusterBitmap::NONE }
    }

    /// In the place of an entry of the file that names metadata as guest data.
    pub(super) fn misled() -> Self {
        Self { entry: numbered(MISLED), bitmap: SubclusterBitmap::NONE }
    }

    /// Whether it is in the place of an entry that names metadata.
    pub(super) fn is_misled(self) -> bool {
        self == Self::misled()
    }

    /// Whether it is in the place of an entry of the file that must stay there as it is.
    fn is_kept(self) -> bool {
        self.is_misled() || self == Self::reserved()
    }

    /// Whether the file's entry has bits set that mean something else here.
    pub(super) fn collides(self) -> bool {
        Below::unpack(self.entry).is_some()
    }

    /// Whether nothing at all is known of the cluster.
    pub(super) fn is_unknown(self) -> bool {
        self.entry == 0 && self.bitmap == SubclusterBitmap::NONE
    }

    /// What the file's entry says, and what is known of what lies below it.
    pub(super) fn decode(self, geometry: &Geometry) -> Result<(L2Kind, Below), FormatError> {
        if self.is_kept() {
            let problem = if self.is_misled() { "names a cluster of metadata" } else { "has reserved bits set" };
            return Err(FormatError::Inconsistent { field: Field::new("an L2 entry"), problem });
        }
        if let Some(below) = Below::unpack(self.entry) {
            return Ok((L2Kind::Unallocated, below));
        }
        let kind = L2Entry::from_raw(self.entry).decode(geometry)?;
        if geometry.extended_l2 {
            self.bitmap.validate(&kind)?;
        }
        Ok((kind, Below::Unknown))
    }

    /// As it belongs into the file.
    pub(super) fn on_disk(self) -> Self {
        if self.collides() && !self.is_kept() { Self::default() } else { self }
    }
}

/// A part of a table as it belongs into the file.
pub(super) struct TableBytes {
    bytes: Vec<u8>,
    entry_size: usize,
    /// Where in the bytes those entries are that stay what they are in the file.
    kept: Vec<usize>,
}

impl TableBytes {
    /// Of these entries.
    pub(super) fn new(geometry: &Geometry, entries: impl Iterator<Item = Stored>) -> Self {
        let (mut bytes, mut kept) = (Vec::new(), Vec::new());
        for stored in entries.map(Stored::on_disk) {
            if stored.is_kept() {
                kept.push(bytes.len());
            }
            bytes.extend_from_slice(&stored.entry.to_be_bytes());
            if geometry.extended_l2 {
                bytes.extend_from_slice(&stored.bitmap.raw().to_be_bytes());
            }
        }
        Self { bytes, entry_size: geometry.l2_entry_size() as usize, kept }
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether what the file has there must be read first.
    pub(super) fn keeps_some(&self) -> bool {
        !self.kept.is_empty()
    }

    /// Changes this part of a table, which holds what the file has (or anything, if nothing of it is kept).
    pub(super) fn put_into(&self, part: &mut [u8]) {
        let mut from = 0;
        for &at in self.kept.iter().chain([&self.bytes.len()]) {
            if let (Some(to), Some(new)) = (part.get_mut(from..at), self.bytes.get(from..at)) {
                to.copy_from_slice(new);
            }
            from = at + self.entry_size;
        }
    }
}

#[cfg(test)]
#[path = "entry_test.rs"]
mod tests;
