use std::path::Path;

use cowhand_qcow2::CreateParams;

use super::*;
use crate::error::ErrorKind;
use crate::io::Storage;
use crate::io::sim::World;
use crate::qcow2::create::{Preallocation, create_image};
use crate::spec::Format;
use crate::sync::Arc;

fn policy(world: &World) -> OpenPolicy {
    OpenPolicy {
        storage: Arc::new(world.clone()),
        allow_dirs: vec!["/".into()],
        temp_dir: "/".into(),
        ..OpenPolicy::host()
    }
}

/// A world with an overlay of another size over a raw file.
fn world() -> World {
    let world = World::orderly();
    world.put(Path::new("/base.raw"), vec![7; 1 << 20]);
    let params =
        CreateParams { backing: Some((b"base.raw".to_vec(), "raw".into())), ..CreateParams::new((3 << 20) + 512) };
    let storage: Arc<dyn Storage> = Arc::new(world.clone());
    create_image(&storage, Path::new("/disk.qcow2"), &params, Preallocation::Off).unwrap();
    world
}

fn disk() -> DiskSpec {
    DiskSpec::new(Path::new("/disk.qcow2"), Format::Qcow2)
}

#[test]
fn shape_is_what_the_disk_shows_when_it_is_open() {
    let world = world();
    let specs = [
        disk(),
        DiskSpec { readonly: true, ..disk() },
        DiskSpec { ephemeral: true, ..disk() },
        DiskSpec::new(Path::new("/base.raw"), Format::Raw),
    ];
    for spec in specs {
        let shape = Disk::shape(&spec, &policy(&world)).unwrap();
        let disk = Disk::open(&spec, &policy(&world)).unwrap();
        assert_eq!(shape, DiskShape { size: disk.size(), read_only: disk.is_read_only(), limits: disk.limits() });
    }
}

#[test]
fn disk_that_is_in_use_has_a_shape_and_is_not_touched() {
    let world = world();
    let open = Disk::open(&disk(), &policy(&world)).unwrap();
    let before = world.content(Path::new("/disk.qcow2"));
    assert!(Disk::shape(&disk(), &policy(&world)).is_ok());
    assert_eq!(world.content(Path::new("/disk.qcow2")), before);
    open.close().unwrap();
}

#[test]
fn what_headers_tell_is_refused_at_once() {
    let gone = world();
    gone.remove(Path::new("/base.raw")).unwrap();
    let error = Disk::shape(&disk(), &policy(&gone)).unwrap_err();
    assert!(error.to_string().contains("base.raw"), "{error}");
    let raw = DiskSpec::new(Path::new("/disk.qcow2"), Format::Raw);
    assert_eq!(Disk::shape(&raw, &policy(&world())).unwrap_err().kind(), ErrorKind::Invalid);
    let blocks = DiskSpec { block_size: 4096, ..disk() };
    assert!(Disk::shape(&blocks, &policy(&world())).unwrap_err().to_string().contains("block-size"));
}

#[test]
fn what_cannot_be_written_is_refused_for_a_writer_alone() {
    let world = world();
    let mut image = world.content(Path::new("/disk.qcow2")).unwrap();
    // Marked corrupt.
    image[79] |= 2;
    world.put(Path::new("/disk.qcow2"), image);
    assert_eq!(Disk::shape(&disk(), &policy(&world)).unwrap_err().kind(), ErrorKind::Corrupt);
    assert!(Disk::shape(&DiskSpec { readonly: true, ..disk() }, &policy(&world)).is_ok());
}
