use cowhand_qcow2::ClusterBits;

use super::*;

fn measured(params: &CreateParams, preallocation: Preallocation) -> (u64, u64) {
    let measured = measure_qcow2(params, preallocation, 0, None).unwrap();
    (measured.required, measured.fully_allocated)
}

/// As qemu-img 10.0 says.
#[test]
fn sizes_are_qemus() {
    let params = CreateParams::new(1 << 30);
    assert_eq!(measured(&params, Preallocation::Off), (393_216, 1_074_135_040));
    assert_eq!(measured(&params, Preallocation::Metadata), (393_216, 1_074_135_040));
    assert_eq!(measured(&params, Preallocation::Full), (1_074_135_040, 1_074_135_040));
    let small = CreateParams { cluster_bits: ClusterBits::new(9).unwrap(), ..params.clone() };
    assert_eq!(measured(&small, Preallocation::Off).1 - measured(&small, Preallocation::Off).0, 1 << 30);
    assert_eq!(measure_raw(1000), Measured { required: 1024, fully_allocated: 1024, bitmaps: None });
}

#[test]
fn what_no_table_can_map_is_refused() {
    let params = CreateParams { cluster_bits: ClusterBits::new(9).unwrap(), ..CreateParams::new(1 << 50) };
    assert_eq!(measure_qcow2(&params, Preallocation::Off, 0, None).unwrap_err().kind(), ErrorKind::Invalid);
    let params = CreateParams::new(u64::MAX);
    assert!(measure_qcow2(&params, Preallocation::Off, 0, None).is_err());
}
