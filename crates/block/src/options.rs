//! A disk described by QEMU's node options: `driver=qcow2,file.filename=x.qcow2,…` (`--image-opts`), or `json:{…}` as a file's name.
//!
//! Both become one flat list of dotted keys, and that becomes a [`DiskSpec`]. Options that QEMU has and cowhand does not are refused
//! by name; a nested `backing` and a `data-file` are taken. Nothing is opened here but to probe a format, where the caller does that.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::protocol::FileSpec;
use crate::secret::SecretSource;
use crate::size::{SizeError, parse_size};
use crate::spec::{self, Backing, Cache, DetectZeroes, DiskSpec, Format};
use crate::tuning::Tuning;

mod below;

/// Node options by dotted keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeOptions(BTreeMap<String, String>);

/// What is wrong with node options.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct OptionsError(String);

/// The structures that QEMU guards one by one.
const OVERLAP_CHECKS: [&str; 9] = [
    "main-header",
    "active-l1",
    "active-l2",
    "refcount-table",
    "refcount-block",
    "snapshot-table",
    "inactive-l1",
    "inactive-l2",
    "bitmap-directory",
];

/// What the options leave to others.
pub trait Surroundings {
    /// The format of the image in `file`, of which nobody said what it is.
    ///
    /// # Errors
    /// It is not to be guessed, or cannot be.
    fn format_of(&self, file: &FileSpec) -> Result<Format, String>;

    /// The secret that is known by this ID; none if it is not going to be needed.
    ///
    /// # Errors
    /// There is none.
    fn secret(&self, id: &str) -> Result<Option<SecretSource>, String>;
}

impl OptionsError {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

fn wrong<T>(message: impl Into<String>) -> Result<T, OptionsError> {
    Err(OptionsError::new(message))
}

impl NodeOptions {
    /// Options from `key=value,key=value`, a comma inside a value written twice. A key alone is `key=on`.
    ///
    /// # Errors
    /// A word without a key.
    pub fn from_list(text: &str) -> Result<Self, OptionsError> {
        let mut options = BTreeMap::new();
        for word in spec::split_commas(text) {
            let (key, value) = word.split_once('=').unwrap_or((&word, "on"));
            if key.is_empty() {
                return wrong(format!("Invalid parameter '{word}'"));
            }
            options.insert(key.to_string(), value.to_string());
        }
        Ok(Self(options))
    }

    /// Options from a name that begins with `json:`.
    ///
    /// # Errors
    /// It is no JSON object of strings, numbers, booleans, null and such objects.
    pub fn from_json(name: &str) -> Result<Self, OptionsError> {
        let text = name.strip_prefix("json:").unwrap_or(name);
        let value: serde_json::Value = serde_json::from_str(&double_quoted(text))
            .map_err(|e| OptionsError(format!("Could not parse the JSON options: {e}")))?;
        if !value.is_object() {
            return wrong("Could not parse the JSON options: an object is expected");
        }
        let mut options = BTreeMap::new();
        flatten("", &value, &mut options)?;
        Ok(Self(options))
    }

    /// Sets an option that is not there yet.
    pub fn set_default(&mut self, key: &str, value: &str) {
        self.0.entry(key.into()).or_insert_with(|| value.into());
    }

    /// Sets those of `others` that are not there yet.
    pub fn set_defaults(&mut self, others: Self) {
        others.0.iter().for_each(|(key, value)| self.set_default(key, value));
    }

    /// The options that begin with `prefix`, in order.
    pub fn beginning_with(&self, prefix: &str) -> impl Iterator<Item = (&str, &str)> {
        let of = move |(key, _): &(&str, &str)| key.starts_with(prefix);
        self.0.iter().map(|(key, value)| (key.as_str(), value.as_str())).filter(of)
    }

    /// The value of an option.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    /// Takes an option out.
    pub fn take(&mut self, key: &str) -> Option<String> {
        self.0.remove(key)
    }

    fn take_on_off(&mut self, key: &str) -> Result<Option<bool>, OptionsError> {
        match self.take(key).as_deref() {
            None => Ok(None),
            Some("on" | "yes" | "true" | "y") => Ok(Some(true)),
            Some("off" | "no" | "false" | "n") => Ok(Some(false)),
            Some(_) => wrong(format!("Parameter '{key}' expects 'on' or 'off'")),
        }
    }

    fn take_size(&mut self, key: &str) -> Result<Option<u64>, OptionsError> {
        let Some(text) = self.take(key) else { return Ok(None) };
        parse_size(&text, 1).map(Some).map_err(|e| match e {
            SizeError::TooLarge => OptionsError(format!("Value '{text}' is out of range for parameter '{key}'")),
            SizeError::Malformed => OptionsError(format!(
                "Parameter '{key}' expects a non-negative number below 2^64\n\
                 Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
                 and exabytes, respectively."
            )),
        })
    }

    /// `cache-clean-interval`: metadata that is not used leaves the cache only where other needs its room, so there is nothing to do.
    fn take_clean_interval(&mut self) -> Result<(), OptionsError> {
        let key = "cache-clean-interval";
        let Some(text) = self.take(key) else { return Ok(()) };
        match text.parse::<i128>() {
            Ok(0..=0xffff_ffff) => Ok(()),
            // QEMU takes a negative number for a large one.
            Ok(number) if number.unsigned_abs() <= u64::MAX.into() => wrong("Cache clean interval too big"),
            Ok(_) => wrong(format!("Value '{text}' is too large for parameter '{key}'")),
            Err(_) => wrong(format!("Parameter '{key}' expects a number")),
        }
    }

    /// `overlap-check`: every structure is always guarded, so there is nothing to do.
    fn take_overlap_checks(&mut self) -> Result<(), OptionsError> {
        let template = self.take("overlap-check.template");
        let short = self.take("overlap-check");
        if let (Some(short), Some(template)) = (&short, &template)
            && short != template
        {
            return wrong(format!(
                "Conflicting values for qcow2 options 'overlap-check' ('{short}') and 'overlap-check.template' ('{template}')"
            ));
        }
        match short.or(template).as_deref() {
            None | Some("none" | "constant" | "cached" | "all") => {}
            Some(other) => {
                return wrong(format!(
                    "Unsupported value '{other}' for qcow2 option 'overlap-check'. Allowed are any of the following: \
                     none, constant, cached, all"
                ));
            }
        }
        OVERLAP_CHECKS.iter().try_for_each(|key| self.take_on_off(&format!("overlap-check.{key}")).map(drop))
    }

    /// Takes the options that begin with `prefix.` out, without the prefix.
    fn take_below(&mut self, prefix: &str) -> Self {
        let start = format!("{prefix}.");
        let (below, rest) = std::mem::take(&mut self.0).into_iter().partition(|(key, _)| key.starts_with(&start));
        self.0 = rest;
        Self(BTreeMap::into_iter(below).map(|(key, value)| (key[start.len()..].to_string(), value)).collect())
    }

    /// The disk that is described. `base` says what holds where the options are silent; its path and format do not count.
    ///
    /// # Errors
    /// An option that QEMU has and cowhand does not, or that nobody has; a value that it does not take; a format that is not said and
    /// must not be guessed.
    pub fn into_spec(mut self, base: &DiskSpec, around: &dyn Surroundings) -> Result<DiskSpec, OptionsError> {
        if self.get("driver") == Some("compress") {
            self.take("driver");
            return self.into_compressing(base, around);
        }
        let mut spec = DiskSpec { backing: Backing::Header, data_file: None, bare: None, ..base.clone() };
        if let Some(driver) = self.get("driver").and_then(below::protocol) {
            let file = self.into_file(&mut spec, around)?;
            return Ok(DiskSpec { format: Format::Raw, bare: Some(driver), force_raw: true, ..spec.in_file(file) });
        }
        let driver = self.take("driver");
        let format = driver.as_deref().map(str::parse).transpose();
        let format = format.map_err(|e: spec::FormatError| OptionsError(e.to_string()))?;
        let mut below = self.take_below("file");
        if let Some(name) = self.take("filename") {
            below.set_default("filename", &name);
        }
        let file = below.into_file(&mut spec, around)?;
        spec.format = match format {
            Some(format) => format,
            None => around.format_of(&file).map_err(OptionsError)?,
        };
        spec.guessed = driver.is_none();
        spec = spec.in_file(file);
        if spec.format == Format::Raw {
            self.take_part(&mut spec)?;
        }
        // Said by name, or found out by looking: not what a stranger would pass as raw by mistake.
        spec.force_raw = spec.format == Format::Raw;
        self.take_common(&mut spec)?;
        if spec.format == Format::Qcow2 {
            self.take_qcow2(&mut spec, base, around)?;
        }
        match self.0.into_keys().next() {
            Some(key) => wrong(format!("Block format '{}' does not support the option '{key}'", spec.format)),
            None => Ok(spec),
        }
    }

    /// The disk that is described below a filter (`compress`) that compresses all that is written.
    fn into_compressing(mut self, base: &DiskSpec, around: &dyn Surroundings) -> Result<DiskSpec, OptionsError> {
        self.take("node-name");
        let spec = self.take_below("file").into_spec(base, around)?;
        match self.0.into_keys().next() {
            Some(key) => wrong(format!("Block format 'compress' does not support the option '{key}'")),
            None if spec.format != Format::Qcow2 => {
                wrong(format!("Compression is not supported for underlying format: {}", spec.format))
            }
            None => Ok(DiskSpec { compress: true, ..spec }),
        }
    }

    /// What every node has.
    fn take_common(&mut self, spec: &mut DiskSpec) -> Result<(), OptionsError> {
        // A name by which nothing can be addressed here: each option list is one disk.
        self.take("node-name");
        if let Some(on) = self.take_on_off("read-only")? {
            spec.readonly |= on;
        }
        if self.take_on_off("auto-read-only")? == Some(true) {
            return wrong("auto-read-only=on is not supported; say read-only=on");
        }
        if self.take_on_off("force-share")? == Some(true) {
            spec.lock = false;
        }
        match self.take("discard").as_deref() {
            None => {}
            Some("unmap" | "on") => spec.discard = true,
            Some("ignore" | "off") => spec.discard = false,
            Some(_) => return wrong("Invalid discard option"),
        }
        match self.take("detect-zeroes").as_deref() {
            None => {}
            Some("off") => spec.detect_zeroes = DetectZeroes::Off,
            Some("on") => spec.detect_zeroes = DetectZeroes::On,
            Some("unmap") => spec.detect_zeroes = DetectZeroes::Unmap,
            Some(other) => return wrong(format!("Parameter 'detect-zeroes' does not accept value '{other}'")),
        }
        let direct = self.take_on_off("cache.direct")?;
        let no_flush = self.take_on_off("cache.no-flush")?;
        spec.cache = match (direct, no_flush) {
            (None, None) => spec.cache,
            (_, Some(true)) => Cache::Unsafe,
            (Some(true), _) => Cache::None,
            _ => Cache::Writeback,
        };
        Ok(())
    }

    fn take_qcow2(
        &mut self,
        spec: &mut DiskSpec,
        base: &DiskSpec,
        around: &dyn Surroundings,
    ) -> Result<(), OptionsError> {
        if let Some(id) = self.take("encrypt.key-secret") {
            spec.secret = around.secret(&id).map_err(OptionsError)?;
        }
        match self.take("encrypt.format").as_deref() {
            None | Some("luks" | "aes") => {}
            Some(other) => return wrong(format!("Parameter 'encrypt.format' does not accept value '{other}'")),
        }
        self.take_overlap_checks()?;
        // What is no longer in use always goes back to the host, whoever let go of it.
        for key in ["pass-discard-request", "pass-discard-snapshot", "pass-discard-other"] {
            self.take_on_off(key)?;
        }
        if let Some(on) = self.take_on_off("discard-no-unref")? {
            spec.discard_no_unref = on;
        }
        spec.tuning = spec.tuning.changed(Tuning {
            total: self.take_size("cache-size")?,
            l2: self.take_size("l2-cache-size")?,
            refcounts: self.take_size("refcount-cache-size")?,
            entry: self.take_size("l2-cache-entry-size")?,
            lazy_refcounts: self.take_on_off("lazy-refcounts")?.unwrap_or(spec.tuning.lazy_refcounts),
        });
        self.take_clean_interval()?;
        let data = self.take_below("data-file");
        if !data.0.is_empty() {
            let mut said = spec.clone();
            let file = data.into_file(&mut said, around)?;
            if said != *spec {
                return wrong("The data file is opened as the image is; say for the image how");
            }
            spec.data_file = Some(file);
        }
        let mut below = self.take_below("backing");
        // As `node-name` of the others.
        below.take("node-name");
        match self.take("backing").as_deref() {
            None if below.0.is_empty() => {}
            // The file that the header names, in another format.
            None if below.0.keys().eq(["driver"]) && below::protocol(&below.0["driver"]).is_none() => {
                let format = below.0["driver"].parse();
                spec.backing_format = Some(format.map_err(|e: spec::FormatError| OptionsError(e.to_string()))?);
            }
            None => {
                let base = DiskSpec {
                    secret: None,
                    readonly: true,
                    tuning: Tuning::default(),
                    backing_format: None,
                    ..base.clone()
                };
                spec.backing = Backing::Given(Box::new(below.into_spec(&base, around)?));
            }
            // JSON's null, or nothing.
            Some("") => spec.backing = Backing::Alone,
            Some(name) => return wrong(format!("Cannot find device='' nor node-name='{name}'")),
        }
        Ok(())
    }
}

/// A file's name without `file:`.
#[must_use]
pub fn plain_name(name: &str) -> PathBuf {
    PathBuf::from(name.strip_prefix("file:").unwrap_or(name))
}

/// The text with strings in single quotes, which QEMU takes, in double ones.
fn double_quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (c, quote) {
            ('"' | '\'', None) => {
                quote = Some(c);
                out.push('"');
            }
            (c, Some(open)) if c == open => {
                quote = None;
                out.push('"');
            }
            ('"', Some(_)) => out.push_str("\\\""),
            ('\\', Some(_)) => match chars.next() {
                // No escape of JSON's.
                Some('\'') => out.push('\''),
                other => {
                    out.push(c);
                    out.extend(other);
                }
            },
            _ => out.push(c),
        }
    }
    out
}

fn flatten(
    prefix: &str,
    value: &serde_json::Value,
    options: &mut BTreeMap<String, String>,
) -> Result<(), OptionsError> {
    use serde_json::Value;
    let text = match value {
        Value::Object(map) => {
            for (key, value) in map {
                let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                flatten(&key, value, options)?;
            }
            return Ok(());
        }
        Value::Array(list) => {
            for (index, value) in list.iter().enumerate() {
                flatten(&format!("{prefix}.{index}"), value, options)?;
            }
            return Ok(());
        }
        Value::Null => String::new(),
        Value::Bool(on) => if *on { "on" } else { "off" }.into(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => text.clone(),
    };
    if options.insert(prefix.into(), text).is_some() {
        return wrong(format!("Conflicting options: '{prefix}' is given twice"));
    }
    Ok(())
}

#[cfg(test)]
#[path = "options_test.rs"]
mod tests;
