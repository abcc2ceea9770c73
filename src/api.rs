//! What the control API is told of the disks that this program serves, and what it may do with them.

use std::path::Path;
use std::sync::Arc;

use cowhand_block::ErrorKind as BlockErrorKind;
use cowhand_control::{Disk, Disks, Error, ErrorKind, Layer, Limits, Listening, Resize, Server};
use cowhand_vhost_user_blk::{ExportControl, ExportStatus, Shrink};

use crate::Failure;

/// The control socket, once somebody listens there.
pub(crate) struct Api(Listening);

impl Api {
    /// Makes the socket.
    ///
    /// # Errors
    /// It cannot be made.
    pub(crate) fn listen(path: &Path) -> Result<Self, Failure> {
        Ok(Self(Listening::new(path)?))
    }

    /// Serves the API for exports, each with its name, until the server is dropped.
    ///
    /// # Errors
    /// The system has no room.
    pub(crate) fn serve(self, exports: Vec<(String, ExportControl)>) -> Result<Server, Failure> {
        Ok(Server::start(self.0, Arc::new(Exports(exports)), Limits::default())?)
    }
}

/// Disks that are exported to other VMMs.
struct Exports(Vec<(String, ExportControl)>);

impl Exports {
    fn find(&self, id: &str) -> Result<&ExportControl, Error> {
        let found = self.0.iter().find(|(name, _)| name == id).map(|(_, control)| control);
        found.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no disk {id}")))
    }
}

impl Disks for Exports {
    fn list(&self) -> Result<Vec<Disk>, Error> {
        // One whose front-end has gone for good (--once) is served no more.
        let shown = self.0.iter().filter_map(|(id, control)| control.status().map(|status| shown(id, status)));
        Ok(shown.collect())
    }

    fn one(&self, id: &str) -> Result<Disk, Error> {
        let ended = || Error::new(ErrorKind::NotFound, format!("disk {id} is not served any more"));
        self.find(id)?.status().map(|status| shown(id, status)).ok_or_else(ended)
    }

    fn resize(&self, id: &str, resize: &Resize) -> Result<Disk, Error> {
        let shrink = if resize.shrink { Shrink::Allowed } else { Shrink::Refused };
        self.find(id)?.resize(resize.size, shrink).map_err(|error| told(&error))?;
        self.one(id)
    }
}

fn shown(id: &str, status: ExportStatus) -> Disk {
    let ExportStatus { size, read_only, connected, layers } = status;
    let open = layers.is_some();
    let chain = layers.map(|layers| {
        let layers = layers.into_iter().map(|layer| Layer {
            path: layer.path.display().to_string(),
            format: layer.format.to_string(),
            size: layer.size,
        });
        layers.collect()
    });
    Disk { id: id.into(), size, read_only, connected, open, chain }
}

/// An error of the engine as the API tells of it.
fn told(error: &cowhand_block::Error) -> Error {
    let kind = match error.kind() {
        BlockErrorKind::Io => ErrorKind::Io,
        BlockErrorKind::NoSpace => ErrorKind::NoSpace,
        BlockErrorKind::Corrupt => ErrorKind::Corrupt,
        BlockErrorKind::Unsupported => ErrorKind::Unsupported,
        BlockErrorKind::Invalid => ErrorKind::Invalid,
        BlockErrorKind::ReadOnly => ErrorKind::ReadOnly,
        BlockErrorKind::Locked => ErrorKind::Locked,
        // A file of the disk, which was there when it was first looked at: the request is all right.
        BlockErrorKind::NotFound => ErrorKind::Io,
        BlockErrorKind::Refused => ErrorKind::Refused,
    };
    Error::new(kind, error.to_string())
}
