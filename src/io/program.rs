//! The program's own arguments, as `getopt_long` takes them.

use std::ffi::OsString;
use std::path::PathBuf;

use super::open::Settings;

/// What the program is to do.
pub(crate) struct Arguments {
    pub(crate) settings: Settings,
    pub(crate) image_opts: bool,
    pub(crate) misalign: bool,
    pub(crate) probe: bool,
    pub(crate) allow_dirs: Vec<PathBuf>,
    pub(crate) objects: Vec<String>,
    /// Those of `-c`.
    pub(crate) commands: Vec<String>,
    pub(crate) file: Option<String>,
}

/// What was asked for.
pub(crate) enum Asked {
    Run(Box<Arguments>),
    /// The help or the version.
    Show(String),
}

/// What is said of wrong arguments.
pub(crate) struct Wrong {
    /// What is wrong, in lines.
    pub(crate) error: String,
    /// How it is used, if that helps.
    pub(crate) usage: String,
}

/// An option: its letter, its long name, and whether it takes an argument. Those without a letter have their own.
const OPTIONS: [(char, &str, bool); 19] = [
    ('h', "help", false),
    ('V', "version", false),
    ('c', "cmd", true),
    ('f', "format", true),
    ('r', "read-only", false),
    ('s', "snapshot", false),
    ('n', "nocache", false),
    ('C', "copy-on-read", false),
    ('m', "misalign", false),
    ('k', "native-aio", false),
    ('i', "aio", true),
    ('t', "cache", true),
    ('d', "discard", true),
    ('T', "trace", true),
    ('U', "force-share", false),
    ('\u{1}', "object", true),
    ('\u{2}', "image-opts", false),
    ('\u{3}', "probe", false),
    ('\u{4}', "allow-dir", true),
];

/// The version of the command language that this one is: what scripts ask for.
const VERSION: &str = concat!("version 10.0.2 (cowhand ", env!("CARGO_PKG_VERSION"), ")");

fn usage(program: &str) -> String {
    format!(
        "Usage: {program} [OPTIONS]... [-c STRING]... [file]
Reads and writes a disk image, command by command, in the language of qemu-io

  -c, --cmd STRING     run this command; may be repeated. Without it commands
                       are read from standard input
  -f, --format FMT     the image's format: qcow2 or raw
  -r, --read-only      open it for reading only
  -s, --snapshot       write to an overlay that is thrown away
  -n, --nocache        past the host's page cache (-t none)
  -C, --copy-on-read   copy what is read from backing files into the image
  -m, --misalign       memory of requests does not begin at a block's boundary
  -k, --native-aio     as -i native
  -i, --aio=MODE       which I/O queue: threads, native or io_uring
  -t, --cache=MODE     none, writeback, writethrough, directsync or unsafe
  -d, --discard=MODE   whether discards reach the image: ignore or unmap
  -U, --force-share    open it without locks (needs -r)
      --image-opts     the file is a list of options (driver=qcow2,...)
      --object OBJECT  a secret: secret,id=ID,file=PATH
      --probe          guess the format where it is not given; whoever can
                       write the image then decides how it is read
      --allow-dir DIR  files that images refer to may be opened below DIR;
                       may be repeated (their own directory if not given)
  -h, --help           show this help
  -V, --version        show the version

See '{program} -c help' for the commands.

Example:
  {program} -f qcow2 -c 'write -P 0x5a 0 64k' -c 'read -v 0 32' disk.qcow2
"
    )
}

/// One argument after the other.
struct Words {
    words: std::vec::IntoIter<String>,
    /// What is left of a word of several letters.
    letters: Vec<char>,
    operands: Vec<String>,
}

impl Words {
    /// The next option and its argument.
    fn next(&mut self) -> Result<Option<(char, String)>, String> {
        while self.letters.is_empty() {
            let Some(word) = self.words.next() else { return Ok(None) };
            if word == "--" {
                self.operands.extend(self.words.by_ref());
            } else if let Some(long) = word.strip_prefix("--") {
                return self.long(long).map(Some);
            } else if word.len() > 1 && word.starts_with('-') {
                self.letters = word.chars().skip(1).collect();
            } else {
                self.operands.push(word);
            }
        }
        let letter = self.letters.remove(0);
        let Some((_, _, takes)) = OPTIONS.iter().find(|(known, ..)| *known == letter && *known > ' ') else {
            return Err(format!("invalid option -- '{letter}'"));
        };
        if !takes {
            return Ok(Some((letter, String::new())));
        }
        let rest: String = self.letters.drain(..).collect();
        let argument = if rest.is_empty() { self.words.next() } else { Some(rest) };
        argument.map(|argument| Some((letter, argument))).ok_or(format!("option requires an argument -- '{letter}'"))
    }

    fn long(&mut self, word: &str) -> Result<(char, String), String> {
        let (name, value) = word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value)));
        let exact = OPTIONS.iter().find(|(_, known, _)| *known == name);
        let mut alike = OPTIONS.iter().filter(|(_, known, _)| known.starts_with(name));
        let found = match (exact, alike.next(), alike.next()) {
            (Some(found), ..) | (None, Some(found), None) => found,
            (None, None, _) => return Err(format!("unrecognized option '--{name}'")),
            (None, Some(_), Some(_)) => return Err(format!("option '--{name}' is ambiguous")),
        };
        let (letter, name, takes) = *found;
        match (takes, value) {
            (false, Some(_)) => Err(format!("option '--{name}' doesn't allow an argument")),
            (false, None) => Ok((letter, String::new())),
            (true, Some(value)) => Ok((letter, value.into())),
            (true, None) => {
                let argument = self.words.next();
                argument.map(|argument| (letter, argument)).ok_or(format!("option '--{name}' requires an argument"))
            }
        }
    }
}

impl Arguments {
    /// Reads the words after the program's name.
    ///
    /// # Errors
    /// What is wrong with them.
    pub(crate) fn parse(words: Vec<OsString>, program: &str) -> Result<Asked, Wrong> {
        let plain = |error: String| Wrong { error: format!("{program}: {error}\n"), usage: String::new() };
        let mut texts = Vec::with_capacity(words.len());
        for word in words {
            texts.push(word.into_string().map_err(|word| plain(format!("'{}' is no text", word.display())))?);
        }
        let mut words = Words { words: texts.into_iter(), letters: Vec::new(), operands: Vec::new() };
        let mut arguments = Self {
            settings: Settings::default(),
            image_opts: false,
            misalign: false,
            probe: false,
            allow_dirs: Vec::new(),
            objects: Vec::new(),
            commands: Vec::new(),
            file: None,
        };
        loop {
            let misused = |error| Wrong { usage: usage(program), ..plain(error) };
            let Some((letter, argument)) = words.next().map_err(misused)? else { break };
            match letter {
                'h' => return Ok(Asked::Show(usage(program))),
                'V' => return Ok(Asked::Show(format!("{program} {VERSION}\n"))),
                'c' => arguments.commands.push(argument),
                'f' => arguments.settings.format = Some(argument),
                'm' => arguments.misalign = true,
                'T' => return Err(plain("there are no trace events; see --log-level of cowhand".into())),
                '\u{1}' => arguments.objects.push(argument),
                '\u{2}' => arguments.image_opts = true,
                '\u{3}' => arguments.probe = true,
                '\u{4}' => arguments.allow_dirs.push(argument.into()),
                letter => {
                    // All that is left is how the file is opened.
                    arguments.settings.take(letter, &argument).map_err(plain)?;
                }
            }
        }
        let mut operands = words.operands.into_iter();
        arguments.file = operands.next();
        if operands.next().is_some() {
            return Err(Wrong { error: String::new(), usage: usage(program) });
        }
        if arguments.image_opts && arguments.settings.format.is_some() {
            return Err(plain("--image-opts and -f are mutually exclusive".into()));
        }
        Ok(Asked::Run(Box::new(arguments)))
    }
}

#[cfg(test)]
#[path = "program_test.rs"]
mod tests;
