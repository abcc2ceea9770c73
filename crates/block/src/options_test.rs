use std::path::Path;

use super::*;

struct Nothing;

impl Surroundings for Nothing {
    fn format_of(&self, file: &FileSpec) -> Result<Format, String> {
        if file.path.extension().is_some_and(|e| e == "raw") { Ok(Format::Raw) } else { Err("not guessed".into()) }
    }

    fn secret(&self, id: &str) -> Result<Option<SecretSource>, String> {
        Err(format!("No secret with id '{id}'"))
    }
}

fn spec(options: Result<NodeOptions, OptionsError>) -> Result<DiskSpec, String> {
    let base = DiskSpec::new(Path::new(""), Format::Raw);
    options.and_then(|options| options.into_spec(&base, &Nothing)).map_err(|e| e.to_string())
}

fn listed(text: &str) -> Result<DiskSpec, String> {
    spec(NodeOptions::from_list(text))
}

#[test]
fn a_list_and_json_describe_the_same_disk() {
    let list =
        listed("driver=qcow2,file.driver=file,file.filename=a,,b.qcow2,discard=ignore,detect-zeroes=unmap").unwrap();
    let json = spec(NodeOptions::from_json(
        r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"a,b.qcow2"},"discard":"ignore","detect-zeroes":"unmap"}"#,
    ));
    assert_eq!(Ok(&list), json.as_ref());
    assert_eq!((list.path.as_path(), list.format), (Path::new("a,b.qcow2"), Format::Qcow2));
    assert!(!list.discard && list.detect_zeroes == DetectZeroes::Unmap);
}

#[test]
fn a_backing_disk_may_be_given_or_left_out() {
    let given = listed("driver=qcow2,file.filename=top,backing.driver=raw,backing.file.filename=base").unwrap();
    let Backing::Given(base) = given.backing else { panic!("{given:?}") };
    assert_eq!((base.path.as_path(), base.format, base.readonly), (Path::new("base"), Format::Raw, true));
    let alone = spec(NodeOptions::from_json(r#"json:{"driver":"qcow2","file.filename":"top","backing":null}"#));
    assert_eq!(alone.unwrap().backing, Backing::Alone);
}

#[test]
fn the_format_is_asked_for_where_it_is_not_said() {
    assert_eq!(listed("filename=x.raw").unwrap().format, Format::Raw);
    assert_eq!(listed("file.filename=x.img"), Err("not guessed".into()));
}

#[test]
fn what_is_wrong_is_named() {
    for (text, said) in [
        ("driver=nbd,file.filename=x", "Unknown driver 'nbd'"),
        ("driver=vmdk,file.filename=x", "the format 'vmdk' is not supported by cowhand (qcow2 and raw are)"),
        ("driver=qcow2,file.driver=quorum,file.filename=x", "Unknown driver 'quorum'"),
        (
            "driver=compress,file.driver=raw,file.file.filename=x",
            "Compression is not supported for underlying format: raw",
        ),
        (
            "driver=compress,foo=1,file.driver=qcow2,file.file.filename=x",
            "Block format 'compress' does not support the option 'foo'",
        ),
        ("driver=qcow2", "A block device must be specified for \"file\""),
        (
            "driver=raw,file.filename=x,lazy-refcounts=on",
            "Block format 'raw' does not support the option 'lazy-refcounts'",
        ),
        ("driver=qcow2,file.filename=x,lazy-refcounts=maybe", "Parameter 'lazy-refcounts' expects 'on' or 'off'"),
        ("driver=qcow2,file.filename=x,encrypt.key-secret=s", "No secret with id 's'"),
    ] {
        assert_eq!(listed(text), Err(said.into()), "{text}");
    }
    assert!(NodeOptions::from_json("json:[]").is_err());
    assert!(NodeOptions::from_json("json:{").is_err());
}

#[test]
fn options_of_the_cache_are_taken_as_qemu_takes_them() {
    let image = "driver=qcow2,file.filename=x";
    let tuned = listed(&format!("{image},cache-size=1.25M,l2-cache-entry-size=4k,lazy-refcounts=on")).unwrap().tuning;
    let expected = Tuning { total: Some(5 << 18), entry: Some(4096), lazy_refcounts: true, ..Tuning::default() };
    assert_eq!(tuned, expected);
    let harmless =
        "overlap-check.template=none,overlap-check.main-header=off,pass-discard-other=on,cache-clean-interval=5";
    assert_eq!(listed(&format!("{image},{harmless}")), listed(image));
    let values = "Unsupported value 'x' for qcow2 option 'overlap-check'. Allowed are any of the following: none, constant, \
                  cached, all";
    for (option, said) in [
        ("overlap-check=x", values),
        ("overlap-check.template=x", values),
        (
            "overlap-check=all,overlap-check.template=none",
            "Conflicting values for qcow2 options 'overlap-check' ('all') and 'overlap-check.template' ('none')",
        ),
        ("overlap-check.active-l1=x", "Parameter 'overlap-check.active-l1' expects 'on' or 'off'"),
        ("overlap-check.other=on", "Block format 'qcow2' does not support the option 'overlap-check.other'"),
        ("pass-discard-request=x", "Parameter 'pass-discard-request' expects 'on' or 'off'"),
        ("cache-clean-interval=-1", "Cache clean interval too big"),
        ("cache-clean-interval=x", "Parameter 'cache-clean-interval' expects a number"),
        ("l2-cache-size=8E", "Value '8E' is out of range for parameter 'l2-cache-size'"),
    ] {
        assert_eq!(listed(&format!("{image},{option}")), Err(said.into()), "{option}");
    }
}

#[test]
fn strings_in_json_may_be_in_single_quotes() {
    let json =
        NodeOptions::from_json(r#"json:{'driver': 'raw', "file": {'filename': 'it\'s "a".raw', "driver": 'file'}}"#);
    assert_eq!(json.unwrap().get("file.filename"), Some(r#"it's "a".raw"#));
    assert!(NodeOptions::from_json("json:{'driver: 1}").is_err());
}
