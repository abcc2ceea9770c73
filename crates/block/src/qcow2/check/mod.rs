//! Check and repair: is an image what its tables say?
//!
//! One concern a file: [`refs`] counts references in little memory; [`walk`] goes through all metadata, with [`snapshots`] and [`tables`]
//! for bitmaps; [`compare`] holds the image's own refcounts against what was found, and changes them; [`copied`] looks at
//! the COPIED flags; [`repair`] decides what is done in which order, [`mend`] takes structures apart that lie in one
//! cluster, [`rebuild`] writes all refcounts anew; [`report`] is what is said; [`survey`] is for who takes over
//! from a process that died.
//!
//! Nothing here trusts the image. Each table is read once for a walk, however often it is named, and tables that overlap others are not
//! read at all, so a walk takes time in proportion to the file. What an entry that means nothing should have referred to is not known; as
//! long as there is one, nothing is freed.
//!
//! Locks: none. The image belongs to the check alone: QEMU's image lock sees to that.

mod compare;
mod copied;
mod mend;
mod rebuild;
mod refs;
mod repair;
pub(crate) mod report;
mod snapshots;
pub(super) mod survey;
mod tables;
mod walk;

use std::path::{Path, PathBuf};
use std::rc::Rc;

use cowhand_qcow2::{Geometry, Header, HostOffset};

use self::compare::Pass;
use self::copied::Fix;
use self::report::{CheckReport, Finding, FindingKind, Message, Repair};
use super::open::Opening;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Barrier, Buffer, File};
use crate::queue::Queue;

/// Where messages go.
pub(crate) type Sink = Box<dyn FnMut(Message)>;

/// Whether findings are told, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    First,
    /// A walk that prepares a repair: all it finds has been told.
    Silent,
    /// The walk after the refcounts were written anew: what entries say that mean nothing is told again, as QEMU does.
    Again,
    Last,
}

/// Counts and tells what is found.
struct Reporter {
    sink: Sink,
    stage: Stage,
    corruptions: u64,
    leaks: u64,
    /// Corruptions that stale refcounts do not explain.
    beyond_counts: u64,
    /// Whether flags that are wrong wait for the refcounts to be put right: most are not wrong any more then.
    flags_wait: bool,
    /// Flags that are wrong, if they wait.
    flags: u64,
    /// Flags that have been put right.
    flags_fixed: u64,
}

impl Reporter {
    fn start(&mut self, stage: Stage) {
        (self.stage, self.corruptions, self.leaks, self.beyond_counts, self.flags) = (stage, 0, 0, 0, 0);
    }

    fn repairing(&mut self, text: impl Into<String>) {
        (self.sink)(Message::Repairing(text.into()));
    }

    fn rebuilding(&mut self) {
        (self.sink)(Message::Rebuilding);
    }

    fn repaired(&mut self, text: impl Into<String>) {
        (self.sink)(Message::Repaired(text.into()));
    }

    fn not_repaired(&mut self, text: impl Into<String>) {
        (self.sink)(Message::NotRepaired(text.into()));
    }

    /// Tells of repairs that came to a number, if there were any.
    fn repaired_some(&mut self, count: u64, what: &str) {
        if count > 0 {
            self.repaired(format!("{what}: {count}"));
        }
    }
}

/// A check of one image.
pub(crate) struct Checker {
    queue: Rc<Queue>,
    file: File,
    path: PathBuf,
    header: Header,
    /// The header's first sector as it is in the file.
    sector: Vec<u8>,
    geometry: Geometry,
    file_len: u64,
    /// One past the last cluster that is looked at: those of the file, and those that a repair adds.
    end: u64,
    /// The refcount block that was last asked for a single count, and its number.
    block: Option<(u64, Buffer)>,
    /// Everything is to be repaired that can be.
    mends: bool,
    out: Reporter,
}

impl Checker {
    /// Reads the header of an image, which may be dirty, marked corrupt, or without refcounts.
    ///
    /// # Errors
    /// The header is so damaged that nothing is known of the image, or it asks for what is not known.
    pub(crate) async fn open(queue: &Rc<Queue>, file: File, path: &Path, sink: Sink) -> Result<Self> {
        let opening = Opening::header_for_check(queue, file, path).await?;
        let (file, header, sector, file_len) = opening.into_parts();
        let geometry = header.geometry();
        Ok(Self {
            queue: queue.clone(),
            file,
            path: path.to_path_buf(),
            geometry,
            end: geometry.cluster_bits.clusters_for(file_len),
            header,
            sector,
            file_len,
            block: None,
            mends: false,
            out: Reporter {
                sink,
                stage: Stage::First,
                corruptions: 0,
                leaks: 0,
                beyond_counts: 0,
                flags_wait: false,
                flags: 0,
                flags_fixed: 0,
            },
        })
    }

    /// Checks the image, and repairs what it may.
    ///
    /// # Errors
    /// Something could not be read or written.
    pub(crate) async fn run(&mut self, repair: Repair) -> Result<CheckReport> {
        (self.mends, self.out.flags_wait) = (repair == Repair::All, repair != Repair::None);
        let cut = match repair {
            Repair::All => self.cut_snapshots().await?,
            _ => {
                if let Some(what) = self.snapshots_beyond().await? {
                    (self.out.sink)(Message::Beyond(what));
                    return Ok(CheckReport { corruptions: 1, unreadable: 1, ..CheckReport::default() });
                }
                0
            }
        };
        let (mut report, walked, counts) = self.look(Stage::First).await?;
        let flagged = self.is_flagged();
        let is_clean = report.is_clean() && self.out.flags == 0;
        self.out.flags_wait = false;
        if repair == Repair::None {
            return Ok(report);
        }
        report.corruptions_fixed = cut;
        if is_clean && !flagged {
            self.forget_unknown().await?;
            return Ok(report);
        }
        let (corruptions, leaks) = (report.corruptions + cut, report.leaks);
        if !is_clean {
            self.repair(repair, walked, counts).await?;
            report = self.look(Stage::Last).await?.0;
        }
        if report.corruptions == 0 && flagged {
            self.vouch().await?;
        }
        let left = report.corruptions - self.out.flags;
        report.corruptions_fixed = corruptions.saturating_sub(left) + self.out.flags_fixed;
        report.leaks_fixed = leaks.saturating_sub(report.leaks);
        Ok(report)
    }

    /// Brings the refcounts of an image that was not closed up to date, and then says in the header that they are. False if more than
    /// refcounts is damaged, and nothing has been changed; or if they could not be put right.
    ///
    /// # Errors
    /// Something could not be read or written.
    pub(crate) async fn recount(&mut self) -> Result<bool> {
        let (report, walked, counts) = self.look(Stage::First).await?;
        if self.out.beyond_counts > 0 {
            return Ok(false);
        }
        if !report.is_clean() {
            self.repair(Repair::All, walked, counts).await?;
            if self.look(Stage::Last).await?.0.corruptions > 0 {
                return Ok(false);
            }
        }
        self.vouch().await?;
        Ok(true)
    }

    /// One look at everything, without a change.
    async fn look(&mut self, stage: Stage) -> Result<(CheckReport, walk::Walked, compare::Counts)> {
        self.out.start(stage);
        let mut walked = self.walk(true).await?;
        let counts = self.refcounts(&mut walked, Pass::Report).await?;
        let stats = self.copied(&mut walked, Fix::Report).await?;
        let bits = self.geometry.cluster_bits;
        let report = CheckReport {
            corruptions: self.out.corruptions,
            leaks: self.out.leaks,
            unreadable: walked.unreadable,
            image_end_offset: counts.highest.map_or(0, |highest| (highest + 1) << bits.bits()),
            total_clusters: bits.clusters_for(self.header.size),
            allocated_clusters: stats.allocated,
            compressed_clusters: stats.compressed,
            fragmented_clusters: stats.fragmented,
            ..CheckReport::default()
        };
        Ok((report, walked, counts))
    }

    /// Counts a finding at byte `offset` of the file, and tells it with its place.
    fn found(&mut self, kind: FindingKind, offset: u64, text: impl FnOnce() -> String) {
        let cluster = self.geometry.cluster_bits.index_of(offset);
        self.found_as(kind, offset, || format!("{} (at offset {offset:#x}, cluster {cluster})", text()));
    }

    /// The same of what the words say the place of.
    fn found_as(&mut self, kind: FindingKind, offset: u64, text: impl FnOnce() -> String) {
        match kind {
            FindingKind::Leak => self.out.leaks += 1,
            FindingKind::Copied => {
                self.out.flags += 1;
                if self.out.flags_wait {
                    return;
                }
                self.out.corruptions += 1;
            }
            _ => self.out.corruptions += 1,
        }
        if !kind.is_of_counts() {
            self.out.beyond_counts += 1;
        }
        let cluster = self.geometry.cluster_bits.index_of(offset);
        let told = |text| Finding { kind, offset, cluster, text };
        match self.out.stage {
            Stage::First => (self.out.sink)(Message::Found(told(text()))),
            Stage::Again if matches!(kind, FindingKind::Entry | FindingKind::Outside) => {
                (self.out.sink)(Message::Found(told(text())));
            }
            Stage::Last => (self.out.sink)(Message::Left(told(text()))),
            Stage::Silent | Stage::Again => {}
        }
    }

    /// Whether what can be put right without a guess is going to be.
    fn is_mending(&self) -> bool {
        self.mends && self.out.stage != Stage::Last
    }

    /// Counts what is going to be put right, and tells of it; otherwise the same as [`Checker::found_as`].
    fn found_mendable(&mut self, kind: FindingKind, offset: u64, text: impl FnOnce() -> String) {
        if !self.is_mending() {
            return self.found_as(kind, offset, text);
        }
        self.out.corruptions += 1;
        if self.out.stage == Stage::First {
            self.out.repairing(text());
        }
    }

    /// Whether something of this place lies in the file. As in QEMU, less than a cluster of it may be missing at the end.
    fn is_inside(&self, offset: u64, len: u64) -> bool {
        let end = offset.saturating_add(len);
        end <= self.file_len || end - self.file_len < self.cluster_size()
    }

    const fn cluster_size(&self) -> u64 {
        self.geometry.cluster_bits.size()
    }

    const fn cluster_of(&self, host: HostOffset) -> u64 {
        self.geometry.cluster_bits.index_of(host.get())
    }

    const fn offset_of(&self, cluster: u64) -> u64 {
        cluster << self.geometry.cluster_bits.bits()
    }

    async fn read(&self, what: &str, offset: u64, len: u64) -> Result<Buffer> {
        let read = self.queue.read_buffer(&self.file, offset, len as usize).await;
        read.map_err(|e| Error::io(format!("cannot read {what}"), e).at_path(&self.path).at_offset(offset))
    }

    async fn write(&self, what: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        let written = self.queue.write_buffer(&self.file, offset, Buffer::from_bytes(bytes)).await;
        written.map_err(|e| Error::io(format!("cannot write {what}"), e).at_path(&self.path).at_offset(offset))
    }

    async fn barrier(&self, barrier: Barrier) -> Result<()> {
        let flushed = self.queue.flush(&self.file, barrier).await;
        flushed.map_err(|e| Error::io("cannot flush", e).at_path(&self.path))
    }

    /// Writes the header's numbers, in one sector.
    async fn write_header(&mut self) -> Result<()> {
        let encoded = self.header.encode_fixed(&self.sector);
        let sector = encoded.map_err(|e| Error::new(ErrorKind::Corrupt, e.to_string()).at_path(&self.path))?;
        self.write("the header", 0, &sector).await?;
        self.sector = sector;
        self.barrier(Barrier::Header).await
    }
}

/// Which bytes of a buffer have changed and must be written, in whole sectors: a torn write leaves each entry old or new.
struct Dirty {
    first: Option<usize>,
    last: usize,
}

impl Dirty {
    const SECTOR: usize = 512;

    const fn clean() -> Self {
        Self { first: None, last: 0 }
    }

    /// The byte at `at` has changed.
    fn touch(&mut self, at: usize) {
        self.first = Some(self.first.map_or(at, |first| first.min(at)));
        self.last = self.last.max(at);
    }

    /// The whole sectors that hold all that was changed.
    fn range(&self, len: usize) -> Option<std::ops::Range<usize>> {
        let first = self.first? / Self::SECTOR * Self::SECTOR;
        Some(first..((self.last / Self::SECTOR + 1) * Self::SECTOR).min(len))
    }
}

/// The number in the eight bytes at `at`; 0 past the end.
fn number(bytes: &[u8], at: usize) -> u64 {
    let found = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
    found.map_or(0, u64::from_be_bytes)
}

fn set_number(bytes: &mut [u8], at: usize, value: u64) {
    if let Some(place) = bytes.get_mut(at..at + 8) {
        place.copy_from_slice(&value.to_be_bytes());
    }
}
