//! Another header in the place of an image's: its backing file, version, refcount width, extensions.
//!
//! Numbers alone change by one write of the first sector ([`Image::switch_header`]). Here more may change; in what steps is the
//! format's business ([`Header::replace`]), and each is durable before the next.

use std::rc::Rc;

use cowhand_qcow2::{Autoclear, Compatible, ExtensionKind, FormatError, Header, HeaderSwitch, HostOffset};

use super::filling::{marked, unmark};
use super::layout::Structure;
use super::{HeaderState, Image};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Barrier, Buffer};
use crate::queue::Queue;
use crate::sync::Ordering;

impl Image {
    /// Changes the header, durably. Alone with the image; what else of it the new header makes another is for the caller, who has it
    /// read again. When this fails, only the file can tell which of the two it has.
    ///
    /// # Errors
    /// There is no room in the header; the new one breaks a rule; the host's.
    pub(super) async fn replace_header(&self, queue: &Rc<Queue>, change: impl FnOnce(&mut Header)) -> Result<()> {
        let _commit = self.commit_lock.lock().await;
        let switch = self.plan_header(queue, change).await?;
        self.take_header_steps(queue, switch).await
    }

    /// Writes another header, step by step, each durable before the next. The caller holds the commit lock.
    ///
    /// # Errors
    /// The host's: then only the file can tell which header it has.
    pub(super) async fn take_header_steps(&self, queue: &Rc<Queue>, switch: HeaderSwitch) -> Result<()> {
        let last = switch.steps.len();
        for (i, step) in switch.steps.iter().enumerate() {
            for (offset, sector) in step {
                // As long as it is being filled, it does not look whole.
                let shown = (*offset == 0 && self.filling.load(Ordering::SeqCst)).then(|| marked(sector));
                let shown = shown.as_deref().unwrap_or(sector);
                self.write_as(queue, Structure::Header, HostOffset::new(*offset), shown).await?;
            }
            self.barrier(queue, if i + 1 < last { Barrier::BeforeHeader } else { Barrier::Header }).await?;
        }
        let sector = switch.area.get(..512).unwrap_or_default().to_vec();
        *self.header.lock() = HeaderState { header: switch.header, sector };
        Ok(())
    }

    /// The cluster with the header, as it is when nothing is being filled.
    ///
    /// # Errors
    /// The host's.
    pub(super) async fn header_area(&self, queue: &Rc<Queue>) -> Result<Buffer> {
        let read = queue.read_buffer(&self.file, 0, self.cluster_size() as usize).await;
        let mut area = read.map_err(|e| self.io_error("cannot read the header", 0, e))?;
        unmark(&mut area);
        Ok(area)
    }

    /// How the header would change.
    async fn plan_header(&self, queue: &Rc<Queue>, change: impl FnOnce(&mut Header)) -> Result<HeaderSwitch> {
        let old = self.header.lock().header.clone();
        let mut new = old.clone();
        change(&mut new);
        let area = self.header_area(queue).await?;
        new.replace(&old, &area).map_err(|e| {
            let (kind, message) = match e {
                FormatError::HeaderFull { .. } => (ErrorKind::NoSpace, "No space left in the file header".to_string()),
                e => (ErrorKind::Invalid, e.to_string()),
            };
            Error::new(kind, message).at_path(&self.path)
        })
    }

    /// Why another backing file cannot be named.
    pub(crate) async fn check_backing(
        &self,
        queue: &Rc<Queue>,
        name: Option<&[u8]>,
        format: Option<&str>,
    ) -> Result<()> {
        self.check_writable()?;
        if name.is_some() && self.has_raw_data_file() {
            // In QEMU's words.
            return Err(Error::new(ErrorKind::Invalid, "Invalid argument").at_path(&self.path));
        }
        self.plan_header(queue, |header| header.set_backing(name, format)).await.map(drop)
    }

    /// Names another backing file and its format, or none. What the image has not itself is what the new one has from then on.
    pub(crate) async fn set_backing(&self, queue: &Rc<Queue>, name: Option<&[u8]>, format: Option<&str>) -> Result<()> {
        self.check_writable()?;
        let same = {
            let header = &self.header.lock().header;
            header.backing_name.as_deref() == name && header.backing_format() == format
        };
        if same {
            return Ok(());
        }
        self.replace_header(queue, |header| header.set_backing(name, format)).await
    }

    /// Changes what the header says of the external data file and of lazy refcounts; what is none stays.
    pub(crate) async fn set_flags(
        &self,
        queue: &Rc<Queue>,
        data_file: Option<&[u8]>,
        data_file_raw: Option<bool>,
        lazy_refcounts: Option<bool>,
    ) -> Result<()> {
        self.check_writable()?;
        let change = |header: &mut Header| {
            if let Some(name) = data_file {
                header.set_extension(ExtensionKind::DataFileName, (!name.is_empty()).then(|| name.to_vec()));
            }
            if let Some(raw) = data_file_raw {
                header.autoclear.set(Autoclear::RAW_DATA_FILE, raw);
            }
            if let Some(lazy) = lazy_refcounts {
                header.compatible.set(Compatible::LAZY_REFCOUNTS, lazy);
            }
        };
        let old = self.header.lock().header.clone();
        let mut new = old.clone();
        change(&mut new);
        if new == old { Ok(()) } else { self.replace_header(queue, change).await }
    }
}
