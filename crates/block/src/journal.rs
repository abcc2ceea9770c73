//! Memory that outlives the process: what a disk has told its guest, and its image's file does not have yet.
//!
//! Behind vhost-user the guest lives on when the process that serves its disk dies. The page cache survives that, and so does memory that
//! the guest's side holds. In it lies a *journal*: a ring of records, each a change of the mapping, put there before anybody can be told of the
//! write that made it. A commit that has brought the changes into the file takes their records out again. Whoever opens the
//! disk next [replays](crate::qcow2) what is left.
//!
//! While the disk is open nothing is read back: the memory is shared with a peer that is not trusted, so where the ring begins and ends is
//! known here. What an opening finds in it is taken as hostile.
//!
//! Layout, in words of 64 bits as the host has them: the magic; how many records there is room for; the state (which of the two identities hold;
//! 0: nothing is left to do); where the ring begins and ends, in one word; two identities of image files, of two words each; and from the
//! word [`HEADER`] on the records. Each step that counts is the store of one word, so the process may die between any two.
//!
//! Locks: none. The ring belongs to the image's metadata lock, the rest to who opens, closes or changes the disk.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::error::{Error, ErrorKind, Result};
use crate::mutation::Mutation;

/// Words of memory that survive the process, and that somebody else may read and write at any time.
pub type SharedWords = Arc<dyn AsRef<[AtomicU64]> + Send + Sync>;

/// How many words a journal should have: 8 MiB, of which only those that are used are touched. With fewer, commits come more often.
pub const JOURNAL_WORDS: usize = 1 << 20;

/// What a write that has been acknowledged, and not flushed, survives.
#[derive(Clone, Default)]
pub enum Survival {
    /// Nothing: guest and process die together. Flushed writes survive a power cut, as they always do.
    #[default]
    PowerCut,
    /// The death of the process: changes of the mapping are noted in these words, which are given again when the disk is opened next. Words
    /// that are all zero are a new journal.
    Journal(SharedWords),
    /// The death of the process, without such memory: a request that changes the mapping is acknowledged when that is in the file.
    Synchronous,
}

/// The first word: a name and a version.
const MAGIC: u64 = u64::from_be_bytes(*b"cowhnd\0\x01");
/// Words before the records.
const HEADER: usize = 16;
/// Words of a record.
const RECORD: usize = 4;

const CAPACITY: usize = 1;
const STATE: usize = 2;
const POSITION: usize = 3;
/// Where the two identities are.
const IDENTITIES: [usize; 2] = [4, 6];

/// By which a file is known: its device and inode.
type Identity = (u64, u64);

/// What one record says, in four words; to [`crate::qcow2`] it has a meaning.
pub(crate) type Record = [u64; RECORD];

/// What a process that died has left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Left {
    /// The files that may be the disk's topmost one.
    identities: Vec<Identity>,
    /// The oldest first.
    pub(crate) records: Vec<Record>,
}

impl Left {
    /// Refuses what belongs to another file.
    pub(crate) fn check(&self, identity: Identity, path: &Path) -> Result<()> {
        if self.identities.contains(&identity) {
            return Ok(());
        }
        Err(refuse(
            path,
            "belongs to another image, which was being served when the process died; give that one, or new memory",
        ))
    }
}

fn refuse(path: &Path, what: &str) -> Error {
    Error::new(ErrorKind::Refused, format!("the memory that is to survive the process {what}")).at_path(path)
}

/// The words, as a header and so many records.
#[derive(Clone)]
struct Region {
    words: SharedWords,
    capacity: u32,
}

impl Region {
    fn load(&self, at: usize) -> u64 {
        (*self.words).as_ref().get(at).map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn store(&self, at: usize, value: u64) {
        if let Some(word) = (*self.words).as_ref().get(at) {
            word.store(value, Ordering::Release);
        }
    }

    fn put_identity(&self, place: usize, (device, inode): Identity) {
        let at = IDENTITIES[place & 1];
        self.store(at, device);
        self.store(at + 1, inode);
    }

    fn first_word(at: u32) -> usize {
        HEADER + at as usize * RECORD
    }

    /// What lies between two places of the ring.
    fn records(&self, tail: u32, head: u32) -> Vec<Record> {
        let mut records = Vec::new();
        let mut at = tail;
        while at != head {
            records.push(std::array::from_fn(|i| self.load(Self::first_word(at) + i)));
            at = (at + 1) % self.capacity;
        }
        records
    }
}

/// The journal of a disk.
pub(crate) struct Journal {
    region: Region,
    /// Which of the two identities holds.
    place: AtomicUsize,
}

impl Journal {
    /// # Errors
    /// There are too few words, or far too many.
    pub(crate) fn new(words: &SharedWords, path: &Path) -> Result<Self> {
        let records = (**words).as_ref().len().saturating_sub(HEADER) / RECORD;
        // One place stays empty: a ring that is full is told from one that is not.
        match u32::try_from(records) {
            Ok(capacity) if capacity >= 2 => {
                Ok(Self { region: Region { words: words.clone(), capacity }, place: AtomicUsize::new(0) })
            }
            _ => Err(refuse(path, "is too small, or too large")),
        }
    }

    /// What a process that died while the disk was open has left; none if nothing is left to do.
    ///
    /// # Errors
    /// The words are no journal, or one that is not understood.
    pub(crate) fn left(&self, path: &Path) -> Result<Option<Left>> {
        let region = &self.region;
        match region.load(0) {
            0 => return Ok(None),
            MAGIC => {}
            _ => return Err(refuse(path, "holds something else")),
        }
        let state = region.load(STATE);
        if state == 0 {
            return Ok(None);
        }
        let (tail, head) = unpack(region.load(POSITION));
        if region.load(CAPACITY) != u64::from(region.capacity) || state > 3 || tail.max(head) >= region.capacity {
            return Err(refuse(path, "is damaged"));
        }
        let holding = IDENTITIES.iter().enumerate().filter(|(place, _)| state >> place & 1 != 0);
        let identities = holding.map(|(_, &at)| (region.load(at), region.load(at + 1))).collect();
        Ok(Some(Left { identities, records: region.records(tail, head) }))
    }

    /// The disk whose topmost file this is, is open from now on; nothing is noted yet.
    pub(crate) fn start(&self, identity: Identity) {
        let region = &self.region;
        region.store(STATE, 0);
        region.store(CAPACITY, region.capacity.into());
        region.store(POSITION, 0);
        region.store(0, MAGIC);
        self.switch(identity);
    }

    /// The topmost file may be another one from now on; nothing is noted.
    pub(crate) fn announce(&self, identity: Identity) {
        self.region.put_identity(1 - self.place.load(Ordering::SeqCst), identity);
        self.region.store(STATE, 3);
    }

    /// The topmost file is this one from now on, perhaps one that was announced.
    pub(crate) fn switch(&self, identity: Identity) {
        let place = 1 - self.place.load(Ordering::SeqCst);
        self.region.put_identity(place, identity);
        self.region.store(STATE, 1 << place);
        self.place.store(place, Ordering::SeqCst);
    }

    /// The disk is closed: nothing is left to do.
    pub(crate) fn end(&self) {
        self.region.store(STATE, 0);
    }

    /// A ring without records, for the image that is the topmost layer from now on.
    pub(crate) fn ring(&self) -> Ring {
        let ring = Ring { region: self.region.clone(), tail: 0, head: 0 };
        ring.tell();
        ring
    }
}

/// The records of an image that is open.
pub(crate) struct Ring {
    region: Region,
    tail: u32,
    head: u32,
}

impl Ring {
    /// How many records there is room for.
    pub(crate) fn room(&self) -> usize {
        let capacity = self.region.capacity;
        let used = (self.head + capacity - self.tail) % capacity;
        (capacity - 1 - used) as usize
    }

    /// Notes records, for which there is room. They hold when this returns.
    pub(crate) fn append(&mut self, records: &[Record]) {
        let mut head = self.head;
        for record in records {
            for (i, &word) in record.iter().enumerate() {
                self.region.store(Region::first_word(head) + i, word);
            }
            head = (head + 1) % self.region.capacity;
        }
        // Not before: what the ring holds is whole.
        if Mutation::RecordAfterAcknowledgement.is_on() {
            self.tell();
            self.head = head;
            return;
        }
        self.head = head;
        self.tell();
    }

    /// Where the next record goes.
    pub(crate) fn mark(&self) -> u32 {
        self.head
    }

    /// What was noted before `mark` is in the image's file.
    pub(crate) fn forget(&mut self, mark: u32) {
        self.tail = mark;
        if self.tail == self.head {
            // From the start again, so that a ring that is never full touches little memory.
            (self.tail, self.head) = (0, 0);
        }
        self.tell();
    }

    fn tell(&self) {
        self.region.store(POSITION, u64::from(self.head) << 32 | u64::from(self.tail));
    }
}

/// Where a ring begins and ends.
fn unpack(position: u64) -> (u32, u32) {
    (position as u32, (position >> 32) as u32)
}

#[cfg(test)]
#[path = "journal_test.rs"]
mod tests;
