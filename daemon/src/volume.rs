//! An attached volume: what carries out the requests of its clients, driven by a sans-IO gateway.
//!
//! Requests are worked on by the thread that brings them, answers by the thread that received
//! them. Answers go into an inbox first; whoever holds the gateway empties it before and after it
//! lets go, so an answer is never left lying, and no thread waits for another one's work.

use crate::cluster::{Cluster, lock};
use crate::peers::{Caller, Link, Peers};
use crate::replica::{Answer, Later, Replica};
use crate::seat::Seat;
use sheepdog_cluster::gateway::{Config, Effect, Gateway, Phase, ReplyData};
use sheepdog_cluster::message::{Blocks, Call, Request as CallRequest};
use sheepdog_types::{Burst, Completion, NodeId, Request, Token, VolumeId, WriterGen};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

enum Event {
    Answer(u64, Answer),
    Lost(NodeId),
    Connected(NodeId),
    View,
    Tick,
}

struct Inner {
    gateway: Gateway,
    links: HashMap<NodeId, Arc<Link>>,
    /// Links with calls that were queued and not sent.
    unsent: Vec<Arc<Link>>,
    done: Vec<(Token, Completion)>,
    /// Requests that the gateway returned: it is fenced.
    returned: Vec<Request>,
    /// Requests that came while this node had no right to serve (I8): the gateway answers some
    /// reads from what it knows, which others may have changed by then. Bounded by the front ends.
    held: Vec<Request>,
    /// Requests that guests wait for, and when that was last accounted for.
    in_progress: u64,
    accounted: Instant,
}

/// An attached volume. See the [module](self).
pub struct VolumeDevice {
    name: String,
    /// Takes what a fenced gateway returns.
    seat: Weak<Seat>,
    attachment: (VolumeId, WriterGen),
    cluster: Arc<Cluster>,
    replica: Arc<Replica>,
    peers: Arc<Peers>,
    inner: Mutex<Inner>,
    inbox: Mutex<Vec<Event>>,
    wants_tick: AtomicBool,
    /// It has answered a request.
    useful: AtomicBool,
    /// Signalled when the last request is done or the gateway gets another phase.
    calm: Condvar,
    calm_lock: Mutex<()>,
    this: Weak<Self>,
}

/// A local read, carried out after the gateway was let go.
struct LocalRead {
    id: u64,
    call: Call,
}

impl VolumeDevice {
    /// The device of a volume that was attached with this configuration.
    #[must_use]
    pub fn new(
        seat: &Arc<Seat>,
        config: Config,
        cluster: &Arc<Cluster>,
        replica: &Arc<Replica>,
        peers: &Arc<Peers>,
    ) -> Arc<Self> {
        let attachment = (config.volume, config.writer);
        let gateway = Gateway::new(config, cluster.view());
        let inner = Inner {
            gateway,
            links: HashMap::new(),
            unsent: Vec::new(),
            done: Vec::new(),
            returned: Vec::new(),
            held: Vec::new(),
            in_progress: 0,
            accounted: Instant::now(),
        };
        let device = Arc::new_cyclic(|this| Self {
            name: seat.name().into(),
            seat: Arc::downgrade(seat),
            attachment,
            cluster: Arc::clone(cluster),
            replica: Arc::clone(replica),
            peers: Arc::clone(peers),
            inner: Mutex::new(inner),
            inbox: Mutex::default(),
            wants_tick: AtomicBool::new(false),
            useful: AtomicBool::new(false),
            calm: Condvar::new(),
            calm_lock: Mutex::default(),
            this: this.clone(),
        });
        let caller: Arc<dyn Caller> = device.clone();
        peers.register(&caller);
        device.post(Event::View);
        device.pump_events();
        device
    }

    /// The volume's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its gateway stands.
    #[must_use]
    pub fn phase(&self) -> Phase {
        lock(&self.inner).gateway.phase()
    }

    /// The volume and the generation of this attachment.
    #[must_use]
    pub fn attachment(&self) -> (VolumeId, WriterGen) {
        self.attachment
    }

    /// Whether it has answered a request.
    #[must_use]
    pub fn was_useful(&self) -> bool {
        self.useful.load(Ordering::Relaxed)
    }

    /// Whether all replicas are equal: see [`Gateway::is_settled`].
    #[must_use]
    pub fn is_settled(&self) -> bool {
        lock(&self.inner).gateway.is_settled()
    }

    /// The cluster has a new revision.
    pub fn handle_view(&self) {
        self.post(Event::View);
        self.pump_events();
    }

    /// Some tens of milliseconds went by. False when nothing waits for that.
    pub fn handle_tick(&self) -> bool {
        let wanted = self.wants_tick.load(Ordering::Acquire);
        if wanted {
            self.post(Event::Tick);
            self.pump_events();
        }
        wanted
    }

    /// Waits until the gateway serves or is fenced; gives its phase.
    pub fn wait_settled(&self, timeout: Duration) -> Phase {
        self.wait_until(timeout, |inner| inner.gateway.phase() != Phase::Fencing);
        self.phase()
    }

    /// Waits until no request is in progress; false when it took too long.
    pub fn wait_idle(&self, timeout: Duration) -> bool {
        self.wait_until(timeout, |inner| inner.gateway.is_idle() && inner.held.is_empty())
    }

    fn wait_until(&self, timeout: Duration, reached: impl Fn(&Inner) -> bool) -> bool {
        let guard = lock(&self.calm_lock);
        let waiting = |_: &mut ()| !reached(&lock(&self.inner));
        let (guard, result) = self
            .calm
            .wait_timeout_while(guard, timeout, waiting)
            .unwrap_or_else(PoisonError::into_inner);
        drop(guard);
        !result.timed_out()
    }

    /// Returns every request to the seat from now on.
    pub fn fence_off(&self) {
        let mut inner = lock(&self.inner);
        inner.gateway.fence_off();
        self.work(inner);
        self.pump_events();
    }

    /// Takes all requests out of `batch`: see [`Block::submit`](sheepdog_types::Block::submit).
    pub fn submit(&self, batch: &mut Vec<Request>) {
        let mut inner = lock(&self.inner);
        self.account(&mut inner, batch.len() as u64, 0);
        inner.held.append(batch);
        self.work(inner);
        self.pump_events();
    }

    fn post(&self, event: Event) {
        lock(&self.inbox).push(event);
    }

    /// Works on what is in the inbox, unless somebody else is at it.
    fn pump_events(&self) {
        while !lock(&self.inbox).is_empty() {
            match self.inner.try_lock() {
                Ok(inner) => self.work(inner),
                Err(TryLockError::Poisoned(poisoned)) => self.work(poisoned.into_inner()),
                // The holder looks into the inbox again after it let go.
                Err(TryLockError::WouldBlock) => return,
            }
        }
    }

    /// Empties the inbox, runs all effects, lets the gateway go, and does what needs no gateway.
    /// The caller looks into the inbox again afterwards.
    fn work(&self, mut inner: MutexGuard<'_, Inner>) {
        let mut reads = Vec::new();
        loop {
            let events = std::mem::take(&mut *lock(&self.inbox));
            for event in events {
                self.feed(&mut inner.gateway, event);
            }
            self.take_held(&mut inner);
            self.run_effects(&mut inner, &mut reads);
            if lock(&self.inbox).is_empty() {
                break;
            }
        }
        let wants_tick = inner.gateway.wants_tick() || !inner.held.is_empty();
        if !self.wants_tick.swap(wants_tick, Ordering::AcqRel) && wants_tick {
            self.cluster.ticks.notify_one();
        }
        let calm = (inner.gateway.is_idle() && inner.held.is_empty())
            || inner.gateway.phase() == Phase::Fenced;
        let done = std::mem::take(&mut inner.done);
        if !done.is_empty() {
            self.useful.store(true, Ordering::Relaxed);
            self.account(&mut inner, 0, done.len() as u64);
        }
        let returned = std::mem::take(&mut inner.returned);
        inner.in_progress = inner.in_progress.saturating_sub(returned.len() as u64);
        let unsent = std::mem::take(&mut inner.unsent);
        drop(inner);
        for link in unsent {
            link.flush();
        }
        let mut burst = Burst::new();
        for (token, completion) in done {
            token.complete(completion, &mut burst);
        }
        for read in reads {
            if let Some(answer) = self.execute(read.id, &read.call, None) {
                self.post(Event::Answer(read.id, answer));
            }
        }
        drop(burst);
        if !returned.is_empty()
            && let Some(seat) = self.seat.upgrade()
        {
            seat.take_back(returned); // without a seat they fail, since their tokens are dropped
        }
        if calm {
            drop(lock(&self.calm_lock));
            self.calm.notify_all();
        }
    }

    /// Tells how long the requests in progress have been so, before some begin or end.
    fn account(&self, inner: &mut Inner, begun: u64, ended: u64) {
        let now = Instant::now();
        let time = now.saturating_duration_since(inner.accounted);
        self.cluster.clients.note(inner.in_progress, time, ended);
        inner.in_progress = (inner.in_progress + begun).saturating_sub(ended);
        inner.accounted = now;
    }

    fn feed(&self, gateway: &mut Gateway, event: Event) {
        match event {
            Event::Answer(id, answer) => {
                gateway.handle_reply(id, answer.reply, ReplyData { bytes: answer.data });
            }
            Event::Lost(node) => gateway.handle_unreachable(node),
            Event::Connected(node) => gateway.handle_reachable(node),
            Event::View => gateway.handle_view(self.cluster.view()),
            Event::Tick => gateway.handle_tick(),
        }
    }

    /// Passes requests on while this node may serve, and keeps them until it may.
    fn take_held(&self, inner: &mut Inner) {
        let fenced = inner.gateway.phase() == Phase::Fenced;
        if inner.held.is_empty() {
            return;
        }
        let view = self.cluster.view();
        if !(fenced || self.cluster.may_serve(&view)) {
            return;
        }
        // The right to serve is that of this view. A gateway that has not heard of it yet may answer
        // from what was before, when another gateway has had the volume since (I1).
        inner.gateway.handle_view(view);
        for request in inner.held.drain(..) {
            inner.gateway.handle_request(request.op, request.token);
        }
    }

    fn run_effects(&self, inner: &mut Inner, reads: &mut Vec<LocalRead>) {
        while let Some(effect) = inner.gateway.poll_effect() {
            match effect {
                Effect::Call { id, node, call, blocks } if node == self.cluster.node => {
                    if matches!(call.request, CallRequest::Read { .. }) {
                        reads.push(LocalRead { id, call });
                    } else if let Some(answer) = self.execute(id, &call, blocks.as_deref()) {
                        self.feed(&mut inner.gateway, Event::Answer(id, answer));
                    }
                }
                Effect::Call { id, node, call, blocks } => {
                    self.send(inner, node, id, &call, blocks.as_deref());
                }
                Effect::Complete { token, completion } => inner.done.push((token, completion)),
                Effect::Return { op, token } => inner.returned.push(Request { op, token }),
                Effect::LostWrites { object } => {
                    tracing::error!(
                        volume = self.name,
                        %object,
                        "acknowledged writes are lost: every replica restarted before a flush; \
                         the next flush fails, check the guest's file system"
                    );
                }
            }
        }
    }

    fn execute(&self, id: u64, call: &Call, blocks: Option<&Blocks>) -> Option<Answer> {
        let (crcs, data) = blocks.map_or((&[][..], &[][..]), |b| (b.crcs(), b.bytes()));
        self.replica.execute(call, crcs, data, || {
            let this = self.this.clone();
            let later: Later = Box::new(move |answer| {
                if let Some(device) = this.upgrade() {
                    device.deliver(id, answer);
                    device.pump();
                }
            });
            later
        })
    }

    fn send(&self, inner: &mut Inner, node: NodeId, id: u64, call: &Call, blocks: Option<&Blocks>) {
        let Some(this) = self.this.upgrade() else { return };
        let caller: Arc<dyn Caller> = this;
        let link = inner.links.entry(node).or_insert_with(|| self.peers.link(node));
        if !link.send(&caller, id, call, blocks) {
            inner.gateway.handle_unreachable(node);
        } else if !inner.unsent.iter().any(|known| Arc::ptr_eq(known, link)) {
            inner.unsent.push(Arc::clone(link));
        }
    }
}

impl Caller for VolumeDevice {
    fn deliver(&self, id: u64, answer: Answer) {
        self.post(Event::Answer(id, answer));
    }

    fn pump(&self) {
        self.pump_events();
    }

    fn lost(&self, node: NodeId) {
        self.post(Event::Lost(node));
        self.pump_events();
    }

    fn connected(&self, node: NodeId) {
        self.post(Event::Connected(node));
        self.pump_events();
    }
}
