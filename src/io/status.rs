//! Looking at what is open: where it has data, how large it is, what the image says of itself.

use std::ops::Range;

use cowhand_block::protocol::Protocol;
use cowhand_block::{Content, DiskSpec, Extents, Format, inspect};

use super::command::{Command, Needs};
use super::number::amount;
use super::session::{Failed, Outcome, Session};
use crate::img::info::qcow2_tree;

pub(crate) const COMMANDS: &[&Command] = &[&ALLOC, &MAP, &LENGTH, &INFO];

static ALLOC: Command = Command {
    name: "alloc",
    short: Some("a"),
    takes: Some("offset [count]"),
    does: "checks if offset is allocated in the file",
    more: "",
    words: (1, Some(2)),
    needs: Needs::Disk,
    run: alloc,
};

static MAP: Command = Command {
    name: "map",
    short: None,
    takes: Some(""),
    does: "prints the allocated areas of a file",
    more: "",
    words: (0, Some(0)),
    needs: Needs::Disk,
    run: map,
};

static LENGTH: Command = Command {
    name: "length",
    short: Some("l"),
    takes: None,
    does: "gets the length of the current file",
    more: "",
    words: (0, Some(0)),
    needs: Needs::Disk,
    run: |session, _, _| {
        let size = session.disk()?.disk.size();
        session.say(&amount(size as f64));
        Ok(())
    },
};

static INFO: Command = Command {
    name: "info",
    short: Some("i"),
    takes: None,
    does: "prints information about the current file",
    more: "",
    words: (0, Some(0)),
    needs: Needs::Disk,
    run: info,
};

/// What the topmost layer has and has not, one range after the other.
struct Allocation {
    extents: Extents,
    next: Option<(Range<u64>, bool)>,
}

impl Iterator for Allocation {
    type Item = cowhand_block::Result<(Range<u64>, bool)>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut found = self.next.take();
        for extent in &mut self.extents {
            let extent = match extent {
                Ok(extent) => extent,
                Err(error) => return Some(Err(error)),
            };
            let has = extent.depth == 0 && extent.content != Content::Nothing;
            match &mut found {
                None => found = Some((extent.range, has)),
                Some((range, same)) if *same == has => range.end = extent.range.end,
                Some(_) => {
                    self.next = Some((extent.range, has));
                    return found.map(Ok);
                }
            }
        }
        found.map(Ok)
    }
}

impl Session {
    fn allocation(&mut self, range: Range<u64>) -> Outcome<Allocation> {
        match self.disk()?.disk.extents(range) {
            Ok(extents) => Ok(Allocation { extents, next: None }),
            Err(error) => self.error(&error.to_string()),
        }
    }
}

fn alloc(session: &mut Session, _: &'static Command, words: &[String]) -> Outcome {
    let offset = session.size(&words[1])?;
    let count = words.get(2).map_or(Ok(512), |word| session.size(word))?;
    let size = session.disk()?.disk.size();
    let end = offset.saturating_add(count).min(size);
    let mut allocated = 0;
    if offset < end {
        for part in session.allocation(offset..end)? {
            match part {
                Ok((range, has)) => allocated += if has { range.end - range.start } else { 0 },
                Err(error) => return session.fail(&format!("is_allocated failed: {}", error.strerror())),
            }
        }
    }
    let count = end.saturating_sub(offset);
    session.say(&format!("{allocated}/{count} bytes allocated at offset {}", amount(offset as f64)));
    Ok(())
}

fn map(session: &mut Session, _: &'static Command, _: &[String]) -> Outcome {
    let size = session.disk()?.disk.size();
    for part in session.allocation(0..size)? {
        let (range, has) = match part {
            Ok(part) => part,
            Err(error) => return session.error(&format!("Failed to get allocation status: {}", error.strerror())),
        };
        let len = range.end - range.start;
        let what = if has { "    allocated" } else { "not allocated" };
        let (len_shown, start_shown) = (amount(len as f64), amount(range.start as f64));
        let start = range.start;
        session.say(&format!("{len_shown} ({len:#x}) bytes {what} at offset {start_shown} ({start:#x})"));
    }
    Ok(())
}

fn info(session: &mut Session, _: &'static Command, _: &[String]) -> Outcome {
    let policy = session.setup.policy().clone();
    let spec = session.disk()?.disk.spec().clone();
    let layers = session.disk()?.disk.layers();
    let format = layers.first().map_or(spec.format, |layer| layer.format);
    let name = if spec.ephemeral { format.name() } else { spec.driver() };
    session.say(&format!("format name: {name}"));
    if spec.bare.is_some() && !spec.ephemeral {
        // As the format and as the protocol.
        session.say(&format!("format name: {name}"));
    }
    if format == Format::Raw && !spec.ephemeral && matches!(spec.protocol, Protocol::Null(_)) {
        return Err(Failed);
    }
    if format == Format::Raw {
        session.say("cluster size: 0 bytes\nvm state offset: 0 bytes");
        return Ok(());
    }
    if spec.ephemeral {
        // The overlay has no name by which it could be opened once more; all of them are made alike.
        session.say("cluster size: 64 KiB\nthe image is a throw-away overlay");
        return Ok(());
    }
    // It is locked already.
    let qcow2 = match inspect(&DiskSpec { lock: false, ..spec }, &policy) {
        Ok(info) => info.qcow2,
        Err(error) => return session.error(&error.reason()),
    };
    if let Some(qcow2) = qcow2 {
        let geometry = qcow2.header.geometry();
        let vm_state = qcow2.header.l1_entries_needed().saturating_mul(geometry.l2_coverage());
        session.say(&format!("cluster size: {}", amount(geometry.cluster_bits.size() as f64)));
        session.say(&format!("vm state offset: {}\nFormat specific information:", amount(vm_state as f64)));
        session.out.print(&qcow2_tree(&qcow2).human(1));
    }
    Ok(())
}
