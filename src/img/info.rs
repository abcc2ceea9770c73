//! `info`: what an image says of itself. Nothing that it names is opened, unless its chain is asked for.

use std::collections::BTreeSet;
use std::os::unix::fs::FileTypeExt;

use clap::Parser;
use cowhand_block::options::NodeOptions;
use cowhand_block::protocol::Protocol;
use cowhand_block::{Backing, BitmapInfo, BitmapState, Format, ImageInfo, Qcow2Info, SnapshotInfo, inspect};
use cowhand_qcow2::cipher::{Aes, Iv, Mode};
use cowhand_qcow2::{Compression, CryptMethod, Incompatible, luks};

use super::arguments::ImageArgs;
use super::context::reason;
use super::tree::{Tree, is_json};
use super::units::human;
use super::{Context, Failure, How};
use super::{node_name, snapshots};

/// Shows what an image says of itself
#[derive(Parser)]
#[command(after_help = "\
Example:
  cowhand img info --backing-chain --output=json disk.qcow2")]
pub(super) struct Args {
    #[command(flatten)]
    image: ImageArgs,
    /// In which form it is told: human or json
    #[arg(long, value_name = "FORM")]
    output: Option<String>,
    /// The images below it too
    #[arg(long)]
    backing_chain: bool,
    /// Without locks: others may use the image meanwhile
    #[arg(short = 'U', long = "force-share")]
    force_share: bool,
    /// The image
    #[arg(value_name = "IMAGE")]
    files: Vec<String>,
}

pub(super) fn run(args: &Args, cx: &Context) -> Result<u8, Failure> {
    cx.take_objects(&args.image.object)?;
    let json = is_json(args.output.as_deref(), "info", cx)?;
    let file = cx.only(&args.files, "info")?;
    let mut images = Vec::new();
    let mut seen = BTreeSet::new();
    let mut next = Some((file.to_string(), args.image.format.clone(), args.image.image_opts));
    while let Some((name, format, image_opts)) = next.take() {
        if !seen.insert(name.clone()) {
            return Err(Failure::new(format!("Backing file '{name}' creates an infinite loop.")));
        }
        let image = image(cx, &name, format.as_deref(), image_opts, args.force_share)?;
        if args.backing_chain && image.info.qcow2.as_ref().is_some_and(|q| q.header.backing_name.is_some()) {
            let below = image.info.backing(&cx.policy).map_err(|e| Context::cannot_open(&name, &e.reason()))?;
            // As it is shown, which is the same file.
            let name = below.and_then(|_| image.backing()).map(|(_, full)| full);
            next = name.map(|name| (name, image.backing_format(), false));
        }
        images.push(image);
    }
    let trees = || images.iter().map(Image::tree).collect::<Vec<_>>();
    match (json, args.backing_chain) {
        (true, true) => println!("{}", Tree::List(trees()).json()),
        (true, false) => trees().iter().for_each(|tree| println!("{}", tree.json())),
        (false, _) => print!("{}", images.iter().map(Image::human).collect::<Vec<_>>().join("\n")),
    }
    Ok(0)
}

/// Looks at one image.
fn image(
    cx: &Context,
    name: &str,
    format: Option<&str>,
    image_opts: bool,
    force_share: bool,
) -> Result<Image, Failure> {
    let how =
        How { format, image_opts, force_share, backing: Backing::Alone, guess: true, keyless: true, ..How::default() };
    let spec = cx.spec(name, &how)?;
    let info = inspect(&spec, &cx.policy);
    let mut info = info.map_err(|e| Context::cannot_open(name, &reason(&e, &spec)))?;
    let is_device = || std::fs::metadata(&spec.path).is_ok_and(|metadata| metadata.file_type().is_block_device());
    let options = if image_opts {
        Some(NodeOptions::from_list(name))
    } else {
        name.starts_with("json:").then(|| NodeOptions::from_json(name))
    };
    let file = spec.path.to_string_lossy().into_owned();
    let (name, file) = match options {
        Some(options) => (node_name::shown(&options.unwrap_or_default(), spec.driver(), &file), file),
        None => (shown(name), shown(name)),
    };
    // What a raw disk is a part of is the file that is below it.
    let below = match (&spec.protocol, spec.format) {
        (Protocol::Part(part), Format::Raw) => part.of.clone(),
        _ => spec.file(),
    };
    if below != spec.file() {
        let whole = inspect(&spec.clone().in_file(below.clone()), &cx.policy);
        info.file_len = whole.map_err(|e| Context::cannot_open(&name, &reason(&e, &spec)))?.file_len;
    }
    let protocol = match below.protocol.driver() {
        None if is_device() => "host_device",
        driver => driver.unwrap_or("file"),
    };
    Ok(Image { name, file, protocol, bare: spec.bare, info })
}

/// A file's name as it is shown: without `file:`, and so that what lies beside it is found by it, whatever it contains.
fn shown(name: &str) -> String {
    match name.strip_prefix("file:") {
        Some(path) if path.split('/').next().is_some_and(|first| first.contains(':')) => format!("./{path}"),
        Some(path) => path.to_string(),
        None => name.to_string(),
    }
}

/// An image that was looked at.
struct Image {
    /// As it was given.
    name: String,
    /// The file in which it lies in the end.
    file: String,
    /// How its file is reached.
    protocol: &'static str,
    /// The driver's name, if there is no format.
    bare: Option<&'static str>,
    info: ImageInfo,
}

impl Image {
    /// The name of its driver.
    fn format(&self) -> &'static str {
        self.bare.unwrap_or(self.info.format.name())
    }

    fn header(&self) -> Option<&cowhand_qcow2::Header> {
        self.info.qcow2.as_ref().map(|qcow2| &qcow2.header)
    }

    fn backing_format(&self) -> Option<String> {
        self.header().and_then(|header| header.backing_format()).map(str::to_string)
    }

    /// The backing file's name, and where that is.
    fn backing(&self) -> Option<(String, String)> {
        let name = self.header()?.backing_name.as_ref()?;
        let name = String::from_utf8_lossy(name).into_owned();
        let full = beside(&self.file, &name);
        Some((name, full))
    }

    fn is_encrypted(&self) -> bool {
        self.header().is_some_and(|header| header.crypt_method != CryptMethod::None)
    }

    fn is_dirty(&self) -> bool {
        self.header().is_some_and(|header| header.incompatible.contains(Incompatible::DIRTY))
    }

    fn file_len(&self) -> u64 {
        self.info.file_len.next_multiple_of(512)
    }

    fn snapshots(&self) -> &[SnapshotInfo] {
        self.info.qcow2.as_ref().map_or(&[], |qcow2| &qcow2.snapshots)
    }

    fn tree(&self) -> Tree {
        let file = Tree::Map(vec![
            ("children", Tree::List(Vec::new())),
            ("virtual-size", self.file_len().into()),
            ("filename", self.file.as_str().into()),
            ("format", self.protocol.into()),
            ("actual-size", self.info.allocated.into()),
            ("format-specific", Tree::Map(vec![("type", self.protocol.into()), ("data", Tree::Map(Vec::new()))])),
            ("dirty-flag", false.into()),
        ]);
        let child = Tree::Map(vec![("name", "file".into()), ("info", file)]);
        let children = if self.bare.is_some() { Vec::new() } else { vec![child] };
        let mut map = vec![("children", Tree::List(children))];
        if let (Some(_), Some(format)) = (self.backing(), self.backing_format()) {
            map.push(("backing-filename-format", format.into()));
        }
        if !self.snapshots().is_empty() {
            map.push(("snapshots", Tree::List(self.snapshots().iter().map(snapshot_tree).collect())));
        }
        map.push(("virtual-size", self.info.virtual_size.into()));
        map.push(("filename", self.name.as_str().into()));
        if let Some(header) = self.header() {
            map.push(("cluster-size", header.cluster_bits.size().into()));
        }
        map.push(("format", self.format().into()));
        map.push(("actual-size", self.info.allocated.into()));
        if let Some(qcow2) = &self.info.qcow2 {
            let specific = vec![("type", "qcow2".into()), ("data", qcow2_tree(qcow2))];
            map.push(("format-specific", Tree::Map(specific)));
        }
        let backing = self.backing();
        if let Some((_, full)) = &backing {
            map.push(("full-backing-filename", full.as_str().into()));
        }
        if self.is_encrypted() {
            map.push(("encrypted", true.into()));
        }
        if let Some((name, _)) = backing {
            map.push(("backing-filename", name.into()));
        }
        map.push(("dirty-flag", self.is_dirty().into()));
        Tree::Map(map)
    }

    fn human(&self) -> String {
        let info = &self.info;
        let mut out = format!(
            "image: {}\nfile format: {}\nvirtual size: {} ({} bytes)\ndisk size: {}\n",
            self.name,
            self.format(),
            human(info.virtual_size),
            info.virtual_size,
            human(info.allocated)
        );
        if self.is_encrypted() {
            out.push_str("encrypted: yes\n");
        }
        if let Some(header) = self.header() {
            out.push_str(&format!("cluster_size: {}\n", header.cluster_bits.size()));
        }
        if self.is_dirty() {
            out.push_str("cleanly shut down: no\n");
        }
        if let Some((name, full)) = self.backing() {
            out.push_str(&format!("backing file: {name}"));
            if name != full {
                out.push_str(&format!(" (actual path: {full})"));
            }
            out.push('\n');
            if let Some(format) = self.backing_format() {
                out.push_str(&format!("backing file format: {format}\n"));
            }
        }
        if !self.snapshots().is_empty() {
            out.push_str("Snapshot list:\n");
            out.push_str(&snapshots::table(self.snapshots()));
        }
        if let Some(qcow2) = &info.qcow2 {
            out.push_str("Format specific information:\n");
            out.push_str(&qcow2_tree(qcow2).human(1));
        }
        if self.bare.is_some() {
            return out;
        }
        out.push_str(&format!(
            "Child node '/file':\n    filename: {}\n    protocol type: {}\n    file length: {} ({} bytes)\n    disk size: \
             {}\n",
            self.file,
            self.protocol,
            human(self.file_len()),
            self.file_len(),
            human(info.allocated)
        ));
        out
    }
}

/// A name in an image's header as a path, as QEMU shows it: what is relative lies beside the image.
fn beside(image: &str, name: &str) -> String {
    let has_protocol = name.split('/').next().is_some_and(|first| first.contains(':'));
    match image.rfind('/') {
        Some(end) if !has_protocol && !name.starts_with('/') => format!("{}{name}", &image[..=end]),
        _ => name.to_string(),
    }
}

fn snapshot_tree(snapshot: &SnapshotInfo) -> Tree {
    let mut map: Vec<(&'static str, Tree)> = Vec::new();
    if let Some(icount) = snapshot.icount {
        map.push(("icount", icount.into()));
    }
    map.extend([
        ("vm-clock-nsec", u64::from(snapshot.vm_clock.subsec_nanos()).into()),
        ("name", snapshot.name.as_str().into()),
        ("date-sec", snapshot.date.as_secs().into()),
        ("date-nsec", u64::from(snapshot.date.subsec_nanos()).into()),
        ("vm-clock-sec", snapshot.vm_clock.as_secs().into()),
        ("id", snapshot.id.as_str().into()),
        ("vm-state-size", snapshot.vm_state_size.into()),
    ]);
    Tree::Map(map)
}

/// What only a qcow2 image has.
pub(crate) fn qcow2_tree(qcow2: &Qcow2Info) -> Tree {
    let header = &qcow2.header;
    let is_new = header.version >= 3;
    let compression = match header.compression {
        Compression::Zlib => "zlib",
        Compression::Zstd => "zstd",
    };
    let mut map: Vec<(&'static str, Tree)> =
        vec![("compat", if is_new { "1.1" } else { "0.10" }.into()), ("compression-type", compression.into())];
    if is_new {
        map.push(("lazy-refcounts", header.has_lazy_refcounts().into()));
    }
    if !qcow2.bitmaps.is_empty() {
        map.push(("bitmaps", Tree::List(qcow2.bitmaps.iter().map(bitmap_tree).collect())));
    }
    map.push(("refcount-bits", u64::from(header.refcount_bits()).into()));
    if let Some(name) = header.external_data_file_name() {
        map.push(("data-file", String::from_utf8_lossy(name).into_owned().into()));
    }
    match (header.crypt_method, &qcow2.luks) {
        (CryptMethod::Luks, Some(luks)) => map.push(("encrypt", luks_tree(luks))),
        (CryptMethod::Aes, _) => map.push(("encrypt", Tree::Map(vec![("format", "aes".into())]))),
        _ => {}
    }
    if header.has_data_file() {
        map.push(("data-file-raw", header.is_data_file_raw().into()));
    }
    if is_new {
        map.push(("corrupt", header.incompatible.contains(Incompatible::CORRUPT).into()));
        map.push(("extended-l2", header.is_extended_l2().into()));
    }
    Tree::Map(map)
}

fn bitmap_tree(bitmap: &BitmapInfo) -> Tree {
    let mut flags = Vec::new();
    if bitmap.state == BitmapState::Inconsistent {
        flags.push("in-use".into());
    }
    if bitmap.enabled {
        flags.push("auto".into());
    }
    Tree::Map(vec![
        ("flags", Tree::List(flags)),
        ("name", bitmap.name.as_str().into()),
        ("granularity", bitmap.granularity.into()),
    ])
}

fn luks_tree(luks: &luks::Header) -> Tree {
    let cipher = luks.cipher();
    let (ivgen, hash) = match cipher.iv {
        Iv::Plain => ("plain", None),
        Iv::Plain64 => ("plain64", None),
        Iv::EssivSha256 => ("essiv", Some("sha256")),
    };
    let algorithm = match cipher.aes {
        Aes::Aes128 => "aes-128",
        Aes::Aes192 => "aes-192",
        Aes::Aes256 => "aes-256",
    };
    let mut map: Vec<(&'static str, Tree)> = vec![
        ("ivgen-alg", ivgen.into()),
        ("detached-header", false.into()),
        ("hash-alg", luks.hash().name().into()),
        ("cipher-alg", algorithm.into()),
        ("uuid", luks.uuid().into()),
    ];
    if let Some(hash) = hash {
        map.push(("ivgen-hash-alg", hash.into()));
    }
    let mode = match cipher.mode {
        Mode::Xts => "xts",
        Mode::Cbc => "cbc",
    };
    let slots = luks.slots().into_iter().map(|slot| {
        let mut map: Vec<(&'static str, Tree)> = vec![("active", slot.active.into())];
        if slot.active {
            map.push(("iters", u64::from(slot.iterations).into()));
        }
        map.push(("key-offset", slot.key_offset.into()));
        if slot.active {
            map.push(("stripes", u64::from(slot.stripes).into()));
        }
        Tree::Map(map)
    });
    map.extend([
        ("format", "luks".into()),
        ("cipher-mode", mode.into()),
        ("slots", Tree::List(slots.collect())),
        ("payload-offset", luks.payload_offset().into()),
        ("master-key-iters", u64::from(luks.digest_iterations()).into()),
    ]);
    Tree::Map(map)
}
