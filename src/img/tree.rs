//! What is told of an image, as a tree: shown to people or written as JSON, both in the form and order of qemu-img, which scripts (and
//! people's eyes) know. The order of a map's entries is that of QEMU's hash table; whoever makes a map gives them in it.

use super::{Context, Failure};

/// A value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Tree {
    Number(u64),
    Text(String),
    Flag(bool),
    List(Vec<Tree>),
    Map(Vec<(&'static str, Tree)>),
}

impl From<u64> for Tree {
    fn from(value: u64) -> Self {
        Self::Number(value)
    }
}

impl From<bool> for Tree {
    fn from(value: bool) -> Self {
        Self::Flag(value)
    }
}

impl From<&str> for Tree {
    fn from(value: &str) -> Self {
        Self::Text(value.into())
    }
}

impl From<String> for Tree {
    fn from(value: String) -> Self {
        Self::Text(value)
    }
}

/// Whether a subcommand's `--output` asks for JSON.
pub(crate) fn is_json(output: Option<&str>, subcommand: &str, cx: &Context) -> Result<bool, Failure> {
    match output {
        None | Some("human") => Ok(false),
        Some("json") => Ok(true),
        Some(other) => Err(cx.usage(subcommand, &format!("--output expects 'human' or 'json' not '{other}'"))),
    }
}

impl Tree {
    /// As JSON, indented by four, without a newline at the end.
    pub(crate) fn json(&self) -> String {
        let mut out = String::new();
        self.write_json(&mut out, 0);
        out
    }

    fn write_json(&self, out: &mut String, indent: usize) {
        let inner = "    ".repeat(indent + 1);
        match self {
            Self::Number(value) => out.push_str(&value.to_string()),
            Self::Text(text) => quote(out, text),
            Self::Flag(value) => out.push_str(if *value { "true" } else { "false" }),
            Self::List(list) => {
                out.push('[');
                for (index, value) in list.iter().enumerate() {
                    out.push_str(if index > 0 { ",\n" } else { "\n" });
                    out.push_str(&inner);
                    value.write_json(out, indent + 1);
                }
                out.push('\n');
                out.push_str(&inner[4..]);
                out.push(']');
            }
            Self::Map(map) => {
                out.push('{');
                for (index, (key, value)) in map.iter().enumerate() {
                    out.push_str(if index > 0 { ",\n" } else { "\n" });
                    out.push_str(&inner);
                    quote(out, key);
                    out.push_str(": ");
                    value.write_json(out, indent + 1);
                }
                out.push('\n');
                out.push_str(&inner[4..]);
                out.push('}');
            }
        }
    }

    /// For people: a line to a value, indented by four for each level, from `indent` on.
    pub(crate) fn human(&self, indent: usize) -> String {
        let mut out = String::new();
        self.write_human(&mut out, indent);
        out
    }

    fn write_human(&self, out: &mut String, indent: usize) {
        match self {
            Self::Number(value) => out.push_str(&value.to_string()),
            Self::Text(text) => out.push_str(text),
            Self::Flag(value) => out.push_str(if *value { "true" } else { "false" }),
            Self::List(list) => {
                for (index, value) in list.iter().enumerate() {
                    value.write_entry(out, indent, &format!("[{index}]"));
                }
            }
            Self::Map(map) => {
                for (key, value) in map {
                    value.write_entry(out, indent, &key.replace('-', " "));
                }
            }
        }
    }

    fn write_entry(&self, out: &mut String, indent: usize, name: &str) {
        let composite = matches!(self, Self::List(_) | Self::Map(_));
        out.push_str(&format!("{}{name}:{}", "    ".repeat(indent), if composite { '\n' } else { ' ' }));
        self.write_human(out, indent + 1);
        if !composite {
            out.push('\n');
        }
    }
}

/// A JSON string: beyond ASCII everything is escaped.
fn quote(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            ' '..='~' => out.push(c),
            _ => {
                let mut units = [0; 2];
                for unit in c.encode_utf16(&mut units) {
                    out.push_str(&format!("\\u{unit:04X}"));
                }
            }
        }
    }
    out.push('"');
}

#[cfg(test)]
#[path = "tree_test.rs"]
mod tests;
