//! Answers a front-end's messages: features, configuration, memory, and the state of the rings.

use std::fs::File;
use std::io;
use std::sync::Arc;

use cowhand_virtio::VirtioDevice;
use cowhand_virtio::blk::{Block, BlockBackend, BlockOptions, BlockSettings, DiskBackend};
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use super::regions::{MAX_REGIONS, Regions};
use super::ring::{MAX_SIZE, Ring, Shared};

/// VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_RING_F_EVENT_IDX.
const FLUSH: u64 = 1 << 9;
const CONFIG_WCE: u64 = 1 << 11;
const EVENT_IDX: u64 = 1 << 29;

/// The device that a front-end talks to.
pub struct Device {
    /// Never activated: it says what a disk's features and configuration are.
    model: Block,
    shared: Shared,
    // Before the memory that they work on.
    rings: Vec<Ring>,
    regions: Regions,
}

impl Device {
    /// A device for a disk, with so many queues.
    pub fn new(backend: Arc<DiskBackend>, queues: u16) -> io::Result<Self> {
        let options = BlockOptions { queues, queue_size: MAX_SIZE, ..BlockOptions::default() };
        let model = Block::new(backend.clone(), options)?;
        let discard = !backend.read_only();
        let shared = Shared { backend, settings: Arc::new(BlockSettings::new("bench", discard)) };
        let rings = (0..queues).map(|index| Ring::new(index, shared.clone())).collect::<Result<_>>();
        Ok(Self { model, shared, rings: rings.map_err(io::Error::other)?, regions: Regions::new() })
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring> {
        self.rings.get_mut(index as usize).ok_or(Error::InvalidParam)
    }
}

const NOT_OFFERED: Error = Error::InvalidOperation("not offered by this back-end");

impl VhostUserBackendReqHandlerMut for Device {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.rings.iter_mut().try_for_each(Ring::stop)
    }

    fn reset_device(&mut self) -> Result<()> {
        self.reset_owner()
    }

    fn get_features(&mut self) -> Result<u64> {
        // The configuration cannot be written here.
        Ok(self.model.features() & !CONFIG_WCE | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.get_features()? != 0 {
            return Err(Error::FeatureMismatch);
        }
        self.shared.settings.set_writeback(features & FLUSH != 0);
        self.rings.iter_mut().try_for_each(|ring| ring.set_event_idx(features & EVENT_IDX != 0))
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        self.regions.replace(regions, files)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.ring(index)?.set_size(num)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        self.ring(index)?.set_addresses(descriptor, available, used)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.ring(index)?.set_base(base)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let base = self.ring(index)?.take_base()?;
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.ring(index.into())?.set_kick(file)?;
        let ring = self.rings.get_mut(usize::from(index)).ok_or(Error::InvalidParam)?;
        ring.start(&self.regions)
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let ring = self.rings.get_mut(usize::from(index)).ok_or(Error::InvalidParam)?;
        ring.set_call(file, &self.regions)
    }

    fn set_vring_err(&mut self, _index: u8, _file: Option<File>) -> Result<()> {
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        type Offered = VhostUserProtocolFeatures;
        Ok(Offered::MQ | Offered::REPLY_ACK | Offered::CONFIG | Offered::CONFIGURE_MEM_SLOTS)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.rings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let ring = self.rings.get_mut(index as usize).ok_or(Error::InvalidParam)?;
        ring.set_enabled(enable, &self.regions)
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let mut config = vec![0; size as usize];
        self.model.read_config(offset.into(), &mut config);
        Ok(config)
    }

    fn set_config(&mut self, _offset: u32, _bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        Err(NOT_OFFERED)
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
        self.regions.add(region, file)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.regions.remove(region)
    }

    fn set_gpu_socket(&mut self, _socket: GpuBackend) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn get_shared_object(&mut self, _object: VhostUserSharedMsg) -> Result<File> {
        Err(NOT_OFFERED)
    }

    fn get_inflight_fd(&mut self, _inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(NOT_OFFERED)
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
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

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(NOT_OFFERED)
    }
}
