use cowhand_qcow2::{CompressedRange, CreateParams, HostOffset};

use super::*;

const CLUSTER: u64 = 65536;
const SIZE: u64 = 1 << 30;
const SLICE: u64 = 512;

fn geometry(params: CreateParams) -> Geometry {
    params.header().unwrap().geometry()
}

fn plain() -> Geometry {
    geometry(CreateParams::new(SIZE))
}

fn data(cluster: u64) -> Stored {
    Stored::data(HostOffset::new(cluster * CLUSTER)).unwrap()
}

fn zero() -> Stored {
    Stored::zero(&plain(), None, false).unwrap()
}

fn noted(geometry: &Geometry, first: u64, entries: &[Stored], room: usize) -> (Vec<Record>, usize) {
    let entries = entries.iter().map(|&stored| (stored, stored.decode(geometry).unwrap().0));
    records(geometry, first, entries, room)
}

fn parse(record: Record) -> Result<Entries, &'static str> {
    Entries::parse(record, &plain(), SIZE, SLICE)
}

/// What records say, entry by entry.
fn told(geometry: &Geometry, records: &[Record]) -> Vec<(u64, u64)> {
    let parsed = records.iter().map(|record| Entries::parse(*record, geometry, SIZE, SLICE).unwrap());
    parsed.flat_map(|run| (0..run.count).map(move |i| (run.first + i, run.entry(i).entry))).collect()
}

#[test]
fn clusters_that_follow_each_other_are_one_record() {
    let entries = [data(10), data(11), data(12), data(14), zero(), zero(), Stored::default(), Stored::default()];
    let (records, count) = noted(&plain(), 7, &entries, 100);
    assert_eq!((records.len(), count), (4, 8));
    let expected: Vec<_> = (7..).zip(entries.iter().map(|stored| stored.entry)).collect();
    assert_eq!(told(&plain(), &records), expected);
}

#[test]
fn what_there_is_no_room_for_is_not_noted() {
    let entries = [data(10), data(11), data(20), data(30), data(31)];
    for (room, expected) in [(0, 0), (1, 2), (2, 3), (3, 5), (4, 5)] {
        let (records, count) = noted(&plain(), 0, &entries, room);
        assert_eq!((records.len(), count), (room.min(3), expected), "room for {room}");
    }
}

#[test]
fn compressed_clusters_are_a_record_each() {
    let range = |at| CompressedRange { host: HostOffset::new(at), len: 512 };
    let entries = [range(CLUSTER * 9), range(CLUSTER * 9)].map(|range| Stored::compressed(&plain(), range).unwrap());
    let (records, _) = noted(&plain(), 3, &entries, 100);
    assert_eq!(records.len(), 2);
    assert_eq!(told(&plain(), &records), [(3, entries[0].entry), (4, entries[1].entry)]);
}

#[test]
fn subclusters_are_kept_and_end_a_run() {
    let extended = geometry(CreateParams { extended_l2: true, ..CreateParams::new(SIZE) });
    let part = Stored { bitmap: SubclusterBitmap::from_raw(5), ..data(11) };
    let (records, _) = noted(&extended, 0, &[data(10), part, data(12), data(13)], 100);
    assert_eq!(records.len(), 3);
    assert_eq!(records[1][3], 5);
    assert_eq!(Entries::parse(records[1], &extended, SIZE, 256).unwrap().entry(0), part);
}

#[test]
fn part_of_a_run_has_its_entries() {
    let run = parse([5, 10, data(20).entry, 0]).unwrap();
    let part = run.part(4, 3);
    assert_eq!((part.first, part.count), (9, 3));
    assert_eq!(part.entry(2), run.entry(6));
    assert_eq!(part.entry(2).entry, data(26).entry);
}

#[test]
fn records_that_cannot_be_are_refused() {
    let host = data(20).entry;
    let compressed =
        Stored::compressed(&plain(), CompressedRange { host: HostOffset::new(CLUSTER), len: 512 }).unwrap();
    let clusters = SIZE / CLUSTER;
    let wrongs: [(Record, &str); 12] = [
        ([0, 0, host, 0], "past the end of the disk"),
        ([clusters, 1, host, 0], "past the end of the disk"),
        ([clusters - 1, 2, host, 0], "past the end of the disk"),
        ([1, u64::MAX, host, 0], "past the end of the disk"),
        ([u64::MAX, 1, host, 0], "past the end of the disk"),
        ([SLICE - 1, 2, host, 0], "spans tables"),
        ([0, 1, host | 2, 0], "reserved bits"),
        ([0, 1, host | 1 << 60, 0], "reserved bits"),
        ([0, 1, host + 512, 0], "breaks the format's rules"),
        ([0, 2, (1 << 56) - CLUSTER, 0], "breaks the format's rules"),
        ([0, 2, compressed.entry, 0], "compressed"),
        ([0, 1, 1 << 62, 0], "breaks the format's rules"),
    ];
    for (record, what) in wrongs {
        let error = parse(record).unwrap_err();
        assert!(error.contains(what), "{record:x?}: {error}");
    }
}

#[test]
fn format_decides_what_an_entry_may_say() {
    let refused = |params: CreateParams, record| Entries::parse(record, &geometry(params), SIZE, 256).is_err();
    let old = CreateParams { version: 2, ..CreateParams::new(SIZE) };
    assert!(refused(old, [0, 1, zero().entry, 0]));
    let extended = CreateParams { extended_l2: true, ..CreateParams::new(SIZE) };
    // Both allocated and zero; allocated without a place.
    assert!(refused(extended.clone(), [0, 1, data(20).entry, 1 << 32 | 1]));
    assert!(refused(extended.clone(), [0, 1, 0, 1]));
    assert!(!refused(extended, [0, 1, data(20).entry, 1 << 33 | 1]));
    let external = CreateParams { data_file: Some(b"data".to_vec()), ..CreateParams::new(SIZE) };
    assert!(refused(external.clone(), [3, 1, data(4).entry, 0]));
    assert!(!refused(external, [3, 2, data(3).entry, 0]));
}
