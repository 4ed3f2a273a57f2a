//! Data connections to the other nodes: one each, made when first needed and again when lost.

use crate::cluster::{Cluster, lock};
use crate::duplex::Duplex;
use crate::incompatible::Incompatible;
use crate::liveness::Reach;
use crate::replica::Answer;
use crate::wire::{HELLO_LEN, HELLO_TIMEOUT, Hello, HelloError, Kind};
use sheepdog_cluster::message::{self, Blocks, Call, FrameError, MAX_FRAME, Reply, Request, Tail};
use sheepdog_cluster::slab::Slab;
use sheepdog_cluster::view::View;
use sheepdog_types::{BLOCK_SIZE, ClusterId, DiskId, NodeId, WriterGen};
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak, mpsc};
use std::thread;
use std::time::Duration;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How long a blocking call waits for its answer.
const ASK_TIMEOUT: Duration = Duration::from_secs(10);

/// Whoever makes calls. All methods are called on the thread of a connection.
pub trait Caller: Send + Sync {
    /// Call `id` was answered. Note it; work on it in [`Caller::pump`].
    fn deliver(&self, id: u64, answer: Answer);
    /// A batch of answers ended.
    fn pump(&self);
    /// The connection to `node` was lost with calls on it.
    fn lost(&self, node: NodeId);
    /// There is a connection to `node` (again).
    fn connected(&self, node: NodeId);
}

/// Hears of nodes whose port refuses connections.
pub type OnRefused = Box<dyn Fn(NodeId) + Send + Sync>;

/// Connections to all peers.
pub struct Peers {
    cluster: Arc<Cluster>,
    id: ClusterId,
    links: Mutex<HashMap<NodeId, Arc<Link>>>,
    callers: Arc<Mutex<Vec<Weak<dyn Caller>>>>,
    on_refused: Arc<OnRefused>,
    incompatible: Arc<Incompatible>,
    /// Which nodes cannot be reached.
    pub reach: Arc<Reach>,
}

impl Peers {
    /// No connections yet.
    #[must_use]
    pub fn new(
        cluster: Arc<Cluster>,
        id: ClusterId,
        on_refused: OnRefused,
        incompatible: Arc<Incompatible>,
    ) -> Arc<Self> {
        Arc::new(Self {
            cluster,
            id,
            links: Mutex::default(),
            callers: Arc::default(),
            on_refused: Arc::new(on_refused),
            incompatible,
            reach: Arc::default(),
        })
    }

    /// Lets `caller` hear of connections.
    pub fn register(&self, caller: &Arc<dyn Caller>) {
        let mut callers = lock(&self.callers);
        callers.retain(|c| c.strong_count() > 0);
        callers.push(Arc::downgrade(caller));
    }

    /// The connection to `node`, which may still be being made.
    pub fn link(&self, node: NodeId) -> Arc<Link> {
        let mut links = lock(&self.links);
        let link = links.entry(node).or_insert_with(|| {
            let link = Arc::new(Link::new(node, Arc::clone(&self.reach)));
            let worker = LinkWorker {
                link: Arc::clone(&link),
                cluster: Arc::clone(&self.cluster),
                id: self.id,
                callers: Arc::clone(&self.callers),
                on_refused: Arc::clone(&self.on_refused),
                incompatible: Arc::clone(&self.incompatible),
            };
            let name = format!("link-{:04x}", node.0 >> 48);
            if let Err(error) = thread::Builder::new().name(name).spawn(move || worker.run()) {
                tracing::error!(%node, %error, "no thread for a connection");
            }
            link
        });
        Arc::clone(link)
    }

    /// Makes a call to a disk of another node and waits for the answer.
    ///
    /// # Errors
    /// When the node cannot be reached or does not answer; it may have carried the call out.
    pub fn ask(&self, view: &View, disk: DiskId, request: Request) -> io::Result<Answer> {
        self.ask_for(WriterGen(0), view, disk, request)
    }

    /// The same on behalf of this writer, who waits for it.
    ///
    /// # Errors
    /// As above.
    pub fn ask_for(
        &self,
        writer: WriterGen,
        view: &View,
        disk: DiskId,
        request: Request,
    ) -> io::Result<Answer> {
        let node = view.node_of(disk).ok_or(io::ErrorKind::NotFound)?;
        let link = self.link(node);
        link.wait_connected(CONNECT_TIMEOUT);
        let (sender, receiver) = mpsc::sync_channel(1);
        let caller: Arc<dyn Caller> = Arc::new(Waiter(sender));
        let call = Call { epoch: view.epoch, disk, writer, request };
        if !link.send(&caller, 0, &call, None) {
            return Err(io::ErrorKind::NotConnected.into());
        }
        link.flush();
        match receiver.recv_timeout(ASK_TIMEOUT) {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => Err(io::ErrorKind::ConnectionReset.into()),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    /// The connections with calls that were not answered yet.
    #[must_use]
    pub fn awaiting(&self) -> Vec<Arc<Link>> {
        lock(&self.links).values().filter(|link| link.is_awaiting()).map(Arc::clone).collect()
    }

    /// A control connection to `node` was refused.
    pub fn note_refused(&self, node: NodeId) {
        (self.on_refused)(node);
    }

    /// Closes all connections for good.
    pub fn stop(&self) {
        for link in lock(&self.links).values() {
            link.stop();
        }
    }
}

/// Waits for one answer.
struct Waiter(mpsc::SyncSender<Option<Answer>>);

impl Caller for Waiter {
    fn deliver(&self, _id: u64, answer: Answer) {
        let _ = self.0.try_send(Some(answer)); // nobody waits any more
    }
    fn pump(&self) {}
    fn lost(&self, _node: NodeId) {
        let _ = self.0.try_send(None);
    }
    fn connected(&self, _node: NodeId) {}
}

#[derive(Default)]
struct Calls {
    duplex: Option<Arc<Duplex>>,
    pending: Slab<(Arc<dyn Caller>, u64)>,
}

/// The connection to one node.
pub struct Link {
    node: NodeId,
    calls: Mutex<Calls>,
    changed: Condvar,
    stopped: AtomicBool,
    /// Counts batches of answers, on all its connections.
    heard: AtomicU64,
    reach: Arc<Reach>,
}

impl Link {
    fn new(node: NodeId, reach: Arc<Reach>) -> Self {
        let (stopped, heard) = (AtomicBool::new(false), AtomicU64::new(0));
        Self { node, calls: Mutex::default(), changed: Condvar::new(), stopped, heard, reach }
    }

    /// The node at its other end.
    #[must_use]
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// Grows with each batch of answers.
    #[must_use]
    pub fn heard(&self) -> u64 {
        self.heard.load(Ordering::Relaxed)
    }

    fn is_awaiting(&self) -> bool {
        let calls = lock(&self.calls);
        calls.duplex.is_some() && !calls.pending.is_empty()
    }

    /// Gives the connection up, if there is one: its calls are lost, and a new one is tried.
    pub fn give_up(&self) {
        if let Some(duplex) = &lock(&self.calls).duplex {
            duplex.stop();
        }
    }

    /// Queues a call; false when there is no connection. [`Link::flush`] sends it.
    pub fn send(
        &self,
        caller: &Arc<dyn Caller>,
        id: u64,
        call: &Call,
        blocks: Option<&Blocks>,
    ) -> bool {
        let mut calls = lock(&self.calls);
        let Some(duplex) = calls.duplex.clone() else { return false };
        let key = calls.pending.insert((Arc::clone(caller), id));
        let (crcs, data) = blocks.map_or((&[][..], &[][..]), |b| (b.crcs(), b.bytes()));
        // Under the lock: calls leave in the order in which they were made.
        duplex.queue(|out| message::encode(out, key, call, crcs, data));
        self.reach.await_answers();
        true
    }

    /// Sends what was queued.
    pub fn flush(&self) {
        let duplex = lock(&self.calls).duplex.clone();
        if let Some(duplex) = duplex {
            duplex.flush();
        }
    }

    fn wait_connected(&self, timeout: Duration) {
        let calls = lock(&self.calls);
        let unconnected = |calls: &mut Calls| calls.duplex.is_none();
        drop(
            self.changed
                .wait_timeout_while(calls, timeout, unconnected)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }

    fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.give_up();
        self.changed.notify_all();
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }
}

struct LinkWorker {
    link: Arc<Link>,
    cluster: Arc<Cluster>,
    id: ClusterId,
    callers: Arc<Mutex<Vec<Weak<dyn Caller>>>>,
    on_refused: Arc<OnRefused>,
    incompatible: Arc<Incompatible>,
}

impl LinkWorker {
    fn run(self) {
        let mut pause = FIRST_PAUSE;
        while !self.link.is_stopped() {
            match self.connect() {
                Ok(stream) => {
                    pause = FIRST_PAUSE;
                    self.link.reach.find(self.link.node);
                    self.serve(stream);
                }
                Err(error) => {
                    tracing::debug!(node = %self.link.node, %error, "cannot connect");
                    self.note(&error);
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
            self.rest(pause);
        }
    }

    /// What a failed try says about the network.
    fn note(&self, error: &HelloError) {
        let HelloError::Io(error) = error else { return };
        match error.kind() {
            // The host is there; its process is gone, which is told in another way.
            io::ErrorKind::ConnectionRefused => {}
            io::ErrorKind::AddrNotAvailable => self.link.reach.find(self.link.node),
            _ => self.link.reach.lose(self.link.node),
        }
    }

    /// Waits before the next try.
    fn rest(&self, pause: Duration) {
        let calls = lock(&self.link.calls);
        let going_on = |_: &mut Calls| !self.link.is_stopped();
        drop(
            self.link
                .changed
                .wait_timeout_while(calls, pause, going_on)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }

    fn connect(&self) -> Result<TcpStream, HelloError> {
        let view = self.cluster.view();
        let node = view.nodes.get(&self.link.node).filter(|n| n.up);
        let address = node.and_then(|n| n.address.parse::<SocketAddr>().ok());
        let Some(address) = address else {
            return Err(io::Error::from(io::ErrorKind::AddrNotAvailable).into());
        };
        let mut stream = match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
            Ok(stream) => stream,
            Err(error) => {
                if error.kind() == io::ErrorKind::ConnectionRefused {
                    (self.on_refused)(self.link.node);
                }
                return Err(error.into());
            }
        };
        let greeted = self.greet(&mut stream);
        self.incompatible.observe(&address.to_string(), &greeted);
        greeted.map(|()| stream)
    }

    fn greet(&self, stream: &mut TcpStream) -> Result<(), HelloError> {
        stream.set_read_timeout(Some(HELLO_TIMEOUT))?;
        stream.set_write_timeout(Some(HELLO_TIMEOUT))?;
        stream.write_all(&Hello::new(Kind::Data, self.id, self.cluster.node).encode())?;
        let mut answer = [0; HELLO_LEN];
        stream.read_exact(&mut answer)?;
        let answer = Hello::decode(&answer)?;
        answer.check_answer()?;
        if answer.node != self.link.node {
            return Err(io::Error::other("another node has this address by now").into());
        }
        Ok(())
    }

    fn serve(&self, stream: TcpStream) {
        let node = self.link.node;
        let duplex = match Duplex::new(stream) {
            Ok(duplex) => Arc::new(duplex),
            Err(error) => {
                tracing::warn!(%node, %error, "cannot set a connection up");
                return;
            }
        };
        lock(&self.link.calls).duplex = Some(Arc::clone(&duplex));
        self.link.changed.notify_all();
        tracing::info!(%node, "connected");
        self.tell_all(|caller| caller.connected(node));
        let ended = duplex.run(|bytes| self.handle(bytes));
        let pending = {
            let mut calls = lock(&self.link.calls);
            calls.duplex = None;
            std::mem::take(&mut calls.pending)
        };
        tracing::info!(%node, reason = %ended, "disconnected");
        for (_, (caller, _)) in pending.iter() {
            caller.lost(node);
        }
        self.tell_all(|caller| caller.lost(node));
    }

    fn tell_all(&self, tell: impl Fn(&dyn Caller)) {
        let callers: Vec<_> = lock(&self.callers).iter().filter_map(Weak::upgrade).collect();
        callers.iter().for_each(|caller| tell(caller.as_ref()));
    }

    /// Hands a batch of answers out.
    fn handle(&self, bytes: &[u8]) -> Result<usize, FrameError> {
        debug_assert!(bytes.len() <= MAX_FRAME);
        self.link.heard.fetch_add(1, Ordering::Relaxed);
        let mut used = 0;
        let mut touched: Vec<Arc<dyn Caller>> = Vec::new();
        while let Some(frame) = message::decode::<Reply>(&bytes[used..])? {
            used += frame.consumed;
            let crcs: Vec<u32> = frame.tail.crcs().collect();
            if !is_intact(&frame.tail, &crcs) {
                return Err(FrameError::Checksum);
            }
            let Some((caller, id)) = lock(&self.link.calls).pending.remove(frame.id) else {
                continue;
            };
            let data = frame.tail.data().to_vec();
            caller.deliver(id, Answer { reply: frame.head, crcs, data });
            if !touched.iter().any(|known| Arc::ptr_eq(known, &caller)) {
                touched.push(caller);
            }
        }
        touched.iter().for_each(|caller| caller.pump());
        Ok(used)
    }
}

/// Whether all blocks match their checksums (I7).
fn is_intact(tail: &Tail<'_>, crcs: &[u32]) -> bool {
    tail.data().chunks_exact(BLOCK_SIZE).zip(crcs).all(|(block, crc)| crc32c::crc32c(block) == *crc)
}
