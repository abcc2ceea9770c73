//! The `cowhand` program: the command line, one file for each subcommand.

mod api;
mod ctl;
mod disks;
mod doctor;
mod img;
mod io;
mod quantity;
mod run;
mod vhost_user_blk;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use tracing::level_filters::LevelFilter;

/// Bad arguments.
const EXIT_USAGE: u8 = 2;
/// Something failed.
const EXIT_FAILURE: u8 = 1;

/// Runs virtual machines from QCOW2 images.
#[derive(Parser)]
#[command(name = "cowhand", version, subcommand_required = true, arg_required_else_help = true)]
struct Cli {
    /// What is logged to standard error: off, error, warn, info, debug or trace
    #[arg(long, global = true, default_value = "warn", value_name = "LEVEL")]
    log_level: LevelFilter,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(run::Args),
    /// Makes, inspects, checks, repairs, converts and edits disk images (the command line of qemu-img)
    #[command(disable_help_flag = true)]
    Img(Rest),
    /// Reads and writes a disk image, command by command (the language of qemu-io)
    #[command(disable_help_flag = true)]
    Io(Rest),
    VhostUserBlk(vhost_user_blk::Args),
    Ctl(ctl::Args),
    Doctor(doctor::Args),
}

/// Words that another command line takes.
#[derive(clap::Args)]
struct Rest {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    words: Vec<OsString>,
}

/// Who the program was called as.
fn called_as() -> Option<OsString> {
    let name = std::env::args_os().next()?;
    Path::new(&name).file_name().map(OsString::from)
}

fn main() -> ExitCode {
    if called_as().is_some_and(|name| name == "qemu-img") {
        return img::main(std::env::args_os().collect(), img::Name::Qemu);
    }
    if called_as().is_some_and(|name| name == "qemu-io") {
        return io::main(std::env::args_os().skip(1).collect(), io::Name::Qemu);
    }
    let words = std::env::args_os().skip(1);
    // A back-end has to be a program of its own for whoever finds it by its description (resources/vhost-user).
    let command = called_as().filter(|name| name == "cowhand-vhost-user-blk").map(|_| "vhost-user-blk".into());
    let cli = match Cli::try_parse_from(std::iter::once("cowhand".into()).chain(command).chain(words)) {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    if cli.log_level != LevelFilter::OFF {
        tracing_subscriber::fmt()
            .with_max_level(cli.log_level)
            .with_writer(std::io::stderr)
            .with_ansi(std::io::stderr().is_terminal())
            .with_target(false)
            .init();
    }
    let result = match cli.command {
        Command::Img(rest) => {
            let words = std::iter::once("img".into()).chain(rest.words).collect();
            return img::main(words, img::Name::Cowhand);
        }
        Command::Io(rest) => return io::main(rest.words, io::Name::Cowhand),
        Command::Run(args) => run::run(&args),
        Command::VhostUserBlk(args) => vhost_user_blk::run(&args),
        Command::Ctl(args) => ctl::run(&args),
        Command::Doctor(args) => doctor::run(&args),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            eprintln!("cowhand: {}", failure.message);
            ExitCode::from(failure.status)
        }
    }
}

/// Why a command ends without having done its work.
pub(crate) struct Failure {
    /// One line.
    pub(crate) message: String,
    /// The exit status.
    pub(crate) status: u8,
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { message: error.to_string(), status: EXIT_FAILURE }
    }
}

/// Says in one line what is wrong with the arguments, or shows the help that was asked for.
fn usage(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // A closed pipe is no failure of the help.
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            return ExitCode::from(EXIT_USAGE);
        }
        _ => {}
    }
    let text = error.to_string();
    let lines: Vec<_> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
    let line = lines.join(" ");
    eprintln!("cowhand: {}; see `cowhand --help`", line.trim_start_matches("error: "));
    ExitCode::from(EXIT_USAGE)
}
