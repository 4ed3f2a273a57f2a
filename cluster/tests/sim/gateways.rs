//! Attachments, and the gateways that they make.

use super::checker::Kind;
use super::net::Port;
use super::topology::duration;
use super::world::{Instance, Mutant, World};
use sheepdog_cluster::command::{Ack, Command};
use sheepdog_cluster::gateway::{Config, Effect, Gateway, Phase};
use sheepdog_cluster::state::Volume;
use sheepdog_types::{BlockError, Burst, Done, Layer, Op, Token};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

impl World {
    /// Attaches the volumes that nobody has.
    pub fn manage_attachments(&mut self) {
        for at in 0..self.volumes.len() {
            let volume = &self.volumes[at];
            if volume.deleted {
                continue;
            }
            if let Some((node, incarnation, ..)) = volume.attaching {
                let n = &self.nodes[node];
                if !n.alive || n.incarnation != incarnation {
                    self.volumes[at].attaching = None;
                } else {
                    self.make_gateway(at);
                }
            } else if volume.doomed {
                self.delete_doomed(at);
            } else if self.guests && self.now >= volume.retry_at && self.wants_gateway(at) {
                let node = self.rng.below(self.nodes.len() as u64) as usize;
                self.attach(at, node);
            }
        }
    }

    /// Whether nobody serves it, or one who has been told dead.
    fn wants_gateway(&mut self, volume: usize) -> bool {
        if self.is_wanted(volume) {
            return false; // by a guest that lives
        }
        let Some(active) = self.volumes[volume].active else { return self.rng.chance(100) };
        let holder = self.nodes[self.instances[active].node].id;
        let gone = !self.log.state.nodes.get(&holder).is_some_and(|n| n.up);
        gone && self.rng.chance(10)
    }

    /// Asks for a volume on behalf of a node.
    pub fn attach(&mut self, volume: usize, node: usize) {
        if !self.serves(node) || !self.nodes[node].runs(self.now) {
            return;
        }
        let n = &self.nodes[node];
        let command = Command::Attach {
            name: self.volumes[volume].name.clone(),
            gateway: n.id,
            incarnation: n.incarnation,
            at: self.now,
        };
        self.volumes[volume].retry_at = self.now + 20;
        self.propose(node, command);
    }

    fn make_gateway(&mut self, at: usize) {
        let volume = &self.volumes[at];
        let Some((node, _, writer, entry)) = volume.attaching else { return };
        if self.nodes[node].applied < entry || !self.nodes[node].runs(self.now) {
            return;
        }
        let config = Config {
            node: self.nodes[node].id,
            volume: volume.id,
            size: volume.size,
            copies: usize::from(volume.copies),
            min_copies: usize::from(volume.min_copies),
            layer: Layer(0),
            writer,
            ack: Ack::Flush,
        };
        let view = Arc::clone(self.view_of(node));
        self.instances.push(Instance {
            gateway: Gateway::new(config, view),
            volume: at,
            node,
            ports: self.nodes.iter().map(|_| Port::default()).collect(),
            inbox: Arc::default(),
            alive: true,
            view_at: self.nodes[node].applied,
            deaf_until: 0,
            held: Vec::new(),
            useful: false,
            detached: false,
            forbidden: BTreeSet::new(),
            spread: BTreeMap::new(),
        });
        let name = self.volumes[at].name.clone();
        note!(self, "n{} is the gateway of {name}, writer {writer}", node + 1);
        let volume = &mut self.volumes[at];
        (volume.active, volume.attaching) = (Some(self.instances.len() - 1), None);
        self.take_seat(at);
        self.after_change();
    }

    /// A clean end of an attachment, if no request is in progress.
    pub fn detach(&mut self, at: usize) -> bool {
        let Some(active) = self.volumes[at].active else { return false };
        let instance = &self.instances[active];
        let idle = instance.gateway.is_idle() && instance.held.is_empty();
        if !self.volumes[at].checker.idle() || !idle {
            return false;
        }
        let (writer, volume) = (instance.gateway.config().writer, self.volumes[at].id);
        let (node, settled) = (instance.node, instance.gateway.is_settled());
        if !self.calm && self.rng.chance(500) {
            self.instances[active].deaf_until = duration(&mut self.rng, self.now);
        }
        // Its devices are gone before the log hears of it.
        self.volumes[at].active = None;
        self.instances[active].detached = true;
        self.propose(node, Command::Detach { volume, writer, settled });
        self.after_change();
        true
    }

    fn delete_doomed(&mut self, at: usize) {
        if self.volumes[at].active.is_some() && !self.detach(at) {
            return;
        }
        if self.rng.chance(30) {
            let id = self.volumes[at].id;
            let known = self.log.state.volumes.get(&id).and_then(|v| v.attachment.clone());
            if let Some(attachment) = known {
                // The first attempt to give it back was lost.
                let (node, writer) = (self.node_index(attachment.gateway), attachment.writer);
                self.propose(node, Command::Detach { volume: id, writer, settled: false });
                return;
            }
            let name = self.volumes[at].name.clone();
            if self.log.leader.is_some() && self.commit(Command::DeleteVolume { name }).is_ok() {
                self.volumes[at].deleted = true;
                self.volumes[at].active = None;
            }
        }
    }

    /// One step of a gateway: the log, the tick, what it wants done.
    pub fn run_instance(&mut self, at: usize) {
        let instance = &self.instances[at];
        let node = instance.node;
        if !instance.alive || !self.nodes[node].runs(self.now) {
            return;
        }
        let known = self.nodes[node].applied;
        if instance.view_at < known && (self.calm || instance.deaf_until <= self.now) {
            self.take_view(at);
        }
        self.release_held(at);
        if self.now.is_multiple_of(2) && self.instances[at].gateway.wants_tick() {
            self.instances[at].gateway.handle_tick();
        }
        self.collect(at);
        self.tell_settled(at);
    }

    /// The others hear when nothing is left that an earlier gateway may have left different.
    fn tell_settled(&mut self, at: usize) {
        let Instance { node, ref gateway, .. } = self.instances[at];
        let (volume, writer) = (gateway.config().volume, gateway.config().writer);
        let unsettled = |v: &Volume| v.unsettled && v.writer == writer;
        let known = self.view_of(node).volumes.get(&volume);
        if known.is_some_and(|v| unsettled(v)) && gateway.is_settled() && self.rng.chance(50) {
            note!(self, "nothing of {volume} differs any more, says writer {writer}");
            self.propose(node, Command::Settled { volume, writer });
        }
    }

    /// The gateway hears of the newest view of its node.
    fn take_view(&mut self, at: usize) {
        let instance = &self.instances[at];
        let (node, old) = (instance.node, self.log.views[instance.view_at].epoch);
        let view = Arc::clone(self.view_of(node));
        let newer = view.epoch > old;
        self.instances[at].view_at = self.nodes[node].applied;
        self.instances[at].gateway.handle_view(view);
        if newer {
            self.after_change();
        }
    }

    /// A request of the guest of a gateway. Without a lease it waits.
    pub fn submit(&mut self, at: usize, op: Op, tag: u64) {
        self.instances[at].held.push((op, tag));
        self.release_held(at);
    }

    pub fn release_held(&mut self, at: usize) {
        let fenced = self.instances[at].gateway.phase() == Phase::Fenced;
        if self.instances[at].held.is_empty() || !(fenced || self.serves(self.instances[at].node)) {
            return;
        }
        // The daemon gives a gateway the newest view of its node before each request, because it may answer a
        // read of what was never written by itself, when another one has the volume. Whatever else comes with
        // an old view the replicas refuse.
        let instance = &self.instances[at];
        let old = self.volumes[instance.volume].active != Some(at);
        let reads = instance.held.iter().any(|(op, _)| matches!(op, Op::Read { .. }));
        if old && reads && instance.view_at < self.nodes[instance.node].applied {
            self.take_view(at);
        }
        let instance = &mut self.instances[at];
        for (op, tag) in std::mem::take(&mut instance.held) {
            let sink = Arc::clone(&instance.inbox);
            instance.gateway.handle_request(op, Token::new(tag, sink));
        }
    }

    /// Runs the effects of a gateway and takes completions.
    pub fn collect(&mut self, at: usize) {
        let (mut burst, mut returned) = (Burst::new(), Vec::new());
        while let Some(effect) = self.instances[at].gateway.poll_effect() {
            match effect {
                Effect::Call { id, node, call, blocks } => {
                    let to = self.node_index(node);
                    self.send(at, to, id, call, blocks);
                }
                Effect::Complete { token, completion } => token.complete(completion, &mut burst),
                Effect::Return { op, token } => {
                    token.complete(Err(BlockError::Io), &mut burst);
                    let told = self.instances[at].inbox.0.lock().unwrap().pop();
                    returned.extend(told.map(|(tag, _)| (op, tag)));
                }
                Effect::LostWrites { object } => self.lost_writes(at, object),
            }
        }
        drop(burst);
        let mut done = std::mem::take(&mut *self.instances[at].inbox.0.lock().unwrap());
        for (op, tag) in returned {
            let lies = self.mutant == Mutant::FencedAnswers && matches!(op, Op::Write { .. });
            if lies && !self.instances[at].forbidden.contains(&tag) {
                done.push((tag, Ok(Done::Nothing)));
            } else if !self.take_back(at, op, tag) {
                done.push((tag, Err(BlockError::Io)));
            }
        }
        for (tag, completion) in done {
            let volume = self.instances[at].volume;
            if self.trace.on {
                let what = completion.as_ref().map(|_| ());
                note!(self, "{} request {tag} ends: {what:?}", self.volumes[volume].name);
            }
            self.judge(at, tag, completion);
        }
    }

    fn lost_writes(&mut self, at: usize, object: sheepdog_types::ObjectId) {
        note!(self, "acknowledged writes of {object} are gone");
        let volume = self.instances[at].volume;
        if self.doubled_at.is_none() && self.volumes[volume].active == Some(at) {
            self.trouble.get_or_insert(format!("acknowledged writes of {object} are gone"));
        }
        let now = self.now;
        self.volumes[volume].checker.lose(now);
    }

    fn judge(&mut self, at: usize, tag: u64, completion: Result<Done, BlockError>) {
        let index = self.instances[at].volume;
        let now = self.now;
        let counts = self.volumes[index].active == Some(at) || self.has_passed_on(at);
        let forbidden = self.instances[at].forbidden.contains(&tag);
        let problem = if !counts || forbidden {
            (forbidden && completion.is_ok())
                .then(|| format!("an old gateway served request {tag}"))
        } else {
            if let (Some((volume, expected, bytes)), Ok(Done::Data(data))) =
                (&self.expected, &completion)
                && (*volume, *expected) == (index, tag)
                && bytes != data
            {
                self.trouble = Some("the read returned something else".into());
            }
            let checker = &mut self.volumes[index].checker;
            let began = checker.began(tag).unwrap_or(now);
            self.instances[at].useful |= completion.is_ok();
            match completion {
                Ok(Done::Data(data)) => checker.done(tag, &data, now).err(),
                Ok(Done::Nothing) => checker.done(tag, &[], now).err(),
                Err(BlockError::NoSpace) if self.full_at.is_some_and(|at| at >= began) => {
                    checker.abandon(tag, now);
                    None
                }
                // A flush after acknowledged writes were lost, or the only copy that is up fails.
                Err(BlockError::Io)
                    if self.doubled_at.is_some_and(|at| checker.is_flush(tag) || at >= began) =>
                {
                    checker.abandon(tag, now);
                    None
                }
                Err(error) => Some(format!("request {tag} failed: {error}")),
            }
        };
        if let Some(problem) = problem {
            let problem = format!("{}: {problem}", self.volumes[index].name);
            self.trouble.get_or_insert(problem);
        }
    }

    pub fn serving(&self, volume: usize) -> bool {
        self.volumes[volume]
            .active
            .is_some_and(|at| self.instances[at].gateway.phase() == Phase::Serving)
    }

    /// Reads everything that guests touch.
    pub fn read_all(&mut self) {
        for at in 0..self.volumes.len() {
            if self.volumes[at].active.is_none() {
                continue;
            }
            for range in self.volumes[at].guest.whole_regions() {
                let now = self.now;
                let volume = &mut self.volumes[at];
                let tag = volume.guest.tag();
                volume.checker.begin(tag, Kind::Read, range.clone(), now);
                let len = (range.end - range.start) as u32;
                self.submit_where_it_is(at, Op::Read { offset: range.start, len }, tag);
            }
        }
    }

    pub fn flush_all(&mut self) {
        for at in 0..self.volumes.len() {
            if self.volumes[at].active.is_none() {
                continue;
            }
            let now = self.now;
            let volume = &mut self.volumes[at];
            let tag = volume.guest.tag();
            volume.checker.begin(tag, Kind::Flush, 0..0, now);
            self.submit_where_it_is(at, Op::Flush, tag);
        }
    }
}
