//! The rules of what fails when, as QEMU's `blkdebug` has them: an event makes faults active, or changes a state on which other rules may
//! depend; an active fault meets the operations that it is for.

use std::io;
use std::ops::Range;

/// What happens to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It is opened.
    None,
    /// The disk's content is going to be read.
    ReadAio,
    /// The disk's content is going to be written.
    WriteAio,
    /// An L2 table, or a part of one, is going to be read.
    L2Load,
    /// It is going to be flushed.
    FlushToOs,
    /// The same.
    FlushToDisk,
    /// A write comes, of content or metadata.
    Pwritev,
    /// A range is going to be zeroed.
    PwritevZero,
}

impl Event {
    const NAMES: [(&str, Self); 8] = [
        ("none", Self::None),
        ("read_aio", Self::ReadAio),
        ("write_aio", Self::WriteAio),
        ("l2_load", Self::L2Load),
        ("flush_to_os", Self::FlushToOs),
        ("flush_to_disk", Self::FlushToDisk),
        ("pwritev", Self::Pwritev),
        ("pwritev_zero", Self::PwritevZero),
    ];

    /// Events of QEMU's own code that do not happen here.
    const OTHERS: [&str; 40] = [
        "l1_update",
        "l1_grow_alloc_table",
        "l1_grow_write_table",
        "l1_grow_activate_table",
        "l2_update",
        "l2_update_compressed",
        "l2_alloc_cow_read",
        "l2_alloc_write",
        "read_backing_aio",
        "read_compressed",
        "write_compressed",
        "vmstate_load",
        "vmstate_save",
        "cow_read",
        "cow_write",
        "reftable_load",
        "reftable_grow",
        "reftable_update",
        "refblock_load",
        "refblock_update",
        "refblock_update_part",
        "refblock_alloc",
        "refblock_alloc_hookup",
        "refblock_alloc_write",
        "refblock_alloc_write_blocks",
        "refblock_alloc_write_table",
        "refblock_alloc_switch_table",
        "cluster_alloc",
        "cluster_alloc_bytes",
        "cluster_alloc_space",
        "cluster_free",
        "pwritev_rmw_head",
        "pwritev_rmw_after_head",
        "pwritev_rmw_tail",
        "pwritev_rmw_after_tail",
        "pwritev_done",
        "empty_image_prepare",
        "l1_shrink_write_table",
        "l1_shrink_free_l2_clusters",
        "cor_write",
    ];

    /// The event of that name.
    ///
    /// # Errors
    /// There is none, or it does not happen here.
    pub fn named(name: &str) -> Result<Self, String> {
        if let Some((_, event)) = Self::NAMES.into_iter().find(|(known, _)| *known == name) {
            return Ok(event);
        }
        if Self::OTHERS.contains(&name) {
            let known = Self::NAMES.map(|(name, _)| name).join(", ");
            return Err(format!(
                "the event '{name}' is one inside of QEMU, and does not happen in cowhand (these do: {known})"
            ));
        }
        Err(format!("invalid parameter value: {name}"))
    }
}

/// A sort of operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IoType {
    Read,
    Write,
    WriteZeroes,
    Discard,
    Flush,
    BlockStatus,
}

impl IoType {
    const NAMES: [(&str, Self); 6] = [
        ("read", Self::Read),
        ("write", Self::Write),
        ("write-zeroes", Self::WriteZeroes),
        ("discard", Self::Discard),
        ("flush", Self::Flush),
        ("block-status", Self::BlockStatus),
    ];

    const fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// What meets operations once it is active.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Which sorts of operations, a bit for each.
    kinds: u8,
    /// The system's number of the error; 0 for none.
    errno: i32,
    /// Only operations on this sector.
    sector: Option<u64>,
    /// It meets one operation, and is gone.
    once: bool,
}

impl Default for Fault {
    /// An I/O error of all that is read, written or flushed.
    fn default() -> Self {
        let kinds = [IoType::Read, IoType::Write, IoType::WriteZeroes, IoType::Discard, IoType::Flush];
        let kinds = kinds.into_iter().fold(0, |bits, kind| bits | kind.bit());
        Self { kinds, errno: libc::EIO, sector: None, once: false }
    }
}

/// What a rule does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// `inject-error`: it becomes active.
    Inject(Fault),
    /// `set-state`: this is the state from now on.
    SetState(u64),
}

/// What an event does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The event.
    pub event: Event,
    /// Only in this state.
    pub state: Option<u64>,
    /// What it does.
    pub action: Action,
}

impl Rule {
    /// A rule by the name of its group, and its options by name.
    ///
    /// # Errors
    /// Which option is wrong.
    pub fn parse<'a>(group: &str, options: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self, String> {
        let number = |key: &str, value: &str| match value.parse::<i64>() {
            Ok(number) => Ok(number),
            Err(_) => Err(format!("Parameter '{key}' expects a number")),
        };
        let on_off = |key: &str, value: &str| match value {
            "on" | "yes" | "true" | "y" => Ok(true),
            "off" | "no" | "false" | "n" => Ok(false),
            _ => Err(format!("Parameter '{key}' expects 'on' or 'off'")),
        };
        let injects = group == "inject-error";
        let (mut event, mut state, mut fault, mut new_state) = (None, None, Fault::default(), 0);
        for (key, value) in options {
            match key {
                "event" => event = Some(Event::named(value)?),
                // 0 is any.
                "state" => state = u64::try_from(number(key, value)?).ok().filter(|&state| state != 0),
                "new_state" if !injects => {
                    let negative = |_| format!("Parameter '{key}' expects a non-negative number");
                    new_state = u64::try_from(number(key, value)?).map_err(negative)?;
                }
                "iotype" if injects => {
                    let known = IoType::NAMES.into_iter().find(|(name, _)| *name == value);
                    fault.kinds = known.ok_or_else(|| format!("invalid parameter value: {value}"))?.1.bit();
                }
                "errno" if injects => {
                    let errno = i32::try_from(number(key, value)?).ok().filter(|errno| (0..4096).contains(errno));
                    fault.errno = errno.ok_or_else(|| format!("Parameter '{key}' expects the number of an error"))?;
                }
                // Below 0 is any.
                "sector" if injects => fault.sector = u64::try_from(number(key, value)?).ok(),
                "once" if injects => fault.once = on_off(key, value)?,
                // An operation that fails never waits here.
                "immediately" if injects => drop(on_off(key, value)?),
                _ => return Err(format!("[{group}] section doesn't support the option '{key}'")),
            }
        }
        let event = event.ok_or("Missing event name for rule")?;
        let action = if injects { Action::Inject(fault) } else { Action::SetState(new_state) };
        Ok(Self { event, state, action })
    }
}

/// What has happened so far.
pub(super) struct State {
    /// None: it was to meet one operation, and has.
    rules: Vec<Option<Rule>>,
    /// The rules whose faults are active.
    active: Vec<usize>,
    state: u64,
}

impl State {
    pub(super) fn new(rules: Vec<Rule>) -> Self {
        let mut state = Self { rules: rules.into_iter().map(Some).collect(), active: Vec::new(), state: 1 };
        state.happens(Event::None);
        state
    }

    /// Does what the rules say of an event. The faults of one event take the place of those that were active.
    pub(super) fn happens(&mut self, event: Event) {
        let (mut next, mut injected) = (self.state, Vec::new());
        for (number, rule) in self.rules.iter().enumerate() {
            let Some(rule) = rule else { continue };
            if rule.event != event || rule.state.is_some_and(|state| state != self.state) {
                continue;
            }
            match &rule.action {
                Action::Inject(_) => injected.push(number),
                Action::SetState(new) => next = *new,
            }
        }
        if !injected.is_empty() {
            self.active = injected;
        }
        self.state = next;
    }

    /// The error that an operation on these bytes meets, if it meets one.
    pub(super) fn check(&mut self, kind: IoType, bytes: &Range<u64>) -> io::Result<()> {
        let meets = |rule: &Option<Rule>| match rule {
            Some(Rule { action: Action::Inject(fault), .. }) => {
                let here = |sector: u64| sector.checked_mul(512).is_some_and(|at| bytes.contains(&at));
                (fault.kinds & kind.bit() != 0 && fault.sector.is_none_or(here)).then_some((fault.errno, fault.once))
            }
            _ => None,
        };
        let found = self.active.iter().find_map(|&number| Some((number, meets(&self.rules[number])?)));
        let Some((number, (errno, once))) = found else { return Ok(()) };
        if once {
            self.rules[number] = None;
            self.active.retain(|&active| active != number);
        }
        if errno == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(errno)) }
    }
}
