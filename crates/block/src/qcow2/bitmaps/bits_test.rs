use super::*;

/// The same by one flag to a granule.
struct Plain(Vec<bool>);

impl Plain {
    fn mark(&mut self, granularity: u64, offset: u64, len: u64) {
        let count = self.0.len() as u64;
        for granule in offset / granularity..(offset + len).div_ceil(granularity).min(count) {
            self.0[granule as usize] = true;
        }
    }
}

fn flags(bits: &Bits) -> Vec<bool> {
    let mut plain = Plain(vec![false; bits.granules() as usize]);
    for range in bits.ranges() {
        plain.mark(1 << bits.granularity_bits, range.start, range.end - range.start);
    }
    plain.0
}

/// Some numbers that look random.
fn numbers(seed: u64) -> impl Iterator<Item = u64> {
    std::iter::successors(Some(seed | 1), |n| {
        Some(n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407))
    })
    .map(|n| n >> 33)
    .skip(1)
}

#[test]
fn marks_set_the_bits_of_what_they_touch_and_no_others() {
    for seed in 0..200 {
        let mut next = numbers(seed);
        let mut below = |n: u64| next.next().unwrap() % n;
        let granularity_bits = 9 + below(4) as u8;
        let size = 512 * (1 + below(3000));
        let bits = Bits::new(granularity_bits, size);
        let mut plain = Plain(vec![false; bits.granules() as usize]);
        for _ in 0..below(12) {
            let (offset, len) = (512 * below(size / 512), 512 * (1 + below(400)));
            bits.mark(offset, len);
            plain.mark(1 << granularity_bits, offset, len);
        }
        assert_eq!(flags(&bits), plain.0, "seed {seed}");
        let ranges = bits.ranges();
        assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start), "{ranges:?}");
        assert!(ranges.iter().all(|range| range.start < range.end && range.end <= size), "{ranges:?}");
        let bytes = bits.part(0, u64::MAX);
        assert_eq!(bytes.len() as u64, bits.data_len());
        let set: Vec<bool> = (0..bits.granules() as usize).map(|i| bytes[i / 8] >> (i % 8) & 1 == 1).collect();
        assert_eq!(set, plain.0, "seed {seed}");
        let again = Bits::new(granularity_bits, size);
        again.load(0, &bytes);
        assert_eq!(again.ranges(), ranges);
        let other_size = 512 * (1 + below(3000));
        let resized = flags(&bits.resized(other_size));
        for (i, set) in resized.iter().enumerate() {
            assert_eq!(*set, plain.0.get(i).copied().unwrap_or(false), "seed {seed}, granule {i}");
        }
    }
}

#[test]
fn a_coarser_and_a_finer_bitmap_take_what_another_has() {
    let fine = Bits::new(9, 10 << 10);
    fine.mark(512, 1);
    fine.mark(9 << 10, 1 << 10);
    let coarse = Bits::new(12, 10 << 10);
    coarse.merge(&fine);
    assert_eq!(coarse.ranges(), [0..4096, 8192..10240]);
    let finer = Bits::new(10, 10 << 10);
    finer.merge(&coarse);
    assert_eq!(finer.ranges(), [0..4096, 8192..10240]);
    finer.clear();
    assert_eq!(finer.ranges(), []);
}

#[test]
fn all_ones_are_known_up_to_the_last_granule_only() {
    let bits = Bits::new(9, 512 * 13);
    bits.set_all();
    assert_eq!(bits.part(0, 100), [0xff, 0x1f]);
    assert!(bits.is_full(0, &bits.part(0, 100)));
    assert!(!bits.is_full(0, &[0xff, 0x0f]));
    assert_eq!(bits.ranges(), std::slice::from_ref(&(0..512 * 13)));
    let loaded = Bits::new(9, 512 * 13);
    loaded.load(0, &[0xff, 0xff]);
    assert_eq!(loaded.part(0, 100), [0xff, 0x1f]);
}

#[test]
fn bits_take_memory_where_they_are_set() {
    // 512 MiB of them.
    let bits = Bits::new(9, 2 << 40);
    let pages = |bits: &Bits| bits.pages.iter().filter(|page| page.get().is_some()).count();
    assert_eq!((bits.memory(), pages(&bits)), (512 << 20, 0));
    bits.load(4096 * 7, &[0; 4096]);
    assert_eq!((bits.part(4096, 3), bits.ranges(), pages(&bits)), (vec![0; 3], vec![], 0));
    bits.mark(1 << 40, 512);
    bits.load(4096 * 9, &[1; 8]);
    assert_eq!(pages(&bits), 2);
    assert_eq!(bits.ranges().len(), 9);
}

#[test]
fn bits_know_whether_the_file_has_them() {
    let bits = Bits::new(9, 1 << 20);
    bits.load(0, &[1, 0, 0, 0, 0, 0, 0, 0]);
    bits.mark(0, 512);
    assert!(!bits.is_changed());
    bits.mark(0, 513);
    assert!(bits.is_changed());
    let others = Bits::new(9, 1 << 20);
    assert!(others.resized(1 << 21).is_changed());
    others.clear();
    assert!(others.is_changed());
}
