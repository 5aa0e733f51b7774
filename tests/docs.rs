//! The documents say what the programs do: their examples are read by the types that clients' lines are
//! read by, and what the programs list about themselves is looked for in the documents.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use clap::Parser;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use virtio_forwarder::Error;
use virtio_forwarder::config::{Args, Config};
use virtio_forwarder::control::Failure;
use virtio_forwarder::control::api::{Attached, Detached, Info, Method, PortList, PortView, State, Stats, Synced};
use virtio_forwarder::control::rpc::{self, Request, RpcError};
use virtio_forwarder::relay::Dropped;

const DOCUMENTS: [&str; 5] =
    ["README.md", "docs/control.md", "docs/configuration.md", "docs/operating.md", "docs/vf-lab.md"];

fn read(document: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(document);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn all_documents() -> String {
    DOCUMENTS.map(read).join("\n")
}

/// The fenced blocks of a language, each with the number of its first line.
fn blocks(text: &str, language: &str) -> Vec<(usize, String)> {
    let mut found = vec![];
    let mut lines = (1..).zip(text.lines());
    while let Some((number, line)) = lines.next() {
        let Some(tag) = line.trim_start().strip_prefix("```") else { continue };
        let body: Vec<_> = lines.by_ref().map(|(_, line)| line).take_while(|line| !line.starts_with("```")).collect();
        if tag == language {
            found.push((number + 1, body.join("\n")));
        }
    }
    found
}

/// A whole word of a document: `--cores` is not found in `--cores-of-mine`.
fn mentions(text: &str, word: &str) -> bool {
    let part_of_word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    text.match_indices(word)
        .any(|(at, _)| !text[..at].ends_with(part_of_word) && !text[at + word.len()..].starts_with(part_of_word))
}

/// Reads `result` as `T`; a member that `T` does not have, or that is missing, shows in what is written again.
fn is_a<T: DeserializeOwned + Serialize>(result: &Value) -> Result<(), String> {
    let typed: T = serde_json::from_value(result.clone()).map_err(|error| error.to_string())?;
    let again = serde_json::to_value(&typed).map_err(|error| error.to_string())?;
    if again == *result { Ok(()) } else { Err(format!("reads as {again}")) }
}

fn check_result(method: &str, result: &Value) -> Result<(), String> {
    match method {
        "port.attach" => is_a::<Attached>(result),
        "port.detach" => is_a::<Detached>(result),
        "port.list" => is_a::<PortList>(result),
        "port.show" => is_a::<PortView>(result),
        "port.sync" => is_a::<Synced>(result),
        "stats" => is_a::<Stats>(result),
        "info" => is_a::<Info>(result),
        other => Err(format!("no result of method {other:?} is known")),
    }
}

/// One of each class, with its number and name.
fn error_classes() -> Vec<(i32, String)> {
    let text = String::new;
    let ours = [
        Error::Invalid(text()),
        Error::NotAllowed(text()),
        Error::NotFound(text()),
        Error::Conflict(text()),
        Error::VfAbsent(text()),
        Error::Exhausted(text()),
        Error::Dpdk { call: "", subject: text(), errno: 1, hint: "" },
        Error::io("")(std::io::Error::from_raw_os_error(1)),
        Error::Memory(text()),
        Error::Protocol(text()),
    ];
    let mut classes: Vec<_> = ours
        .into_iter()
        .map(|error| (error.code().to_owned(), Failure::from(error).number()))
        .map(|(name, number)| (number, name))
        .collect();
    // Those of JSON-RPC itself, from lines that provoke them.
    for line in ["{", "[]", r#"{"jsonrpc":"2.0","method":"info","params":[]}"#] {
        let (_, error) = Request::parse(line.as_bytes()).unwrap_err();
        classes.push((error.code, error.class().to_owned()));
    }
    let error = Method::parse("nothing", Map::new()).unwrap_err();
    classes.push((error.code, error.class().to_owned()));
    classes
}

#[test]
fn requests_and_answers_in_the_protocol_are_what_the_daemon_reads_and_writes() {
    let text = read("docs/control.md");
    let classes = error_classes();
    let mut asked: Option<(Request, Result<(), RpcError>)> = None;
    let mut answered = BTreeSet::new();
    for (line, block) in blocks(&text, "json") {
        for value in serde_json::Deserializer::from_str(&block).into_iter::<Value>() {
            let value = value.unwrap_or_else(|error| panic!("docs/control.md:{line}: {error}"));
            if value.get("method").is_some() {
                let request = Request::parse(value.to_string().as_bytes());
                let request = request.unwrap_or_else(|(_, error)| panic!("docs/control.md:{line}: {error:?}"));
                let understood = Method::parse(&request.method, request.params.clone()).map(drop);
                asked = Some((request, understood));
                continue;
            }
            let (request, understood) = asked.take().unwrap_or_else(|| panic!("docs/control.md:{line}: to no request"));
            assert_eq!(value["jsonrpc"], "2.0", "docs/control.md:{line}");
            assert_eq!(Some(&value["id"]), request.id.as_ref(), "docs/control.md:{line}: another id");
            match (value.get("result"), value.get("error")) {
                (Some(result), None) => {
                    understood.unwrap_or_else(|error| panic!("docs/control.md:{line}: {error:?}"));
                    check_result(&request.method, result)
                        .unwrap_or_else(|error| panic!("docs/control.md:{line}: {}: {error}", request.method));
                    answered.insert(request.method);
                }
                (None, Some(error)) => {
                    let error: RpcError = serde_json::from_value(error.clone()).expect("an error object");
                    let class = (error.code, error.class().to_owned());
                    assert!(classes.contains(&class), "docs/control.md:{line}: no error is {class:?}");
                    // What the parser refuses, it refuses in these words; what it takes, control refused.
                    match understood {
                        Err(refusal) => assert_eq!(refusal, error, "docs/control.md:{line}"),
                        Ok(()) => assert_ne!(error.code, rpc::INVALID_PARAMS, "docs/control.md:{line}"),
                    }
                }
                _ => panic!("docs/control.md:{line}: neither result nor error"),
            }
        }
        assert!(!block.trim().is_empty(), "docs/control.md:{line}: empty");
    }
    assert!(asked.is_none(), "the last request has no answer: {asked:?}");
    assert_eq!(answered, Method::NAMES.map(str::to_owned).into(), "methods with an answered example");
}

#[test]
fn every_error_state_and_cause_is_explained() {
    let control = read("docs/control.md");
    for (number, name) in error_classes() {
        let row = format!("| {number} | `{name}` |");
        assert!(control.contains(&row), "docs/control.md has no row {row:?}");
    }
    use State::*;
    for state in [Attaching, Waiting, Starting, Ready, Connected, Detaching] {
        let row = format!("| `{state}` |");
        assert!(control.contains(&row), "docs/control.md has no row {row:?}");
    }
    let operating = read("docs/operating.md");
    let Ok(Value::Object(causes)) = serde_json::to_value(Dropped::default()) else { panic!("an object") };
    for cause in causes.keys() {
        let row = format!("| `{cause}` |");
        assert!(operating.contains(&row), "docs/operating.md has no row {row:?}");
    }
}

/// What a program says about itself.
fn help(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).arg("--help").output().expect("the program runs");
    assert!(output.status.success(), "{program} {arguments:?} --help");
    String::from_utf8(output.stdout).expect("help is text")
}

#[test]
fn every_flag_and_variable_of_the_programs_is_documented() {
    let daemon = help(env!("CARGO_BIN_EXE_virtio-forwarder"), &[]);
    let vfctl = env!("CARGO_BIN_EXE_vfctl");
    let overview = help(vfctl, &[]);
    let commands: Vec<_> = overview
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .map_while(|line| line.split_whitespace().next())
        .filter(|command| *command != "help")
        .collect();
    assert!(commands.contains(&"attach") && commands.contains(&"sync"), "{commands:?}");
    let mut texts = vec![daemon, overview.clone()];
    texts.extend(commands.iter().map(|command| help(vfctl, &[command])));

    let documents = all_documents();
    for command in commands {
        assert!(mentions(&documents, command), "vfctl {command} is in no document");
    }
    let mut flags = BTreeSet::new();
    for text in &texts {
        for word in text.split(|c: char| c.is_whitespace() || "[],|<>.()".contains(c)) {
            if word.strip_prefix("--").is_some_and(|name| name.starts_with(|c: char| c.is_ascii_lowercase())) {
                flags.insert(word);
            }
        }
        let variables = text.match_indices("[env: ").map(|(at, tag)| &text[at + tag.len()..]);
        flags.extend(variables.filter_map(|rest| rest.split('=').next()));
    }
    assert!(flags.len() > 30, "help is not understood: {flags:?}");
    for flag in flags {
        assert!(mentions(&documents, flag), "{flag} is in no document");
    }
}

/// What depends on the machine is replaced by what every machine has.
fn portable(example: &str) -> String {
    let mut table: toml::Table = example.parse().expect("TOML");
    let cpus = rustix::thread::sched_getaffinity(None).expect("affinity");
    let cpu = (0..rustix::thread::CpuSet::MAX_CPU).find(|cpu| cpus.is_set(*cpu)).expect("a CPU");
    for (key, value) in &mut table {
        match key.as_str() {
            "cores" => *value = cpu.to_string().into(),
            "control_group" | "socket_owner" | "socket_group" => *value = "root".into(),
            _ => {}
        }
    }
    table.to_string()
}

fn load(directory: &Path, text: &str) -> Result<Config, Error> {
    let path = directory.join("config.toml");
    fs::write(&path, text).expect("write the configuration");
    Config::new(Args::parse_from(["virtio-forwarder".as_ref(), "--config".as_ref(), path.as_os_str()]))
}

#[test]
fn the_example_configuration_is_accepted_and_complete() {
    let directory = tempfile::tempdir().unwrap();
    let text = read("docs/configuration.md");
    let examples = blocks(&text, "toml");
    assert!(!examples.is_empty());
    for (line, example) in &examples {
        load(directory.path(), &portable(example))
            .unwrap_or_else(|error| panic!("docs/configuration.md:{line}: {error}"));
    }
    // The daemon names all keys to who misspells one beyond recognition.
    let error = load(directory.path(), "qqqqqqqqqqqq = 1\n").unwrap_err().to_string();
    let keys: Vec<_> = error.rsplit("there are ").next().unwrap_or_default().split(", ").collect();
    assert!(keys.contains(&"control_socket"), "{error}");
    let complete: toml::Table = examples[0].1.parse().expect("TOML");
    for key in keys {
        assert!(complete.contains_key(key), "the complete example lacks {key}");
        assert!(text.contains(&format!("| `{key}` |")), "docs/configuration.md has no row for {key}");
    }
}

#[test]
fn links_lead_somewhere() {
    for document in DOCUMENTS {
        let text = read(document);
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join(document).parent().unwrap().to_owned();
        for (at, _) in text.match_indices("](") {
            let target = text[at + 2..].split(')').next().unwrap_or_default();
            let path = target.split('#').next().unwrap_or_default();
            if !path.is_empty() && !target.contains("://") {
                assert!(directory.join(path).exists(), "{document}: nothing is at {target}");
            }
        }
    }
}
