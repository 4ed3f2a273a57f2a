//! Hosts with a network of their own: network namespaces on one bridge, with links that can be cut.
//!
//! Needs root, `ip` and `nft`. Names hold the process id, so that test processes do not collide; what a
//! killed test process left behind is removed by the next one.

use crate::{PATIENCE, run};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

const NAMESPACES: &str = "/run/netns";
const PREFIX: &str = "sheeplab";
static NETS: AtomicUsize = AtomicUsize::new(0);

/// Some hosts that reach each other. Dropping it removes them.
pub struct Net {
    name: String,
    hosts: usize,
}

impl Net {
    /// Makes hosts that reach each other.
    pub fn new(hosts: usize) -> Self {
        remove_leftovers();
        let number = NETS.fetch_add(1, Ordering::Relaxed);
        let net = Self { name: format!("{PREFIX}-{}-{number}", std::process::id()), hosts };
        let switch = net.switch();
        ip(&format!("netns add {switch}"));
        ip(&format!("-n {switch} link add bridge type bridge"));
        ip(&format!("-n {switch} link set bridge up"));
        for host in 0..hosts {
            let name = net.namespace(host);
            ip(&format!("netns add {name}"));
            ip(&format!("-n {switch} link add port{host} type veth peer name eth0 netns {name}"));
            ip(&format!("-n {switch} link set port{host} master bridge up"));
            ip(&format!("-n {name} address add {}/24 dev eth0", net.ip(host)));
            ip(&format!("-n {name} link set lo up"));
            ip(&format!("-n {name} link set eth0 up"));
            net.nft(host, "add table inet lab");
            net.nft(host, "add chain inet lab in { type filter hook input priority 0; }");
        }
        net
    }

    fn switch(&self) -> String {
        format!("{}-switch", self.name)
    }

    fn namespace(&self, host: usize) -> String {
        assert!(host < self.hosts, "there is no host {host}");
        format!("{}-h{host}", self.name)
    }

    /// Number of hosts.
    pub fn hosts(&self) -> usize {
        self.hosts
    }

    /// The address of a host.
    pub fn ip(&self, host: usize) -> String {
        format!("10.77.0.{}", host + 1)
    }

    /// The file that stands for the host's network, as nsenter wants it.
    pub fn path(&self, host: usize) -> PathBuf {
        Path::new(NAMESPACES).join(self.namespace(host))
    }

    /// Runs something on a thread that is in the host's network.
    pub fn within<T: Send>(&self, host: usize, what: impl FnOnce() -> T + Send) -> T {
        let path = self.path(host);
        let inside = move || {
            let link = File::open(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            move_into_link_name_space(link.as_fd(), Some(LinkNameSpaceType::Network))
                .unwrap_or_else(|e| panic!("cannot enter {}: {e}", path.display()));
            what()
        };
        let done = std::thread::scope(|scope| scope.spawn(inside).join());
        done.unwrap_or_else(|_| panic!("a thread in the network of host {host} panicked"))
    }

    /// From now on nothing that `from` sends arrives at `to`.
    pub fn cut_one_way(&self, from: usize, to: usize) {
        self.nft(to, &format!("add rule inet lab in ip saddr {} drop", self.ip(from)));
    }

    /// From now on `from` cannot call `to` on `port`, not even over connections that it has.
    pub fn cut_calls(&self, from: usize, to: usize, port: u16) {
        let from = self.ip(from);
        self.nft(to, &format!("add rule inet lab in ip saddr {from} tcp dport {port} drop"));
    }

    /// From now on nothing arrives between two hosts.
    pub fn cut(&self, one: usize, other: usize) {
        self.cut_one_way(one, other);
        self.cut_one_way(other, one);
    }

    /// From now on nothing arrives between `some` hosts and all the others.
    pub fn split(&self, some: &[usize]) {
        for one in some {
            for other in (0..self.hosts).filter(|h| !some.contains(h)) {
                self.cut(*one, other);
            }
        }
    }

    /// Pulls the host's cable.
    pub fn unplug(&self, host: usize) {
        ip(&format!("-n {} link set port{host} down", self.switch()));
    }

    /// Undoes all cuts and plugs all cables in.
    pub fn heal(&self) {
        for host in 0..self.hosts {
            self.nft(host, "flush chain inet lab in");
            ip(&format!("-n {} link set port{host} up", self.switch()));
        }
    }

    fn nft(&self, host: usize, rule: &str) {
        let name = self.namespace(host);
        command("ip", &["netns", "exec", &name, "nft", rule]);
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for host in 0..self.hosts {
            remove(&self.namespace(host));
        }
        remove(&self.switch());
    }
}

fn ip(arguments: &str) {
    command("ip", &arguments.split(' ').collect::<Vec<_>>());
}

fn command(program: &str, arguments: &[&str]) {
    let done = run(program, arguments, PATIENCE);
    assert_eq!(done.code, Some(0), "{program} {arguments:?} (as root?): {}", done.stderr);
}

/// Without a panic: it may be called while one is under way.
fn remove(namespace: &str) {
    let done = std::process::Command::new("ip").args(["netns", "delete", namespace]).status();
    if !done.as_ref().is_ok_and(std::process::ExitStatus::success) {
        eprintln!("network namespace {namespace} was not removed: {done:?}");
    }
}

/// Removes the hosts of test processes that do not live any more.
fn remove_leftovers() {
    let Ok(entries) = fs::read_dir(NAMESPACES) else { return };
    for name in entries.flatten().filter_map(|e| e.file_name().into_string().ok()) {
        let rest = name.strip_prefix(PREFIX).and_then(|rest| rest.strip_prefix('-'));
        let Some(owner) = rest.and_then(|rest| rest.split('-').next()) else { continue };
        if !Path::new("/proc").join(owner).exists() {
            remove(&name);
        }
    }
}
