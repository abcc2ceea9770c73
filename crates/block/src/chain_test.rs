use super::*;
use crate::disk::{Disk, block_on};
use crate::io::Buffer;
use crate::io::sim::World;
use crate::request::{Request, RequestQueue, Wait};

/// A chain of so many layers, `/0` raw and the lowest, the others empty overlays.
fn chain_of(world: &World, layers: usize) -> (DiskSpec, OpenPolicy) {
    let name = |layer: usize| format!("/{layer}");
    world.put(Path::new(&name(0)), vec![7; 65536]);
    for layer in 1..layers {
        let format = if layer == 1 { "raw" } else { "qcow2" };
        let params =
            CreateParams { backing: Some((name(layer - 1).into_bytes(), format.into())), ..CreateParams::new(65536) };
        let (file, queue) = (world.create(Path::new(&name(layer))).unwrap(), Queue::new(world.driver().unwrap()));
        let task = {
            let queue = queue.clone();
            async move { create::create(&queue, &file, Path::new("/layer"), &params, true).await }
        };
        block_on(&queue, task).unwrap();
    }
    let policy = OpenPolicy {
        storage: Arc::new(world.clone()),
        allow_dirs: vec!["/".into()],
        probe: false,
        temp_dir: "/".into(),
        ..OpenPolicy::host()
    };
    (DiskSpec::new(Path::new(&name(layers - 1)), Format::Qcow2), policy)
}

#[test]
fn chain_as_deep_as_allowed_is_read_and_copied_from_without_a_deep_stack() {
    let world = World::orderly();
    let (spec, policy) = chain_of(&world, DEPTH_MAX);
    let disk = Disk::open(&spec, &policy).unwrap();
    let mut queue = disk.queue().unwrap();
    let (read, written) = (Buffer::zeroed(65536), Buffer::from_bytes(&[9; 512]));
    queue.submit(0, Request::Write { offset: 512, data: vec![written.seg(0, 512)] });
    queue.wait(Wait::Block, &mut Vec::new()).unwrap();
    queue.submit(1, Request::Read { offset: 0, data: vec![read.seg(0, 65536)] });
    queue.wait(Wait::Block, &mut Vec::new()).unwrap();
    let mut expected = vec![7; 65536];
    expected[512..1024].fill(9);
    assert!(read[..] == expected[..]);
}

#[test]
fn opening_a_chain_reads_each_header_once() {
    let world = World::orderly();
    let (spec, policy) = chain_of(&world, 5);
    world.start_trace();
    let disk = Disk::open(&spec, &policy).unwrap();
    let trace = world.trace();
    assert_eq!(disk.layers().len(), 5);
    // The magic and the cluster size first, then as much as these say.
    for file in 1..5 {
        for read in ["read 0x0+0x200", "read 0x0+0x10000"] {
            let line = format!(" file {file} {read}");
            assert_eq!(trace.iter().filter(|l| l.ends_with(&line)).count(), 1, "{line}: {trace:#?}");
        }
    }
}
