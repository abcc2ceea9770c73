//! One connection: requests, one after the other, until the client goes or has kept us waiting for too long.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::api::{Error, ErrorKind};
use crate::disks::Disks;
use crate::routes::{self, Answer};

/// The most bytes that a body may have; none needs a hundredth of it.
const BODY_MAX: usize = 64 << 10;
/// The most bytes of a request's line and headers.
const HEAD_MAX: usize = 16 << 10;
/// How long a client is waited for when the server ends.
const LAST_PATIENCE: Duration = Duration::from_millis(500);

/// Since when the client has been the one that is waited for: for a whole request, or for it to read an answer. None while we work.
struct Turn(Mutex<Option<Instant>>);

impl Turn {
    fn set(&self, since: Option<Instant>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = since;
    }

    fn get(&self) -> Option<Instant> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when the client has been waited for `patience` long.
    async fn lost(&self, patience: Duration) {
        loop {
            let now = Instant::now();
            let until = self.get().unwrap_or(now) + patience;
            if until <= now {
                return;
            }
            sleep_until(until).await;
        }
    }
}

/// Answers a client's requests. Ends when it has gone, has been waited for `patience` long, or, when `stop` says so, with the request
/// that is under way.
pub(crate) async fn converse(
    stream: UnixStream,
    disks: Arc<dyn Disks>,
    patience: Duration,
    mut stop: watch::Receiver<bool>,
) {
    let turn = Arc::new(Turn(Mutex::new(Some(Instant::now()))));
    let service = {
        let turn = turn.clone();
        service_fn(move |request| respond(request, disks.clone(), turn.clone()))
    };
    let connection = http1::Builder::new()
        // Who has sent all that it wants to send may close that side, and still be answered.
        .half_close(true)
        // `Turn` has one limit for all of what a client can be slow with.
        .header_read_timeout(None)
        .max_buf_size(HEAD_MAX)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = turn.lost(patience) => return tracing::debug!("control API: a client that is too slow is disconnected"),
        _ = stop.changed() => {
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                ended = connection.as_mut() => ended,
                // It has no request under way: nobody waits for one that may come.
                () = turn.lost(patience.min(LAST_PATIENCE)) => return,
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!("control API: {error}");
    }
}

async fn respond(
    request: Request<Incoming>,
    disks: Arc<dyn Disks>,
    turn: Arc<Turn>,
) -> Result<Response<Full<Bytes>>, Box<dyn std::error::Error + Send + Sync>> {
    let (head, body) = request.into_parts();
    let answer = match whole(body).await? {
        None => {
            let message = format!("the body is larger than {BODY_MAX} bytes");
            Error::new(ErrorKind::TooLarge, message).into()
        }
        Some(body) => {
            turn.set(None);
            let work = tokio::task::spawn_blocking(move || routes::answer(&*disks, &head.method, &head.uri, &body));
            work.await.unwrap_or_else(|_| Error::new(ErrorKind::Internal, "the request has failed").into())
        }
    };
    turn.set(Some(Instant::now()));
    Ok(response(answer))
}

/// All of a body; none if it is too large.
async fn whole(body: Incoming) -> Result<Option<Bytes>, Box<dyn std::error::Error + Send + Sync>> {
    if body.size_hint().lower() > BODY_MAX as u64 {
        return Ok(None);
    }
    match Limited::new(body, BODY_MAX).collect().await {
        Ok(collected) => Ok(Some(collected.to_bytes())),
        Err(error) if error.is::<LengthLimitError>() => Ok(None),
        Err(error) => Err(error),
    }
}

fn response(answer: Answer) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(answer.body.into()));
    *response.status_mut() = answer.status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Some(methods) = answer.allow {
        response.headers_mut().insert(ALLOW, HeaderValue::from_static(methods));
    }
    response
}
