//! `check`: is an image sound? Repairs it where that is asked for.

use std::cell::RefCell;
use std::io::IsTerminal;
use std::rc::Rc;

use clap::Parser;
use cowhand_block::check::{self, CheckOptions, CheckReport, FindingKind, Message, Repair};
use cowhand_block::{Backing, Format, inspect};

use super::arguments::ImageArgs;
use super::context::{cache_mode, reason};
use super::tree::{Tree, is_json};
use super::{Context, Failure, How};

/// The image's format has nothing to check.
const EXIT_UNSUPPORTED: u8 = 63;
/// The image is corrupt.
const EXIT_CORRUPT: u8 = 2;
/// Clusters are leaked, and nothing else is wrong.
const EXIT_LEAKS: u8 = 3;

/// What is left after a repair is told behind the repairs, and so many lines of it are kept until then.
const LEFT_MAX: usize = 100_000;

/// Checks an image, and repairs it
#[derive(Parser)]
#[command(after_help = "\
Exit status: 0 the image is sound; 1 it could not be checked; 2 it is corrupt; 3 it has leaked clusters, which take \
space and do no harm; 63 its format cannot be checked.

Example:
  cowhand img check -f qcow2 -r all disk.qcow2")]
pub(super) struct Args {
    #[command(flatten)]
    image: ImageArgs,
    /// Says nothing but what is wrong
    #[arg(short)]
    quiet: bool,
    /// In which form the result is told: human or json
    #[arg(long, value_name = "FORM")]
    output: Option<String>,
    /// What is repaired: leaks (leaked clusters are freed), or all
    #[arg(short = 'r', long = "repair", value_name = "WHAT")]
    repair: Option<String>,
    /// How the host caches the image: none, writeback, unsafe, writethrough or directsync
    #[arg(short = 'T', value_name = "CACHE", default_value = "writeback")]
    cache: String,
    /// Without locks: others may use the image meanwhile
    #[arg(short = 'U', long = "force-share")]
    force_share: bool,
    /// The image
    #[arg(value_name = "IMAGE")]
    files: Vec<String>,
}

pub(super) fn run(args: &Args, cx: &Context) -> Result<u8, Failure> {
    cx.take_objects(&args.image.object)?;
    let repair = match args.repair.as_deref() {
        None => Repair::None,
        Some("leaks") => Repair::Leaks,
        Some("all") => Repair::All,
        Some(other) => {
            return Err(cx.usage("check", &format!("--repair (-r) expects 'leaks' or 'all' not '{other}'")));
        }
    };
    let json = is_json(args.output.as_deref(), "check", cx)?;
    let how = How {
        format: args.image.format.as_deref(),
        image_opts: args.image.image_opts,
        write: repair != Repair::None,
        force_share: args.force_share,
        cache: cache_mode(&args.cache, "source cache")?,
        backing: Backing::Alone,
        guess: true,
        keyless: false,
    };
    let file = cx.only(&args.files, "check")?;
    let spec = cx.spec(file, &how)?;
    if spec.format == Format::Raw {
        let opened = inspect(&spec, &cx.policy);
        opened.map_err(|e| Context::cannot_open(file, &reason(&e, &spec)))?;
        return Err(Failure::new("This image format does not support checks").with_status(EXIT_UNSUPPORTED));
    }
    let told = Rc::new(RefCell::new(Told::default()));
    let sink = {
        let told = told.clone();
        move |message| told.borrow_mut().take(message)
    };
    let options = CheckOptions { repair, lock: spec.lock };
    let report = check::check(&spec, &options, &cx.policy, sink);
    let report = report.map_err(|e| Context::cannot_open(file, &reason(&e, &spec)))?;
    let told = told.borrow();
    if let Some(what) = &told.beyond {
        cx.error(&format!("ERROR {what}"));
        return Err(Failure::new("Check failed: File too large"));
    }
    // To a terminal in the order of time; into a pipe errors come first, as they do from qemu-img.
    let in_order = std::io::stdout().is_terminal();
    if !in_order {
        told.say_left();
    }
    if !json && !args.quiet && report.corruptions_fixed + report.leaks_fixed > 0 {
        println!(
            "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} corruptions\n\nDouble \
             checking the fixed image now...",
            report.leaks_fixed, report.corruptions_fixed
        );
    }
    if in_order {
        told.say_left();
    }
    if !args.quiet {
        if json {
            println!("{}", tree(&report, file).json());
        } else {
            print!("{}", human(&report));
        }
    }
    Ok(match report {
        CheckReport { corruptions: 1.., .. } => EXIT_CORRUPT,
        CheckReport { leaks: 1.., .. } => EXIT_LEAKS,
        _ => 0,
    })
}

/// What the check has said.
#[derive(Default)]
struct Told {
    /// Something was repaired: what is left is told though it was told before.
    repaired: bool,
    left: Vec<String>,
    /// The snapshot table is beyond the format's bounds.
    beyond: Option<String>,
    /// Findings that are left beside those.
    more: u64,
}

impl Told {
    fn take(&mut self, message: Message) {
        match message {
            Message::Found(finding) => eprintln!("{finding}"),
            Message::Repairing(what) => {
                self.repaired = true;
                eprintln!("Repairing {what}");
            }
            Message::Discarding(what) => {
                self.repaired = true;
                eprintln!("Discarding {what}");
            }
            Message::Beyond(what) => self.beyond = Some(what),
            Message::Rebuilding => {
                self.repaired = true;
                eprintln!("Rebuilding refcount structure");
            }
            Message::Repaired(what) => {
                self.repaired = true;
                tracing::info!("{what}");
            }
            Message::NotRepaired(what) => eprintln!("ERROR {what}"),
            // Flags are looked at when the refcounts are right, so they have not been told before.
            Message::Left(finding) if !self.repaired && finding.kind != FindingKind::Copied => {}
            Message::Left(_) if self.left.len() >= LEFT_MAX => self.more += 1,
            Message::Left(finding) => self.left.push(finding.to_string()),
            Message::Progress { .. } => {}
        }
    }

    fn say_left(&self) {
        for line in &self.left {
            eprintln!("{line}");
        }
        if self.more > 0 {
            eprintln!("… and {} more", self.more);
        }
    }
}

fn tree(report: &CheckReport, name: &str) -> Tree {
    let numbers = [
        ("image-end-offset", report.image_end_offset),
        ("compressed-clusters", report.compressed_clusters),
        ("total-clusters", report.total_clusters),
        ("corruptions", report.corruptions),
        ("corruptions-fixed", report.corruptions_fixed),
        ("check-errors", 0),
        ("leaks", report.leaks),
        ("leaks-fixed", report.leaks_fixed),
        ("allocated-clusters", report.allocated_clusters),
    ];
    let told = |&(key, number): &(&'static str, u64)| number != 0 || key == "check-errors";
    let mut map: Vec<(&'static str, Tree)> =
        numbers.into_iter().filter(told).map(|(key, number)| (key, number.into())).collect();
    map.push(("filename", name.into()));
    map.push(("format", "qcow2".into()));
    if report.fragmented_clusters != 0 {
        map.push(("fragmented-clusters", report.fragmented_clusters.into()));
    }
    Tree::Map(map)
}

fn human(report: &CheckReport) -> String {
    let mut out = String::new();
    if report.is_clean() {
        out.push_str("No errors were found on the image.\n");
    }
    if report.corruptions > 0 {
        out.push_str(&format!(
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.\n",
            report.corruptions
        ));
    }
    if report.leaks > 0 {
        out.push_str(&format!(
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n",
            report.leaks
        ));
    }
    if report.total_clusters > 0 && report.allocated_clusters > 0 {
        let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        out.push_str(&format!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
            report.allocated_clusters,
            report.total_clusters,
            percent(report.allocated_clusters, report.total_clusters),
            percent(report.fragmented_clusters, report.allocated_clusters),
            percent(report.compressed_clusters, report.allocated_clusters),
        ));
    }
    if report.image_end_offset > 0 {
        out.push_str(&format!("Image end offset: {}\n", report.image_end_offset));
    }
    out
}
