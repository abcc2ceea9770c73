//! Images made to keep a check busy for ever, or to exhaust its memory, and images of which only the header is not noise.

use std::fs;
use std::time::{Duration, Instant};

use super::check_test::ours;
use super::dice;
use super::image::{Shape, make};
use super::qemu::{self, text};
use crate::check::Repair;

fn put(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

fn number(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[test]
fn one_l2_table_that_a_million_l1_entries_name_is_walked_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", text(&path), "500T"]);
    qemu::io(&path, &["write -q 0 64k".into()]);
    let mut image = fs::read(&path).unwrap();
    let (l1, entries) = (number(&image, 40) as usize, 1_000_000);
    let first = number(&image, l1);
    for index in 0..entries {
        put(&mut image, l1 + index * 8, first);
    }
    let l2 = (first & 0x00ff_ffff_ffff_fe00) as usize;
    let data = number(&image, l2);
    for index in 0..8192 {
        put(&mut image, l2 + index * 8, data);
    }
    fs::write(&path, &image).unwrap();
    let start = Instant::now();
    let (report, _) = ours(&path, Repair::All).unwrap();
    assert!(report.corruptions > 0 || report.corruptions_fixed > 0);
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
}

#[test]
fn snapshots_that_share_an_l1_table_are_not_walked_each() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", text(&path), "1T"]);
    let mut image = fs::read(&path).unwrap();
    // 10000 entries of 56 bytes, all with the active L1 table as theirs.
    let table = image.len().next_multiple_of(4096);
    let (l1, l1_size) = (number(&image, 40), image[36..40].to_vec());
    image.resize(table, 0);
    for _ in 0..10_000 {
        let mut entry = [0; 56];
        put(&mut entry, 0, l1);
        entry[8..12].copy_from_slice(&l1_size);
        entry[39] = 16;
        image.extend(entry);
    }
    image[60..64].copy_from_slice(&10_000u32.to_be_bytes());
    put(&mut image, 64, table as u64);
    fs::write(&path, &image).unwrap();
    let start = Instant::now();
    let (report, _) = ours(&path, Repair::None).unwrap();
    assert!(report.corruptions >= 10_000 && report.unreadable >= 10_000);
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
}

#[test]
fn a_disk_of_exbibytes_with_next_to_nothing_in_its_file_is_quickly_checked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", text(&path), "100G"]);
    // Fifteen TiB of nothing.
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(15 << 40).unwrap();
    let start = Instant::now();
    let (report, _) = ours(&path, Repair::All).unwrap();
    assert!(report.is_clean());
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
}

#[test]
fn noise_behind_a_header_is_checked_and_repaired_without_harm_to_the_checker() {
    let mut rng = dice("noise");
    for cluster in [512, 4096] {
        let dir = tempfile::tempdir().unwrap();
        let made = make(dir.path(), &Shape { snapshot: true, ..Shape::new(cluster) }, &mut rng);
        let sound = fs::read(&made.path).unwrap();
        for round in 0..20 {
            let mut image = sound.clone();
            for at in (cluster as usize..image.len()).step_by(8) {
                // Noise, or offsets that make sense, with a hole here and there.
                let value = match (round % 4, rng.below(4)) {
                    (0, _) => rng.next_u64(),
                    (_, 0) => rng.next_u64(),
                    (_, 1) => rng.below(image.len() as u64 / cluster + 9) * cluster,
                    (_, 2) => 1 << 63 | (rng.below(image.len() as u64 / cluster + 9) * cluster),
                    _ => 0,
                };
                if !rng.one_in(3) {
                    let end = (at + 8).min(image.len());
                    image[at..end].copy_from_slice(&value.to_be_bytes()[..end - at]);
                }
            }
            fs::write(&made.path, &image).unwrap();
            // Whatever it says: it ends, and does not panic.
            let _ = ours(&made.path, Repair::Leaks);
            let _ = ours(&made.path, Repair::All);
            let _ = ours(&made.path, Repair::All);
        }
    }
}
