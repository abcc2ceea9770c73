//! `cowhand img`: makes, inspects, checks, repairs, converts and edits images, on the command line of `qemu-img`.
//!
//! One file for each subcommand, thin: what is done to images is done in `cowhand_block`. What they share: [`context`] (messages,
//! opening), [`options`] (`-o`), [`units`] (sizes as they are written and shown), [`secrets`] (`--object`).
//!
//! Called as `qemu-img` it is that: formats are probed and references followed, as its users' scripts expect. As `cowhand img` it
//! does neither, and names the option that allows it.

mod amend;
mod arguments;
mod bench;
mod bitmap;
mod check;
mod commit;
mod compare;
pub(crate) mod context;
mod convert;
mod create;
mod create_options;
mod dd;
pub(crate) mod info;
mod luks_volume;
mod map;
mod measure;
mod node_name;
mod options;
mod pace;
mod progress;
mod rebase;
mod resize;
mod secrets;
mod snapshot;
mod snapshot_view;
pub(crate) mod snapshots;
pub(crate) mod tree;
pub(crate) mod units;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use cowhand_block::OpenPolicy;

pub(crate) use self::context::{Context, Failure, How};

/// The version of the command line that this one is: what scripts ask for.
const VERSION: &str = concat!("version 10.0.2 (cowhand ", env!("CARGO_PKG_VERSION"), ")");

/// As whom the tool was called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Name {
    /// `cowhand img`.
    Cowhand,
    /// `qemu-img`.
    Qemu,
}

impl Name {
    const fn text(self) -> &'static str {
        match self {
            Self::Cowhand => "cowhand img",
            Self::Qemu => "qemu-img",
        }
    }
}

/// Makes, inspects, checks, repairs, converts and edits disk images (the command line of qemu-img)
#[derive(Parser)]
#[command(disable_version_flag = true, subcommand_required = true, arg_required_else_help = true)]
struct Cli {
    /// Guess the format of an image from its content where it is not given; whoever can write the image (its guest) then
    /// decides how it is read
    #[arg(long, global = true)]
    probe: bool,
    /// Files that images refer to (backing files, data files) may be opened below this directory; may be repeated. Without
    /// it, each image may refer to files below its own directory
    #[arg(long, global = true, value_name = "DIR")]
    allow_dir: Vec<PathBuf>,
    /// Show the version
    #[arg(short = 'V', long, action = clap::ArgAction::Version)]
    version: Option<bool>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Amend(amend::Args),
    Bench(bench::Args),
    Bitmap(bitmap::Args),
    Check(check::Args),
    Commit(commit::Args),
    Compare(compare::Args),
    Convert(Box<convert::Args>),
    Create(create::Args),
    Dd(dd::Args),
    Info(info::Args),
    Map(map::Args),
    Measure(measure::Args),
    Rebase(rebase::Args),
    Resize(resize::Args),
    Snapshot(snapshot::Args),
}

/// Runs the tool with `words`, the program's own name among them first; gives the exit status.
pub(crate) fn main(words: Vec<OsString>, name: Name) -> ExitCode {
    let command = Cli::command().name(name.text()).bin_name(name.text()).version(VERSION);
    // Of an option that is given twice the last one counts.
    let command = command.mut_subcommands(|subcommand| subcommand.args_override_self(true));
    let subcommands: Vec<String> = command.get_subcommands().map(|c| c.get_name().to_string()).collect();
    let subcommand =
        words.iter().skip(1).find_map(|word| subcommands.iter().find(|name| word == name.as_str())).cloned();
    let parsed = command.try_get_matches_from(words).and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(error) => return usage(&error, name, subcommand.as_deref()),
    };
    // As qemu-img it opens what images name, wherever that lies, since that is what its callers rely on.
    let (probe, allow_dirs) = match name {
        Name::Qemu if cli.allow_dir.is_empty() => (true, vec![PathBuf::from("/")]),
        Name::Qemu => (true, cli.allow_dir),
        Name::Cowhand => (cli.probe, cli.allow_dir),
    };
    let policy = OpenPolicy { allow_dirs, probe, ..OpenPolicy::host() };
    let cx = Context::new(name.text(), policy);
    let result = match cli.command {
        Command::Amend(args) => amend::run(&args, &cx),
        Command::Bench(args) => bench::run(&args, &cx),
        Command::Bitmap(args) => bitmap::run(&args, &cx),
        Command::Check(args) => check::run(&args, &cx),
        Command::Commit(args) => commit::run(&args, &cx),
        Command::Compare(args) => compare::run(&args, &cx),
        Command::Convert(args) => convert::run(&args, &cx),
        Command::Create(args) => create::run(&args, &cx),
        Command::Dd(args) => dd::run(&args, &cx),
        Command::Info(args) => info::run(&args, &cx),
        Command::Map(args) => map::run(&args, &cx),
        Command::Measure(args) => measure::run(&args, &cx),
        Command::Rebase(args) => rebase::run(&args, &cx),
        Command::Resize(args) => resize::run(&args, &cx),
        Command::Snapshot(args) => snapshot::run(&args, &cx),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            failure.say(&cx);
            ExitCode::from(failure.status)
        }
    }
}

/// Says in one line what is wrong with the arguments, or shows the help that was asked for.
fn usage(error: &clap::Error, name: Name, subcommand: Option<&str>) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // A closed pipe is no failure of the help.
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        // A person is helped; QEMU's callers get its words.
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand if name == Name::Cowhand => {
            let _ = error.print();
            return ExitCode::FAILURE;
        }
        _ => {}
    }
    let name = name.text();
    let invalid = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(word)) if error.kind() == ErrorKind::UnknownArgument => Some(word.as_str()),
        _ => None,
    };
    // In the words that callers of the old tool know.
    match (invalid, subcommand) {
        (Some(word), Some(subcommand)) if word.starts_with("--") => {
            eprintln!("{name} {subcommand}: unrecognized option '{word}'");
        }
        (Some(word), Some(subcommand)) if word.starts_with('-') => {
            eprintln!("{name} {subcommand}: invalid option -- '{}'", word.trim_start_matches('-'));
        }
        (Some(word), _) => eprintln!("{name}: Unexpected argument: {word}"),
        (None, _) if error.kind() == ErrorKind::InvalidSubcommand => {
            let word = error.get(ContextKind::InvalidSubcommand).map(ToString::to_string);
            eprintln!("{name}: Command not found: {}", word.unwrap_or_default());
        }
        (None, None) if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            eprintln!("{name}: Not enough arguments");
        }
        (None, _) => {
            let text = error.to_string();
            let lines: Vec<_> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
            eprintln!("{name}: {}", lines.join(" ").trim_start_matches("error: "));
        }
    }
    match subcommand {
        Some(subcommand) => eprintln!("Try '{name} {subcommand} --help' for more info"),
        None => eprintln!("Try '{name} --help' for more info"),
    }
    ExitCode::FAILURE
}

/// Whether progress is shown: it was asked for (`-p`), or somebody is looking.
pub(crate) fn shows_progress(asked: bool, quiet: bool) -> bool {
    !quiet && (asked || std::io::stdout().is_terminal())
}
