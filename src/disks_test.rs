use super::*;
use cowhand_block::Format;

#[test]
fn default_ids_count_as_linux_does() {
    let ids: Vec<_> = [0, 1, 25, 26, 27, 701, 702].into_iter().map(default_id).collect();
    assert_eq!(ids, ["vda", "vdb", "vdz", "vdaa", "vdab", "vdzz", "vdaaa"]);
}

fn raw(dir: &std::path::Path, name: &str) -> DiskSpec {
    let path = dir.join(name);
    std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    DiskSpec::new(&path, Format::Raw)
}

#[test]
fn disks_get_a_queue_for_each_cpu_unless_told_otherwise() {
    let dir = tempfile::tempdir().unwrap();
    let mut two = raw(dir.path(), "two");
    two.queues = Some(2);
    let disks = Disks::open(&[raw(dir.path(), "one"), two], &[], 3).unwrap_or_else(|f| panic!("{}", f.message));
    let queues: Vec<_> = disks.sources.iter().map(|source| source.options.queues).collect();
    assert_eq!(queues, [3, 2]);
    assert!(disks.close().is_ok());
}

#[test]
fn the_same_id_twice_is_a_usage_error_and_leaves_nothing_locked() {
    let dir = tempfile::tempdir().unwrap();
    let mut second = raw(dir.path(), "second");
    second.id = Some("vda".into());
    let first = raw(dir.path(), "first");
    assert_eq!(Disks::open(&[first.clone(), second], &[], 1).err().unwrap().status, EXIT_USAGE);
    let disks = Disks::open(&[first], &[], 1).unwrap_or_else(|f| panic!("{}", f.message));
    assert!(disks.close().is_ok());
}
