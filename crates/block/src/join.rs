//! Awaiting several futures of one task at once.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;

use crate::error::Result;

/// Runs the futures to their end, at most `most` of them at once, and gives the first error. After one no more are begun; those that
/// run are not stopped: their memory is in use until they are over.
pub(crate) async fn join_some<F>(futures: impl Iterator<Item = F>, most: usize) -> Result<()>
where
    F: Future<Output = Result<()>>,
{
    let mut futures = futures.fuse();
    let mut running: Vec<Pin<Box<F>>> = Vec::new();
    let mut result = Ok(());
    poll_fn(|cx| {
        let mut runs = |future: &mut Pin<Box<F>>| match future.as_mut().poll(cx) {
            Poll::Pending => true,
            Poll::Ready(ended) => {
                if result.is_ok() {
                    result = ended;
                }
                false
            }
        };
        running.retain_mut(&mut runs);
        while running.len() < most {
            let Some(mut future) = futures.next().map(Box::pin) else { break };
            if runs(&mut future) {
                running.push(future);
            }
        }
        if running.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    result
}
