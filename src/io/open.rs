//! Opening: from what the command line (or the command `open`) says to a disk with its queue.

use std::sync::Arc;

use cowhand_block::io::host::{Engine, Host};
use cowhand_block::options::NodeOptions;
use cowhand_block::{Cache, Disk, DiskSpec, OpenPolicy};

use super::session::{Failed, OpenDisk, Outcome, Session};
use crate::img::context::{Context, How, reason, warn_of_guess};

/// What holds for the whole run.
pub(crate) struct Setup {
    pub(crate) cx: Context,
    /// `--image-opts`: what is opened is a list of options.
    pub(crate) image_opts: bool,
}

impl Setup {
    /// What may be opened.
    pub(crate) fn policy(&self) -> &OpenPolicy {
        &self.cx.policy
    }
}

/// `-i`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Aio {
    /// io_uring, where the host lets us use it.
    #[default]
    Usual,
    Threads,
    /// What QEMU calls native needs direct I/O; io_uring does it here.
    Native,
}

/// How something is opened.
#[derive(Clone, Debug, Default)]
pub(crate) struct Settings {
    pub(crate) format: Option<String>,
    pub(crate) read_only: bool,
    /// Over it comes an overlay that is thrown away.
    pub(crate) snapshot: bool,
    pub(crate) cache: Cache,
    /// Whether discards reach the image.
    pub(crate) no_discard: bool,
    pub(crate) force_share: bool,
    pub(crate) copy_on_read: bool,
    pub(crate) aio: Aio,
}

impl Settings {
    /// Takes an option letter that the program and the command `open` have in common; false if it is none.
    ///
    /// # Errors
    /// What is wrong with its argument.
    pub(crate) fn take(&mut self, letter: char, argument: &str) -> Result<bool, String> {
        match letter {
            'r' => self.read_only = true,
            's' => self.snapshot = true,
            'n' => self.cache = Cache::None,
            'C' => self.copy_on_read = true,
            'k' => self.aio = Aio::Native,
            'U' => self.force_share = true,
            't' => self.cache = cache(argument)?,
            'd' => {
                self.no_discard = match argument {
                    "off" | "ignore" => true,
                    "on" | "unmap" => false,
                    _ => return Err(format!("Invalid discard option: {argument}")),
                }
            }
            'i' => {
                self.aio = match argument {
                    "threads" => Aio::Threads,
                    "native" => Aio::Native,
                    "io_uring" => Aio::Usual,
                    _ => return Err(format!("Invalid aio option: {argument}")),
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// A cache mode by its name.
///
/// # Errors
/// It is none's.
pub(crate) fn cache(name: &str) -> Result<Cache, String> {
    crate::img::context::cache_mode(name, "cache").map_err(|failure| failure.message)
}

impl Session {
    /// Opens a disk: by its name, by options, or by both.
    pub(crate) fn open(&mut self, name: Option<&str>, options: Option<&str>, settings: &Settings) -> Outcome {
        if self.open.is_some() {
            return self.error("file open already, try 'help close'");
        }
        match self.try_open(name, options, settings) {
            Ok(open) => {
                self.open = Some(open);
                Ok(())
            }
            Err(reason) => {
                let which = name.filter(|_| !self.setup.image_opts).map(|name| format!(" device {name}"));
                self.error(&format!("can't open{}: {reason}", which.unwrap_or_default()))
            }
        }
    }

    fn try_open(&mut self, name: Option<&str>, options: Option<&str>, settings: &Settings) -> Result<OpenDisk, String> {
        let how = How {
            format: settings.format.as_deref(),
            image_opts: self.setup.image_opts,
            write: !settings.read_only,
            force_share: settings.force_share,
            cache: settings.cache,
            ..How::default()
        };
        let mut opened = NodeOptions::default();
        let mut spec = match (name, options) {
            (Some(name), None) => {
                // If it is not one of these, it is refused below.
                if self.setup.image_opts {
                    opened = NodeOptions::from_list(name).unwrap_or_default();
                } else if name.starts_with("json:") {
                    opened = NodeOptions::from_json(name).unwrap_or_default();
                }
                self.setup.cx.spec_or_reason(name, &how)?
            }
            (name, options) => {
                let mut described = NodeOptions::from_list(options.unwrap_or("")).map_err(|e| e.to_string())?;
                match name {
                    Some(name) if name.starts_with("json:") => {
                        described.set_defaults(NodeOptions::from_json(name).map_err(|e| e.to_string())?);
                    }
                    Some(name) => described.set_default("filename", name),
                    None => {}
                }
                opened = described.clone();
                self.setup.cx.described(described, &how)?
            }
        };
        if settings.force_share && !spec.readonly {
            return Err("force-share=on can only be used with read-only images".into());
        }
        if settings.copy_on_read && spec.readonly {
            return Err("Can't use copy-on-read on read-only device".into());
        }
        if settings.aio == Aio::Native && !spec.cache.is_direct() {
            return Err("aio=native was specified, but it requires cache.direct=on, which was not specified.".into());
        }
        spec.discard &= !settings.no_discard;
        spec.ephemeral = settings.snapshot && !spec.readonly;
        let open = self.open_spec(&spec, settings.aio, settings.copy_on_read)?;
        warn_of_guess(&spec);
        Ok(OpenDisk { options: opened, ..open })
    }

    /// Opens a disk that is described.
    ///
    /// # Errors
    /// Why it cannot be opened.
    pub(crate) fn open_spec(&self, spec: &DiskSpec, aio: Aio, copy_on_read: bool) -> Result<OpenDisk, String> {
        let mut policy = self.setup.policy().clone();
        if aio == Aio::Threads {
            policy.storage = Arc::new(Host::new(Engine::Threads));
        }
        let disk = Disk::open(spec, &policy).map_err(|e| reason(&e, spec))?;
        let mut queue = disk.byte_queue().map_err(|e| reason(&e, spec))?;
        queue.copy_on_read(copy_on_read);
        Ok(OpenDisk { disk, queue, aio, copy_on_read, options: NodeOptions::default() })
    }

    /// Waits for what is under way, and closes what is open.
    pub(crate) fn close(&mut self) -> Outcome {
        self.drain();
        let Some(OpenDisk { disk, queue, .. }) = self.open.take() else { return Ok(()) };
        drop(queue);
        match disk.close() {
            Ok(()) => Ok(()),
            Err(error) => {
                self.out.flush();
                self.error::<()>(&error.to_string())
            }
        }
        .map_err(|Failed| Failed)
    }
}
