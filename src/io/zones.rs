//! Commands for zoned block devices, which neither raw files nor images are: all of them say so.

use super::command::{Command, Needs};
use super::session::{Outcome, Session};

pub(crate) const COMMANDS: &[&Command] = &[
    &zoned("zone_report", "zrp", "offset number", "report zone information"),
    &zoned("zone_open", "zo", "offset len", "explicit open a range of zones in zone block device"),
    &zoned("zone_close", "zc", "offset len", "close a range of zones in zone block device"),
    &zoned("zone_finish", "zf", "offset len", "finish a range of zones in zone block device"),
    &zoned("zone_reset", "zrs", "offset len", "reset a zone write pointer in zone block device"),
    &Command {
        words: (3, Some(4)),
        ..zoned("zone_append", "zap", "offset len [len..]", "append write a number of bytes at a specified offset")
    },
];

const fn zoned(name: &'static str, short: &'static str, takes: &'static str, does: &'static str) -> Command {
    Command {
        name,
        short: Some(short),
        takes: Some(takes),
        does,
        more: "",
        words: (2, Some(2)),
        needs: Needs::Disk,
        run: not_zoned,
    }
}

fn not_zoned(session: &mut Session, command: &'static Command, words: &[String]) -> Outcome {
    for word in words.iter().skip(1) {
        session.size(word)?;
    }
    session.fail(&format!("{} failed: Operation not supported", command.name.replace('_', " ")))
}
