//! `--object secret,id=…`: what opens encrypted images.

use std::cell::RefCell;
use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use cowhand_block::secret::{Secret, SecretSource};
use cowhand_block::spec::split_commas;

/// The secrets that were given, by their IDs.
#[derive(Default)]
pub(crate) struct Secrets(RefCell<BTreeMap<String, Secret>>);

impl Secrets {
    /// Takes an object: `secret,id=ID,data=TEXT|file=PATH[,format=raw|base64]`.
    pub(crate) fn add(&self, object: &str) -> Result<(), String> {
        let words = split_commas(object);
        let Some((kind, rest)) = words.split_first() else { return Err("Parameter 'qom-type' is missing".into()) };
        let kind = kind.strip_prefix("qom-type=").unwrap_or(kind);
        if kind != "secret" {
            return Err(format!("Parameter 'qom-type' does not accept value '{kind}'"));
        }
        let (mut id, mut data, mut file, mut base64) = (None, None, None, false);
        for word in rest {
            match word.split_once('=') {
                Some(("id", value)) => id = Some(value.to_string()),
                Some(("data", value)) => data = Some(value.as_bytes().to_vec()),
                Some(("file", value)) => file = Some(value.to_string()),
                Some(("format", "raw")) => base64 = false,
                Some(("format", "base64")) => base64 = true,
                Some(("format", value)) => return Err(format!("Parameter 'format' does not accept value '{value}'")),
                _ => return Err(format!("Parameter '{}' is unexpected", word.split('=').next().unwrap_or(word))),
            }
        }
        let id = id.ok_or("Parameter 'id' is missing")?;
        let bytes = match (data, file) {
            (Some(data), None) => data,
            (None, Some(path)) => std::fs::read(&path).map_err(|e| format!("Unable to read {path}: {e}"))?,
            (Some(_), Some(_)) => return Err("'file' and 'data' are mutually exclusive".into()),
            (None, None) => return Err("Either 'file' or 'data' must be provided".into()),
        };
        let bytes = if base64 {
            let text: Vec<u8> = bytes.into_iter().filter(|b| !b.is_ascii_whitespace()).collect();
            STANDARD.decode(text).map_err(|_| "Base64 data is not valid".to_string())?
        } else {
            bytes
        };
        if bytes.len() > Secret::MAX {
            return Err(format!("secret '{id}': more than {} bytes are no secret", Secret::MAX));
        }
        if self.0.borrow_mut().insert(id.clone(), Secret::new(bytes)).is_some() {
            return Err(format!("attempt to add duplicate property '{id}' to object (type 'container')"));
        }
        Ok(())
    }

    /// The secret with this ID.
    pub(crate) fn get(&self, id: &str) -> Result<SecretSource, String> {
        let secret = self.0.borrow().get(id).cloned();
        secret.map(SecretSource::Known).ok_or_else(|| format!("No secret with id '{id}'"))
    }
}

#[cfg(test)]
#[path = "secrets_test.rs"]
mod tests;
