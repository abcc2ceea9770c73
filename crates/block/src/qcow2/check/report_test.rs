use super::*;

#[test]
fn a_finding_names_cluster_and_offset() {
    let text = "the cluster has refcount 2, but 1 references".to_string();
    let finding = Finding { kind: FindingKind::Leak, offset: 0x30000, cluster: 3, text };
    let line = "leak: the cluster has refcount 2, but 1 references (cluster 3, offset 0x30000)";
    assert_eq!(finding.to_string(), line);
    assert!(Finding { kind: FindingKind::Copied, ..finding }.to_string().starts_with("corruption: "));
}

#[test]
fn a_report_says_what_was_found_what_was_repaired_and_what_is_left() {
    let numbers = CheckReport { image_end_offset: 65536, ..CheckReport::default() };
    assert_eq!(numbers.to_string(), "The image is sound.\nThe image ends at offset 65536.");
    let numbers = CheckReport {
        corruptions: 1,
        leaks: 2,
        corruptions_fixed: 3,
        unreadable: 1,
        total_clusters: 8,
        allocated_clusters: 4,
        fragmented_clusters: 1,
        ..numbers
    };
    let text = numbers.to_string();
    for part in ["Repaired: 3 corruptions", "1 corruptions:", "2 leaked", "not freed", "4/8", "50.00%", "25.00%"] {
        assert!(text.contains(part), "'{part}' is not in: {text}");
    }
}
