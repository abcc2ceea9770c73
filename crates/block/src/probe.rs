//! Guessing a format from what a file begins with: only for those who asked for it, since who can write the file decides then.

use std::path::Path;
use std::rc::Rc;

use cowhand_qcow2::Header;

use crate::chain::OpenPolicy;
use crate::disk::{block_on, blocking_driver};
use crate::error::{Error, ErrorKind, Result};
use crate::io::File;
use crate::protocol::{self, FileSpec, How};
use crate::queue::Queue;
use crate::spec::{DiskSpec, Format, FormatError};

/// How formats that cowhand does not have begin: name, where, what.
const OTHERS: [(&str, usize, &[u8]); 11] = [
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vpc", 0, b"conectix"),
    ("vhdx", 0, b"vhdxfile"),
    ("vdi", 64, &[0x7f, 0x10, 0xda, 0xbe]),
    ("qed", 0, b"QED\0"),
    ("qcow", 0, b"QFI\xfb\0\0\0\x01"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
    ("luks", 0, b"LUKS\xba\xbe"),
];

/// How many bytes at a file's start are looked at.
pub(crate) const PROBED: u64 = 512;

/// What the image in `file` seems to be: qcow2, or else raw.
///
/// # Errors
/// The file cannot be opened or read, or is of a format that cowhand does not have.
pub fn probe_format(file: &FileSpec, policy: &OpenPolicy) -> Result<Format> {
    let queue = Queue::new(blocking_driver(&policy.storage)?);
    let task = {
        let (queue, policy, place) = (queue.clone(), policy.clone(), file.clone());
        async move {
            let spec = DiskSpec { readonly: true, lock: false, ..DiskSpec::new(&place.path, Format::Raw) };
            let file = protocol::open(&queue, &place, How { write: false, spec: &spec, policy: &policy }).await?;
            probe(&queue, &place.path, &file).await
        }
    };
    block_on(&queue, task)
}

/// The same, of an open file.
pub(crate) async fn probe(queue: &Rc<Queue>, path: &Path, file: &File) -> Result<Format> {
    let read = queue.read_buffer(file, 0, PROBED as usize).await;
    let first = read.map_err(|e| Error::io("cannot read", e).at_path(path))?;
    match seems(&first) {
        None => Ok(Format::Raw),
        Some("qcow2") => Ok(Format::Qcow2),
        Some(name) => Err(Error::new(ErrorKind::Unsupported, FormatError::Other(name).to_string()).at_path(path)),
    }
}

/// The format of a file that begins so, if it is not raw.
pub(crate) fn seems(first: &[u8]) -> Option<&'static str> {
    let begins =
        |(_, at, magic): &&(&'static str, usize, &[u8])| first.get(*at..).is_some_and(|rest| rest.starts_with(magic));
    let other = OTHERS.iter().find(begins).map(|(name, ..)| *name);
    other.or_else(|| Header::probe(first).then_some(Format::Qcow2.name()))
}

#[cfg(test)]
#[path = "probe_test.rs"]
mod tests;
