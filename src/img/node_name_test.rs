use super::*;

#[test]
fn a_name_says_what_is_needed_to_open_the_disk() {
    for (list, driver, name) in [
        ("driver=qcow2,file.filename=a,discard=unmap", "qcow2", "a"),
        ("filename=a", "raw", "a"),
        ("driver=null-co", "null-co", "a"),
        (
            "driver=qcow2,file.filename=a,encrypt.key-secret=s",
            "qcow2",
            r#"json:{"encrypt.key-secret": "s", "driver": "qcow2", "file": {"driver": "file", "filename": "a"}}"#,
        ),
        (
            "driver=raw,offset=512,filename=a",
            "raw",
            r#"json:{"offset": "512", "driver": "raw", "file": {"driver": "file", "filename": "a"}}"#,
        ),
        (
            "file.driver=raw,file.file.filename=a",
            "qcow2",
            r#"json:{"driver": "qcow2", "file": {"driver": "raw", "file": {"driver": "file", "filename": "a"}}}"#,
        ),
    ] {
        assert_eq!(shown(&NodeOptions::from_list(list).unwrap(), driver, "a"), name, "{list}");
    }
}
