use std::path::Path;

use cowhand_qcow2::CreateParams;

use super::*;
use crate::chain::OpenPolicy;
use crate::io::Storage;
use crate::io::sim::World;
use crate::qcow2::create::{Preallocation, create_image};
use crate::request::{RequestQueue, Wait};
use crate::spec::{DiskSpec, Format};

const BIG: u64 = 8 << 20;

/// What it is, its size, what is written to it, and what is found, strictly too.
type Case = (&'static str, u64, &'static [(u64, usize, u8)], Verdict, Verdict);

fn disk(storage: &Arc<dyn Storage>, name: &str, size: u64, writes: &[(u64, usize, u8)]) -> Arc<Disk> {
    create_image(storage, Path::new(name), &CreateParams::new(size), Preallocation::Off).unwrap();
    let policy = OpenPolicy { storage: storage.clone(), ..OpenPolicy::host() };
    let disk = Disk::open(&DiskSpec::new(Path::new(name), Format::Qcow2), &policy).unwrap();
    let mut queue = disk.queue().unwrap();
    for &(offset, len, byte) in writes {
        let mut buffer = Buffer::zeroed(len);
        buffer.fill(byte);
        queue.submit(0, Request::Write { offset, data: vec![buffer.seg(0, len)] });
        queue.wait(Wait::Block, &mut Vec::new()).unwrap();
    }
    drop(queue);
    disk
}

#[test]
fn the_first_difference_counts() {
    let storage: Arc<dyn Storage> = Arc::new(World::orderly());

    let one = disk(&storage, "/1", BIG, &[(0, 1 << 20, 1), (5 << 20, 65536, 1)]);
    let cases: [Case; 7] = [
        ("same", BIG, &[(0, 1 << 20, 1), (5 << 20, 65536, 1)], Verdict::Same, Verdict::Same),
        (
            "data",
            BIG,
            &[(0, 1 << 20, 1), (1024, 512, 2), (5 << 20, 65536, 2)],
            Verdict::Content(1024),
            Verdict::Content(1024),
        ),
        ("missing", BIG, &[(0, 1 << 20, 1)], Verdict::Content(5 << 20), Verdict::Allocation(5 << 20)),
        (
            "zeros",
            BIG,
            &[(0, 1 << 20, 1), (2 << 20, 65536, 0), (5 << 20, 65536, 1)],
            Verdict::Same,
            Verdict::Allocation(2 << 20),
        ),
        ("larger", BIG + 512, &[(0, 1 << 20, 1), (5 << 20, 65536, 1)], Verdict::Same, Verdict::Size),
        (
            "data behind",
            BIG + 4096,
            &[(0, 1 << 20, 1), (5 << 20, 65536, 1), (BIG + 1024, 512, 1)],
            Verdict::Content(BIG + 1024),
            Verdict::Size,
        ),
        ("smaller", 1 << 20, &[(0, 1 << 20, 1)], Verdict::Content(5 << 20), Verdict::Size),
    ];
    for (index, (what, size, writes, lax, strict)) in cases.into_iter().enumerate() {
        let other = disk(&storage, &format!("/other{index}"), size, writes);
        for (a, b) in [(&one, &other), (&other, &one)] {
            assert_eq!(compare(a, b, false, None).unwrap(), lax, "{what}");
            assert_eq!(compare(a, b, true, None).unwrap(), strict, "{what}, strictly");
        }
    }
}
