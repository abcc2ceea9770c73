//! Opening, closing and opening anew; what is written comes to the medium, and to another size.

use cowhand_block::Preallocation;
use cowhand_block::bytes::ByteRequest;
use cowhand_block::options::NodeOptions;

use super::command::{Command, Needs};
use super::language::Options;
use super::open::{Settings, cache};
use super::session::{Failed, OpenDisk, Outcome, Session};

pub(crate) const COMMANDS: &[&Command] = &[&OPEN, &CLOSE, &REOPEN, &FLUSH, &TRUNCATE];

static OPEN: Command = Command {
    name: "open",
    short: Some("o"),
    takes: Some("[-rsCnkU] [-t cache] [-d discard] [-o options] [path]"),
    does: "open the file specified by path",
    more: "
 Opens a file for the commands that follow.
 'open -n -o driver=raw disk.img' opens a raw disk for writing, past the page cache.

 -r, -- open it for reading only
 -s, -- write to an overlay that is thrown away
 -C, -- copy what is read from backing files into the image
 -n, -- past the host's page cache (-t none)
 -U, -- without locks
 -k, -- as -i native
 -i, -- which I/O queue: threads, native or io_uring
 -t, -- the cache mode: none, writeback, writethrough, directsync or unsafe
 -d, -- whether discards reach the image: ignore or unmap
 -o, -- options of the format, as of --image-opts

",
    words: (1, None),
    needs: Needs::Nothing,
    run: open,
};

static CLOSE: Command = Command {
    name: "close",
    short: Some("c"),
    takes: None,
    does: "close the current open file",
    more: "",
    words: (0, Some(0)),
    needs: Needs::Disk,
    run: |session, _, _| session.close(),
};

static REOPEN: Command = Command {
    name: "reopen",
    short: None,
    takes: Some("[(-r|-w)] [-c cache] [-o options]"),
    does: "reopens an image with new options",
    more: "
 Opens what is open once more, with other options.
 'reopen -r' lets it only be read from now on.

 -r, -- for reading only
 -w, -- for writing too
 -c, -- with this cache mode
 -o, -- with these options of the format (see 'help open')

",
    words: (0, None),
    needs: Needs::Disk,
    run: reopen,
};

static FLUSH: Command = Command {
    name: "flush",
    short: Some("f"),
    takes: None,
    does: "flush all in-core file state to disk",
    more: "",
    words: (0, Some(0)),
    needs: Needs::Disk,
    run: |session, _, _| session.run(ByteRequest::Flush)?.result.map_err(|_| Failed),
};

static TRUNCATE: Command = Command {
    name: "truncate",
    short: Some("t"),
    takes: Some("[-m prealloc_mode] off"),
    does: "truncates the current file at the given offset",
    more: "",
    words: (1, Some(3)),
    needs: Needs::WritableDisk,
    run: truncate,
};

fn open(session: &mut Session, command: &'static Command, words: &[String]) -> Outcome {
    let mut options = Options::new(words, "snCro:ki:t:d:U");
    let mut settings = Settings::default();
    let mut described = None;
    loop {
        match options.next() {
            Ok(None) => break,
            Ok(Some(('o', _))) if session.setup.image_opts => {
                return session.fail("--image-opts and 'open -o' are mutually exclusive");
            }
            Ok(Some(('o', list))) => described = Some(list),
            Ok(Some((letter, argument))) => {
                if let Err(message) = settings.take(letter, argument) {
                    return session.error(&message);
                }
            }
            Err(message) => return session.wrong_option(command, &message),
        }
    }
    match options.operands()[..] {
        [name] => session.open(Some(name), described, &settings),
        [] if described.is_some() => session.open(None, described, &settings),
        _ => session.misused(command),
    }
}

fn reopen(session: &mut Session, command: &'static Command, words: &[String]) -> Outcome {
    let mut options = Options::new(words, "c:o:rw");
    let (mut read_only, mut mode, mut list) = (None, None, None);
    loop {
        match options.next() {
            Ok(None) => break,
            Ok(Some(('c', name))) => match cache(name) {
                Ok(cache) => mode = Some(cache),
                Err(message) => return session.error(&message),
            },
            Ok(Some(('o', _))) if list.is_some() => return session.misused(command),
            Ok(Some(('o', words))) => list = Some(words),
            Ok(Some((letter, _))) => {
                if read_only.is_some() {
                    return session.error("Only one -r/-w option may be given");
                }
                read_only = Some(letter == 'r');
            }
            Err(message) => return session.wrong_option(command, &message),
        }
    }
    if !options.operands().is_empty() {
        return session.misused(command);
    }
    session.drain();
    let mut spec = session.disk()?.disk.spec().clone();
    if let Some(list) = list {
        let described = match NodeOptions::from_list(list) {
            Ok(described) => described,
            Err(error) => return session.error(&error.to_string()),
        };
        if read_only.is_some() && described.get("read-only").is_some() {
            return session.error("Cannot set both -r/-w and 'read-only'");
        }
        if mode.is_some() && (described.get("cache.direct").or(described.get("cache.no-flush"))).is_some() {
            return session.error("Cannot set both -c and the cache options");
        }
        match session.changed_spec(described) {
            Ok(changed) => spec = changed,
            Err(message) => return session.error(&message),
        }
    }
    spec.readonly = read_only.unwrap_or(spec.readonly);
    spec.cache = mode.unwrap_or(spec.cache);
    session.reopen(&spec)
}

impl Session {
    /// What becomes of the open disk's description by these options.
    fn changed_spec(&self, options: NodeOptions) -> Result<cowhand_block::DiskSpec, String> {
        let open = self.open.as_ref().ok_or("no file open")?;
        self.setup.cx.changed(options, &open.disk, &open.options)
    }

    /// Opens what is open as `spec` says; if that fails, as it was.
    fn reopen(&mut self, spec: &cowhand_block::DiskSpec) -> Outcome {
        let open = self.disk()?;
        let (old, aio, copy_on_read) = (open.disk.spec().clone(), open.aio, open.copy_on_read);
        let options = open.options.clone();
        if *spec == old {
            return self.run(ByteRequest::Flush)?.result.or_else(|error| self.error(&error.to_string()));
        }
        if old.ephemeral {
            return self.error("a throw-away overlay would be lost: open it anew instead");
        }
        self.close()?;
        match self.open_spec(spec, aio, copy_on_read) {
            Ok(open) => {
                self.open = Some(OpenDisk { options, ..open });
                Ok(())
            }
            Err(reason) => {
                self.open = self.open_spec(&old, aio, copy_on_read).map_or_else(
                    |reason| {
                        eprintln!("{}: cannot open the image as it was: {reason}", self.program);
                        None
                    },
                    |open| Some(OpenDisk { options, ..open }),
                );
                self.error(&reason)
            }
        }
    }
}

fn truncate(session: &mut Session, command: &'static Command, words: &[String]) -> Outcome {
    let mut options = Options::new(words, "m:");
    let mut preallocation = Preallocation::Off;
    loop {
        match options.next() {
            Ok(None) => break,
            Ok(Some((_, mode))) => {
                preallocation = match mode {
                    "off" => Preallocation::Off,
                    "metadata" => Preallocation::Metadata,
                    "falloc" => Preallocation::Falloc,
                    "full" => Preallocation::Full,
                    other => return session.error(&format!("Invalid preallocation mode '{other}'")),
                }
            }
            Err(message) => return session.wrong_option(command, &message),
        }
    }
    let [size, ..] = options.operands()[..] else { return session.misused(command) };
    let size = session.size(size)?;
    session.drain();
    let resized = session.disk()?.disk.resize_with(size, preallocation);
    resized.or_else(|error| session.error(&error.reason()))
}
