//! The name of a port.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// Longest port id, in characters.
const MAX_CHARS: usize = 64;

/// A port's id: 1 to 64 printable characters without white space and slashes, e.g. a Neutron port UUID.
/// Chosen by the client; attach and detach are idempotent by it. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PortId(Arc<str>);

impl PortId {
    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for PortId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let chars = text.chars().count();
        if !(1..=MAX_CHARS).contains(&chars) {
            return Err(Error::Invalid(format!(
                "a port id has 1 to {MAX_CHARS} characters, this one has {chars}: give a shorter name, e.g. a UUID"
            )));
        }
        match text.chars().find(|c| c.is_whitespace() || c.is_control() || *c == '/') {
            Some(c) => Err(Error::Invalid(format!(
                "port id {text:?} contains {c:?}: leave out white space, slashes and control characters"
            ))),
            None => Ok(Self(text.into())),
        }
    }
}

impl fmt::Display for PortId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Borrow<str> for PortId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for PortId {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<PortId> for String {
    fn from(id: PortId) -> Self {
        id.0.as_ref().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_bounded_and_printable() {
        for good in ["a", "11111111-2222-3333-4444-555555555555", "port:ü", &"x".repeat(64)] {
            assert_eq!(good.parse::<PortId>().unwrap().as_str(), good);
        }
        for bad in ["", "a b", "a/b", "a\n", "a\u{0}", "tab\t", "\u{a0}", &"x".repeat(65)] {
            let error = bad.parse::<PortId>().unwrap_err();
            assert_eq!(error.code(), "invalid", "{bad:?}");
        }
    }
}
