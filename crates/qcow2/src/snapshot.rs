//! The table of internal snapshots. (Specification, "Snapshots".)
//!
//! Not here: what the snapshots' L1 tables point to.

use crate::error::{Field, FormatError};
use crate::extension::metadata_offset;
use crate::geometry::Geometry;
use crate::limits;
use crate::offset::HostOffset;
use crate::wire::{be16, be32, be64, slice};

/// Bytes of an entry before its extra data.
pub(crate) const FIXED_LEN: usize = limits::SNAPSHOT_FIXED_LEN as usize;

const EXTRA_LEN_AT: usize = 36;

const ENTRY: Field = Field::new("snapshot table entry");
const TABLE: Field = Field::new("snapshot table");

/// One internal snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Where its L1 table starts.
    pub l1_table_offset: HostOffset,
    /// Entries in its L1 table.
    pub l1_size: u32,
    /// Its unique ID (a decimal number in what QEMU writes).
    pub id: Vec<u8>,
    /// Its name.
    pub name: Vec<u8>,
    /// When it was taken: seconds since the Epoch.
    pub date_sec: u32,
    /// When it was taken: nanoseconds into the second.
    pub date_nsec: u32,
    /// How long the guest had run, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes of VM state, 0 if there is none. It lies past the disk: from the first L1 entry that maps none of it.
    pub vm_state_size: u64,
    /// The virtual size when it was taken, in bytes; always there in version 3.
    pub disk_size: Option<u64>,
    /// Record/replay's instruction count (`u64::MAX`: disabled).
    pub icount: Option<u64>,
    /// Extra data past what is known here, byte for byte.
    pub unknown_extra: Vec<u8>,
}

impl Snapshot {
    /// Parses the entry that `bytes` begin with; also gives the bytes it takes, padded to 8 (but not past the end of
    /// `bytes`, as the padding after the last one may be missing).
    ///
    /// # Errors
    /// `bytes` are too short; over 1 KiB of extra data; an L1 table too large, unaligned or in the header's cluster.
    /// Extra data that version 3 lacks is none: see [`Snapshot::is_complete`].
    pub fn parse(bytes: &[u8], geometry: &Geometry) -> Result<(Self, usize), FormatError> {
        let too_short = |needed: usize| FormatError::TooShort {
            field: ENTRY,
            needed: needed as u64,
            available: bytes.len() as u64,
        };
        let fixed = slice(bytes, 0, FIXED_LEN).ok_or_else(|| too_short(FIXED_LEN))?;
        let u16_at = |at| be16(fixed, at).ok_or_else(|| too_short(FIXED_LEN));
        let u32_at = |at| be32(fixed, at).ok_or_else(|| too_short(FIXED_LEN));
        let u64_at = |at| be64(fixed, at).ok_or_else(|| too_short(FIXED_LEN));

        let extra_len = u32_at(EXTRA_LEN_AT)?;
        if extra_len > limits::SNAPSHOT_EXTRA_DATA_MAX {
            let (value, max) = (extra_len.into(), limits::SNAPSHOT_EXTRA_DATA_MAX.into());
            return Err(FormatError::OutOfRange {
                field: Field::new("snapshot's extra data size"),
                value,
                min: 0,
                max,
            });
        }
        let (id_len, name_len) = (usize::from(u16_at(12)?), usize::from(u16_at(14)?));
        let id_at = FIXED_LEN + extra_len as usize;
        let name_at = id_at + id_len;
        let end = name_at + name_len;
        let extra = slice(bytes, FIXED_LEN, extra_len as usize).ok_or_else(|| too_short(end))?;
        let snapshot = Self {
            l1_table_offset: HostOffset::new(u64_at(0)?),
            l1_size: u32_at(8)?,
            id: slice(bytes, id_at, id_len).ok_or_else(|| too_short(end))?.to_vec(),
            name: slice(bytes, name_at, name_len).ok_or_else(|| too_short(end))?.to_vec(),
            date_sec: u32_at(16)?,
            date_nsec: u32_at(20)?,
            vm_clock_nsec: u64_at(24)?,
            vm_state_size: be64(extra, 0).unwrap_or(u32_at(32)?.into()),
            disk_size: be64(extra, 8),
            icount: be64(extra, 16),
            unknown_extra: unknown_extra(extra).to_vec(),
        };
        snapshot.check(geometry)?;
        Ok((snapshot, end.next_multiple_of(8).min(bytes.len())))
    }

    /// Whether the entry has what its version asks for: in version 3 that is the disk size. QEMU opens an image whose
    /// entries lack it (the disk's current size stands in), and its check calls that a corruption.
    #[must_use]
    pub fn is_complete(&self, geometry: &Geometry) -> bool {
        geometry.version < 3 || self.disk_size.is_some()
    }

    /// Gives the entry what version 3 asks for: a disk size (`size`, if there is none), and an instruction count.
    pub fn complete(&mut self, size: u64) {
        self.disk_size.get_or_insert(size);
        self.icount.get_or_insert(u64::MAX);
    }

    /// How much extra data the entry says to have that `bytes` begin with; none if they end before.
    #[must_use]
    pub fn extra_len(bytes: &[u8]) -> Option<u32> {
        be32(bytes, EXTRA_LEN_AT)
    }

    /// Makes that entry say another number.
    pub fn set_extra_len(bytes: &mut [u8], len: u32) {
        if let Some(place) = bytes.get_mut(EXTRA_LEN_AT..EXTRA_LEN_AT + 4) {
            place.copy_from_slice(&len.to_be_bytes());
        }
    }

    /// Parses a table of `count` entries out of `bytes`, which begin at `snapshots_offset` and may go on past the
    /// table; also gives the table's length in bytes.
    ///
    /// # Errors
    /// More than 65536 entries or 64 MiB; `bytes` end before the table does; what [`Snapshot::parse`] says of an entry.
    pub fn parse_table(bytes: &[u8], count: u32, geometry: &Geometry) -> Result<(Vec<Self>, usize), FormatError> {
        check_count(count.into())?;
        // Each entry takes at least its fixed part, so what is there bounds what is allocated.
        let mut snapshots = Vec::with_capacity((count as usize).min(bytes.len() / FIXED_LEN));
        let mut at = 0;
        for index in 0..count {
            let rest = bytes.get(at..).unwrap_or_default();
            if let Some(len) = Self::extra_len(rest).filter(|&len| len > limits::SNAPSHOT_EXTRA_DATA_MAX) {
                return Err(FormatError::SnapshotExtraData { index, len });
            }
            let (snapshot, len) = Self::parse(rest, geometry)?;
            snapshots.push(snapshot);
            at += len;
            if at as u64 > limits::SNAPSHOT_TABLE_BYTES_MAX {
                return Err(FormatError::SnapshotTableTooLong { overhanging: count - index });
            }
        }
        Ok((snapshots, at))
    }

    /// Appends the entry, padded to 8 bytes.
    ///
    /// # Errors
    /// An ID or a name over 65535 bytes, too much extra data, fields of the extra data that do not follow one another,
    /// or no disk size in version 3; what parsing would refuse of the L1 table.
    pub fn encode(&self, geometry: &Geometry, out: &mut Vec<u8>) -> Result<(), FormatError> {
        self.check(geometry)?;
        let extra = self.encode_extra(geometry)?;
        let start = out.len();
        out.extend_from_slice(&self.l1_table_offset.get().to_be_bytes());
        out.extend_from_slice(&self.l1_size.to_be_bytes());
        out.extend_from_slice(&string_len("snapshot's ID length", &self.id)?.to_be_bytes());
        out.extend_from_slice(&string_len("snapshot's name length", &self.name)?.to_be_bytes());
        out.extend_from_slice(&self.date_sec.to_be_bytes());
        out.extend_from_slice(&self.date_nsec.to_be_bytes());
        out.extend_from_slice(&self.vm_clock_nsec.to_be_bytes());
        // Readers that know the extra data take the 64-bit number from there; for others QEMU, too, gives 0 when the
        // size does not fit.
        out.extend_from_slice(&u32::try_from(self.vm_state_size).unwrap_or(0).to_be_bytes());
        let extra_len = u32::try_from(extra.len()).unwrap_or(u32::MAX);
        out.extend_from_slice(&extra_len.to_be_bytes());
        out.extend_from_slice(&extra);
        out.extend_from_slice(&self.id);
        out.extend_from_slice(&self.name);
        let padded = (out.len() - start).next_multiple_of(8);
        out.resize(start + padded, 0);
        Ok(())
    }

    /// The whole table.
    ///
    /// # Errors
    /// More than 65536 entries or 64 MiB; what [`Snapshot::encode`] says of an entry.
    pub fn encode_table(snapshots: &[Self], geometry: &Geometry) -> Result<Vec<u8>, FormatError> {
        check_count(snapshots.len() as u64)?;
        let mut out = Vec::new();
        for snapshot in snapshots {
            snapshot.encode(geometry, &mut out)?;
            check_table_len(out.len() as u64)?;
        }
        Ok(out)
    }

    fn encode_extra(&self, geometry: &Geometry) -> Result<Vec<u8>, FormatError> {
        if !self.is_complete(geometry) {
            return Err(FormatError::Inconsistent { field: ENTRY, problem: "version 3 needs the disk size" });
        }
        let gap = (self.disk_size.is_none() && self.icount.is_some())
            || (self.icount.is_none() && !self.unknown_extra.is_empty());
        if gap {
            let problem = "a field of the extra data is missing before another";
            return Err(FormatError::Inconsistent { field: ENTRY, problem });
        }
        let numbers = [Some(self.vm_state_size), self.disk_size, self.icount];
        let mut extra: Vec<u8> = numbers.into_iter().flatten().flat_map(u64::to_be_bytes).collect();
        extra.extend_from_slice(&self.unknown_extra);
        if extra.len() as u64 > limits::SNAPSHOT_EXTRA_DATA_MAX.into() {
            let (value, max) = (extra.len() as u64, limits::SNAPSHOT_EXTRA_DATA_MAX.into());
            return Err(FormatError::OutOfRange {
                field: Field::new("snapshot's extra data size"),
                value,
                min: 0,
                max,
            });
        }
        Ok(extra)
    }

    fn check(&self, geometry: &Geometry) -> Result<(), FormatError> {
        let max = limits::L1_TABLE_BYTES_MAX / 8;
        if u64::from(self.l1_size) > max {
            let field = Field::new("snapshot's l1_size");
            return Err(FormatError::OutOfRange { field, value: self.l1_size.into(), min: 0, max });
        }
        if self.l1_size == 0 && geometry.cluster_bits.is_aligned(self.l1_table_offset.get()) {
            return Ok(());
        }
        let len = u64::from(self.l1_size) * 8;
        metadata_offset("snapshot's l1_table_offset", self.l1_table_offset.get(), len, geometry.cluster_bits)
            .map(|_| ())
    }
}

/// What follows the three numbers that are known. A part of one of them means nothing and is not kept.
fn unknown_extra(extra: &[u8]) -> &[u8] {
    extra.get(24..).unwrap_or_default()
}

fn string_len(name: &'static str, string: &[u8]) -> Result<u16, FormatError> {
    let value = string.len() as u64;
    u16::try_from(string.len()).map_err(|_| FormatError::OutOfRange {
        field: Field::new(name),
        value,
        min: 0,
        max: u16::MAX.into(),
    })
}

fn check_count(count: u64) -> Result<(), FormatError> {
    let max = limits::SNAPSHOTS_MAX.into();
    if count > max {
        return Err(FormatError::OutOfRange { field: Field::at("nb_snapshots", 60), value: count, min: 0, max });
    }
    Ok(())
}

fn check_table_len(len: u64) -> Result<(), FormatError> {
    if len > limits::SNAPSHOT_TABLE_BYTES_MAX {
        let max = limits::SNAPSHOT_TABLE_BYTES_MAX;
        return Err(FormatError::OutOfRange { field: TABLE, value: len, min: 0, max });
    }
    Ok(())
}

#[cfg(test)]
#[path = "snapshot_test.rs"]
mod tests;
