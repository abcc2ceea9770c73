//! QEMU's words for what is wrong with an image's header.
//!
//! Scripts look for them in what `qemu-img` prints. They name neither the field nor its value; the error's own message
//! does.

use std::borrow::Cow;

use crate::error::{Field, FormatError};

impl FormatError {
    /// What QEMU says of the same damage, word for word, if it has words for it.
    #[must_use]
    pub fn brief(&self) -> Option<Cow<'static, str>> {
        let words = match self {
            Self::NotQcow2 => "Image is not in qcow2 format",
            Self::UnsupportedVersion { version } => return Some(format!("Unsupported qcow2 version {version}").into()),
            Self::UnknownFeatures { names, .. } => {
                return Some(format!("Unsupported qcow2 feature(s): {names}").into());
            }
            Self::UnknownValue { field, value, .. } => return unknown_value(*field, *value),
            Self::Inconsistent { field, problem } if field.name() == "crypt_method" && problem.starts_with("LUKS") => {
                "Missing CRYPTO header for crypt method 2"
            }
            Self::SnapshotExtraData { index, .. } => {
                return Some(
                    format!(
                        "Too much extra metadata in snapshot table entry {index}\nYou can force-remove this extra metadata with \
                         qemu-img check -r all"
                    )
                    .into(),
                );
            }
            Self::SnapshotTableTooLong { overhanging } => {
                return Some(
                    format!(
                        "Snapshot table is too big\nYou can force-remove all {overhanging} overhanging snapshots with qemu-img \
                         check -r all"
                    )
                    .into(),
                );
            }
            Self::L1TooSmall { needed, .. } if *needed > i32::MAX as u64 => "Image is too big",
            Self::L1TooSmall { .. } => "L1 table is too small",
            Self::TooShort { field, .. } => too_short(*field)?,
            Self::OutOfRange { field, value, max, .. } => return out_of_range(*field, *value, *max),
            Self::Misaligned { field, .. } | Self::OutsideFile { field, .. } | Self::InsideHeader { field, .. } => {
                misplaced(*field)?
            }
            _ => return None,
        };
        Some(words.into())
    }
}

fn unknown_value(field: Field, value: u64) -> Option<Cow<'static, str>> {
    match field.name() {
        "crypt_method" => Some(format!("Unsupported encryption method {value}").into()),
        "compression_type" => Some(format!("qcow2: unknown compression type: {value}").into()),
        _ => None,
    }
}

fn too_short(field: Field) -> Option<&'static str> {
    field.name().ends_with("extension").then_some("Header extension too large")
}

fn out_of_range(field: Field, value: u64, max: u64) -> Option<Cow<'static, str>> {
    let words = match field.name() {
        "cluster_bits" => return Some(format!("Unsupported cluster size: 2^{value}").into()),
        "header_length" if value > max => "qcow2 header exceeds cluster size",
        "header_length" => "qcow2 header too short",
        "backing_file_size" => "Backing file name too long",
        "backing_file_offset" => "Invalid backing file offset",
        "refcount_order" => "Reference count entry width too large; may not exceed 64 bits",
        "refcount_table_clusters" if value == 0 => "Image does not contain a reference count table",
        "refcount_table_clusters" => "Reference count table too large",
        "nb_snapshots" => "Snapshot table too large",
        "l1_size" => "Active L1 table too large",
        "snapshot's l1_size" => "Snapshot L1 table too large",
        "size" => "The image size is too large for file format 'qcow2' (try using a larger cluster size)",
        _ => misplaced(field)?,
    };
    Some(words.into())
}

/// A table that lies where none can.
fn misplaced(field: Field) -> Option<&'static str> {
    match field.name() {
        "l1_table_offset" => Some("Active L1 table offset invalid"),
        "refcount_table_offset" => Some("Reference count table offset invalid"),
        "snapshot's l1_table_offset" => Some("Snapshot L1 table offset invalid"),
        "snapshots_offset" => Some("Snapshot table offset invalid"),
        _ => None,
    }
}
