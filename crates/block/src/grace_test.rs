use super::*;

#[test]
fn stamp_without_requests_passes_at_once() {
    let grace = Grace::default();
    assert!(grace.passed(grace.stamp()));
}

#[test]
fn stamp_waits_for_a_request_that_began_before() {
    let grace = Grace::default();
    let ticket = grace.enter(3);
    let stamp = grace.stamp();
    assert!(!grace.passed(stamp));
    grace.leave(ticket);
    assert!(grace.passed(stamp));
}

#[test]
fn stamp_does_not_wait_for_ever_while_new_requests_come() {
    let grace = Grace::default();
    let mut ticket = grace.enter(0);
    let stamp = grace.stamp();
    let mut rounds = 0;
    while !grace.passed(stamp) {
        let next = grace.enter(0);
        grace.leave(ticket);
        ticket = next;
        rounds += 1;
        assert!(rounds < 5);
    }
    grace.leave(ticket);
}
