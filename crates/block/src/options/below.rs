//! Node options of what lies below a format: a file, or what stands in its place ([`crate::protocol`]).

use std::path::PathBuf;
use std::time::Duration;

use super::{NodeOptions, OptionsError, Surroundings, plain_name, wrong};
use crate::protocol::{FileSpec, Null, Part, Protocol};
use crate::spec::{DiskSpec, Format};

/// The name of a driver that is no format, if it is one that there is.
pub(super) fn protocol(name: &str) -> Option<&'static str> {
    ["file", "host_device", "host_cdrom", "null-co", "null-aio"].into_iter().find(|known| *known == name)
}

impl NodeOptions {
    /// The drivers that a file's name may begin with, before a colon.
    pub const PREFIXES: [&str; 2] = ["null-co", "null-aio"];

    /// What the options describe, as what an image lies in. Of what they say of caches and locks, `spec` is told.
    pub(super) fn into_file(
        mut self,
        spec: &mut DiskSpec,
        around: &dyn Surroundings,
    ) -> Result<FileSpec, OptionsError> {
        self.take_prefix();
        let driver = self.get("driver").map(str::to_string);
        let known = driver.as_deref().map(protocol);
        if known == Some(None) {
            return self.into_image(spec, around);
        }
        self.take("driver");
        let driver = known.flatten();
        let file = match driver {
            Some("null-co" | "null-aio") => self.take_null()?,
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

    /// The driver that a name begins with.
    fn take_prefix(&mut self) {
        let named = |driver: &str| self.get("filename").is_some_and(|name| name == format!("{driver}://"));
        if let Some(driver) = Self::PREFIXES.into_iter().find(|driver| named(driver)) {
            self.take("filename");
            self.set_default("driver", driver);
        }
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
