use super::*;

fn parse(lists: &[&str]) -> Result<Options, String> {
    Options::parse(&lists.iter().map(|l| l.to_string()).collect::<Vec<_>>())
}

#[test]
fn lists_are_joined_and_the_last_value_counts() {
    let options = parse(&["size=1,compat=0.10", "size=2,backing_file=a,,b,lazy_refcounts"]).unwrap();
    assert_eq!(options.get("size"), Some("2"));
    assert_eq!(options.get("backing_file"), Some("a,b"));
    assert_eq!(options.get("lazy_refcounts"), Some("on"));
    assert_eq!(options.unknown(&["size", "compat", "backing_file"]), Some("lazy_refcounts"));
    assert!(!options.asks_for_help() && parse(&["help"]).unwrap().asks_for_help());
}

#[test]
fn a_list_with_an_open_end_is_refused() {
    for list in ["", ",", "a=1,", ",a=1", "a=b,,,"] {
        assert_eq!(parse(&[list]), Err(format!("Invalid option list: {list}")), "{list}");
    }
    assert!(parse(&["backing_file=a,,"]).is_ok());
}
