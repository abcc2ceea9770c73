//! The `cowhand` program: the command line, one file for each subcommand.

fn main() {}
