//! A refused or failed request, as its client reads it.

use serde_json::{Map, Value};

use super::PortId;
use super::api::Selector;
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

/// Refusals of requests that are well-formed and allowed.
impl Failure {
    /// There is no such port.
    pub(super) fn not_found(selector: &Selector) -> Self {
        Error::NotFound(format!(
            "there is no {}: see the list of ports for those there are",
            selector.to_string().trim_start_matches("a ")
        ))
        .into()
    }

    /// The daemon ends.
    pub(super) fn stopping() -> Self {
        Self::from(Error::Exhausted("the daemon is stopping: ask again when it has been started anew".into()))
            .with("stopping", true)
    }

    /// Another request took the port down.
    pub(super) fn superseded(id: &PortId) -> Self {
        Self::from(Error::Conflict(format!(
            "port {id} was taken down by another request before this one was done: attach it again if it is still wanted"
        )))
        .with("superseded", true)
    }

    /// The identity of a port with a guest cannot change.
    pub(super) fn differs(id: &PortId, differences: &[(&'static str, String, String)]) -> Self {
        let list: Vec<_> =
            differences.iter().map(|(name, has, asked)| format!("{name} is {has}, asked for was {asked}")).collect();
        let names: Vec<_> = differences.iter().map(|(name, ..)| *name).collect();
        Self::from(Error::Conflict(format!(
            "port {id} has a guest connected and is another one: {}; detach it first, or ask for what it is",
            list.join("; ")
        )))
        .with("differs", names)
        .with("guest", true)
    }

    /// Another port has what was asked for.
    pub(super) fn held(claim: &str, holder: &PortId, guest: bool) -> Self {
        let what_to_do = if guest {
            "its guest is connected: detach that port first, or choose another"
        } else {
            "detach that port first, choose another, or ask for a takeover (no guest is connected)"
        };
        Self::from(Error::Conflict(format!("{claim} is held by port {holder}; {what_to_do}")))
            .with("holder", holder.as_str())
            .with("held", claim)
            .with("guest", guest)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { error, facts: Map::new() }
    }
}
