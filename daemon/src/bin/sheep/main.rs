//! `sheep`: the daemon that runs on every host.

mod offline;

use clap::{Parser, ValueEnum};
use sheepdog::node::{self, Cache, Config, IoBackend, StartError};
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// The Sheepdog daemon: stores replicas of volumes and serves volumes to the guests of its host.
///
/// With an empty --dir and no --join it founds a cluster of one node that works at once. With
/// --join it becomes a member of an existing cluster. Started again with the same --dir it needs
/// neither.
///
/// Examples:
///   sheep --dir /var/lib/sheepdog
///   sheep --dir /srv/b --listen 127.0.0.1:7001 --join 127.0.0.1:7000
///   sheep --dir /srv/c --listen 127.0.0.1:7002 --join 127.0.0.1:7000 --no-disk
///   sheep check /var/lib/sheepdog      (while it is stopped)
///
/// SIGTERM and SIGINT stop it cleanly. It logs to standard error; RUST_LOG chooses what, as in
/// RUST_LOG=sheepdog=debug.
#[derive(Debug, Parser)]
#[command(name = "sheep", version, verbatim_doc_comment)]
#[command(subcommand_negates_reqs = true, args_conflicts_with_subcommands = true)]
struct Arguments {
    /// Without one, the daemon runs.
    #[command(subcommand)]
    command: Option<offline::Command>,
    /// Directory of this node; created when it does not exist.
    // Required, unless there is a subcommand.
    #[arg(long, value_name = "DIR", required = true)]
    dir: Option<PathBuf>,
    /// Address for peers, the cluster log and administration [default: the one used last, or
    /// 127.0.0.1:7000]
    #[arg(long, value_name = "IP:PORT")]
    listen: Option<SocketAddr>,
    /// A member of the cluster to join; may be repeated.
    #[arg(long, value_name = "IP:PORT")]
    join: Vec<SocketAddr>,
    /// Failure zone, such as a rack; replicas go to different zones [default: this node alone]
    #[arg(long, value_name = "NAME", value_parser = zone)]
    zone: Option<String>,
    /// Directory of a disk, and its share of the data relative to others; may be repeated
    /// [default: DIR/disk, weighted by its capacity in GiB]
    #[arg(long = "disk", value_name = "PATH[,WEIGHT]", value_parser = disk)]
    disks: Vec<(PathBuf, Option<u64>)>,
    /// A new node gets no disk: it serves volumes, and votes in the cluster log. As the third node
    /// beside two with disks it decides which of them goes on alone.
    #[arg(long, conflicts_with = "disks")]
    no_disk: bool,
    /// Allow addresses outside loopback although connections are not encrypted yet.
    #[arg(long)]
    insecure: bool,
    /// How disks are read and written: through the host's page cache, or past it (O_DIRECT), which
    /// leaves the memory to the guests.
    #[arg(long, value_enum, default_value_t = CacheMode::Page)]
    cache: CacheMode,
    /// What carries out disk I/O that has to wait.
    #[arg(long, value_enum, default_value_t = IoEngine::Auto)]
    io: IoEngine,
    /// How to write the log.
    #[arg(long, value_enum, default_value_t = LogFormat::Human)]
    log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    /// Lines for people.
    Human,
    /// A JSON object a line.
    Json,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum CacheMode {
    /// Through the page cache.
    Page,
    /// Past it.
    Direct,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum IoEngine {
    /// io_uring, or threads where the kernel refuses it.
    Auto,
    /// io_uring; without it sheep does not start.
    Uring,
    /// A few threads for each disk.
    Threads,
}

fn zone(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > 64 || text.chars().any(char::is_control) {
        return Err("a zone has 1 to 64 printable characters".into());
    }
    Ok(text.into())
}

fn disk(text: &str) -> Result<(PathBuf, Option<u64>), String> {
    let (path, weight) = match text.rsplit_once(',') {
        None => (text, None),
        Some((path, weight)) => {
            let weight: u64 =
                weight.parse().map_err(|_| format!("'{weight}' is not a weight; use PATH,100"))?;
            (path, Some(weight))
        }
    };
    if path.is_empty() { Err("the path is empty".into()) } else { Ok((path.into(), weight)) }
}

fn start_log(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| {
        EnvFilter::new("info,openraft=error,vhost=warn,vhost_user_backend=warn")
    });
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let log = log.with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Human => log.with_target(false).init(),
        LogFormat::Json => log.json().init(),
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(command) = &arguments.command {
        return command.run();
    }
    start_log(arguments.log_format);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("control")
        .enable_all()
        .build();
    let outcome = match runtime {
        Ok(runtime) => runtime.block_on(run(arguments)),
        Err(error) => Err(error.into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> Result<(), StartError> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let config = Config {
        dir: arguments.dir.expect("required without a subcommand"),
        listen: arguments.listen,
        join: arguments.join,
        zone: arguments.zone,
        disks: arguments.disks,
        no_disk: arguments.no_disk,
        insecure: arguments.insecure,
        cache: match arguments.cache {
            CacheMode::Page => Cache::Page,
            CacheMode::Direct => Cache::Direct,
        },
        io: match arguments.io {
            IoEngine::Auto => IoBackend::Auto,
            IoEngine::Uring => IoBackend::Uring,
            IoEngine::Threads => IoBackend::Threads,
        },
    };
    let node = tokio::select! {
        node = node::start(config) => node?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    let mut expelled = node.expelled.subscribe();
    let reason = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        reason = expelled.wait_for(Option::is_some) => reason.map_or(None, |r| r.clone()),
    };
    node.stop().await;
    reason.map_or(Ok(()), |reason| Err(reason.into()))
}
