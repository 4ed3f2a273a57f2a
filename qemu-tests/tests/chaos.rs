//! I1, I2, I7, I8, I11 all at once: five hosts, a guest and two NBD clients that write and verify, and
//! random faults. Nobody may see an error or a wrong byte, and in the end all replicas are the same.
//!
//! `CHAOS_SECONDS` says for how long; without it, 45 seconds of always the same faults. `SEED` repeats the
//! faults (not their exact moments).
//! At most one node at a time is damaged, since three copies of which two have to be up stand no more
//! without waiting; stalls of other nodes that are shorter than a lease come on top.

use sheepdog_qemu_tests::{
    Cluster, Customer, FileSystem, Guest, Lab, Net, PATIENCE, Rng, eventually, inside, seed,
    seed_or, setting,
};
use std::sync::Arc;
use std::time::{Duration, Instant};

const PORT: u16 = 7000;
/// Where the guest is. Its daemon is never killed: QEMU's ring is not kept by anybody else.
const GUEST: usize = 0;
/// Where the NBD clients are.
const CLIENTS: [usize; 2] = [1, 2];
/// The node whose disk is a small file system of its own.
const SMALL: usize = 4;
/// Hosts for nodes that join.
const SPARE: usize = 2;
const COPIES: usize = 3;
/// For the cluster to be well again: nodes that came and went too often are held for a minute.
const RECOVERY: Duration = PATIENCE.saturating_mul(8);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Kill,
    Stop,
    Blink,
    Freeze,
    Unplug,
    CutPair,
    CutOneWay,
    CutCalls,
    CutMost,
    Join,
    Drain,
    Full,
    Fail,
}

/// Each of them comes once before any comes again. Those that most nodes can suffer come more often.
const DECK: [Kind; 16] = [
    Kind::Kill,
    Kind::Kill,
    Kind::Stop,
    Kind::Blink,
    Kind::Freeze,
    Kind::Freeze,
    Kind::Unplug,
    Kind::CutPair,
    Kind::CutOneWay,
    Kind::CutOneWay,
    Kind::CutCalls,
    Kind::CutMost,
    Kind::Join,
    Kind::Drain,
    Kind::Full,
    Kind::Fail,
];

struct Chaos<'a> {
    lab: &'a Lab,
    net: Arc<Net>,
    cluster: Cluster,
    disk: FileSystem,
    customers: Vec<(usize, Customer)>,
    rng: Rng,
    begin: Instant,
    deck: Vec<Kind>,
    /// When each node was damaged last: nodes that come and go too often are made to wait.
    hurt: Vec<Instant>,
    faults: usize,
}

impl Chaos<'_> {
    fn tell(&self, what: &str) {
        println!("{:7.2} s  {what}", self.begin.elapsed().as_secs_f64());
    }

    fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.rng.below(to - from))
    }

    /// A fault lasts that long; nothing is waited for.
    fn last(&self, time: Duration) {
        std::thread::sleep(time);
    }

    fn draw(&mut self) -> Kind {
        if self.deck.is_empty() {
            self.deck = DECK.to_vec();
        }
        let index = self.rng.below(self.deck.len() as u64) as usize;
        self.deck.swap_remove(index)
    }

    /// One of the two that were left alone for the longest time.
    fn victim(&mut self, suitable: impl Fn(usize) -> bool) -> usize {
        let mut nodes: Vec<_> = (0..self.cluster.len()).filter(|node| suitable(*node)).collect();
        nodes.sort_by_key(|node| self.hurt[*node]);
        let index = self.rng.below(nodes.len().min(2) as u64) as usize;
        nodes[index]
    }

    fn other(&mut self, than: usize) -> usize {
        let step = 1 + self.rng.below(self.cluster.len() as u64 - 1) as usize;
        (than + step) % self.cluster.len()
    }

    fn fault(&mut self) {
        let kind = self.draw();
        let victim = match kind {
            Kind::Kill | Kind::Stop => self.victim(|node| node != GUEST),
            Kind::Full | Kind::Fail => SMALL,
            Kind::Join if self.cluster.len() == self.net.hosts() => return,
            _ => self.victim(|_| true),
        };
        self.faults += 1;
        let again = !matches!(kind, Kind::Full | Kind::Fail | Kind::Join | Kind::Drain)
            && self.rng.below(3) == 0;
        self.carry_out(kind, victim);
        if again {
            let (kind, pause) = (self.minor_kind(victim), self.millis(50, 1500));
            self.last(pause);
            self.carry_out(kind, victim);
        }
        if !matches!(kind, Kind::Blink | Kind::Join | Kind::Drain) {
            self.hurt[victim] = Instant::now();
        }
        self.settle();
    }

    /// What may hit a node again before it has recovered.
    fn minor_kind(&mut self, node: usize) -> Kind {
        let kinds = [Kind::Freeze, Kind::Blink, Kind::Unplug, Kind::CutMost, Kind::Kill];
        let kinds = &kinds[..if node == GUEST { 4 } else { 5 }];
        kinds[self.rng.below(kinds.len() as u64) as usize]
    }

    fn carry_out(&mut self, kind: Kind, node: usize) {
        match kind {
            Kind::Kill => {
                let away = self.millis(0, 6000);
                self.tell(&format!("SIGKILL of node {node}, back in {away:?}"));
                self.excuse(node);
                self.cluster.kill(node);
                self.hold(node, away);
                self.cluster.restart(node);
            }
            Kind::Stop => {
                let away = self.millis(0, 3000);
                self.tell(&format!("SIGTERM to node {node}, back {away:?} later"));
                self.excuse(node);
                let status = self.cluster.terminate(node);
                assert!(status.success(), "{status}");
                self.hold(node, away);
                self.cluster.restart(node);
            }
            Kind::Blink => {
                let time = self.millis(100, 1200);
                self.tell(&format!("SIGSTOP of node {node} for {time:?}"));
                self.freeze(node, time);
            }
            Kind::Freeze => {
                let time = self.millis(2500, 7000);
                self.tell(&format!("SIGSTOP of node {node} for {time:?}"));
                self.freeze(node, time);
            }
            Kind::Unplug | Kind::CutPair | Kind::CutOneWay | Kind::CutCalls | Kind::CutMost => {
                self.cut(kind, node);
            }
            Kind::Join => {
                let node = self.cluster.len();
                self.tell(&format!("node {node} joins"));
                self.cluster.add_node(self.lab);
                self.hurt.push(Instant::now());
            }
            Kind::Drain => self.drain(node),
            Kind::Full => self.fill_disk(),
            Kind::Fail => self.fail_disk(),
        }
    }

    fn freeze(&mut self, node: usize, time: Duration) {
        self.cluster.freeze(node);
        self.last(time);
        self.cluster.thaw(node);
    }

    fn cut(&mut self, kind: Kind, node: usize) {
        let (other, time) = (self.other(node), self.millis(200, 8000));
        match kind {
            Kind::Unplug => {
                self.tell(&format!("cable of host {node} out for {time:?}"));
                self.net.unplug(node);
            }
            Kind::CutPair => {
                self.tell(&format!("hosts {node} and {other} cut for {time:?}"));
                self.net.cut(node, other);
            }
            Kind::CutOneWay => {
                self.tell(&format!("nothing from host {node} to {other} for {time:?}"));
                self.net.cut_one_way(node, other);
            }
            Kind::CutCalls => {
                self.tell(&format!("no calls of host {node} to {other} for {time:?}"));
                self.net.cut_calls(node, other, PORT);
            }
            _ => {
                let others: Vec<_> = (0..self.cluster.len())
                    .filter(|host| *host != node && self.rng.below(3) > 0)
                    .collect();
                let inwards = self.rng.below(2) == 0;
                let way = if inwards { "to host" } else { "from host" };
                self.tell(&format!(
                    "nothing {way} {node}, the others being {others:?}, for {time:?}"
                ));
                for other in others {
                    let (from, to) = if inwards { (other, node) } else { (node, other) };
                    self.net.cut_one_way(from, to);
                }
            }
        }
        self.hold(node, time);
        self.net.heal();
    }

    /// A fault of `node` lasts; now and then another node stops for less than a lease meanwhile.
    fn hold(&mut self, node: usize, time: Duration) {
        if time > Duration::from_millis(2000) && self.rng.below(3) == 0 {
            let (other, stall) = (self.other(node), self.millis(100, 900));
            self.last(time / 2);
            if self.cluster.runs(other) {
                self.tell(&format!("meanwhile SIGSTOP of node {other} for {stall:?}"));
                self.freeze(other, stall);
            }
            self.last(time / 2);
        } else {
            self.last(time);
        }
    }

    /// The node's data move away, and back; it may be gone for a moment meanwhile.
    fn drain(&mut self, node: usize) {
        let (asked, time) = (self.other(node), self.millis(200, 10_000));
        let address = self.cluster.address(node);
        self.tell(&format!(
            "node {asked} is told to drain node {node}, which is undone after {time:?}"
        ));
        self.cluster.dog(asked, &["node", "drain", &address]);
        self.hold(node, time / 2);
        if self.rng.below(2) == 0 {
            let kind = self.minor_kind(node);
            self.carry_out(kind, node);
        }
        self.hold(node, time / 2);
        // The leader may have gone a moment ago.
        eventually("the node to be taken back", RECOVERY, || {
            self.assert_well();
            self.cluster.try_dog(asked, &["node", "undrain", &address]).ok()
        });
    }

    fn excuse(&self, node: usize) {
        self.customers.iter().filter(|(at, _)| *at == node).for_each(|(_, c)| c.excuse());
    }

    /// Only new blocks need space: the guest wrote all of its volume before.
    fn fill_disk(&mut self) {
        let time = self.millis(1000, 6000);
        self.tell(&format!("disk of node {SMALL} full for {time:?}"));
        self.customers.iter().for_each(|(_, customer)| customer.excuse_no_space(true));
        self.disk.occupy(None);
        self.hold(SMALL, time);
        self.disk.vacate();
        // Whoever was refused may be refused until the disk has looked again.
        self.settle();
        self.customers.iter().for_each(|(_, customer)| customer.excuse_no_space(false));
    }

    fn fail_disk(&mut self) {
        let time = self.millis(500, 4000);
        self.tell(&format!(
            "disk of node {SMALL} fails, is unplugged and plugged in {time:?} later"
        ));
        self.disk.fail();
        eventually("the disk to be missed", RECOVERY, || {
            self.assert_well();
            let health = self.cluster.try_dog(GUEST, &["cluster", "health"]).ok()?;
            health["reasons"].to_string().contains("out of service").then_some(())
        });
        self.hold(SMALL, time);
        self.excuse(SMALL);
        self.cluster.kill(SMALL);
        self.disk.come_back();
        self.cluster.restart(SMALL);
    }

    fn assert_well(&self) {
        self.customers.iter().for_each(|(_, customer)| customer.assert_alive());
        for node in 0..self.cluster.len() {
            let dead = self.cluster.runs(node) && self.cluster.process(node).is_dead();
            assert!(!dead, "node {node} has died");
        }
    }

    /// Waits until every node says that all is well, and until everybody's I/O goes on.
    fn settle(&mut self) {
        let begin = Instant::now();
        for node in 0..self.cluster.len() {
            let mut last = String::new();
            while !self.is_well(node, &mut last) {
                assert!(begin.elapsed() < RECOVERY, "not well after {RECOVERY:?}: {last}");
                self.assert_well();
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        for (_, customer) in &self.customers {
            customer.wait_for_more(5);
        }
        let stalls: Vec<_> = self.customers.iter().map(|(_, c)| c.take_longest()).collect();
        self.tell(&format!("all well after {:?}; longest stalls {stalls:?}", begin.elapsed()));
    }

    fn is_well(&self, node: usize, last: &mut String) -> bool {
        let health = self.cluster.try_dog(node, &["cluster", "health"]);
        let nodes = self.cluster.try_dog(node, &["node", "list"]);
        *last = format!("{health:?} {nodes:?}");
        let (Ok(health), Ok(nodes)) = (health, nodes) else { return false };
        let list = nodes.as_array().cloned().unwrap_or_default();
        let up = list.iter().filter(|node| node["state"] == "up").count();
        health["status"] == "ok" && up == self.cluster.len()
    }
}

/// Writes all of the volume, then writes and verifies in turn.
fn guest_script(seconds: u64) -> String {
    format!(
        r#"
dd if=/dev/urandom of=/dev/vda bs=1M count=32 2>/dev/null || exit 1
sync
echo READY
total=0
end=$(($(cut -d. -f1 /proc/uptime) + {seconds}))
while [ $(cut -d. -f1 /proc/uptime) -lt $end ]; do
    line=$(blkcheck write /dev/vda --start $total --seconds 8 --fsync-every 16 --direct)
    code=$?
    echo "$line"
    [ $code = 0 ] || exit $code
    total=$((total + $(echo "$line" | sed -n 's/.*wrote \([0-9]*\) operations.*/\1/p')))
    blkcheck verify /dev/vda --flushed $total --direct || exit $?
done
"#
    )
}

fn start<'a>(lab: &'a Lab, seed: u64) -> Chaos<'a> {
    let net = Arc::new(Net::new(5 + SPARE));
    let disk = FileSystem::new(lab);
    let mut cluster = Cluster::empty(lab, Some(&net));
    (0..SMALL).for_each(|_| _ = cluster.add_node(lab));
    cluster.add_node_with(lab, &["--disk", &format!("{},60", disk.path("store"))]);
    cluster.wait_healthy();
    let mut customers = Vec::new();
    for node in CLIENTS {
        let name = format!("client{node}");
        cluster.create(&name, "16M", COPIES as u32);
        let export = cluster.export_nbd(node, &name);
        customers.push((node, Customer::start(&export, seed ^ node as u64, 4096)));
    }
    Chaos {
        lab,
        net,
        disk,
        customers,
        rng: Rng(seed),
        begin: Instant::now(),
        deck: Vec::new(),
        hurt: vec![Instant::now(); cluster.len()],
        cluster,
        faults: 0,
    }
}

#[test]
fn nobody_notices_random_faults() {
    if !inside("nobody_notices_random_faults") {
        return;
    }
    let (seconds, seed) = match setting("CHAOS_SECONDS") {
        Some(seconds) => (seconds, seed()),
        None => (45, seed_or(|| 1)),
    };
    let lab = Lab::new("chaos");
    let mut chaos = start(&lab, seed);
    chaos.cluster.create("guest", "32M", COPIES as u32);
    let disk = chaos.cluster.export_vhost(GUEST, "guest").vhost_disk();
    let mut guest = Guest::boot(&lab, "guest", &disk, &guest_script(seconds));
    guest.wait_for("READY");
    chaos.begin = Instant::now();
    while chaos.begin.elapsed() < Duration::from_secs(seconds) {
        chaos.fault();
        guest.assert_well();
    }
    println!("{} faults", chaos.faults);
    println!("{}", guest.finish(20 * PATIENCE).expect_success());
    for (_, customer) in std::mem::take(&mut chaos.customers) {
        assert!(customer.finish().verified > 4096);
    }
    chaos.settle();
    let equal = chaos.cluster.stop_and_compare(COPIES);
    println!("all replicas are equal: {equal:?}");
    assert!(equal.layers >= 8 + 2 * 4, "{equal:?}");
}
