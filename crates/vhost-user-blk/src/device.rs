//! Answers a front-end's messages: features, configuration, memory, the state of the rings, in-flight records, the dirty log.
//!
//! One of it for each connection. Whatever changes what workers use stops them first and starts them again afterwards: that
//! is simple, drains what is in flight, and is asked for seldom (memory hot plug, the start of a migration).

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use cowhand_block::Survival;
use cowhand_virtio::VirtioDevice;
use cowhand_virtio::blk::{Block, BlockOptions, DiskBackend};
use cowhand_virtio::{DirtyLog, PageLog};
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use vm_memory::GuestAddress;

use crate::command::{Commanded, ExportStatus, Shrink};
use crate::front::FrontEnd;
use crate::inflight::Inflight;
use crate::regions::{MAX_REGIONS, Regions};
use crate::ring::{Addresses, MAX_SIZE, Ring, Start};
use crate::served::Served;
use crate::shared::SharedMemory;
use crate::wake::Wake;

/// VIRTIO_BLK_F_FLUSH, VIRTIO_RING_F_EVENT_IDX.
const FLUSH: u64 = 1 << 9;
const EVENT_IDX: u64 = 1 << 29;
const LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// The bytes of `writeback` in the configuration space.
const WRITEBACK: u32 = 32;
/// The rings for which the configuration's limit on segments is meant: what front-ends make unless they are told otherwise.
const USUAL_SIZE: u16 = 128;

/// Why something that a front-end asked for is not done.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Refusal(pub String);

/// Refuses.
pub(crate) fn refuse<T>(why: String) -> std::result::Result<T, Refusal> {
    Err(Refusal(why))
}

impl From<std::io::Error> for Refusal {
    fn from(error: std::io::Error) -> Self {
        Self(error.to_string())
    }
}

impl From<rustix::io::Errno> for Refusal {
    fn from(error: rustix::io::Errno) -> Self {
        Self(error.to_string())
    }
}

impl From<cowhand_block::Error> for Refusal {
    fn from(error: cowhand_block::Error) -> Self {
        Self(error.to_string())
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Self::ReqHandlerError(std::io::Error::other(refusal.0))
    }
}

/// How an export shows itself.
#[derive(Clone, Debug)]
pub(crate) struct DeviceOptions {
    pub id: String,
    pub queues: u16,
    /// How long a worker looks for work before it sleeps.
    pub patience: Duration,
}

/// The device that one front-end talks to.
pub(crate) struct Device {
    /// Never activated: it says what the disk's features and configuration are, and keeps what the guest sets.
    model: Block,
    options: DeviceOptions,
    /// What was negotiated, once it was.
    features: Option<u64>,
    /// What the guest has set the writeback field to.
    writeback: Option<bool>,
    // Before all that they work on.
    rings: Vec<Ring>,
    regions: Regions,
    /// Rung when the front-end has taken memory away that is mapped.
    lost: Wake,
    inflight: Option<Inflight>,
    log: Option<Arc<PageLog>>,
    front: FrontEnd,
    disk: Served,
}

impl Device {
    /// A device for a front-end that has just connected.
    ///
    /// # Errors
    /// The number of queues cannot be.
    pub(crate) fn new(disk: Served, options: DeviceOptions) -> std::result::Result<Self, Refusal> {
        let model = Block::new(
            disk.shape().clone(),
            BlockOptions {
                id: options.id.clone(),
                serial: disk.spec().serial.clone(),
                queues: options.queues,
                queue_size: USUAL_SIZE,
                patience: options.patience,
            },
        )?;
        let rings = (0..options.queues).map(Ring::new).collect::<std::result::Result<_, _>>()?;
        let lost = Wake::new()?;
        Ok(Self {
            model,
            options,
            features: None,
            writeback: None,
            rings,
            regions: Regions::new(lost.clone()),
            lost,
            inflight: None,
            log: None,
            front: FrontEnd::default(),
            disk,
        })
    }

    /// The front-end has gone: all that was taken from the rings is completed, and the disk closed. Gives the disk back for the
    /// next one, and why it could not be flushed, if so.
    pub(crate) fn end(mut self) -> (Served, cowhand_block::Result<()>) {
        for ring in &mut self.rings {
            if let Err(error) = ring.stop() {
                tracing::error!("{}: {error}", self.options.id);
            }
        }
        let rested = self.disk.rest();
        (self.disk, rested)
    }

    /// Rung when the front-end has taken memory away that is mapped.
    pub(crate) fn lost(&self) -> &Wake {
        &self.lost
    }

    /// The channel to the front-end.
    pub(crate) fn front(&mut self) -> &mut FrontEnd {
        &mut self.front
    }

    /// By what a write survives that is acknowledged.
    fn survival(&self) -> Survival {
        match &self.inflight {
            // Its overlay dies with us.
            _ if self.disk.spec().ephemeral => Survival::PowerCut,
            Some(inflight) => Survival::Journal(inflight.journal()),
            // What the front-end does not keep for us has to be in the image.
            None => Survival::Synchronous,
        }
    }

    fn negotiated(&self, feature: u64) -> bool {
        self.features.unwrap_or(0) & feature != 0
    }

    fn ring(&mut self, index: u32) -> std::result::Result<&mut Ring, Refusal> {
        let count = self.rings.len();
        let ring = usize::try_from(index).ok().and_then(|index| self.rings.get_mut(index));
        ring.ok_or_else(|| Refusal(format!("there is no ring {index} among {count}")))
    }

    /// Changes something while no ring runs, and has those that did go on.
    fn paused<T>(
        &mut self,
        change: impl FnOnce(&mut Self) -> std::result::Result<T, Refusal>,
    ) -> std::result::Result<T, Refusal> {
        let mut running = Vec::new();
        for (ring, index) in self.rings.iter_mut().zip(0..) {
            if ring.is_running() {
                ring.stop()?;
                running.push(index);
            }
        }
        let changed = change(self);
        for index in running {
            self.start(index)?;
        }
        changed
    }

    /// Starts a ring if all that it needs is there and it does not run yet.
    fn start(&mut self, index: u32) -> std::result::Result<(), Refusal> {
        let ring = self.ring(index)?;
        if ring.is_running() || !ring.is_ready() {
            return Ok(());
        }
        let (disk, resized) = self.disk.open(self.survival())?;
        if resized {
            self.front.config_changed();
        }
        let records = match &self.inflight {
            None => None,
            Some(inflight) => {
                let Some((words, at)) = u16::try_from(index).ok().and_then(|index| inflight.records(index)) else {
                    return refuse(format!("ring {index} has no room in the memory of in-flight records"));
                };
                Some((words, at, inflight.queue_size()))
            }
        };
        let log = self.log.clone().filter(|_| self.negotiated(LOG_ALL));
        let start = Start {
            regions: &self.regions,
            backend: Arc::new(DiskBackend(disk)),
            settings: self.model.settings().clone(),
            records,
            log: log.map(|log| log as Arc<dyn DirtyLog>),
            patience: self.options.patience,
            id: &self.options.id,
        };
        match usize::try_from(index).ok().and_then(|index| self.rings.get_mut(index)) {
            Some(ring) => ring.start(start),
            None => refuse(format!("there is no ring {index}")),
        }
    }

    /// Closes the disk when no ring runs any more.
    fn settle(&mut self) -> std::result::Result<(), Refusal> {
        if !self.rings.iter().any(Ring::is_running) {
            self.disk.rest()?;
        }
        Ok(())
    }

    /// What a write is to be, by what the guest has set or else by what it can do.
    fn apply_writeback(&self) {
        self.model.settings().set_writeback(self.writeback.unwrap_or(self.negotiated(FLUSH)));
    }

    /// A ring that was stopped has nothing in flight.
    fn forget(&self, index: u32) {
        if let (Some(inflight), Ok(index)) = (&self.inflight, u16::try_from(index)) {
            inflight.forget(index);
        }
    }

    fn stop_all(&mut self) -> std::result::Result<(), Refusal> {
        self.rings.iter_mut().try_for_each(Ring::stop)?;
        self.settle()
    }
}

/// While a front-end is there.
impl Commanded for Device {
    fn status(&self) -> ExportStatus {
        ExportStatus { connected: true, ..self.disk.status() }
    }

    fn resize(&mut self, bytes: u64, shrink: Shrink) -> cowhand_block::Result<()> {
        // What an earlier process left for a disk that is not open yet comes first: it is for the image as it was.
        let survival = self.survival();
        if self.disk.resize(bytes, shrink, survival)? {
            self.front.config_changed();
        }
        Ok(())
    }
}

const NOT_OFFERED: Error = Error::InvalidOperation("not offered by this back-end");

impl VhostUserBackendReqHandlerMut for Device {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    /// Deprecated: front-ends that send it mean that the rings are to stop.
    fn reset_owner(&mut self) -> Result<()> {
        Ok(self.stop_all()?)
    }

    fn reset_device(&mut self) -> Result<()> {
        self.rings.iter_mut().try_for_each(Ring::reset)?;
        (0..self.rings.len() as u32).for_each(|index| self.forget(index));
        self.settle()?;
        self.model.reset();
        self.features = None;
        self.writeback = None;
        if let Some(inflight) = &self.inflight {
            inflight.keep_writeback(None);
        }
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.model.features() | PROTOCOL_FEATURES | LOG_ALL)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.get_features()? != 0 {
            return Err(Error::FeatureMismatch);
        }
        let before = self.features.replace(features);
        if before == Some(features) {
            return Ok(());
        }
        // Whether writes are logged says nothing of the device: what the guest has set stays.
        let device = |features: u64| features & !(LOG_ALL | PROTOCOL_FEATURES);
        if before.is_some_and(|before| device(before) != device(features)) {
            self.writeback = None;
        }
        self.model.negotiated(device(features));
        self.apply_writeback();
        self.paused(|this| {
            let on = features & EVENT_IDX != 0;
            // Without protocol features rings are enabled from the start.
            let enabled = features & PROTOCOL_FEATURES == 0;
            this.rings.iter_mut().try_for_each(|ring| {
                if enabled {
                    ring.set_enabled(true);
                }
                ring.set_event_idx(on)
            })
        })?;
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        self.paused(|this| this.regions.replace(regions, files))?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        Ok(self.ring(index)?.set_size(num)?)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let used_log = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG).then_some(GuestAddress(log));
        let addresses = Addresses { descriptors, available, used, used_log };
        // A front-end tells a running ring's address again when logging begins or ends.
        self.paused(|this| this.ring(index)?.set_addresses(addresses))?;
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        Ok(self.ring(index)?.set_base(base)?)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let base = self.ring(index)?.take_base()?;
        self.forget(index);
        self.settle()?;
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let index = index.into();
        self.ring(index)?.set_kick(file)?;
        Ok(self.start(index)?)
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        Ok(self.ring(index.into())?.set_call(file)?)
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        Ok(self.ring(index.into())?.set_err(file)?)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        type Offered = VhostUserProtocolFeatures;
        Ok(Offered::MQ
            | Offered::CONFIG
            | Offered::REPLY_ACK
            | Offered::CONFIGURE_MEM_SLOTS
            | Offered::RESET_DEVICE
            | Offered::INFLIGHT_SHMFD
            | Offered::LOG_SHMFD
            | Offered::BACKEND_REQ)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let offered = self.get_protocol_features()?;
        // What follows from them is `vhost`'s to see to.
        if features & !offered.bits() == 0 { Ok(()) } else { Err(Error::FeatureMismatch) }
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.rings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let ring = self.ring(index)?;
        ring.set_enabled(enable);
        if enable {
            return Ok(self.start(index)?);
        }
        ring.stop()?;
        Ok(self.settle()?)
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        // `vhost` bounds both.
        let mut config = vec![0; size as usize];
        self.model.read_config(offset.into(), &mut config);
        Ok(config)
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        let before = self.model.settings().writeback();
        self.model.write_config(offset.into(), bytes);
        let now = self.model.settings().writeback();
        if now != before || (offset, bytes.len()) == (WRITEBACK, 1) {
            self.writeback = Some(now);
            if let Some(inflight) = &self.inflight {
                inflight.keep_writeback(self.writeback);
            }
        }
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        self.paused(|this| this.regions.add(region, file))?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        Ok(self.paused(|this| this.regions.remove(region))?)
    }

    fn get_inflight_fd(&mut self, asked: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let rings = self.rings.len();
        if usize::from(asked.num_queues) > rings || asked.queue_size > MAX_SIZE {
            let why = format!(
                "in-flight records for {} rings of {} entries: there are {rings}, of at most {MAX_SIZE}",
                asked.num_queues, asked.queue_size
            );
            return Err(Refusal(why).into());
        }
        Ok(Inflight::create(asked).map_err(Refusal::from)?)
    }

    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> Result<()> {
        if usize::from(given.num_queues) > self.rings.len() || given.queue_size > MAX_SIZE {
            return Err(Refusal("in-flight records for more rings, or larger ones, than there are".into()).into());
        }
        let inflight = Inflight::adopt(given, &file, &self.lost).map_err(Refusal::from)?;
        if !inflight.is_of(self.disk.instance()) {
            let why = "the guest's disk was a throw-away overlay (ephemeral=on) that died with the process that had it; \
                       this guest cannot go on";
            return Err(Refusal(why.into()).into());
        }
        // What the disk has written down so far it has in the memory that it was opened with.
        self.stop_all()?;
        if let Some(writeback) = inflight.writeback() {
            self.writeback = Some(writeback);
        }
        self.apply_writeback();
        self.inflight = Some(inflight);
        for index in 0..self.rings.len() as u32 {
            self.start(index)?;
        }
        Ok(())
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let memory = SharedMemory::map(&file, log.mmap_offset, log.mmap_size, &self.lost);
        let memory = memory.map_err(|error| Refusal(format!("the dirty log: {error}")))?;
        Ok(self.paused(|this| {
            this.log = Some(Arc::new(PageLog::new(Arc::new(memory), log.mmap_size)));
            Ok(())
        })?)
    }

    fn set_gpu_socket(&mut self, _socket: GpuBackend) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn get_shared_object(&mut self, _object: VhostUserSharedMsg) -> Result<File> {
        Err(NOT_OFFERED)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(NOT_OFFERED)
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(NOT_OFFERED)
    }
}
