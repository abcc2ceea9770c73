//! What every subcommand needs: how messages look, and how an image is opened by its name.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cowhand_block::options::{NodeOptions, OptionsError, Surroundings, plain_name};
use cowhand_block::protocol::{FileSpec, Protocol};
use cowhand_block::secret::SecretSource;
use cowhand_block::{Backing, Cache, Disk, DiskSpec, Error, Format, OpenPolicy, probe_format};

use super::secrets::Secrets;

/// Why a command ends without having done its work. What is printed is its message, after the program's name.
#[derive(Debug)]
pub(crate) struct Failure {
    /// What is wrong; empty if everything has been said.
    pub(crate) message: String,
    /// The exit status.
    pub(crate) status: u8,
}

impl Failure {
    /// A failure with the status that most have: 1.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), status: 1 }
    }

    /// The same with another status.
    pub(crate) fn with_status(self, status: u8) -> Self {
        Self { status, ..self }
    }

    pub(crate) fn say(&self, cx: &Context) {
        if !self.message.is_empty() {
            cx.error(&self.message);
        }
    }
}

/// How an image is opened.
#[derive(Clone, Debug)]
pub(crate) struct How<'a> {
    /// `-f`: its format.
    pub(crate) format: Option<&'a str>,
    /// `--image-opts`: its name is a list of options.
    pub(crate) image_opts: bool,
    /// It is going to be written.
    pub(crate) write: bool,
    /// `-U`: without locks.
    pub(crate) force_share: bool,
    /// `-t` or `-T`.
    pub(crate) cache: Cache,
    /// What is opened below it.
    pub(crate) backing: Backing,
    /// Its format may be guessed whoever asks: nothing that it names is opened.
    pub(crate) guess: bool,
    /// It is opened without its secret: one that its options name need not be there.
    pub(crate) keyless: bool,
}

impl Default for How<'_> {
    /// To read an image and all below it.
    fn default() -> Self {
        Self {
            format: None,
            image_opts: false,
            write: false,
            force_share: false,
            cache: Cache::Writeback,
            backing: Backing::Header,
            guess: false,
            keyless: false,
        }
    }
}

/// What every subcommand needs.
pub(crate) struct Context {
    /// The program's name in messages.
    program: &'static str,
    /// What may be opened.
    pub(crate) policy: OpenPolicy,
    /// Those of `--object`.
    pub(crate) secrets: Secrets,
}

impl Context {
    pub(crate) fn new(program: &'static str, policy: OpenPolicy) -> Self {
        Self { program, policy, secrets: Secrets::default() }
    }

    /// The program's name in messages.
    pub(crate) fn program(&self) -> &'static str {
        self.program
    }

    /// Takes the objects of `--object`.
    pub(crate) fn take_objects(&self, objects: &[String]) -> Result<(), Failure> {
        objects.iter().try_for_each(|object| self.secrets.add(object).map_err(Failure::new))
    }

    pub(crate) fn error(&self, message: &str) {
        eprintln!("{}: {message}", self.program);
    }

    pub(crate) fn warn(&self, message: &str) {
        eprintln!("{}: warning: {message}", self.program);
    }

    /// What is said of arguments that a subcommand cannot take.
    pub(crate) fn usage(&self, subcommand: &str, message: &str) -> Failure {
        Failure::new(format!("{message}\nTry '{} {subcommand} --help' for more info", self.program))
    }

    /// The one image that a subcommand works on.
    pub(crate) fn only<'a>(&self, files: &'a [String], subcommand: &str) -> Result<&'a str, Failure> {
        match files {
            [file] => Ok(file),
            _ => Err(self.usage(subcommand, "Expecting one image file name")),
        }
    }

    /// The same failure, with what to do next; QEMU's callers expect its words alone.
    pub(crate) fn advise(&self, failure: Failure, advice: &str) -> Failure {
        if self.program == super::Name::Qemu.text() {
            return failure;
        }
        Failure { message: format!("{}; {advice}", failure.message), ..failure }
    }

    /// What is said of an image that cannot be opened.
    pub(crate) fn cannot_open(name: &str, reason: &str) -> Failure {
        Failure::new(format!("Could not open '{name}': {reason}"))
    }

    /// The description of the disk that is called `name`: a file, `file:PATH`, `json:{…}`, or a list of options.
    pub(crate) fn spec(&self, name: &str, how: &How<'_>) -> Result<DiskSpec, Failure> {
        self.spec_or_reason(name, how).map_err(|reason| Self::cannot_open(name, &reason))
    }

    /// The same, for those who say in other words what cannot be opened.
    pub(crate) fn spec_or_reason(&self, name: &str, how: &How<'_>) -> Result<DiskSpec, String> {
        let base = Self::base(how);
        let around = Around { cx: self, guess: how.guess, keyless: how.keyless };
        let in_words = |e: OptionsError| e.to_string();
        let described = if how.image_opts {
            Some(NodeOptions::from_list(name).map_err(in_words)?)
        } else if name.starts_with("json:") {
            Some(NodeOptions::from_json(name).map_err(in_words)?)
        } else {
            None
        };
        if let Some(options) = described {
            return self.described(options, how);
        }
        if let Some(protocol) = protocol_of(name) {
            if NodeOptions::PREFIXES.contains(&protocol) {
                let mut options = NodeOptions::default();
                options.set_default("filename", name);
                return self.described(options, how);
            }
            return Err(format!("Unknown protocol '{protocol}'"));
        }
        let path = plain_name(name);
        let guessed = how.format.is_none();
        let format = match how.format {
            Some(format) => format.parse().map_err(|e: cowhand_block::FormatError| e.to_string())?,
            None => around.format_of(&FileSpec::host(&path))?,
        };
        Ok(DiskSpec { path, format, force_raw: format == Format::Raw, guessed, backing: how.backing.clone(), ..base })
    }

    /// What holds where a description is silent.
    fn base(how: &How<'_>) -> DiskSpec {
        DiskSpec {
            readonly: !how.write,
            lock: !how.force_share,
            cache: how.cache,
            // What is copied or zeroed gives its space back.
            discard: true,
            ..DiskSpec::new(Path::new(""), Format::Raw)
        }
    }

    /// The description of the disk that node options describe.
    pub(crate) fn described(&self, mut options: NodeOptions, how: &How<'_>) -> Result<DiskSpec, String> {
        if let Some(format) = how.format {
            options.set_default("driver", format);
        }
        let around = Around { cx: self, guess: how.guess, keyless: how.keyless };
        let mut spec = options.into_spec(&Self::base(how), &around).map_err(|e| e.to_string())?;
        if how.backing != Backing::Header {
            spec.backing = how.backing.clone();
        }
        Ok(spec)
    }

    /// What becomes of an open disk's description by node options; they cannot make another disk of it. `opened` are the options by
    /// which it was opened, if it was by any.
    pub(crate) fn changed(
        &self,
        mut options: NodeOptions,
        disk: &Disk,
        opened: &NodeOptions,
    ) -> Result<DiskSpec, String> {
        let old = disk.spec();
        let path = old.path.to_string_lossy();
        let layers = disk.layers();
        // What a throw-away overlay lies over is the disk's image.
        let below = layers.get(1 + usize::from(old.ephemeral)).map(|layer| layer.format.name());
        let protocol = match old.protocol.driver() {
            None if disk.is_block_device() => "host_device",
            driver => driver.unwrap_or("file"),
        };
        for (key, is) in [
            ("driver", Some(old.driver())),
            ("filename", Some(&*path)),
            ("file.filename", Some(&*path)),
            ("file.driver", Some(protocol)),
            ("backing.driver", below),
            ("node-name", opened.get("node-name")),
            ("file.node-name", opened.get("file.node-name")),
            ("backing.node-name", opened.get("backing.node-name")),
        ] {
            if options.get(key).is_some_and(|value| Some(value) != is) {
                let option = key.rsplit('.').next().unwrap_or(key);
                return Err(format!("Cannot change the option '{option}'"));
            }
        }
        for key in ["driver", "filename", "file.filename", "file.driver", "backing.driver", "backing.node-name"] {
            options.take(key);
        }
        if let Some((key, _)) = options.beginning_with("backing").next() {
            return Err(format!("Cannot change the option '{key}'"));
        }
        options.set_default("driver", old.format.name());
        options.set_default("filename", &path);
        let around = Around { cx: self, guess: false, keyless: false };
        let spec = options.into_spec(old, &around).map_err(|e| {
            let unknown = e.to_string().split_once(" support the option '").map(|(_, key)| key.to_string());
            unknown.map_or_else(|| e.to_string(), |key| format!("Cannot change the option '{key}"))
        })?;
        if spec.protocol != Protocol::Host {
            return Err("Cannot change the part of the file that is the disk".into());
        }
        let (backing, data_file) = (old.backing.clone(), old.data_file.clone());
        let kept = DiskSpec { bare: old.bare, guessed: old.guessed, backing, data_file, ..spec };
        Ok(kept.in_file(old.file()))
    }

    /// Opens the disk that is called `name`.
    pub(crate) fn open(&self, name: &str, how: &How<'_>) -> Result<Arc<Disk>, Failure> {
        let spec = self.spec(name, how)?;
        self.open_spec(name, &spec)
    }

    /// Opens a disk that is described, and was called `name`.
    pub(crate) fn open_spec(&self, name: &str, spec: &DiskSpec) -> Result<Arc<Disk>, Failure> {
        let disk = Disk::open(spec, &self.policy).map_err(|e| Self::cannot_open(name, &reason(&e, spec)))?;
        warn_of_guess(spec);
        Ok(disk)
    }
}

/// Tells people, in QEMU's words, of a disk that is written and only guessed to be raw: not everything can be written to it.
pub(crate) fn warn_of_guess(spec: &DiskSpec) {
    if spec.guessed && spec.format == Format::Raw && !spec.readonly && !spec.ephemeral {
        eprintln!(
            "WARNING: Image format was not specified for '{}' and probing guessed raw.\n         Automatically detecting the \
             format is dangerous for raw images, write operations on block 0 will be restricted.\n         Specify the 'raw' \
             format explicitly to remove the restrictions.",
            spec.path.display()
        );
    }
}

/// What is wrong, for somebody who has named the file of `spec` already.
pub(crate) fn reason(error: &Error, spec: &DiskSpec) -> String {
    if error.path() == Some(spec.path.as_path()) { error.reason() } else { error.to_string() }
}

/// Whether the file called `name` is one that `disk` is made of, by whatever name: to make an image there would lose what the disk shows,
/// which no lock says where none is taken, or where the same program holds it.
pub(super) fn is_part_of(name: &str, disk: &Disk) -> bool {
    is_one_of(name, disk.files())
}

/// Whether the file called `name` is one of `paths`, by whatever name.
pub(super) fn is_one_of(name: &str, paths: impl IntoIterator<Item = PathBuf>) -> bool {
    let identity = |path: &Path| std::fs::metadata(path).ok().map(|file| (file.dev(), file.ino()));
    let Some(target) = identity(&plain_name(name)) else { return false };
    paths.into_iter().any(|path| identity(&path) == Some(target))
}

/// The protocol that a name begins with, if it is none of a file's.
fn protocol_of(name: &str) -> Option<&str> {
    let (protocol, _) = name.split_once(':')?;
    (!protocol.contains('/') && protocol != "file").then_some(protocol)
}

/// What node options leave to us.
struct Around<'a> {
    cx: &'a Context,
    guess: bool,
    keyless: bool,
}

impl Surroundings for Around<'_> {
    fn format_of(&self, file: &FileSpec) -> Result<Format, String> {
        if !self.guess && !self.cx.policy.probe {
            return Err("its format is not given, and is not guessed; say it with -f (or allow it with --probe)".into());
        }
        probe_format(file, &self.cx.policy).map_err(|e| e.reason())
    }

    fn secret(&self, id: &str) -> Result<Option<SecretSource>, String> {
        if self.keyless { Ok(None) } else { self.cx.secrets.get(id).map(Some) }
    }
}

/// The cache mode of `-t` or `-T`, by QEMU's names.
pub(crate) fn cache_mode(name: &str, what: &str) -> Result<Cache, Failure> {
    match name {
        "none" | "off" => Ok(Cache::None),
        "writeback" => Ok(Cache::Writeback),
        "unsafe" => Ok(Cache::Unsafe),
        "writethrough" => Ok(Cache::WriteThrough),
        "directsync" => Ok(Cache::DirectSync),
        _ => Err(Failure::new(format!("Invalid {what} option: {name}"))),
    }
}

#[cfg(test)]
#[path = "context_test.rs"]
mod tests;
