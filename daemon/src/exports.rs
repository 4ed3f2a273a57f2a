//! What this node serves: which volumes, how, and where. Survives restarts.

use crate::api::{ExportInfo, Protocol};
use crate::cluster::{Cluster, lock};
use crate::dir::NodeDir;
use crate::peers::Peers;
use crate::replica::Replica;
use crate::volume::VolumeDevice;
use serde::{Deserialize, Serialize};
use sheepdog_cluster::gateway::{Config, Phase};
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
    /// The attachment to give back: the volume has no export any more.
    pub detach: Option<(VolumeId, WriterGen)>,
}

/// A volume that this node has attached.
struct Attached {
    device: Arc<VolumeDevice>,
    volume: VolumeId,
    writer: WriterGen,
}

#[derive(Default)]
struct Table {
    exports: Vec<Export>,
    attached: BTreeMap<String, Attached>,
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
        let table = lock(&self.table);
        table.attached.get(volume).is_some_and(|a| a.device.phase() != Phase::Fenced)
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

    /// Takes a volume that the log attached to this node.
    pub fn attach(&self, name: &str, config: Config) {
        let (volume, writer) = (config.volume, config.writer);
        let device = VolumeDevice::new(name, config, &self.cluster, &self.replica, &self.peers);
        let attached = Attached { device, volume, writer };
        let old = lock(&self.table).attached.insert(name.to_owned(), attached);
        if let Some(old) = old {
            old.device.fence_off();
        }
    }

    /// Adds an export of an attached volume, serves it and remembers it.
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
        let attached = if last { table.attached.remove(volume) } else { None };
        drop(table);
        let servers = removed.into_iter().filter_map(|e| e.server).collect();
        let attached: Vec<Attached> = attached.into_iter().collect();
        stop_serving(servers, &attached);
        let detach = attached.first().map(|a| (a.volume, a.writer));
        Ok(Removed { exports: infos, detach })
    }

    /// Gives back the attachment of a volume without exports, after a failed try to add one.
    pub fn release_unused(&self, volume: &str) -> Option<(VolumeId, WriterGen)> {
        let mut table = lock(&self.table);
        if table.exports.iter().any(|e| e.spec.volume == volume) {
            return None;
        }
        let attached = table.attached.remove(volume)?;
        Some((attached.volume, attached.writer))
    }

    /// Stops serving, keeping what is remembered; gives the attachments to give back.
    pub fn stop_all(&self) -> Vec<(VolumeId, WriterGen)> {
        let mut table = lock(&self.table);
        let servers: Vec<Server> =
            table.exports.iter_mut().filter_map(|e| e.server.take()).collect();
        let attached = std::mem::take(&mut table.attached);
        drop(table);
        let attached: Vec<Attached> = attached.into_values().collect();
        stop_serving(servers, &attached);
        attached.iter().map(|a| (a.volume, a.writer)).collect()
    }

    /// The devices of all attached volumes.
    #[must_use]
    pub fn devices(&self) -> Vec<Arc<VolumeDevice>> {
        lock(&self.table).attached.values().map(|a| Arc::clone(&a.device)).collect()
    }

    /// The device of a volume.
    #[must_use]
    pub fn device(&self, volume: &str) -> Option<Arc<VolumeDevice>> {
        lock(&self.table).attached.get(volume).map(|a| Arc::clone(&a.device))
    }

    fn save(&self, table: &Table) -> Result<(), crate::dir::DirError> {
        let specs: Vec<&ExportSpec> = table.exports.iter().map(|e| &e.spec).collect();
        self.dir.save(FILE, &specs)
    }
}

/// Stops servers, then the devices that are not served any more. Requests in progress get time to
/// finish, so that the next gateway finds equal replicas; then they fail.
fn stop_serving(servers: Vec<Server>, attached: &[Attached]) {
    let (done, finished) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            if finished.recv_timeout(DRAIN_TIMEOUT) == Err(mpsc::RecvTimeoutError::Timeout) {
                for Attached { device, .. } in attached {
                    tracing::warn!(
                        volume = device.name(),
                        "detached with requests in progress; they fail, and may or may not have \
                         been written"
                    );
                    device.fence_off();
                }
            }
        });
        servers.into_iter().for_each(Server::stop);
        for Attached { device, .. } in attached {
            device.wait_idle(DRAIN_TIMEOUT);
        }
        drop(done);
    });
    for Attached { device, .. } in attached {
        device.fence_off();
    }
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
    let attached = table
        .attached
        .get(&spec.volume)
        .ok_or_else(|| format!("volume '{}' is not attached here", spec.volume))?;
    let device = Arc::clone(&attached.device);
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
            let exports = Arc::new(OneExport { name: spec.volume.clone(), device });
            let limits = sheepdog_nbd::Limits::default();
            let handle = sheepdog_nbd::Server::start(listener, exports, limits);
            handle.map(Server::Nbd).map_err(|e| describe(&e))
        }
        Protocol::VhostUser => {
            let config = sheepdog_vhost::Config::default();
            let handle = sheepdog_vhost::VhostServer::start(&spec.address, device, config);
            handle.map(Server::Vhost).map_err(|e| describe(&e))
        }
    }
}

fn info(table: &Table, export: &Export) -> ExportInfo {
    let phase = table.attached.get(&export.spec.volume).map(|a| a.device.phase());
    let state = match (&export.problem, phase) {
        (Some(problem), _) => problem.clone(),
        (None, Some(Phase::Serving)) => "serving".into(),
        (None, Some(Phase::Fencing)) => "waiting for all nodes to fence older writers".into(),
        (None, Some(Phase::Fenced) | None) => {
            "fenced: another gateway has the volume; its clients get I/O errors".into()
        }
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
    device: Arc<VolumeDevice>,
}

impl NbdExports for OneExport {
    fn list(&self) -> Vec<String> {
        vec![self.name.clone()]
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Block>, OpenError> {
        if name != self.name {
            return Err(OpenError::Unknown);
        }
        Ok(self.device.clone())
    }
}
