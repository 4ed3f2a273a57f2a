//! Clusters of real `sheep` processes on 127.0.0.1, and `dog` to talk to them.

use crate::{Client, Disk, Lab, Net, PATIENCE, Process, binary, eventually, run};
use rustix::process::Signal;
use serde_json::Value;
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

struct Node {
    ip: String,
    port: u16,
    dir: PathBuf,
    log: PathBuf,
    /// What its daemon gets at each start beside its directory and port.
    args: Vec<String>,
    process: Option<Process>,
}

/// Some nodes, running or not. Dropping it kills them all.
pub struct Cluster {
    nodes: Vec<Node>,
    sockets: PathBuf,
    /// Each node on the host of the same index; without it all are on 127.0.0.1.
    net: Option<Arc<Net>>,
}

/// A command that was refused.
#[derive(Debug)]
pub struct Failure {
    /// 1 failed, 2 usage.
    pub code: i32,
    /// What it said.
    pub message: String,
}

/// An export of a volume.
#[derive(Clone, Debug)]
pub struct Export {
    /// Name of the volume, which is also the NBD export name.
    pub volume: String,
    /// Its Unix socket.
    pub socket: PathBuf,
}

impl Export {
    /// As fio, qemu-img and libnbd want it.
    pub fn uri(&self) -> String {
        format!("nbd+unix:///{}?socket={}", self.volume, self.socket.display())
    }

    /// An own NBD connection; waits for the server if it is still coming up.
    pub fn connect(&self) -> Client {
        let begin = Instant::now();
        loop {
            match Client::connect(&self.socket, &self.volume) {
                Ok(client) => return client,
                Err(e) if begin.elapsed() > PATIENCE => {
                    panic!("no NBD connection to {} in {PATIENCE:?}: {e:?}", self.volume)
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// For a guest.
    pub fn nbd_disk(&self) -> Disk {
        Disk::Nbd(self.socket.clone(), self.volume.clone())
    }

    /// For a guest.
    pub fn vhost_disk(&self) -> Disk {
        Disk::VhostUser(self.socket.clone())
    }
}

impl Cluster {
    /// Starts `count` nodes, the others joining the first, and waits until all are one healthy cluster.
    pub fn start(lab: &Lab, count: usize) -> Self {
        let mut cluster = Self::empty(lab, None);
        for _ in 0..count {
            cluster.add_node(lab);
        }
        cluster.wait_healthy();
        cluster
    }

    /// As [`Cluster::start`], a node on each host.
    pub fn start_on(lab: &Lab, net: &Arc<Net>) -> Self {
        let mut cluster = Self::empty(lab, Some(net));
        for _ in 0..net.hosts() {
            cluster.add_node(lab);
        }
        cluster.wait_healthy();
        cluster
    }

    /// No nodes yet.
    pub fn empty(lab: &Lab, net: Option<&Arc<Net>>) -> Self {
        Self { nodes: Vec::new(), sockets: lab.path(""), net: net.map(Arc::clone) }
    }

    /// Starts one more node and waits for its port; returns its index.
    pub fn add_node(&mut self, lab: &Lab) -> usize {
        self.add_node_with(lab, &[])
    }

    /// As [`Cluster::add_node`], with further arguments for its daemon at each start.
    pub fn add_node_with(&mut self, lab: &Lab, args: &[&str]) -> usize {
        let join = self.running().next().map(|member| self.address(member));
        let index = self.push_node(lab, args);
        self.launch(index, join);
        self.wait_listening(index);
        index
    }

    /// Starts `count` more nodes at the same moment and waits for their ports.
    pub fn add_nodes(&mut self, lab: &Lab, count: usize) {
        let join = self.running().next().map(|member| self.address(member));
        let added: Vec<usize> = (0..count).map(|_| self.push_node(lab, &[])).collect();
        added.iter().for_each(|index| self.launch(*index, join.clone()));
        added.iter().for_each(|index| self.wait_listening(*index));
    }

    fn push_node(&mut self, lab: &Lab, args: &[&str]) -> usize {
        let index = self.nodes.len();
        let name = format!("node{index}");
        let mut args: Vec<_> = args.iter().map(|arg| (*arg).to_owned()).collect();
        let (ip, port) = match &self.net {
            None => ("127.0.0.1".to_owned(), self.free_port()),
            Some(net) => (net.ip(index), 7000),
        };
        args.extend(self.net.is_some().then(|| "--insecure".to_owned()));
        let (dir, log) = (lab.path(&name), lab.log(&name));
        self.nodes.push(Node { ip, port, dir, log, args, process: None });
        index
    }

    /// A port that no node of this cluster has, running or not.
    fn free_port(&self) -> u16 {
        loop {
            let [port] = free_ports();
            if self.nodes.iter().all(|node| node.port != port) {
                return port;
            }
        }
    }

    fn launch(&mut self, index: usize, join: Option<String>) {
        let (program, mut args) = self.on_host(index, binary("sheep"));
        let node = &mut self.nodes[index];
        assert!(node.process.is_none(), "node {index} runs already");
        args.extend(["--dir".to_owned(), node.dir.display().to_string()]);
        args.extend(["--listen".into(), format!("{}:{}", node.ip, node.port)]);
        args.extend(node.args.iter().cloned());
        if let Some(join) = join {
            args.extend(["--join".into(), join]);
        }
        node.process = Some(Process::start(&program, args, &node.log, None));
    }

    /// How to start a program on the host of a node.
    fn on_host(&self, index: usize, program: PathBuf) -> (PathBuf, Vec<String>) {
        let Some(net) = &self.net else { return (program, Vec::new()) };
        let network = format!("--net={}", net.path(index).display());
        ("nsenter".into(), vec![network, "--".into(), program.display().to_string()])
    }

    /// Waits until the node accepts connections.
    pub fn wait_listening(&mut self, index: usize) {
        let address = self.address(index);
        let net = self.net.clone();
        let connects = || TcpStream::connect(&address).is_ok();
        let node = &mut self.nodes[index];
        eventually(&format!("node {index} to listen"), PATIENCE, || {
            let ended = node.process.as_mut().and_then(Process::ended);
            assert!(ended.is_none(), "node {index} ended: {ended:?}");
            let listens = net.as_ref().map_or_else(connects, |net| net.within(index, connects));
            listens.then_some(())
        });
    }

    /// Number of nodes, running or not.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there are no nodes.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// `IP:PORT` of a node.
    pub fn address(&self, index: usize) -> String {
        format!("{}:{}", self.nodes[index].ip, self.nodes[index].port)
    }

    /// The directory of a node.
    pub fn dir(&self, index: usize) -> &std::path::Path {
        &self.nodes[index].dir
    }

    /// The process of a running node.
    pub fn process(&self, index: usize) -> &Process {
        let process = self.nodes[index].process.as_ref();
        process.unwrap_or_else(|| panic!("node {index} does not run"))
    }

    /// Whether a node's daemon was started and not ended by the test since.
    pub fn runs(&self, index: usize) -> bool {
        self.nodes[index].process.is_some()
    }

    /// Where a node has its disks.
    pub fn stores(&self, index: usize) -> Vec<PathBuf> {
        let node = &self.nodes[index];
        let given = node.args.windows(2).filter(|pair| pair[0] == "--disk");
        let path = |pair: &[String]| PathBuf::from(pair[1].split(',').next().unwrap_or_default());
        let given: Vec<_> = given.map(path).collect();
        if given.is_empty() && !node.args.iter().any(|arg| arg == "--no-disk") {
            return vec![node.dir.join("disk")];
        }
        given
    }

    /// SIGTERM to all running nodes at once; all must stop cleanly.
    pub fn terminate_all(&mut self) {
        for index in self.running() {
            self.process(index).signal(Signal::TERM);
        }
        for (index, node) in self.nodes.iter_mut().enumerate() {
            let Some(mut process) = node.process.take() else { continue };
            let status = process.wait(2 * PATIENCE);
            assert!(status.success(), "node {index} did not stop cleanly: {status}");
        }
    }

    fn running(&self) -> impl Iterator<Item = usize> {
        (0..self.nodes.len()).filter(|i| self.nodes[*i].process.is_some())
    }

    /// SIGKILL.
    pub fn kill(&mut self, index: usize) {
        let process = self.nodes[index].process.take();
        process.unwrap_or_else(|| panic!("node {index} does not run")).kill();
    }

    /// SIGKILL to all running nodes; none has time to see another one die.
    pub fn kill_all(&mut self) {
        for index in self.running().collect::<Vec<_>>() {
            self.process(index).signal(Signal::KILL);
        }
        for node in &mut self.nodes {
            node.process = None;
        }
    }

    /// SIGSTOP; returns when every thread stands still: one may run on for a moment.
    pub fn freeze(&self, index: usize) {
        self.process(index).signal(Signal::STOP);
        eventually("all threads to stop", PATIENCE, || {
            self.process(index).is_stopped().then_some(())
        });
    }

    /// SIGCONT.
    pub fn thaw(&self, index: usize) {
        self.process(index).signal(Signal::CONT);
    }

    /// SIGTERM; returns how it ended.
    pub fn terminate(&mut self, index: usize) -> ExitStatus {
        self.process(index).signal(Signal::TERM);
        let process = self.nodes[index].process.take();
        let mut process = process.unwrap_or_else(|| panic!("node {index} does not run"));
        process.wait(PATIENCE)
    }

    /// Waits until a node ends by itself; returns how, and everything it logged.
    pub fn wait_end(&mut self, index: usize) -> (ExitStatus, String) {
        let process = self.nodes[index].process.take();
        let mut process = process.unwrap_or_else(|| panic!("node {index} does not run"));
        let status = process.wait(2 * PATIENCE);
        (status, process.log_text())
    }

    /// Starts a node again on its directory, without waiting for anything.
    pub fn relaunch(&mut self, index: usize) {
        self.launch(index, None);
    }

    /// Everything that a node's daemons have logged so far.
    pub fn log_text(&self, index: usize) -> String {
        let bytes = std::fs::read(&self.nodes[index].log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Starts a node again on its directory and waits for its port.
    pub fn restart(&mut self, index: usize) {
        self.launch(index, None);
        self.wait_listening(index);
    }

    /// SIGTERM, which must be a clean stop, then a start; waits for health.
    pub fn restart_after_stop(&mut self, index: usize) {
        let status = self.terminate(index);
        assert!(status.success(), "node {index} did not stop cleanly: {status}");
        self.restart(index);
        self.wait_healthy();
    }

    /// `dog --node N --json ARGS`: the JSON it printed, or how it failed.
    pub fn try_dog(&self, index: usize, args: &[&str]) -> Result<Value, Failure> {
        let address = self.address(index);
        let (program, mut all) = self.on_host(index, binary("dog"));
        all.extend(["--node", &address, "--json"].map(str::to_owned));
        all.extend(args.iter().map(|arg| (*arg).to_owned()));
        // It may have to wait until data have moved.
        let done = run(program, &all, 4 * PATIENCE);
        if done.code != Some(0) {
            let code = done.code.unwrap_or_else(|| panic!("dog {args:?} died: {}", done.stderr));
            return Err(Failure { code, message: done.stderr });
        }
        if done.stdout.trim().is_empty() {
            return Ok(Value::Null);
        }
        let json = serde_json::from_str(&done.stdout);
        Ok(json.unwrap_or_else(|e| panic!("dog {args:?} printed no JSON ({e}): {}", done.stdout)))
    }

    /// As [`Cluster::try_dog`]; must succeed.
    pub fn dog(&self, index: usize, args: &[&str]) -> Value {
        let result = self.try_dog(index, args);
        result.unwrap_or_else(|f| panic!("dog {args:?} at node {index}: {} {}", f.code, f.message))
    }

    /// As [`Cluster::try_dog`]; must be refused with a message.
    pub fn dog_refused(&self, index: usize, args: &[&str]) -> Failure {
        match self.try_dog(index, args) {
            Ok(json) => panic!("dog {args:?} was not refused: {json}"),
            Err(failure) => {
                check_message(&format!("dog {args:?}"), &failure);
                failure
            }
        }
    }

    /// Waits until every running node reports the cluster healthy, with all running nodes up.
    pub fn wait_healthy(&self) {
        self.wait_status("ok");
    }

    /// Waits until every running node reports this status and as many nodes up as there are running.
    pub fn wait_status(&self, status: &str) {
        let running: Vec<_> = self.running().collect();
        let begin = Instant::now();
        for index in &running {
            loop {
                for other in &running {
                    assert!(!self.process(*other).is_dead(), "node {other} has died");
                }
                let health = self.try_dog(*index, &["cluster", "health"]);
                let nodes = self.try_dog(*index, &["node", "list"]);
                let list = nodes.as_ref().ok().and_then(Value::as_array);
                let up = list.map(|l| l.iter().filter(|n| n["state"] == "up").count());
                if health.as_ref().is_ok_and(|h| h["status"] == status) && up == Some(running.len())
                {
                    break;
                }
                assert!(
                    begin.elapsed() < 2 * PATIENCE,
                    "waited in vain for {} nodes up and status {status} at node {index}: {health:?}, {nodes:?}",
                    running.len()
                );
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }

    /// What a node says of another one in `dog node list`; nothing if it is no member.
    pub fn member(&self, asked: usize, index: usize) -> Option<Value> {
        let nodes = self.dog(asked, &["node", "list"]);
        let address = self.address(index);
        let mut list = nodes.as_array().cloned().unwrap_or_default();
        list.retain(|node| node["address"] == address);
        list.pop()
    }

    /// Waits until all slots are complete, whatever else is the matter.
    pub fn wait_complete(&self, asked: usize) {
        eventually("all slots to be complete", 2 * PATIENCE, || {
            let health = self.try_dog(asked, &["cluster", "health"]).ok()?;
            (health["slots"]["complete"] == health["slots"]["total"]).then_some(())
        });
    }

    /// The current epoch as a node sees it.
    pub fn epoch(&self, index: usize) -> u64 {
        let health = self.dog(index, &["cluster", "health"]);
        health["epoch"].as_u64().unwrap_or_else(|| panic!("no epoch in {health}"))
    }

    /// Index of the node that leads the cluster log.
    pub fn leader(&self) -> usize {
        let any = self.running().next().unwrap_or_else(|| panic!("no node runs"));
        eventually("a leader", PATIENCE, || {
            let info = self.try_dog(any, &["cluster", "info"]).ok()?;
            let nodes = self.try_dog(any, &["node", "list"]).ok()?;
            let leader = &info["leader"];
            let list = nodes.as_array()?;
            let node = list.iter().find(|n| &n["id"] == leader || &n["address"] == leader)?;
            (0..self.nodes.len()).find(|i| node["address"] == self.address(*i))
        })
    }

    /// Creates a volume of `size` (as `dog` takes it).
    pub fn create(&self, name: &str, size: &str, copies: u32) {
        let copies = copies.to_string();
        self.dog(0, &["volume", "create", name, size, "--copies", &copies]);
    }

    /// Exports a volume over NBD at a node.
    pub fn export_nbd(&self, index: usize, volume: &str) -> Export {
        self.export(index, volume, "nbd")
    }

    /// Exports a volume over vhost-user-blk at a node.
    pub fn export_vhost(&self, index: usize, volume: &str) -> Export {
        self.export(index, volume, "vhost-user")
    }

    /// Where [`Cluster::export_nbd`] and its kind put the socket.
    pub fn socket(&self, index: usize, volume: &str, protocol: &str) -> PathBuf {
        self.sockets.join(format!("{volume}-{index}.{protocol}"))
    }

    fn export(&self, index: usize, volume: &str, protocol: &str) -> Export {
        let socket = self.socket(index, volume, protocol);
        let path = socket.display().to_string();
        self.dog(index, &["export", "add", volume, &format!("--{protocol}"), &path]);
        eventually("the export's socket", PATIENCE, || socket.exists().then_some(()));
        Export { volume: volume.to_owned(), socket }
    }

    /// Removes all exports of a volume at a node.
    pub fn unexport(&self, index: usize, volume: &str) {
        self.dog(index, &["export", "remove", volume]);
    }

    /// `attached_to` of a volume.
    pub fn attached_to(&self, index: usize, volume: &str) -> Option<String> {
        let list = self.dog(index, &["volume", "list"]);
        let found = list.as_array().and_then(|l| l.iter().find(|v| v["name"] == volume));
        let found = found.unwrap_or_else(|| panic!("no volume {volume} in {list}"));
        found["attached_to"].as_str().map(str::to_owned)
    }
}

/// A refusal has exit code 1 or 2, says something, and is not a crash.
pub fn check_message(what: &str, failure: &Failure) {
    let Failure { code, message } = failure;
    assert!(*code == 1 || *code == 2, "{what}: exit code {code}: {message}");
    assert!(message.trim().len() > 10, "{what}: no message worth the name: {message:?}");
    assert!(!message.contains("panicked"), "{what}: panicked: {message}");
}

/// Runs `sheep` with arguments it must refuse; returns how.
pub fn sheep_refused(args: &[&str]) -> Failure {
    let done = run(binary("sheep"), args, PATIENCE);
    let code = done.code.unwrap_or_else(|| panic!("sheep {args:?} died: {}", done.stderr));
    let failure = Failure { code, message: done.stderr };
    check_message(&format!("sheep {args:?}"), &failure);
    failure
}

/// Ports nobody listens on right now.
pub fn free_ports<const N: usize>() -> [u16; N] {
    let held = [(); N].map(|()| {
        TcpListener::bind(("127.0.0.1", 0)).unwrap_or_else(|e| panic!("no free port: {e}"))
    });
    held.map(|l| l.local_addr().map(|a| a.port()).unwrap_or_else(|e| panic!("no port: {e}")))
}
