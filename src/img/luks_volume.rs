//! `create -f luks`: LUKS volumes that are no qcow2 image. They are made for other programs; there is no reading them here.

use cowhand_block::{Format, NewFormat, Preallocation};

use super::create_options::CreateOptions;
use super::options::Options;
use super::secrets::Secrets;

/// The options, in the order in which QEMU shows them, with what they hold.
const KNOWN: [(&str, &str, &str); 8] = [
    ("size", "size", "Virtual disk size"),
    ("key-secret", "str", "ID of the secret that provides the keyslot passphrase"),
    ("cipher-alg", "str", "Name of encryption cipher algorithm"),
    ("cipher-mode", "str", "Name of encryption cipher mode"),
    ("ivgen-alg", "str", "Name of IV generator algorithm"),
    ("ivgen-hash-alg", "str", "Name of IV generator hash algorithm"),
    ("hash-alg", "str", "Name of encryption hash algorithm"),
    ("iter-time", "num", "Time to spend in PBKDF in milliseconds"),
];

/// A volume that is to be made.
pub(super) struct Volume {
    options: Options,
    /// The options as a qcow2 image has them, which is encrypted in the same way.
    encryption: CreateOptions,
}

impl Volume {
    pub(super) fn new(options: &Options) -> Result<Self, String> {
        let known: Vec<_> = KNOWN.iter().map(|(name, ..)| *name).collect();
        if let Some(name) = options.unknown(&known) {
            return Err(format!("Invalid parameter '{name}'"));
        }
        let mut inner = Options::default();
        inner.set("encrypt.format", "luks");
        for (key, value) in options.iter() {
            let key = if key == "size" { key.to_string() } else { format!("encrypt.{key}") };
            inner.set(&key, value);
        }
        Ok(Self { options: options.clone(), encryption: CreateOptions::new(Format::Qcow2, &inner)? })
    }

    /// The size among the options.
    pub(super) fn size(&self) -> Option<u64> {
        self.encryption.size()
    }

    /// What is shown of a volume that is being made.
    pub(super) fn shown(&self, size: u64) -> String {
        let given = KNOWN[1..].iter().filter_map(|(name, ..)| Some((name, self.options.get(name)?)));
        given.fold(format!("fmt=luks size={size}"), |text, (name, value)| {
            format!("{text} {name}={}", value.replace(',', ",,"))
        })
    }

    /// The volume, of `size` bytes.
    pub(super) fn format(&self, size: u64, secrets: &Secrets) -> Result<(NewFormat, Preallocation), String> {
        if self.options.get("key-secret").is_none() {
            return Err("Parameter 'key-secret' is required for cipher".into());
        }
        let encryption = self.encryption.encryption(secrets)?.ok_or("no encryption")?;
        Ok((NewFormat::Luks(size, encryption), Preallocation::Off))
    }
}

/// The list of options.
pub(super) fn help(with_file: bool) -> String {
    let mut lines: Vec<_> =
        KNOWN.iter().map(|(name, kind, help)| format!("  {:<22} - {help}\n", format!("{name}=<{kind}>"))).collect();
    lines.sort();
    let lines = lines.concat();
    if with_file {
        return format!("Supported options:\n{lines}");
    }
    let end = "The protocol level may support further options.\nSpecify the target filename to include those options.";
    format!("Supported luks options:\n{lines}\n{end}\n")
}
