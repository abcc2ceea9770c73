//! Every bound that the format, or QEMU's reading of it, puts on a count or a size.
//!
//! A field is held against these before it sizes an allocation or a loop. Where the format has no bound of its own they
//! are QEMU's, so that an image made there opens here and the other way round.

/// Smallest cluster: 2^9 = 512 bytes (specification, "Header").
pub const CLUSTER_BITS_MIN: u32 = 9;
/// Largest cluster: 2^21 = 2 MiB. The format has no bound; this is QEMU's.
pub const CLUSTER_BITS_MAX: u32 = 21;
/// With extended L2 entries a subcluster must be at least 512 bytes, so a cluster at least 2^14.
pub const EXTENDED_L2_CLUSTER_BITS_MIN: u32 = 14;

/// Bytes in a version 2 header.
pub const HEADER_LEN_V2: u32 = 72;
/// Least `header_length` of a version 3 header, in bytes.
pub const HEADER_LEN_V3_MIN: u32 = 104;
/// Where the one additional field known so far, `compression_type`, stands; it exists only in longer headers.
pub const COMPRESSION_TYPE_AT: u32 = 104;
/// `header_length` as it is written for new version 3 images, in bytes.
pub const HEADER_LEN_V3: u32 = 112;

/// Longest backing file name, in bytes.
pub const BACKING_NAME_MAX: u32 = 1023;
/// Longest backing format name, in bytes (QEMU's).
pub const BACKING_FORMAT_MAX: usize = 15;

/// Refcounts are at most 2^6 = 64 bits wide.
pub const REFCOUNT_ORDER_MAX: u32 = 6;
/// Version 2 refcounts are always 2^4 = 16 bits wide; new images too unless asked otherwise.
pub const REFCOUNT_ORDER_DEFAULT: u32 = 4;

/// Largest L1 table, in bytes (32 MiB).
pub const L1_TABLE_BYTES_MAX: u64 = 32 << 20;
/// Largest refcount table, in bytes (8 MiB).
pub const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;

/// Most internal snapshots.
pub const SNAPSHOTS_MAX: u32 = 65536;
/// Most extra data of one snapshot table entry, in bytes.
pub const SNAPSHOT_EXTRA_DATA_MAX: u32 = 1024;
/// Largest snapshot table, in bytes (64 MiB).
pub const SNAPSHOT_TABLE_BYTES_MAX: u64 = 64 << 20;

/// Most persistent bitmaps.
pub const BITMAPS_MAX: u32 = 65535;
/// Longest bitmap name, in bytes.
pub const BITMAP_NAME_MAX: u32 = 1023;
/// Finest granularity of a bitmap: 2^9 bytes of disk to a bit.
pub const BITMAP_GRANULARITY_BITS_MIN: u8 = 9;
/// Coarsest granularity of a bitmap: 2^31 bytes of disk to a bit.
pub const BITMAP_GRANULARITY_BITS_MAX: u8 = 31;
/// Most extra data of one bitmap directory entry, in bytes. None is defined so far; this only bounds what is kept.
pub const BITMAP_EXTRA_DATA_MAX: u32 = 1024;
/// Largest bitmap directory, in bytes: 1 KiB to a bitmap, which an entry with the longest name fits.
pub const BITMAP_DIRECTORY_BYTES_MAX: u64 = BITMAPS_MAX as u64 * 1024;
/// Most data of one bitmap, in bytes (512 MiB): what it may take in memory.
pub const BITMAP_BYTES_MAX: u64 = 512 << 20;

/// Host offsets lie below 2^56 (bits 9 to 55 of table entries).
pub const HOST_OFFSET_BITS: u32 = 56;
/// One past the greatest host offset.
pub const HOST_OFFSET_END: u64 = 1 << HOST_OFFSET_BITS;

/// Longest LUKS header with its key material, in bytes. LUKS1 with eight slots stays far below; this only keeps a
/// hostile length from being allocated.
pub const LUKS_HEADER_BYTES_MAX: u64 = 64 << 20;

/// Key slots of a LUKS1 header.
pub const LUKS_SLOTS: usize = 8;
/// Stripes that the volume key is split into in a slot. LUKS1 leaves the number open; QEMU and cryptsetup write only
/// this one, and QEMU refuses any other.
pub const LUKS_STRIPES: u32 = 4000;
/// Least PBKDF2 iterations that are written (the LUKS1 specification's). Fewer, but not 0, are accepted when read.
pub const LUKS_ITERATIONS_MIN: u32 = 1000;
/// Most PBKDF2 iterations of a key slot or of the volume key's digest. The format has no bound, but with 2^32 of them
/// in eight slots a processor would be busy for hours before a secret is refused. This many take about a minute in a
/// slot, several times what anybody chooses to wait.
pub const LUKS_ITERATIONS_MAX: u32 = 1 << 26;
/// Longest volume key, in bytes: two AES-256 keys.
pub const LUKS_KEY_BYTES_MAX: usize = 64;

/// Bytes of a snapshot table's entry before its extra data.
pub const SNAPSHOT_FIXED_LEN: u64 = 40;
