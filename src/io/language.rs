//! The words of a command line, and the options among them, as `getopt` takes them.
//!
//! Not here: what any of them mean.

use std::collections::VecDeque;

/// The words of a line: what stands between spaces.
pub(crate) fn words(line: &str) -> Vec<String> {
    line.split(' ').filter(|word| !word.is_empty()).map(str::to_string).collect()
}

/// The options of a command's words, one after the other; what is no option is kept for later.
pub(crate) struct Options<'a> {
    /// As the command was called.
    command: &'a str,
    /// Option letters; one with an argument is followed by a colon.
    known: &'a str,
    words: VecDeque<&'a str>,
    /// What is left of a word of several letters.
    letters: &'a str,
    operands: Vec<&'a str>,
}

/// An option: its letter, and its argument (empty for one that takes none).
pub(crate) type Opt<'a> = (char, &'a str);

impl<'a> Options<'a> {
    /// Of `words`, of which the first is the command.
    pub(crate) fn new(words: &'a [String], known: &'a str) -> Self {
        let mut words: VecDeque<&str> = words.iter().map(String::as_str).collect();
        let command = words.pop_front().unwrap_or("");
        Self { command, known, words, letters: "", operands: Vec::new() }
    }

    /// The next option; at the end none.
    ///
    /// # Errors
    /// Says which letter is no option, or lacks its argument.
    pub(crate) fn next(&mut self) -> Result<Option<Opt<'a>>, String> {
        while self.letters.is_empty() {
            match self.words.pop_front() {
                None => return Ok(None),
                Some("--") => {
                    self.operands.extend(self.words.drain(..));
                    return Ok(None);
                }
                Some(word) => match word.strip_prefix('-') {
                    Some(letters) if !letters.is_empty() => self.letters = letters,
                    _ => self.operands.push(word),
                },
            }
        }
        let mut letters = self.letters.chars();
        let letter = letters.next().unwrap_or('?');
        self.letters = letters.as_str();
        let place = self.known.find(letter).filter(|_| letter != ':');
        let Some(place) = place else {
            return Err(format!("{}: invalid option -- '{letter}'", self.command));
        };
        if self.known.as_bytes().get(place + 1) != Some(&b':') {
            return Ok(Some((letter, "")));
        }
        if !self.letters.is_empty() {
            return Ok(Some((letter, std::mem::take(&mut self.letters))));
        }
        match self.words.pop_front() {
            Some(argument) => Ok(Some((letter, argument))),
            None => Err(format!("{}: option requires an argument -- '{letter}'", self.command)),
        }
    }

    /// What was no option, in its order. To be asked for after the last option.
    pub(crate) fn operands(self) -> Vec<&'a str> {
        self.operands
    }
}

#[cfg(test)]
#[path = "language_test.rs"]
mod tests;
