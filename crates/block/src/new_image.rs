//! Making new images: raw, qcow2, encrypted or not, or LUKS, in a new file or in place of an old one.
//!
//! Everything that can be known to be wrong is found before anything is made or overwritten. What could not be finished is removed if it
//! was made here; of a file that was there an empty one is left. An image's first sector is written last, so what is not finished is no
//! image.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use cowhand_qcow2::luks::{self, Hash, Iterations};
use cowhand_qcow2::{CipherSpec, CreateParams};
use zeroize::Zeroizing;

use crate::chain::OpenPolicy;
use crate::disk::{block_on, blocking_driver};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Barrier, Buffer, File, OpenMode, Storage};
use crate::locks::lock;
use crate::qcow2::create::{self, Preallocation, Template, take_space};
use crate::queue::Queue;
use crate::secret::Secret;
use crate::spec::{DiskSpec, Format};
use crate::sync::Arc;

/// How the data of a new image is encrypted: LUKS.
#[derive(Clone, Debug)]
pub struct Encryption {
    /// The cipher.
    pub cipher: CipherSpec,
    /// The hash of the key derivation.
    pub hash: Hash,
    /// How long deriving the key from the secret shall take on this host.
    pub iter_time: Duration,
    /// What opens the image.
    pub secret: Secret,
}

/// What a new image is.
#[derive(Clone, Debug)]
pub enum NewFormat {
    /// The disk's bytes, so many of them; rounded up to a multiple of 512.
    Raw(u64),
    /// A qcow2 image.
    Qcow2(Box<CreateParams>, Option<Encryption>),
    /// A LUKS volume, as other programs open it: the header, and so many bytes of the disk (rounded up to a multiple of 512).
    Luks(u64, Encryption),
}

/// An image that is to be made.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// Its file.
    pub path: PathBuf,
    /// What it is.
    pub format: NewFormat,
    /// What of its space is taken at once.
    pub preallocation: Preallocation,
    /// Whether it may take the place of what the file holds (or the block device, which must be large enough). Otherwise a file of this
    /// name must not exist. The same holds for its external data file.
    pub replace: bool,
    /// Whether it is going to be filled: until that is [over](crate::Disk::finish_filling) it does not look whole, and is opened as
    /// [`DiskSpec::unfinished`]. A block device, and a raw file whose space is taken at once, cannot say so.
    pub unfinished: bool,
    /// What the file system is asked for.
    pub hints: FileHints,
}

/// What is asked of the file system for a new image's files. Not every one does it, and the image is made all the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileHints {
    /// What is changed is changed in place, rather than written to another one (btrfs).
    pub no_copy_on_write: bool,
    /// Space is given in pieces of so many bytes (XFS). If it is not said, 1 MiB, as in QEMU: so the host keeps together what a guest writes
    /// in small pieces.
    pub extent_size: Option<u32>,
}

/// What [`FileHints::extent_size`] is, if it is not said.
const EXTENT_SIZE: u32 = 1 << 20;

/// How long a raw file is before it is filled, if the disk has more. Not nothing: ext4 takes who writes an emptied file for one who
/// replaces it, and begins to write all of it to the disk when it is closed, which would take longer than the copy.
const UNFINISHED_BYTES: u64 = 512;

impl Encryption {
    /// A LUKS header with a key of its own.
    fn create(&self, storage: &Arc<dyn Storage>, path: &Path) -> Result<luks::Created> {
        let budget = self.iter_time.min(Duration::from_secs(3600));
        let mut probed = Iterations::MIN;
        let iterations = loop {
            let before = storage.now();
            self.hash.probe(self.cipher.key_bytes(), probed);
            let took = storage.now().saturating_sub(before);
            if took >= PROBE || probed == Iterations::MAX {
                break Iterations::within(budget, probed, took);
            }
            probed = Iterations::new(probed.get().saturating_mul(4)).unwrap_or(Iterations::MAX);
        };
        let params = luks::CreateParams {
            cipher: self.cipher,
            hash: self.hash,
            iterations,
            digest_iterations: iterations.eighth(),
        };
        let mut entropy = Zeroizing::new(vec![0; params.entropy_len()]);
        storage.entropy(&mut entropy).map_err(|e| Error::io("cannot get random numbers", e).at_path(path))?;
        let created = params.create(self.secret.bytes(), &entropy);
        created.map_err(|e| Error::new(ErrorKind::Invalid, e.to_string()).at_path(path))
    }
}

/// A measurement shorter than this says little.
const PROBE: Duration = Duration::from_millis(20);

/// Makes an image, with its directory entries durable. What the file system answered to an extent size that was asked for and that it does
/// not do comes back.
///
/// # Errors
/// The options contradict each other; the file exists and may not be replaced, or somebody else uses it; the host's.
pub fn make_image(policy: &OpenPolicy, new: &NewImage) -> Result<Option<Error>> {
    let content = match &new.format {
        NewFormat::Raw(size) => Content::Plain { head: Vec::new(), size: *size },
        NewFormat::Luks(size, encryption) => {
            Content::Plain { head: encryption.create(&policy.storage, &new.path)?.area, size: *size }
        }
        NewFormat::Qcow2(params, encryption) => {
            create::check(&new.path, params, new.preallocation, encryption.is_some())?;
            let luks = encryption.as_ref().map(|e| e.create(&policy.storage, &new.path)).transpose()?;
            let luks = luks.map(|created| created.area);
            let (params, preallocation, unfinished) = ((**params).clone(), new.preallocation, new.unfinished);
            Content::Qcow2(Template { params, preallocation, luks, unfinished })
        }
    };
    let queue = Queue::new(blocking_driver(&policy.storage)?);
    let mut making =
        Making { policy, replace: new.replace, hints: new.hints, queue, files: Vec::new(), unheeded: None };
    let made = making.make(new, content);
    making.finish(made)
}

/// What a new image's file is to hold.
enum Content {
    /// What lies in front of the disk, and the disk's size in bytes.
    Plain {
        head: Vec<u8>,
        size: u64,
    },
    Qcow2(Template),
}

/// A file that is being made or filled anew.
struct Made {
    path: PathBuf,
    file: File,
    /// It was there before.
    replaced: bool,
}

struct Making<'a> {
    policy: &'a OpenPolicy,
    replace: bool,
    hints: FileHints,
    queue: Rc<Queue>,
    files: Vec<Made>,
    /// Why an extent size that was asked for was not set.
    unheeded: Option<Error>,
}

impl Making<'_> {
    fn make(&mut self, new: &NewImage, content: Content) -> Result<()> {
        let path = new.path.clone();
        let template = match content {
            Content::Qcow2(template) => template,
            Content::Plain { head, size } => {
                let file = self.file(&path)?;
                let (queue, preallocation) = (self.queue.clone(), new.preallocation);
                // One whose space is taken is as long as that.
                let unfinished = new.unfinished && head.is_empty() && preallocation == Preallocation::Off;
                let task = async move {
                    if unfinished && !file.traits().block_device {
                        return unfinished_raw(&queue, &file, &path, size).await;
                    }
                    plain(&queue, &file, &path, (head, size), preallocation).await
                };
                return block_on(&self.queue, task);
            }
        };
        let data_path = create::data_path(&path, &template.params)?;
        let file = self.file(&path)?;
        let data = data_path.map(|path| self.file(&path)).transpose()?;
        let queue = self.queue.clone();
        let task = async move { template.create(&queue, (&file, data.as_ref()), &path, false).await };
        block_on(&self.queue, task)
    }

    /// A new file, or an old one that holds nothing any more.
    fn file(&mut self, path: &Path) -> Result<File> {
        let storage = &self.policy.storage;
        let (file, replaced) = match storage.create(path) {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && self.replace => {
                let spec = DiskSpec { readonly: false, ..DiskSpec::new(path, Format::Raw) };
                let file = storage.open(path, OpenMode { write: true, ..OpenMode::default() });
                let file = file.map_err(|e| Error::create(path, e))?;
                lock(&file, path, true, &spec, self.policy)?;
                (file, true)
            }
            created => (created.map_err(|e| Error::create(path, e))?, false),
        };
        self.files.push(Made { path: path.to_path_buf(), file: file.clone(), replaced });
        if replaced && !file.traits().block_device {
            let (queue, emptied) = (self.queue.clone(), file.clone());
            let task = async move {
                queue.set_length(&emptied, 0).await.map_err(|e| Error::io("cannot change the file's length", e))
            };
            block_on(&self.queue, task).map_err(|e| e.at_path(path))?;
        }
        self.give_hints(&file, path);
        Ok(file)
    }

    fn give_hints(&mut self, file: &File, path: &Path) {
        let FileHints { no_copy_on_write, extent_size } = self.hints;
        if file.traits().block_device {
            return;
        }
        if no_copy_on_write {
            // A file system that knows nothing of it changes files in place already, or cannot.
            let _ = file.set_no_copy_on_write();
        }
        let size = extent_size.unwrap_or(EXTENT_SIZE);
        if size > 0
            && let Err(e) = file.set_extent_size(size)
            && extent_size.is_some()
        {
            let unheeded = Error::io("cannot set the extent size", e).at_path(path);
            self.unheeded.get_or_insert(unheeded);
        }
    }

    fn finish(self, made: Result<()>) -> Result<Option<Error>> {
        let storage = &self.policy.storage;
        let mut result = made;
        for Made { path, file, replaced } in self.files {
            file.unlock();
            if result.is_err() {
                // What went wrong is what matters; a file that stays has no header, and is no image.
                if !replaced {
                    let _ = storage.remove(&path);
                }
            } else if !replaced {
                let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
                let synced = storage.sync_dir(dir);
                result = synced.map_err(|e| Error::io("cannot make the directory entry durable", e).at_path(&path));
            }
        }
        result.map(|()| self.unheeded)
    }
}

/// Makes the file of a raw disk that is going to be filled.
async fn unfinished_raw(queue: &Rc<Queue>, file: &File, path: &Path, size: u64) -> Result<()> {
    let made = queue.set_length(file, size.min(UNFINISHED_BYTES)).await;
    made.map_err(|e| Error::io("Could not resize file", e).at_path(path))
}

/// Makes a plain disk, with what lies in front of it, of an empty file, or of a block device that is large enough for it.
async fn plain(
    queue: &Rc<Queue>,
    file: &File,
    path: &Path,
    (head, size): (Vec<u8>, u64),
    preallocation: Preallocation,
) -> Result<()> {
    let too_large = || Error::new(ErrorKind::Invalid, "the disk would be too large").at_path(path);
    let size = size.checked_next_multiple_of(512).and_then(|size| size.checked_add(head.len() as u64));
    let size = size.ok_or_else(too_large)?;
    if file.traits().block_device {
        let length = file.length().map_err(|e| Error::io("cannot tell the device's size", e).at_path(path))?;
        if length < size {
            return Err(Error::new(ErrorKind::NoSpace, "The image size is too large for the device").at_path(path));
        }
    } else {
        queue.set_length(file, size).await.map_err(|e| Error::io("Could not resize file", e).at_path(path))?;
        let taken = take_space(queue, file, 0, size, preallocation).await;
        taken.map_err(|e| Error::io("Could not preallocate data", e).at_path(path))?;
    }
    if let Some((first, rest)) = head.split_at_checked(512) {
        let written = async {
            queue.write_buffer(file, 512, Buffer::from_bytes(rest)).await?;
            queue.flush(file, Barrier::Create).await?;
            queue.write_buffer(file, 0, Buffer::from_bytes(first)).await
        };
        written.await.map_err(|e| Error::io("cannot write the header", e).at_path(path))?;
    } else if file.traits().block_device {
        return Ok(());
    }
    queue.flush(file, Barrier::Create).await.map_err(|e| Error::io("cannot flush", e).at_path(path))
}

#[cfg(test)]
#[path = "new_image_test.rs"]
mod tests;
