//! The DISK grammar: `path=P,format=qcow2|raw[,key=value]...`, parsed in this one place for every command.
//!
//! A comma inside a value is written twice, as in QEMU. Says nothing of whether the files exist.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::protocol::{FileSpec, Protocol};
use crate::secret::SecretSource;
use crate::tuning::Tuning;

/// An image format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// The file is the disk.
    Raw,
    /// QEMU copy-on-write, versions 2 and 3.
    Qcow2,
}

impl Format {
    /// The format's name, as in QEMU.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// A name that is none of a format that cowhand has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// A format that others have.
    #[error("the format '{0}' is not supported by cowhand (qcow2 and raw are)")]
    Other(&'static str),
    /// No format's name.
    #[error("Unknown driver '{0}'")]
    Unknown(String),
}

/// Formats that are known by name and by their first bytes, and cannot be read yet. Each is to have a crate of its own.
const OTHER_FORMATS: [&str; 12] =
    ["vmdk", "vpc", "vhdx", "vdi", "qed", "qcow", "parallels", "bochs", "cloop", "dmg", "luks", "ova"];

impl FromStr for Format {
    type Err = FormatError;
    fn from_str(s: &str) -> Result<Self, FormatError> {
        match s {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            other => Err(match OTHER_FORMATS.iter().find(|&&name| name == other) {
                Some(name) => FormatError::Other(name),
                None => FormatError::Unknown(other.into()),
            }),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What stands between the guest's writes and the medium.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// The host's page cache; a guest's flush reaches the medium.
    #[default]
    Writeback,
    /// Past the host's page cache (`O_DIRECT`).
    None,
    /// The host's page cache, and flushes do nothing: for disks that are thrown away after a crash.
    Unsafe,
    /// The host's page cache; each write has reached the medium when it completes.
    WriteThrough,
    /// Past the host's page cache; each write has reached the medium when it completes.
    DirectSync,
}

impl Cache {
    /// Whether the host's page cache is passed by.
    #[must_use]
    pub const fn is_direct(self) -> bool {
        matches!(self, Self::None | Self::DirectSync)
    }

    /// Whether a write is durable when it completes.
    #[must_use]
    pub const fn is_write_through(self) -> bool {
        matches!(self, Self::WriteThrough | Self::DirectSync)
    }
}

/// What lies below an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Backing {
    /// What its header names.
    #[default]
    Header,
    /// It is opened by itself, whatever its header names: what it does not have reads as zeros. For those who look at one image's
    /// metadata or change it.
    Alone,
    /// Another disk, in place of what its header names.
    Given(Box<DiskSpec>),
}

/// What becomes of writes that hold only zeros.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    /// They are written.
    #[default]
    Off,
    /// They become zero clusters, their space kept.
    On,
    /// They become zero clusters, their space given back.
    Unmap,
}

/// One disk, as described on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// The image.
    pub path: PathBuf,
    /// What the image lies in: [`path`](Self::path), or what stands in its place.
    pub protocol: Protocol,
    /// Its format; never guessed.
    pub format: Format,
    /// The driver's name, where the disk was described without a format: what it lies in *is* the disk.
    pub bare: Option<&'static str>,
    /// The name by which the disk is addressed and reported (`id`).
    pub id: Option<String>,
    /// The guest may only read it.
    pub readonly: bool,
    /// Writes go to an overlay that is thrown away.
    pub ephemeral: bool,
    /// Queues offered to the guest; one per vCPU if not given.
    pub queues: Option<u16>,
    /// See [`Cache`].
    pub cache: Cache,
    /// Whether the guest's discards reach the image.
    pub discard: bool,
    /// Whether what the guest discards keeps its place in the image: its space goes back to the host, and later writes take the same
    /// clusters again, so that the image's data stays together. Version 3 only.
    pub discard_no_unref: bool,
    /// See [`DetectZeroes`].
    pub detect_zeroes: DetectZeroes,
    /// See [`Backing`].
    pub backing: Backing,
    /// The external data file, in place of what the header names.
    pub data_file: Option<FileSpec>,
    /// The backing file's format, where the image's header does not say.
    pub backing_format: Option<Format>,
    /// What the guest reads as the disk's serial number, at most 20 bytes.
    pub serial: String,
    /// Bytes of metadata to keep in memory; enough for the whole of a typical disk if not given.
    pub metadata_cache: Option<u64>,
    /// See [`Tuning`].
    pub tuning: Tuning,
    /// The logical block size that the guest is told, in bytes.
    pub block_size: u32,
    /// Whether the image is locked against other programs.
    pub lock: bool,
    /// Where a back-end serves the disk to others: a path, or `fd:N`.
    pub socket: Option<String>,
    /// What opens encrypted images; the same for all of a chain.
    pub secret: Option<SecretSource>,
    /// Serve a file as raw though it begins like a qcow2 image.
    pub force_raw: bool,
    /// Every write is compressed, whole clusters each.
    pub compress: bool,
    /// The disk was just made to be filled, and will have so many bytes: until
    /// [`finish_filling`](crate::Disk::finish_filling) it does not look whole. See [`NewImage::unfinished`](crate::NewImage::unfinished).
    pub unfinished: Option<u64>,
    /// Its format was guessed. If that is raw, no write makes its first sector look like another format's, which the next one who guesses
    /// would take it for.
    pub guessed: bool,
}

/// What is wrong with a DISK.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// A word without `=`.
    #[error("'{0}' is not key=value (a comma inside a value is written twice)")]
    NotKeyValue(String),
    /// A key that is not one.
    #[error("unknown disk option '{key}' (known: {KEYS})")]
    UnknownKey {
        /// As given.
        key: String,
    },
    /// A key given twice.
    #[error("disk option '{0}' is given twice")]
    Twice(String),
    /// A value that the key does not take.
    #[error("disk option {key}='{value}': expected {expected}")]
    Value {
        /// The key.
        key: &'static str,
        /// As given.
        value: String,
        /// What would do.
        expected: &'static str,
    },
    /// A key that must be there.
    #[error("disk option '{0}=' is missing")]
    Missing(&'static str),
    /// Options that exclude each other.
    #[error("disk options {0}")]
    Conflict(&'static str),
}

const KEYS: &str = "path, format, id, readonly, ephemeral, queues, cache, discard, discard-no-unref, detect-zeroes, backing-format, serial, \
                    metadata-cache, block-size, lock, secret, force-raw, socket";

impl DiskSpec {
    /// A disk with the defaults.
    #[must_use]
    pub fn new(path: &Path, format: Format) -> Self {
        Self {
            path: path.to_path_buf(),
            protocol: Protocol::default(),
            format,
            bare: None,
            id: None,
            readonly: false,
            ephemeral: false,
            queues: None,
            cache: Cache::default(),
            discard: true,
            discard_no_unref: false,
            detect_zeroes: DetectZeroes::default(),
            backing: Backing::default(),
            data_file: None,
            backing_format: None,
            serial: String::new(),
            metadata_cache: None,
            tuning: Tuning::default(),
            block_size: 512,
            lock: true,
            socket: None,
            secret: None,
            force_raw: false,
            compress: false,
            unfinished: None,
            guessed: false,
        }
    }

    /// What the image lies in.
    #[must_use]
    pub fn file(&self) -> FileSpec {
        FileSpec { path: self.path.clone(), protocol: self.protocol.clone() }
    }

    /// The same disk in another file.
    #[must_use]
    pub fn in_file(self, file: FileSpec) -> Self {
        Self { path: file.path, protocol: file.protocol, ..self }
    }

    /// The name of the driver that shows the disk.
    #[must_use]
    pub fn driver(&self) -> &'static str {
        self.bare.unwrap_or(self.format.name())
    }

    /// All files of the host that are opened by description alone, and not because an image names them.
    #[must_use]
    pub fn named(&self) -> Vec<PathBuf> {
        self.files().iter().flat_map(FileSpec::named).collect()
    }

    /// What the disk and those that are described below it lie in, data files as well.
    pub(crate) fn files(&self) -> Vec<FileSpec> {
        let mut files = Vec::new();
        let mut disk = Some(self);
        while let Some(spec) = disk {
            files.push(spec.file());
            files.extend(spec.data_file.clone());
            disk = match &spec.backing {
                Backing::Given(given) => Some(given),
                Backing::Header | Backing::Alone => None,
            };
        }
        files
    }

    /// Parses a DISK.
    ///
    /// # Errors
    /// Says which option is wrong, and what it takes.
    pub fn parse(text: &str) -> Result<Self, SpecError> {
        let mut spec = Self::new(Path::new(""), Format::Raw);
        let mut seen: Vec<String> = Vec::new();
        for word in split_commas(text) {
            let (key, value) = word.split_once('=').ok_or_else(|| SpecError::NotKeyValue(word.clone()))?;
            if seen.iter().any(|k| k == key) {
                return Err(SpecError::Twice(key.into()));
            }
            seen.push(key.into());
            spec.set(key, value)?;
        }
        for key in ["path", "format"] {
            if !seen.iter().any(|k| k == key) {
                return Err(SpecError::Missing(key));
            }
        }
        if spec.readonly && spec.ephemeral {
            return Err(SpecError::Conflict("readonly=on and ephemeral=on exclude each other"));
        }
        if spec.backing_format.is_some() && spec.format == Format::Raw {
            return Err(SpecError::Conflict("backing-format= is for qcow2: a raw disk has no backing file"));
        }
        if spec.secret.is_some() && spec.format == Format::Raw {
            return Err(SpecError::Conflict("secret= is for qcow2: a raw disk is not encrypted"));
        }
        if spec.discard_no_unref && spec.format == Format::Raw {
            return Err(SpecError::Conflict("discard-no-unref=on is for qcow2: a raw disk's data has no other place"));
        }
        if spec.force_raw && spec.format != Format::Raw {
            return Err(SpecError::Conflict("force-raw=on is for format=raw"));
        }
        Ok(spec)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), SpecError> {
        match key {
            "path" if value.is_empty() => return Err(bad("path", value, "the name of a file")),
            "path" => self.path = PathBuf::from(value),
            "format" => self.format = value.parse().map_err(|_| bad("format", value, "qcow2 or raw"))?,
            "id" if value.is_empty() => return Err(bad("id", value, "a name")),
            "id" => self.id = Some(value.into()),
            "readonly" => self.readonly = on_off("readonly", value)?,
            "ephemeral" => self.ephemeral = on_off("ephemeral", value)?,
            "queues" => {
                let queues = value.parse().ok().filter(|n| (1..=256).contains(n));
                self.queues = Some(queues.ok_or_else(|| bad("queues", value, "a number from 1 to 256"))?);
            }
            "cache" => {
                self.cache = match value {
                    "writeback" => Cache::Writeback,
                    "none" => Cache::None,
                    "unsafe" => Cache::Unsafe,
                    "writethrough" => Cache::WriteThrough,
                    "directsync" => Cache::DirectSync,
                    _ => return Err(bad("cache", value, "writeback, writethrough, none, directsync or unsafe")),
                }
            }
            "discard" => {
                self.discard = match value {
                    "unmap" => true,
                    "ignore" => false,
                    _ => return Err(bad("discard", value, "unmap or ignore")),
                }
            }
            "discard-no-unref" => self.discard_no_unref = on_off("discard-no-unref", value)?,
            "detect-zeroes" => {
                self.detect_zeroes = match value {
                    "off" => DetectZeroes::Off,
                    "on" => DetectZeroes::On,
                    "unmap" => DetectZeroes::Unmap,
                    _ => return Err(bad("detect-zeroes", value, "off, on or unmap")),
                }
            }
            "backing-format" => {
                let format = value.parse().map_err(|_| bad("backing-format", value, "qcow2 or raw"))?;
                self.backing_format = Some(format);
            }
            "serial" if value.len() > 20 => return Err(bad("serial", value, "at most 20 bytes")),
            "serial" => self.serial = value.into(),
            "metadata-cache" => {
                let size = parse_size(value).filter(|&n| n >= 64 << 10);
                self.metadata_cache = Some(size.ok_or_else(|| bad("metadata-cache", value, "a size of at least 64K"))?);
            }
            "block-size" => {
                self.block_size = match value {
                    "512" => 512,
                    "4096" | "4K" | "4k" => 4096,
                    _ => return Err(bad("block-size", value, "512 or 4096")),
                }
            }
            "secret" => {
                let source = value.parse().map_err(|()| bad("secret", value, "file:PATH or fd:N"))?;
                self.secret = Some(source);
            }
            "lock" => self.lock = on_off("lock", value)?,
            "socket" if value.is_empty() => return Err(bad("socket", value, "a path or fd:N")),
            "socket" => self.socket = Some(value.into()),
            "force-raw" => self.force_raw = on_off("force-raw", value)?,
            _ => return Err(SpecError::UnknownKey { key: key.into() }),
        }
        Ok(())
    }
}

fn bad(key: &'static str, value: &str, expected: &'static str) -> SpecError {
    SpecError::Value { key, value: value.into(), expected }
}

fn on_off(key: &'static str, value: &str) -> Result<bool, SpecError> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(bad(key, value, "on or off")),
    }
}

/// A size in bytes: a number, with K, M, G or T for binary multiples.
#[must_use]
pub fn parse_size(text: &str) -> Option<u64> {
    let (number, shift) = match text.as_bytes().last()? {
        b'k' | b'K' => (&text[..text.len() - 1], 10),
        b'm' | b'M' => (&text[..text.len() - 1], 20),
        b'g' | b'G' => (&text[..text.len() - 1], 30),
        b't' | b'T' => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    if !number.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let number: u64 = number.parse().ok()?;
    number.checked_mul(1 << shift)
}

/// Splits at single commas; two commas stand for one.
#[must_use]
pub fn split_commas(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c != ',' || chars.next_if_eq(&',').is_some() {
            if let Some(word) = words.last_mut() {
                word.push(c);
            }
        } else {
            words.push(String::new());
        }
    }
    words
}

#[cfg(test)]
#[path = "spec_test.rs"]
mod tests;
