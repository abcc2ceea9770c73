use super::*;

#[test]
fn findings_are_said_as_qemu_says_them() {
    let text = "cluster 3 refcount=2 reference=1".to_string();
    let finding = Finding { kind: FindingKind::Leak, offset: 0x30000, cluster: 3, text };
    assert_eq!(finding.to_string(), "Leaked cluster 3 refcount=2 reference=1");
    let refcount = Finding { kind: FindingKind::Refcount, ..finding.clone() };
    assert_eq!(refcount.to_string(), "ERROR cluster 3 refcount=2 reference=1");
    let outside = Finding { kind: FindingKind::Outside, text: "counting".into(), ..finding };
    assert_eq!(outside.to_string(), "ERROR: counting");
}
