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
    assert!(!is_json(None).unwrap() && !is_json(Some("human")).unwrap() && is_json(Some("json")).unwrap());
    assert_eq!(is_json(Some("xml")).unwrap_err().message, "--output expects 'human' or 'json' not 'xml'");
}
