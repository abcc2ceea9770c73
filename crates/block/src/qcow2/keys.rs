//! The key slots of an encrypted image: secrets that open it, added and erased.
//!
//! A slot changes in this order: its key material, a barrier, the LUKS header, a barrier; see [`luks::change`]. What the data is encrypted
//! with stays the same.

use std::rc::Rc;
use std::time::Duration;

use cowhand_qcow2::luks::{self, Iterations, LuksError, SlotChange, VolumeKey};
use cowhand_qcow2::{CryptMethod, HostOffset, LuksExtension, limits};
use zeroize::Zeroizing;

use super::Image;
use super::layout::Structure;
use super::open::LUKS_HEADER;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Barrier, Storage};
use crate::queue::Queue;
use crate::secret::Secret;
use crate::sync::Arc;

/// A measurement shorter than this says little.
const PROBE: Duration = Duration::from_millis(20);

/// What is to become of key slots.
#[derive(Clone, Debug)]
pub struct KeyChange {
    /// A secret is added; otherwise slots are erased.
    pub activate: bool,
    /// The slot; when adding the first that is free, when erasing those that `old_secret` opens.
    pub slot: Option<usize>,
    /// The secret whose slots are erased.
    pub old_secret: Option<Secret>,
    /// The secret that is added.
    pub new_secret: Option<Secret>,
    /// How long it shall take on this host to derive a key from the new secret.
    pub iter_time: Option<Duration>,
    /// Slots in use may be written over, and the last one erased: then nobody can ever read the image again.
    pub force: bool,
}

/// The LUKS header with its key material.
struct Area {
    place: LuksExtension,
    header: luks::Header,
    bytes: Zeroizing<Vec<u8>>,
}

impl Image {
    fn key_error(&self, message: impl Into<String>) -> Error {
        Error::new(ErrorKind::Invalid, message).at_path(&self.path)
    }

    /// Why slots cannot change so, as far as what is asked for tells.
    pub(crate) fn check_keys(&self, change: &KeyChange) -> Result<()> {
        self.check_writable()?;
        let refuse = |message: &str| Err(self.key_error(message));
        match self.header.lock().header.crypt_method {
            CryptMethod::None => return refuse("Can't amend encryption options - encryption not present"),
            CryptMethod::Aes => return refuse("Only LUKS encryption options can be amended"),
            CryptMethod::Luks => {}
        }
        if let Some(slot) = change.slot.filter(|&slot| slot >= limits::LUKS_SLOTS) {
            let last = limits::LUKS_SLOTS - 1;
            return refuse(&format!("Invalid keyslot {slot} specified, must be between 0 and {last}"));
        }
        match change.activate {
            true if change.new_secret.is_none() => refuse("'new-secret' is required to activate a keyslot"),
            true if change.old_secret.is_some() => refuse("'old-secret' must not be given when activating keyslots"),
            false if change.new_secret.is_some() => refuse("'new-secret' must not be given when erasing keyslots"),
            false if change.iter_time.is_some() => refuse("'iter-time' must not be given when erasing keyslots"),
            false if change.slot.is_none() && change.old_secret.is_none() => refuse(
                "To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be given",
            ),
            _ => Ok(()),
        }
    }

    /// Changes the slots. `secret` is what the image was opened with.
    ///
    /// # Errors
    /// What is asked for would lock everybody out, and is not forced; no slot is free, or none is meant; the host's.
    pub(crate) async fn change_keys(
        &self,
        queue: &Rc<Queue>,
        storage: &Arc<dyn Storage>,
        change: &KeyChange,
        secret: Option<&Secret>,
    ) -> Result<()> {
        self.check_keys(change)?;
        let mut area = self.luks_area(queue).await?;
        if change.activate {
            let Some(secret) = secret else { return Err(self.key_error("the image's own secret is not given")) };
            let changed = self.add_secret(storage, &area, change, secret)?;
            return self.write_slot(queue, &area.place, &changed).await;
        }
        for slot in self.slots_to_erase(&area, change)? {
            let mut entropy = vec![0; area.header.erase_entropy_len()];
            self.entropy(storage, &mut entropy)?;
            let changed = area.header.erase_any_key(slot, &entropy).map_err(|e| self.luks_error(&e))?;
            self.write_slot(queue, &area.place, &changed).await?;
            area.header = changed.header;
        }
        Ok(())
    }

    fn add_secret(
        &self,
        storage: &Arc<dyn Storage>,
        area: &Area,
        change: &KeyChange,
        secret: &Secret,
    ) -> Result<SlotChange> {
        let new = change.new_secret.as_ref().map(Secret::bytes).unwrap_or_default();
        let in_use = |slot: usize| area.header.active_slots().any(|active| active == slot);
        if let Some(slot) = change.slot.filter(|&slot| in_use(slot) && !change.force) {
            return Err(self.key_error(format!("Refusing to overwrite active keyslot {slot} - please erase it first")));
        }
        let free = change.slot.or_else(|| (0..limits::LUKS_SLOTS).find(|&slot| !in_use(slot)));
        let Some(slot) = free else { return Err(self.key_error("Can't add a keyslot - all keyslots are in use")) };
        let unlocked = area.header.unlock(&area.bytes, secret.bytes()).map_err(|e| self.luks_error(&e))?;
        let key: VolumeKey = unlocked.key;
        let iterations = self.iterations(storage, area, change.iter_time.unwrap_or(Duration::from_secs(2)));
        let mut entropy = Zeroizing::new(vec![0; area.header.add_entropy_len()]);
        self.entropy(storage, &mut entropy)?;
        area.header.put_key(&key, new, iterations, slot, &entropy).map_err(|e| self.luks_error(&e))
    }

    /// Which slots are meant, if they may be erased.
    fn slots_to_erase(&self, area: &Area, change: &KeyChange) -> Result<Vec<usize>> {
        let refuse = |message: String| Err(self.key_error(message));
        let active: Vec<_> = area.header.active_slots().collect();
        let opens = |slot: usize, secret: &Secret| {
            let key = area.header.open_slot(slot, &area.bytes, secret.bytes());
            key.map(|key| key.is_some()).map_err(|e| self.luks_error(&e))
        };
        if let Some(slot) = change.slot {
            if let Some(old) = &change.old_secret
                && !opens(slot, old)?
            {
                return refuse(format!(
                    "Given keyslot {slot} doesn't contain the given old password for erase operation"
                ));
            }
            if !active.contains(&slot) {
                return if change.force {
                    Ok(Vec::new())
                } else {
                    refuse(format!("Given keyslot {slot} is already erased (inactive) "))
                };
            }
            if active.len() == 1 && !change.force {
                return refuse(format!(
                    "Attempt to erase the only active keyslot {slot} which will erase all the data in the image irreversibly - \
                     refusing operation"
                ));
            }
            return Ok(vec![slot]);
        }
        let Some(old) = &change.old_secret else { return Ok(Vec::new()) };
        let mut slots = Vec::new();
        for &slot in &active {
            if opens(slot, old)? {
                slots.push(slot);
            }
        }
        if slots.is_empty() {
            return refuse("No keyslots match given (old) password for erase operation".into());
        }
        if slots == active && !change.force {
            return refuse(
                "All the active keyslots match the (old) password that was given and erasing them will erase all the data in \
                 the image irreversibly - refusing operation"
                    .into(),
            );
        }
        Ok(slots)
    }

    /// How often the key derivation iterates to take so long on this host.
    fn iterations(&self, storage: &Arc<dyn Storage>, area: &Area, budget: Duration) -> Iterations {
        let mut probed = Iterations::MIN;
        loop {
            let before = storage.now();
            area.header.hash().probe(area.header.cipher().key_bytes(), probed);
            let took = storage.now().saturating_sub(before);
            if took >= PROBE || probed == Iterations::MAX {
                return Iterations::within(budget.min(Duration::from_secs(3600)), probed, took);
            }
            probed = Iterations::new(probed.get().saturating_mul(4)).unwrap_or(Iterations::MAX);
        }
    }

    async fn luks_area(&self, queue: &Rc<Queue>) -> Result<Area> {
        let place = self.header.lock().header.luks_extension().map_err(|e| self.format_error(&e))?;
        let Some(place) = place else { return Err(self.key_error("the image has no LUKS header")) };
        // Its length is bounded where the extension is parsed.
        let read = queue.read_buffer(&self.file, place.offset.get(), place.len as usize).await;
        let bytes = read.map_err(|e| self.io_error("cannot read the LUKS header", place.offset.get(), e))?;
        let header = luks::Header::parse(&bytes[..bytes.len().min(LUKS_HEADER)], place);
        let header = header.map_err(|e| self.format_error(&e))?;
        Ok(Area { place, header, bytes: Zeroizing::new(bytes.to_vec()) })
    }

    /// Writes whole sectors, the key material's before the header's.
    async fn write_slot(&self, queue: &Rc<Queue>, place: &LuksExtension, change: &SlotChange) -> Result<()> {
        let at = |offset: u64| HostOffset::new(place.offset.get() + offset);
        self.write_as(queue, Structure::EncryptionHeader, at(change.material_offset), &change.material).await?;
        self.barrier(queue, Barrier::BeforeHeader).await?;
        self.write_as(queue, Structure::EncryptionHeader, at(0), &change.header.encode()).await?;
        self.barrier(queue, Barrier::Header).await
    }

    fn entropy(&self, storage: &Arc<dyn Storage>, bytes: &mut [u8]) -> Result<()> {
        storage.entropy(bytes).map_err(|e| Error::io("cannot get random numbers", e).at_path(&self.path))
    }

    fn luks_error(&self, error: &LuksError) -> Error {
        self.key_error(error.to_string())
    }
}
