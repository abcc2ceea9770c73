use std::cell::RefCell;

use super::*;
use crate::Preallocation;
use crate::bitmap::BitmapState;
use crate::chain::OpenPolicy;
use crate::disk::DiskQueue;
use crate::io::sim::World;
use crate::io::{Buffer, Storage};
use crate::qcow2::create::create_image;
use crate::request::{Event, Request, RequestQueue, Wait};
use crate::spec::{DiskSpec, Format};
use crate::testing::run_cut_short;

const IMAGE: &str = "/disk.qcow2";
const RAW: &str = "/disk.raw";
const SIZE: u64 = 1 << 20;

fn policy(world: &World) -> OpenPolicy {
    OpenPolicy {
        storage: Arc::new(world.clone()),
        allow_dirs: Vec::new(),
        probe: false,
        temp_dir: PathBuf::from("/"),
        ..OpenPolicy::host()
    }
}

fn create(world: &World, path: &str, params: &CreateParams) {
    let storage: Arc<dyn Storage> = Arc::new(world.clone());
    create_image(&storage, Path::new(path), params, Preallocation::Off).unwrap();
}

fn open_at(world: &World, path: &str, format: Format) -> Arc<Disk> {
    Disk::open(&DiskSpec::new(Path::new(path), format), &policy(world)).unwrap()
}

/// A disk of each format.
fn disks(world: &World) -> [Arc<Disk>; 2] {
    create(world, IMAGE, &CreateParams::new(SIZE));
    world.put(Path::new(RAW), vec![0; SIZE as usize]);
    [open_at(world, IMAGE, Format::Qcow2), open_at(world, RAW, Format::Raw)]
}

fn ask(world: &World, queue: &mut DiskQueue, request: Request) -> Result<()> {
    queue.submit(0, request);
    let mut events = Vec::new();
    while events.is_empty() {
        world.step();
        queue.wait(Wait::Poll, &mut events).unwrap();
    }
    match events.pop() {
        Some(Event::Done { result, .. }) => result,
        other => panic!("{other:?}"),
    }
}

fn write(world: &World, queue: &mut DiskQueue, offset: u64, byte: u8) {
    let buffer = Buffer::from_bytes(&[byte; 4096]);
    ask(world, queue, Request::Write { offset, data: vec![buffer.seg(0, 4096)] }).unwrap();
}

fn byte_at(world: &World, queue: &mut DiskQueue, offset: u64) -> u8 {
    let buffer = Buffer::zeroed(512);
    ask(world, queue, Request::Read { offset, data: vec![buffer.seg(0, 512)] }).unwrap();
    assert!(buffer.iter().all(|&byte| byte == buffer[0]));
    buffer[0]
}

fn paths(disk: &Disk) -> Vec<PathBuf> {
    disk.layers().into_iter().map(|layer| layer.path).collect()
}

#[test]
fn what_was_written_before_stays_below_and_what_comes_later_goes_into_the_overlay() {
    let world = World::new(1);
    for disk in disks(&world) {
        let below = paths(&disk)[0].clone();
        let over = PathBuf::from(format!("{}.over", below.display()));
        let mut queue = disk.queue().unwrap();
        write(&world, &mut queue, 0, 1);
        write(&world, &mut queue, 4096, 2);
        disk.snapshot_to(Overlay::new(&over)).unwrap();
        assert_eq!(paths(&disk), [over.clone(), below.clone()]);
        let left = world.content(&below).unwrap();
        write(&world, &mut queue, 4096, 3);
        ask(&world, &mut queue, Request::Discard { offset: 0, len: SIZE }).unwrap();
        write(&world, &mut queue, 8192, 4);
        ask(&world, &mut queue, Request::Flush).unwrap();
        let now = [0, 4096, 8192].map(|at| byte_at(&world, &mut queue, at));
        assert_eq!(now, [0, 0, 4]);
        drop(queue);
        disk.close().unwrap();
        assert!(world.content(&below).unwrap() == left, "the image below has changed");
        crate::torture::assert_sound(&world.content(&over).unwrap());
        let again = Disk::open(&DiskSpec::new(&over, Format::Qcow2), &policy(&world)).unwrap();
        assert_eq!(byte_at(&world, &mut again.queue().unwrap(), 8192), 4);
    }
}

#[test]
fn a_disk_changes_its_size_right_after_it_went_on_in_an_overlay() {
    let world = World::new(2);
    for disk in disks(&world) {
        let over = PathBuf::from(format!("{}.over", paths(&disk)[0].display()));
        let mut queue = disk.queue().unwrap();
        write(&world, &mut queue, SIZE - 4096, 1);
        disk.snapshot_to(Overlay::new(&over)).unwrap();
        disk.resize(SIZE / 2).unwrap();
        disk.resize(2 * SIZE).unwrap();
        // The image below still has it, and it must not come back.
        assert_eq!(byte_at(&world, &mut queue, SIZE - 4096), 0);
        write(&world, &mut queue, 2 * SIZE - 4096, 2);
        let more = over.with_extension("more");
        disk.snapshot_to(Overlay::new(&more)).unwrap();
        assert_eq!([SIZE - 4096, 2 * SIZE - 4096].map(|at| byte_at(&world, &mut queue, at)), [0, 2]);
        assert_eq!(disk.layers().iter().map(|layer| layer.size).collect::<Vec<_>>(), [2 * SIZE, 2 * SIZE, SIZE]);
    }
}

#[test]
fn a_raw_disk_changes_its_size_and_then_goes_on_in_an_overlay() {
    let world = World::new(3);
    let [_, disk] = disks(&world);
    let mut queue = disk.queue().unwrap();
    disk.resize(2 * SIZE).unwrap();
    write(&world, &mut queue, 2 * SIZE - 4096, 2);
    disk.snapshot_to(Overlay::new(Path::new("/over"))).unwrap();
    assert_eq!((disk.size(), byte_at(&world, &mut queue, 2 * SIZE - 4096)), (2 * SIZE, 2));
}

#[test]
fn internal_snapshots_go_on_in_the_overlay() {
    let world = World::new(4);
    let [disk, _] = disks(&world);
    let mut queue = disk.queue().unwrap();
    write(&world, &mut queue, 0, 1);
    disk.create_snapshot("below").unwrap();
    disk.snapshot_to(Overlay::new(Path::new("/over"))).unwrap();
    assert_eq!(disk.snapshots().unwrap(), []);
    disk.create_snapshot("above").unwrap();
    write(&world, &mut queue, 0, 2);
    disk.apply_snapshot("above").unwrap();
    assert_eq!(byte_at(&world, &mut queue, 0), 1);
}

#[test]
fn an_overlay_is_like_what_was_asked_for() {
    let world = World::new(5);
    let [disk, _] = disks(&world);
    let options = OverlayOptions { cluster_bits: ClusterBits::new(14).unwrap(), extended_l2: true };
    let overlay = Overlay { path: "/over".into(), source: OverlaySource::New(options) };
    disk.snapshot_to(overlay).unwrap();
    let bytes = world.content(Path::new("/over")).unwrap();
    let header = Header::parse(&bytes, bytes.len() as u64).unwrap();
    assert_eq!((header.cluster_bits.bits(), header.geometry().extended_l2, header.version), (14, true, 3));
    assert_eq!((header.backing_name.as_deref(), header.backing_format()), (Some(&b"disk.qcow2"[..]), Some("qcow2")));
    assert_eq!(disk.limits().discard_granularity, 1 << 14);
}

/// An overlay prepared with these params, over the disk with a byte in it; whether it is taken.
fn prepared(params: &CreateParams, fill: bool) -> Result<()> {
    let world = World::new(6);
    let [disk, other] = disks(&world);
    create(&world, "/over", params);
    if fill {
        // It shows nothing of what lies below then.
        other.close().unwrap();
        let over = open_at(&world, "/over", Format::Qcow2);
        write(&world, &mut over.queue().unwrap(), 0, 9);
        over.close().unwrap();
    }
    let mut queue = disk.queue().unwrap();
    write(&world, &mut queue, 0, 1);
    let before = world.content(Path::new("/over")).unwrap();
    let taken = disk.snapshot_to(Overlay::prepared(Path::new("/over")));
    assert_eq!(byte_at(&world, &mut queue, 0), 1);
    assert_eq!(paths(&disk).len(), if taken.is_ok() { 2 } else { 1 });
    if taken.is_err() {
        assert!(world.content(Path::new("/over")).unwrap() == before, "it was refused, and written");
    }
    drop(queue);
    disk.close().unwrap();
    if taken.is_ok() {
        assert_eq!(byte_at(&world, &mut open_at(&world, "/over", Format::Qcow2).queue().unwrap(), 0), 1);
    }
    taken
}

#[test]
fn a_prepared_overlay_is_taken_if_it_names_the_disks_file_or_none() {
    let over = |name: &str, format: &str| CreateParams {
        backing: Some((name.as_bytes().to_vec(), format.into())),
        ..CreateParams::new(SIZE)
    };
    prepared(&over("disk.qcow2", "qcow2"), false).unwrap();
    prepared(&over("/disk.qcow2", "qcow2"), false).unwrap();
    prepared(&CreateParams::new(SIZE), false).unwrap();
    prepared(&CreateParams { version: 2, ..CreateParams::new(SIZE) }, false).unwrap();
    let small = CreateParams { cluster_bits: ClusterBits::new(9).unwrap(), ..CreateParams::new(SIZE) };
    prepared(&small, false).unwrap();
    for (params, fill) in [
        (over("disk.raw", "raw"), false),
        (over("disk.qcow2", "raw"), false),
        (CreateParams { size: SIZE / 2, ..over("disk.qcow2", "qcow2") }, false),
        (CreateParams::new(SIZE), true),
    ] {
        let error = prepared(&params, fill).unwrap_err();
        assert_eq!((error.kind(), error.path()), (ErrorKind::Invalid, Some(Path::new("/over"))), "{error}");
    }
}

#[test]
fn disks_that_cannot_have_one_and_places_that_cannot_be_are_refused() {
    let world = World::new(7);
    let [disk, raw] = disks(&world);
    let to = |disk: &Arc<Disk>, path: &str| disk.snapshot_to(Overlay::new(Path::new(path))).unwrap_err().kind();
    assert_eq!(to(&disk, RAW), ErrorKind::Io);
    let itself = disk.snapshot_to(Overlay::prepared(Path::new(IMAGE))).unwrap_err();
    assert_eq!(itself.kind(), ErrorKind::Invalid, "{itself}");
    let twice = vec![
        (disk.clone(), Overlay::new(Path::new("/a"))),
        (raw.clone(), Overlay::new(Path::new("/b"))),
        (disk.clone(), Overlay::new(Path::new("/c"))),
    ];
    assert_eq!(snapshot_disks(twice, || Ok(())).unwrap_err().kind(), ErrorKind::Invalid);
    disk.close().unwrap();
    assert_eq!(to(&disk, "/over"), ErrorKind::Invalid);
    let spec = DiskSpec::new(Path::new(IMAGE), Format::Qcow2);
    let readonly = Disk::open(&DiskSpec { readonly: true, ..spec.clone() }, &policy(&world)).unwrap();
    assert_eq!(to(&readonly, "/over"), ErrorKind::ReadOnly);
    let ephemeral = Disk::open(&DiskSpec { ephemeral: true, ..spec }, &policy(&world)).unwrap();
    assert_eq!(to(&ephemeral, "/over"), ErrorKind::Unsupported);
    assert!(["/a", "/b", "/c", "/over"].iter().all(|path| world.content(Path::new(path)).is_none()));
}

#[test]
fn several_disks_go_on_at_one_moment_or_none_does() {
    let world = World::new(8);
    let disks = disks(&world);
    let overlays = |names: [&str; 2]| {
        let overlay = |(disk, name): (&Arc<Disk>, &str)| (disk.clone(), Overlay::new(Path::new(name)));
        disks.iter().zip(names).map(overlay).collect::<Vec<_>>()
    };
    for failing in [overlays(["/a", RAW]), overlays([IMAGE, "/b"])] {
        snapshot_disks(failing, || Ok(())).unwrap_err();
    }
    let refusal = || Err(Error::new(ErrorKind::NoSpace, "no room for the note"));
    assert_eq!(snapshot_disks(overlays(["/a", "/b"]), refusal).unwrap_err().kind(), ErrorKind::NoSpace);
    for disk in &disks {
        assert_eq!(paths(disk).len(), 1);
        write(&world, &mut disk.queue().unwrap(), 0, 1);
    }
    assert!(["/a", "/b"].iter().all(|path| world.content(Path::new(path)).is_none()), "what is not used stays");
    let seen = Rc::new(RefCell::new(Vec::new()));
    let note = {
        let (seen, disks) = (seen.clone(), disks.clone());
        move || {
            disks.iter().for_each(|disk| seen.borrow_mut().push(disk.layers().len()));
            Ok(())
        }
    };
    snapshot_disks(overlays(["/a", "/b"]), note).unwrap();
    assert_eq!(*seen.borrow(), [1, 1], "noted once, and before anything changes");
    for (disk, path) in disks.iter().zip(["/a", "/b"]) {
        assert_eq!(paths(disk)[0], Path::new(path));
        assert_eq!(byte_at(&world, &mut disk.queue().unwrap(), 0), 1);
    }
}

#[test]
fn the_old_file_is_a_readers_from_then_on() {
    let world = World::new(9);
    let [disk, _] = disks(&world);
    let spec = DiskSpec { readonly: true, ..DiskSpec::new(Path::new(IMAGE), Format::Qcow2) };
    assert!(Disk::open(&spec, &policy(&world)).is_err());
    disk.snapshot_to(Overlay::new(Path::new("/over"))).unwrap();
    Disk::open(&spec, &policy(&world)).unwrap().close().unwrap();
    let writing = Disk::open(&DiskSpec { readonly: false, ..spec }, &policy(&world));
    assert_eq!(writing.err().unwrap().kind(), ErrorKind::Locked);
    assert!(Disk::open(&DiskSpec::new(Path::new("/over"), Format::Qcow2), &policy(&world)).is_err());
}

#[test]
fn bitmaps_of_the_old_image_say_what_was_changed_in_it_and_are_saved() {
    let world = World::new(10);
    let [disk, _] = disks(&world);
    disk.create_bitmap("b", Some(65536), true).unwrap();
    let mut queue = disk.queue().unwrap();
    write(&world, &mut queue, 0, 1);
    write(&world, &mut queue, 3 * 65536, 1);
    disk.snapshot_to(Overlay::new(Path::new("/over"))).unwrap();
    write(&world, &mut queue, 65536, 2);
    assert!(disk.bitmaps().unwrap().is_empty());
    drop(queue);
    disk.close().unwrap();

    let below = open_at(&world, IMAGE, Format::Qcow2);
    assert_eq!(below.bitmaps().unwrap()[0].state, BitmapState::Consistent);
    assert_eq!(below.bitmap_ranges("b").unwrap(), [0..65536, 3 * 65536..4 * 65536]);
    below.close().unwrap();
    crate::torture::assert_sound(&world.content(Path::new(IMAGE)).unwrap());
}

#[test]
fn bitmaps_stay_in_use_when_the_disk_does_not_go_on_in_an_overlay() {
    let world = World::new(11);
    let [disk, _] = disks(&world);
    disk.create_bitmap("b", Some(65536), true).unwrap();
    let refusal = || Err(Error::new(ErrorKind::NoSpace, "no room for the note"));
    snapshot_disks(vec![(disk.clone(), Overlay::new(Path::new("/over")))], refusal).unwrap_err();
    let mut queue = disk.queue().unwrap();
    write(&world, &mut queue, 65536, 2);
    ask(&world, &mut queue, Request::Flush).unwrap();
    drop(queue);
    disk.forget();
    world.kill_process();

    let again = open_at(&world, IMAGE, Format::Qcow2);
    assert_eq!(again.bitmaps().unwrap()[0].state, BitmapState::Inconsistent);
}

/// The step from `faulty` on every operation fails. How many layers there are afterwards.
fn cut_short(faulty: u64, raw: bool) -> usize {
    let world = World::new(faulty);
    let disk = disks(&world)[usize::from(raw)].clone();
    let mut queue = disk.queue().unwrap();
    write(&world, &mut queue, 0, 1);
    let ended = Rc::new(RefCell::new(None));
    run_cut_short(&world, faulty, |control| {
        let (disks, ended) = ([(disk.clone(), Overlay::new(Path::new("/over")))], ended.clone());
        async move {
            let result = snapshot_on(&control, &disks, || Ok(())).await;
            *ended.borrow_mut() = Some(result);
        }
    });
    let layers = disk.layers().len();
    let ended = ended.borrow_mut().take().unwrap();
    assert_eq!(ended.is_ok(), layers == 2, "step {faulty}: {ended:?}");
    assert_eq!(world.content(Path::new("/over")).is_some(), layers == 2, "step {faulty}");
    // It goes on as it was, or in the overlay.
    write(&world, &mut queue, 4096, 2);
    ask(&world, &mut queue, Request::Flush).unwrap();
    assert_eq!([0, 4096].map(|at| byte_at(&world, &mut queue, at)), [1, 2], "step {faulty}");
    drop(queue);
    disk.close().unwrap();
    layers
}

#[test]
fn a_failure_at_any_step_leaves_the_disk_as_it_was() {
    for raw in [false, true] {
        let layers: Vec<usize> = (0..80).map(|step| cut_short(step, raw)).collect();
        let done = layers.iter().position(|&n| n == 2).unwrap();
        assert!(done > 5 && layers[done..].iter().all(|&n| n == 2), "{layers:?}");
    }
}

#[test]
fn the_name_of_the_image_below_is_one_that_leads_there_again() {
    let dir = tempfile::tempdir().unwrap();
    let host = OpenPolicy { allow_dirs: vec![dir.path().to_path_buf()], ..OpenPolicy::host() };
    std::fs::create_dir(dir.path().join("sub")).unwrap();
    for (top, over, expected) in [
        ("a.raw", "a.over", Some("a.raw".to_string())),
        ("b:b.raw", "b.over", Some("./b:b.raw".to_string())),
        ("c.raw", "sub/c.over", Some(dir.path().canonicalize().unwrap().join("c.raw").to_str().unwrap().to_string())),
        (
            "sub/d.raw",
            "d.over",
            Some(dir.path().canonicalize().unwrap().join("sub/d.raw").to_str().unwrap().to_string()),
        ),
    ] {
        let (top, over) = (dir.path().join(top), dir.path().join(over));
        std::fs::write(&top, vec![7; SIZE as usize]).unwrap();
        let disk = Disk::open(&DiskSpec::new(&top, Format::Raw), &host).unwrap();
        disk.snapshot_to(Overlay::new(&over)).unwrap();
        disk.close().unwrap();
        let bytes = std::fs::read(&over).unwrap();
        let header = Header::parse(&bytes, bytes.len() as u64).unwrap();
        assert_eq!(header.backing_name.map(|name| String::from_utf8(name).unwrap()), expected);
        Disk::open(&DiskSpec::new(&over, Format::Qcow2), &host).unwrap().close().unwrap();
    }
    // Without allowed directories a disk could not be opened again from below its own.
    let top = dir.path().join("a.raw");
    let disk = Disk::open(&DiskSpec::new(&top, Format::Raw), &OpenPolicy::host()).unwrap();
    let refused = disk.snapshot_to(Overlay::new(&dir.path().join("sub/e.over"))).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Refused, "{refused}");
    let outside = tempfile::tempdir().unwrap();
    let disk = Disk::open(&DiskSpec::new(&dir.path().join("c.raw"), Format::Raw), &host).unwrap();
    let refused = disk.snapshot_to(Overlay::new(&outside.path().join("over"))).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Refused, "{refused}");
}

#[test]
fn requests_wait_for_the_moment_only_and_go_on_in_the_overlay() {
    let world = World::new(10);
    let [disk, _] = disks(&world);
    let mut queue = disk.queue().unwrap();
    let control = Queue::new(world.driver().unwrap());
    let task = {
        let (disks, control) = ([(disk.clone(), Overlay::new(Path::new("/over")))], control.clone());
        async move { snapshot_on(&control, &disks, || Ok(())).await.unwrap() }
    };
    control.spawn(task);
    let buffer = Buffer::from_bytes(&[5; 512]);
    let mut events = Vec::new();
    let (mut sent, mut during) = (0, 0);
    while control.live_tasks() > 0 {
        if queue.in_flight() == 0 {
            queue.submit(sent, Request::Write { offset: sent * 512, data: vec![buffer.seg(0, 512)] });
            sent += 1;
        }
        world.step();
        control.turn(false, &mut Vec::new()).unwrap();
        queue.wait(Wait::Poll, &mut events).unwrap();
        during += events.drain(..).filter(|event| matches!(event, Event::Done { result: Ok(()), .. })).count();
    }
    assert!(during > 3, "{during} requests were served meanwhile");
    while queue.in_flight() > 0 {
        world.step();
        queue.wait(Wait::Poll, &mut events).unwrap();
    }
    assert!((0..sent).all(|i| byte_at(&world, &mut queue, i * 512) == 5));
    assert_eq!(disk.layers().len(), 2);
}
