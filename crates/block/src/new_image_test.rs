use super::*;
use crate::disk::Disk;
use crate::inspect::inspect;
use cowhand_qcow2::cipher::{Aes, Iv, Mode};

fn policy() -> OpenPolicy {
    OpenPolicy::host()
}

fn qcow2(params: CreateParams) -> NewFormat {
    NewFormat::Qcow2(Box::new(params), None)
}

fn new(path: &Path, format: NewFormat) -> NewImage {
    NewImage {
        path: path.to_path_buf(),
        format,
        preallocation: Preallocation::Off,
        replace: true,
        unfinished: false,
        hints: FileHints::default(),
    }
}

#[test]
fn a_file_is_replaced_only_if_that_is_allowed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, vec![7; 1 << 20]).unwrap();
    let careful = NewImage { replace: false, ..new(&path, NewFormat::Raw(512)) };
    assert!(make_image(&policy(), &careful).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), vec![7; 1 << 20]);
    make_image(&policy(), &new(&path, NewFormat::Raw(1000))).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), vec![0; 1024]);
    make_image(&policy(), &new(&path, qcow2(CreateParams::new(1 << 30)))).unwrap();
    assert_eq!(inspect(&DiskSpec::new(&path, Format::Qcow2), &policy()).unwrap().virtual_size, 1 << 30);
}

#[test]
fn options_that_contradict_each_other_change_no_byte() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, b"precious").unwrap();
    let version_2 = CreateParams { version: 2, extended_l2: true, ..CreateParams::new(1 << 20) };
    let backed = CreateParams { backing: Some((b"b".to_vec(), "raw".into())), ..CreateParams::new(1 << 20) };
    for (params, preallocation) in [
        (version_2, Preallocation::Off),
        (backed, Preallocation::Full),
        (CreateParams::new(1 << 62), Preallocation::Off),
        (CreateParams { data_file: Some(b"nbd://host".to_vec()), ..CreateParams::new(512) }, Preallocation::Off),
    ] {
        let new = NewImage { preallocation, ..new(&path, qcow2(params)) };
        assert!(make_image(&policy(), &new).is_err(), "{new:?}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
}

#[test]
fn an_image_that_somebody_uses_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    make_image(&policy(), &new(&path, qcow2(CreateParams::new(1 << 20)))).unwrap();
    let before = std::fs::read(&path).unwrap();
    let disk = Disk::open(&DiskSpec::new(&path, Format::Qcow2), &policy()).unwrap();
    let refused = make_image(&policy(), &new(&path, NewFormat::Raw(512))).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Locked);
    assert!(std::fs::read(&path).unwrap() == before);
    disk.close().unwrap();
    make_image(&policy(), &new(&path, NewFormat::Raw(512))).unwrap();
}

#[test]
fn a_luks_volume_is_one_for_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("volume");
    let cipher = CipherSpec { aes: Aes::Aes256, mode: Mode::Xts, iv: Iv::Plain64 };
    let (hash, iter_time, secret) = (Hash::Sha256, Duration::from_millis(10), Secret::new(b"abc".to_vec()));
    let encryption = Encryption { cipher, hash, iter_time, secret };
    make_image(&policy(), &new(&path, NewFormat::Luks((1 << 20) - 100, encryption))).unwrap();
    let node = format!("driver=luks,key-secret=s,file.filename={}", path.display());
    let said = |secret: &str, command: &str| {
        let object = format!("secret,id=s,data={secret}");
        let arguments = ["--object", &object, "--image-opts", &node, "-c", command, "-c", "length"];
        let output = std::process::Command::new("qemu-io").args(arguments).output().unwrap();
        String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
    };
    assert!(said("abc", "write -P 7 0 64k").contains("wrote 65536"));
    let read = said("abc", "read -P 7 0 64k");
    assert!(read.ends_with("1 MiB\n") && !read.contains("failed"), "{read}");
    assert!(said("abd", "read 0 1").contains("Invalid password"));
}
