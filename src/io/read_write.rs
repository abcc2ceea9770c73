//! Requests that are waited for: reads, writes, zeros, discards.

use cowhand_block::bytes::{ByteRequest, Memory};

use super::command::{Command, Needs};
use super::flags::Flags;
use super::number::REQUEST_MAX;
use super::report::{Report, dump};
use super::session::{Failed, Outcome, Served, Session};

pub(crate) const COMMANDS: &[&Command] = &[&READ, &READV, &WRITE, &WRITEV, &DISCARD];

static READ: Command = Command {
    name: "read",
    short: Some("r"),
    takes: Some("[-abCqrv] [-P pattern [-s off] [-l len]] off len"),
    does: "reads a number of bytes at a specified offset",
    more: "
 Reads 'len' bytes from 'off' on, and says how long it took.
 'read -v 512 1k' shows the bytes 512 to 1535.

 -b, -- read from the VM state, which lies behind the disk
 -C, -- report in one line for programs
 -l, -- how many bytes to verify (with -P)
 -p, -- nothing, for old scripts
 -P, -- fail if the bytes are not all this one
 -q, -- report nothing
 -r, -- nothing: all memory is known to the I/O queue
 -s, -- where in what was read to begin to verify (with -P)
 -v, -- show the bytes

",
    words: (2, None),
    needs: Needs::Disk,
    run: read,
};

static READV: Command = Command {
    name: "readv",
    short: None,
    takes: Some("[-Cqrv] [-P pattern] off len [len..]"),
    does: "reads a number of bytes at a specified offset",
    more: "
 Reads from 'off' on into several buffers, one for each 'len'.
 'readv -v 512 1k 1k' shows the bytes 512 to 2559.

 -C, -- report in one line for programs
 -P, -- fail if the bytes are not all this one
 -q, -- report nothing
 -r, -- nothing: all memory is known to the I/O queue
 -v, -- show the bytes

",
    words: (2, None),
    needs: Needs::Disk,
    run: readv,
};

static WRITE: Command = Command {
    name: "write",
    short: Some("w"),
    takes: Some("[-bcCfnqruz] [-P pattern | -s source_file] off len"),
    does: "writes a number of bytes at a specified offset",
    more: "
 Writes 'len' bytes at 'off': the byte 0xcd if nothing else is said.
 'write 512 1k' changes the bytes 512 to 1535.

 -b, -- write to the VM state, which lies behind the disk
 -c, -- write compressed, whole clusters
 -C, -- report in one line for programs
 -f, -- durable when it is over (force unit access)
 -n, -- with -z, fail rather than write zeros
 -p, -- nothing, for old scripts
 -P, -- write this byte
 -q, -- report nothing
 -r, -- nothing: all memory is known to the I/O queue
 -s, -- write what is in this file, again and again
 -u, -- with -z, the space may be given back
 -z, -- make the range read as zeros

",
    words: (2, None),
    needs: Needs::WritableDisk,
    run: write,
};

static WRITEV: Command = Command {
    name: "writev",
    short: None,
    takes: Some("[-Cfqr] [-P pattern] off len [len..]"),
    does: "writes a number of bytes at a specified offset",
    more: "
 Writes at 'off' from several buffers, one for each 'len'.
 'writev 512 1k 1k' changes the bytes 512 to 2559.

 -C, -- report in one line for programs
 -f, -- durable when it is over (force unit access)
 -P, -- write this byte
 -q, -- report nothing
 -r, -- nothing: all memory is known to the I/O queue

",
    words: (2, None),
    needs: Needs::WritableDisk,
    run: writev,
};

static DISCARD: Command = Command {
    name: "discard",
    short: Some("d"),
    takes: Some("[-Cq] off len"),
    does: "discards a number of bytes at a specified offset",
    more: "
 Says that the content of 'len' bytes from 'off' on is not needed any more.
 'discard 64k 1M' gives that megabyte's space back, as far as it is whole clusters.

 -C, -- report in one line for programs
 -q, -- report nothing

",
    words: (2, None),
    needs: Needs::WritableDisk,
    run: discard,
};

/// What becomes of what was read.
pub(crate) struct Look {
    pub(crate) quiet: bool,
    pub(crate) show: bool,
    pub(crate) for_programs: bool,
    pub(crate) pattern: Option<u8>,
    /// Which part of it is verified; all if not said.
    pub(crate) part: Option<std::ops::Range<usize>>,
}

impl Look {
    pub(crate) fn new(flags: &Flags<'_>) -> Self {
        let &Flags { quiet, show, for_programs, pattern, .. } = flags;
        Self { quiet, show, for_programs, pattern, part: None }
    }
}

impl Session {
    /// Verifies, shows and reports what was read.
    pub(crate) fn look(&mut self, look: &Look, offset: u64, served: Served) -> Outcome {
        let buffer = served.memory.ok_or(Failed)?.into_buffer();
        let bytes = self.bytes(&buffer);
        let mut outcome = Ok(());
        let mut text = String::new();
        let part = look.part.clone().unwrap_or(0..bytes.len());
        if let Some(pattern) = look.pattern
            && let Some(part_bytes) = bytes.get(part.clone())
            && part_bytes.iter().any(|byte| *byte != pattern)
        {
            let at = offset + part.start as u64;
            text = format!("Pattern verification failed at offset {at}, {} bytes\n", part.len());
            outcome = Err(Failed);
        }
        if !look.quiet {
            if look.show {
                text += &dump(bytes, offset);
            }
            let count = bytes.len() as u64;
            let report = Report { what: "read", offset, count, total: count, time: served.time };
            text += &report.text(look.for_programs);
        }
        self.out.print(&text);
        outcome
    }

    /// Reports what changed `count` bytes, or why it did not.
    fn changed(&mut self, name: &str, offset: u64, count: u64, served: &Served, flags: &Flags<'_>) -> Outcome {
        if let Err(error) = &served.result {
            return self.fail(&format!("{name} failed: {}", error.strerror()));
        }
        if !flags.quiet {
            let what = if name == "discard" { name } else { "wrote" };
            let report = Report { what, offset, count, total: count, time: served.time };
            self.out.print(&report.text(flags.for_programs));
        }
        Ok(())
    }

    fn sectors(&mut self, offset: u64, count: u64) -> Outcome {
        for (value, name) in [(offset, "offset"), (count, "count")] {
            if !value.is_multiple_of(512) {
                return self.fail(&format!("{value} is not a sector-aligned value for '{name}'"));
            }
        }
        Ok(())
    }

    /// Memory to read into. None where the range does not lie on the disk, so that the read fails without any.
    pub(crate) fn memory_to_read(&mut self, offset: u64, lens: &[u64]) -> Outcome<Option<Memory>> {
        let (len, size): (u64, u64) = (lens.iter().sum(), self.disk()?.disk.size());
        let fits = offset.checked_add(len).is_some_and(|end| end <= size);
        Ok(fits.then(|| self.memory(lens, |_| {})))
    }
}

fn read(session: &mut Session, command: &'static Command, words: &[String]) -> Outcome {
    let (flags, operands) = Flags::take(session, command, words, "bCl:pP:qrs:v")?;
    let verified = flags.len.map(|word| session.size(word)).transpose()?;
    let verified_from = flags.source.map(|word| session.size(word)).transpose()?;
    let [offset, count] = operands[..] else { return session.misused(command) };
    let offset = session.size(offset)?;
    let count = session.length(count)?;
    if flags.pattern.is_none() && (verified.is_some() || verified_from.is_some()) {
        return session.misused(command);
    }
    let from = verified_from.unwrap_or(0);
    let end = verified.map_or(Some(count), |len| from.checked_add(len));
    let Some(end) = end.filter(|&end| from <= end && end <= count) else {
        return session.fail("pattern verification range exceeds end of read data");
    };
    let look = Look { part: Some(from as usize..end as usize), ..Look::new(&flags) };
    let request = if flags.vm_state {
        session.sectors(offset, count)?;
        ByteRequest::ReadVmState { offset, memory: session.memory(&[count], |_| {}) }
    } else {
        let Some(memory) = session.memory_to_read(offset, &[count])? else {
            return session.fail("read failed: Input/output error");
        };
        ByteRequest::Read { offset, memory }
    };
    let served = session.run(request)?;
    if let Err(error) = &served.result {
        return session.fail(&format!("read failed: {}", error.strerror()));
    }
    session.look(&look, offset, served)
}

fn readv(session: &mut Session, command: &'static Command, words: &[String]) -> Outcome {
    let (flags, operands) = Flags::take(session, command, words, "CP:qrv")?;
    let (offset, lens) = session.vector(command, &operands)?;
    let lens = session.lens(&lens)?;
    let Some(memory) = session.memory_to_read(offset, &lens)? else {
        return session.fail("readv failed: Input/output error");
    };
    let served = session.run(ByteRequest::Read { offset, memory })?;
    if let Err(error) = &served.result {
        return session.fail(&format!("readv failed: {}", error.strerror()));
    }
    session.look(&Look::new(&flags), offset, served)
}

fn write(session: &mut Session, command: &'static Command, words: &[String]) -> Outcome {
    let (flags, operands) = Flags::take(session, command, words, "bcCfnpP:qrs:uz")?;
    let [offset, count] = operands[..] else { return session.misused(command) };
    if let Some(conflict) = flags.conflict() {
        return session.fail(conflict);
    }
    let offset = session.size(offset)?;
    let word = count;
    let count = session.size(word)?;
    if count > REQUEST_MAX && !flags.fast_only {
        return session.fail(&format!("length cannot exceed {REQUEST_MAX} without -n, given {word}"));
    }
    if flags.vm_state || flags.compressed {
        session.sectors(offset, count)?;
    }
    let request = if flags.zeroes {
        let Flags { unmap, fast_only, durable, .. } = flags;
        ByteRequest::WriteZeroes { offset, len: count, unmap, fast_only, durable }
    } else {
        let memory = match flags.source {
            Some(path) => session.memory_from_file(count, path)?,
            None => session.memory(&[count], |bytes| bytes.fill(flags.fill())),
        };
        if flags.vm_state {
            ByteRequest::WriteVmState { offset, memory }
        } else if flags.compressed {
            ByteRequest::WriteCompressed { offset, memory }
        } else {
            ByteRequest::Write { offset, memory, durable: flags.durable }
        }
    };
    let served = session.run(request)?;
    session.changed("write", offset, count, &served, &flags)
}

fn writev(session: &mut Session, command: &'static Command, words: &[String]) -> Outcome {
    let (flags, operands) = Flags::take(session, command, words, "CfP:qr")?;
    let (offset, lens) = session.vector(command, &operands)?;
    let lens = session.lens(&lens)?;
    let count = lens.iter().sum();
    let memory = session.memory(&lens, |bytes| bytes.fill(flags.fill()));
    let served = session.run(ByteRequest::Write { offset, memory, durable: flags.durable })?;
    session.changed("writev", offset, count, &served, &flags)
}

fn discard(session: &mut Session, command: &'static Command, words: &[String]) -> Outcome {
    let (flags, operands) = Flags::take(session, command, words, "Cq")?;
    let [offset, count] = operands[..] else { return session.misused(command) };
    let offset = session.size(offset)?;
    let len = session.length(count)?;
    let served = session.run(ByteRequest::Discard { offset, len })?;
    session.changed("discard", offset, len, &served, &flags)
}

impl Session {
    /// How many bytes a request is for.
    fn length(&mut self, word: &str) -> Outcome<u64> {
        let len = self.size(word)?;
        if len > REQUEST_MAX {
            return self.fail(&format!("length cannot exceed {REQUEST_MAX}, given {word}"));
        }
        Ok(len)
    }
}
