//! What a new image can be asked to be: the options of `create` and `convert` (`-o`), their types, their defaults, their help, and the
//! image that they make.

use std::time::Duration;

use cowhand_block::secret::SecretSource;
use cowhand_block::{Encryption, FileHints, Format, Preallocation};
use cowhand_qcow2::cipher::{Aes, Iv, Mode};
use cowhand_qcow2::luks::Hash;
use cowhand_qcow2::{CipherSpec, ClusterBits, Compression, CreateParams};

use super::options::{Options, on_off};
use super::secrets::Secrets;
use super::units::{SizeError, parse_size};

/// What an option's value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Text,
    OnOff,
    Size,
    Number,
}

/// An option: its name, what its value is, what it holds if it is not given, and its help.
struct Known {
    name: &'static str,
    kind: Kind,
    default: Option<&'static str>,
    help: &'static str,
}

const fn known(name: &'static str, kind: Kind, default: Option<&'static str>, help: &'static str) -> Known {
    Known { name, kind, default, help }
}

/// Those of qcow2, in the order in which QEMU shows them.
const QCOW2: [Known; 23] = [
    known(
        "encryption",
        Kind::OnOff,
        None,
        "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
    ),
    known("encrypt.format", Kind::Text, None, "Encrypt the image, format choices: 'aes', 'luks'"),
    known("encrypt.key-secret", Kind::Text, None, "ID of secret providing qcow AES key or LUKS passphrase"),
    known("encrypt.cipher-alg", Kind::Text, None, "Name of encryption cipher algorithm"),
    known("encrypt.cipher-mode", Kind::Text, None, "Name of encryption cipher mode"),
    known("encrypt.ivgen-alg", Kind::Text, None, "Name of IV generator algorithm"),
    known("encrypt.ivgen-hash-alg", Kind::Text, None, "Name of IV generator hash algorithm"),
    known("encrypt.hash-alg", Kind::Text, None, "Name of encryption hash algorithm"),
    known("encrypt.iter-time", Kind::Number, None, "Time to spend in PBKDF in milliseconds"),
    known("cluster_size", Kind::Size, Some("65536"), "qcow2 cluster size"),
    known("extended_l2", Kind::OnOff, Some("off"), "Extended L2 tables"),
    known("preallocation", Kind::Text, None, "Preallocation mode (allowed values: off, metadata, falloc, full)"),
    known("compression_type", Kind::Text, Some("zlib"), "Compression method used for image cluster compression"),
    known("size", Kind::Size, None, "Virtual disk size"),
    known("compat", Kind::Text, None, "Compatibility level (v2 [0.10] or v3 [1.1])"),
    known("backing_file", Kind::Text, None, "File name of a base image"),
    known("backing_fmt", Kind::Text, None, "Image format of the base image"),
    known("data_file", Kind::Text, None, "File name of an external data file"),
    known("data_file_raw", Kind::OnOff, None, "The external data file must stay valid as a raw image"),
    known("lazy_refcounts", Kind::OnOff, Some("off"), "Postpone refcount updates"),
    known("refcount_bits", Kind::Number, Some("16"), "Width of a reference count entry in bits"),
    NOCOW,
    EXTENT_SIZE_HINT,
];

const RAW: [Known; 4] = [
    known("size", Kind::Size, None, "Virtual disk size"),
    known("preallocation", Kind::Text, None, "Preallocation mode (allowed values: off, falloc, full)"),
    NOCOW,
    EXTENT_SIZE_HINT,
];

/// What the file system is asked for, whatever the file's content.
const NOCOW: Known = known("nocow", Kind::OnOff, None, "Turn off copy-on-write (valid only on btrfs)");
const EXTENT_SIZE_HINT: Known =
    known("extent_size_hint", Kind::Size, None, "Extent size hint for the image file, 0 to disable");

/// A new image.
#[derive(Clone, Debug)]
pub(super) enum NewImage {
    /// So many bytes.
    Raw { size: u64, preallocation: Preallocation },
    /// As the parameters say.
    Qcow2 { params: Box<CreateParams>, preallocation: Preallocation },
}

/// The options for an image of one format, each of the right type.
#[derive(Clone, Debug)]
pub(super) struct CreateOptions {
    format: Format,
    options: Options,
}

fn table(format: Format) -> &'static [Known] {
    match format {
        Format::Qcow2 => &QCOW2,
        Format::Raw => &RAW,
    }
}

/// The format by a name after which an image can be made.
pub(super) fn creatable(name: &str) -> Result<Format, String> {
    name.parse().map_err(|e| match e {
        cowhand_block::FormatError::Unknown(name) => format!("Unknown file format '{name}'"),
        cowhand_block::FormatError::Other(name) => format!("Format driver '{name}' does not support image creation"),
    })
}

/// The options that a format has, as `-o help` shows them. With a file's name given the protocol's are among them.
pub(super) fn help(format: Format, with_file: bool) -> String {
    let mut lines: Vec<String> = table(format)
        .iter()
        .filter(|known| match known.name {
            "nocow" | "extent_size_hint" => with_file,
            // A raw image's space is the file's business.
            "preallocation" => with_file || format == Format::Qcow2,
            _ => true,
        })
        .map(|known| {
            let kind = match known.kind {
                Kind::Text => "str",
                Kind::OnOff => "bool (on/off)",
                Kind::Size => "size",
                Kind::Number => "num",
            };
            format!("  {:<22} - {}\n", format!("{}=<{kind}>", known.name), known.help)
        })
        .collect();
    lines.sort();
    let (title, end) = if with_file {
        ("Supported options:\n".to_string(), "")
    } else {
        let end = "\nThe protocol level may support further options.\nSpecify the target filename to include those options.\n";
        (format!("Supported {format} options:\n"), end)
    };
    title + &lines.concat() + end
}

impl CreateOptions {
    /// Takes options of which each has to be one of the format's.
    pub(super) fn new(format: Format, options: &Options) -> Result<Self, String> {
        let mut typed = Options::default();
        for (key, value) in options.iter() {
            let known = table(format).iter().find(|known| known.name == key);
            let known = known.ok_or_else(|| format!("Invalid parameter '{key}'"))?;
            let value = match known.kind {
                Kind::Text => value.to_string(),
                Kind::OnOff => if on_off(key, value)? { "on" } else { "off" }.to_string(),
                Kind::Size => size_of(key, value)?.to_string(),
                Kind::Number => {
                    value.parse::<i64>().map_err(|_| format!("Parameter '{key}' expects a number"))?;
                    value.to_string()
                }
            };
            typed.set(key, &value);
        }
        Ok(Self { format, options: typed })
    }

    /// The value of an option, or what it holds if it is not given.
    pub(super) fn get(&self, key: &str) -> Option<&str> {
        let default = || table(self.format).iter().find(|known| known.name == key).and_then(|known| known.default);
        self.options.get(key).or_else(default)
    }

    /// Sets an option.
    pub(super) fn set(&mut self, key: &str, value: &str) {
        self.options.set(key, value);
    }

    /// The virtual size, if it is given.
    pub(super) fn size(&self) -> Option<u64> {
        self.options.get("size").and_then(|size| size.parse().ok())
    }

    /// `fmt=qcow2 cluster_size=65536 …`: what is shown of an image that is being made.
    pub(super) fn shown(&self) -> String {
        let mut text = format!("fmt={}", self.format);
        for known in table(self.format) {
            if let Some(value) = self.get(known.name) {
                text.push_str(&format!(" {}={}", known.name, value.replace(',', ",,")));
            }
        }
        text
    }

    /// The image that they make, of `size` bytes.
    pub(super) fn image(&self, size: u64) -> Result<NewImage, String> {
        self.hints()?;
        let preallocation = match self.get("preallocation") {
            None | Some("off") => Preallocation::Off,
            Some("metadata") if self.format == Format::Qcow2 => Preallocation::Metadata,
            Some("metadata") => return Err("Unsupported preallocation mode: metadata".into()),
            Some("falloc") => Preallocation::Falloc,
            Some("full") => Preallocation::Full,
            Some(other) => return Err(format!("Parameter 'preallocation' does not accept value '{other}'")),
        };
        if self.format == Format::Raw {
            return Ok(NewImage::Raw { size, preallocation });
        }
        let params = Box::new(self.qcow2(size)?);
        if preallocation != Preallocation::Off && params.backing.is_some() && !params.extended_l2 {
            return Err("Backing file and preallocation can only be used at the same time if extended_l2 is on".into());
        }
        Ok(NewImage::Qcow2 { params, preallocation })
    }

    /// What the file system is asked for.
    pub(super) fn hints(&self) -> Result<FileHints, String> {
        let extent_size =
            self.get("extent_size_hint").map(|size| size.parse().map_err(|_| "Extent size hint is too large"));
        Ok(FileHints { no_copy_on_write: self.is_on("nocow"), extent_size: extent_size.transpose()? })
    }

    fn is_on(&self, key: &str) -> bool {
        self.get(key) == Some("on")
    }

    fn qcow2(&self, size: u64) -> Result<CreateParams, String> {
        let version = match self.get("compat") {
            None | Some("1.1" | "v3") => 3,
            Some("0.10" | "v2") => 2,
            Some(other) => return Err(format!("Parameter 'version' does not accept value '{other}'")),
        };
        let at_least_3 = |is: bool, what: &str| match is && version < 3 {
            true => Err(format!("{what} compatibility level 1.1 and above (use version=v3 or greater)")),
            false => Ok(()),
        };
        let cluster_size: u64 = self.get("cluster_size").and_then(|size| size.parse().ok()).unwrap_or(65536);
        let cluster_bits = Some(cluster_size)
            .filter(|size| size.is_power_of_two())
            .and_then(|size| ClusterBits::new(size.trailing_zeros()).ok())
            .ok_or("Cluster size must be a power of two between 512 and 2048k")?;
        let compression = match self.get("compression_type") {
            Some("zstd") => Compression::Zstd,
            None | Some("zlib") => Compression::Zlib,
            Some(other) => return Err(format!("Parameter 'compression-type' does not accept value '{other}'")),
        };
        let extended_l2 = self.is_on("extended_l2");
        at_least_3(extended_l2, "Extended L2 entries are only supported with")?;
        if extended_l2 && cluster_size < 16 << 10 {
            return Err("Extended L2 entries are only supported with cluster sizes of at least 16384 bytes".into());
        }
        let lazy_refcounts = self.is_on("lazy_refcounts");
        at_least_3(lazy_refcounts, "Lazy refcounts only supported with")?;
        let bits: u64 = self.get("refcount_bits").and_then(|bits| bits.parse().ok()).unwrap_or(0);
        if !bits.is_power_of_two() || bits > 64 {
            return Err("Refcount width must be a power of two and may not exceed 64 bits".into());
        }
        if bits != 16 && version < 3 {
            let what = "Different refcount widths than 16 bits require compatibility level 1.1 or above";
            return Err(format!("{what} (use version=v3 or greater)"));
        }
        at_least_3(compression != Compression::Zlib, "Non-zlib compression type is only supported with")?;
        let backing = match (self.get("backing_file"), self.get("backing_fmt")) {
            (Some(name), Some(format)) => Some((name.as_bytes().to_vec(), format.to_string())),
            (None, Some(_)) => return Err("Backing format cannot be used without backing file".into()),
            (Some(_), None) => return Err("Backing file specified without backing format".into()),
            (None, None) => None,
        };
        let data_file = self.get("data_file").map(|name| name.as_bytes().to_vec());
        let data_file_raw = self.is_on("data_file_raw");
        at_least_3(data_file.is_some(), "External data files are only supported with")?;
        if data_file_raw && data_file.is_none() {
            return Err("data-file-raw requires data-file".into());
        }
        if data_file_raw && backing.is_some() {
            return Err("Backing file and data-file-raw cannot be used at the same time".into());
        }
        if data_file.as_ref().is_some_and(Vec::is_empty) {
            return Err("Could not create '': No such file or directory".into());
        }
        self.check_encryption()?;
        Ok(CreateParams {
            version,
            cluster_bits,
            refcount_order: bits.trailing_zeros(),
            size,
            backing,
            data_file,
            data_file_raw,
            compression,
            extended_l2,
            lazy_refcounts,
        })
    }

    fn check_encryption(&self) -> Result<(), String> {
        match (self.is_on("encryption"), self.get("encrypt.format")) {
            (true, Some(_)) => Err("'encrypt.format' and its alias 'encryption' can't be used at the same time".into()),
            (true, None) | (_, Some("aes" | "luks")) if self.get("encrypt.key-secret").is_none() => {
                Err("Parameter 'encrypt.key-secret' is required for cipher".into())
            }
            (true, None) | (_, Some("aes")) => {
                Err("Use of AES-CBC encrypted qcow2 images is no longer supported; take encrypt.format=luks".into())
            }
            (_, Some("luks")) => self.luks().map(drop),
            (_, Some(other)) => Err(not_accepted("format", other)),
            (false, None) => match self.options.iter().find(|(key, _)| key.starts_with("encrypt.")) {
                Some(_) => Err("Parameter 'encrypt.format' is missing".into()),
                None => Ok(()),
            },
        }
    }

    /// How the image is encrypted, if it is.
    pub(super) fn encryption(&self, secrets: &Secrets) -> Result<Option<Encryption>, String> {
        if self.get("encrypt.format") != Some("luks") {
            return Ok(None);
        }
        let secret = secrets.get(self.get("encrypt.key-secret").unwrap_or_default())?;
        let SecretSource::Known(secret) = secret else {
            return Err("the secret of a new image is given with --object secret".into());
        };
        let (cipher, hash, iter_time) = self.luks()?;
        Ok(Some(Encryption { cipher, hash, iter_time, secret }))
    }

    /// Cipher, hash, and how long the key derivation takes.
    fn luks(&self) -> Result<(CipherSpec, Hash, Duration), String> {
        let aes = match self.get("encrypt.cipher-alg") {
            None | Some("aes-256") => Aes::Aes256,
            Some("aes-192") => Aes::Aes192,
            Some("aes-128") => Aes::Aes128,
            Some(other) => return Err(not_accepted("cipher-alg", other)),
        };
        let mode = match self.get("encrypt.cipher-mode") {
            None | Some("xts") => Mode::Xts,
            Some("cbc") => Mode::Cbc,
            Some(other) => return Err(not_accepted("cipher-mode", other)),
        };
        let iv = match (self.get("encrypt.ivgen-alg"), self.get("encrypt.ivgen-hash-alg")) {
            (None | Some("plain64"), None) => Iv::Plain64,
            (Some("plain"), None) => Iv::Plain,
            (Some("essiv"), None | Some("sha256")) => Iv::EssivSha256,
            (None | Some("plain" | "plain64"), Some(_)) => {
                return Err("encrypt.ivgen-hash-alg goes with encrypt.ivgen-alg=essiv alone".into());
            }
            (Some("essiv"), Some(other)) => return Err(not_accepted("ivgen-hash-alg", other)),
            (Some(other), _) => return Err(not_accepted("ivgen-alg", other)),
        };
        let hash = match self.get("encrypt.hash-alg") {
            None | Some("sha256") => Hash::Sha256,
            Some("sha1") => Hash::Sha1,
            Some("sha224") => Hash::Sha224,
            Some("sha384") => Hash::Sha384,
            Some("sha512") => Hash::Sha512,
            Some("ripemd160") => Hash::Ripemd160,
            Some(other) => return Err(not_accepted("hash-alg", other)),
        };
        let time = self.get("encrypt.iter-time").unwrap_or("2000");
        let time = time.parse().map_err(|_| not_accepted("iter-time", time))?;
        Ok((CipherSpec { aes, mode, iv }, hash, Duration::from_millis(time)))
    }
}

fn not_accepted(name: &str, value: &str) -> String {
    format!("Parameter '{name}' does not accept value '{value}'")
}

/// An option's value in bytes.
fn size_of(key: &str, value: &str) -> Result<u64, String> {
    let out_of_range = || format!("Value '{value}' is out of range for parameter '{key}'");
    parse_size(value, 1).map_err(|e| match e {
        SizeError::TooLarge => out_of_range(),
        SizeError::Malformed => format!(
            "Parameter '{key}' expects a non-negative number below 2^64\n\
             Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
             and exabytes, respectively."
        ),
    })
}

#[cfg(test)]
#[path = "create_options_test.rs"]
mod tests;
