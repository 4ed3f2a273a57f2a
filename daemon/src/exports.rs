//! What this node serves: which volumes, how, and where. Survives restarts.

use crate::api::{ExportInfo, Protocol};
use crate::cluster::{Cluster, lock};
use crate::dir::NodeDir;
use crate::peers::Peers;
use crate::replica::Replica;
use crate::seat::Seat;
use crate::volume::VolumeDevice;
use serde::{Deserialize, Serialize};
use sheepdog_cluster::command::Command;
use sheepdog_cluster::gateway::Config;
use sheepdog_cluster::state::Volume;
use sheepdog_nbd::{Exports as NbdExports, OpenError};
use sheepdog_types::{Block, VolumeId, WriterGen};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

const FILE: &str = "exports.json";
/// Most exports of a node (I10).
const MAX_EXPORTS: usize = 1024;
/// How long a stopping export waits for requests in progress.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// An export as it is remembered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportSpec {
    /// Name of the volume.
    pub volume: String,
    /// How it is served.
    pub protocol: Protocol,
    /// Path of the socket or `IP:PORT`.
    pub address: String,
}

enum Server {
    Nbd(sheepdog_nbd::ServerHandle),
    Vhost(sheepdog_vhost::ServerHandle),
}

impl Server {
    fn clients(&self) -> usize {
        match self {
            Self::Nbd(handle) => handle.clients(),
            Self::Vhost(handle) => handle.clients(),
        }
    }

    fn stop(self) {
        match self {
            Self::Nbd(handle) => handle.stop(),
            Self::Vhost(handle) => handle.stop(),
        }
    }
}

struct Export {
    spec: ExportSpec,
    server: Option<Server>,
    problem: Option<String>,
}

/// What [`ExportTable::remove`] did.
#[derive(Debug)]
pub struct Removed {
    /// The exports that are gone.
    pub exports: Vec<ExportInfo>,
    /// The volume, if it has no export here any more.
    pub last_of: Option<VolumeId>,
    /// The attachment to give back then.
    pub detach: Option<GiveBack>,
}

/// An attachment that is not used any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GiveBack {
    /// The volume.
    pub volume: VolumeId,
    /// Its generation.
    pub writer: WriterGen,
    /// Nothing was under way at its end, and all replicas are equal.
    pub settled: bool,
}

impl GiveBack {
    /// What tells the cluster.
    #[must_use]
    pub fn command(self) -> Command {
        let Self { volume, writer, settled } = self;
        Command::Detach { volume, writer, settled }
    }
}

#[derive(Default)]
struct Table {
    exports: Vec<Export>,
    /// The volumes that are attached here, or could be at any moment.
    seats: BTreeMap<String, Arc<Seat>>,
}

impl Table {
    /// The seat of a volume; a new one if there is none that can be used.
    fn seat(&mut self, volume: &Volume, cluster: &Arc<Cluster>) -> Arc<Seat> {
        let name = &volume.spec.name;
        if let Some(seat) = self.seats.get(name)
            && !seat.is_closed()
            && seat.volume() == volume.id
        {
            return Arc::clone(seat);
        }
        let seat = Seat::new(volume, cluster);
        if let Some(old) = self.seats.insert(name.clone(), Arc::clone(&seat)) {
            old.close();
        }
        seat
    }
}

/// The exports of this node.
pub struct ExportTable {
    dir: Arc<NodeDir>,
    cluster: Arc<Cluster>,
    replica: Arc<Replica>,
    peers: Arc<Peers>,
    insecure: bool,
    table: Mutex<Table>,
}

impl ExportTable {
    /// The exports remembered in `dir`, none of them served yet. Unless `insecure`, TCP exports
    /// are for loopback addresses only.
    ///
    /// # Errors
    /// A text for people, if they cannot be read.
    pub fn load(
        dir: Arc<NodeDir>,
        cluster: Arc<Cluster>,
        replica: Arc<Replica>,
        peers: Arc<Peers>,
        insecure: bool,
    ) -> Result<Self, crate::dir::DirError> {
        let specs: Vec<ExportSpec> = dir.load(FILE)?.unwrap_or_default();
        let waiting = Some("waiting for the cluster".to_owned());
        let exports = specs
            .into_iter()
            .map(|spec| Export { spec, server: None, problem: waiting.clone() })
            .collect();
        let table = Mutex::new(Table { exports, ..Table::default() });
        Ok(Self { dir, cluster, replica, peers, insecure, table })
    }

    /// Volumes with exports that are not served yet.
    #[must_use]
    pub fn pending(&self) -> Vec<String> {
        let table = lock(&self.table);
        let mut names: Vec<String> = table
            .exports
            .iter()
            .filter(|e| e.server.is_none())
            .map(|e| e.spec.volume.clone())
            .collect();
        names.dedup();
        names
    }

    /// Whether this node has `volume` attached and its gateway works.
    #[must_use]
    pub fn is_attached(&self, volume: &str) -> bool {
        self.device(volume).is_some()
    }

    /// Checks whether an export could be added, before its volume is attached for it.
    ///
    /// # Errors
    /// A text for people; nothing was changed.
    pub fn check(&self, spec: &ExportSpec) -> Result<(), String> {
        let table = lock(&self.table);
        if table.exports.len() >= MAX_EXPORTS {
            return Err(format!("this node has its maximum of {MAX_EXPORTS} exports"));
        }
        if let Some(other) = table.exports.iter().find(|e| e.spec.address == spec.address) {
            return Err(format!(
                "{} is in use by the export of volume '{}'; nothing was changed",
                spec.address, other.spec.volume
            ));
        }
        match spec.protocol {
            Protocol::VhostUser => check_path(&spec.address),
            Protocol::Nbd => match spec.address.parse::<SocketAddr>() {
                Ok(address) if !self.insecure && !address.ip().is_loopback() => Err(format!(
                    "{address} is not a loopback address, and NBD is not encrypted: anybody who \
                     reaches it could read and write the volume. Start sheep with --insecure if \
                     the network is private; nothing was changed"
                )),
                Ok(_) => Ok(()),
                Err(_) => check_path(&spec.address),
            },
        }
    }

    /// Takes a volume that the log attached to this node, as this generation.
    pub fn attach(&self, volume: &Volume, writer: WriterGen) -> Arc<VolumeDevice> {
        let config = Config {
            node: self.cluster.node,
            volume: volume.id,
            size: volume.spec.size,
            copies: usize::from(volume.spec.copies),
            min_copies: usize::from(volume.spec.min_copies),
            layer: volume.layer,
            writer,
            ack: volume.spec.ack,
        };
        let seat = lock(&self.table).seat(volume, &self.cluster);
        let device = VolumeDevice::new(&seat, config, &self.cluster, &self.replica, &self.peers);
        seat.install(Arc::clone(&device));
        device
    }

    /// Makes ready to take a volume over when a client needs it.
    pub fn stand_by(&self, volume: &Volume) {
        lock(&self.table).seat(volume, &self.cluster);
    }

    /// Whether there is exactly this export, and clients that it gets could be served some day.
    #[must_use]
    pub fn stands(&self, spec: &ExportSpec) -> bool {
        let table = lock(&self.table);
        table.exports.iter().any(|e| e.spec == *spec && e.server.is_some())
            && table.seats.get(&spec.volume).is_some_and(|seat| !seat.is_closed())
    }

    /// Adds an export of a volume that has a seat here, serves it and remembers it.
    ///
    /// # Errors
    /// A text for people; nothing was changed.
    pub fn add(&self, spec: ExportSpec) -> Result<ExportInfo, String> {
        self.check(&spec)?;
        let mut table = lock(&self.table);
        let server = start(&table, &spec)?;
        let export = Export { spec, server: Some(server), problem: None };
        let info = info(&table, &export);
        table.exports.push(export);
        if let Err(error) = self.save(&table) {
            if let Some(export) = table.exports.pop() {
                export.server.into_iter().for_each(Server::stop);
            }
            return Err(format!("the export cannot be remembered: {error}; it was not added"));
        }
        Ok(info)
    }

    /// Serves the remembered exports of an attached volume that are not served yet.
    pub fn resume(&self, volume: &str) {
        let mut guard = lock(&self.table);
        let table = &mut *guard;
        for at in 0..table.exports.len() {
            let export = &table.exports[at];
            if export.server.is_some() || export.spec.volume != volume {
                continue;
            }
            let outcome = start(table, &export.spec);
            let export = &mut table.exports[at];
            match outcome {
                Ok(server) => {
                    tracing::info!(volume, address = export.spec.address, "serving again");
                    (export.server, export.problem) = (Some(server), None);
                }
                Err(problem) => {
                    tracing::error!(volume, address = export.spec.address, problem, "not served");
                    export.problem = Some(problem);
                }
            }
        }
    }

    /// Notes why the exports of a volume are not served.
    pub fn set_problem(&self, volume: &str, problem: &str) {
        for export in &mut lock(&self.table).exports {
            if export.server.is_none() && export.spec.volume == volume {
                export.problem = Some(problem.to_owned());
            }
        }
    }

    /// All exports.
    #[must_use]
    pub fn list(&self) -> Vec<ExportInfo> {
        let table = lock(&self.table);
        table.exports.iter().map(|export| info(&table, export)).collect()
    }

    /// Stops and forgets exports.
    ///
    /// # Errors
    /// A text for people; nothing was changed.
    pub fn remove(
        &self,
        volume: &str,
        protocol: Option<Protocol>,
        address: Option<&str>,
    ) -> Result<Removed, String> {
        let matches = |spec: &ExportSpec| {
            spec.volume == volume
                && protocol.is_none_or(|p| p == spec.protocol)
                && address.is_none_or(|a| a == spec.address)
        };
        let mut table = lock(&self.table);
        if !table.exports.iter().any(|e| matches(&e.spec)) {
            return Err(format!(
                "this node has no such export of volume '{volume}'; `dog export list` shows them"
            ));
        }
        let mut removed = Vec::new();
        let mut infos = Vec::new();
        let mut at = 0;
        while at < table.exports.len() {
            if matches(&table.exports[at].spec) {
                infos.push(info(&table, &table.exports[at]));
                removed.push(table.exports.remove(at));
            } else {
                at += 1;
            }
        }
        if let Err(error) = self.save(&table) {
            table.exports.append(&mut removed);
            return Err(format!("cannot be remembered: {error}; nothing was changed"));
        }
        let last = !table.exports.iter().any(|e| e.spec.volume == volume);
        let seat = if last { table.seats.remove(volume) } else { None };
        drop(table);
        if let Some(seat) = seat.as_ref().filter(|seat| seat.device().is_none()) {
            seat.close(); // nobody will carry out what waits
        }
        let servers = removed.into_iter().filter_map(|e| e.server).collect();
        let last_of = seat.as_ref().map(|seat| seat.volume());
        let detach = stop_serving(servers, seat.into_iter().collect()).pop();
        Ok(Removed { exports: infos, last_of, detach })
    }

    /// Stops and forgets all exports of a volume, to give this attachment back, unless it has clients: then
    /// says how many.
    ///
    /// # Errors
    /// A text for people; nothing was changed.
    pub fn release(
        &self,
        name: &str,
        volume: VolumeId,
        writer: WriterGen,
    ) -> Result<Result<GiveBack, u32>, String> {
        let clients = self.clients().get(&volume).copied().unwrap_or(0);
        if clients > 0 {
            return Ok(Err(clients as u32));
        }
        let exported = lock(&self.table).exports.iter().any(|e| e.spec.volume == name);
        let attachment = if exported {
            self.remove(name, None, None)?.detach
        } else {
            self.release_unused(name)
        };
        // Its gateway may be still to come, or gone already: nobody is served.
        let other = GiveBack { volume, writer, settled: false };
        Ok(Ok(attachment.filter(|a| (a.volume, a.writer) == (volume, writer)).unwrap_or(other)))
    }

    /// Gives back the attachment of a volume without exports, after a failed try to add one.
    pub fn release_unused(&self, volume: &str) -> Option<GiveBack> {
        let mut table = lock(&self.table);
        if table.exports.iter().any(|e| e.spec.volume == volume) {
            return None;
        }
        let seat = table.seats.remove(volume)?;
        drop(table);
        stop_serving(Vec::new(), vec![seat]).pop()
    }

    /// Stops serving, keeping what is remembered; gives the attachments to give back.
    pub fn stop_all(&self) -> Vec<GiveBack> {
        let mut table = lock(&self.table);
        let servers: Vec<Server> =
            table.exports.iter_mut().filter_map(|e| e.server.take()).collect();
        let seats = std::mem::take(&mut table.seats);
        drop(table);
        stop_serving(servers, seats.into_values().collect())
    }

    /// How many clients each volume has that is attached to this node and served.
    #[must_use]
    pub fn clients(&self) -> BTreeMap<VolumeId, usize> {
        let table = lock(&self.table);
        let served = table.seats.values().filter(|seat| seat.device().is_some());
        served.map(|seat| (seat.volume(), table.clients_of(seat.name()))).collect()
    }

    /// How many clients the exports of a volume have, whether it is served or not.
    #[must_use]
    pub fn clients_of(&self, volume: &str) -> usize {
        lock(&self.table).clients_of(volume)
    }

    /// The devices of all attached volumes.
    #[must_use]
    pub fn devices(&self) -> Vec<Arc<VolumeDevice>> {
        self.seats().iter().filter_map(|seat| seat.device()).collect()
    }

    /// The device of a volume that is attached here.
    #[must_use]
    pub fn device(&self, volume: &str) -> Option<Arc<VolumeDevice>> {
        let seat = lock(&self.table).seats.get(volume).cloned();
        seat.and_then(|seat| seat.device())
    }

    /// The volumes that are attached here, or could be at any moment.
    #[must_use]
    pub fn seats(&self) -> Vec<Arc<Seat>> {
        lock(&self.table).seats.values().cloned().collect()
    }

    fn save(&self, table: &Table) -> Result<(), crate::dir::DirError> {
        let specs: Vec<&ExportSpec> = table.exports.iter().map(|e| &e.spec).collect();
        self.dir.save(FILE, &specs)
    }
}

impl Table {
    fn clients_of(&self, volume: &str) -> usize {
        let of = self.exports.iter().filter(|e| e.spec.volume == volume);
        of.filter_map(|e| e.server.as_ref()).map(Server::clients).sum()
    }
}

/// Stops servers, then the devices that are not served any more. Requests in progress get time to
/// finish, so that the next gateway finds equal replicas; then they fail.
fn stop_serving(servers: Vec<Server>, seats: Vec<Arc<Seat>>) -> Vec<GiveBack> {
    let seats = &seats;
    let (done, finished) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            if finished.recv_timeout(DRAIN_TIMEOUT) == Err(mpsc::RecvTimeoutError::Timeout) {
                for seat in seats {
                    tracing::warn!(
                        volume = seat.name(),
                        "detached with requests in progress; they fail, and may or may not have \
                         been written"
                    );
                    seat.close();
                }
            }
        });
        servers.into_iter().for_each(Server::stop);
        for seat in seats {
            seat.wait_idle(DRAIN_TIMEOUT);
        }
        drop(done);
    });
    seats.iter().filter_map(|seat| seat.give_back()).collect()
}

fn check_path(address: &str) -> Result<(), String> {
    let path = Path::new(address);
    if !path.is_absolute() {
        return Err(format!("'{address}' is not an absolute path; nothing was changed"));
    }
    if address.len() > 107 {
        return Err(format!("'{address}' is longer than a socket path may be (107 bytes)"));
    }
    if !path.parent().is_some_and(Path::is_dir) {
        return Err(format!("the directory of '{address}' does not exist on this node"));
    }
    Ok(())
}

fn start(table: &Table, spec: &ExportSpec) -> Result<Server, String> {
    let seat = table.seats.get(&spec.volume);
    let seat = seat.ok_or_else(|| format!("volume '{}' is not attached here", spec.volume))?;
    let seat = Arc::clone(seat);
    let describe = |error: &dyn std::fmt::Display| {
        format!("cannot serve on {}: {error}; nothing was changed", spec.address)
    };
    match spec.protocol {
        Protocol::Nbd => {
            let listener = match spec.address.parse::<SocketAddr>() {
                Ok(address) => sheepdog_nbd::Server::bind_tcp(address),
                Err(_) => sheepdog_nbd::Server::bind_unix(&spec.address, 0o600),
            };
            let listener = listener.map_err(|e| describe(&e))?;
            let exports = Arc::new(OneExport { name: spec.volume.clone(), seat });
            let limits = sheepdog_nbd::Limits::default();
            let handle = sheepdog_nbd::Server::start(listener, exports, limits);
            handle.map(Server::Nbd).map_err(|e| describe(&e))
        }
        Protocol::VhostUser => {
            let config = sheepdog_vhost::Config::default();
            let handle = sheepdog_vhost::VhostServer::start(&spec.address, seat, config);
            handle.map(Server::Vhost).map_err(|e| describe(&e))
        }
    }
}

fn info(table: &Table, export: &Export) -> ExportInfo {
    let state = match (&export.problem, table.seats.get(&export.spec.volume)) {
        (Some(problem), _) => problem.clone(),
        (None, Some(seat)) => seat.describe(),
        (None, None) => "stopping".into(),
    };
    ExportInfo {
        volume: export.spec.volume.clone(),
        protocol: export.spec.protocol,
        address: export.spec.address.clone(),
        clients: export.server.as_ref().map_or(0, Server::clients),
        state,
    }
}

/// One volume behind one NBD listener.
struct OneExport {
    name: String,
    seat: Arc<Seat>,
}

impl NbdExports for OneExport {
    fn list(&self) -> Vec<String> {
        vec![self.name.clone()]
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Block>, OpenError> {
        if name != self.name {
            return Err(OpenError::Unknown);
        }
        match self.seat.refusal() {
            Some(why) => Err(OpenError::Unavailable(why)),
            None => Ok(self.seat.clone()),
        }
    }
}
