//! A volume as the clients of this node's exports see it. Attachments come and go behind it.
//!
//! ```text
//!               attached here                  the other node of a hand-over has it
//!   standing by ─────────────► with a device ─────────────────────────────────────► standing by
//!     requests wait, and         requests go │ fenced otherwise: the lock was broken,
//!     want the volume            to it       ▼ the volume is deleted, the last export is removed
//!                                         closed: requests fail
//! ```
//!
//! What a fenced gateway returns is carried out by the next one: it was never answered, so it is still in flight
//! for the guest, and may be carried out twice. But only for a client that is still there. Somebody else may
//! have used the volume since, and what a dead client has left must not be written after that.

use crate::cluster::{Cluster, lock};
use crate::exports::GiveBack;
use crate::volume::VolumeDevice;
use sheepdog_cluster::gateway::Phase;
use sheepdog_cluster::state::Volume;
use sheepdog_cluster::view::View;
use sheepdog_types::{Block, BlockError, BlockInfo, Burst, NodeId, Request, VolumeId, WriterGen};
use std::sync::{Arc, Mutex};
use std::time::Duration;

#[derive(Default)]
struct Inner {
    device: Option<Arc<VolumeDevice>>,
    /// Requests that wait for the volume. Bounded by the front ends.
    waiting: Vec<Request>,
    /// It will never have a device again.
    closed: bool,
    /// Clients have used it since this node was started.
    used: bool,
    /// Somebody is getting the volume for it.
    being_attached: bool,
    /// Devices in a row that were fenced before they had answered a request.
    futile: u32,
}

/// First and longest pause before the volume is taken back that was lost before it was of use. Two nodes whose
/// clients both have requests would else take it from each other all the time, and neither get anywhere.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(4);

/// See the [module](self).
pub struct Seat {
    name: String,
    volume: VolumeId,
    size: u64,
    cluster: Arc<Cluster>,
    inner: Mutex<Inner>,
}

/// What becomes of requests.
enum Fate {
    /// The device takes them.
    Serve(Arc<VolumeDevice>),
    /// This node has not heard of all yet.
    Wait,
    /// They need the volume, whose newest generation is this.
    Want(WriterGen),
    /// Another node has the volume and keeps it.
    Elsewhere(NodeId),
    /// This node has lost the volume, and not to a hand-over.
    Lost,
}

impl Seat {
    /// A seat without a device.
    #[must_use]
    pub fn new(volume: &Volume, cluster: &Arc<Cluster>) -> Arc<Self> {
        Arc::new(Self {
            name: volume.spec.name.clone(),
            volume: volume.id,
            size: volume.spec.size,
            cluster: Arc::clone(cluster),
            inner: Mutex::default(),
        })
    }

    /// Name of the volume.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The volume.
    #[must_use]
    pub fn volume(&self) -> VolumeId {
        self.volume
    }

    /// The device, as long as it is not fenced.
    #[must_use]
    pub fn device(&self) -> Option<Arc<VolumeDevice>> {
        let device = lock(&self.inner).device.clone();
        device.filter(|device| device.phase() != Phase::Fenced)
    }

    /// Whether all requests fail for good.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        lock(&self.inner).closed
    }

    /// Whether it had clients since this node was started.
    #[must_use]
    pub fn was_used(&self) -> bool {
        lock(&self.inner).used
    }

    /// Requests go to this device from now on, those that wait first.
    pub fn install(&self, device: Arc<VolumeDevice>) {
        let old = lock(&self.inner).device.replace(device);
        if let Some(old) = old {
            old.fence_off();
        }
        self.review();
    }

    /// The cluster has a new revision.
    pub fn handle_view(&self) {
        let device = lock(&self.inner).device.clone();
        if let Some(device) = device {
            device.handle_view();
        }
        self.review();
    }

    /// A fenced device has not carried these out, or not in full.
    pub fn take_back(&self, mut requests: Vec<Request>) {
        lock(&self.inner).waiting.append(&mut requests);
        self.review();
    }

    /// Whether requests need the volume; then how long to pause before it is taken over. From then on, until
    /// [`Seat::attach_ended`], nobody else hears so.
    #[must_use]
    pub fn begin_attach(&self) -> Option<Duration> {
        self.wanted()?;
        let mut inner = lock(&self.inner);
        if std::mem::replace(&mut inner.being_attached, true) {
            return None;
        }
        let pause = FIRST_PAUSE.saturating_mul(1 << inner.futile.saturating_sub(1).min(16));
        Some(if inner.futile == 0 { Duration::ZERO } else { pause.min(LONGEST_PAUSE) })
    }

    /// The generation to take the volume over from, if requests need that.
    #[must_use]
    pub fn wanted(&self) -> Option<WriterGen> {
        self.review();
        let inner = lock(&self.inner);
        match self.fate(&inner, &self.cluster.view()) {
            Fate::Want(seen) if !inner.waiting.is_empty() => Some(seen),
            _ => None,
        }
    }

    /// Whoever got the volume for it has, or has failed.
    pub fn attach_ended(&self) {
        lock(&self.inner).being_attached = false;
        self.review();
    }

    /// Fails all requests, now and later. Whatever the device had to do is undone or done.
    pub fn close(&self) {
        let (device, waiting) = {
            let mut inner = lock(&self.inner);
            inner.closed = true;
            (inner.device.clone(), std::mem::take(&mut inner.waiting))
        };
        fail(waiting);
        if let Some(device) = device {
            device.fence_off();
        }
    }

    /// Waits until no request is in progress, if there is somebody to carry them out.
    pub fn wait_idle(&self, timeout: Duration) {
        if let Some(device) = self.device() {
            device.wait_idle(timeout);
        }
    }

    /// Closes it; gives the attachment that it had.
    #[must_use]
    pub fn give_back(&self) -> Option<GiveBack> {
        let device = lock(&self.inner).device.clone();
        let attachment = device.map(|device| {
            let (volume, writer) = device.attachment();
            GiveBack { volume, writer, settled: device.is_settled() }
        });
        self.close();
        attachment
    }

    /// `serving`, or what it waits for, for people.
    #[must_use]
    pub fn describe(&self) -> String {
        let view = self.cluster.view();
        let address =
            |id| view.nodes.get(&id).map_or_else(|| id.to_string(), |n| n.address.clone());
        let fate = {
            let inner = lock(&self.inner);
            if inner.closed { Fate::Lost } else { self.fate(&inner, &view) }
        };
        match fate {
            Fate::Serve(device) if device.phase() == Phase::Serving => "serving".into(),
            Fate::Serve(_) => "waiting for all nodes to fence older writers".into(),
            Fate::Wait => "waiting for the cluster".into(),
            Fate::Lost => "fenced: another gateway has the volume, or its lock was broken; its \
                           clients get I/O errors"
                .into(),
            Fate::Elsewhere(holder) => {
                format!("handed over to {}; its clients get I/O errors", address(holder))
            }
            Fate::Want(_) => {
                let volume = view.volumes.get(&self.volume);
                let holder = volume.and_then(|v| v.attachment.as_ref()).map(|a| a.gateway);
                let handover = volume.and_then(|v| v.handover);
                let back = handover.is_some_and(|h| h.from == self.cluster.node);
                match holder.map(address) {
                    Some(holder) if back => {
                        format!(
                            "handed over to {holder}, comes back with the next request of a client"
                        )
                    }
                    Some(holder) => {
                        format!("incoming from {holder} with the first request of a client")
                    }
                    None => "incoming: attached with the first request of a client".into(),
                }
            }
        }
    }

    /// Why a new client would only get errors, if it would.
    #[must_use]
    pub fn refusal(&self) -> Option<String> {
        let view = self.cluster.view();
        let inner = lock(&self.inner);
        let useless =
            inner.closed || matches!(self.fate(&inner, &view), Fate::Lost | Fate::Elsewhere(_));
        useless.then(|| format!("another node has volume '{}', or its lock was broken", self.name))
    }

    fn fate(&self, inner: &Inner, view: &View) -> Fate {
        let (me, device) = (self.cluster.node, inner.device.as_ref());
        let Some(volume) = view.volumes.get(&self.volume) else { return Fate::Lost };
        if let Some(device) = device
            && device.attachment().1 >= volume.writer
        {
            // A replica may hear earlier than this node that somebody else has the volume.
            let fenced = device.phase() == Phase::Fenced;
            return if fenced { Fate::Wait } else { Fate::Serve(Arc::clone(device)) };
        }
        let want = Fate::Want(volume.writer);
        let shared = volume.handover.is_some_and(|h| h.involves(me));
        match &volume.attachment {
            _ if shared => want,
            // A device is on its way, or who was to bring it has failed.
            Some(attachment) if attachment.gateway == me => want,
            _ if device.is_some() => Fate::Lost,
            Some(attachment) if view.nodes.get(&attachment.gateway).is_some_and(|n| n.up) => {
                Fate::Elsewhere(attachment.gateway)
            }
            _ => want,
        }
    }

    /// Does with the requests that wait what the newest view tells.
    fn review(&self) {
        let (mut unwanted, mut serve, mut fenced) = (Vec::new(), None, None);
        {
            let mut inner = lock(&self.inner);
            let view = self.cluster.view();
            if inner.closed {
                unwanted.append(&mut inner.waiting);
            }
            unwanted.extend(inner.waiting.extract_if(.., |request| !request.token.is_wanted()));
            match self.fate(&inner, &view) {
                _ if inner.closed => {}
                Fate::Wait => {}
                Fate::Serve(device) => serve = Some((device, std::mem::take(&mut inner.waiting))),
                Fate::Want(_) => {
                    fenced = inner.device.take();
                    if let Some(device) = &fenced {
                        inner.futile = if device.was_useful() { 0 } else { inner.futile + 1 };
                    }
                    if !inner.waiting.is_empty() && !inner.being_attached {
                        self.cluster.takeovers.notify_one();
                    }
                }
                Fate::Elsewhere(_) => unwanted.append(&mut inner.waiting),
                Fate::Lost => {
                    inner.closed = true;
                    unwanted.append(&mut inner.waiting);
                }
            }
        }
        fail(unwanted);
        if let Some(device) = fenced {
            device.fence_off(); // it may not have heard yet: it returns what it has
        }
        if let Some((device, mut requests)) = serve.filter(|(_, requests)| !requests.is_empty()) {
            device.submit(&mut requests);
        }
    }
}

fn fail(requests: Vec<Request>) {
    let mut burst = Burst::new();
    for request in requests {
        request.token.complete(Err(BlockError::Io), &mut burst);
    }
}

impl Block for Seat {
    fn info(&self) -> BlockInfo {
        BlockInfo { size: self.size, read_only: false, serial: self.name.clone() }
    }

    fn submit(&self, batch: &mut Vec<Request>) {
        let device = {
            let mut inner = lock(&self.inner);
            inner.used = true;
            if inner.device.is_none() {
                inner.waiting.append(batch);
            }
            inner.device.clone()
        };
        match device {
            // A fenced one returns them.
            Some(device) => device.submit(batch),
            None => self.review(),
        }
    }

    fn client_gone(&self) {
        self.review();
    }
}
