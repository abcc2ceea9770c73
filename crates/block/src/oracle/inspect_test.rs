//! What the engine says of an image, beside `qemu-img info`.

use std::path::Path;

use cowhand_qcow2::{Compression, Incompatible};
use serde_json::{Value, json};

use super::guest::policy;
use super::qemu::{self, text};
use super::{dice, matrix};
use crate::bitmap::BitmapState;
use crate::inspect::{ImageInfo, inspect};
use crate::io::host::Engine;
use crate::spec::{DiskSpec, Format};

fn ours(path: &Path) -> ImageInfo {
    inspect(&DiskSpec::new(path, Format::Qcow2), &policy(Engine::Auto)).unwrap()
}

/// Bytes of a name in a header, as JSON has them.
fn said(bytes: Option<&[u8]>) -> Value {
    bytes.map_or(Value::Null, |bytes| String::from_utf8_lossy(bytes).into())
}

/// The fields of `qemu-img info` that come from the image, as it names them; null where it leaves them out.
fn fields(info: &ImageInfo) -> Value {
    let qcow2 = info.qcow2.as_ref().unwrap();
    let header = &qcow2.header;
    let version_3 = |value: Value| if header.version == 2 { Value::Null } else { value };
    let flags = |bitmap: &crate::BitmapInfo| {
        let in_use = (bitmap.state == BitmapState::Inconsistent).then_some("in-use");
        in_use.into_iter().chain(bitmap.enabled.then_some("auto")).collect::<Vec<_>>()
    };
    let bitmaps = qcow2
        .bitmaps
        .iter()
        .map(|bitmap| json!({ "name": bitmap.name, "granularity": bitmap.granularity, "flags": flags(bitmap) }));
    let bitmaps: Vec<Value> = bitmaps.collect();
    let snapshots = qcow2.snapshots.iter().map(|snapshot| {
        json!([
            snapshot.id,
            snapshot.name,
            snapshot.vm_state_size,
            snapshot.date.as_secs(),
            snapshot.date.subsec_nanos()
        ])
    });
    let compression = match header.compression {
        Compression::Zlib => "zlib",
        Compression::Zstd => "zstd",
    };
    let data_file_raw = if header.has_data_file() { header.is_data_file_raw().into() } else { Value::Null };
    json!({
        "virtual-size": info.virtual_size,
        "cluster-size": header.cluster_bits.size(),
        // QEMU counts files in sectors.
        "file-length": info.file_len.next_multiple_of(512),
        "backing-filename": said(header.backing_name.as_deref()),
        "backing-filename-format": header.backing_format(),
        "dirty-flag": header.incompatible.contains(Incompatible::DIRTY),
        "compat": if header.version == 2 { "0.10" } else { "1.1" },
        "compression-type": compression,
        "lazy-refcounts": version_3(header.has_lazy_refcounts().into()),
        "refcount-bits": header.refcount_bits(),
        "corrupt": version_3(header.incompatible.contains(Incompatible::CORRUPT).into()),
        "extended-l2": version_3(header.is_extended_l2().into()),
        "data-file": said(header.external_data_file_name()),
        "data-file-raw": version_3(data_file_raw),
        "bitmaps": if bitmaps.is_empty() { Value::Null } else { bitmaps.into() },
        "snapshots": snapshots.collect::<Vec<_>>(),
        "uuid": qcow2.luks.as_ref().map(|luks| luks.uuid().to_owned()),
    })
}

fn qemus_fields(path: &Path) -> Value {
    let said: Value = serde_json::from_str(&qemu::img(&["info", "--output=json", "-f", "qcow2", text(path)])).unwrap();
    let of_format = &said["format-specific"]["data"];
    let snapshots = said["snapshots"].as_array().cloned().unwrap_or_default();
    let snapshots =
        snapshots.iter().map(|s| json!([s["id"], s["name"], s["vm-state-size"], s["date-sec"], s["date-nsec"]]));
    let mut fields = json!({
        "file-length": said["children"][0]["info"]["virtual-size"],
        "snapshots": snapshots.collect::<Vec<_>>(),
        "uuid": of_format["encrypt"]["uuid"],
    });
    for key in ["virtual-size", "cluster-size", "backing-filename", "backing-filename-format", "dirty-flag"] {
        fields[key] = said[key].clone();
    }
    let own = ["compat", "compression-type", "lazy-refcounts", "refcount-bits", "corrupt", "extended-l2"];
    for key in own.into_iter().chain(["data-file", "data-file-raw", "bitmaps"]) {
        fields[key] = of_format[key].clone();
    }
    fields
}

fn assert_said_alike(path: &Path) {
    assert_eq!(fields(&ours(path)), qemus_fields(path), "left: ours, right: QEMU's");
}

#[test]
fn images_say_of_themselves_what_qemu_img_info_says() {
    let shapes =
        [matrix::version_2(), matrix::refcount_widths(), matrix::backing_files(), matrix::zstd(), matrix::snapshots()];
    matrix::each("info", &shapes.concat(), |made, _, _, _, _| assert_said_alike(&made.path));
}

#[test]
fn bitmaps_data_files_and_encryption_are_told_and_nothing_else_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let create =
        |options: &str, path: &Path| qemu::img(&["create", "-q", "-f", "qcow2", "-o", options, text(path), "1M"]);
    create("lazy_refcounts=on,extended_l2=on", &at("a"));
    for (name, option) in [("one", "--enable"), ("two", "--disable")] {
        qemu::img(&["bitmap", "--add", option, text(&at("a")), name]);
    }
    create(&format!("data_file={},data_file_raw=on", text(&at("gone"))), &at("b"));
    let key = dice("info of luks").next_u64().to_string();
    std::fs::write(at("key"), key).unwrap();
    let secret = format!("secret,id=s,file={}", text(&at("key")));
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    qemu::img(&["create", "-q", "--object", &secret, "-f", "qcow2", "-o", options, text(&at("c")), "1M"]);

    ["a", "b", "c"].iter().for_each(|name| assert_said_alike(&at(name)));
    std::fs::remove_file(at("gone")).unwrap();
    assert!(ours(&at("b")).qcow2.unwrap().header.is_data_file_raw());
    let luks = ours(&at("c")).qcow2.unwrap().luks.unwrap();
    assert_eq!(luks.active_slots().collect::<Vec<_>>(), [0]);
}

#[test]
fn space_and_length_are_the_files_and_raw_disks_have_nothing_to_say() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("raw");
    std::fs::write(&path, [1; 8192]).unwrap();
    std::fs::File::options().write(true).open(&path).unwrap().set_len(1_000_001).unwrap();

    let info = inspect(&DiskSpec::new(&path, Format::Raw), &policy(Engine::Auto)).unwrap();

    assert_eq!((info.virtual_size, info.file_len), (1_000_448, 1_000_001));
    assert!((8192..100_000).contains(&info.allocated), "{}", info.allocated);
    assert!(info.qcow2.is_none());
}
