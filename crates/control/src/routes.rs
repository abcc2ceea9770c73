//! What a request wants, and the answer to it.

use hyper::{Method, StatusCode, Uri};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::api::{DiskList, Error, ErrorBody, ErrorKind};
use crate::disks::Disks;

/// An answer: a status, and a body that is JSON.
#[derive(Debug)]
pub(crate) struct Answer {
    pub status: StatusCode,
    /// The methods that could have been used.
    pub allow: Option<&'static str>,
    pub body: Vec<u8>,
}

impl From<Error> for Answer {
    fn from(error: Error) -> Self {
        let status = StatusCode::from_u16(error.kind.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        // Two strings: there is nothing in them that JSON could not hold.
        let body = serde_json::to_vec(&ErrorBody { error }).unwrap_or_default();
        Self { status, allow: None, body }
    }
}

/// What there is.
enum Resource {
    Disks,
    Disk(String),
    Resize(String),
}

impl Resource {
    fn find(path: &str) -> Option<Self> {
        let mut words = path.strip_prefix("/v1/")?.split('/');
        match (words.next()?, words.next(), words.next(), words.next()) {
            ("disks", None, None, None) => Some(Self::Disks),
            ("disks", Some(id), None, None) => Some(Self::Disk(decoded(id)?)),
            ("disks", Some(id), Some("resize"), None) => Some(Self::Resize(decoded(id)?)),
            _ => None,
        }
    }

    fn methods(&self) -> &'static str {
        match self {
            Self::Disks | Self::Disk(_) => "GET",
            Self::Resize(_) => "POST",
        }
    }
}

/// Does what is asked for, which may take its time.
pub(crate) fn answer(disks: &dyn Disks, method: &Method, target: &Uri, body: &[u8]) -> Answer {
    let Some(resource) = Resource::find(target.path()) else {
        return Error::new(ErrorKind::NotFound, format!("there is no {}", target.path())).into();
    };
    let allowed = resource.methods();
    if method.as_str() != allowed {
        let message = format!("{} takes {allowed}, not {method}", target.path());
        return Answer { allow: Some(allowed), ..Error::new(ErrorKind::MethodNotAllowed, message).into() };
    }
    if target.query().is_some() {
        return Error::new(ErrorKind::Invalid, format!("{} takes no query", target.path())).into();
    }
    let done = match resource {
        Resource::Disks => nothing(body).and_then(|()| disks.list()).and_then(|disks| json(&DiskList { disks })),
        Resource::Disk(id) => nothing(body).and_then(|()| disks.one(&id)).and_then(|disk| json(&disk)),
        Resource::Resize(id) => parsed(body).and_then(|resize| disks.resize(&id, &resize)).and_then(|disk| json(&disk)),
    };
    match done {
        Ok(body) => Answer { status: StatusCode::OK, allow: None, body },
        Err(error) => error.into(),
    }
}

fn nothing(body: &[u8]) -> Result<(), Error> {
    match body {
        [] => Ok(()),
        _ => Err(Error::new(ErrorKind::Invalid, "the body: there must be none")),
    }
}

fn parsed<T: DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(body).map_err(|error| Error::new(ErrorKind::Invalid, format!("the body: {error}")))
}

fn json(value: &impl Serialize) -> Result<Vec<u8>, Error> {
    serde_json::to_vec(value).map_err(|error| Error::new(ErrorKind::Internal, error.to_string()))
}

/// A segment of a path without its percent-encoding (RFC 3986, 2.1); none if it is broken.
fn decoded(segment: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(segment.len());
    let mut rest = segment.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let mut digit = || char::from(rest.next()?).to_digit(16);
                u8::try_from(digit()? << 4 | digit()?).ok()?
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

/// A name as a segment of a path.
pub(crate) fn encoded(name: &str) -> String {
    let mut segment = String::with_capacity(name.len());
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => segment.push(char::from(byte)),
            byte => segment.push_str(&format!("%{byte:02X}")),
        }
    }
    segment
}

#[cfg(test)]
#[path = "routes_test.rs"]
mod tests;
