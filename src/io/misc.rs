//! What is about the program rather than the disk: waiting, ending, signals; and breakpoints, which only QEMU's blkdebug driver has.

use std::time::Duration;

use super::command::{Command, Needs};
use super::number::integer;
use super::session::{Outcome, Session};

pub(crate) const COMMANDS: &[&Command] =
    &[&SLEEP, &QUIT, &ABORT, &SIGRAISE, &BREAK, &REMOVE_BREAK, &RESUME, &WAIT_BREAK];

static SLEEP: Command = Command {
    name: "sleep",
    short: None,
    takes: None,
    does: "waits for the given value in milliseconds",
    more: "",
    words: (1, Some(1)),
    needs: Needs::Nothing,
    run: |session, _, words| match integer(&words[1]).and_then(|time| u64::try_from(time).ok()) {
        Some(time) => {
            std::thread::sleep(Duration::from_millis(time));
            Ok(())
        }
        None => session.fail(&format!("{} is not a valid number", words[1])),
    },
};

static QUIT: Command = Command {
    name: "quit",
    short: Some("q"),
    takes: None,
    does: "exit the program",
    more: "",
    words: (0, None),
    needs: Needs::Nothing,
    run: |session, _, _| {
        session.quit = true;
        Ok(())
    },
};

static ABORT: Command = Command {
    name: "abort",
    short: None,
    takes: None,
    does: "simulate a program crash using abort(3)",
    more: "",
    words: (0, Some(0)),
    needs: Needs::Nothing,
    run: |_, _, _| std::process::abort(),
};

static SIGRAISE: Command = Command {
    name: "sigraise",
    short: None,
    takes: Some("signal"),
    does: "raises a signal",
    more: "
 Sends the program itself the signal of this number.
 'sigraise 9' ends it as a crash would.

",
    words: (1, Some(1)),
    needs: Needs::Nothing,
    run: sigraise,
};

fn sigraise(session: &mut Session, _: &'static Command, words: &[String]) -> Outcome {
    let number = session.size(&words[1])?;
    session.out.flush();
    let signal = i32::try_from(number).ok().and_then(rustix::process::Signal::from_named_raw);
    let Some(signal) = signal else {
        // None of the system's that has a name: 0 does nothing.
        return if number == 0 { Ok(()) } else { session.fail(&format!("{number} is not a signal")) };
    };
    match rustix::process::kill_process(rustix::process::getpid(), signal) {
        Ok(()) => Ok(()),
        Err(error) => session.fail(&format!("cannot raise signal {number}: {error}")),
    }
}

static BREAK: Command = Command {
    name: "break",
    short: None,
    takes: Some("event tag"),
    does: "sets a breakpoint on event and tags the stopped request as tag",
    more: "",
    words: (2, Some(2)),
    needs: Needs::Disk,
    run: |session, _, _| session.fail("Could not set breakpoint: Operation not supported"),
};

static REMOVE_BREAK: Command = Command {
    name: "remove_break",
    short: None,
    takes: Some("tag"),
    does: "remove a breakpoint by tag",
    more: "",
    words: (1, Some(1)),
    needs: Needs::Disk,
    run: |session, _, words| {
        session.fail(&format!("Could not remove breakpoint {}: Operation not supported", words[1]))
    },
};

static RESUME: Command = Command {
    name: "resume",
    short: None,
    takes: Some("tag"),
    does: "resumes the request tagged as tag",
    more: "",
    words: (1, Some(1)),
    needs: Needs::Disk,
    run: |session, _, _| session.fail("Could not resume request: Operation not supported"),
};

static WAIT_BREAK: Command = Command {
    name: "wait_break",
    short: None,
    takes: Some("tag"),
    does: "waits for the suspension of a request",
    more: "",
    words: (1, Some(1)),
    needs: Needs::Disk,
    run: |session, _, _| session.fail("Could not wait for a request: Operation not supported"),
};
