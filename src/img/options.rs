//! `-o KEY=VALUE,…`: options by name, from one list or several. What each means is for those who take them.

use cowhand_block::spec::split_commas;

/// Options in the order in which they were given; of several with one name the last counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Options(Vec<(String, String)>);

impl Options {
    /// Takes the lists of several `-o`. A name without a value is on.
    pub(crate) fn parse(lists: &[String]) -> Result<Self, String> {
        let mut options = Vec::new();
        for list in lists {
            // QEMU joins the lists, so that what would be read across a border is refused.
            let ends = list.len() - list.trim_end_matches(',').len();
            if list.is_empty() || list.starts_with(',') || ends % 2 == 1 {
                return Err(format!("Invalid option list: {list}"));
            }
            for word in split_commas(list) {
                let (key, value) = word.split_once('=').unwrap_or((&word, "on"));
                options.push((key.to_string(), value.to_string()));
            }
        }
        Ok(Self(options))
    }

    /// Whether the list of options is asked for.
    pub(crate) fn asks_for_help(&self) -> bool {
        self.0.iter().any(|(key, value)| (key == "help" || key == "?") && value == "on")
    }

    /// The last value of an option.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().rev().find(|(k, _)| k == key).map(|(_, value)| value.as_str())
    }

    /// Sets an option that another argument has set.
    pub(crate) fn set(&mut self, key: &str, value: &str) {
        self.0.push((key.into(), value.into()));
    }

    /// All of them, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// The first one whose name is not among `known`.
    pub(crate) fn unknown(&self, known: &[&str]) -> Option<&str> {
        self.iter().map(|(key, _)| key).find(|key| !known.contains(key))
    }
}

/// An on-off option's value.
pub(crate) fn on_off(key: &str, value: &str) -> Result<bool, String> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(format!("Parameter '{key}' expects 'on' or 'off'")),
    }
}

#[cfg(test)]
#[path = "options_test.rs"]
mod tests;
