//! `-l`: a disk as it was in one of its internal snapshots.

use std::sync::Arc;

use cowhand_block::{Disk, ErrorKind};

use super::options::Options;
use super::{Context, Failure};

/// Has a disk show what it was in the snapshot that has this ID or, if none has, this name; or in the one that
/// `snapshot.id=…,snapshot.name=…` names.
pub(super) fn view(disk: &Arc<Disk>, which: &str, cx: &Context) -> Result<(), Failure> {
    let failed = |reason: &str| Failure::new(format!("Failed to load snapshot: {reason}"));
    let in_words = |error: cowhand_block::Error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::Unsupported => failed("Can't find snapshot"),
        _ => failed(&error.reason()),
    };
    if !which.starts_with("snapshot.") {
        let (id, name) = (which.to_string(), which.to_string());
        return match disk.view_snapshot(move |snapshot| snapshot.id == id) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                disk.view_snapshot(move |snapshot| snapshot.name == name).map_err(in_words)
            }
            viewed => viewed.map_err(in_words),
        };
    }
    let failed = |reason: String| {
        cx.error(&reason);
        Failure::new(format!("Failed in parsing snapshot param '{which}'"))
    };
    let options = Options::parse(&[which.to_string()]).map_err(failed)?;
    if let Some(key) = options.unknown(&["snapshot.id", "snapshot.name"]) {
        return Err(failed(format!("Invalid parameter '{key}'")));
    }
    let of = |key| options.get(key).map(String::from);
    let (id, name) = (of("snapshot.id"), of("snapshot.name"));
    let fits = |wanted: &Option<String>, has: &str| wanted.as_deref().is_none_or(|wanted| wanted == has);
    disk.view_snapshot(move |snapshot| fits(&id, &snapshot.id) && fits(&name, &snapshot.name)).map_err(in_words)
}
