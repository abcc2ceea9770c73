//! Reading guest data from one layer, and from the layers below where this one has none.
//!
//! First everything is located, layer by layer and without recursion, so that a deep chain needs no deep stack; then all is read
//! at once.

use std::rc::Rc;

use super::Image;
use super::data::Spot;
use super::entry::Below;
use super::mapping::{Kind, Run};
use crate::error::{Error, Result};
use crate::io::{IoSeg, fill_zero, segs_len, split_segs};
use crate::join::join_some;
use crate::node::Node;
use crate::queue::Queue;
use crate::raw::RawImage;

/// How many parts of a read are under way at once.
const PIECES_AT_ONCE: usize = 64;

/// A part of a read, in one place of one layer.
enum Piece<'a> {
    Qcow2 {
        image: &'a Image,
        offset: u64,
        run: Run,
        data: Vec<IoSeg>,
    },
    /// At a known place of a layer's file.
    Placed {
        layer: &'a Node,
        place: u64,
        data: Vec<IoSeg>,
    },
    Raw {
        image: &'a RawImage,
        offset: u64,
        data: Vec<IoSeg>,
    },
}

/// A part of a read that a layer does not have: the next layer below it, where, and where to.
struct Gap<'a> {
    below: &'a Node,
    offset: u64,
    data: Vec<IoSeg>,
}

impl Piece<'_> {
    async fn read(self, queue: &Rc<Queue>) -> Result<()> {
        match self {
            Self::Qcow2 { image, offset, run, data } => image.read_run(queue, offset, run, data).await,
            Self::Raw { image, offset, data } => image.read(queue, offset, &data).await,
            Self::Placed { layer, place, data } => {
                let read = queue.read(layer.data_file(), place, data).await;
                read.map_err(|e| Error::io("cannot read", e).at_path(layer.path()).at_offset(place))
            }
        }
    }
}

impl Image {
    /// Reads from `offset` (inside the virtual size) into `data`.
    pub(crate) async fn read(&self, queue: &Rc<Queue>, offset: u64, data: &[IoSeg]) -> Result<()> {
        let (mut pieces, mut gaps) = (Vec::new(), Vec::new());
        self.locate(queue, offset, data, &mut pieces, &mut gaps).await?;
        while let Some(Gap { below, offset, data }) = gaps.pop() {
            match below {
                Node::Raw(image) => pieces.push(Piece::Raw { image, offset, data }),
                Node::Qcow2(image) => image.locate(queue, offset, &data, &mut pieces, &mut gaps).await?,
            }
        }
        join_some(pieces.into_iter().map(|piece| piece.read(queue)), PIECES_AT_ONCE).await
    }

    /// Finds what this layer has of a read, and what it does not have; fills in what reads as zeros.
    async fn locate<'a>(
        &'a self,
        queue: &Rc<Queue>,
        offset: u64,
        data: &[IoSeg],
        pieces: &mut Vec<Piece<'a>>,
        gaps: &mut Vec<Gap<'a>>,
    ) -> Result<()> {
        let len = segs_len(data);
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let run = self.run(queue, at, len - done).await?;
            let part = split_segs(data, done, run.len);
            done += run.len;
            match run.kind {
                Kind::Zero { .. } | Kind::Unallocated(Below::Nothing) => fill_zero(&part),
                Kind::Unallocated(Below::At { layer, place }) => {
                    // The numbers of layers come from nowhere but the list.
                    let Some(layer) = self.layer(layer) else { continue };
                    pieces.push(Piece::Placed { layer, place, data: part });
                }
                Kind::Unallocated(Below::Ask { layer }) => gaps.extend(gap(self.layer(layer), at, part)),
                Kind::Unallocated(Below::Unknown) | Kind::Reserved { .. } => {
                    gaps.extend(gap(self.backing.as_deref(), at, part));
                }
                _ => pieces.push(Piece::Qcow2 { image: self, offset: at, run, data: part }),
            }
        }
        Ok(())
    }

    async fn read_run(&self, queue: &Rc<Queue>, offset: u64, run: Run, data: Vec<IoSeg>) -> Result<()> {
        match run.kind {
            Kind::Data { host, .. } => self.read_data(queue, Spot { guest: offset, host: host.get() }, data).await,
            Kind::Compressed(range) => {
                let decoded = self.decoded(queue, range).await?;
                decoded.scatter(self.geometry.cluster_bits.offset_in(offset) as usize, &data);
                Ok(())
            }
            // Neither lies anywhere: they were located as zeros, or further down.
            Kind::Unallocated(_) | Kind::Reserved { .. } | Kind::Zero { .. } => Ok(()),
        }
    }
}

/// What `below` has to be asked for. A backing file that is shorter reads as zeros past its end. (Sharp edge 20.)
fn gap(below: Option<&Node>, offset: u64, data: Vec<IoSeg>) -> Option<Gap<'_>> {
    let len = segs_len(&data);
    let there = below.map_or(0, |below| below.size().saturating_sub(offset).min(len));
    fill_zero(&split_segs(&data, there, len - there));
    let below = below.filter(|_| there > 0)?;
    Some(Gap { below, offset, data: split_segs(&data, 0, there) })
}
