//! What goes over the socket, well-formed and not.

use std::io::{ErrorKind, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};
use virtio_forwarder::control::MAX_LINE;

use crate::daemon::{BROKEN_VF, Daemon, SLOW, SLOW_VF};
use crate::tries::{once_of_several, quicker};

fn request(id: u32, method: &str, params: Value) -> String {
    json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params}).to_string()
}

fn attach(daemon: &Daemon, id: u32, port: &str, vf: &str) -> String {
    let socket = daemon.port_socket(port);
    request(id, "port.attach", json!({"id": port, "socket": {"path": socket}, "vfs": [vf]}))
}

#[test]
fn malformed_lines_get_the_error_of_the_specification_and_the_connection_lives() {
    let daemon = Daemon::start();
    let mut client = daemon.connect();
    for (line, code, id) in [
        ("{", -32700, Value::Null),
        ("\u{7f}nonsense", -32700, Value::Null),
        ("[]", -32600, Value::Null),
        (r#"[{"jsonrpc":"2.0","id":1,"method":"info"}]"#, -32600, Value::Null),
        (r#"{"id":5,"method":"info"}"#, -32600, json!(5)),
        (r#"{"jsonrpc":"2.0","id":"six","method":"nothing"}"#, -32601, json!("six")),
        (r#"{"jsonrpc":"2.0","id":7,"method":"port.show","params":{"name":"x"}}"#, -32602, json!(7)),
        (r#"{"jsonrpc":"2.0","id":8,"method":"port.show","params":[1]}"#, -32602, json!(8)),
        (r#"{"jsonrpc":"2.0","id":9,"method":"port.show","params":{"id":"x"}}"#, -32003, json!(9)),
    ] {
        let answer = client.ask(line);
        assert_eq!((&answer["error"]["code"], &answer["id"]), (&json!(code), &id), "{line}: {answer}");
        assert_eq!(answer["jsonrpc"], "2.0");
        assert!(answer["error"]["data"]["code"].is_string(), "{answer}");
        assert_eq!(answer.get("result"), None);
    }
    client.send(b"\xff\xfe{}\n");
    assert_eq!(client.receive().unwrap()["error"]["code"], -32700);
    // Empty lines are nothing; a carriage return does no harm.
    client.send("\n \r\n{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"info\"}\r\n");
    assert_eq!(client.receive().unwrap()["result"]["dpdk_version"], "DPDK of the test");
}

#[test]
fn notifications_are_carried_out_and_not_answered() {
    let daemon = Daemon::start();
    let mut client = daemon.connect();
    let socket = daemon.port_socket("a");
    let params = json!({"id": "a", "socket": {"path": socket}, "vfs": ["soft:null"]});
    client.send(format!("{}\n", json!({"jsonrpc": "2.0", "method": "port.attach", "params": params})));
    client.send("{\"jsonrpc\":\"2.0\",\"method\":\"nothing\"}\n");
    // The same attach as a request waits for the first, and finds it done.
    let answer = client.ask(&attach(&daemon, 1, "a", "soft:null"));
    assert_eq!((&answer["id"], &answer["result"]["changed"]), (&json!(1), &json!(false)));
}

#[test]
fn a_last_line_without_end_counts_and_half_a_connection_is_enough() {
    let daemon = Daemon::start();
    let mut client = daemon.connect();
    client.send(attach(&daemon, 1, "slow", SLOW_VF));
    client.0.get_ref().shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.receive().unwrap()["result"]["port"]["state"], "ready");
    assert_eq!(client.receive(), None, "then the daemon hangs up");
}

#[test]
fn a_slow_vf_delays_nobody_else() {
    once_of_several(beside_a_slow_vf);
}

fn beside_a_slow_vf() -> Result<(), String> {
    let daemon = Daemon::start();
    let (mut slow, mut quick) = (daemon.connect(), daemon.connect());
    let begin = Instant::now();
    slow.send(attach(&daemon, 1, "slow", SLOW_VF) + "\n");
    let (mut lists, mut longest) = (0, Duration::ZERO);
    // Lists, attaches and detaches of others all happen while the VF starts.
    while begin.elapsed() < SLOW / 2 {
        let asked = Instant::now();
        quick.ask(&attach(&daemon, 2, "quick", "soft:null"));
        let list = quick.ask(&request(3, "port.list", json!({})));
        quick.ask(&request(4, "port.detach", json!({"id": "quick"})));
        longest = longest.max(asked.elapsed());
        // Where the machine has stopped us for so long, it is ready by now.
        if begin.elapsed() < SLOW {
            assert_eq!(list["result"]["ports"][1]["state"], "attaching");
        }
        lists += 1;
    }
    if lists <= 10 {
        return Err(format!("only {lists} rounds while a VF starts"));
    }
    quicker("a round beside it", longest, SLOW / 5)?;
    // On the same connection too: answers come when they are known.
    slow.send(request(2, "port.list", json!({})) + "\n");
    let sent = begin.elapsed();
    let ids = [(); 2].map(|()| slow.receive().unwrap()["id"].clone());
    assert!(begin.elapsed() >= SLOW);
    quicker("to ask for a list", sent, SLOW)?;
    assert_eq!(ids, [2, 1]);
    Ok(())
}

#[test]
fn what_a_client_asked_for_is_done_after_it_left() {
    let daemon = Daemon::start();
    let mut client = daemon.connect();
    client.send(attach(&daemon, 1, "slow", SLOW_VF) + "\n");
    let mut other = daemon.connect();
    // Until the daemon has read it.
    while other.ask(&request(1, "info", json!({})))["result"]["ports"] != 1 {}
    drop(client);
    let answer = other.ask(&attach(&daemon, 2, "slow", SLOW_VF));
    assert_eq!((&answer["result"]["changed"], &answer["result"]["port"]["state"]), (&json!(false), &json!("ready")));
}

#[test]
fn a_failed_attach_leaves_nothing() {
    let daemon = Daemon::start();
    let mut client = daemon.connect();
    let answer = client.ask(&attach(&daemon, 1, "a", BROKEN_VF));
    assert_eq!(answer["error"]["data"]["code"], "exhausted");
    assert_eq!(answer["error"]["message"], "no hugepages are left: reserve more");
    assert_eq!(client.ask(&request(2, "port.list", json!({})))["result"]["ports"], json!([]));
}

#[test]
fn a_line_without_end_is_refused_and_ends_the_connection() {
    let daemon = Daemon::start();
    let mut client = daemon.connect();
    client.send(vec![b'x'; MAX_LINE]);
    let answer = client.receive().unwrap();
    assert_eq!(answer["error"]["code"], -32600);
    assert!(answer["error"]["message"].as_str().unwrap().contains("65536"));
    assert_eq!(client.receive(), None);
    // One byte less, with its end, is a line.
    let mut client = daemon.connect();
    client.send([vec![b'x'; MAX_LINE - 1], vec![b'\n']].concat());
    assert_eq!(client.receive().unwrap()["error"]["code"], -32700);
    assert!(client.ask(&request(1, "info", json!({})))["result"].is_object());
}

#[test]
fn a_client_that_does_not_read_is_not_listened_to_for_ever() {
    let daemon = Daemon::start();
    let mut deaf = daemon.connect();
    let stream = deaf.0.get_mut();
    stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let line = request(1, "info", json!({})) + "\n";
    let mut sent = 0_usize;
    let blocked = loop {
        match stream.write(line.as_bytes()) {
            Ok(bytes) => sent += bytes,
            Err(error) => break error,
        }
        assert!(sent < 64 << 20, "the daemon takes in everything");
    };
    assert_eq!(blocked.kind(), ErrorKind::WouldBlock);
    // Others are served, and the deaf one gets its answers when it listens.
    assert!(daemon.connect().ask(&line)["result"].is_object());
    assert_eq!(deaf.receive().unwrap()["id"], 1);
}

/// Every flooder's buffer is full of blank lines again and again; another client's requests go through.
#[test]
fn clients_that_flood_delay_others_little() {
    let daemon = Daemon::start();
    let over = Arc::new(AtomicBool::new(false));
    let flooders: Vec<_> = (0..8)
        .map(|_| {
            let (mut client, over) = (daemon.connect(), Arc::clone(&over));
            std::thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    client.send(vec![b'\n'; MAX_LINE]);
                }
            })
        })
        .collect();
    let mut client = daemon.connect();
    let line = request(1, "port.list", json!({}));
    std::thread::sleep(Duration::from_millis(200));
    // Behind all of them each time it would be seconds.
    let all = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        once_of_several(|| {
            let mut times: Vec<_> = (0..20)
                .map(|_| {
                    let begin = Instant::now();
                    assert!(client.ask(&line)["result"].is_object());
                    begin.elapsed()
                })
                .collect();
            times.sort();
            quicker("a list beside eight that flood", times[10], Duration::from_millis(50))
        });
    }));
    over.store(true, Ordering::Relaxed);
    // They may be writing; the daemon goes on reading until they are done.
    flooders.into_iter().for_each(|flooder| flooder.join().unwrap());
    all.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

/// More lines than one turn takes, sent at once: the rest does not wait for the client to say more.
#[test]
fn lines_sent_at_once_are_all_answered() {
    let daemon = Daemon::start();
    let mut client = daemon.connect();
    let lines: String = (0..300).map(|id| request(id, "info", json!({})) + "\n\n").collect();
    client.send(&lines);
    for id in 0..300 {
        assert_eq!(client.receive().expect("an answer")["id"], id);
    }
    // Also when it does not hear the answers.
    let lines: String = (0..25).map(|id| attach(&daemon, id, &format!("p{id}"), "soft:null") + "\n").collect();
    let mut leaving = daemon.connect();
    leaving.send(&lines);
    drop(leaving);
    let begin = Instant::now();
    while client.ask(&request(1, "port.list", json!({})))["result"]["ports"].as_array().unwrap().len() < 25 {
        assert!(begin.elapsed() < Duration::from_secs(60));
    }
}

/// In a process of its own: the limit is one of the process.
#[test]
fn a_limit_of_open_files_lowered_below_those_open_is_survived() {
    const ALONE: &str = "VIRTIO_FORWARDER_TEST_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let name = "socket::a_limit_of_open_files_lowered_below_those_open_is_survived";
        let mut alone = std::process::Command::new(std::env::current_exe().unwrap());
        let output = alone.args(["--exact", name, "--nocapture"]).env(ALONE, "1").output().unwrap();
        return assert!(output.status.success(), "{output:?}");
    }
    let daemon = Daemon::start();
    let mut client = daemon.connect();
    let line = request(1, "info", json!({}));
    assert!(client.ask(&line)["result"].is_object());
    let limit = getrlimit(Resource::Nofile);
    // Poll looks at three: the wake-up, the listener and the client.
    setrlimit(Resource::Nofile, Rlimit { current: Some(2), ..limit }).unwrap();
    // Ends the poll of the moment; the next one fails. Or this one does: the daemon may not have come to it yet, and
    // then answers only when it can poll again.
    client.send(format!("{line}\n"));
    std::thread::sleep(Duration::from_millis(250));
    client.send(format!("{line}\n"));
    setrlimit(Resource::Nofile, limit).unwrap();
    for _ in 0..2 {
        assert!(client.receive().expect("the daemon lives")["result"].is_object());
    }
    assert!(daemon.connect().ask(&line)["result"].is_object());
}

#[test]
fn clients_are_bounded() {
    let daemon = Daemon::start();
    let line = request(1, "info", json!({}));
    let mut first = daemon.connect();
    let most = first.ask(&line)["result"]["limits"]["clients"].as_u64().unwrap() as usize;
    let mut clients: Vec<_> = (1..most).map(|_| daemon.connect()).collect();
    clients.iter_mut().for_each(|client| drop(client.ask(&line)));
    let mut refused = daemon.connect();
    assert_eq!(refused.receive().unwrap()["error"]["data"]["code"], "exhausted");
    assert_eq!(refused.receive(), None);
    drop(clients.pop());
    // There is room again as soon as the daemon has noticed.
    let begin = Instant::now();
    loop {
        let mut client = daemon.connect();
        let _ = client.0.get_mut().write_all(format!("{line}\n").as_bytes());
        let mut answer = String::new();
        let _ = std::io::BufRead::read_line(&mut client.0, &mut answer);
        if answer.contains("\"result\"") {
            return;
        }
        assert!(begin.elapsed() < Duration::from_secs(60));
    }
}

#[test]
fn stop_detaches_everything_and_removes_the_socket() {
    let mut daemon = Daemon::start();
    let mut client = daemon.connect();
    client.ask(&attach(&daemon, 1, "a", "soft:null"));
    client.ask(&attach(&daemon, 2, "b", "vdev:net_null0"));
    let path = daemon.socket();
    daemon.stop();
    assert!(!path.exists());
    assert!(UnixStream::connect(path).is_err());
    assert_eq!(client.receive(), None);
}
