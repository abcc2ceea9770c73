//! The table of an image's internal snapshots, as people read it.

use chrono::{DateTime, Local};
use cowhand_block::SnapshotInfo;

use super::units::human;

/// A line of titles, and one for each snapshot. Dates are shown in the local time.
pub(crate) fn table(snapshots: &[SnapshotInfo]) -> String {
    let mut out = row(["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"]);
    for snapshot in snapshots {
        let date = i64::try_from(snapshot.date.as_secs()).ok().and_then(|seconds| DateTime::from_timestamp(seconds, 0));
        let date = date.map(|date| date.with_timezone(&Local).format("%Y-%m-%d %H:%M:%S").to_string());
        let seconds = snapshot.vm_clock.as_secs();
        let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
        let clock = format!("{hours:04}:{minutes:02}:{:02}.{:03}", seconds % 60, snapshot.vm_clock.subsec_millis());
        let icount = snapshot.icount.map_or("--".to_string(), |icount| icount.to_string());
        let size = human(snapshot.vm_state_size);
        // As C has it, strings end before a zero.
        let [id, name] = [&snapshot.id, &snapshot.name].map(|text| text.split('\0').next().unwrap_or_default());
        out.push_str(&row([id, name, &size, &date.unwrap_or_default(), &clock, &icount]));
    }
    out
}

fn row([id, tag, size, date, clock, icount]: [&str; 6]) -> String {
    format!("{id:<7} {tag:<16} {size:>8} {date:>19} {clock:>15} {icount:>10}\n")
}
