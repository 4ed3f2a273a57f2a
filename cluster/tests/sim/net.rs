//! Connections from gateways to replicas, and what replicas do with what arrives.

use super::store::{Image, Write};
use super::world::{Mutant, World};
use sheepdog_cluster::gateway::ReplyData;
use sheepdog_cluster::message::{Blocks, Call, Failure, Reject, Reply, Request};
use sheepdog_cluster::replica;
use sheepdog_types::{DiskId, Epoch, LayerKey, Version, WriterGen};
use std::collections::VecDeque;
use std::sync::Arc;

type Sent = (u64, u64, Call, Option<Arc<Blocks>>);

/// What became of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Link {
    #[default]
    Up,
    /// Broken; the gateway hears of it at this time.
    Broken(u64),
    /// The gateway knows.
    Down,
}

/// A gateway's connection to one node. What is sent arrives in order, or never.
#[derive(Default)]
pub struct Port {
    pub link: Link,
    /// Counts connections.
    pub count: u64,
    calls: VecDeque<Sent>,
    replies: VecDeque<(u64, u64, Reply, Vec<u8>)>,
}

impl Port {
    pub fn describe(&self) -> String {
        format!("{:?} {} calls {} replies", self.link, self.calls.len(), self.replies.len())
    }
}

/// A call that a replica had received when its connection broke, and works on later.
pub struct Straggler {
    at: u64,
    from: usize,
    node: usize,
    incarnation: u64,
    call: Call,
    blocks: Option<Arc<Blocks>>,
}

/// Where a finished copy is reported.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    Gateway { instance: usize, port: usize, count: u64, id: u64 },
    Sync,
}

/// A layer being copied from one disk to another.
pub struct Job {
    at: u64,
    pub node: usize,
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

impl World {
    pub fn send(
        &mut self,
        from: usize,
        to: usize,
        id: u64,
        call: Call,
        blocks: Option<Arc<Blocks>>,
    ) {
        let delay = self.rng.range(1, 12);
        let at = self.now + delay;
        if self.trace {
            let writer = call.writer;
            eprintln!("{} {writer} -> {to}: {} {:?}", self.now, call.epoch, call.request);
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

    /// Breaks a connection. Calls that had arrived may still be worked on.
    pub fn break_link(&mut self, from: usize, to: usize) {
        let notice = self.now + self.rng.range(1, 30);
        let port = &mut self.instances[from].ports[to];
        if port.link != Link::Up {
            return;
        }
        port.link = Link::Broken(notice);
        port.replies.clear();
        let calls = std::mem::take(&mut port.calls);
        if self.rng.chance(500) {
            for (at, _, call, blocks) in calls {
                let at = at + self.rng.range(0, 60);
                let incarnation = self.nodes[to].incarnation;
                self.stragglers.push(Straggler { at, from, node: to, incarnation, call, blocks });
            }
        }
    }

    pub fn deliver_messages(&mut self) {
        let now = self.now;
        for from in 0..self.instances.len() {
            for to in 0..self.nodes.len() {
                self.deliver_port(from, to);
            }
        }
        let (due, later) = std::mem::take(&mut self.stragglers)
            .into_iter()
            .partition::<Vec<_>, _>(|s| s.at <= now);
        self.stragglers = later;
        for s in due {
            if self.nodes[s.node].alive && self.nodes[s.node].incarnation == s.incarnation {
                self.serve(s.node, &s.call, s.blocks.as_deref(), None);
            }
        }
    }

    fn deliver_port(&mut self, from: usize, to: usize) {
        let now = self.now;
        if !self.instances[from].alive {
            return;
        }
        match self.instances[from].ports[to].link {
            Link::Up => {}
            Link::Broken(at) if at <= now => {
                self.instances[from].ports[to].link = Link::Down;
                let id = self.nodes[to].id;
                self.instances[from].gateway.handle_unreachable(id);
            }
            Link::Broken(_) => {}
            Link::Down => {
                if self.nodes[to].alive && self.rng.chance(60) {
                    // A replica gives up what came over the connection before.
                    self.stragglers.retain(|s| (s.from, s.node) != (from, to));
                    let port = &mut self.instances[from].ports[to];
                    (port.link, port.count) = (Link::Up, port.count + 1);
                    let id = self.nodes[to].id;
                    self.instances[from].gateway.handle_reachable(id);
                }
            }
        }
        while self.instances[from].ports[to].calls.front().is_some_and(|c| c.0 <= now) {
            let port = &mut self.instances[from].ports[to];
            let count = port.count;
            let Some((_, id, call, blocks)) = port.calls.pop_front() else { break };
            let origin = Origin::Gateway { instance: from, port: to, count, id };
            if let Some((reply, data)) = self.serve(to, &call, blocks.as_deref(), Some(origin)) {
                self.answer(origin, reply, data);
            }
        }
        while self.instances[from].ports[to].replies.front().is_some_and(|r| r.0 <= now) {
            let popped = self.instances[from].ports[to].replies.pop_front();
            let Some((_, id, reply, bytes)) = popped else { break };
            if self.trace {
                let writer = self.instances[from].gateway.config().writer;
                eprintln!("{now} {writer} <- {to}: {reply:?}");
            }
            self.instances[from].gateway.handle_reply(id, reply, ReplyData { bytes });
        }
    }

    fn answer(&mut self, origin: Origin, reply: Reply, data: Vec<u8>) {
        let Origin::Gateway { instance, port, count, id } = origin else { return };
        let delay = self.rng.range(1, 12);
        let port = &mut self.instances[instance].ports[port];
        if port.link == Link::Up && port.count == count {
            let at = port.replies.back().map_or(0, |r| r.0).max(self.now + delay);
            port.replies.push_back((at, id, reply, data));
        }
    }

    fn admit(&self, node: usize, call: &Call) -> Result<(), Reject> {
        let view = self.view_of(node);
        let me = &self.nodes[node];
        let mut call = call.clone();
        let mut lease = me.lease;
        if self.mutant == Mutant::SkipEpoch {
            (call.epoch, lease) = (view.epoch, true);
        }
        if self.mutant == Mutant::NotFenced
            && call.writer != WriterGen(0)
            && let Some(volume) = view.volumes.get(&self.volume)
        {
            if let Request::Write { version, .. } = &mut call.request {
                version.writer = volume.writer;
            }
            call.writer = volume.writer;
        }
        replica::admit(&view, me.id, lease, &call)
    }

    /// What a replica answers; nothing while it copies.
    fn serve(
        &mut self,
        node: usize,
        call: &Call,
        blocks: Option<&Blocks>,
        origin: Option<Origin>,
    ) -> Option<(Reply, Vec<u8>)> {
        if let Err(reject) = self.admit(node, call) {
            return Some((Reply::Rejected(reject), Vec::new()));
        }
        let mutant = self.mutant;
        let store = &mut self.nodes[node].store;
        let mut data = Vec::new();
        let reply = match &call.request {
            Request::Write { key, prev, version, first, body } => {
                if mutant == Mutant::AckBeforeApply && self.rng.chance(30) {
                    return Some((Reply::Done, data));
                }
                let (key, prev, version) = (*key, *prev, *version);
                let write = Write { key, prev, version, first: *first, body: *body, blocks };
                store.write(&write, mutant == Mutant::SkipPrev, &mut self.rng)
            }
            Request::Read { object, layer, first, count } => {
                let key = LayerKey { object: *object, layer: *layer };
                match store.read(key, *first, *count) {
                    Ok(bytes) => {
                        data = bytes;
                        Reply::Data { count: *count }
                    }
                    Err(_) if mutant == Mutant::ReadDamaged => {
                        data = vec![0xDB; usize::from(*count) * 4096];
                        Reply::Data { count: *count }
                    }
                    Err(block) => Reply::Failed(Failure::Checksum { block }),
                }
            }
            Request::Stat { key } => {
                let version = store.version(*key);
                self.cancel_copies(node, *key);
                Reply::Version { version }
            }
            Request::Flush => {
                if mutant != Mutant::FlushLies {
                    store.flush();
                }
                Reply::Done
            }
            Request::Recover { .. } if mutant == Mutant::RecoverNothing => Reply::Done,
            Request::Recover { key, expect, from, target } => {
                let have = store.version(*key);
                if have == *expect {
                    let origin = origin.unwrap_or(Origin::Gateway {
                        instance: 0,
                        port: 0,
                        count: u64::MAX,
                        id: 0,
                    });
                    let versions = (*expect, *target);
                    self.start_copy(node, *key, versions, *from, Some(call.clone()), origin);
                    return None;
                }
                Reply::Failed(Failure::Behind { have })
            }
            Request::Fence { .. } => Reply::Done,
            other => panic!("a gateway never asks {other:?}"),
        };
        Some((reply, data))
    }

    pub fn start_copy(
        &mut self,
        node: usize,
        key: LayerKey,
        (expect, target): (Version, Version),
        from: DiskId,
        call: Option<Call>,
        origin: Origin,
    ) {
        let at = self.now + self.rng.range(1, 25);
        let incarnation = self.nodes[node].incarnation;
        let epoch = self.view_of(node).epoch;
        let image = None;
        self.jobs.push(Job {
            at,
            node,
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
    fn cancel_copies(&mut self, node: usize, key: LayerKey) {
        let (cancelled, others) = std::mem::take(&mut self.jobs)
            .into_iter()
            .partition::<Vec<_>, _>(|j| j.node == node && j.key == key);
        self.jobs = others;
        for job in cancelled {
            self.report(&job, Err(Reply::Failed(Failure::Source)));
        }
    }

    pub fn run_jobs(&mut self) {
        let now = self.now;
        let (due, later) =
            std::mem::take(&mut self.jobs).into_iter().partition::<Vec<_>, _>(|j| j.at <= now);
        self.jobs = later;
        for mut job in due {
            if !self.nodes[job.node].alive || self.nodes[job.node].incarnation != job.incarnation {
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
        let call = Call {
            epoch: job.epoch,
            disk: job.from,
            writer: WriterGen(0),
            request: Request::Fetch { key: job.key },
        };
        let store = &self.nodes[source].store;
        let usable = self.nodes[source].alive
            && self.admit(source, &call).is_ok()
            && !store.is_damaged(job.key)
            && (store.version(job.key) == job.target || job.origin == Origin::Sync);
        if usable {
            job.image = Some(store.image(job.key));
            job.at = self.now + self.rng.range(1, 25);
            self.jobs.push(job);
        } else {
            self.report(&job, Err(Reply::Failed(Failure::Source)));
        }
    }

    fn finish_copy(&mut self, job: &Job, image: Image) -> Result<(), Reply> {
        if let Some(call) = &job.call {
            self.admit(job.node, call).map_err(Reply::Rejected)?;
        }
        let now = self.view_of(job.node).epoch;
        if now != job.epoch && self.mutant != Mutant::SkipEpoch {
            return Err(Reply::Rejected(Reject::StaleEpoch { now }));
        }
        let full = self.nodes[job.node].store.full;
        if full > 0 && self.rng.chance(full) {
            return Err(Reply::Failed(Failure::NoSpace));
        }
        let store = &mut self.nodes[job.node].store;
        let have = store.version(job.key);
        if have != job.expect {
            return Err(Reply::Failed(Failure::Behind { have }));
        }
        if self.trace {
            let (key, node) = (job.key, job.node);
            eprintln!("{} copy {key} on {node}: {have} to {}", self.now, image.version);
        }
        store.replace(job.key, image);
        Ok(())
    }

    fn report(&mut self, job: &Job, result: Result<(), Reply>) {
        match job.origin {
            Origin::Sync => self.sync_copied(job.node, job.epoch, result),
            origin => self.answer(origin, result.err().unwrap_or(Reply::Done), Vec::new()),
        }
    }
}
