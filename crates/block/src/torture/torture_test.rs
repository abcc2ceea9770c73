use super::*;

/// A new image whose making is cut short: it either has no magic yet, or it is whole.
fn create_cut_short(seed: u64, skipped: Option<Barrier>) -> Result<(), String> {
    let params = CreateParams { cluster_bits: ClusterBits::new(9).unwrap(), ..CreateParams::new(4 << 20) };
    make_cut_short(seed, skipped, params, 120)
}

/// The same for any image, cut short within so many steps.
fn make_cut_short(seed: u64, skipped: Option<Barrier>, params: CreateParams, within: u64) -> Result<(), String> {
    let name = params.backing.as_ref().map(|(name, _)| name.clone());
    let mut rng = Rng::new(seed);
    let world = World::new(rng.next_u64());
    world.skip_barrier(skipped);
    let file = world.create(Path::new(IMAGE)).map_err(text)?;
    world.sync_dir(Path::new("/")).map_err(text)?;
    let queue = Queue::new(world.driver().map_err(text)?);
    let task = {
        let queue = queue.clone();
        async move { create::create(&queue, &file, Path::new(IMAGE), &params, false).await.unwrap() }
    };
    queue.spawn(task);
    let steps = rng.below(within);
    for _ in 0..steps {
        queue.turn(false, &mut Vec::new()).map_err(text)?;
        world.step();
    }
    let made = queue.live_tasks() == 0;
    world.cut_power();
    queue.shut_down();
    let image = world.content(Path::new(IMAGE)).ok_or("the image is gone")?;
    match cowhand_qcow2::Header::probe(&image) {
        true => {
            let header = cowhand_qcow2::Header::parse(&image, image.len() as u64).map_err(text)?;
            let named = header.backing_name == name;
            check::check(&image).and(if named { Ok(()) } else { Err("it names another backing file".into()) })
        }
        false if made => Err("the image was reported made, and is not there".into()),
        false => Ok(()),
    }
}

#[test]
fn an_image_whose_making_is_cut_short_is_whole_or_none() {
    let failed: Vec<_> = (0..2000).filter_map(|seed| create_cut_short(seed, None).err()).collect();
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn edge_57_an_image_whose_making_is_cut_short_names_its_backing_file_in_full_or_is_none() {
    let cut_short = |seed| {
        // The name reaches into the second sector of the header area.
        let backing = Some((vec![b'b'; 500], "raw".into()));
        let cluster_bits = ClusterBits::new(12).unwrap();
        make_cut_short(seed, None, CreateParams { cluster_bits, backing, ..CreateParams::new(1 << 20) }, 10)
    };
    let failed: Vec<_> = (0..2000).filter_map(|seed| cut_short(seed).err()).collect();
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn without_the_barrier_before_a_new_header_a_seed_fails() {
    assert!((0..2000).any(|seed| create_cut_short(seed, Some(Barrier::Create)).is_err()));
}

#[test]
fn without_the_barrier_after_a_new_header_a_seed_fails() {
    assert!((0..2000).any(|seed| create_cut_short(seed, Some(Barrier::Header)).is_err()));
}

/// An image with an autoclear bit that we do not know is opened for writing, one sector is written, and the power fails. Whether
/// the sector is new while the bit is still set: what the bit vouches for would then be stale.
fn autoclear_outlives_a_write(seed: u64, skipped: Option<Barrier>) -> bool {
    let mut rng = Rng::new(seed);
    let world = World::new(rng.next_u64());
    let path = Path::new(IMAGE);
    make(&world, path, &CreateParams { cluster_bits: ClusterBits::new(9).unwrap(), ..CreateParams::new(1 << 20) })
        .unwrap();
    let policy = OpenPolicy {
        storage: Arc::new(world.clone()),
        allow_dirs: Vec::new(),
        probe: false,
        temp_dir: PathBuf::new(),
        ..OpenPolicy::host()
    };
    let write = |byte: u8, cut_after: u64| {
        let disk = Disk::open(&DiskSpec::new(path, Format::Qcow2), &policy).unwrap();
        let mut queue = disk.queue().unwrap();
        let buffer = Buffer::from_bytes(&[byte; 512]);
        queue.submit(0, Request::Write { offset: 0, data: vec![buffer.seg(0, 512)] });
        for _ in 0..cut_after {
            world.step();
            queue.wait(Wait::Poll, &mut Vec::new()).unwrap();
        }
        if cut_after < 100 {
            world.cut_power();
            disk.forget();
        }
        drop(queue);
    };
    write(1, 100);
    // Allocated now, so that the next write needs nothing but its data.
    let mut image = world.content(path).unwrap();
    image[95] = 0x80;
    world.put(path, image);
    world.skip_barrier(skipped);
    write(2, rng.below(12));
    let image = world.content(path).unwrap();
    let written = image.chunks(512).any(|sector| sector == [2; 512]);
    written && image[95] == 0x80
}

#[test]
fn autoclear_bits_are_gone_before_the_first_write_lands_edge_03() {
    assert!(!(0..2000).any(|seed| autoclear_outlives_a_write(seed, None)));
}

#[test]
fn without_the_barrier_after_autoclear_bits_a_seed_fails_edge_03() {
    assert!((0..2000).any(|seed| autoclear_outlives_a_write(seed, Some(Barrier::Header))));
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let trace = |seed| run_traced(seed, Some(Defect::NoBarrier(Barrier::BeforeMapping)), None, true);
    let seed = (0..2000).find(|&seed| trace(seed).0.is_err()).unwrap();
    let (first, second) = (trace(seed), trace(seed));
    assert!(!first.1.is_empty());
    assert_eq!(first, second);
}

#[test]
fn some_seeds_play_on_an_image_that_a_snapshot_shares_edge_38() {
    let shares = |seed| {
        let mut rng = Rng::new(seed);
        let case = Case::of(&mut rng, None);
        let world = World::new(rng.next_u64());
        let mut play = Play::new(world, rng, case);
        play.create().unwrap();
        play.frozen.clusters.len() > 2
    };
    assert!((0..60).filter(|&seed| shares(seed)).count() >= 6);
}

#[test]
fn some_seeds_write_compressed_clusters_that_share_a_host_cluster_edge_26() {
    let packs = |seed| {
        let mut rng = Rng::new(seed);
        let case = Case::of(&mut rng, None);
        let mut play = Play::new(World::new(rng.next_u64()), rng, case);
        play.create().unwrap();
        play.life().unwrap();
        play.compressed
    };
    let found: Vec<u64> = (0..60).map(packs).collect();
    assert!(found.iter().filter(|&&count| count > 2).count() >= 6, "{found:?}");
}

#[test]
fn some_seeds_go_on_in_overlays_and_are_copied() {
    let (mut overlays, mut copies, mut mirrors) = (0, 0, 0);
    for seed in 0..100 {
        let mut rng = Rng::new(seed);
        let case = Case::of(&mut rng, None);
        let world = World::new(rng.next_u64());
        let mut play = Play::new(world, rng, case);
        play.create().unwrap();
        (0..4).for_each(|_| play.life().unwrap());
        overlays += play.below.len();
        copies += play.copies.0;
        mirrors += play.copies.1;
    }
    println!("{overlays} overlays, {copies} copies, {mirrors} mirrors");
    assert!(overlays > 20 && copies > 5 && mirrors > 3);
}
