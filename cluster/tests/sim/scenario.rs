//! Scripts: one command a line, done one after the other, without random faults. The language is
//! described in `cluster/tests/scenarios/README.md`.

use super::checker::{Kind, Value, pattern};
use super::guest::BLOCK;
use super::rng::Rng;
use super::topology::{FaultPlan, Topology};
use super::world::{Failure, Options, Time, World};
use sheepdog_cluster::command::Command;
use sheepdog_types::{DiskId, OBJECT_SIZE, Op};
use std::collections::BTreeMap;
use std::ops::Range;

/// Steps within which whatever a script waits for has to happen.
const PATIENCE: Time = 3000;
/// Blocks at the beginning of each object that a script may use.
const BLOCKS: u64 = 64;
const OBJECTS: u64 = 4;

/// Why a script did not end well.
#[derive(Debug)]
pub enum Error {
    /// It is not understood; the line is named.
    Syntax(String),
    /// Something else happened than it says.
    Run(Failure),
}

struct Script {
    world: World,
    values: BTreeMap<String, Value>,
    /// Requests by the name that a script gave them.
    pending: BTreeMap<String, (usize, u64)>,
}

enum Problem {
    Syntax(String),
    Run(String),
}

type Done = Result<(), Problem>;

fn syntax<T>(text: impl Into<String>) -> Result<T, Problem> {
    Err(Problem::Syntax(text.into()))
}

/// Runs a script; gives its trace.
///
/// # Errors
/// See [`Error`].
pub fn run(text: &str, options: Options) -> Result<Vec<String>, Error> {
    let options = Options { untouched: true, ..options };
    let mut script: Option<Script> = None;
    for (number, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        let at = format!("line {}: {line}", number + 1);
        let outcome = match &mut script {
            None => Script::begin(&words, options).map(|new| script = Some(new)),
            Some(script) => script.execute(&words),
        };
        match outcome {
            Ok(()) => {}
            Err(Problem::Syntax(problem)) => return Err(Error::Syntax(format!("{at}: {problem}"))),
            Err(Problem::Run(problem)) => {
                let trace = script.map(|s| s.world.trace.lines).unwrap_or_default();
                return Err(Error::Run(Failure { problem: format!("{at}: {problem}"), trace }));
            }
        }
    }
    let Some(mut script) = script else {
        return Err(Error::Syntax("a script begins with 'nodes'".into()));
    };
    match script.world.finish() {
        Ok(()) => Ok(script.world.trace.lines),
        Err(problem) => {
            let problem = format!("after the last line: {problem}");
            Err(Error::Run(Failure { problem, trace: script.world.trace.lines }))
        }
    }
}

impl Script {
    /// `nodes N [disks D] [zones Z] [witnesses W]`
    fn begin(words: &[&str], options: Options) -> Result<Self, Problem> {
        let ["nodes", count, rest @ ..] = words else {
            return syntax("a script begins with 'nodes'");
        };
        let nodes = number(count)? as usize;
        if !(1..=64).contains(&nodes) {
            return syntax("from 1 to 64 nodes");
        }
        let mut topology = Topology::plain(nodes);
        let mut rest = rest;
        while let [word, value, more @ ..] = rest {
            match *word {
                "disks" => topology.each = Some(number(value)? as usize),
                "witnesses" => {
                    topology.witnesses = number(value)?.min(64) as usize;
                    topology.nodes += topology.witnesses;
                }
                "zones" => topology.zones = Some(number(value)? as usize),
                other => return syntax(format!("'{other}'?")),
            }
            rest = more;
        }
        let plan = FaultPlan { delay: 3, ..FaultPlan::default() };
        let world = World::new(options, topology, plan, Rng::new(options.seed));
        Ok(Self { world, values: BTreeMap::new(), pending: BTreeMap::new() })
    }

    fn execute(&mut self, words: &[&str]) -> Done {
        match words {
            ["volume", name, "copies", copies, "min", min] => self.volume(name, copies, min),
            ["attach", volume, node] => self.attach(volume, node),
            ["detach", volume] => self.detach(volume),
            ["delete", volume] => self.delete(volume),
            ["flush", volume] => self.complete(volume, Op::Flush, Kind::Flush, 0..0),
            ["write", volume, place @ .., "=", value] => self.write(volume, place, value, None),
            ["begin", name, "write", volume, place @ .., "=", value] => {
                self.write(volume, place, value, Some(name))
            }
            ["begin", name, "read", volume, place @ ..] => self.begin_read(name, volume, place),
            ["end", name] => self.end(name),
            ["waits", name, steps] => self.waits(name, steps),
            ["expect", volume, place @ .., "=", value] => self.expect(volume, place, value),
            ["zombie", volume, node] => self.zombie(volume, node),
            ["wait", steps] => self.advance(number(steps)?),
            ["wait-epoch", epoch] => {
                let epoch = number(epoch)?;
                self.until("the epoch", |w| w.log.state.epoch.0 >= epoch)
            }
            ["wait-complete"] => self.until("all disks are complete", World::all_well),
            ["wait-down", node] => {
                let id = self.world.nodes[self.node(node)?].id;
                self.until("it is down", |w| !w.log.state.nodes.get(&id).is_some_and(|n| n.up))
            }
            ["wait-up", node] => {
                let at = self.node(node)?;
                self.until("it serves", |w| w.serves(at) && w.nodes[at].runs(w.now))
            }
            _ => self.break_or_mend(words),
        }
    }

    fn break_or_mend(&mut self, words: &[&str]) -> Done {
        match words {
            ["cut", a, arrow, b] => self.cut(a, arrow, b),
            ["isolate", node] => {
                let at = self.node(node)?;
                for other in 0..self.world.nodes.len() {
                    self.world.cut(at, other);
                    self.world.cut(other, at);
                }
                Ok(())
            }
            ["heal"] => {
                note!(self.world, "the network is whole again");
                self.world.net.heal();
                Ok(())
            }
            ["crash", nodes @ ..] => self.each(nodes, World::crash),
            ["powerloss", "all"] => {
                self.world.lose_all_power(false, true);
                Ok(())
            }
            ["powerloss", nodes @ ..] => self.each(nodes, World::lose_power),
            ["restart", "all"] => {
                for at in 0..self.world.nodes.len() {
                    if !self.world.nodes[at].alive {
                        self.world.start_node(at);
                    }
                }
                Ok(())
            }
            ["restart", nodes @ ..] => self.each(nodes, World::start_node),
            ["freeze", node, steps] => {
                let (at, steps) = (self.node(node)?, number(steps)?);
                self.world.freeze(at, self.world.now + steps);
                Ok(())
            }
            ["full", disk] => self.set_full(disk, 1000),
            ["space", disk] => self.set_full(disk, 0),
            ["give-up", disk] => {
                let (disks, at) = (vec![self.disk(disk)?.1], self.world.now);
                self.world.commit_now(Command::GiveUp { disks, at });
                Ok(())
            }
            ["leads", node] => {
                let at = self.node(node)?;
                if !self.world.voters().contains(&at) {
                    return syntax("it does not vote");
                }
                self.world.lead(at);
                Ok(())
            }
            ["deaf", volume] => self.deafen(volume, Time::MAX),
            ["hear", volume] => self.deafen(volume, 0),
            ["wait-full", disk] => {
                let id = self.disk(disk)?.1;
                self.until("it says so", |w| w.log.state.disks.get(&id).is_some_and(|d| d.full))
            }
            ["sync", "off"] => {
                self.world.syncs_held = true;
                Ok(())
            }
            ["sync", "on"] => {
                self.world.syncs_held = false;
                Ok(())
            }
            ["join"] => {
                self.world.join();
                Ok(())
            }
            _ => syntax("not a command; see cluster/tests/scenarios/README.md"),
        }
    }

    fn node(&self, word: &str) -> Result<usize, Problem> {
        match word.strip_prefix('n').map(number) {
            Some(Ok(n)) if (1..=self.world.nodes.len() as u64).contains(&n) => Ok(n as usize - 1),
            _ => syntax(format!("'{word}' is no node: they are called n1, n2, …")),
        }
    }

    fn each(&mut self, nodes: &[&str], act: impl Fn(&mut World, usize)) -> Done {
        for word in nodes {
            let at = self.node(word)?;
            act(&mut self.world, at);
        }
        Ok(())
    }

    fn disk(&self, word: &str) -> Result<(usize, DiskId), Problem> {
        let id = DiskId(number(word)?);
        let at = self.world.disks.iter().position(|d| d.id == id);
        at.map_or_else(|| syntax("no such disk: the first one is 101"), |at| Ok((at, id)))
    }

    fn set_full(&mut self, word: &str, full: u64) -> Done {
        let (at, _) = self.disk(word)?;
        self.world.disks[at].store.full = full;
        self.world.disks[at].trouble_until = Time::MAX; // or until the script ends
        Ok(())
    }

    fn deafen(&mut self, volume: &str, until: Time) -> Done {
        let at = self.find(volume)?;
        let Some(active) = self.world.volumes[at].active else {
            return Err(Problem::Run("nobody serves the volume".into()));
        };
        self.world.instances[active].deaf_until = until;
        Ok(())
    }

    fn cut(&mut self, a: &str, arrow: &str, b: &str) -> Done {
        let (a, b) = (self.node(a)?, self.node(b)?);
        match arrow {
            "->" => self.world.cut(a, b),
            "<->" => {
                self.world.cut(a, b);
                self.world.cut(b, a);
            }
            other => return syntax(format!("'{other}': use -> or <->")),
        }
        Ok(())
    }

    fn volume(&mut self, name: &str, copies: &str, min: &str) -> Done {
        let (copies, min) = (number(copies)? as u8, number(min)? as u8);
        let Some(at) = self.world.create_named(name, OBJECTS * OBJECT_SIZE, copies, min) else {
            return Err(Problem::Run("the volume cannot be created".into()));
        };
        let volume = &mut self.world.volumes[at];
        for object in 0..OBJECTS {
            let cuts = (0..=BLOCKS).map(|block| object * OBJECT_SIZE + block * BLOCK).collect();
            volume.guest.add_region(&mut volume.checker, cuts);
        }
        Ok(())
    }

    fn find(&self, name: &str) -> Result<usize, Problem> {
        let found = self.world.volumes.iter().position(|v| v.name == name);
        found.map_or_else(|| syntax(format!("no volume '{name}'")), Ok)
    }

    fn attach(&mut self, volume: &str, node: &str) -> Done {
        let (volume, node) = (self.find(volume)?, self.node(node)?);
        let before = self.world.instances.len();
        let limit = self.world.now + PATIENCE;
        while self.world.instances.len() == before || !self.world.serving(volume) {
            let idle = self.world.volumes[volume].attaching.is_none();
            let served = self.world.instances.len() > before;
            if self.world.now >= self.world.volumes[volume].retry_at && idle && !served {
                self.world.attach(volume, node);
            }
            self.advance(1)?;
            if self.world.now > limit {
                return self.stuck("it serves");
            }
        }
        Ok(())
    }

    fn detach(&mut self, volume: &str) -> Done {
        let at = self.find(volume)?;
        let limit = self.world.now + PATIENCE;
        while !self.world.detach(at) {
            self.advance(1)?;
            if self.world.now > limit {
                return self.stuck("it is idle");
            }
        }
        let id = self.world.volumes[at].id;
        self.until("it is detached", |w| {
            w.log.state.volumes.get(&id).is_none_or(|v| v.attachment.is_none())
        })
    }

    fn delete(&mut self, volume: &str) -> Done {
        let at = self.find(volume)?;
        self.world.volumes[at].doomed = true;
        self.until("it is deleted", |w| w.volumes[at].deleted)
    }

    /// `[obj N] blocks A..B` as bytes.
    fn place(place: &[&str]) -> Result<Range<u64>, Problem> {
        let (object, blocks) = match place {
            ["obj", object, "blocks", blocks] => (number(object)?, blocks),
            ["blocks", blocks] => (0, blocks),
            _ => return syntax("where? say: obj N blocks A..B"),
        };
        let Some((first, end)) = blocks.split_once("..") else {
            return syntax("which blocks? say: blocks A..B");
        };
        let (first, end) = (number(first)?, number(end)?);
        if first >= end || end > BLOCKS || object >= OBJECTS {
            return syntax(format!("there are {OBJECTS} objects, {BLOCKS} blocks of each"));
        }
        let base = object * OBJECT_SIZE;
        Ok(base + first * BLOCK..base + end * BLOCK)
    }

    fn value(&mut self, volume: usize, name: &str) -> Value {
        if name == "0" {
            return 0;
        }
        let next = self.world.volumes[volume].guest.value() + 1000 * (volume as Value + 1);
        *self.values.entry(name.to_string()).or_insert(next)
    }

    fn write(&mut self, volume: &str, place: &[&str], value: &str, name: Option<&str>) -> Done {
        let (at, range) = (self.find(volume)?, Self::place(place)?);
        let value = self.value(at, value);
        let data = pattern(value, range.clone());
        let op = Op::Write { offset: range.start, data, fua: false };
        let kind = Kind::Write { value, fua: false };
        match name {
            Some(name) => self.begin_request(name, at, op, kind, range),
            None => self.complete(volume, op, kind, range),
        }
    }

    fn begin_read(&mut self, name: &str, volume: &str, place: &[&str]) -> Done {
        let (at, range) = (self.find(volume)?, Self::place(place)?);
        let len = (range.end - range.start) as u32;
        self.begin_request(name, at, Op::Read { offset: range.start, len }, Kind::Read, range)
    }

    fn begin_request(
        &mut self,
        name: &str,
        at: usize,
        op: Op,
        kind: Kind,
        range: Range<u64>,
    ) -> Done {
        let Some(tag) = self.world.request(at, op, kind, range) else {
            return Err(Problem::Run("nobody serves the volume".into()));
        };
        self.pending.insert(name.to_string(), (at, tag));
        Ok(())
    }

    /// A request that has to be answered.
    fn complete(&mut self, volume: &str, op: Op, kind: Kind, range: Range<u64>) -> Done {
        let at = self.find(volume)?;
        self.begin_request("the request", at, op, kind, range)?;
        self.end("the request")
    }

    fn end(&mut self, name: &str) -> Done {
        let Some((at, tag)) = self.pending.remove(name) else {
            return syntax(format!("no request '{name}'"));
        };
        self.until("the request is answered", |w| w.volumes[at].checker.began(tag).is_none())
    }

    fn waits(&mut self, name: &str, steps: &str) -> Done {
        let Some(&(at, tag)) = self.pending.get(name) else {
            return syntax(format!("no request '{name}'"));
        };
        for _ in 0..number(steps)? {
            self.advance(1)?;
            if self.world.volumes[at].checker.began(tag).is_none() {
                return Err(Problem::Run("it was answered, but has to wait".into()));
            }
        }
        Ok(())
    }

    /// A read that has to return a certain value.
    fn expect(&mut self, volume: &str, place: &[&str], value: &str) -> Done {
        let (at, range) = (self.find(volume)?, Self::place(place)?);
        let value = self.value(at, value);
        let len = (range.end - range.start) as u32;
        let op = Op::Read { offset: range.start, len };
        let Some(tag) = self.world.request(at, op, Kind::Read, range.clone()) else {
            return Err(Problem::Run("nobody serves the volume".into()));
        };
        self.world.expected = Some((at, tag, pattern(value, range)));
        self.until("the read is answered", |w| w.volumes[at].checker.began(tag).is_none())
    }

    /// The gateway that a node still has of a volume must not answer anything.
    fn zombie(&mut self, volume: &str, node: &str) -> Done {
        let (volume, node) = (self.find(volume)?, self.node(node)?);
        let active = self.world.volumes[volume].active;
        let found = (0..self.world.instances.len()).rev().find(|i| {
            let instance = &self.world.instances[*i];
            Some(*i) != active && (instance.volume, instance.node) == (volume, node)
        });
        let Some(at) = found else { return syntax("it has no old gateway there") };
        let tag = 1 << 50 | self.world.volumes[volume].guest.tag();
        self.world.instances[at].forbidden.insert(tag);
        self.world.submit(at, Op::Read { offset: 0, len: BLOCK as u32 }, tag);
        self.advance(20)
    }

    fn advance(&mut self, steps: Time) -> Done {
        self.world.advance(steps).map_err(Problem::Run)
    }

    fn until(&mut self, what: &str, reached: impl Fn(&World) -> bool) -> Done {
        let limit = self.world.now + PATIENCE;
        while !reached(&self.world) {
            self.advance(1)?;
            if self.world.now > limit {
                return self.stuck(what);
            }
        }
        Ok(())
    }

    fn stuck(&self, what: &str) -> Done {
        let state = self.world.describe();
        Err(Problem::Run(format!("waited {PATIENCE} steps in vain until {what}: {state}")))
    }
}

fn number(word: &str) -> Result<u64, Problem> {
    word.parse().map_or_else(|_| syntax(format!("'{word}' is not a number")), Ok)
}
