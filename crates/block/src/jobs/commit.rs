//! What an overlay has is written into an image below it; then the overlay may be emptied.
//!
//! Until all of it is durable below, the overlay is not touched: it shows the same throughout, as it hides what is written below. So
//! whatever ends the work half-way, both images are sound, the overlay shows the disk as it was, and doing it again completes it. The
//! images in between, if there are such, show something else from then on: what lies below them has changed.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::Progress;
use super::pieces::{AT_ONCE, BATCH, PIECE, Side};
use crate::chain::{self, OpenPolicy};
use crate::disk::{Disk, block_on};
use crate::error::{Error, ErrorKind, Result};
use crate::join::join_some;
use crate::node::Node;
use crate::queue::Queue;
use crate::spec::{Backing, DiskSpec};
use crate::status::Content;
use crate::sync::Arc;

/// What is to be committed, and where.
#[derive(Clone, Debug, Default)]
pub struct CommitOptions {
    /// The image below that takes it, by its path, or as the header above it names it; the backing file if none is given.
    pub base: Option<PathBuf>,
    /// That path counts from the directory of the image above it alone, as in QEMU, and not from the working directory, too.
    pub beside: bool,
    /// The overlay keeps what it has. It always does where there are images in between, which would show through.
    pub keep: bool,
}

/// Commits the overlay that `spec` describes, on the calling thread. An image below that is smaller grows first.
///
/// # Errors
/// There is no backing file, or no such image in the chain; the image below cannot be written; the host's. Both images are sound then, and
/// the overlay shows the disk as it was.
pub fn commit(spec: &DiskSpec, policy: &OpenPolicy, options: &CommitOptions, progress: Progress) -> Result<()> {
    let (top, base, empty) = open_both(spec, policy, options)?;
    let driver = policy.storage.driver().map_err(|e| Error::io("cannot set up an I/O queue", e))?;
    let queue = Queue::new(driver);
    let task = {
        let (queue, top, base) = (queue.clone(), top.clone(), base.clone());
        async move { commit_on(&queue, &top, &base, empty, progress).await }
    };
    let committed = block_on(&queue, task);
    // The base first: the overlay's layers, among which it is, are unlocked together.
    let closed = base.close();
    let closed = closed.and(top.close());
    committed.and(closed)
}

/// Opens the overlay and the image below that takes what it has, which is made large enough; and whether the overlay is to be emptied.
pub(crate) fn open_both(
    spec: &DiskSpec,
    policy: &OpenPolicy,
    options: &CommitOptions,
) -> Result<(Arc<Disk>, Arc<Disk>, bool)> {
    let reader = Disk::open(&DiskSpec { readonly: true, ..spec.clone() }, policy)?;
    let depth = match &options.base {
        None if reader.layers().len() < 2 => {
            return Err(Error::new(ErrorKind::Invalid, "Image does not have a backing file").at_path(&spec.path));
        }
        None => 1,
        Some(base) => find_base(&reader, base, options.beside, policy)?,
    };
    let below = base_spec(&reader, spec, policy, depth);
    reader.close()?;
    let base = Disk::open(&below?, policy)?;
    let mut top = Disk::open_over(spec, policy, &base)?;
    if base.size() < top.size() {
        let size = top.size();
        top.close()?;
        base.resize(size)?;
        top = Disk::open_over(spec, policy, &base)?;
    }
    Ok((top, base, !options.keep && options.base.is_none()))
}

/// How the image at `depth` is opened to be written.
fn base_spec(reader: &Arc<Disk>, spec: &DiskSpec, policy: &OpenPolicy, depth: usize) -> Result<DiskSpec> {
    let layers = reader.layers();
    let Some(layer) = layers.get(depth) else {
        return Err(Error::new(ErrorKind::Invalid, "the chain has no such layer").at_path(&spec.path));
    };
    // As it is described, or else by what its header and those above it say.
    let mut described = Some(spec.clone());
    let top = reader.node();
    for node in std::iter::successors(Some(&top), |node| node.backing()).take(depth) {
        let given = described.take().and_then(|spec| match spec.backing {
            Backing::Given(given) => Some(*given),
            Backing::Header | Backing::Alone => None,
        });
        described = match (given, &**node) {
            (Some(given), _) => Some(given),
            (None, Node::Qcow2(image)) => {
                let header = image.header_now();
                let json = header.backing_name.as_ref().filter(|name| name.starts_with(b"json:"));
                let by_header = |name| chain::described_by(name, header.backing_format(), node.path(), spec, policy);
                json.map(|name| by_header(name)).transpose()?
            }
            (None, Node::Raw(_)) => None,
        };
    }
    if let Some(described) = described {
        return Ok(DiskSpec { readonly: false, cache: spec.cache, lock: spec.lock, ..described });
    }
    Ok(DiskSpec {
        cache: spec.cache,
        lock: spec.lock,
        secret: spec.secret.clone(),
        metadata_cache: spec.metadata_cache,
        // Its format stands in a header, was given, or was guessed.
        force_raw: true,
        guessed: layer.guessed,
        ..DiskSpec::new(&layer.path, layer.format)
    })
}

/// How deep in the chain the image is that `base` names: by its path, or as the header above it names it.
fn find_base(reader: &Arc<Disk>, base: &Path, beside: bool, policy: &OpenPolicy) -> Result<usize> {
    let layers = reader.layers();
    let canonical = |path: &Path| policy.storage.canonical(path).ok();
    let is_base = |above: &Path, below: &Path| {
        let names = [chain::directory_of(above).join(base), base.to_path_buf()];
        let real = canonical(below);
        names
            .iter()
            .take(if beside { 1 } else { 2 })
            .any(|name| name == below || (real.is_some() && canonical(name) == real))
    };
    let found = layers.windows(2).position(|pair| is_base(&pair[0].path, &pair[1].path));
    found.map(|at| at + 1).ok_or_else(|| {
        let top = reader.spec().path.display();
        let message = format!("Did not find '{}' in the backing chain of '{top}'", base.display());
        Error::new(ErrorKind::NotFound, message).at_path(&reader.spec().path)
    })
}

/// The same with disks that are open: `base` is a layer of `top`, and at least as large.
pub(crate) async fn commit_on(
    queue: &Rc<Queue>,
    top: &Arc<Disk>,
    base: &Arc<Disk>,
    empty: bool,
    mut progress: Progress,
) -> Result<()> {
    let node = top.node();
    let depth = depth_of(&node, &base.node())?;
    let (from, to) = (Side::new(top), Side::new(base));
    let size = node.size();
    let mut at = 0;
    progress(0, size);
    while at < size {
        let mut batch = Vec::new();
        while at < size && batch.len() < BATCH {
            let extent = node.extent(queue, at, size - at).await?;
            at = extent.range.end;
            if extent.depth >= depth {
                continue;
            }
            match extent.content {
                // Also where a layer in between ends, and hides what is below.
                Content::Nothing | Content::Zero => batch.push((extent.range, true)),
                Content::Data | Content::Compressed => {
                    let end = extent.range.end.min(extent.range.start + PIECE);
                    at = end;
                    batch.push((extent.range.start..end, false));
                }
            }
        }
        let copies = batch.iter().map(|(range, zero)| copy(queue, &from, &to, range, *zero));
        join_some(copies, AT_ONCE).await?;
        progress(at, size);
    }
    base.node().flush(queue).await?;
    if empty {
        // Nothing of what is dropped is missing below.
        top.make_empty_on(queue).await.map_err(|e| {
            let message = format!("Could not empty {}: {}", top.spec().path.display(), e);
            Error::new(e.kind(), message).at_path(&top.spec().path)
        })?;
    }
    Ok(())
}

async fn copy(queue: &Rc<Queue>, from: &Side<'_>, to: &Side<'_>, range: &Range<u64>, zero: bool) -> Result<()> {
    if zero {
        return to.zero(queue, range).await;
    }
    let data = from.read(queue, range).await?;
    to.write(queue, (&data, range.start), range).await
}

/// How deep below `top` the layer is.
fn depth_of(top: &Node, base: &Arc<Node>) -> Result<usize> {
    let mut layers = std::iter::successors(top.backing(), |node| node.backing());
    let at = layers.position(|layer| layer.file().traits().identity == base.file().traits().identity);
    at.map(|at| at + 1)
        .ok_or_else(|| Error::new(ErrorKind::Invalid, "not one of the disk's layers").at_path(base.path()))
}
