//! Measures vhost-user-blk servers and the block engine: the parts of `tools/bench vhost` and `tools/bench block` that have to be
//! fast themselves. Not shipped.
//!
//! - `client`: loads any vhost-user-blk server, the same way whoever it is; `relay`: what its crate leaves out of the protocol;
//! - `in-process`: the same loads on the engine's own queues, without a socket;
//! - `load`: which requests a load makes; `drive`: keeps that many of them in flight, and counts; `clock`: processor time.
//!
//! What is compared with what, in which order and how often, is `tools/bench`'s business.

mod client;
mod clock;
mod drive;
mod in_process;
mod load;
mod memory;
mod relay;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Measures cowhand's block engine, and whatever else serves vhost-user-blk.
#[derive(Parser)]
#[command(name = "cowhand-bench", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Client(client::Args),
    InProcess(in_process::Args),
}

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).with_target(false).init();
    let result = match Cli::parse().command {
        Command::Client(args) => client::run(&args),
        Command::InProcess(args) => in_process::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cowhand-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
