//! Requests that nobody waits for: they are begun, and report when they are over.

use std::time::Instant;

use cowhand_block::bytes::{ByteDone, ByteRequest};

use super::command::{Command, Needs};
use super::flags::Flags;
use super::read_write::Look;
use super::report::Report;
use super::session::{Outcome, Served, Session};

pub(crate) const COMMANDS: &[&Command] = &[&AIO_READ, &AIO_WRITE, &AIO_FLUSH];

static AIO_READ: Command = Command {
    name: "aio_read",
    short: None,
    takes: Some("[-Ciqrv] [-P pattern] off len [len..]"),
    does: "asynchronously reads a number of bytes",
    more: "
 Begins to read, as readv, and goes on with the next command; reports when it is over.
 'aio_flush' waits for it. A read that fails later does not make the program fail.

 -C, -- report in one line for programs
 -i, -- begin nothing
 -P, -- say if the bytes are not all this one
 -q, -- report nothing
 -r, -- nothing: all memory is known to the I/O queue
 -v, -- show the bytes

",
    words: (2, None),
    needs: Needs::Disk,
    run: aio_read,
};

static AIO_WRITE: Command = Command {
    name: "aio_write",
    short: None,
    takes: Some("[-Cfiqruz] [-P pattern] off len [len..]"),
    does: "asynchronously writes a number of bytes",
    more: "
 Begins to write, as writev, and goes on with the next command; reports when it is over.
 'aio_flush' waits for it. A write that fails later does not make the program fail.

 -C, -- report in one line for programs
 -f, -- durable when it is over (force unit access)
 -i, -- begin nothing
 -P, -- write this byte
 -q, -- report nothing
 -r, -- nothing: all memory is known to the I/O queue
 -u, -- with -z, the space may be given back
 -z, -- make the range read as zeros

",
    words: (2, None),
    needs: Needs::WritableDisk,
    run: aio_write,
};

static AIO_FLUSH: Command = Command {
    name: "aio_flush",
    short: None,
    takes: None,
    does: "completes all outstanding aio requests",
    more: "",
    words: (0, Some(0)),
    needs: Needs::Disk,
    run: |session, _, _| {
        session.drain();
        Ok(())
    },
};

/// A request that was begun.
pub(crate) struct Pending {
    offset: u64,
    count: u64,
    look: Look,
    write: bool,
    started: Instant,
}

impl Session {
    fn begin(&mut self, pending: Pending, request: ByteRequest) -> Outcome {
        self.next_tag += 1;
        let tag = self.next_tag;
        self.disk()?.queue.submit(tag, request);
        self.pending.insert(tag, pending);
        Ok(())
    }

    /// Reports what is over of what was begun.
    pub(crate) fn report_finished(&mut self) {
        let Some(open) = &mut self.open else { return };
        for ByteDone { tag, result, memory } in open.queue.finished() {
            let Some(Pending { offset, count, look, write, started }) = self.pending.remove(&tag) else { continue };
            let time = started.elapsed();
            if let Err(error) = result {
                self.say(&format!("{} failed: {}", if write { "aio_write" } else { "readv" }, error.strerror()));
            } else if !write {
                // What it found it has said; the command that began it has long succeeded.
                let _ = self.look(&look, offset, Served { result, memory, time });
            } else if !look.quiet {
                let report = Report { what: "wrote", offset, count, total: count, time };
                self.out.print(&report.text(look.for_programs));
            }
        }
    }
}

fn aio_read(session: &mut Session, command: &'static Command, words: &[String]) -> Outcome {
    let (flags, operands) = Flags::take(session, command, words, "CP:iqrv")?;
    if flags.invalid {
        session.say("injecting invalid read request");
        return Ok(());
    }
    let (offset, lens) = session.vector(command, &operands)?;
    let lens = session.lens(&lens)?;
    let Some(memory) = session.memory_to_read(offset, &lens)? else {
        session.say("readv failed: Input/output error");
        return Ok(());
    };
    let look = Look::new(&flags);
    let pending = Pending { offset, count: lens.iter().sum(), look, write: false, started: Instant::now() };
    session.begin(pending, ByteRequest::Read { offset, memory })
}

fn aio_write(session: &mut Session, command: &'static Command, words: &[String]) -> Outcome {
    let (flags, operands) = Flags::take(session, command, words, "CfiP:qruz")?;
    if flags.invalid {
        session.say("injecting invalid write request");
        return Ok(());
    }
    let Flags { unmap, zeroes, durable, .. } = flags;
    let [_, lens @ ..] = &operands[..] else { return session.misused(command) };
    if zeroes && lens.len() > 1 {
        return session.fail("-z supports only a single length parameter");
    }
    if unmap && !zeroes && !lens.is_empty() {
        return session.fail("-u requires -z to be specified");
    }
    let (offset, lens) = session.vector(command, &operands)?;
    let (count, request) = if zeroes {
        let len = session.size(lens[0])?;
        (len, ByteRequest::WriteZeroes { offset, len, unmap, fast_only: false, durable })
    } else {
        let lens = session.lens(&lens)?;
        let memory = session.memory(&lens, |bytes| bytes.fill(flags.fill()));
        (memory.len(), ByteRequest::Write { offset, memory, durable })
    };
    let pending = Pending { offset, count, look: Look::new(&flags), write: true, started: Instant::now() };
    session.begin(pending, request)
}
