//! A refused or failed request, as its client reads it.

use serde_json::{Map, Value};

use crate::error::Error;

/// Why a request was refused or failed: an [`Error`] and the facts a program may want beside its sentence.
#[derive(Debug)]
pub struct Failure {
    /// Class and sentence.
    pub error: Error,
    /// More members of the JSON-RPC error's `data`, e.g. `holder`, `differs`.
    pub facts: Map<String, Value>,
}

impl Failure {
    /// Adds a fact.
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.facts.insert(key.to_owned(), value.into());
        self
    }

    /// The JSON-RPC error code of this class, in the range that JSON-RPC 2.0 leaves to servers. Stable.
    pub fn number(&self) -> i32 {
        match &self.error {
            Error::Invalid(_) => -32001,
            Error::NotAllowed(_) => -32002,
            Error::NotFound(_) => -32003,
            Error::Conflict(_) => -32004,
            Error::VfAbsent(_) => -32005,
            Error::Exhausted(_) => -32006,
            Error::Dpdk { .. } => -32007,
            Error::Io { .. } => -32008,
            Error::Memory(_) => -32009,
            Error::Protocol(_) => -32010,
        }
    }

    /// The `data` member: `code`, the stable name of the class, and the facts.
    pub fn data(&self) -> Value {
        let mut data = self.facts.clone();
        data.insert("code".to_owned(), self.error.code().into());
        Value::Object(data)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { error, facts: Map::new() }
    }
}
