//! A client of the control socket: one request at a time, waiting for its answer.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::rpc::RpcError;

/// A connection to a daemon.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
    next_id: u64,
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No daemon listens there, or it went away.
    #[error("{0}")]
    Unreachable(String),
    /// The daemon refused, or failed.
    #[error("{}", .0.message)]
    Refused(RpcError),
    /// It did not answer as this client expects: it is of another version.
    #[error("{0}")]
    Strange(String),
}

impl Client {
    /// Connects. An answer that takes longer than `timeout` is an error.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path)
            .and_then(|stream| {
                stream.set_read_timeout(Some(timeout))?;
                stream.set_write_timeout(Some(timeout))?;
                Ok(stream)
            })
            .map_err(|error| {
                let hint = match error.kind() {
                    ErrorKind::PermissionDenied => {
                        "you may not use it: be root or in its group (--control-group of the daemon)"
                    }
                    _ => "is the daemon running, with this --control-socket?",
                };
                let path = path.display();
                ClientError::Unreachable(format!("cannot connect to {path} ({error}): {hint}"))
            })?;
        Ok(Self { stream: BufReader::new(stream), next_id: 0 })
    }

    /// Sends a request and waits for its result.
    pub fn call<R: DeserializeOwned>(&mut self, method: &str, params: &impl Serialize) -> Result<R, ClientError> {
        let result = self.call_raw(method, &json!(params))?;
        serde_json::from_value(result).map_err(|error| {
            ClientError::Strange(format!("the daemon's answer to {method} is not understood: {error}"))
        })
    }

    /// The same, with the result as it came.
    pub fn call_raw(&mut self, method: &str, params: &Value) -> Result<Value, ClientError> {
        self.next_id += 1;
        let id = self.next_id;
        let mut line = json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params}).to_string();
        line.push('\n');
        let lost = |error: std::io::Error| match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => ClientError::Unreachable(format!(
                "the daemon did not answer in time: it goes on with it ({method}); ask again, or see its log"
            )),
            _ => ClientError::Unreachable(format!("lost the daemon during {method}: {error}")),
        };
        self.stream.get_mut().write_all(line.as_bytes()).map_err(lost)?;
        let mut answer = String::new();
        if self.stream.read_line(&mut answer).map_err(lost)? == 0 {
            return Err(lost(ErrorKind::UnexpectedEof.into()));
        }
        let strange = |error: String| ClientError::Strange(format!("not an answer to {method} ({error}): {answer}"));
        let mut object: Value = serde_json::from_str(&answer).map_err(|error| strange(error.to_string()))?;
        if let Some(error) = object.get_mut("error") {
            let error = serde_json::from_value(error.take()).map_err(|error| strange(error.to_string()))?;
            return Err(ClientError::Refused(error));
        }
        if object["id"] != id {
            return Err(strange("wrong id".into()));
        }
        Ok(object["result"].take())
    }
}
