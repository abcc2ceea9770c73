use super::*;

fn typed(parts: &[&[u8]]) -> Typed {
    let mut filter = EscapeFilter::default();
    let mut all = Typed::default();
    for part in parts {
        let out = filter.filter(part);
        all.bytes.extend(out.bytes);
        all.quit |= out.quit;
    }
    all
}

#[test]
fn ctrl_a_x_quits_also_across_reads() {
    assert_eq!(typed(&[b"ls\x01", b"xrest"]), Typed { bytes: b"ls".to_vec(), quit: true });
}

#[test]
fn ctrl_a_twice_is_one_ctrl_a() {
    assert_eq!(typed(&[b"\x01\x01x"]), Typed { bytes: b"\x01x".to_vec(), quit: false });
}

#[test]
fn ctrl_a_before_another_key_goes_to_the_guest() {
    assert_eq!(typed(&[b"\x01c"]), Typed { bytes: b"\x01c".to_vec(), quit: false });
}
