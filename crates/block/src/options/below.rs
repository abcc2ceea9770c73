//! Node options of what lies below a format: a file, or what stands in its place ([`crate::protocol`]).

use std::path::PathBuf;
use std::time::Duration;

use super::{NodeOptions, OptionsError, Surroundings, plain_name, wrong};
use crate::protocol::{Debug, FileSpec, Limits, Null, Part, Protocol, Rule};
use crate::spec::{DiskSpec, Format};

/// The name of a driver that is no format, if it is one that there is.
pub(super) fn protocol(name: &str) -> Option<&'static str> {
    ["file", "host_device", "host_cdrom", "null-co", "null-aio", "blkdebug"].into_iter().find(|known| *known == name)
}

impl NodeOptions {
    /// The drivers that a file's name may begin with, before a colon.
    pub const PREFIXES: [&str; 3] = ["null-co", "null-aio", "blkdebug"];

    /// What the options describe, as what an image lies in. Of what they say of caches and locks, `spec` is told.
    pub(super) fn into_file(
        mut self,
        spec: &mut DiskSpec,
        around: &dyn Surroundings,
    ) -> Result<FileSpec, OptionsError> {
        self.take_prefix()?;
        let driver = self.get("driver").map(str::to_string);
        let known = driver.as_deref().map(protocol);
        if known == Some(None) {
            return self.into_image(spec, around);
        }
        self.take("driver");
        let driver = known.flatten();
        let file = match driver {
            Some("null-co" | "null-aio") => self.take_null()?,
            Some("blkdebug") => self.take_debug(spec, around)?,
            None => FileSpec { path: self.take_name()?, protocol: Protocol::Host },
            Some("file") => FileSpec { path: self.take_name()?, protocol: Protocol::Regular },
            Some(device) => FileSpec { path: self.take_name()?, protocol: Protocol::Device(device) },
        };
        if matches!(file.protocol, Protocol::Host | Protocol::Regular | Protocol::Device(_)) {
            match self.take("locking").as_deref() {
                None | Some("auto") => {}
                Some("on") => spec.lock = true,
                Some("off") => spec.lock = false,
                Some(_) => return wrong("Parameter 'locking' expects 'auto', 'on' or 'off'"),
            }
        }
        self.take_common(spec)?;
        match self.0.into_keys().next() {
            Some(key) => {
                let driver = driver.unwrap_or("file");
                wrong(format!("Block protocol '{driver}' doesn't support the option '{key}'"))
            }
            None => Ok(file),
        }
    }

    /// The driver that a name begins with, and what else the name says.
    fn take_prefix(&mut self) -> Result<(), OptionsError> {
        let Some((prefix, rest)) = self.get("filename").and_then(|name| name.split_once(':')) else { return Ok(()) };
        let Some(driver) = Self::PREFIXES.into_iter().find(|known| *known == prefix) else { return Ok(()) };
        // Who names the driver of a file may give it any name.
        if self.get("driver").is_some_and(|named| named != driver) {
            return Ok(());
        }
        let rest = rest.to_string();
        self.take("filename");
        self.set_default("driver", driver);
        if driver == "blkdebug" {
            let Some((config, image)) = rest.split_once(':') else {
                return wrong("blkdebug requires both config file and image path");
            };
            if !config.is_empty() {
                self.set_default("config", config);
            }
            self.set_default("image.filename", image);
        } else if rest != "//" {
            return wrong(format!("The only allowed filename for this driver is '{driver}://'"));
        }
        Ok(())
    }

    /// `blkdebug`.
    fn take_debug(&mut self, spec: &mut DiskSpec, around: &dyn Surroundings) -> Result<FileSpec, OptionsError> {
        let config = self.take("config").filter(|name| !name.is_empty()).map(|name| plain_name(&name));
        let mut rules = Vec::new();
        for group in ["inject-error", "set-state"] {
            let listed = self.take_below(group);
            let mut numbers: Vec<usize> = Vec::new();
            for key in listed.0.keys() {
                let number = key.split_once('.').and_then(|(number, _)| number.parse().ok());
                numbers.push(number.ok_or_else(|| OptionsError(format!("Parameter '{group}' expects a list")))?);
            }
            numbers.sort_unstable();
            numbers.dedup();
            for number in numbers {
                let start = format!("{number}.");
                let options = listed.beginning_with(&start).map(|(key, value)| (&key[start.len()..], value));
                rules.push(Rule::parse(group, options).map_err(OptionsError)?);
            }
        }
        let limits = self.take_limits()?;
        let image = self.take_below("image");
        if image.0.is_empty() {
            return wrong("A block device must be specified for \"image\"");
        }
        let of = image.into_file(spec, around)?;
        let path = of.path.clone();
        Ok(FileSpec { path, protocol: Protocol::Debug(Box::new(Debug { config, rules, limits, of })) })
    }

    fn take_limits(&mut self) -> Result<Limits, OptionsError> {
        let cannot = |key: &str, size: u64| OptionsError(format!("Cannot meet constraints with {key} {size}"));
        let mut take = |key: &str, unit: u32| match self.take_size(key)?.filter(|&size| size != 0) {
            None => Ok(None),
            Some(size) => match u32::try_from(size) {
                Ok(limit) if limit < i32::MAX.cast_unsigned() && limit.is_multiple_of(unit) => Ok(Some(limit)),
                _ => Err(cannot(key, size)),
            },
        };
        let align = take("align", 1)?;
        if let Some(align) = align.filter(|align| !align.is_power_of_two()) {
            return Err(cannot("align", align.into()));
        }
        let unit = align.unwrap_or(1);
        let max_transfer = take("max-transfer", unit)?;
        let opt_write_zero = take("opt-write-zero", unit)?;
        let max_write_zero = take("max-write-zero", opt_write_zero.unwrap_or(unit).max(unit))?;
        let opt_discard = take("opt-discard", unit)?;
        let max_discard = take("max-discard", opt_discard.unwrap_or(unit).max(unit))?;
        Ok(Limits { align, max_transfer, opt_write_zero, max_write_zero, opt_discard, max_discard })
    }

    /// The disk that an image shows, as what another image lies in.
    fn into_image(self, spec: &mut DiskSpec, around: &dyn Surroundings) -> Result<FileSpec, OptionsError> {
        let disk = self.into_spec(spec, around)?;
        (spec.cache, spec.lock) = (disk.cache, disk.lock);
        let is_alike = (disk.discard, disk.detect_zeroes) == (spec.discard, spec.detect_zeroes);
        // A raw image is what it lies in.
        if disk.format == Format::Raw && is_alike {
            spec.readonly = disk.readonly;
            return Ok(disk.file());
        }
        Ok(FileSpec { path: disk.path.clone(), protocol: Protocol::Image(Box::new(disk)) })
    }

    /// The name of a file.
    fn take_name(&mut self) -> Result<PathBuf, OptionsError> {
        match self.take("filename") {
            Some(name) if !name.is_empty() => Ok(plain_name(&name)),
            _ => wrong("A block device must be specified for \"file\""),
        }
    }

    /// `null-co`.
    fn take_null(&mut self) -> Result<FileSpec, OptionsError> {
        let usual = Null::default();
        let latency = match self.take("latency-ns").map(|text| text.parse::<u64>()) {
            None => usual.latency,
            Some(Ok(ns)) if i64::try_from(ns).is_ok() => Duration::from_nanos(ns),
            Some(Ok(_)) => return wrong("latency-ns is invalid"),
            Some(Err(_)) => return wrong("Parameter 'latency-ns' expects a number"),
        };
        let null = Null {
            size: self.take_size("size")?.unwrap_or(usual.size),
            read_zeroes: self.take_on_off("read-zeroes")?.unwrap_or(usual.read_zeroes),
            latency,
        };
        Ok(FileSpec { path: "null-co://".into(), protocol: Protocol::Null(null) })
    }

    /// `offset` and `size` of a raw image.
    pub(super) fn take_part(&mut self, spec: &mut DiskSpec) -> Result<(), OptionsError> {
        let offset = self.take_size("offset")?;
        let size = self.take_size("size")?;
        if offset.is_none() && size.is_none() {
            return Ok(());
        }
        if size.is_some_and(|size| !size.is_multiple_of(512)) {
            return wrong("Specified size is not multiple of 512");
        }
        let part = Part { offset: offset.unwrap_or(0), size, of: spec.file() };
        spec.protocol = Protocol::Part(Box::new(part));
        Ok(())
    }
}
