//! The command line, and the request that each command is.

use crate::address::{parse_directory, parse_nbd, parse_node, parse_vhost_user};
use clap::{Args, Parser, Subcommand, value_parser};
use sheepdog::api::{Ack, Protocol, Request};
use sheepdog::scrub::MIN_RATE;
use sheepdog_types::parse_size;
use std::net::SocketAddr;

/// Administer a Sheepdog cluster from any host.
///
/// One request goes to one node, which speaks for the whole cluster; exports are those of the node
/// that is asked.
#[derive(Debug, Parser)]
#[command(
    name = "dog",
    version,
    arg_required_else_help = true,
    subcommand_required = true,
    disable_help_subcommand = true,
    after_help = "Exit codes: 0 done, 1 failed (the reason is on standard error), 2 usage.\n\n\
                  Example:\n  dog volume create vm1 10G\n  \
                  dog export add vm1 --vhost-user /run/sheepdog/vm1.sock\n  \
                  dog --node 10.0.0.5:7000 --json cluster health"
)]
pub struct Cli {
    /// Node to ask; host names are not looked up.
    #[arg(
        long,
        global = true,
        help_heading = "Global options",
        env = "SHEEPDOG_NODE",
        value_name = "IP:PORT",
        default_value = "127.0.0.1:7000",
        value_parser = parse_node
    )]
    pub node: SocketAddr,
    /// Print the answer as one JSON document, for scripts.
    #[arg(long, global = true, help_heading = "Global options")]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What the commands are about.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// See how the cluster is.
    #[command(
        subcommand,
        disable_help_subcommand = true,
        after_help = "Example:\n  dog cluster health"
    )]
    Cluster(ClusterCommand),
    /// See and change the nodes and their disks.
    #[command(subcommand, disable_help_subcommand = true, after_help = "Example:\n  dog node list")]
    Node(NodeCommand),
    /// Create, see and delete volumes.
    #[command(
        subcommand,
        visible_alias = "vdi",
        disable_help_subcommand = true,
        after_help = "Example:\n  dog volume create vm1 10G"
    )]
    Volume(VolumeCommand),
    /// Serve volumes to QEMU and other clients, on the node that is asked.
    #[command(
        subcommand,
        disable_help_subcommand = true,
        after_help = "Example:\n  dog export add vm1 --nbd 127.0.0.1:10809"
    )]
    Export(ExportCommand),
}

/// What `dog` does for a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// One request.
    Ask(Request),
    /// One request, then waits until it has come true.
    Wait(Request, Goal),
    /// Shows the health until all is well.
    Watch,
    /// Shows what giving up disks would lose, and gives them up if told to.
    Recover {
        /// Nodes and disks; all that are waited for when empty.
        targets: Vec<String>,
        /// Does it.
        force: bool,
        /// Without a typed confirmation.
        yes: bool,
    },
}

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// The node of the answer holds nothing any more.
    Drained,
    /// The disk of the answer has left the node.
    DiskGone,
}

/// `dog cluster …`
#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// Show id, leader, voters, counts and the last epochs.
    #[command(after_help = "Example:\n  dog cluster info")]
    Info,
    /// Show whether all data is served with all replicas, and if not, why and who is waited for.
    #[command(
        after_help = "Exits with 0 whenever the question was answered, whatever the answer; \
                      scripts read \"status\" of --json.\n\n\
                      Example:\n  dog cluster health\n  dog cluster health --watch\n  \
                      dog --json cluster health | jq -e '.status == \"ok\"'"
    )]
    Health {
        /// Go on until the status is ok and no disk recovers, with the progress of the recovery.
        #[arg(long)]
        watch: bool,
    },
    /// Show the settings of the cluster, or change one.
    #[command(after_help = "Settings are agreed by the whole cluster and take effect at once.\n\n\
                      Example:\n  dog cluster set\n  dog cluster set down-out-interval 30m\n  \
                      dog cluster set recovery.max-bandwidth 50MiB")]
    Set {
        /// Show only this setting.
        name: Option<String>,
        /// Change it to this value.
        value: Option<String>,
    },
    /// Give up nodes and disks that are lost for good, so that nothing waits for them any more.
    #[command(
        after_help = "Without --force it changes nothing and shows what waits for whom, and \
                      what would be lost. It exits with 1 if something would be. A disk that was \
                      given up and comes back after all is treated as an empty one.\n\n\
                      Example:\n  dog cluster recover\n  dog cluster recover 10.0.0.7:7000 --force"
    )]
    Recover {
        /// Addresses or ids of nodes, ids of disks; when absent, all that something waits for.
        #[arg(value_name = "NODE|DISK")]
        targets: Vec<String>,
        /// Do it, after the same text and a typed confirmation.
        #[arg(long)]
        force: bool,
        /// With --force: without the confirmation.
        #[arg(long, requires = "force")]
        yes: bool,
    },
}

/// `dog node …`
#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// List the nodes, a line for each of their disks.
    #[command(after_help = "Example:\n  dog node list")]
    List,
    /// Move all data away from a node that stays up, as before it is removed.
    #[command(
        after_help = "NODE is an address or id as in `dog node list`. Its copies stay and count \
                      until the others have them. Exports are not moved.\n\n\
                      Example:\n  dog node drain 10.0.0.7:7000 --wait\n  dog node remove 10.0.0.7:7000"
    )]
    Drain {
        /// Address or id of the node.
        #[arg(value_name = "NODE")]
        which: String,
        /// Even if too few nodes stay for the copies that volumes want.
        #[arg(long)]
        force: bool,
        /// Wait until it holds nothing, with the progress on standard error.
        #[arg(long)]
        wait: bool,
    },
    /// Let a drained node take data again.
    #[command(after_help = "Example:\n  dog node undrain 10.0.0.7:7000")]
    Undrain {
        /// Address or id of the node.
        #[arg(value_name = "NODE")]
        which: String,
    },
    /// End the membership of a node for good. There is no way back.
    #[command(
        after_help = "An up node has to be drained and serve nothing, or --force. A removed node \
                      stops, and never comes back; its host joins with empty directories as a new \
                      one.\n\n\
                      Example:\n  dog node remove 10.0.0.7:7000"
    )]
    Remove {
        /// Address or id of the node.
        #[arg(value_name = "NODE")]
        which: String,
        /// Even if it has data, serves volumes, or has the newest data of something.
        #[arg(long)]
        force: bool,
    },
    /// Change the share of the data that a disk gets.
    #[command(
        after_help = "The share is relative to that of other disks; by default it is the capacity \
                      in GiB. 0 moves everything away.\n\n\
                      Example:\n  dog node set-weight 10.0.0.7:7000 500\n  \
                      dog node set-weight 11aa22bb33cc44dd 2000"
    )]
    SetWeight {
        /// Id of the disk, or address or id of a node with one disk.
        #[arg(value_name = "DISK|NODE")]
        which: String,
        /// The share.
        weight: u64,
        /// Even if too few nodes stay for the copies that volumes want.
        #[arg(long)]
        force: bool,
    },
    /// Move a node to another failure zone.
    #[command(
        after_help = "Replicas go to different zones while there are enough. The new zone stays \
                      until sheep is started with another --zone than before.\n\n\
                      Example:\n  dog node set-zone 10.0.0.7:7000 rack2"
    )]
    SetZone {
        /// Address or id of the node.
        #[arg(value_name = "NODE")]
        which: String,
        /// The zone.
        zone: String,
    },
    /// Add, remove and list disks of the node that is asked, while it runs.
    #[command(
        subcommand,
        disable_help_subcommand = true,
        after_help = "Example:\n  dog --node 10.0.0.5:7000 node disk list"
    )]
    Disk(DiskCommand),
    /// Show how far the background recovery is, or pause it.
    #[command(args_conflicts_with_subcommands = true, after_help = "Example:\n  dog node recovery")]
    Recovery {
        /// Pause or resume it.
        #[command(subcommand)]
        command: Option<RecoveryCommand>,
    },
    /// Read all data on the disks of the node that is asked, in search of damage.
    #[command(
        subcommand,
        disable_help_subcommand = true,
        after_help = "Example:\n  dog node scrub start\n  dog --node 10.0.0.5:7000 node scrub status"
    )]
    Scrub(ScrubCommand),
}

/// `dog node disk …`
#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// Take a disk into service: makes a store in an empty directory.
    #[command(
        after_help = "The directory is on the host of the node that dog talks to (--node). A path \
                      where a disk of the node has failed is taken when it is empty; the failed one \
                      then leaves the cluster.\n\n\
                      Example:\n  dog node disk add /mnt/nvme1\n  dog node disk add /mnt/nvme1 --weight 500"
    )]
    Add {
        /// Directory on the disk's file system; made if it does not exist.
        #[arg(value_parser = parse_directory)]
        path: String,
        /// Its share of the data relative to other disks; its capacity in GiB when absent.
        #[arg(long, value_name = "W")]
        weight: Option<u64>,
    },
    /// Move the data of a disk to others, then close it.
    #[command(
        after_help = "Its copies stay and count until the others have them. Then the node closes \
                      the store and puts its files into the directory removed-DISK beside it, where \
                      they can be deleted. There is no way back.\n\n\
                      Example:\n  dog node disk remove /mnt/nvme1 --wait"
    )]
    Remove {
        /// Its id or path as in `dog node disk list`.
        #[arg(value_name = "DISK|PATH")]
        disk: String,
        /// Even if too few nodes stay for the copies that volumes want.
        #[arg(long)]
        force: bool,
        /// Wait until it is closed, with the progress on standard error.
        #[arg(long)]
        wait: bool,
    },
    /// List the disks of the node that is asked.
    #[command(after_help = "Example:\n  dog node disk list")]
    List,
}

/// `dog node recovery …`
#[derive(Clone, Copy, Debug, Subcommand)]
pub enum RecoveryCommand {
    /// Have the background recovery of the whole cluster stand still.
    #[command(after_help = "What a VM needs is recovered nevertheless, when it needs it.\n\n\
                      Example:\n  dog node recovery pause")]
    Pause,
    /// Have it go on.
    #[command(after_help = "Example:\n  dog node recovery resume")]
    Resume,
}

/// `dog node scrub …`
#[derive(Debug, Subcommand)]
pub enum ScrubCommand {
    /// Start a scrub on each disk of the node, or go on with a paused one.
    #[command(after_help = "A scrub that runs goes on, with the new rate. Damaged blocks are in \
                      `dog node scrub status`, and in `dog cluster health` until they are \
                      repaired.\n\n\
                      Example:\n  dog node scrub start\n  dog node scrub start --rate 64MiB")]
    Start {
        /// Most bytes per second to read from each disk, at least 4KiB, with a unit as in 32MiB; when absent, as
        /// before (16MiB).
        #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
        rate: Option<u64>,
    },
    /// Show how far the scrubs are, and which blocks are damaged.
    #[command(after_help = "Example:\n  dog node scrub status")]
    Status,
    /// Pause the scrubs that run; `start` goes on with them.
    #[command(after_help = "Example:\n  dog node scrub pause")]
    Pause,
}

/// `dog volume …`
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Create a volume that reads as zeroes; it takes space as it is written.
    #[command(after_help = "Example:\n  dog volume create vm1 10G\n  \
                            dog volume create scratch 512MiB --copies 1")]
    Create {
        /// Its name.
        name: String,
        /// Its size in bytes, or with a unit, all powers of 1024: 10G, 512MiB, 1.5T.
        #[arg(value_parser = parse_size)]
        size: u64,
        /// Replicas of each object, in different zones; the cluster chooses when absent (3).
        #[arg(long, value_name = "N", value_parser = value_parser!(u8).range(1..))]
        copies: Option<u8>,
        /// Fewest replicas with which I/O goes on; when absent, 2 of 3 copies, 1 of 1 or 2.
        #[arg(long, value_name = "N", value_parser = value_parser!(u8).range(1..))]
        min_copies: Option<u8>,
        /// When a write is acknowledged: held in memory by all replicas and durable at the guest's
        /// next flush, or durable at once.
        #[arg(long, value_name = "flush|commit", default_value = "flush", value_parser = parse_ack)]
        ack: Ack,
    },
    /// List the volumes.
    #[command(after_help = "Example:\n  dog volume list")]
    List,
    /// Show everything about a volume.
    #[command(after_help = "Example:\n  dog volume info vm1")]
    Info {
        /// Its name.
        name: String,
    },
    /// End the attachment of a volume, so that another node can have it.
    #[command(
        after_help = "The node that has the volume stops serving it and forgets its exports. It does not \
                      while clients are connected; the refusal says which node has the volume, and since \
                      when. The lock of a node that is down is no hindrance, not even without this \
                      command: `dog export add` on another node takes the volume over.\n\n\
                      --force breaks the lock in the log of the cluster, whoever has it and whether or not \
                      it answers. That node is fenced: it can neither read nor write the volume any more, \
                      and every request of its clients ends with an I/O error. Writes that they had not \
                      flushed may or may not be there. Its exports stay, out of service; remove them with \
                      `dog export remove` there, or it takes the volume back when it is started again.\n\n\
                      Example:\n  dog volume detach vm1\n  dog volume detach vm1 --force"
    )]
    Detach {
        /// Its name.
        name: String,
        /// Break the lock, although clients are connected or its node does not answer: they get I/O errors.
        #[arg(long)]
        force: bool,
    },
    /// End the hand-over of a volume, so that the node that has it keeps it.
    #[command(
        after_help = "While a VM is migrated, its volume may go back and forth between two nodes: from `dog \
                      export add --incoming` on the target until the source's last client has left. This \
                      ends it earlier. An export on the other node then gives errors to its clients.\n\n\
                      Example:\n  dog volume end-handover vm1"
    )]
    EndHandover {
        /// Its name.
        name: String,
    },
    /// Delete a volume and its data, without asking again. There is no way back.
    #[command(after_help = "Example:\n  dog volume delete vm1")]
    Delete {
        /// Its name.
        name: String,
    },
}

/// `dog export …`
#[derive(Debug, Subcommand)]
pub enum ExportCommand {
    /// Attach a volume to the node that is asked, and serve it there.
    #[command(after_help = "The export is added on the node that dog talks to (--node). Unix \
                      sockets are made on its host; a relative path starts at dog's current \
                      directory. Exports survive restarts of sheep.\n\n\
                      With --incoming the volume may be attached to another node: QEMU -incoming \
                      connects to the export while the source still runs, and its first request takes the \
                      volume over. docs/migration.md has the whole story.\n\n\
                      Example:\n  dog export add vm1 --vhost-user /run/sheepdog/vm1.sock\n  \
                      dog export add vm1 --nbd /run/sheepdog/vm1.nbd\n  \
                      dog export add vm1 --nbd 127.0.0.1:10809\n  \
                      dog export add vm1 --vhost-user /run/sheepdog/vm1.sock --incoming")]
    Add {
        /// The volume.
        volume: String,
        #[command(flatten)]
        how: AddHow,
        /// For the target of a migration: leave the volume to the node that has it until a client needs it
        /// here.
        #[arg(long)]
        incoming: bool,
    },
    /// List the exports of the node that is asked.
    #[command(after_help = "Example:\n  dog export list")]
    List,
    /// Stop serving a volume on the node that is asked: all its exports there, or the named ones.
    #[command(after_help = "It is an error if there is nothing to remove.\n\n\
                      Example:\n  dog export remove vm1                     all exports of vm1\n  \
                      dog export remove vm1 --nbd               its NBD exports\n  \
                      dog export remove vm1 --nbd 127.0.0.1:10809")]
    Remove {
        /// The volume.
        volume: String,
        #[command(flatten)]
        which: RemoveWhich,
    },
}

/// How an export is served.
#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
pub struct AddHow {
    /// As a vhost-user-blk device on this Unix socket, for a QEMU on the same host.
    #[arg(long, value_name = "PATH", value_parser = parse_vhost_user)]
    vhost_user: Option<String>,
    /// Over NBD on this Unix socket or TCP address.
    #[arg(long, value_name = "PATH|IP:PORT", value_parser = parse_nbd)]
    nbd: Option<String>,
}

/// Which exports of a volume.
#[derive(Args, Debug)]
#[group(multiple = false)]
pub struct RemoveWhich {
    /// Only those over NBD; with an address only that one.
    #[arg(long, value_name = "PATH|IP:PORT", num_args = 0..=1, value_parser = parse_nbd)]
    nbd: Option<Option<String>>,
    /// Only those over vhost-user; with a path only that one.
    #[arg(long, value_name = "PATH", num_args = 0..=1, value_parser = parse_vhost_user)]
    vhost_user: Option<Option<String>>,
}

impl Command {
    /// What to do.
    pub fn action(&self) -> Action {
        match self {
            Self::Cluster(command) => command.action(),
            Self::Node(command) => command.action(),
            Self::Volume(command) => Action::Ask(command.request()),
            Self::Export(command) => Action::Ask(command.request()),
        }
    }
}

impl ClusterCommand {
    fn action(&self) -> Action {
        Action::Ask(match self {
            Self::Info => Request::ClusterInfo,
            Self::Health { watch: true } => return Action::Watch,
            Self::Health { watch: false } => Request::ClusterHealth,
            Self::Set { name: Some(name), value: Some(value) } => {
                Request::ClusterSet { name: name.clone(), value: value.clone() }
            }
            Self::Set { name, .. } => Request::ClusterSettings { name: name.clone() },
            Self::Recover { targets, force, yes } => {
                return Action::Recover { targets: targets.clone(), force: *force, yes: *yes };
            }
        })
    }
}

impl NodeCommand {
    fn action(&self) -> Action {
        let owned = String::clone;
        Action::Ask(match self {
            Self::List => Request::NodeList,
            Self::Drain { which, force, wait } => {
                let request = Request::NodeDrain { node: owned(which), force: *force };
                return waiting(request, *wait, Goal::Drained);
            }
            Self::Undrain { which } => Request::NodeUndrain { node: owned(which) },
            Self::Remove { which, force } => {
                Request::NodeRemove { node: owned(which), force: *force }
            }
            Self::SetWeight { which, weight, force } => {
                let (target, weight, force) = (owned(which), *weight, *force);
                Request::NodeSetWeight { target, weight, force }
            }
            Self::SetZone { which, zone } => {
                Request::NodeSetZone { node: owned(which), zone: owned(zone) }
            }
            Self::Disk(DiskCommand::Add { path, weight }) => {
                Request::NodeDiskAdd { path: owned(path), weight: *weight }
            }
            Self::Disk(DiskCommand::Remove { disk, force, wait }) => {
                let request = Request::NodeDiskRemove { disk: owned(disk), force: *force };
                return waiting(request, *wait, Goal::DiskGone);
            }
            Self::Disk(DiskCommand::List) => Request::NodeDiskList,
            Self::Recovery { command: None } => Request::NodeRecovery,
            Self::Recovery { command: Some(command) } => {
                let paused = matches!(command, RecoveryCommand::Pause);
                Request::ClusterSet { name: "recovery.paused".into(), value: paused.to_string() }
            }
            Self::Scrub(command) => command.request(),
        })
    }
}

fn waiting(request: Request, wait: bool, goal: Goal) -> Action {
    if wait { Action::Wait(request, goal) } else { Action::Ask(request) }
}

fn parse_ack(text: &str) -> Result<Ack, String> {
    match text {
        "flush" => Ok(Ack::Flush),
        "commit" => Ok(Ack::Commit),
        _ => Err("use flush or commit".into()),
    }
}

impl ScrubCommand {
    fn request(&self) -> Request {
        match self {
            Self::Start { rate } => Request::NodeScrubStart { rate: *rate },
            Self::Status => Request::NodeScrubStatus,
            Self::Pause => Request::NodeScrubPause,
        }
    }
}

/// A rate as the node takes it.
fn parse_rate(text: &str) -> Result<u64, String> {
    match parse_size(text).map_err(|error| error.to_string())? {
        rate if rate < MIN_RATE => Err(format!("'{text}' is less than 4KiB per second")),
        rate => Ok(rate),
    }
}

impl VolumeCommand {
    fn request(&self) -> Request {
        match self {
            Self::Create { name, size, copies, min_copies, ack } => Request::VolumeCreate {
                name: name.clone(),
                size: *size,
                copies: *copies,
                min_copies: *min_copies,
                ack: *ack,
            },
            Self::List => Request::VolumeList,
            Self::Info { name } => Request::VolumeInfo { name: name.clone() },
            Self::Detach { name, force } => {
                Request::VolumeDetach { name: name.clone(), force: *force }
            }
            Self::EndHandover { name } => Request::VolumeEndHandover { name: name.clone() },
            Self::Delete { name } => Request::VolumeDelete { name: name.clone() },
        }
    }
}

impl ExportCommand {
    fn request(&self) -> Request {
        match self {
            Self::Add { volume, how, incoming } => {
                let ((protocol, address), incoming) = (how.choice(), *incoming);
                Request::ExportAdd { volume: volume.clone(), protocol, address, incoming }
            }
            Self::List => Request::ExportList,
            Self::Remove { volume, which } => {
                let (protocol, address) = which.choice();
                Request::ExportRemove { volume: volume.clone(), protocol, address }
            }
        }
    }
}

impl AddHow {
    fn choice(&self) -> (Protocol, String) {
        match (&self.vhost_user, &self.nbd) {
            (Some(path), _) => (Protocol::VhostUser, path.clone()),
            (None, Some(address)) => (Protocol::Nbd, address.clone()),
            (None, None) => unreachable!("the group of the options requires one"),
        }
    }
}

impl RemoveWhich {
    fn choice(&self) -> (Option<Protocol>, Option<String>) {
        match (&self.nbd, &self.vhost_user) {
            (Some(address), _) => (Some(Protocol::Nbd), address.clone()),
            (None, Some(path)) => (Some(Protocol::VhostUser), path.clone()),
            (None, None) => (None, None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split(' '))
    }

    fn request(line: &str) -> Request {
        match parse(line).unwrap_or_else(|error| panic!("{line}: {error}")).command.action() {
            Action::Ask(request) => request,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn commands_become_requests() {
        assert_eq!(request("dog cluster info"), Request::ClusterInfo);
        assert_eq!(request("dog cluster health"), Request::ClusterHealth);
        assert_eq!(request("dog node list"), Request::NodeList);
        assert_eq!(request("dog node scrub start"), Request::NodeScrubStart { rate: None });
        assert_eq!(
            request("dog node scrub start --rate 32MiB"),
            Request::NodeScrubStart { rate: Some(32 << 20) }
        );
        assert_eq!(request("dog node scrub status"), Request::NodeScrubStatus);
        assert_eq!(request("dog node scrub pause"), Request::NodeScrubPause);
        assert_eq!(request("dog volume list"), Request::VolumeList);
        let name = || "v".to_string();
        assert_eq!(request("dog volume info v"), Request::VolumeInfo { name: name() });
        assert_eq!(request("dog vdi delete v"), Request::VolumeDelete { name: name() });
        let detach = |force| Request::VolumeDetach { name: name(), force };
        assert_eq!(request("dog volume detach v"), detach(false));
        assert_eq!(request("dog volume detach --force v"), detach(true));
        let end = Request::VolumeEndHandover { name: name() };
        assert_eq!(request("dog volume end-handover v"), end);
        let create = |size, copies, min_copies, ack| Request::VolumeCreate {
            name: name(),
            size,
            copies,
            min_copies,
            ack,
        };
        assert_eq!(request("dog volume create v 10G"), create(10 << 30, None, None, Ack::Flush));
        assert_eq!(
            request("dog volume create v 10G --ack commit"),
            create(10 << 30, None, None, Ack::Commit)
        );
        assert_eq!(
            request("dog vdi create v 4096 --copies 2 --min-copies 1"),
            create(4096, Some(2), Some(1), Ack::Flush)
        );
    }

    #[test]
    fn exports_become_requests() {
        let add_with = |protocol, address: &str, incoming| Request::ExportAdd {
            volume: "v".into(),
            protocol,
            address: address.into(),
            incoming,
        };
        let add = |protocol, address| add_with(protocol, address, false);
        let incoming = add_with(Protocol::VhostUser, "/s", true);
        assert_eq!(request("dog export add v --vhost-user /s --incoming"), incoming);
        assert_eq!(request("dog export add v --nbd /s"), add(Protocol::Nbd, "/s"));
        assert_eq!(request("dog export add --nbd [::1]:1 v"), add(Protocol::Nbd, "[::1]:1"));
        assert_eq!(request("dog export add v --vhost-user /s"), add(Protocol::VhostUser, "/s"));
        assert_eq!(request("dog export list"), Request::ExportList);
        let remove = |protocol, address: Option<&str>| Request::ExportRemove {
            volume: "v".into(),
            protocol,
            address: address.map(Into::into),
        };
        assert_eq!(request("dog export remove v"), remove(None, None));
        assert_eq!(request("dog export remove v --nbd"), remove(Some(Protocol::Nbd), None));
        assert_eq!(
            request("dog export remove v --nbd 1.2.3.4:5"),
            remove(Some(Protocol::Nbd), Some("1.2.3.4:5"))
        );
        assert_eq!(
            request("dog export remove v --vhost-user=/s"),
            remove(Some(Protocol::VhostUser), Some("/s"))
        );
    }

    #[test]
    fn global_options_stand_anywhere() {
        for line in [
            "dog --node 1.2.3.4:5 --json volume list",
            "dog volume --json --node 1.2.3.4:5 list",
            "dog volume list --node 1.2.3.4:5 --json",
        ] {
            let cli = parse(line).unwrap();
            assert_eq!((cli.node, cli.json), (SocketAddr::from(([1, 2, 3, 4], 5)), true), "{line}");
        }
    }

    #[test]
    fn wrong_usage_is_refused() {
        for line in [
            "dog",
            "dog volume",
            "dog volume create v",
            "dog volume create v 5X",
            "dog volume create v 10G --copies 0",
            "dog volume create v 10G --copies 256",
            "dog volume info",
            "dog volume detach",
            "dog node scrub",
            "dog node scrub start --rate 0",
            "dog node scrub start --rate fast",
            "dog export add v",
            "dog export add v --nbd",
            "dog export add v --nbd /a --vhost-user /b",
            "dog export add v --nbd localhost:10809",
            "dog export add v --vhost-user 127.0.0.1:10809",
            "dog export remove",
            "dog export remove --nbd v",
            "dog export remove v --nbd --vhost-user",
            "dog --node localhost:7000 volume list",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
