//! The engine held against QEMU: images that QEMU made are read, images that the engine wrote are judged by `qemu-img check` and
//! read back by `qemu-img convert`, a process that writes is killed over and over, and both sides' locks meet.
//!
//! [`qemu`] runs the tools, [`image`] makes images of every sort with them, [`matrix`] lists the sorts, [`guest`] plays a guest on several queues and
//! [`model`] says what each sector may hold. Without `qemu-img` and `qemu-io` the tests fail: nothing is skipped.
//!
//! A test that stands for one of the format's sharp edges carries the edge's number. A random test prints its seed;
//! `COWHAND_ORACLE_SEED=n` plays it again.

mod bitmap_test;
mod check_test;
mod compress_test;
mod death_test;
mod depth_test;
mod dirty_test;
mod discard_test;
mod format_test;
mod guest;
mod hostile_check_test;
mod image;
mod inspect_test;
mod interop_test;
mod jobs_test;
mod json_test;
mod kill_test;
mod lock_test;
mod map_test;
mod matrix;
mod model;
mod overlay_test;
mod prealloc_test;
mod qemu;
mod read_test;
mod refusal_test;
mod repair_crash_test;
mod repair_test;
mod secret_test;
mod whole_test;
mod words_test;
mod write_test;

use crate::io::sim::Rng;

/// The dice of one test.
fn dice(test: &str) -> Rng {
    Rng::from_environment("COWHAND_ORACLE_SEED", test)
}

/// A directory on a file system that knows direct I/O: the usual one, or else the build's.
fn direct_io_dir() -> tempfile::TempDir {
    use std::os::unix::fs::OpenOptionsExt;
    for parent in [std::env::temp_dir(), std::env::current_exe().unwrap().parent().unwrap().to_path_buf()] {
        let dir = tempfile::tempdir_in(parent).unwrap();
        let mut options = std::fs::OpenOptions::new();
        options.read(true).write(true).create_new(true).custom_flags(libc::O_DIRECT);
        if options.open(dir.path().join("probe")).is_ok() {
            return dir;
        }
    }
    panic!("neither the temporary directory nor the build's knows O_DIRECT: set TMPDIR to one that does");
}
