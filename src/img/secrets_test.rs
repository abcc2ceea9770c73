use super::*;

#[test]
fn a_secret_is_found_by_its_id() {
    let secrets = Secrets::default();
    secrets.add("secret,id=a,data=12,,3").unwrap();
    secrets.add("secret,id=b,format=base64,data=MTIsMw==").unwrap();
    assert_eq!(secrets.get("a"), secrets.get("b"));
    assert_eq!(secrets.get("c"), Err("No secret with id 'c'".into()));
}

#[test]
fn what_is_wrong_with_a_secret_is_said() {
    let secrets = Secrets::default();
    for object in [
        "iothread,id=a",
        "secret",
        "secret,id=a",
        "secret,id=a,data=1,file=x",
        "secret,id=a,data=1,keyid=b",
        "secret,id=a,data=!,format=base64",
        "secret,id=a,file=/nowhere/at/all",
    ] {
        assert!(secrets.add(object).is_err(), "{object}");
    }
    secrets.add("secret,id=a,data=1").unwrap();
    assert!(secrets.add("secret,id=a,data=1").is_err());
}
