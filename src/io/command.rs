//! The commands: their names and what they take, and how a line becomes one that is run.

use super::language::words;
use super::session::{Failed, Outcome, Session};
use super::{aio, files, misc, read_write, status, zones};

/// A command.
pub(crate) struct Command {
    pub(crate) name: &'static str,
    /// A second name.
    pub(crate) short: Option<&'static str>,
    /// What it takes, if anything.
    pub(crate) takes: Option<&'static str>,
    /// What it does, in a line.
    pub(crate) does: &'static str,
    /// More about it, for `help NAME`.
    pub(crate) more: &'static str,
    /// How many words must and may follow it.
    pub(crate) words: (usize, Option<usize>),
    pub(crate) needs: Needs,
    pub(crate) run: fn(&mut Session, &'static Command, &[String]) -> Outcome,
}

/// What a command needs to be run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Needs {
    Nothing,
    Disk,
    WritableDisk,
}

impl Command {
    fn usage(&self, name: &str) -> String {
        let takes = self.takes.map(|takes| format!("{takes} ")).unwrap_or_default();
        format!("{name} {takes}-- {}", self.does)
    }

    fn find(name: &str) -> Option<&'static Self> {
        all().find(|command| command.name == name || command.short == Some(name))
    }
}

/// All of them, by their names.
fn all() -> impl Iterator<Item = &'static Command> {
    let mut all: Vec<&Command> =
        [read_write::COMMANDS, aio::COMMANDS, status::COMMANDS, files::COMMANDS, misc::COMMANDS, zones::COMMANDS, HELP]
            .concat();
    all.sort_by_key(|command| command.name);
    all.into_iter()
}

const HELP: &[&Command] = &[&Command {
    name: "help",
    short: Some("?"),
    takes: Some("[command]"),
    does: "help for one or all commands",
    more: "",
    words: (0, Some(1)),
    needs: Needs::Nothing,
    run: help,
}];

fn help(session: &mut Session, _: &'static Command, words: &[String]) -> Outcome {
    let Some(name) = words.get(1) else {
        all().for_each(|command| session.say(&command.usage(command.name)));
        session.say("\nUse 'help commandname' for extended help.");
        return Ok(());
    };
    match Command::find(name) {
        Some(command) => {
            session.say(&command.usage(name));
            session.out.print(command.more);
            Ok(())
        }
        None => session.fail(&format!("command {name} not found")),
    }
}

impl Session {
    /// Runs a line.
    pub(crate) fn line(&mut self, line: &str) -> Outcome {
        let words = words(line);
        let Some(name) = words.first() else { return Ok(()) };
        let Some(command) = Command::find(name) else {
            eprintln!("command \"{name}\" not found");
            return Err(Failed);
        };
        if command.needs != Needs::Nothing && self.open.is_none() {
            eprintln!("no file open, try 'help open'");
            return Err(Failed);
        }
        let (given, (least, most)) = (words.len() - 1, command.words);
        if given < least || most.is_some_and(|most| given > most) {
            let expected = match most {
                None => format!("at least {least}"),
                Some(most) if most == least => least.to_string(),
                Some(most) => format!("between {least} and {most}"),
            };
            eprintln!("bad argument count {given} to {name}, expected {expected} arguments");
            return Err(Failed);
        }
        let read_only = self.open.as_ref().is_some_and(|open| open.disk.is_read_only());
        if command.needs == Needs::WritableDisk && read_only {
            return self.error("Block node is read-only");
        }
        (command.run)(self, command, &words)
    }

    /// Says how the command is used.
    pub(crate) fn misused<T>(&mut self, command: &Command) -> Outcome<T> {
        self.fail(&command.usage(command.name))
    }

    /// Says what is wrong with an option, and how the command is used.
    pub(crate) fn wrong_option<T>(&mut self, command: &Command, message: &str) -> Outcome<T> {
        eprintln!("{message}");
        self.misused(command)
    }
}
