//! Which files an image's header may name, and where its names lead.

use std::path::{Path, PathBuf};

use super::OpenPolicy;
use crate::error::{Error, ErrorKind, Result};

/// Where the name of another file in a header leads: relative to the directory of the image's path as given, and only where it is allowed.
pub(crate) fn referenced_path(what: &str, name: &[u8], image: &Path, policy: &OpenPolicy) -> Result<PathBuf> {
    let refuse = |message: String| Error::new(ErrorKind::Refused, message).at_path(image);
    let shown = String::from_utf8_lossy(name).into_owned();
    let Some(path) = named_file(name, image) else {
        return Err(refuse(format!("its {what} '{shown}' is not a plain file, which is all that cowhand opens")));
    };
    allowed(what, &path, image, policy)?;
    Ok(path)
}

/// Whether the file at `path`, which the image at `image` names, may be opened.
pub(super) fn allowed(what: &str, path: &Path, image: &Path, policy: &OpenPolicy) -> Result<()> {
    let refuse = |message: String| Error::new(ErrorKind::Refused, message).at_path(image);
    let dir = directory_of(image);
    let canonical = policy.storage.canonical(path).map_err(|e| {
        Error::io(format!("Could not open {what}: Could not open '{}'", path.display()), e).at_path(image)
    })?;
    let allowed = if policy.allow_dirs.is_empty() { vec![dir.to_path_buf()] } else { policy.allow_dirs.clone() };
    let inside = |dir: &PathBuf| policy.storage.canonical(dir).is_ok_and(|dir| canonical.starts_with(dir));
    if allowed.iter().any(inside) {
        return Ok(());
    }
    let message = format!(
        "its {what} {} lies outside the allowed directories; allow it with --allow-dir {}",
        canonical.display(),
        canonical.parent().unwrap_or(Path::new("/")).display()
    );
    Err(refuse(message))
}

/// The file that a name in the header of the image at `image` means; none if it is no plain file's.
pub(crate) fn named_file(name: &[u8], image: &Path) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    let plain = match name.strip_prefix(b"file:") {
        Some(rest) => rest,
        // As in QEMU, a colon before any slash makes it a protocol's name.
        None if name.split(|&b| b == b'/').next().is_some_and(|first| first.contains(&b':')) => return None,
        None => name,
    };
    // Without a dot before it where the image's name has no directory, as QEMU shows it.
    Some(image.parent().unwrap_or(Path::new("")).join(std::ffi::OsStr::from_bytes(plain)))
}

/// The directory that a file lies in, by its path as given.
pub(crate) fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
