//! Feature bits and the table of their names. (Specification, "Header" and "Feature name table".)

use bitflags::bitflags;

bitflags! {
    /// Features that a reader must know to open the image. Unknown bits are kept.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Incompatible: u64 {
        /// Refcounts may be wrong: rebuild them before the first write.
        const DIRTY = 1 << 0;
        /// Any structure may be wrong: writing only to repair.
        const CORRUPT = 1 << 1;
        /// Guest data lies in an external data file.
        const DATA_FILE = 1 << 2;
        /// Compressed clusters are not deflate: the header says what.
        const COMPRESSION = 1 << 3;
        /// L2 entries are 16 bytes, with subclusters.
        const EXTENDED_L2 = 1 << 4;
    }
}

bitflags! {
    /// Features that a reader may ignore. Unknown bits are kept.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Compatible: u64 {
        /// Refcounts may be written late, under the dirty bit.
        const LAZY_REFCOUNTS = 1 << 0;
    }
}

bitflags! {
    /// Features whose data goes stale when someone writes who does not know them: a writer clears the bits that it does
    /// not know, once the open has succeeded. Unknown bits are kept until then.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Autoclear: u64 {
        /// The bitmaps extension is consistent.
        const BITMAPS = 1 << 0;
        /// The external data file reads as a raw image by itself.
        const RAW_DATA_FILE = 1 << 1;
    }
}

impl Incompatible {
    /// The bits that this crate does not know.
    #[must_use]
    pub fn unknown(self) -> Self {
        self.difference(Self::all())
    }
}

impl Autoclear {
    /// The bits that this crate does not know, which the first write must clear.
    #[must_use]
    pub fn unknown(self) -> Self {
        self.difference(Self::all())
    }
}

/// Which of the three masks a feature belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureKind {
    /// [`Incompatible`].
    Incompatible,
    /// [`Compatible`].
    Compatible,
    /// [`Autoclear`].
    Autoclear,
    /// A mask that is not defined.
    Unknown(u8),
}

impl FeatureKind {
    const fn from_raw(raw: u8) -> Self {
        match raw {
            0 => Self::Incompatible,
            1 => Self::Compatible,
            2 => Self::Autoclear,
            other => Self::Unknown(other),
        }
    }

    const fn raw(self) -> u8 {
        match self {
            Self::Incompatible => 0,
            Self::Compatible => 1,
            Self::Autoclear => 2,
            Self::Unknown(other) => other,
        }
    }
}

/// One entry of the feature name table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeatureName {
    /// The mask.
    pub kind: FeatureKind,
    /// The bit in it (legal: 0 to 63).
    pub bit: u8,
    /// The name, at most 46 bytes, without the padding. Neither NUL nor UTF-8 is assured in the file; what is no UTF-8
    /// has been replaced.
    pub name: String,
}

impl FeatureName {
    /// Bytes of one entry.
    pub const LEN: usize = 48;

    /// The entries in the data of a feature name table extension. An entry that is cut short at the end has a shorter name: whoever
    /// writes the extension by hand may leave its padding out.
    pub(crate) fn parse_table(data: &[u8]) -> impl Iterator<Item = Self> {
        data.chunks(Self::LEN).filter_map(|entry| {
            let (&kind, rest) = entry.split_first()?;
            let (&bit, name) = rest.split_first()?;
            let name = name.split(|&byte| byte == 0).next()?;
            let name = String::from_utf8_lossy(name).into_owned();
            Some(Self { kind: FeatureKind::from_raw(kind), bit, name })
        })
    }

    /// Appends the entry, its name padded with zeros (and cut at 46 bytes).
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&[self.kind.raw(), self.bit]);
        out.extend(self.name.bytes().take(Self::LEN - 2));
        out.resize(start + Self::LEN, 0);
    }

    /// The table of all that this crate knows, as it stands in the extension.
    #[must_use]
    pub fn known_table() -> Vec<u8> {
        let mut table = Vec::new();
        Self::known().for_each(|name| name.encode(&mut table));
        table
    }

    /// The table that QEMU writes into version 3 headers, so that an old reader can name what it lacks.
    pub(crate) fn known() -> impl Iterator<Item = Self> {
        KNOWN.iter().map(|&(kind, bit, name)| Self { kind, bit, name: name.to_owned() })
    }
}

/// In QEMU's order and words.
const KNOWN: [(FeatureKind, u8, &str); 8] = [
    (FeatureKind::Incompatible, 0, "dirty bit"),
    (FeatureKind::Incompatible, 1, "corrupt bit"),
    (FeatureKind::Incompatible, 2, "external data file"),
    (FeatureKind::Incompatible, 3, "compression type"),
    (FeatureKind::Incompatible, 4, "extended L2 entries"),
    (FeatureKind::Compatible, 0, "lazy refcounts"),
    (FeatureKind::Autoclear, 0, "bitmaps"),
    (FeatureKind::Autoclear, 1, "raw external data"),
];

/// Names the set bits of an unknown incompatible mask as QEMU does: by the image's own table, in its order, and what it does
/// not name as a number.
pub(crate) fn describe_unknown(unknown: Incompatible, table: &[FeatureName]) -> String {
    let mut left = unknown.bits();
    let mut names = Vec::new();
    for feature in table.iter().filter(|f| f.kind == FeatureKind::Incompatible && !f.name.is_empty()) {
        let bit = 1u64.checked_shl(feature.bit.into()).unwrap_or(0);
        if left & bit != 0 {
            left &= !bit;
            // The name comes out of an untrusted file and goes to a terminal.
            names.push(feature.name.escape_debug().to_string());
        }
    }
    if left != 0 {
        names.push(format!("Unknown incompatible feature: {left:x}"));
    }
    names.join(", ")
}
