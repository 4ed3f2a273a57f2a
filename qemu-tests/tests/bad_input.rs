//! Mistakes of operators: each gets a message that says what is wrong, exit code 1 or 2, and does no damage.

use sheepdog_qemu_tests::{
    Client, Cluster, Failure, Lab, PATIENCE, binary, check_message, free_ports, run, sheep_refused,
};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

fn text(path: &Path) -> &str {
    path.to_str().expect("paths of the lab are text")
}

/// The message names what it is about.
fn names(failure: &Failure, any_of: &[&str]) {
    let message = failure.message.to_lowercase();
    let named = any_of.iter().any(|word| message.contains(&word.to_lowercase()));
    assert!(named, "none of {any_of:?} in: {}", failure.message);
}

#[test]
fn bad_names_and_sizes_make_no_volume() {
    let lab = Lab::new("bad-volumes");
    let cluster = Cluster::start(&lab, 1);
    for size in ["0", "-1", "abc", "10Q", "", "G", "99999999999999999999T", "16777216T", "1.5.2G"] {
        cluster.dog_refused(0, &["volume", "create", "disk", size, "--copies", "1"]);
    }
    let long = "x".repeat(300);
    for name in ["", "a/b", "../x", "a@b", "a\nb", &long, "-x"] {
        cluster.dog_refused(0, &["volume", "create", name, "16M", "--copies", "1"]);
    }
    for copies in ["0", "-1", "many", "300"] {
        cluster.dog_refused(0, &["volume", "create", "disk", "16M", "--copies", copies]);
    }
    let more_than_copies =
        ["volume", "create", "disk", "16M", "--copies", "1", "--min-copies", "2"];
    cluster.dog_refused(0, &more_than_copies);
    assert_eq!(cluster.dog(0, &["volume", "list"]), serde_json::json!([]));

    cluster.create("disk", "16M", 1);
    let again = cluster.dog_refused(0, &["volume", "create", "disk", "32M", "--copies", "1"]);
    names(&again, &["disk"]);
    assert_eq!(again.code, 1);
    let info = cluster.dog(0, &["volume", "info", "disk"]);
    assert_eq!(info["size"], 16 << 20, "{info}");
}

#[test]
fn unknown_things_are_named() {
    let lab = Lab::new("bad-unknown");
    let cluster = Cluster::start(&lab, 1);
    let path = lab.path("x.nbd");
    let unknown: [&[&str]; 4] = [
        &["volume", "info", "nosuch"],
        &["volume", "delete", "nosuch"],
        &["export", "add", "nosuch", "--nbd", text(&path)],
        &["export", "remove", "nosuch"],
    ];
    for args in unknown {
        let failure = cluster.dog_refused(0, args);
        names(&failure, &["nosuch"]);
        assert_eq!(failure.code, 1, "{args:?}: {}", failure.message);
    }
    assert!(!path.exists(), "a socket was left behind");
}

#[test]
fn wrong_usage_is_exit_code_2() {
    let wrong: [&[&str]; 6] = [
        &[],
        &["no-such-command"],
        &["volume", "create"],
        &["export", "add", "disk"],
        &["--node", "not-an-address", "cluster", "health"],
        &["cluster", "health", "--no-such-option"],
    ];
    for args in wrong {
        let done = run(binary("dog"), args, Duration::from_secs(30));
        assert_eq!(done.code, Some(2), "dog {args:?}: {}{}", done.stdout, done.stderr);
    }
    for args in
        [&["--listen"][..], &["--dir"], &["--dir", "/tmp/x", "--listen", "nonsense"], &["-?"]]
    {
        assert_eq!(sheep_refused(args).code, 2, "sheep {args:?}");
    }
}

#[test]
fn unreachable_node_is_named() {
    let _lab = Lab::new("bad-node");
    let [port] = free_ports();
    let address = format!("127.0.0.1:{port}");
    let args = ["--node", &address, "cluster", "health"];
    let done = run(binary("dog"), args, PATIENCE);
    let failure = Failure { code: done.code.unwrap(), message: done.stderr };
    check_message("dog without a node", &failure);
    names(&failure, &[&address]);
    assert_eq!(failure.code, 1);
}

#[test]
fn export_paths_in_use_are_left_alone() {
    let lab = Lab::new("bad-export");
    let cluster = Cluster::start(&lab, 3);
    for name in ["one", "two"] {
        cluster.create(name, "16M", 3);
    }
    let export = cluster.export_nbd(0, "one");
    let taken = text(&export.socket);
    for node in [0, 1] {
        for option in ["--nbd", "--vhost-user"] {
            let refused = cluster.dog_refused(node, &["export", "add", "two", option, taken]);
            names(&refused, &[taken]);
        }
    }
    let file = lab.path("precious");
    fs::write(&file, "data").unwrap();
    for option in ["--nbd", "--vhost-user"] {
        cluster.dog_refused(0, &["export", "add", "two", option, text(&file)]);
        let nowhere = lab.path("no/such/directory/x.sock");
        cluster.dog_refused(0, &["export", "add", "two", option, text(&nowhere)]);
        let too_long = lab.path(&"x".repeat(200));
        cluster.dog_refused(0, &["export", "add", "two", option, text(&too_long)]);
    }
    assert_eq!(fs::read(&file).unwrap(), b"data");
    let exposed = cluster.dog_refused(0, &["export", "add", "two", "--nbd", "0.0.0.0:10809"]);
    names(&exposed, &["insecure", "loopback"]);
    // A refused export leaves the volume free for another node.
    assert_eq!(cluster.attached_to(0, "two"), None);
    let elsewhere = cluster.socket(1, "one", "nbd");
    let refused = cluster.dog_refused(1, &["export", "add", "one", "--nbd", text(&elsewhere)]);
    names(&refused, &[&cluster.address(0)]);
    let delete = cluster.dog_refused(1, &["volume", "delete", "one"]);
    names(&delete, &[&cluster.address(0), "attached", "export"]);
    let mut client = export.connect();
    client.write(0, &[7; 4096]).unwrap();
    assert_eq!(client.read(0, 4096).unwrap(), [7; 4096]);
}

#[test]
fn listening_to_the_world_needs_insecure() {
    let lab = Lab::new("bad-listen");
    let dir = lab.path("n");
    let [port] = free_ports();
    for address in [format!("0.0.0.0:{port}"), format!("[::]:{port}")] {
        let refused = sheep_refused(&["--dir", text(&dir), "--listen", &address]);
        names(&refused, &["--insecure", "--listen"]);
    }
    // An address of no interface, but a possible one: what is missing is said first.
    let refused = sheep_refused(&["--dir", text(&dir), "--listen", &format!("192.0.2.1:{port}")]);
    names(&refused, &["--insecure"]);
}

#[test]
fn busy_ports_and_directories_are_refused() {
    let lab = Lab::new("bad-busy");
    let cluster = Cluster::start(&lab, 1);
    let address = cluster.address(0);
    let dir = lab.path("other");
    names(&sheep_refused(&["--dir", text(&dir), "--listen", &address]), &[&address]);
    let [port] = free_ports();
    let free = format!("127.0.0.1:{port}");
    let locked = sheep_refused(&["--dir", text(cluster.dir(0)), "--listen", &free]);
    names(&locked, &["in use", "lock"]);
    let file = lab.path("file");
    fs::write(&file, "data").unwrap();
    names(&sheep_refused(&["--dir", text(&file), "--listen", &free]), &[text(&file)]);
    assert_eq!(fs::read(&file).unwrap(), b"data");
    cluster.wait_healthy();
}

#[test]
fn unreachable_join_leaves_the_directory_usable() {
    let lab = Lab::new("bad-join");
    let cluster = Cluster::start(&lab, 1);
    let dir = lab.path("joiner");
    let [nobody, port] = free_ports();
    let (nobody, own) = (format!("127.0.0.1:{nobody}"), format!("127.0.0.1:{port}"));
    let refused = sheep_refused(&["--dir", text(&dir), "--listen", &own, "--join", &nobody]);
    names(&refused, &[&nobody]);

    // The same directory joins when given the right address: nothing made it a cluster of its own.
    let log = lab.log("joiner");
    let address = cluster.address(0);
    let args = ["--dir", text(&dir), "--listen", &own, "--join", &address];
    let _joiner = sheepdog_qemu_tests::Process::start(&binary("sheep"), args, &log, None);
    sheepdog_qemu_tests::eventually("two nodes", Duration::from_secs(60), || {
        let nodes = cluster.dog(0, &["node", "list"]);
        let up = nodes.as_array()?.iter().filter(|n| n["state"] == "up").count();
        (up == 2).then_some(())
    });
}

#[test]
fn join_target_of_another_version_is_named_when_it_answers() {
    let lab = Lab::new("bad-version");
    let newer = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = newer.local_addr().unwrap().to_string();
    let answering = std::thread::spawn(move || {
        use std::io::{Read, Write};
        // It is slow to answer at first, as one that was started a moment ago.
        let _unheard = newer.accept().unwrap();
        let (mut client, _) = newer.accept().unwrap();
        // docs/protocol.md: magic, newest version, verdict "another version is spoken here", oldest version, ids.
        client.read_exact(&mut [0; 32]).unwrap();
        let mut answer = *b"SHEEPDOG\x63\0\x01.....................";
        answer[11..].fill(0);
        answer[12] = 99;
        client.write_all(&answer).unwrap();
    });
    let dir = lab.path("joiner");
    let [port] = free_ports();
    let own = format!("127.0.0.1:{port}");
    let refused = sheep_refused(&["--dir", text(&dir), "--listen", &own, "--join", &address]);
    for part in [address.as_str(), "version 99", "upgrade this end"] {
        names(&refused, &[part]);
    }
    answering.join().unwrap();
    assert!(!dir.join("node.json").exists(), "nothing was created");
}

#[test]
fn directory_of_another_cluster_is_refused() {
    let lab = Lab::new("bad-cluster");
    let mut stranger = Cluster::start(&lab, 1);
    stranger.create("theirs", "16M", 1);
    assert!(stranger.terminate(0).success());
    let other = lab.path("home");
    let [port] = free_ports();
    let address = format!("127.0.0.1:{port}");
    let args = ["--dir", text(&other), "--listen", &address];
    let _home = sheepdog_qemu_tests::Process::start(&binary("sheep"), args, &lab.log("home"), None);
    sheepdog_qemu_tests::eventually("the other cluster", Duration::from_secs(60), || {
        let args = ["--node", &address, "cluster", "health"];
        (run(binary("dog"), args, Duration::from_secs(30)).code == Some(0)).then_some(())
    });

    let dir = stranger.dir(0).to_owned();
    let own = stranger.address(0);
    let refused = sheep_refused(&["--dir", text(&dir), "--listen", &own, "--join", &address]);
    names(&refused, &["cluster"]);

    // Its own data is still there.
    stranger.restart(0);
    stranger.wait_healthy();
    let list = stranger.dog(0, &["volume", "list"]);
    assert_eq!(list[0]["name"], "theirs", "{list}");
}

/// All files of this name below a directory.
fn find(dir: &Path, name: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).expect("a readable directory").flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(find(&path, name));
        } else if path.file_name().is_some_and(|n| n == name) {
            found.push(path);
        }
    }
    found
}

#[test]
fn newer_format_is_refused_and_left_alone() {
    let lab = Lab::new("bad-format");
    let mut cluster = Cluster::start(&lab, 1);
    assert!(cluster.terminate(0).success());
    let address = cluster.address(0);

    let identity = cluster.dir(0).join("node.json");
    let good = fs::read(&identity).unwrap();
    let mut newer: serde_json::Value = serde_json::from_slice(&good).unwrap();
    newer["format"] = 77.into();
    let newer = serde_json::to_vec(&newer).unwrap();
    refused_and_unchanged(&cluster, &address, &identity, &newer);
    fs::write(&identity, &good).unwrap();

    // docs/on-disk.md: two copies in sectors at 0 and 4096; version at byte 8, CRC-32C in the last four bytes.
    let superblocks = find(cluster.dir(0), "superblock");
    assert_eq!(superblocks.len(), 1, "{superblocks:?}");
    let good = fs::read(&superblocks[0]).unwrap();
    let mut newer = good.clone();
    for copy in [0, 4096] {
        let sector = &mut newer[copy..copy + 512];
        sector[8..12].copy_from_slice(&77u32.to_le_bytes());
        let crc = crc32c::crc32c(&sector[..508]);
        sector[508..].copy_from_slice(&crc.to_le_bytes());
    }
    refused_and_unchanged(&cluster, &address, &superblocks[0], &newer);
    fs::write(&superblocks[0], &good).unwrap();

    cluster.restart(0);
    cluster.wait_healthy();
}

/// With `newer` in `file`, `sheep` names the version it does not know and leaves the file as it is.
fn refused_and_unchanged(cluster: &Cluster, address: &str, file: &Path, newer: &[u8]) {
    fs::write(file, newer).expect("the lab's files can be written");
    let refused = sheep_refused(&["--dir", text(cluster.dir(0)), "--listen", address]);
    names(&refused, &["77"]);
    let now = fs::read(file).expect("the file is still there");
    assert!(now == newer, "{} was changed", file.display());
}

#[test]
fn fewer_nodes_than_min_copies_is_said() {
    let lab = Lab::new("bad-min-copies");
    let cluster = Cluster::start(&lab, 1);
    let create = ["volume", "create", "disk", "16M", "--copies", "3", "--min-copies", "2"];
    let path = lab.path("disk.nbd");
    let add = ["export", "add", "disk", "--nbd", text(&path)];
    // Refused when it is made or, at the latest, when it is used.
    let refused = match cluster.try_dog(0, &create) {
        Err(refused) => refused,
        Ok(_) => cluster.dog_refused(0, &add),
    };
    check_message("one node, two copies needed", &refused);
    names(&refused, &["copies"]);
    assert!(Client::connect(&path, "disk").is_err());
    cluster.create("small", "16M", 1);
    let mut client = cluster.export_nbd(0, "small").connect();
    client.write(0, &[1; 4096]).unwrap();
}
