//! Opening a disk's chain of images: which files may be opened, in which format, with which locks.
//!
//! What the guest can write never decides about a format or a file: formats stand in the DISK or in a header, and files that
//! headers name are opened only below allowed directories.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use cowhand_qcow2::{CreateParams, Header};

use crate::error::{Error, ErrorKind, Result};
use crate::io::{File, FileKind, OpenMode, Role, Storage};
use crate::journal::{Left, Survival};
use crate::locks::lock;
use crate::node::Node;
use crate::options::{NodeOptions, OptionsError, Surroundings};
use crate::probe::probe;
use crate::protocol::{self, FileSpec, How};
use crate::qcow2::data::DataFile;
use crate::qcow2::open::{ImageOptions, METADATA_CACHE, Opening};
use crate::qcow2::{Image, create};
use crate::queue::Queue;
use crate::raw::RawImage;
use crate::secret::{Secret, SecretSource};
use crate::shared::{Key, SharedLayers};
use crate::spec::{Backing, Cache, DiskSpec, Format};
use crate::sync::Arc;
use crate::tuning::Tuning;

mod left;
mod look;
mod names;

use self::left::{is_synchronous, left};
pub(crate) use self::look::{Top, look};
use self::names::allowed;
pub(crate) use self::names::{directory_of, named_file, referenced_path};

/// A chain this deep is taken for a mistake.
pub(crate) const DEPTH_MAX: usize = 1000;

/// What opening a disk may do.
#[derive(Clone)]
pub struct OpenPolicy {
    /// Where files live.
    pub storage: Arc<dyn Storage>,
    /// Whether the format of a backing file that no header records may be guessed from its content. Who can write that file, a
    /// guest above all, then decides what is read as an image's header, and which files that names.
    pub probe: bool,
    /// Below which directories files named by image headers may be opened; if empty, below each image's own.
    pub allow_dirs: Vec<PathBuf>,
    /// Where the throw-away overlays of `ephemeral=on` are made.
    pub temp_dir: PathBuf,
    /// What writes survive that were not flushed.
    pub survival: Survival,
    /// How long opening waits for a lock that another holds. A process that was killed may keep its locks for a moment, until the kernel
    /// has ended its operations: the wait is also what keeps these from coming later than ours.
    pub lock_patience: Duration,
    /// Where layers are that other disks of this process have open, and that this one may have in common with them.
    pub shared: Option<Arc<SharedLayers>>,
}

impl OpenPolicy {
    /// The policy of a program on this host without options: each image's own directory, overlays in `/var/tmp` (or `TMPDIR`).
    #[must_use]
    pub fn host() -> Self {
        let temp_dir = std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
        Self {
            storage: Arc::new(crate::io::host::Host::default()),
            allow_dirs: Vec::new(),
            probe: false,
            temp_dir,
            survival: Survival::PowerCut,
            lock_patience: Duration::ZERO,
            shared: None,
        }
    }
}

/// A layer that is open but not connected to what lies below it.
struct Layer {
    path: PathBuf,
    file: File,
    image: Unconnected,
    secret: Option<Secret>,
    /// Its format was guessed.
    guessed: bool,
}

enum Unconnected {
    /// With the length that its file is going to have, when that is not filled yet.
    Raw(Option<u64>),
    /// With its header, which is read once: what it says of the layer below and what the image is made from cannot differ.
    Qcow2(Box<Opening>),
}

impl Layer {
    async fn new(
        queue: &Rc<Queue>,
        path: PathBuf,
        file: File,
        (format, secret): (Format, Option<Secret>),
    ) -> Result<Self> {
        let image = match format {
            Format::Raw => Unconnected::Raw(None),
            Format::Qcow2 => Unconnected::Qcow2(Box::new(Opening::header(queue, file.clone(), &path).await?)),
        };
        Ok(Self { path, file, image, secret, guessed: false })
    }

    /// The topmost layer, which may be one that is being filled.
    async fn top(queue: &Rc<Queue>, file: File, spec: &DiskSpec, policy: &OpenPolicy) -> Result<Self> {
        let (path, secret) = (spec.path.clone(), secret(spec, policy)?);
        let image = match (spec.format, spec.unfinished) {
            (Format::Raw, unfinished) => Unconnected::Raw(unfinished),
            (Format::Qcow2, None) => Unconnected::Qcow2(Box::new(Opening::header(queue, file.clone(), &path).await?)),
            (Format::Qcow2, Some(_)) => {
                Unconnected::Qcow2(Box::new(Opening::unfinished(queue, file.clone(), &path).await?))
            }
        };
        Ok(Self { path, file, image, secret, guessed: spec.guessed })
    }
}

/// Opens a disk's layers and connects them.
pub(crate) async fn open(queue: &Rc<Queue>, spec: &DiskSpec, policy: &OpenPolicy) -> Result<Arc<Node>> {
    open_over(queue, spec, policy, None).await
}

/// The same down to a layer that is open already, with all that is below it; without it the chain is not opened.
pub(crate) async fn open_over(
    queue: &Rc<Queue>,
    spec: &DiskSpec,
    policy: &OpenPolicy,
    base: Option<&Arc<Node>>,
) -> Result<Arc<Node>> {
    let writable = !spec.readonly && !spec.ephemeral;
    let Layers { mut layers, described, base: mut node } = open_layers(queue, spec, policy, base, Locks::Taken).await?;
    if node.is_none() && base.is_some() {
        let message = "the image below it has changed meanwhile";
        return Err(Error::new(ErrorKind::Invalid, message).at_path(&spec.path));
    }
    let mut left = left(spec, policy)?;
    if let (Some(left), Some(top)) = (&left, layers.first()) {
        left.check(top.file.traits().identity, &spec.path)?;
    }
    let mut known: Vec<_> = layers.iter().map(|layer| layer.file.traits().identity).collect();
    let open_already = std::iter::successors(node.as_ref(), |node| node.backing());
    known.extend(open_already.flat_map(|node| [node.file(), node.data_file()]).map(|file| file.traits().identity));
    let mut files = Files { known, written: writable };
    let cache_below = metadata_cache_below(spec, layers.len());
    while let Some(layer) = layers.pop() {
        let is_top = layers.is_empty() && !spec.ephemeral;
        let described = described.get(layers.len()).and_then(Option::as_deref);
        let options = ImageOptions {
            writable: writable && is_top,
            no_flush: spec.cache == Cache::Unsafe,
            metadata_cache: if is_top { spec.metadata_cache } else { Some(cache_below) },
            tuning: described.map(|spec| spec.tuning).unwrap_or_default(),
            discard_no_unref: spec.discard_no_unref,
            resolve: is_top,
            synchronous: is_synchronous(policy),
        };
        let how = How { write: options.writable, spec, policy };
        let external = data_file(queue, &layer, &mut files, described, (how, Locks::Taken)).await?;
        let links = (node.take(), external);
        let left = left.take_if(|_| is_top);
        let shared = shared_as(&layer, described, spec).filter(|_| !layers.is_empty());
        let connected = Arc::new(connect(queue, layer, links, options, left).await?);
        if let (Some(key), Some(shared)) = (shared, &policy.shared) {
            shared.put(key, &connected);
        }
        node = Some(connected);
    }
    let node = node.ok_or_else(|| Error::new(ErrorKind::Invalid, "a disk without layers"))?;
    if spec.ephemeral { overlay(queue, node, spec, policy).await } else { Ok(node) }
}

/// As what a layer can be had in common, if it can.
fn shared_as(layer: &Layer, described: Option<&DiskSpec>, spec: &DiskSpec) -> Option<Key> {
    let format = match layer.image {
        Unconnected::Raw(_) => Format::Raw,
        Unconnected::Qcow2(_) => Format::Qcow2,
    };
    let plain = described.is_none() && layer.secret.is_none() && !layer.guessed;
    plain.then(|| Key::new(layer.path.clone(), layer.file.traits().identity, format, spec))
}

/// The layers of a disk, open but not connected.
pub(crate) struct Layers<'a> {
    /// The topmost first.
    layers: Vec<Layer>,
    /// How they are described, those that are.
    described: Vec<Option<Cow<'a, DiskSpec>>>,
    /// What is open already below the last one.
    base: Option<Arc<Node>>,
}

/// Whether files are locked when they are opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Locks {
    /// As the disk's description says.
    Taken,
    /// Nothing is going to be used but what headers say.
    Left,
}

/// Opens a disk's layers down to the one that is open already.
async fn open_layers<'a>(
    queue: &Rc<Queue>,
    spec: &'a DiskSpec,
    policy: &OpenPolicy,
    base: Option<&Arc<Node>>,
    locks: Locks,
) -> Result<Layers<'a>> {
    let writable = !spec.readonly && !spec.ephemeral;
    let top = protocol::open(queue, &spec.file(), How { write: writable, spec, policy }).await?;
    if locks == Locks::Taken {
        lock(&top, &spec.path, writable, spec, policy)?;
    }
    if spec.format == Format::Raw && !spec.force_raw {
        refuse_qcow2(queue, &spec.path, &top).await?;
    }
    let top = Layer::top(queue, top, spec, policy).await?;
    let mut opened = Layers { layers: vec![top], described: vec![Some(Cow::Borrowed(spec))], base: None };
    // Downwards, opening; then upwards, connecting: a deep chain needs no deep stack.
    while let Some(next) = below(queue, &opened, (base, locks), policy).await? {
        match next {
            Below::Opened(next) => {
                let (next, given) = *next;
                opened.layers.push(next);
                opened.described.push(given);
            }
            Below::Base(base) => {
                opened.base = Some(base);
                break;
            }
        }
    }
    Ok(opened)
}

/// The disk's secret, if it has one.
pub(crate) fn secret(spec: &DiskSpec, policy: &OpenPolicy) -> Result<Option<Secret>> {
    let Some(source) = &spec.secret else { return Ok(None) };
    if let SecretSource::Known(secret) = source {
        return Ok(Some(secret.clone()));
    }
    let secret = policy.storage.secret(source);
    let secret =
        secret.map_err(|e| Error::io(format!("cannot read the secret from {source}"), e).at_path(&spec.path))?;
    Ok(Some(secret))
}

/// Opens an image that is to come over `top`, a disk's topmost layer, and is not connected with it yet. Its file is locked.
pub(crate) async fn open_overlay(
    queue: &Rc<Queue>,
    opening: Opening,
    (file, path): (&File, &Path),
    top: &Node,
    (spec, policy): (&DiskSpec, &OpenPolicy),
) -> Result<Image> {
    let image = Unconnected::Qcow2(Box::new(opening));
    let layer = Layer { path: path.to_path_buf(), file: file.clone(), image, secret: None, guessed: false };
    let layers = std::iter::successors(Some(top), |node| node.backing().map(|node| &**node));
    let known = layers.flat_map(|node| [node.file(), node.data_file()]).map(|file| file.traits().identity).collect();
    let mut files = Files { known, written: true };
    let external =
        data_file(queue, &layer, &mut files, None, (How { write: true, spec, policy }, Locks::Taken)).await?;
    let Unconnected::Qcow2(opening) = layer.image else {
        return Err(Error::new(ErrorKind::Invalid, "only a qcow2 image can be an overlay").at_path(path));
    };
    let options = ImageOptions {
        writable: true,
        no_flush: spec.cache == Cache::Unsafe,
        metadata_cache: spec.metadata_cache,
        tuning: Tuning::default(),
        discard_no_unref: spec.discard_no_unref,
        resolve: true,
        synchronous: is_synchronous(policy),
    };
    opening.finish(queue, (None, external), secret(spec, policy)?.as_ref(), options).await
}

/// Bytes of metadata that each of `layers` images below the topmost keeps: only what their tables are asked for again and again, as
/// compressed clusters are; everything else stands in the topmost image's cache.
pub(crate) fn metadata_cache_below(spec: &DiskSpec, layers: usize) -> u64 {
    let all = spec.metadata_cache.unwrap_or(METADATA_CACHE);
    (all / 4 / layers as u64).max(1 << 20)
}

async fn connect(
    queue: &Rc<Queue>,
    layer: Layer,
    links: (Option<Arc<Node>>, Option<DataFile>),
    options: ImageOptions,
    left: Option<Left>,
) -> Result<Node> {
    match layer.image {
        Unconnected::Raw(unfinished) => {
            if left.is_some_and(|left| !left.records.is_empty()) {
                let message = "the memory that is to survive the process is damaged: a raw disk needs no records";
                return Err(Error::new(ErrorKind::Refused, message).at_path(&layer.path));
            }
            let ImageOptions { writable, no_flush, .. } = options;
            let mut raw = RawImage::new(layer.file, &layer.path, unfinished, writable, no_flush)?;
            raw.guessed = layer.guessed;
            Ok(Node::Raw(raw))
        }
        Unconnected::Qcow2(opening) => {
            let image = opening.finish_after(queue, links, layer.secret.as_ref(), options, left).await?;
            Ok(Node::Qcow2(Box::new(image)))
        }
    }
}

/// The files of a chain, by device and inode.
struct Files {
    /// Those of the layers, the topmost first, and then the data files that are open.
    known: Vec<(u64, u64)>,
    /// Whether the topmost layer is written.
    written: bool,
}

impl Files {
    /// Takes a data file, which is written or not. False if a guest's writes would change what it, or another layer, reads.
    fn take(&mut self, identity: (u64, u64), write: bool) -> bool {
        let others = match self.known.as_slice() {
            all if write => all,
            [top, ..] if self.written => std::slice::from_ref(top),
            _ => &[],
        };
        let alone = !others.contains(&identity);
        self.known.push(identity);
        alone
    }
}

/// Opens a layer's external data file, if it has one.
async fn data_file(
    queue: &Rc<Queue>,
    layer: &Layer,
    files: &mut Files,
    described: Option<&DiskSpec>,
    (how, locks): (How<'_>, Locks),
) -> Result<Option<DataFile>> {
    let How { write, spec, policy } = how;
    let Unconnected::Qcow2(opening) = &layer.image else { return Ok(None) };
    let header = opening.parsed();
    if !header.has_data_file() {
        return Ok(None);
    }
    let place = match (described.and_then(|spec| spec.data_file.as_ref()), header.external_data_file_name()) {
        (Some(place), _) => place.clone(),
        (None, Some(name)) => FileSpec::host(&referenced_path("data file", name, &layer.path, policy)?),
        (None, None) => {
            let message = "'data-file' is required for this image";
            return Err(Error::new(ErrorKind::Refused, message).at_path(&layer.path));
        }
    };
    let in_words = |e: Error| {
        let message = format!("Could not open data file: {e}");
        Error::new(e.kind(), message).at_path(&layer.path)
    };
    let file = protocol::open(queue, &place, how).await.map_err(in_words)?;
    let path = place.path;
    if file.traits().identity == layer.file.traits().identity {
        let message = "names itself as its data file";
        return Err(Error::new(ErrorKind::Corrupt, message).at_path(&layer.path));
    }
    // Before the lock, as with a loop: another layer's lock is our own.
    if !files.take(file.traits().identity, write) {
        let message = format!(
            "its data file {} is another layer's too, and would change under it with each write; open the disk with \
             readonly=on",
            path.display()
        );
        return Err(Error::new(ErrorKind::Refused, message).at_path(&layer.path));
    }
    if locks == Locks::Taken {
        lock(&file, &path, write, spec, policy).map_err(in_words)?;
    }
    Ok(Some(DataFile { file: file.of(Role::Content), path, raw: header.is_data_file_raw() }))
}

/// A throw-away overlay over `node`, whose header names nothing.
async fn overlay(queue: &Rc<Queue>, node: Arc<Node>, spec: &DiskSpec, policy: &OpenPolicy) -> Result<Arc<Node>> {
    let dir = &policy.temp_dir;
    let file = policy.storage.create_unnamed(dir);
    let file = file.map_err(|e| Error::io("cannot make a throw-away overlay in this directory", e).at_path(dir))?;
    let path = dir.join(format!("throw-away overlay over {}", spec.path.display()));
    create::create(queue, &file, &path, &CreateParams::new(node.size()), true).await?;
    let options = ImageOptions {
        writable: true,
        no_flush: true,
        metadata_cache: spec.metadata_cache,
        tuning: Tuning::default(),
        discard_no_unref: spec.discard_no_unref,
        resolve: true,
        synchronous: false,
    };
    let opening = Opening::header(queue, file, &path).await?;
    let image: Image = opening.finish(queue, (Some(node), None), None, options).await?;
    Ok(Arc::new(Node::Qcow2(Box::new(image))))
}

/// The layer below another one.
enum Below<'a> {
    /// And how it was described, if it was.
    Opened(Box<(Layer, Option<Cow<'a, DiskSpec>>)>),
    /// It is open already.
    Base(Arc<Node>),
}

/// The layer below the last one, if there is one.
async fn below<'a>(
    queue: &Rc<Queue>,
    Layers { layers, described, .. }: &Layers<'a>,
    (base, locks): (Option<&Arc<Node>>, Locks),
    policy: &OpenPolicy,
) -> Result<Option<Below<'a>>> {
    let ([.., last], [Some(spec), ..]) = (layers.as_slice(), described.as_slice()) else { return Ok(None) };
    let spec: &DiskSpec = spec;
    let Unconnected::Qcow2(opening) = &last.image else { return Ok(None) };
    let of_last = described.last().and_then(Option::as_ref);
    let (place, format, given) = match of_last.map(|spec| &spec.backing) {
        Some(Backing::Alone) => return Ok(None),
        Some(Backing::Given(given)) => (given.file(), Some(given.format), Some(Cow::Owned(DiskSpec::clone(given)))),
        Some(Backing::Header) | None => {
            let header = opening.parsed();
            let Some(name) = &header.backing_name else { return Ok(None) };
            if name.starts_with(b"json:") {
                let given = described_by(name, header.backing_format(), &last.path, spec, policy)?;
                (given.file(), Some(given.format), Some(Cow::Owned(given)))
            } else {
                let format = match (of_last.and_then(|spec| spec.backing_format), header.backing_format()) {
                    (Some(format), _) => Some(format),
                    (None, Some(name)) => Some(backing_format(name, last)?),
                    (None, None) if policy.probe => None,
                    (None, None) => {
                        let message = "its backing file's format is not recorded, and is not guessed; give \
                                       backing-format=, or record it with 'qemu-img rebase -u -F FORMAT -b BACKING IMAGE'";
                        return Err(Error::new(ErrorKind::Refused, message).at_path(&last.path));
                    }
                };
                (FileSpec::host(&referenced_path("backing file", name, &last.path, policy)?), format, None)
            }
        }
    };
    if layers.len() >= DEPTH_MAX {
        let message = format!("the backing chain is more than {DEPTH_MAX} images deep");
        return Err(Error::new(ErrorKind::Refused, message).at_path(&last.path));
    }
    let in_words = |e: Error| {
        let message = format!("Could not open backing file: {e}");
        Error::new(e.kind(), message).at_path(&last.path)
    };
    let spec = given.as_deref().unwrap_or(spec);
    let file = protocol::open(queue, &place, How { write: false, spec, policy }).await.map_err(in_words)?;
    let path = place.path;
    // Before the lock: a loop to the top would meet our own, and blame another process.
    let identity = file.traits().identity;
    if layers.iter().any(|layer| layer.file.traits().identity == identity) {
        let message = format!("the backing chain loops: {} is in it twice", path.display());
        return Err(Error::new(ErrorKind::Corrupt, message).at_path(&last.path));
    }
    if let Some(base) = base.filter(|base| base.file().traits().identity == identity) {
        return Ok(Some(Below::Base(base.clone())));
    }
    if let (None, None, Some(format), Some(shared)) = (base, &given, format, &policy.shared)
        && locks == Locks::Taken
        && let Some(layer) = shared.find(&Key::new(path.clone(), identity, format, spec))
    {
        return Ok(Some(Below::Base(layer)));
    }
    if locks == Locks::Taken {
        lock(&file, &path, false, spec, policy).map_err(in_words)?;
    }
    let guessed = format.is_none() || given.as_ref().is_some_and(|given| given.guessed);
    let format = match format {
        Some(format) => format,
        None => probe(queue, &path, &file).await.map_err(in_words)?,
    };
    let mut layer = Layer::new(queue, path, file, (format, secret(spec, policy)?)).await.map_err(in_words)?;
    layer.guessed = guessed;
    Ok(Some(Below::Opened(Box::new((layer, given)))))
}

/// The backing disk that a `json:` name in a header describes. It is a stranger's description: of the files in it each must be one that
/// may be opened, and secrets it has none.
pub(crate) fn described_by(
    name: &[u8],
    format: Option<&str>,
    image: &Path,
    spec: &DiskSpec,
    policy: &OpenPolicy,
) -> Result<DiskSpec> {
    let refuse =
        |e: OptionsError| Error::new(ErrorKind::Refused, format!("Could not open backing file: {e}")).at_path(image);
    let mut options = NodeOptions::from_json(&String::from_utf8_lossy(name)).map_err(refuse)?;
    if let Some(format) = format {
        options.set_default("driver", format);
    }
    let base = DiskSpec {
        readonly: true,
        secret: None,
        backing_format: None,
        compress: false,
        unfinished: None,
        ..spec.clone()
    };
    let given = options.into_spec(&base, &Strangers).map_err(refuse)?;
    for path in given.named() {
        allowed("backing file", &path, image, policy)?;
    }
    if let Some(what) = given.files().iter().find_map(FileSpec::not_for_headers) {
        return Err(refuse(OptionsError::new(format!("a header may not ask for {what}"))));
    }
    Ok(given)
}

/// What a description in a header may rely on: nothing.
struct Strangers;

impl Surroundings for Strangers {
    fn format_of(&self, _file: &FileSpec) -> std::result::Result<Format, String> {
        Err("its format is not recorded, and is not guessed".into())
    }

    fn secret(&self, id: &str) -> std::result::Result<Option<SecretSource>, String> {
        Err(format!("No secret with id '{id}'"))
    }
}

fn backing_format(name: &str, layer: &Layer) -> Result<Format> {
    name.parse().map_err(|error: crate::spec::FormatError| {
        let message = format!("Could not open backing file: {error}");
        Error::new(ErrorKind::Unsupported, message).at_path(&layer.path)
    })
}

/// Opens what the disk lies in, and locks it.
pub(crate) async fn open_file(queue: &Rc<Queue>, how: How<'_>) -> Result<File> {
    let file = protocol::open(queue, &how.spec.file(), how).await?;
    lock(&file, &how.spec.path, how.write, how.spec, how.policy)?;
    Ok(file)
}

/// Opens a file of the host.
pub(crate) fn open_unlocked(policy: &OpenPolicy, path: &Path, write: bool, spec: &DiskSpec) -> Result<File> {
    open_plain(policy, path, write, spec, (FileKind::Either, ""))
}

/// Opens a file of the host that has to be of some kind, for the driver that is called so.
pub(crate) fn open_plain(
    policy: &OpenPolicy,
    path: &Path,
    write: bool,
    spec: &DiskSpec,
    (kind, driver): (FileKind, &str),
) -> Result<File> {
    let mode = OpenMode { write, direct: spec.cache.is_direct(), kind };
    policy.storage.open(path, mode).map_err(|e| {
        let wanted = match kind {
            FileKind::Regular => "a regular file",
            FileKind::Device => "either a character or block device",
            FileKind::Either => return open_error(path, write, e),
        };
        match e.kind() {
            std::io::ErrorKind::InvalidInput if e.raw_os_error().is_none() => {
                let message = format!("'{driver}' driver requires '{}' to be {wanted}", path.display());
                Error::new(ErrorKind::Invalid, message).at_path(path)
            }
            std::io::ErrorKind::IsADirectory => Error::open(path, e),
            _ => open_error(path, write, e),
        }
    })
}

fn open_error(path: &Path, write: bool, error: std::io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::EISDIR) => Error::new(ErrorKind::Invalid, "is a directory, not an image").at_path(path),
        Some(libc::EINVAL) => {
            let what = "cannot open; its file system may not know direct I/O (cache=none)";
            Error::io(what, error).at_path(path)
        }
        Some(libc::EACCES | libc::EPERM | libc::EROFS) if write => {
            tracing::debug!("{}: readonly=on needs only reading", path.display());
            Error::open(path, error)
        }
        _ => Error::open(path, error),
    }
}

/// A qcow2 image given as raw would be overwritten by the guest.
async fn refuse_qcow2(queue: &Rc<Queue>, path: &Path, file: &File) -> Result<()> {
    let read = queue.read_buffer(file, 0, 512).await;
    let first = read.map_err(|e| Error::io("cannot read", e).at_path(path))?;
    if Header::probe(&first) {
        let message =
            "given as raw, but it is a qcow2 image; say format=qcow2 (or force-raw=on, to serve its very bytes)";
        return Err(Error::new(ErrorKind::Invalid, message).at_path(path));
    }
    Ok(())
}

#[cfg(test)]
#[path = "chain_test.rs"]
mod tests;
