use std::collections::VecDeque;
use std::time::Duration;

use anyhow::{Result, bail};

use super::{Count, Target, drive};
use crate::load::{Ask, Load, LoadArgs, Pattern};

#[derive(Default)]
struct Fake {
    queued: VecDeque<usize>,
    most: usize,
    flushing: bool,
    fail_after: Option<u64>,
    completed: u64,
}

impl Target for Fake {
    fn submit(&mut self, slot: usize, ask: Ask) -> Result<()> {
        assert!(!self.queued.contains(&slot), "slot {slot} is in flight");
        assert!(!self.flushing, "nothing goes beside a flush");
        self.flushing = ask == Ask::Flush;
        assert!(!self.flushing || self.queued.is_empty(), "a flush waits for all");
        self.queued.push_back(slot);
        self.most = self.most.max(self.queued.len());
        Ok(())
    }

    fn complete(&mut self, done: &mut Vec<usize>) -> Result<()> {
        if self.fail_after.is_some_and(|after| self.completed >= after) {
            bail!("injected");
        }
        done.extend(self.queued.pop_front());
        self.flushing = false;
        self.completed += 1;
        Ok(())
    }
}

fn load(requests: Option<u64>) -> Load {
    let pattern = Pattern::Random;
    let args = LoadArgs {
        pattern,
        write: true,
        block: 4096,
        unit: 65536,
        flush_every: Some(10),
        requests,
        span: None,
        seed: 1,
    };
    Load::new(&args, 1 << 20, 0, 1).unwrap()
}

#[test]
fn a_load_with_an_end_is_driven_to_it_at_the_given_depth() {
    let mut fake = Fake::default();
    let count = drive(&mut fake, &mut load(Some(100)), 8, None).unwrap();
    assert_eq!(count, Count { requests: 100, flushes: 10 });
    assert_eq!((fake.most, fake.queued.len()), (8, 0));
}

#[test]
fn time_ends_a_load_and_nothing_stays_in_flight() {
    let mut fake = Fake::default();
    let count = drive(&mut fake, &mut load(None), 8, Some(Duration::from_millis(5))).unwrap();
    assert!(count.requests > 8);
    assert_eq!(fake.queued.len(), 0);
}

#[test]
fn a_request_that_fails_ends_it() {
    let mut fake = Fake { fail_after: Some(10), ..Fake::default() };
    assert!(drive(&mut fake, &mut load(None), 8, None).is_err());
}
