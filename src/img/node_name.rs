//! The name that is shown of an image that node options describe: its file's, if that is all there is to it, and otherwise `json:` with
//! what somebody would have to say to open the same disk.

use cowhand_block::options::NodeOptions;

/// Options that say what the disk is, and not how it is used.
const TELLING: [&str; 11] = [
    "offset",
    "size",
    "read-zeroes",
    "latency-ns",
    "config",
    "align",
    "max-transfer",
    "opt-write-zero",
    "max-write-zero",
    "opt-discard",
    "max-discard",
];

/// The beginnings of others.
const BEGINNINGS: [&str; 3] = ["encrypt.", "inject-error.", "set-state."];

/// The children of a node, by which others lie below it.
const CHILDREN: [&str; 2] = ["file", "image"];

/// The name of what `options` describe, a disk of the driver `driver` in the file `path`.
pub(super) fn shown(options: &NodeOptions, driver: &str, path: &str) -> String {
    let whole: Vec<_> = options.beginning_with("").collect();
    if is_file_alone(&whole) {
        return path.to_string();
    }
    format!("json:{}", node(&whole, Some(driver)))
}

fn is_telling(key: &str) -> bool {
    TELLING.contains(&key) || BEGINNINGS.iter().any(|start| key.starts_with(start))
}

/// What stands below a node's child.
fn below<'a>(options: &[(&'a str, &'a str)], child: &str) -> Vec<(&'a str, &'a str)> {
    let key = |key: &'a str| key.strip_prefix(child).and_then(|rest| rest.strip_prefix('.'));
    options.iter().filter_map(|(name, value)| Some((key(name)?, *value))).collect()
}

fn value<'a>(options: &[(&'a str, &'a str)], key: &str) -> Option<&'a str> {
    options.iter().find(|(name, _)| *name == key).map(|(_, value)| *value)
}

/// Whether the name of a file says all: there is nothing but a format over it.
fn is_file_alone(options: &[(&str, &str)]) -> bool {
    let file = below(options, "file");
    let is_plain =
        |driver: Option<&str>| matches!(driver, None | Some("file" | "host_device" | "host_cdrom" | "null-co"));
    let tells_nothing = |options: &[(&str, &str)]| !options.iter().any(|(key, _)| is_telling(key));
    let is_leaf = CHILDREN.iter().all(|child| below(&file, child).is_empty());
    tells_nothing(options)
        && below(options, "image").is_empty()
        && tells_nothing(&file)
        && is_leaf
        && is_plain(value(&file, "driver"))
}

/// A node as JSON: what is told of it, its driver, its name or what lies below it.
fn node(options: &[(&str, &str)], driver: Option<&str>) -> String {
    let text = |text: &str| serde_json::Value::from(text).to_string();
    let mut parts: Vec<String> = Vec::new();
    let told = options.iter().filter(|(key, _)| is_telling(key));
    parts.extend(told.map(|(key, value)| format!("{}: {}", text(key), text(value))));
    let mut children: Vec<_> = CHILDREN.into_iter().map(|child| (child, below(options, child))).collect();
    children.retain(|(_, below)| !below.is_empty());
    let name = value(options, "filename");
    let said = value(options, "driver").or(driver);
    let is_file = matches!(said, None | Some("file" | "host_device" | "host_cdrom"));
    parts.push(format!("\"driver\": {}", text(said.unwrap_or("file"))));
    match name {
        Some(name) if is_file => parts.push(format!("\"filename\": {}", text(name))),
        // The name of the file below a format may stand with the format.
        Some(name) => parts.push(format!("\"file\": {}", node(&[("filename", name)], None))),
        None => {}
    }
    parts.extend(children.into_iter().map(|(child, below)| format!("{}: {}", text(child), node(&below, None))));
    format!("{{{}}}", parts.join(", "))
}

#[cfg(test)]
#[path = "node_name_test.rs"]
mod tests;
