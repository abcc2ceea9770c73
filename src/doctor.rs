//! `cowhand doctor`: says what this host can do, and why not.

use clap::Parser;
use cowhand_vmm::host;

use crate::Failure;

/// Says what this host can do, and what is missing
#[derive(Parser)]
#[command(after_help = "Example:\n  cowhand doctor")]
pub(crate) struct Args {}

/// Looks at everything; the status is 0 when machines can be run here.
pub(crate) fn run(_args: &Args) -> Result<u8, Failure> {
    let report = host::kvm_report()?;
    println!("{report:?}");
    Ok(0)
}
