//! The command line, and the request that each command is.

use crate::address::{parse_nbd, parse_node, parse_vhost_user};
use clap::{Args, Parser, Subcommand, value_parser};
use sheepdog::api::{Ack, Protocol, Request};
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
    /// See the nodes and their disks.
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
                      Example:\n  dog cluster health\n  \
                      dog --json cluster health | jq -e '.status == \"ok\"'"
    )]
    Health,
}

/// `dog node …`
#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// List the nodes, a line for each of their disks.
    #[command(after_help = "Example:\n  dog node list")]
    List,
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
                      Example:\n  dog export add vm1 --vhost-user /run/sheepdog/vm1.sock\n  \
                      dog export add vm1 --nbd /run/sheepdog/vm1.nbd\n  \
                      dog export add vm1 --nbd 127.0.0.1:10809")]
    Add {
        /// The volume.
        volume: String,
        #[command(flatten)]
        how: AddHow,
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
    /// What to ask the node.
    pub fn request(&self) -> Request {
        match self {
            Self::Cluster(ClusterCommand::Info) => Request::ClusterInfo,
            Self::Cluster(ClusterCommand::Health) => Request::ClusterHealth,
            Self::Node(NodeCommand::List) => Request::NodeList,
            Self::Volume(command) => command.request(),
            Self::Export(command) => command.request(),
        }
    }
}

fn parse_ack(text: &str) -> Result<Ack, String> {
    match text {
        "flush" => Ok(Ack::Flush),
        "commit" => Ok(Ack::Commit),
        _ => Err("use flush or commit".into()),
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
            Self::Delete { name } => Request::VolumeDelete { name: name.clone() },
        }
    }
}

impl ExportCommand {
    fn request(&self) -> Request {
        match self {
            Self::Add { volume, how } => {
                let (protocol, address) = how.choice();
                Request::ExportAdd { volume: volume.clone(), protocol, address }
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
        parse(line).unwrap_or_else(|error| panic!("{line}: {error}")).command.request()
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
        assert_eq!(request("dog volume list"), Request::VolumeList);
        let name = || "v".to_string();
        assert_eq!(request("dog volume info v"), Request::VolumeInfo { name: name() });
        assert_eq!(request("dog vdi delete v"), Request::VolumeDelete { name: name() });
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
        let add = |protocol, address: &str| Request::ExportAdd {
            volume: "v".into(),
            protocol,
            address: address.into(),
        };
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
