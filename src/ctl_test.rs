use cowhand_control::Layer;

use super::*;

fn disk(id: &str) -> Disk {
    Disk { id: id.into(), size: 20 << 30, read_only: false, connected: false, open: false, chain: None }
}

#[test]
fn disks_are_listed_in_columns() {
    let open = Disk { read_only: true, connected: true, open: true, chain: Some(Vec::new()), ..disk("a-long-name") };
    let said = table(&[disk("vda"), open]);
    let expected = "\
DISK               SIZE  ACCESS     FRONT-END      IMAGES
vda              20 GiB  writable   not connected  closed
a-long-name      20 GiB  read-only  connected      open";
    assert_eq!(said, expected);
    assert_eq!(table(&[]), "DISK        SIZE  ACCESS     FRONT-END      IMAGES");
}

#[test]
fn a_disk_is_described_with_its_chain() {
    let layer = |path: &str, format: &str| Layer { path: path.into(), format: format.into(), size: 2 << 30 };
    let chain = Some(vec![layer("over.qcow2", "qcow2"), layer("base", "raw")]);
    let said = described(&Disk { connected: true, open: true, chain, ..disk("vda") });
    let expected = "\
disk:       vda
size:       20 GiB (21474836480 bytes)
access:     writable
front-end:  connected
images:     open
  over.qcow2 (qcow2, 2 GiB)
  base (raw, 2 GiB)";
    assert_eq!(said, expected);
}
