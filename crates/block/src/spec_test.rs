use super::*;

#[test]
fn parse_full_disk_gives_every_field() {
    let spec = DiskSpec::parse(
        "path=/a,,b.qcow2,format=qcow2,id=vda,readonly=on,queues=4,cache=none,discard=ignore,discard-no-unref=on,detect-zeroes=unmap,\
         backing-format=raw,serial=S1,metadata-cache=2M,block-size=4096,lock=off",
    )
    .unwrap();
    assert_eq!(spec.path, PathBuf::from("/a,b.qcow2"));
    assert_eq!(spec.format, Format::Qcow2);
    assert_eq!(spec.id.as_deref(), Some("vda"));
    assert!(spec.readonly && !spec.discard && spec.discard_no_unref && !spec.lock);
    assert_eq!((spec.queues, spec.cache, spec.detect_zeroes), (Some(4), Cache::None, DetectZeroes::Unmap));
    assert_eq!((spec.backing_format, spec.serial.as_str()), (Some(Format::Raw), "S1"));
    assert_eq!((spec.metadata_cache, spec.block_size), (Some(2 << 20), 4096));
}

#[test]
fn parse_bad_disk_says_what_is_wrong() {
    for (text, says) in [
        ("format=raw", "'path=' is missing"),
        ("path=x", "'format=' is missing"),
        ("path=x,format=vmdk", "expected qcow2 or raw"),
        ("path=x,format=raw,colour=red", "unknown disk option 'colour'"),
        ("path=x,format=raw,path=y", "'path' is given twice"),
        ("path=x,format=raw,readonly", "'readonly' is not key=value"),
        ("path=x,format=raw,queues=0", "a number from 1 to 256"),
        ("path=x,format=raw,block-size=1024", "512 or 4096"),
        ("path=x,format=raw,readonly=on,ephemeral=on", "exclude each other"),
        ("path=x,format=raw,backing-format=raw", "a raw disk has no backing file"),
        ("path=x,format=raw,discard-no-unref=on", "a raw disk's data has no other place"),
        ("path=x,format=raw,serial=123456789012345678901", "at most 20 bytes"),
    ] {
        let error = DiskSpec::parse(text).unwrap_err().to_string();
        assert!(error.contains(says), "{text}: {error}");
    }
}

#[test]
fn parse_size_takes_binary_multiples_and_refuses_overflow() {
    assert_eq!(parse_size("64K"), Some(65536));
    assert_eq!(parse_size("3"), Some(3));
    assert_eq!(parse_size("17000000T"), None);
    assert_eq!(parse_size("-1"), None);
    assert_eq!(parse_size(""), None);
    assert_eq!(parse_size("K"), None);
}
