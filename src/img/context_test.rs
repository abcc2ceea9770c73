use super::*;

fn context(probe: bool) -> Context {
    Context::new("cowhand img", OpenPolicy { probe, ..OpenPolicy::host() })
}

#[test]
fn a_format_that_is_not_given_is_guessed_only_where_that_is_allowed() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let name = file.path().to_str().unwrap();
    let refused = context(false).spec(name, &How::default()).unwrap_err();
    assert!(refused.message.contains("--probe"), "{}", refused.message);
    assert_eq!(context(true).spec(name, &How::default()).unwrap().format, Format::Raw);
    assert_eq!(context(false).spec(name, &How { guess: true, ..How::default() }).unwrap().format, Format::Raw);
}

#[test]
fn names_of_files_options_and_json_describe_the_same_disk() {
    let cx = context(false);
    let how = How { format: Some("qcow2"), ..How::default() };
    let plain = cx.spec("dir/a:b", &how).unwrap();
    assert_eq!(cx.spec("file:dir/a:b", &how).unwrap(), plain);
    assert_eq!(cx.spec(r#"json:{"driver":"qcow2","file.filename":"dir/a:b"}"#, &How::default()).unwrap(), plain);
    let listed = How { image_opts: true, ..how.clone() };
    assert_eq!(cx.spec("driver=qcow2,file.filename=dir/a:b", &listed).unwrap(), plain);
    assert_eq!(cx.spec("nbd:host:1", &how).unwrap_err().message, "Could not open 'nbd:host:1': Unknown protocol 'nbd'");
}

#[test]
fn other_formats_are_answered_by_name() {
    let how = |format| How { format: Some(format), ..How::default() };
    let message = |format| context(true).spec("x", &how(format)).unwrap_err().message;
    assert_eq!(
        message("vmdk"),
        "Could not open 'x': the format 'vmdk' is not supported by cowhand (qcow2 and raw are)"
    );
    assert_eq!(message("foo"), "Could not open 'x': Unknown driver 'foo'");
}
