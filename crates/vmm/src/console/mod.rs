//! The guest's console on the host: where its output goes, where its input comes from, and what is heard in it.
//!
//! Not here: the 16550 that the guest sees ([`crate::devices::serial`]) and the event loop that feeds it.

pub mod input;
pub mod output;
pub mod panic_line;
pub mod terminal;

use std::path::PathBuf;
use std::str::FromStr;

/// What the guest's serial port is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialConfig {
    /// Standard input and output; a terminal is put into raw mode.
    Stdio,
    /// Output to a file, made or overwritten; no input.
    File(PathBuf),
    /// Output to nowhere; no input.
    Null,
}

impl FromStr for SerialConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "null" => Ok(Self::Null),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err("expected stdio, null or file:PATH".into()),
        }
    }
}

#[cfg(test)]
#[path = "console_test.rs"]
mod tests;
