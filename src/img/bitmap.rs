//! `bitmap`: an image's persistent bitmaps, made, changed and removed.

use std::sync::Arc;

use clap::{Arg, ArgAction, ArgMatches, Command, FromArgMatches, Parser, value_parser};
use cowhand_block::{Backing, Disk, DiskSpec, Error, Format};

use super::arguments::ImageArgs;
use super::context::reason;
use super::units::parse_size;
use super::{Context, Failure, How};

/// Makes, changes and removes a bitmap of an image; of several actions each is done in its turn
#[derive(Parser)]
#[command(after_help = "\
Example:
  cowhand img bitmap -f qcow2 --add -g 64K disk.qcow2 backup-monday")]
pub(super) struct Args {
    #[command(flatten)]
    image: ImageArgs,
    #[command(flatten)]
    actions: Actions,
    /// How many bytes of the disk a bit of the new bitmap stands for
    #[arg(short, long, value_name = "BYTES")]
    granularity: Option<String>,
    /// The image that has the bitmaps of --merge, if it is another one
    #[arg(short = 'b', long, value_name = "FILE")]
    source_file: Option<String>,
    /// Its format
    #[arg(short = 'F', long, value_name = "FORMAT")]
    source_format: Option<String>,
    /// The image and the bitmap
    #[arg(value_name = "FILE BITMAP")]
    names: Vec<String>,
}

/// What is to be done with the bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    Add,
    Remove,
    Clear,
    Enable,
    Disable,
    /// What that bitmap has set is set.
    Merge(String),
}

impl Action {
    const fn name(&self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Remove => "remove",
            Self::Clear => "clear",
            Self::Enable => "enable",
            Self::Disable => "disable",
            Self::Merge(_) => "merge",
        }
    }
}

/// Those that are given as mere words, with what the help says.
const PLAIN: [(Action, &str); 5] = [
    (Action::Add, "Adds the bitmap"),
    (Action::Remove, "Removes the bitmap"),
    (Action::Clear, "Clears all its bits"),
    (Action::Enable, "Has writes set its bits"),
    (Action::Disable, "Leaves it as it is; with --add it begins so"),
];

/// The actions in the order in which they were given.
struct Actions(Vec<Action>);

impl clap::Args for Actions {
    fn augment_args(command: Command) -> Command {
        let command = PLAIN.iter().fold(command, |command, (action, help)| {
            let name = action.name();
            // As often as one likes, each with its place.
            let arg = Arg::new(name).long(name).help(*help).action(ArgAction::Append).num_args(0);
            command.arg(arg.default_missing_value("true").value_parser(value_parser!(bool)))
        });
        let help = "Sets in it what another bitmap has set; may be repeated";
        command.arg(Arg::new("merge").long("merge").value_name("BITMAP").help(help).action(ArgAction::Append))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Actions {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut placed = Vec::new();
        for (action, _) in &PLAIN {
            placed.extend(matches.indices_of(action.name()).into_iter().flatten().map(|at| (at, action.clone())));
        }
        let merged = matches.get_many::<String>("merge").into_iter().flatten();
        let places = matches.indices_of("merge").into_iter().flatten();
        placed.extend(places.zip(merged).map(|(at, name)| (at, Action::Merge(name.clone()))));
        placed.sort_by_key(|(at, _)| *at);
        Ok(Self(placed.into_iter().map(|(_, action)| action).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

pub(super) fn run(args: &Args, cx: &Context) -> Result<u8, Failure> {
    let refuse = |message: &str| Err(Failure::new(message));
    let actions = &args.actions.0;
    let granularity = args
        .granularity
        .as_deref()
        .map(|text| parse_size(text, 1).map_err(|_| Failure::new(format!("Invalid granularity specified: '{text}'."))));
    let granularity = granularity.transpose()?;
    if actions.is_empty() {
        return refuse("Need at least one of --add, --remove, --clear, --enable, --disable, or --merge");
    }
    let [file, name] = args.names.as_slice() else { return refuse("Expecting filename and bitmap name") };
    if granularity.is_some() && !actions.contains(&Action::Add) {
        return refuse("granularity only supported with --add");
    }
    if args.source_format.is_some() && args.source_file.is_none() {
        return refuse("-F only supported with -b");
    }
    if args.source_file.is_some() && !actions.iter().any(|action| matches!(action, Action::Merge(_))) {
        return refuse("Merge bitmap source file only supported with --merge");
    }
    cx.take_objects(&args.image.object)?;
    // A bitmap is of the image alone: the one that it is merged into may well be the other's backing file.
    let alone = How { backing: Backing::Alone, ..How::default() };
    let how = How { write: true, backing: Backing::Alone, ..args.image.how() };
    let spec = cx.spec(file, &how)?;
    let disk = cx.open_spec(file, &spec)?;
    let source = args.source_file.as_deref().map(|source| {
        let how = How { format: args.source_format.as_deref(), ..alone };
        cx.open(source, &how)
    });
    let source = source.transpose()?;
    for (at, action) in actions.iter().enumerate() {
        // Added and then disabled, it is never enabled.
        let enabled = !actions[at + 1..].contains(&Action::Disable);
        let done = act(&disk, name, action, (granularity, enabled), source.as_ref());
        done.map_err(|e| said(action, name, &e, &spec))?;
    }
    disk.close().map_err(|e| Failure::new(reason(&e, &spec)))?;
    Ok(0)
}

fn act(
    disk: &Arc<Disk>,
    name: &str,
    action: &Action,
    (granularity, enabled): (Option<u64>, bool),
    source: Option<&Arc<Disk>>,
) -> cowhand_block::Result<()> {
    match action {
        Action::Add => disk.create_bitmap(name, granularity, enabled),
        Action::Remove => disk.remove_bitmap(name),
        Action::Clear => disk.clear_bitmap(name),
        Action::Enable => disk.enable_bitmap(name),
        Action::Disable => disk.disable_bitmap(name),
        Action::Merge(from) => match source {
            None => disk.merge_bitmap(name, from),
            Some(source) => disk.merge_bitmap_of(name, source, from),
        },
    }
}

fn said(action: &Action, name: &str, error: &Error, spec: &DiskSpec) -> Failure {
    let mut what = if spec.format == Format::Raw {
        format!("Can't store persistent bitmaps to {}: Operation not supported", spec.path.display())
    } else if matches!(action, Action::Merge(_)) {
        // It may be about the other image.
        error.reason()
    } else {
        reason(error, spec)
    };
    if what.ends_with("is inconsistent and cannot be used") {
        what.push_str("\nTry block-dirty-bitmap-remove to delete this bitmap from disk");
    }
    Failure::new(format!("Operation {} on bitmap {name} failed: {what}", action.name()))
}
