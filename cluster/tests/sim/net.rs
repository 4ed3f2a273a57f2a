//! Connections from gateways to replicas, cuts between nodes, and copies of layers.

use super::store::Image;
use super::world::{Mutant, Time, World};
use sheepdog_cluster::gateway::ReplyData;
use sheepdog_cluster::message::{Blocks, Body, Call, Failure, Reject, Reply, Request};
use sheepdog_types::{DiskId, Epoch, LayerKey, Version, WriterGen};
use std::collections::VecDeque;
use std::sync::Arc;

/// Which node's packets reach which other one.
#[derive(Default)]
pub struct Net {
    cut: Vec<Vec<bool>>,
    cuts: usize,
    pub heal_at: Time,
}

impl Net {
    pub fn grow(&mut self, nodes: usize) {
        self.cut.iter_mut().for_each(|row| row.resize(nodes, false));
        self.cut.resize(nodes, vec![false; nodes]);
    }

    pub fn set(&mut self, from: usize, to: usize, cut: bool) {
        if from != to && self.cut[from][to] != cut {
            self.cut[from][to] = cut;
            if cut { self.cuts += 1 } else { self.cuts -= 1 }
        }
    }

    pub fn heal(&mut self) {
        self.cut.iter_mut().for_each(|row| row.fill(false));
        self.cuts = 0;
    }

    pub fn is_whole(&self) -> bool {
        self.cuts == 0
    }

    pub fn open(&self, from: usize, to: usize) -> bool {
        self.cuts == 0 || !self.cut[from][to]
    }

    pub fn both(&self, a: usize, b: usize) -> bool {
        self.cuts == 0 || (!self.cut[a][b] && !self.cut[b][a])
    }
}

type Sent = (Time, u64, Call, Option<Arc<Blocks>>);

/// What became of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Link {
    #[default]
    Up,
    /// Broken; the gateway hears of it at this time.
    Broken(Time),
    /// The gateway knows.
    Down,
}

/// A gateway's connection to one node. What is sent arrives in order, late, or never.
#[derive(Default)]
pub struct Port {
    pub link: Link,
    /// Counts connections.
    pub count: u64,
    calls: VecDeque<Sent>,
    replies: VecDeque<(Time, u64, Reply, Vec<u8>)>,
    /// Nothing came through since then; it ends at the second time.
    stalled: Option<(Time, Time)>,
}

impl Port {
    fn idle(&self) -> bool {
        self.link == Link::Up && self.calls.is_empty() && self.replies.is_empty()
    }
}

/// A call that a replica had received when its connection broke or its process was stopped.
pub struct Straggler {
    at: Time,
    from: usize,
    node: usize,
    incarnation: u64,
    call: Call,
    blocks: Option<Arc<Blocks>>,
    /// It had been admitted.
    admitted: bool,
    origin: Option<Origin>,
}

/// Where a finished copy is reported.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    Gateway { instance: usize, port: usize, count: u64, id: u64 },
    Nobody,
    Sync { id: u64 },
}

/// A layer being copied from one disk to another.
pub struct Job {
    at: Time,
    /// Index of the disk that copies.
    pub disk: usize,
    pub incarnation: u64,
    epoch: Epoch,
    key: LayerKey,
    expect: Version,
    target: Version,
    from: DiskId,
    call: Option<Call>,
    image: Option<Image>,
    origin: Origin,
}

/// The versions a copy leads from and to.
pub type Versions = (Version, Version);

impl World {
    /// How long a message takes.
    pub fn delay(&mut self, from: usize, to: usize) -> Time {
        let longest = self.plan.delay.max(1);
        let slow = |n: usize| {
            let (factor, until) = self.nodes[n].slow;
            if until > self.now { factor } else { 1 }
        };
        let factor = slow(from).max(slow(to));
        if self.rng.chance(20) { longest * factor * 2 } else { self.rng.range(1, longest) * factor }
    }

    pub fn send(
        &mut self,
        from: usize,
        to: usize,
        id: u64,
        call: Call,
        blocks: Option<Arc<Blocks>>,
    ) {
        let node = self.instances[from].node;
        let at = self.now + if node == to { 1 } else { self.delay(node, to) };
        note!(self, "{}", self.describe_call(from, to, &call));
        if self.mutant == Mutant::AckAtMinCopies && self.is_beyond(from, &call) {
            let at = self.now + 1;
            self.instances[from].ports[to].replies.push_front((at, id, Reply::Done, Vec::new()));
        }
        let port = &mut self.instances[from].ports[to];
        match port.link {
            Link::Up => {
                let at = port.calls.back().map_or(at, |c| c.0.max(at));
                port.calls.push_back((at, id, call, blocks));
            }
            Link::Down => port.link = Link::Broken(at),
            Link::Broken(_) => {}
        }
    }

    /// Whether this is a write that as many other replicas were sent as the volume has to have.
    fn is_beyond(&mut self, from: usize, call: &Call) -> bool {
        let Request::Write { key, version, .. } = &call.request else { return false };
        let instance = &mut self.instances[from];
        let sent = instance.spread.entry((*key, version.seq)).or_default();
        *sent += 1;
        *sent > usize::from(self.volumes[instance.volume].min_copies)
    }

    fn describe_call(&self, from: usize, to: usize, call: &Call) -> String {
        let instance = &self.instances[from];
        let (name, node) = (&self.volumes[instance.volume].name, instance.node + 1);
        let what = match &call.request {
            Request::Write { key, prev, version, first, body } => {
                let (end, object) = (first + body.count(), key.object.index.0);
                let verb = match body {
                    Body::Data { .. } => "writes",
                    Body::Zero { .. } => "zeroes",
                    Body::Nothing => "touches",
                };
                format!("{verb} obj {object} blocks {first}..{end} ({prev} to {version})")
            }
            Request::Read { object, first, count, .. } => {
                format!("reads obj {} blocks {first}..{}", object.index.0, first + count)
            }
            Request::Stat { key } => format!("asks for obj {}", key.object.index.0),
            Request::Recover { key, expect, from, target } => format!(
                "has obj {} copied from disk {} ({expect} to {target})",
                key.object.index.0, from.0
            ),
            other => format!("{other:?}"),
        };
        format!("{name}@n{node} -> n{} disk {} epoch {}: {what}", to + 1, call.disk.0, call.epoch)
    }

    /// Breaks a connection. Calls that had arrived may still be worked on.
    pub fn break_link(&mut self, from: usize, to: usize) {
        let node = self.instances[from].node;
        if node == to && self.nodes[to].alive {
            return;
        }
        let notice = self.now + self.rng.range(1, 30);
        let port = &mut self.instances[from].ports[to];
        if port.link != Link::Up {
            return;
        }
        port.link = Link::Broken(notice);
        port.stalled = None;
        port.replies.clear();
        let calls = std::mem::take(&mut port.calls);
        if self.rng.chance(500) && self.net.open(node, to) {
            let incarnation = self.nodes[to].incarnation;
            for (at, _, call, blocks) in calls {
                let at = at + self.rng.range(0, 60);
                let (admitted, origin) = (false, None);
                let node = to;
                self.stragglers.push(Straggler {
                    at,
                    from,
                    node,
                    incarnation,
                    call,
                    blocks,
                    admitted,
                    origin,
                });
            }
        }
    }

    /// The process is stopped amid the calls that are about to arrive.
    pub fn freeze(&mut self, at: usize, until: Time) {
        note!(self, "n{} is stopped until t={until}", at + 1);
        for from in 0..self.instances.len() {
            if !self.rng.chance(500) {
                continue;
            }
            let soon = self.now + 3;
            let port = &mut self.instances[from].ports[at];
            if port.link != Link::Up || port.calls.front().is_none_or(|c| c.0 > soon) {
                continue;
            }
            let count = port.count;
            let Some((_, id, call, blocks)) = port.calls.pop_front() else { continue };
            let origin = Some(Origin::Gateway { instance: from, port: at, count, id });
            let admitted = self.admit(at, &call).is_ok();
            let (node, incarnation) = (at, self.nodes[at].incarnation);
            let at = until;
            self.stragglers.push(Straggler {
                at,
                from,
                node,
                incarnation,
                call,
                blocks,
                admitted,
                origin,
            });
        }
        self.nodes[at].frozen_until = until;
    }

    pub fn deliver_messages(&mut self) {
        let now = self.now;
        for from in 0..self.instances.len() {
            if !self.instances[from].alive {
                continue;
            }
            for to in 0..self.nodes.len() {
                if !self.instances[from].ports[to].idle() {
                    self.deliver_port(from, to);
                }
            }
        }
        if self.stragglers.iter().all(|s| s.at > now) {
            return;
        }
        let all = std::mem::take(&mut self.stragglers);
        let (due, later): (Vec<_>, Vec<_>) = all.into_iter().partition(|s| s.at <= now);
        self.stragglers = later;
        for s in due {
            self.run_straggler(s);
        }
    }

    fn run_straggler(&mut self, s: Straggler) {
        let node = &self.nodes[s.node];
        if !node.alive || node.incarnation != s.incarnation {
            return;
        }
        if !node.runs(self.now) {
            self.stragglers.push(s);
            return;
        }
        let admission = if s.admitted { Ok(()) } else { self.admit(s.node, &s.call) };
        let reply = match admission {
            Err(reject) => Some((Reply::Rejected(reject), Vec::new())),
            Ok(()) => self.serve(&s.call, s.blocks.as_deref(), s.origin),
        };
        if let (Some((reply, data)), Some(origin)) = (reply, s.origin) {
            self.answer(origin, reply, data);
        }
    }

    fn deliver_port(&mut self, from: usize, to: usize) {
        let now = self.now;
        let node = self.instances[from].node;
        self.deliver_calls(from, to);
        if !self.nodes[node].runs(now) {
            return;
        }
        match self.instances[from].ports[to].link {
            Link::Broken(at) if at <= now => {
                self.instances[from].ports[to].link = Link::Down;
                let id = self.nodes[to].id;
                self.instances[from].gateway.handle_unreachable(id);
            }
            Link::Up | Link::Broken(_) => {}
            Link::Down => self.connect(from, to),
        }
        while self.instances[from].ports[to].replies.front().is_some_and(|r| r.0 <= now)
            && self.net.open(to, node)
        {
            let popped = self.instances[from].ports[to].replies.pop_front();
            let Some((_, id, reply, bytes)) = popped else { break };
            self.instances[from].ports[to].stalled = None;
            note!(
                self,
                "{}@n{} <- n{}: {reply:?}",
                self.instances[from].volume + 1,
                node + 1,
                to + 1
            );
            self.instances[from].gateway.handle_reply(id, reply, ReplyData { bytes });
        }
        self.watch_stall(from, to);
    }

    fn connect(&mut self, from: usize, to: usize) {
        let node = self.instances[from].node;
        if self.nodes[to].runs(self.now) && self.net.both(node, to) && self.rng.chance(60) {
            // A replica gives up what came over the connection before.
            self.stragglers.retain(|s| (s.from, s.node) != (from, to) || s.admitted);
            let port = &mut self.instances[from].ports[to];
            (port.link, port.count) = (Link::Up, port.count + 1);
            let id = self.nodes[to].id;
            self.instances[from].gateway.handle_reachable(id);
        }
    }

    fn deliver_calls(&mut self, from: usize, to: usize) {
        let now = self.now;
        let node = self.instances[from].node;
        if !self.nodes[to].runs(now) || !self.net.open(node, to) {
            return;
        }
        while self.instances[from].ports[to].calls.front().is_some_and(|c| c.0 <= now) {
            let port = &mut self.instances[from].ports[to];
            port.stalled = None;
            let count = port.count;
            let Some((_, id, call, blocks)) = port.calls.pop_front() else { break };
            let origin = Origin::Gateway { instance: from, port: to, count, id };
            let reply = match self.admit(to, &call) {
                Err(reject) => Some((Reply::Rejected(reject), Vec::new())),
                Ok(()) => self.serve(&call, blocks.as_deref(), Some(origin)),
            };
            if let Some((reply, data)) = reply {
                self.answer(origin, reply, data);
            }
        }
    }

    /// A connection on which nothing goes on breaks some time.
    fn watch_stall(&mut self, from: usize, to: usize) {
        let now = self.now;
        let port = &self.instances[from].ports[to];
        let waits = port.calls.front().is_some_and(|c| c.0 <= now)
            || port.replies.front().is_some_and(|r| r.0 <= now);
        if port.link != Link::Up || !waits {
            return;
        }
        match port.stalled {
            None => {
                let patience = self.rng.range(20, 300);
                self.instances[from].ports[to].stalled = Some((now, now + patience));
            }
            Some((_, end)) if end <= now => self.break_link(from, to),
            Some(_) => {}
        }
    }

    pub fn answer(&mut self, origin: Origin, reply: Reply, data: Vec<u8>) {
        let Origin::Gateway { instance, port: to, count, id } = origin else { return };
        let node = self.instances[instance].node;
        let delay = if node == to { 1 } else { self.delay(to, node) };
        let port = &mut self.instances[instance].ports[to];
        if port.link == Link::Up && port.count == count {
            let at = port.replies.back().map_or(0, |r| r.0).max(self.now + delay);
            port.replies.push_back((at, id, reply, data));
        }
    }

    pub fn start_copy(
        &mut self,
        disk: usize,
        key: LayerKey,
        (expect, target): Versions,
        from: DiskId,
        call: Option<Call>,
        origin: Origin,
    ) {
        let at = self.now + self.rng.range(1, 25);
        let node = self.disks[disk].node;
        let incarnation = self.nodes[node].incarnation;
        let epoch = self.view_of(node).epoch;
        let image = None;
        self.jobs.push(Job {
            at,
            disk,
            incarnation,
            epoch,
            key,
            expect,
            target,
            from,
            call,
            image,
            origin,
        });
    }

    /// A gateway that asks for a version counts on it: no copy may change it behind its back.
    pub fn cancel_copies(&mut self, disk: usize, key: LayerKey) {
        if !self.jobs.iter().any(|j| j.disk == disk && j.key == key) {
            return;
        }
        let all = std::mem::take(&mut self.jobs);
        let (cancelled, others) =
            all.into_iter().partition::<Vec<_>, _>(|j| j.disk == disk && j.key == key);
        self.jobs = others;
        for job in cancelled {
            self.report(&job, Err(Reply::Failed(Failure::Source)));
        }
    }

    pub fn run_jobs(&mut self) {
        let now = self.now;
        if self.jobs.iter().all(|j| j.at > now) {
            return;
        }
        let all = std::mem::take(&mut self.jobs);
        let (due, later) = all.into_iter().partition::<Vec<_>, _>(|j| j.at <= now);
        self.jobs = later;
        for mut job in due {
            let node = &self.nodes[self.disks[job.disk].node];
            if !node.alive || node.incarnation != job.incarnation {
                continue;
            }
            if !node.runs(now) {
                self.jobs.push(job);
                continue;
            }
            match job.image.take() {
                None => self.fetch(job),
                Some(image) => {
                    let result = self.finish_copy(&job, image);
                    self.report(&job, result);
                }
            }
        }
    }

    fn fetch(&mut self, mut job: Job) {
        let source = self.disk_index(job.from);
        let (here, there) = (self.disks[job.disk].node, self.disks[source].node);
        let call = Call {
            epoch: job.epoch,
            disk: job.from,
            writer: WriterGen(0),
            request: Request::Fetch { key: job.key },
        };
        let (store, own) = (&self.disks[source].store, &self.disks[job.disk].store);
        let usable = self.nodes[there].runs(self.now)
            && self.net.both(here, there)
            && self.disks[source].used
            && self.admit(there, &call).is_ok()
            && store.can_give(job.key, own)
            && (store.version(job.key) == job.target || matches!(job.origin, Origin::Sync { .. }));
        if usable {
            job.image = Some(store.image(job.key));
            job.at = self.now + self.rng.range(1, 25);
            self.jobs.push(job);
        } else {
            self.report(&job, Err(Reply::Failed(Failure::Source)));
        }
    }

    fn finish_copy(&mut self, job: &Job, image: Image) -> Result<(), Reply> {
        let node = self.disks[job.disk].node;
        if let Some(call) = &job.call {
            self.admit(node, call).map_err(Reply::Rejected)?;
        }
        let now = self.view_of(node).epoch;
        if now != job.epoch && self.mutant != Mutant::SkipEpoch {
            return Err(Reply::Rejected(Reject::StaleEpoch { now }));
        }
        if !self.disks[job.disk].used {
            return Err(Reply::Failed(Failure::Disk));
        }
        let full = self.disks[job.disk].store.full;
        if full > 0 && self.rng.chance(full) {
            self.note_refusal(job.disk, job.key);
            return Err(Reply::Failed(Failure::NoSpace));
        }
        let store = &mut self.disks[job.disk].store;
        let have = store.version(job.key);
        if have != job.expect {
            return Err(Reply::Failed(Failure::Behind { have }));
        }
        note!(self, "disk {} copies {}: {have} to {}", job.disk + 101, job.key, image.version);
        self.disks[job.disk].store.replace(job.key, image);
        Ok(())
    }

    fn report(&mut self, job: &Job, result: Result<(), Reply>) {
        match job.origin {
            Origin::Sync { id } => self.sync_copied(job.disk, job.epoch, id, result),
            origin => self.answer(origin, result.err().unwrap_or(Reply::Done), Vec::new()),
        }
    }
}
