use super::*;

#[test]
fn a_report_says_how_much_how_long_and_how_fast() {
    let time = Duration::from_millis(250);
    let report = Report { what: "wrote", offset: 512, count: 65536, total: 65536, time };
    let text = "wrote 65536/65536 bytes at offset 512\n64 KiB, 1 ops; 00.25 sec (256 KiB/sec and 4.0000 ops/sec)\n";
    assert_eq!(report.text(false), text);
    assert_eq!(report.text(true), "65536,1,0:00:00.25,262144.000,4.000\n");
}

#[test]
fn hours_are_shown_when_it_took_hours() {
    assert_eq!(duration(Duration::from_millis(38_463_390)), "10:41:03.39");
    assert_eq!(duration(Duration::from_secs(7)), "07.00 sec");
}

#[test]
fn bytes_are_dumped_in_lines_of_sixteen() {
    let bytes: Vec<u8> = (0x3e..0x50).collect();
    let text = "000003de:  3e 3f 40 41 42 43 44 45 46 47 48 49 4a 4b 4c 4d  ...ABCDEFGHIJKLM\n000003ee:  4e 4f  NO\n";
    assert_eq!(dump(&bytes, 0x3de), text);
}
