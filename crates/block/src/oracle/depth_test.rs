//! Deep chains: they read as QEMU reads them, and once warm one look at the topmost image is enough.

use std::path::Path;

use cowhand_qcow2::{ClusterBits, CreateParams};

use super::guest::{ask, policy, read_all};
use super::read_test::assert_same;
use super::{dice, qemu};
use crate::disk::{Disk, block_on};
use crate::io::Buffer;
use crate::io::host::Engine;
use crate::io::sim::Rng;
use crate::qcow2::create;
use crate::queue::Queue;
use crate::request::Request;
use crate::spec::{DiskSpec, Format};
use crate::sync::Arc;

const CLUSTER: u64 = 65536;
const SIZE: u64 = 64 * CLUSTER;

fn create_overlay(path: &Path, below: Option<&str>, cluster_bits: u32, extended_l2: bool) {
    let storage = policy(Engine::Threads).storage;
    let file = storage.create(path).unwrap();
    let params = CreateParams {
        cluster_bits: ClusterBits::new(cluster_bits).unwrap(),
        extended_l2,
        backing: below.map(|name| (name.as_bytes().to_vec(), "qcow2".into())),
        ..CreateParams::new(SIZE)
    };
    let queue = Queue::new(storage.blocking_driver().unwrap());
    let task = {
        let (queue, path) = (queue.clone(), path.to_path_buf());
        async move { create::create(&queue, &file, &path, &params, true).await }
    };
    block_on(&queue, task).unwrap();
}

/// A chain of so many images, each with a few clusters written; the topmost is `top.qcow2`. Gives its content.
fn chain(dir: &Path, depth: usize, shape: impl Fn(usize) -> (u32, bool), rng: &mut Rng) -> Vec<u8> {
    let mut content = vec![0; SIZE as usize];
    let mut below: Option<String> = None;
    for layer in 0..depth {
        let name = if layer + 1 == depth { "top.qcow2".into() } else { format!("{layer}.qcow2") };
        let (cluster_bits, extended_l2) = shape(layer);
        create_overlay(&dir.join(&name), below.as_deref(), cluster_bits, extended_l2);
        let spec = DiskSpec { metadata_cache: Some(1), ..DiskSpec::new(&dir.join(&name), Format::Qcow2) };
        let disk = Disk::open(&spec, &policy(Engine::Threads)).unwrap();
        let mut queue = disk.queue().unwrap();
        for _ in 0..2 {
            // Whole clusters of the topmost image's size, so that each lies in one piece.
            let at = rng.below(SIZE / CLUSTER) * CLUSTER;
            let range = at as usize..(at + CLUSTER) as usize;
            if rng.one_in(5) {
                ask(&mut queue, Request::WriteZeroes { offset: at, len: CLUSTER, unmap: true }).unwrap();
                content[range].fill(0);
                continue;
            }
            let bytes: Vec<u8> = (0..CLUSTER).map(|_| rng.next_u64() as u8).collect();
            let buffer = Buffer::from_bytes(&bytes);
            ask(&mut queue, Request::Write { offset: at, data: vec![buffer.seg(0, buffer.len())] }).unwrap();
            content[range].copy_from_slice(&bytes);
        }
        drop(queue);
        disk.close().unwrap();
        below = Some(name);
    }
    content
}

fn open_top(dir: &Path) -> Arc<Disk> {
    let spec = DiskSpec { readonly: true, ..DiskSpec::new(&dir.join("top.qcow2"), Format::Qcow2) };
    Disk::open(&spec, &policy(Engine::Auto)).unwrap()
}

#[test]
fn a_warm_read_through_200_layers_takes_one_look_and_one_operation() {
    let dir = tempfile::tempdir().unwrap();
    let mut rng = dice("200 layers");
    let content = chain(dir.path(), 200, |_| (16, false), &mut rng);
    let disk = open_top(dir.path());
    assert_same(&read_all(&disk, 2, &mut rng), &content);
    assert_same(&qemu::content(&dir.path().join("top.qcow2")), &content);
    for (number, cluster) in content.chunks(CLUSTER as usize).enumerate() {
        let node = disk.node();
        let place = node.mapped(number as u64 * CLUSTER + 512, CLUSTER - 512, false);
        let holds_data = cluster.iter().any(|&byte| byte != 0);
        assert_eq!(place.is_some(), holds_data, "cluster {number}");
    }
}

#[test]
fn layers_of_every_cluster_size_are_resolved_or_asked() {
    let dir = tempfile::tempdir().unwrap();
    let mut rng = dice("mixed layers");
    let shape = |layer: usize| {
        [(16, false), (9, false), (12, false), (14, true), (21, false), (16, true), (20, true)][layer % 7]
    };
    let content = chain(dir.path(), 36, shape, &mut rng);
    let disk = open_top(dir.path());
    assert_same(&read_all(&disk, 2, &mut rng), &content);
    // Warm, and no longer from the start.
    assert_same(&read_all(&disk, 2, &mut rng), &content);
    assert_same(&qemu::content(&dir.path().join("top.qcow2")), &content);
}
