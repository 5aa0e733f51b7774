//! `vfctl`: the operator's tool. Asks a daemon on its control socket and prints what it says.

mod args;
mod stats;
mod tables;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use virtio_forwarder::control::api::{Selector, StatsQuery, Sync};
use virtio_forwarder::control::{Client, ClientError, PortId};

use args::{Args, Command};

/// Exit codes. Stable; printed by `vfctl --help`.
mod exit {
    pub const OTHER: u8 = 1;
    pub const UNREACHABLE: u8 = 3;
    pub const NOT_FOUND: u8 = 4;
    pub const CONFLICT: u8 = 5;
    pub const REFUSED: u8 = 6;
}

/// What ends the program early.
enum End {
    /// It did not work.
    Failed(ClientError),
    /// Nobody reads what we print: no failure, `vfctl list | head -1` is fine.
    Unread,
}

impl From<ClientError> for End {
    fn from(error: ClientError) -> Self {
        Self::Failed(error)
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(()) | Err(End::Unread) => ExitCode::SUCCESS,
        Err(End::Failed(error)) => {
            report(&error, args.json);
            ExitCode::from(exit_code(&error))
        }
    }
}

fn exit_code(error: &ClientError) -> u8 {
    match error {
        ClientError::Unreachable(_) => exit::UNREACHABLE,
        ClientError::Strange(_) => exit::OTHER,
        ClientError::Refused(error) => match error.class() {
            "not_found" => exit::NOT_FOUND,
            "conflict" => exit::CONFLICT,
            "invalid" | "invalid_params" | "not_allowed" => exit::REFUSED,
            _ => exit::OTHER,
        },
    }
}

/// Says on stderr what went wrong; with `--json` as the daemon's error object.
fn report(error: &ClientError, json: bool) {
    match error {
        ClientError::Refused(error) if json => eprintln!("{}", json!({ "error": error })),
        error if json => eprintln!("{}", json!({ "error": { "message": error.to_string() } })),
        error => eprintln!("vfctl: {error}"),
    }
}

fn run(args: &Args) -> Result<(), End> {
    let timeout = Duration::from_secs(args.timeout);
    let mut session = Session { client: Client::connect(&args.control_socket, timeout)?, json: args.json };
    let none = json!({});
    match &args.command {
        Command::Attach(attach) => session.show("port.attach", &attach.request(), tables::attached),
        Command::Detach(which) => session.show("port.detach", &which.selector(), tables::detached),
        Command::List => session.show("port.list", &none, tables::list),
        Command::Show { id } => session.show("port.show", &Selector::Id(id.clone()), tables::port),
        Command::Sync { ids, remove, .. } => {
            let request = Sync { ids: ids.iter().cloned().collect(), remove: *remove };
            session.show("port.sync", &request, tables::synced)
        }
        Command::Stats { id, watch: false } => session.show("stats", &query(id), |now| stats::totals(&now)),
        Command::Stats { id, watch: true } => stats::watch(&mut session, &query(id)),
        Command::Info => session.show("info", &none, tables::info),
    }
}

fn query(id: &Option<PortId>) -> StatsQuery {
    StatsQuery { id: id.clone() }
}

/// A connection, and how its answers are printed.
struct Session {
    client: Client,
    json: bool,
}

impl Session {
    /// Asks, and prints the result: as it came, or as text.
    fn show<R: DeserializeOwned>(
        &mut self,
        method: &str,
        params: &impl Serialize,
        text: impl FnOnce(R) -> String,
    ) -> Result<(), End> {
        if self.json {
            let result = self.client.call::<Value>(method, params)?;
            print(&format!("{result}\n"))
        } else {
            let result = self.client.call(method, params)?;
            print(&text(result))
        }
    }
}

/// Prints to stdout, at once.
fn print(text: &str) -> Result<(), End> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(|_| End::Unread)
}

/// Is somebody looking?
fn on_terminal() -> bool {
    std::io::stdout().is_terminal()
}
