//! Awaiting several futures of one task at once.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;

use crate::error::Result;

/// Runs all futures to their end, and gives the first error. A future that fails does not stop the others: their memory is in use
/// until they are over.
pub(crate) async fn join_all<F: Future<Output = Result<()>>>(futures: Vec<F>) -> Result<()> {
    let mut running: Vec<Pin<Box<F>>> = futures.into_iter().map(Box::pin).collect();
    let mut result = Ok(());
    poll_fn(|cx| {
        running.retain_mut(|future| match future.as_mut().poll(cx) {
            Poll::Pending => true,
            Poll::Ready(ended) => {
                if result.is_ok() {
                    result = ended;
                }
                false
            }
        });
        if running.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    result
}
