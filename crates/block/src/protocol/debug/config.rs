//! Rules in a file: groups in brackets, and lines of `key = "value"`.

use super::rules::Rule;

/// Reads the rules.
///
/// # Errors
/// What is wrong with which line.
pub(super) fn parse(text: &str) -> Result<Vec<Rule>, String> {
    let mut groups: Vec<(&str, Vec<(&str, &str)>)> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            if !["inject-error", "set-state"].contains(&name) {
                return Err(format!("There is no option group '{name}'"));
            }
            groups.push((name, Vec::new()));
            continue;
        }
        let Some((_, options)) = groups.last_mut() else { return Err("no group defined".into()) };
        let parsed = line.split_once('=').and_then(|(key, value)| {
            let value = value.trim().strip_prefix('"')?.strip_suffix('"')?;
            Some((key.trim(), value))
        });
        options.push(parsed.ok_or_else(|| format!("line {} is no key = \"value\"", number + 1))?);
    }
    groups.into_iter().map(|(group, options)| Rule::parse(group, options)).collect()
}
