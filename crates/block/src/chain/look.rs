//! Looking at a disk before it is used: what its layers' headers tell.

use std::rc::Rc;

use cowhand_qcow2::CreateParams;

use super::{Files, Layers, Locks, OpenPolicy, Unconnected, data_file, open_layers};
use crate::error::Result;
use crate::protocol::How;
use crate::qcow2::open::ImageOptions;
use crate::queue::Queue;
use crate::raw::RawImage;
use crate::spec::DiskSpec;

/// What the topmost layer of a disk looks like.
pub(crate) struct Top {
    /// The virtual size in bytes, a multiple of 512.
    pub(crate) size: u64,
    /// See [`Node::granularity`].
    pub(crate) granularity: u32,
    /// What operations on its data must be multiples of.
    pub(crate) align: u32,
}

/// Looks at the headers of a disk's layers, and locks nothing.
pub(crate) async fn look(queue: &Rc<Queue>, spec: &DiskSpec, policy: &OpenPolicy) -> Result<Top> {
    let writable = !spec.readonly && !spec.ephemeral;
    let Layers { layers, described, .. } = open_layers(queue, spec, policy, None, Locks::Left).await?;
    let known = layers.iter().map(|layer| layer.file.traits().identity).collect();
    let mut files = Files { known, written: writable };
    let mut top = Top { size: 0, granularity: 0, align: 1 };
    for (at, layer) in layers.iter().enumerate().rev() {
        let described = described.get(at).and_then(Option::as_deref);
        let write = writable && at == 0;
        let how = How { write, spec, policy };
        let external = data_file(queue, layer, &mut files, described, (how, Locks::Left)).await?;
        top = match &layer.image {
            Unconnected::Raw(unfinished) => {
                let raw = RawImage::new(layer.file.clone(), &layer.path, *unfinished, write, false)?;
                Top { size: raw.size, granularity: RawImage::GRANULARITY, align: layer.file.traits().align }
            }
            Unconnected::Qcow2(opening) => {
                let tuning = described.map(|spec| spec.tuning).unwrap_or_default();
                let discard_no_unref = spec.discard_no_unref;
                let options = ImageOptions { writable: write, tuning, discard_no_unref, ..ImageOptions::default() };
                opening.check_openable(options, layer.secret.is_some())?;
                let data = external.as_ref().map_or(&layer.file, |external| &external.file);
                let header = opening.parsed();
                Top {
                    size: header.size.next_multiple_of(512),
                    granularity: header.geometry().cluster_bits.size() as u32,
                    align: data.traits().align,
                }
            }
        };
    }
    if spec.ephemeral {
        let granularity = CreateParams::new(top.size).cluster_bits.size() as u32;
        top = Top { granularity, align: 1, ..top };
    }
    Ok(top)
}
