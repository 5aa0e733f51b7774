//! JSON-RPC 2.0 envelopes, one object per line.
//!
//! Requests of a client are started in the order of its lines; an answer is sent when it is known, so
//! a quick request may be answered before an earlier slow one: match answers by `id`. A request without
//! `id` is a notification: it is carried out and not answered. Batches are refused (-32600): with one
//! object per line they would add nothing but a second order. `params` are by name.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::Failure;
use super::json::Json;

/// The line is not JSON.
pub const PARSE_ERROR: i32 = -32700;
/// The JSON is not a request.
pub const INVALID_REQUEST: i32 = -32600;
/// There is no such method.
pub const METHOD_NOT_FOUND: i32 = -32601;
/// The parameters do not have the method's shape.
pub const INVALID_PARAMS: i32 = -32602;

/// A request, its envelope checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// String, number or null, to be echoed; `None`: a notification.
    pub id: Option<Value>,
    /// Which.
    pub method: String,
    /// By name; empty if absent.
    pub params: Map<String, Value>,
}

/// An error object.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RpcError {
    /// JSON-RPC's code, or one of [`Failure::number`].
    pub code: i32,
    /// A sentence that says what to do.
    pub message: String,
    /// `code`: the stable name of the class; and facts of the case.
    #[serde(default)]
    pub data: Value,
}

impl RpcError {
    /// The stable name of its class.
    pub fn class(&self) -> &str {
        self.data["code"].as_str().unwrap_or_default()
    }

    pub(super) fn new(code: i32, message: impl Into<String>) -> Self {
        let class = match code {
            PARSE_ERROR => "parse_error",
            INVALID_REQUEST => "invalid_request",
            METHOD_NOT_FOUND => "method_not_found",
            _ => "invalid_params",
        };
        Self { code, message: message.into(), data: json!({ "code": class }) }
    }
}

impl From<&Failure> for RpcError {
    fn from(failure: &Failure) -> Self {
        Self { code: failure.number(), message: failure.error.to_string(), data: failure.data() }
    }
}

impl Request {
    /// Reads one line. The error comes with the id to answer under: null where none could be read.
    pub fn parse(line: &[u8]) -> Result<Self, (Value, RpcError)> {
        let Json(value) = serde_json::from_slice(line).map_err(|error| {
            if error.is_data() {
                let message = format!("{error}: give each member of an object once");
                return (Value::Null, RpcError::new(INVALID_REQUEST, message));
            }
            let message = format!("not a line of JSON ({error}): send one JSON-RPC 2.0 object per line");
            (Value::Null, RpcError::new(PARSE_ERROR, message))
        })?;
        let mut object = match value {
            Value::Object(object) => object,
            Value::Array(_) => {
                let message = "batches are not supported: send one request object per line";
                return Err((Value::Null, RpcError::new(INVALID_REQUEST, message)));
            }
            _ => {
                let message = "a request is a JSON object with jsonrpc, id, method and params";
                return Err((Value::Null, RpcError::new(INVALID_REQUEST, message)));
            }
        };
        let id = object.remove("id");
        let invalid = |code, message: &str| {
            let id = match &id {
                Some(id @ (Value::String(_) | Value::Number(_))) => id.clone(),
                _ => Value::Null,
            };
            Err((id, RpcError::new(code, message)))
        };
        if matches!(id, Some(Value::Bool(_) | Value::Array(_) | Value::Object(_))) {
            return invalid(INVALID_REQUEST, "id is a string, a number or null; leave it out for a notification");
        }
        if object.get("jsonrpc").and_then(Value::as_str) != Some("2.0") {
            return invalid(INVALID_REQUEST, "member jsonrpc has to be \"2.0\"");
        }
        let Some(Value::String(method)) = object.remove("method") else {
            return invalid(INVALID_REQUEST, "member method has to be a string");
        };
        let params = match object.remove("params") {
            None => Map::new(),
            Some(Value::Object(params)) => params,
            Some(_) => {
                return invalid(INVALID_PARAMS, "params are given by name: send a JSON object");
            }
        };
        Ok(Self { id, method, params })
    }
}

/// The line, with its end, that answers request `id`.
pub fn answer(id: &Value, result: &Result<Value, RpcError>) -> Vec<u8> {
    let object = match result {
        Ok(result) => json!({ "jsonrpc": "2.0", "id": id, "result": result }),
        Err(error) => json!({ "jsonrpc": "2.0", "id": id, "error": error }),
    };
    let mut line = object.to_string().into_bytes();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn envelopes() {
        for (line, expected) in [
            (&br#"{"jsonrpc":"2.0","id":1,"method":"m"}"#[..], Ok(Some(json!(1)))),
            (br#"{"jsonrpc":"2.0","id":"x","method":"m","params":{}}"#, Ok(Some(json!("x")))),
            (br#"{"jsonrpc":"2.0","id":null,"method":"m"}"#, Ok(Some(Value::Null))),
            (br#"{"jsonrpc":"2.0","method":"m"}"#, Ok(None)),
            (br#"{"jsonrpc":"2.0","id":1,"method":"m""#, Err((Value::Null, PARSE_ERROR))),
            (b"\xff\xfe", Err((Value::Null, PARSE_ERROR))),
            (b"", Err((Value::Null, PARSE_ERROR))),
            (br#""x""#, Err((Value::Null, INVALID_REQUEST))),
            (br#"[]"#, Err((Value::Null, INVALID_REQUEST))),
            (br#"[{"jsonrpc":"2.0","id":1,"method":"m"}]"#, Err((Value::Null, INVALID_REQUEST))),
            (br#"{"id":7,"method":"m"}"#, Err((json!(7), INVALID_REQUEST))),
            (br#"{"jsonrpc":"1.0","id":7,"method":"m"}"#, Err((json!(7), INVALID_REQUEST))),
            (br#"{"jsonrpc":"2.0","id":7}"#, Err((json!(7), INVALID_REQUEST))),
            (br#"{"jsonrpc":"2.0","id":7,"method":3}"#, Err((json!(7), INVALID_REQUEST))),
            (br#"{"jsonrpc":"2.0","id":7,"id":8,"method":"m"}"#, Err((Value::Null, INVALID_REQUEST))),
            (
                br#"{"jsonrpc":"2.0","id":7,"method":"m","params":{"a":[{"b":1,"b":1}]}}"#,
                Err((Value::Null, INVALID_REQUEST)),
            ),
            (br#"{"jsonrpc":"2.0","id":7,"method":"m","params":{"a":{"b":-1.5},"b":[true,null]}}"#, Ok(Some(json!(7)))),
            (br#"{"jsonrpc":"2.0","id":{},"method":"m"}"#, Err((Value::Null, INVALID_REQUEST))),
            (br#"{"jsonrpc":"2.0","id":7,"method":"m","params":[1]}"#, Err((json!(7), INVALID_PARAMS))),
        ] {
            let got = Request::parse(line).map(|r| r.id).map_err(|(id, e)| (id, e.code));
            assert_eq!(got, expected, "{}", String::from_utf8_lossy(line));
        }
    }

    #[test]
    fn deep_nesting_is_an_error_not_a_stack_overflow() {
        let line = "[".repeat(60_000);
        assert_eq!(Request::parse(line.as_bytes()).unwrap_err().1.code, PARSE_ERROR);
    }
}
