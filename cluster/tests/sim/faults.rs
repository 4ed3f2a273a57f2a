//! What goes wrong, and how nodes come back.

use super::world::{Mode, World};
use sheepdog_cluster::command::Command;

impl World {
    pub fn run_faults(&mut self) {
        self.break_some_link();
        match self.mode {
            Mode::Careful | Mode::Wild => self.crash_something(),
            Mode::Rot => self.rot(),
            Mode::Full => self.fill(),
        }
        if self.mode != Mode::Rot && self.nodes.len() < 5 && self.rng.chance(1) {
            self.add_node();
        }
        if self.junk.is_some() && self.rng.chance(2) {
            self.junk = None;
            let _ = self.propose(Command::DeleteVolume { name: "junk".into() });
        }
        if self.rng.chance(1) {
            self.hand_over();
        }
    }

    fn break_some_link(&mut self) {
        if self.rng.chance(8) && !self.instances.is_empty() {
            let from = self.rng.below(self.instances.len() as u64) as usize;
            let to = self.rng.below(self.nodes.len() as u64) as usize;
            self.break_link(from, to);
        }
    }

    fn crash_something(&mut self) {
        let at = self.rng.below(self.nodes.len() as u64) as usize;
        match self.rng.below(1000) {
            0..=3 => self.kill(at, false),
            4 if self.mode == Mode::Wild => self.kill(at, true),
            4 if self.complete() && self.nodes.iter().all(|n| n.alive && n.lease) => {
                self.kill(at, true);
            }
            5 if self.mode == Mode::Wild && self.rng.chance(300) => {
                self.lose_all_power(false, true);
            }
            6 => self.isolate(at),
            _ => {}
        }
    }

    /// A lossy failure of one node in a careful run: no other until all is complete again.
    fn must_wait(&self) -> bool {
        self.mode == Mode::Careful && self.tainted
    }

    fn kill(&mut self, at: usize, power: bool) {
        if !self.nodes[at].alive || self.must_wait() {
            return;
        }
        if self.trace {
            eprintln!("{} kill {at} power {power}", self.now);
        }
        self.stats.crashes += 1;
        let node = &mut self.nodes[at];
        (node.alive, node.lease, node.sync, node.enters_at) = (false, false, None, None);
        if power {
            node.store.lose_power(&mut self.rng, false);
            self.tainted = true;
        }
        for instance in 0..self.instances.len() {
            self.break_link(instance, at);
            if self.instances[instance].node == at {
                self.instances[instance].alive = false;
                if self.active == Some(instance) {
                    self.lose_gateway();
                }
            }
        }
        if self.mode == Mode::Wild {
            self.after_change();
        }
    }

    fn lose_gateway(&mut self) {
        self.active = None;
        self.checker.abandon_all(self.now);
        self.after_change();
    }

    /// All nodes at once; `everything` that was not flushed is gone.
    pub fn lose_all_power(&mut self, everything: bool, taint: bool) {
        if self.trace {
            eprintln!("{} power loss of all", self.now);
        }
        self.stats.crashes += 1;
        if self.active.is_some() {
            self.lose_gateway();
        }
        self.attaching = None;
        for at in 0..self.nodes.len() {
            let node = &mut self.nodes[at];
            (node.alive, node.lease, node.sync, node.enters_at) = (false, false, None, None);
            node.store.lose_power(&mut self.rng, everything);
        }
        for instance in 0..self.instances.len() {
            self.instances[instance].alive = false;
            for to in 0..self.nodes.len() {
                self.break_link(instance, to);
            }
        }
        self.stragglers.clear();
        self.jobs.clear();
        if taint {
            self.tainted = true;
            self.checker.lose(self.now);
        }
    }

    /// A node loses its lease and goes on as a zombie, which may hear of the log or not.
    fn isolate(&mut self, at: usize) {
        if !self.nodes[at].lease || self.must_wait() {
            return;
        }
        if self.trace {
            eprintln!("{} isolate {at}", self.now);
        }
        self.nodes[at].lease = false;
        self.nodes[at].sync = None;
        self.nodes[at].enters_at = None;
        for instance in self.instances.iter_mut().filter(|i| i.node == at) {
            match self.rng.below(3) {
                0 => instance.frozen = true,
                1 => instance.held = true,
                _ => {}
            }
            self.nodes[at].frozen |= instance.frozen;
        }
        self.down(at);
        let mine = self.active.is_some_and(|a| self.instances[a].node == at);
        if mine {
            self.lose_gateway();
        }
    }

    fn down(&mut self, at: usize) {
        let (node, incarnation) = (self.nodes[at].id, self.nodes[at].incarnation);
        let reason = "lease".to_string();
        let _ = self.propose(Command::Down { node, incarnation, reason, at: self.now });
        self.after_change();
    }

    /// Declares dead nodes down, and starts them again.
    pub fn run_nodes(&mut self) {
        for at in 0..self.nodes.len() {
            let node = &self.nodes[at];
            if node.alive && (node.lease || node.enters_at.is_some()) {
                continue;
            }
            let up = self.state.nodes[&node.id].up;
            let known = self.state.nodes[&node.id].incarnation == node.incarnation;
            if !node.alive && up && known && self.rng.chance(20) {
                self.down(at);
            } else if self.rng.chance(if self.calm { 50 } else { 8 }) {
                self.start_node(at);
            }
        }
    }

    /// A clean hand-over: the guest stops, the volume is detached, another node takes it.
    fn hand_over(&mut self) {
        let Some(active) = self.active else { return };
        if !self.checker.idle() || !self.instances[active].gateway.is_idle() {
            return;
        }
        let writer = self.instances[active].gateway.config().writer;
        let _ = self.propose(Command::Detach { volume: self.volume, writer });
        self.active = None;
        self.after_change();
    }

    fn rot(&mut self) {
        // Long enough apart that no request meets two of them.
        let quiet =
            self.now > self.rotted + 300 && self.nodes.iter().all(|n| !n.store.has_damage());
        if quiet && self.rng.chance(10) {
            let at = self.rng.below(self.nodes.len() as u64) as usize;
            if self.nodes[at].store.damage(&mut self.rng) {
                self.rotted = self.now;
            }
        }
    }

    fn fill(&mut self) {
        let full = self.nodes.iter().position(|n| n.store.full > 0);
        match full {
            Some(at) if self.rng.chance(10) => self.nodes[at].store.full = 0,
            None if self.rng.chance(5) => {
                let at = self.rng.below(self.nodes.len() as u64) as usize;
                self.nodes[at].store.full = if self.rng.chance(500) { 1000 } else { 400 };
            }
            _ => {}
        }
    }

    /// Faults end.
    pub fn heal(&mut self) {
        for node in &mut self.nodes {
            node.store.full = 0;
        }
    }
}
