use super::*;

fn options(list: &str) -> Result<CreateOptions, String> {
    CreateOptions::new(Format::Qcow2, &Options::parse(&[list.into()])?)
}

#[test]
fn options_become_an_image() {
    let options = options("cluster_size=128k,compat=v3,extended_l2,refcount_bits=8,compression_type=zstd").unwrap();
    let NewImage::Qcow2 { params, preallocation } = options.image(1 << 20).unwrap() else { panic!() };
    assert_eq!((params.version, params.cluster_bits.size(), params.refcount_order), (3, 128 << 10, 3));
    assert!(params.extended_l2 && params.compression == Compression::Zstd && preallocation == Preallocation::Off);
}

#[test]
fn what_is_given_is_shown_with_the_defaults() {
    let mut options = options("compat=1.1,data_file=a,,b").unwrap();
    options.set("size", "1048576");
    assert_eq!(
        options.shown(),
        "fmt=qcow2 cluster_size=65536 extended_l2=off compression_type=zlib size=1048576 compat=1.1 data_file=a,,b \
         lazy_refcounts=off refcount_bits=16"
    );
}
