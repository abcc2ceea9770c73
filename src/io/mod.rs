//! `cowhand io`: reads and writes a disk through the engine, command by command, in the language of `qemu-io`.
//!
//! [`language`], [`flags`] and [`number`] read what is typed, [`command`] finds the command, one file for each family of them runs it:
//! [`read_write`], [`aio`], [`status`], [`files`], [`misc`], [`zones`]. [`session`] is what they share, [`open`] opens disks, [`report`] and
//! [`memory`] are about the bytes.
//!
//! Called as `qemu-io` it is that: formats are probed and references followed. As `cowhand io` it does neither, and names the option
//! that allows it. What is printed is the same, to the byte but for times.

mod aio;
mod command;
mod files;
mod flags;
mod language;
mod memory;
mod misc;
mod number;
mod open;
mod program;
mod read_write;
mod report;
mod session;
mod status;
mod zones;

use std::ffi::OsString;
use std::io::BufRead;
use std::path::PathBuf;
use std::process::ExitCode;

use cowhand_block::OpenPolicy;

use self::open::Setup;
use self::program::{Arguments, Asked};
use self::session::Session;
use crate::img::context::Context;

/// As whom the tool was called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Name {
    /// `cowhand io`.
    Cowhand,
    /// `qemu-io`.
    Qemu,
}

impl Name {
    const fn text(self) -> &'static str {
        match self {
            Self::Cowhand => "cowhand io",
            Self::Qemu => "qemu-io",
        }
    }
}

/// Runs the tool with `words`, without the program's own name; gives the exit status.
pub(crate) fn main(words: Vec<OsString>, name: Name) -> ExitCode {
    let program = name.text();
    let arguments = match Arguments::parse(words, program) {
        Ok(Asked::Run(arguments)) => *arguments,
        Ok(Asked::Show(text)) => {
            print!("{text}");
            return ExitCode::SUCCESS;
        }
        Err(text) => {
            eprint!("{}", text.error);
            print!("{}", text.usage);
            return ExitCode::FAILURE;
        }
    };
    // As qemu-io it opens what images name, wherever that lies, since that is what its callers rely on.
    let (probe, allow_dirs) = match name {
        Name::Qemu if arguments.allow_dirs.is_empty() => (true, vec![PathBuf::from("/")]),
        Name::Qemu => (true, arguments.allow_dirs),
        Name::Cowhand => (arguments.probe, arguments.allow_dirs),
    };
    let policy = OpenPolicy { allow_dirs, probe, ..OpenPolicy::host() };
    let cx = Context::new(program, policy);
    if let Err(failure) = cx.take_objects(&arguments.objects) {
        failure.say(&cx);
        return ExitCode::FAILURE;
    }
    let setup = Setup { cx, image_opts: arguments.image_opts };
    let mut session = Session::new(program, setup, arguments.misalign);
    if let Some(file) = &arguments.file
        && session.open(Some(file), None, &arguments.settings).is_err()
    {
        return ExitCode::FAILURE;
    }
    let succeeded =
        if arguments.commands.is_empty() { converse(&mut session) } else { run_all(&mut session, &arguments.commands) };
    let closed = session.close().is_ok();
    session.out.flush();
    if succeeded && closed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs all the lines up to the end or a `quit`, whatever becomes of one.
fn run_all(session: &mut Session, lines: &[String]) -> bool {
    let mut succeeded = true;
    for line in lines {
        if !session.quit {
            succeeded &= session.line(line).is_ok();
        }
    }
    succeeded
}

/// Takes lines from standard input until it ends.
fn converse(session: &mut Session) -> bool {
    let mut succeeded = true;
    let mut input = std::io::stdin().lock();
    while !session.quit {
        session.out.print(&format!("{}> ", session.program));
        session.out.flush();
        let mut line = Vec::new();
        match input.read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
        let line = String::from_utf8_lossy(&line);
        succeeded &= session.line(line.trim_end_matches('\n')).is_ok();
    }
    succeeded
}
