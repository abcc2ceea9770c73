use super::*;

#[test]
fn trees_look_as_qemu_writes_them() {
    let tree = Tree::Map(vec![
        ("virtual-size", 5u64.into()),
        ("flags", Tree::List(vec!["auto".into(), "a\"\\\n\u{e9}\u{1f600}".into()])),
        ("none", Tree::List(vec![])),
        ("data", Tree::Map(vec![("corrupt", false.into())])),
    ]);
    let json = "{\n    \"virtual-size\": 5,\n    \"flags\": [\n        \"auto\",\n        \
                \"a\\\"\\\\\\n\\u00E9\\uD83D\\uDE00\"\n    ],\n    \"none\": [\n    ],\n    \"data\": {\n        \
                \"corrupt\": false\n    }\n}";
    assert_eq!(tree.json(), json);
    let human = "    virtual size: 5\n    flags:\n        [0]: auto\n        [1]: a\"\\\n\u{e9}\u{1f600}\n    none:\n    \
                 data:\n        corrupt: false\n";
    assert_eq!(tree.human(1), human);
}

#[test]
fn an_output_form_is_human_or_json() {
    let cx = Context::new("qemu-img", cowhand_block::OpenPolicy::host());
    let asked = |output| is_json(output, "info", &cx);
    assert!(!asked(None).unwrap() && !asked(Some("human")).unwrap() && asked(Some("json")).unwrap());
    let refused = "--output expects 'human' or 'json' not 'xml'\nTry 'qemu-img info --help' for more info";
    assert_eq!(asked(Some("xml")).unwrap_err().message, refused);
}
