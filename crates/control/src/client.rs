//! The client: one connection for each request.

use std::io;
use std::path::{Path, PathBuf};

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::api::{Disk, DiskList, Error, ErrorBody, Resize};
use crate::routes::encoded;

/// The most bytes of an answer: thousands of disks with chains of a hundred images.
const ANSWER_MAX: usize = 64 << 20;

/// Why a request was not answered, or not as it was meant to be.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody is there.
    #[error("{}: cannot connect: {error}; is cowhand running with --api-socket?", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The conversation broke off, or made no sense.
    #[error("{}: {what}", path.display())]
    Broken {
        /// The socket.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The server's answer was an error.
    #[error(transparent)]
    Refused(#[from] Error),
}

/// The way to a server.
#[derive(Clone, Debug)]
pub struct Client {
    path: PathBuf,
}

impl Client {
    /// The server that listens at `path`.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_path_buf() }
    }

    /// All disks.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn disks(&self) -> Result<Vec<Disk>, ClientError> {
        self.ask(Method::GET, "/v1/disks", Vec::new()).map(|list: DiskList| list.disks)
    }

    /// The disk called `id`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn disk(&self, id: &str) -> Result<Disk, ClientError> {
        self.ask(Method::GET, &format!("/v1/disks/{}", encoded(id)), Vec::new())
    }

    /// Changes the size of the disk called `id`; says what it is then.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn resize(&self, id: &str, resize: &Resize) -> Result<Disk, ClientError> {
        let body = serde_json::to_vec(resize).map_err(|error| self.broken(error))?;
        self.ask(Method::POST, &format!("/v1/disks/{}/resize", encoded(id)), body)
    }

    fn broken(&self, what: impl ToString) -> ClientError {
        ClientError::Broken { path: self.path.clone(), what: what.to_string() }
    }

    fn ask<T: DeserializeOwned>(&self, method: Method, target: &str, body: Vec<u8>) -> Result<T, ClientError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
        let runtime = runtime.map_err(|error| self.broken(error))?;
        let (status, answer) = runtime.block_on(self.talk(method, target, body))?;
        let strange = || self.broken(format!("what answers there is not cowhand (status {status})"));
        if status == StatusCode::OK {
            return serde_json::from_slice(&answer).map_err(|_| strange());
        }
        let refusal: ErrorBody = serde_json::from_slice(&answer).map_err(|_| strange())?;
        Err(refusal.error.into())
    }

    async fn talk(&self, method: Method, target: &str, body: Vec<u8>) -> Result<(StatusCode, Bytes), ClientError> {
        let stream = UnixStream::connect(&self.path).await;
        let stream = stream.map_err(|error| ClientError::Connect { path: self.path.clone(), error })?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.broken(error))?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(target)
            .header(HOST, "localhost")
            .header(CONNECTION, "close")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| self.broken(error))?;
        let answer = sender.send_request(request).await.map_err(|error| self.broken(error))?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_MAX).collect().await.map_err(|error| self.broken(error))?;
        Ok((status, body.to_bytes()))
    }
}
