use super::*;
use crate::testing::Fake;

fn ask(method: &str, target: &str, body: &str) -> (u16, String) {
    let method = Method::from_bytes(method.as_bytes()).unwrap();
    let answer = answer(&Fake::default(), &method, &target.parse().unwrap(), body.as_bytes());
    (answer.status.as_u16(), String::from_utf8(answer.body).unwrap())
}

/// Expects an error with this status and kind, whose message contains this.
fn expect(method: &str, target: &str, body: &str, status: u16, kind: &str, contains: &str) {
    let (got, text) = ask(method, target, body);
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((got, value["error"]["kind"].as_str()), (status, Some(kind)), "{method} {target}: {text}");
    assert!(value["error"]["message"].as_str().unwrap().contains(contains), "{text}");
}

#[test]
fn names_survive_the_way_through_a_path() {
    for name in ["vda", "b/ö 1", "%41", ".", "a?b#c"] {
        assert_eq!(decoded(&encoded(name)).as_deref(), Some(name));
        assert!(!encoded(name).contains(['/', '?', '#', ' ']));
    }
    for broken in ["%", "%4", "%zz", "%+1", "%ff"] {
        assert_eq!(decoded(broken), None, "{broken}");
    }
}

#[test]
fn disks_are_listed_shown_and_resized() {
    let (status, list) = ask("GET", "/v1/disks", "");
    assert_eq!(status, 200);
    assert_eq!(serde_json::from_str::<DiskList>(&list).unwrap().disks.len(), 2);
    let (status, disk) = ask("GET", "/v1/disks/b%2F%C3%B6%201", "");
    assert_eq!(status, 200);
    assert!(!disk.contains("chain"), "{disk}");
    let (status, disk) = ask("POST", "/v1/disks/vda/resize", r#"{"size": 2147483648}"#);
    assert_eq!(status, 200);
    assert!(disk.contains("2147483648"), "{disk}");
    assert_eq!(ask("POST", "/v1/disks/vda/resize", r#"{"size":512,"shrink":true}"#).0, 200);
}

#[test]
fn what_is_not_there_or_makes_no_sense_is_an_error() {
    for target in ["/", "/v1", "/v1/", "/v1/disk", "/v1/disks/", "/v1/disks/vdb", "/v1/disks/vda/", "/v1/disks/%zz"] {
        expect("GET", target, "", 404, "not-found", "there is no");
    }
    for target in ["/v1/disks/vdb/resize", "/v1/disks/vda/resize/", "/v2/disks", "/v1/disks/vda/resize/x"] {
        expect("POST", target, r#"{"size":1}"#, 404, "not-found", "there is no");
    }
    expect("DELETE", "/v1/disks", "", 405, "method-not-allowed", "/v1/disks takes GET, not DELETE");
    expect("GET", "/v1/disks/vda/resize", "", 405, "method-not-allowed", "takes POST");
    expect("GET", "/v1/disks?all", "", 400, "invalid", "no query");
    expect("GET", "/v1/disks/vda", "{}", 400, "invalid", "none");
    expect("POST", "/v1/disks/vda/resize", r#"{"size":512}"#, 409, "refused", "smaller");
}

#[test]
fn a_body_that_is_not_quite_right_is_refused() {
    let bodies = [
        ("", "EOF"),
        ("{", "EOF"),
        ("[]", "size"),
        ("{}", "missing field `size`"),
        ("7", "expected struct"),
        (r#"{"size":"1G"}"#, "invalid type: string"),
        (r#"{"size":-1}"#, "invalid value"),
        (r#"{"size":1.5}"#, "floating point"),
        (r#"{"size":18446744073709551616}"#, "floating point"),
        (r#"{"size":1,"size":2}"#, "duplicate field"),
        (r#"{"size":1,"grow":true}"#, "unknown field `grow`"),
        (r#"{"size":1} x"#, "trailing"),
        ("{\"size\":1,\"\u{0}\":2}", "control character"),
    ];
    for (body, contains) in bodies {
        expect("POST", "/v1/disks/vda/resize", body, 400, "invalid", contains);
    }
}
