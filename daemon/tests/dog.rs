//! The binary `dog` against nodes that answer as told. The examples of `docs/dog.md` are what the
//! node answers and what `dog` must print, so they cannot be wrong either.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

use serde_json::{Value, json};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Output, Stdio};
use std::thread::JoinHandle;

const DOCS: &str = include_str!("../../docs/dog.md");
const WELCOME: u8 = 0;
const WRONG_VERSION: u8 = 1;
const BUSY: u8 = 3;

/// A node for one connection. What it says is written here byte by byte, not with the library's
/// codec: both would be wrong together.
struct FakeNode {
    address: SocketAddr,
    thread: JoinHandle<Option<Value>>,
}

impl FakeNode {
    /// Talks to one client with `script`, which returns the request if it took one.
    fn start(script: impl FnOnce(TcpStream) -> Option<Value> + Send + 'static) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let thread = std::thread::spawn(move || script(listener.accept().unwrap().0));
        Self { address, thread }
    }

    /// Says hello, takes a request and sends `frame`, then hangs up.
    fn sending(frame: Vec<u8>) -> Self {
        Self::start(move |mut stream| {
            greet(&mut stream, 1, WELCOME);
            let request = take_request(&mut stream);
            stream.write_all(&frame).unwrap();
            Some(request)
        })
    }

    /// Answers a request with `response`.
    fn answering(response: &Value) -> Self {
        Self::sending(frame(response.to_string().as_bytes()))
    }

    /// Runs `dog` with `args` against this node; its output, and the request that the node got.
    fn dog(self, args: &[&str]) -> (Output, Option<Value>) {
        let output = dog(args).env("SHEEPDOG_NODE", self.address.to_string()).output().unwrap();
        (output, self.thread.join().unwrap())
    }
}

/// The answer to a hello, after a look at the hello.
fn greet(stream: &mut TcpStream, version: u16, verdict: u8) {
    let mut hello = [0; 32];
    stream.read_exact(&mut hello).unwrap();
    assert_eq!(hello[..16], *b"SHEEPDOG\x01\0\x02\0\x01\0\0\0", "hello of a control connection");
    let mut answer = *b"SHEEPDOG\0\0\0\0\0\0\0\0ccccccccnnnnnnnn";
    answer[8..10].copy_from_slice(&version.to_le_bytes());
    answer[12..14].copy_from_slice(&version.to_le_bytes());
    answer[10] = verdict;
    stream.write_all(&answer).unwrap();
}

fn take_request(stream: &mut TcpStream) -> Value {
    let mut head = [0; 5];
    stream.read_exact(&mut head).unwrap();
    assert_eq!(head[4], 2, "type of an administration request");
    let len = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
    let mut body = vec![0; len - 1];
    stream.read_exact(&mut body).unwrap();
    serde_json::from_slice(&body).unwrap()
}

fn frame(body: &[u8]) -> Vec<u8> {
    let len = body.len() as u32 + 1;
    [&len.to_le_bytes(), &[0][..], body].concat()
}

fn dog(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dog"));
    command.args(args).env_remove("SHEEPDOG_NODE").stdin(Stdio::null());
    command
}

/// A loopback address that refuses connections as long as the listener lives: its port is taken
/// on another loopback address, so that nothing can listen on it everywhere.
fn refusing() -> (TcpListener, SocketAddr) {
    let holder = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = holder.local_addr().unwrap().port();
    (holder, SocketAddr::from((Ipv4Addr::new(127, 83, 1, 2), port)))
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

/// `dog` failed with exit code 1, printed nothing, and said one line with all `parts` in it.
#[track_caller]
fn assert_failed(output: &Output, parts: &[&str]) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert_eq!(stdout(output), "");
    assert!(text.starts_with("dog: ") && text.lines().count() == 1, "{text:?}");
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
}

/// An example of the documentation.
struct Example {
    args: Vec<&'static str>,
    human: &'static str,
    json: Value,
}

/// Every console block that begins with `$ dog`, with the JSON block that follows it.
fn examples() -> Vec<Example> {
    let mut examples = Vec::new();
    for part in DOCS.split("```console\n$ dog ").skip(1) {
        let (line, rest) = part.split_once('\n').unwrap();
        let (human, rest) = rest.split_once("```\n").unwrap();
        let json = rest.strip_prefix("\n```json\n").expect(line).split_once("```\n").unwrap().0;
        let json = serde_json::from_str(json).unwrap_or_else(|error| panic!("{line}: {error}"));
        examples.push(Example { args: line.split(' ').collect(), human, json });
    }
    examples
}

/// The requests of the examples, as `docs/protocol.md` has them.
fn expected_request(args: &[&str]) -> Value {
    let incoming = args.contains(&"--incoming");
    let add = |protocol: &str, address: &str| {
        json!({"command": "export-add", "volume": "vm1", "protocol": protocol, "address": address,
            "incoming": incoming})
    };
    match args.join(" ").as_str() {
        "cluster info" => json!({"command": "cluster-info"}),
        "cluster health" => json!({"command": "cluster-health"}),
        "cluster set" => json!({"command": "cluster-settings", "name": null}),
        "cluster set down-out-interval 30m" => {
            json!({"command": "cluster-set", "name": "down-out-interval", "value": "30m"})
        }
        "node list" => json!({"command": "node-list"}),
        "node drain 10.0.0.6:7000" => {
            json!({"command": "node-drain", "node": "10.0.0.6:7000", "force": false})
        }
        "node undrain 10.0.0.6:7000" => {
            json!({"command": "node-undrain", "node": "10.0.0.6:7000"})
        }
        "node remove 10.0.0.7:7000" => {
            json!({"command": "node-remove", "node": "10.0.0.7:7000", "force": false})
        }
        "node set-weight 8899aabbccddeeff 500" => json!({"command": "node-set-weight",
            "target": "8899aabbccddeeff", "weight": 500, "force": false}),
        "node set-zone 10.0.0.6:7000 rack3" => {
            json!({"command": "node-set-zone", "node": "10.0.0.6:7000", "zone": "rack3"})
        }
        "node disk add /mnt/nvme1" => {
            json!({"command": "node-disk-add", "path": "/mnt/nvme1", "weight": null})
        }
        "node disk remove /var/lib/sheepdog" => {
            json!({"command": "node-disk-remove", "disk": "/var/lib/sheepdog", "force": false})
        }
        "node disk list" => json!({"command": "node-disk-list"}),
        "node recovery" => json!({"command": "node-recovery"}),
        "node recovery pause" => {
            json!({"command": "cluster-set", "name": "recovery.paused", "value": "true"})
        }
        "node scrub start --rate 32MiB" => {
            json!({"command": "node-scrub-start", "rate": 33_554_432})
        }
        "node scrub status" => json!({"command": "node-scrub-status"}),
        "node scrub pause" => json!({"command": "node-scrub-pause"}),
        "volume create vm1 10G" => json!({"command": "volume-create", "name": "vm1",
            "size": 10_737_418_240_u64, "copies": null, "min_copies": null, "ack": "flush"}),
        "volume list" => json!({"command": "volume-list"}),
        "volume info vm1" => json!({"command": "volume-info", "name": "vm1"}),
        "volume end-handover vm1" => json!({"command": "volume-end-handover", "name": "vm1"}),
        "volume detach vm1" => json!({"command": "volume-detach", "name": "vm1", "force": false}),
        "volume detach vm1 --force" => {
            json!({"command": "volume-detach", "name": "vm1", "force": true})
        }
        "volume delete vm1" => json!({"command": "volume-delete", "name": "vm1"}),
        "export add vm1 --nbd /run/sheepdog/vm1.nbd"
        | "export add vm1 --nbd /run/sheepdog/vm1.nbd --incoming" => {
            add("nbd", "/run/sheepdog/vm1.nbd")
        }
        "export add vm1 --nbd 10.0.0.5:10809" => add("nbd", "10.0.0.5:10809"),
        "export add vm1 --vhost-user /run/sheepdog/vm1.sock" => {
            add("vhost-user", "/run/sheepdog/vm1.sock")
        }
        "export list" => json!({"command": "export-list"}),
        "export remove vm1 --vhost-user" => json!({"command": "export-remove", "volume": "vm1",
            "protocol": "vhost-user", "address": null}),
        other => panic!("no request is known for the documented example {other:?}"),
    }
}

#[test]
fn documented_examples_are_what_people_see() {
    let examples = examples();
    assert_eq!(examples.len(), 31, "every command has an example, export add four, detach two");
    for Example { args, human, json } in examples {
        let (output, request) = FakeNode::answering(&json!({"ok": json})).dog(&args);
        assert_eq!(request, Some(expected_request(&args)));
        assert_eq!((stdout(&output), stderr(&output)), (human, ""), "{args:?}");
        assert_eq!(output.status.code(), Some(0));
    }
}

#[test]
fn documented_examples_are_what_scripts_see() {
    for Example { args, json, .. } in examples() {
        let args = [&["--json"], args.as_slice()].concat();
        let (output, request) = FakeNode::answering(&json!({"ok": json})).dog(&args);
        assert_eq!(request, Some(expected_request(&args[1..])));
        assert_eq!(serde_json::from_str::<Value>(stdout(&output)).unwrap(), json, "{args:?}");
        assert!(stdout(&output).ends_with('\n') && stderr(&output).is_empty());
        assert_eq!(output.status.code(), Some(0));
    }
}

#[test]
fn documented_examples_are_what_the_library_promises() {
    use sheepdog::api::{
        ClusterInfo, Detached, DiskInfo, ExportInfo, Health, NodeInfo, Recovery, ScrubInfo,
        SettingInfo, VolumeInfo,
    };
    fn same<T: serde::de::DeserializeOwned + serde::Serialize>(json: &Value) {
        let typed: T = serde_json::from_value(json.clone()).unwrap();
        assert_eq!(serde_json::to_value(typed).unwrap(), *json);
    }
    for Example { args, json, .. } in examples() {
        match args[..2] {
            ["cluster", "info"] => same::<ClusterInfo>(&json),
            ["cluster", "health"] => same::<Health>(&json),
            ["node", "list"] => same::<Vec<NodeInfo>>(&json),
            ["cluster", "set"] => same::<Vec<SettingInfo>>(&json),
            ["node", "drain" | "undrain" | "set-weight" | "set-zone"] => same::<NodeInfo>(&json),
            ["node", "remove"] => assert_eq!(json, Value::Null),
            ["node", "disk"] => same::<Vec<DiskInfo>>(&json),
            ["node", "recovery"] if args.len() > 2 => same::<Vec<SettingInfo>>(&json),
            ["node", "recovery"] => same::<Recovery>(&json),
            ["node", "scrub"] => same::<Vec<ScrubInfo>>(&json),
            ["volume", "detach"] => same::<Detached>(&json),
            ["volume", "create" | "info" | "end-handover"] => same::<VolumeInfo>(&json),
            ["volume", "list"] => same::<Vec<VolumeInfo>>(&json),
            ["volume", "delete"] => assert_eq!(json, Value::Null),
            ["export", "add"] => same::<ExportInfo>(&json),
            ["export", "list" | "remove"] => same::<Vec<ExportInfo>>(&json),
            _ => panic!("no type is known for the documented example {args:?}"),
        }
    }
}

#[test]
fn options_of_a_command_reach_the_node() {
    let error = json!({"error": "no"});
    let create =
        ["volume", "create", "v", "1.5K", "--copies", "2", "--min-copies", "1", "--ack", "commit"];
    let (_, request) = FakeNode::answering(&error).dog(&create);
    let expected = json!({"command": "volume-create", "name": "v", "size": 1536, "copies": 2,
        "min_copies": 1, "ack": "commit"});
    assert_eq!(request, Some(expected));
    for (args, protocol, address) in [
        (&[][..], json!(null), json!(null)),
        (&["--nbd"], json!("nbd"), json!(null)),
        (&["--nbd", "[::1]:10809"], json!("nbd"), json!("[::1]:10809")),
        (&["--vhost-user", "/s"], json!("vhost-user"), json!("/s")),
    ] {
        let args = [&["export", "remove", "v"], args].concat();
        let (_, request) = FakeNode::answering(&error).dog(&args);
        let expected = json!({"command": "export-remove", "volume": "v", "protocol": protocol,
                              "address": address});
        assert_eq!(request, Some(expected));
    }
}

/// Answers requests with `answer` until none comes any more; gives the requests.
fn node_that_goes_on(
    mut answer: impl FnMut(&Value) -> Option<Value> + Send + 'static,
) -> (SocketAddr, JoinHandle<Vec<Value>>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let thread = std::thread::spawn(move || {
        let mut requests = Vec::new();
        loop {
            let mut stream = listener.accept().unwrap().0;
            greet(&mut stream, 1, WELCOME);
            let request = take_request(&mut stream);
            let response = answer(&request);
            requests.push(request);
            let Some(response) = response else { return requests };
            stream.write_all(&frame(response.to_string().as_bytes())).unwrap();
        }
    });
    (address, thread)
}

fn a_plan(volumes: &Value) -> Value {
    json!({"ok": {"epoch": 12, "still_waiting": 0, "volumes": volumes, "waiting": [],
        "disks": [{"disk": "0123456789abcdef", "address": "10.0.0.7:7000", "down_since": null}]}})
}

/// Runs `dog cluster recover ARGS` with `typed` as input; its output and what it gave up.
fn recover(args: &[&str], typed: &str, volumes: Value) -> (Output, Option<Value>) {
    let (orders, given_up) = std::sync::mpsc::channel();
    let (address, _thread) = node_that_goes_on(move |request| {
        if request["command"] == "cluster-recover-plan" {
            return Some(a_plan(&volumes));
        }
        orders.send(request.clone()).unwrap();
        Some(json!({"ok": null}))
    });
    let args = [&["cluster", "recover"], args].concat();
    let mut dog = dog(&args);
    dog.env("SHEEPDOG_NODE", address.to_string()).stdin(Stdio::piped());
    let mut child = dog.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let _ = child.stdin.take().unwrap().write_all(typed.as_bytes()); // it may have ended
    (child.wait_with_output().unwrap(), given_up.try_recv().ok())
}

#[test]
fn nothing_is_given_up_without_force_and_a_word() {
    let loss = json!([{"volume": "vm1", "objects": 9, "gone": 3, "older": 0,
        "older_since_epoch": null, "older_since": null}]);
    for (args, typed) in [(&[][..], "give up\n"), (&["--force"], ""), (&["--force"], "yes\n")] {
        let (output, given_up) = recover(args, typed, loss.clone());
        assert_eq!((output.status.code(), given_up), (Some(1), None), "{args:?}");
        assert!(stderr(&output).contains("nothing was changed"));
        assert!(stdout(&output).contains("vm1, of 9: 3 without any replica"), "the plan is shown");
    }
    let expected =
        json!({"command": "cluster-recover", "disks": ["0123456789abcdef"], "epoch": 12});
    for (args, typed) in [(&["--force"][..], "give up\n"), (&["--force", "--yes"], "")] {
        let (output, given_up) = recover(args, typed, loss.clone());
        assert_eq!((output.status.code(), given_up), (Some(0), Some(expected.clone())), "{args:?}");
    }
    let (output, given_up) = recover(&[], "", json!([]));
    assert_eq!((output.status.code(), given_up), (Some(0), None), "nothing would be lost");
}

#[test]
fn waiting_for_a_drain_ends_when_it_is_done_and_prints_one_document() {
    let node = |drained| {
        json!({"id": "a", "address": "1.2.3.4:5", "zone": "z", "state": "draining",
            "drained": drained, "entered": 1, "cluster_version": 6, "disks": []})
    };
    let mut asked = 0;
    let (address, _thread) = node_that_goes_on(move |request| {
        let answer = match request["command"].as_str()? {
            "node-drain" => node(false),
            "node-recovery" => json!({"paused": false, "nodes": []}),
            "node-list" => {
                asked += 1;
                json!([node(asked == 3)])
            }
            _ => return None,
        };
        Some(json!({"ok": answer}))
    });
    let output = dog(&["--json", "node", "drain", "1.2.3.4:5", "--wait"])
        .env("SHEEPDOG_NODE", address.to_string())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(serde_json::from_str::<Value>(stdout(&output)).unwrap(), node(true));
    assert!(stderr(&output).contains("no recovery"), "the progress: {}", stderr(&output));
}

#[test]
fn watching_the_health_ends_when_all_is_well() {
    let slots = json!({"total": 3, "complete": 3, "degraded": 0, "waiting": 0});
    let mut asked = 0;
    let (address, _thread) = node_that_goes_on(move |request| {
        let answer = match request["command"].as_str()? {
            "cluster-health" => {
                asked += 1;
                let status = ["unavailable", "degraded", "ok"][asked.min(3) - 1];
                json!({"status": status, "epoch": 1, "reasons": [], "slots": slots})
            }
            _ => json!({"paused": true, "nodes": []}),
        };
        Some(json!({"ok": answer}))
    });
    let output = dog(&["cluster", "health", "--watch"])
        .env("SHEEPDOG_NODE", address.to_string())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let words: Vec<&str> = stdout(&output).lines().filter_map(|l| l.split(':').next()).collect();
    assert_eq!(words, ["unavailable", "degraded", "ok"]);
}

#[test]
fn relative_sockets_are_sent_as_absolute_paths() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path().canonicalize().unwrap();
    for option in ["--nbd", "--vhost-user"] {
        let node = FakeNode::answering(&json!({"error": "no"}));
        dog(&["export", "add", "v", option, "./sub/a:b"])
            .current_dir(&here)
            .env("SHEEPDOG_NODE", node.address.to_string())
            .output()
            .unwrap();
        let request = node.thread.join().unwrap().unwrap();
        assert_eq!(request["address"], json!(here.join("sub/a:b")));
    }
}

#[test]
fn the_node_is_chosen_by_option_before_environment() {
    let (_holder, refused) = refusing();
    let volumes = json!({"ok": []});
    for place in 0..3 {
        let node = FakeNode::answering(&volumes);
        let address = node.address.to_string();
        let mut args = vec!["vdi", "list"];
        args.splice(place..place, ["--node", &address]);
        let output = dog(&args).env("SHEEPDOG_NODE", refused.to_string()).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", stderr(&output));
        assert_eq!(node.thread.join().unwrap(), Some(json!({"command": "volume-list"})));
    }
}

#[test]
fn json_stands_anywhere_and_passes_through_the_unknown() {
    let answer = json!([{"later": {"release": [1, null, 18_446_744_073_709_551_615_u64]}}]);
    for args in [["--json", "node", "list"], ["node", "--json", "list"], ["node", "list", "--json"]]
    {
        let (output, _) = FakeNode::answering(&json!({"ok": answer})).dog(&args);
        assert_eq!(serde_json::from_str::<Value>(stdout(&output)).unwrap(), answer);
    }
}

#[test]
fn errors_of_the_node_are_shown_as_it_says_them() {
    for args in [&["volume", "delete", "v"][..], &["--json", "volume", "delete", "v"]] {
        let node = FakeNode::answering(&json!({"error": "volume v is attached; \u{1b}[1m detach"}));
        let (output, _) = node.dog(args);
        assert_failed(&output, &[r"volume v is attached; \u{1b}[1m detach"]);
    }
}

#[test]
fn health_is_answered_with_0_however_bad() {
    let health = json!({"status": "unavailable", "epoch": 1, "reasons": ["first", "second"],
        "slots": {"total": 3, "complete": 1, "degraded": 0, "waiting": 2}});
    let (output, _) = FakeNode::answering(&json!({"ok": health})).dog(&["cluster", "health"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(stdout(&output).contains("unavailable"));
    assert!(stdout(&output).ends_with("\n\n- first\n- second\n"));
}

#[test]
fn refused_connections_name_the_node_and_the_way_out() {
    let (_holder, refused) = refusing();
    let refused = refused.to_string();
    let output = dog(&["volume", "delete", "v", "--node", &refused]).output().unwrap();
    assert_failed(
        &output,
        &[&refused, "connection refused", "nothing was changed", "--node IP:PORT", "SHEEPDOG_NODE"],
    );
}

#[test]
fn other_ends_that_are_no_node_of_this_release_are_named() {
    for (version, verdict, parts) in [
        (9, WRONG_VERSION, ["version 9", "upgrade this end"]),
        (9, WELCOME, ["version 9", "upgrade this end"]),
        (1, BUSY, ["too many connections", "try again"]),
    ] {
        let node = FakeNode::start(move |mut stream| {
            greet(&mut stream, version, verdict);
            None
        });
        let (output, _) = node.dog(&["volume", "delete", "v"]);
        assert_failed(&output, &parts);
        assert_failed(&output, &["nothing was changed"]);
    }
    let web = FakeNode::start(|mut stream| {
        stream.read_exact(&mut [0; 32]).unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n").unwrap();
        None
    });
    let (output, _) = web.dog(&["volume", "list"]);
    assert_failed(&output, &["does not speak Sheepdog's protocol", "nothing was changed"]);
}

#[test]
fn a_node_that_hangs_up_at_once_was_not_asked() {
    let node = FakeNode::start(|mut stream| {
        stream.read_exact(&mut [0; 32]).unwrap();
        None
    });
    let (output, _) = node.dog(&["volume", "delete", "v"]);
    assert_failed(&output, &["closed the connection", "nothing was changed"]);
}

#[test]
fn a_broken_connection_leaves_orders_in_doubt_and_questions_not() {
    let whole = frame(json!({"ok": null}).to_string().as_bytes());
    // Before the answer, within its length, within its body.
    for cut in [0, 2, whole.len() - 1] {
        let (output, _) = FakeNode::sending(whole[..cut].to_vec()).dog(&["volume", "delete", "v"]);
        assert_failed(
            &output,
            &["closed the connection", "may have been carried out", "dog volume list"],
        );
        let (output, _) = FakeNode::sending(whole[..cut].to_vec()).dog(&["volume", "info", "v"]);
        assert_failed(&output, &["closed the connection", "nothing was changed"]);
    }
}

#[test]
fn answers_without_sense_are_failures() {
    for nonsense in [
        frame(b"not json"),
        frame(b"{\"neither\": 1}"),
        frame(b""),
        0_u32.to_le_bytes().to_vec(),
        u32::MAX.to_le_bytes().to_vec(),
    ] {
        let (output, _) = FakeNode::sending(nonsense).dog(&["volume", "create", "v", "1G"]);
        assert_failed(&output, &["may have been carried out"]);
    }
}

#[test]
fn answers_of_another_type_are_failures_for_people_only() {
    let answer = json!({"ok": {"surprise": 1}});
    let (output, _) = FakeNode::answering(&answer).dog(&["volume", "create", "v", "1G"]);
    assert_failed(&output, &["missing field", "the request was carried out", "release"]);
    let (output, _) = FakeNode::answering(&answer).dog(&["volume", "info", "v"]);
    assert_failed(&output, &["missing field", "nothing was changed", "--json"]);
    let (output, _) = FakeNode::answering(&answer).dog(&["--json", "volume", "info", "v"]);
    assert_eq!(serde_json::from_str::<Value>(stdout(&output)).unwrap(), json!({"surprise": 1}));
}

#[test]
fn a_reader_that_left_is_no_failure() {
    for args in [&["volume", "list"][..], &["--json", "volume", "list"]] {
        let node = FakeNode::answering(&json!({"ok": []}));
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = dog(args)
            .env("SHEEPDOG_NODE", node.address.to_string())
            .stdout(writer)
            .stderr(Stdio::piped())
            .output()
            .unwrap();
        assert_eq!((output.status.code(), stderr(&output)), (Some(0), ""));
        node.thread.join().unwrap();
    }
}

#[test]
fn an_answer_that_cannot_be_written_is_a_failure() {
    let node = FakeNode::answering(&json!({"ok": null}));
    let output = dog(&["volume", "delete", "v"])
        .env("SHEEPDOG_NODE", node.address.to_string())
        .stdout(File::options().write(true).open("/dev/full").unwrap())
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert_failed(&output, &["standard output", "No space left", "the request was carried out"]);
    node.thread.join().unwrap();
}

#[test]
fn wrong_usage_exits_with_2_and_asks_no_node() {
    let node = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    node.set_nonblocking(true).unwrap();
    for (line, part) in [
        ("", "Usage"),
        ("volume", "Usage"),
        ("volume grow v", "grow"),
        ("volume create v", "<SIZE>"),
        ("volume create v 5X", "'5X' has an unknown unit: write a size like 10G"),
        ("volume create v 99999999P", "larger than 2^64 bytes"),
        ("volume create v 10G --copies 0", "--copies"),
        ("export add v", "--nbd"),
        ("export add v --nbd /a --vhost-user /b", "cannot be used with"),
        ("export add v --nbd localhost:10809", "host names are not looked up"),
        ("export add v --vhost-user 127.0.0.1:10809", "path of a Unix socket"),
        ("export remove v --nbd --vhost-user", "cannot be used with"),
        ("volume list --node localhost:7000", "host names are not looked up"),
        ("cluster recover --yes", "--force"),
        ("node drain", "<NODE>"),
        ("node set-weight a b", "'b'"),
        ("node disk", "Usage"),
        ("node disk add /", "does not name a directory"),
        ("node recovery stop", "stop"),
        ("node scrub", "Usage"),
        ("node scrub start --rate 1K", "less than 4KiB"),
    ] {
        let args: Vec<_> = line.split_whitespace().collect();
        let address = node.local_addr().unwrap().to_string();
        let output = dog(&args).env("SHEEPDOG_NODE", address).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{line}");
        assert_eq!(stdout(&output), "", "{line}");
        assert!(stderr(&output).contains(part), "{line}: {part:?} is not in {}", stderr(&output));
    }
    assert_eq!(node.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
}

#[test]
fn a_wrong_environment_is_wrong_usage() {
    let output = dog(&["volume", "list"]).env("SHEEPDOG_NODE", "node1").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("'node1'") && stderr(&output).contains("IP:PORT"));
}

#[test]
fn every_command_explains_itself_with_an_example() {
    let mut lines: Vec<String> = vec![String::new()];
    for Example { args, .. } in examples() {
        lines.extend([args[0].to_string(), args[..2].join(" ")]);
        if ["scrub", "disk", "recovery"].contains(&args[1]) && args.len() > 2 {
            lines.push(args[..3].join(" "));
        }
    }
    for line in lines {
        let args: Vec<_> = line.split_whitespace().chain(["--help"]).collect();
        let output = dog(&args).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{line}");
        let text = stdout(&output);
        assert!(text.contains("--node") && text.contains("SHEEPDOG_NODE"), "{line}: {text}");
        let example = text.split("Example:\n  dog ").nth(1).unwrap_or_default();
        let example = example.replace("--node 10.0.0.5:7000 ", "");
        assert!(example.starts_with(&line), "{line}: {text}");
    }
}
